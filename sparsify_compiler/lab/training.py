"""Training by flow matching. All randomness is a function of the step, so a run resumes exactly.

A run is a folder: `checkpoint.pt` (weights, their average, optimizers, step), `log.jsonl` and sample pictures.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.lab import world
from sparsify_compiler.lab.files import DamagedError, read_tensors
from sparsify_compiler.lab.machine import bfloat16_products, fast_products
from sparsify_compiler.lab.model import check_frames, encode, to_model
from sparsify_compiler.lab.sampling import SHIFT, Velocity, check_shift

WIDEST = 1024
"""Largest batch. The index of a step's first video is the step times this."""
LEVELS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Noise levels t of the validation loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of training on videos of one length."""

    frames: int
    batch: int
    steps: int
    spacing: int = 1
    """Frames from one frame to the next, which the model knows: more movement in the same number of tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= WIDEST or min(self.steps, self.spacing) < 1:
            raise OptionError(
                f"a stage must have a batch of 1 to {WIDEST}, steps and a spacing of at least 1, got {self}"
            )
        check_frames(self.frames, spacing=self.spacing)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings of a training run."""

    stages: tuple[Stage, ...]
    """Stages, one after the other. The last has no end."""
    matrix_rate: float = 0.015
    """Learning rate of Muon, for the matrices inside the blocks."""
    rate: float = 1.5e-3
    """Learning rate of AdamW, for the other parameters."""
    warmup: int = 100
    """Steps in which the rates rise, from the start of the optimizers."""
    settle: int = 4000
    """The rates fall as 1 / sqrt(1 + step / settle)."""
    end: int | None = None
    """The last step, where the rates reach 0 in a straight line; None for no end."""
    cooldown: int = 250
    """Steps of the straight line to 0."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Greatest norm of the gradient of AdamW's parameters. Muon's updates do not depend on the norm."""
    dropout: float = 0.12
    """Share of the videos without a prompt, for guidance."""
    shift: float = SHIFT
    """Shift of the noise levels: above 1, more of them are near pure noise."""
    power: float = 64.0
    """The averaged weights are those of about the last 1 / power of all steps, at every step."""
    seed: int = world.TRAINING

    def __post_init__(self) -> None:
        if self.cooldown < 1:
            raise OptionError(f"cooldown must be at least 1 step, got {self.cooldown}")
        check_shift(self.shift)

    def stage(self, step: int) -> Stage:
        """The stage of a step."""
        for stage in self.stages[:-1]:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and target of one step."""

    noisy: Tensor
    """float32 [batch, 3, frames, HEIGHT, WIDTH]"""
    time: Tensor
    """float32 [batch], 0 to 1"""
    text: Tensor
    """float32 [batch, TEXT_TOKENS, TEXT_DIM]"""
    velocity: Tensor
    """The target of the model's output, of the shape of `noisy`."""


def batch(recipe: Recipe, step: int) -> Batch:
    """The batch of a step, a pure function of recipe and step."""
    stage = recipe.stage(step)
    scenes = [world.scene(recipe.seed, step * WIDEST + number) for number in range(stage.batch)]
    video = to_model(world.videos(scenes, stage.frames, stage.spacing))
    generator = torch.Generator().manual_seed(recipe.seed << 40 | step)
    # One draw for each video, from equal parts of the normal distribution.
    even = (
        torch.randperm(stage.batch, generator=generator) + torch.rand(stage.batch, generator=generator)
    ) / stage.batch
    odds = torch.exp(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)))
    level = recipe.shift * odds / (1 + recipe.shift * odds)
    text = encode([scene.prompt for scene in scenes])
    text[torch.rand(stage.batch, generator=generator) < recipe.dropout] = 0
    return mixed(video, torch.randn(video.shape, generator=generator), level, text)


def mixed(video: Tensor, noise: Tensor, level: Tensor, text: Tensor) -> Batch:
    """Mix videos and noise [batch, ...] at levels [batch]."""
    share = level.view(-1, 1, 1, 1, 1)
    return Batch(torch.lerp(video, noise, share), level, text, noise - video)


def loss(model: Velocity, batch: Batch) -> Tensor:
    """Mean squared error of the velocity for each video, with `fast_products`: float32 [batch]."""
    with fast_products():
        (velocity,) = model(batch.noisy, 1000 * batch.time, batch.text, return_dict=False)
    return (velocity.float() - batch.velocity).square().mean(dim=(1, 2, 3, 4))


@torch.no_grad()
def validation(model: Velocity, frames: int, count: int = 8, spacing: int = 1) -> dict[float, float]:
    """Mean loss on validation videos at each of `LEVELS`. Every call has the same videos and noise."""
    scenes = [world.scene(world.VALIDATION, number) for number in range(count)]
    video, text = to_model(world.videos(scenes, frames, spacing)), encode([scene.prompt for scene in scenes])
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(world.VALIDATION))
    return {
        level: loss(model, mixed(video, noise, torch.full((count,), level), text)).mean().item()
        for level in LEVELS
    }


class Trainer:
    """A model, the average of its weights over the last steps, and its optimizers."""

    def __init__(self, model: nn.Module, recipe: Recipe, *, step: int = 0, compiled: bool = True) -> None:
        """Start with fresh optimizers at `step`, and with the model's weights as their average."""
        self.model, self.recipe = model, recipe
        self.compiled: Velocity = torch.compile(model, dynamic=False) if compiled else model
        self.step = self.start = step
        self.average = {name: value.detach().clone() for name, value in model.named_parameters()}
        inside = [
            value
            for name, value in model.named_parameters()
            if name.startswith("blocks.") and value.ndim == 2
        ]
        rest = [value for value in model.parameters() if all(value is not other for other in inside)]
        self.rest = rest
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                inside, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, momentum=0.95, nesterov=True
            ),
            torch.optim.AdamW(
                rest, lr=recipe.rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=True
            ),
        )
        self.peaks = (recipe.matrix_rate, recipe.rate)

    def advance(self) -> float:
        """Train one step; return the mean loss of its batch."""
        error = loss(self.compiled, batch(self.recipe, self.step)).mean()
        if not error.isfinite():
            raise SparsifyError(f"the loss must be finite, got {error.item()} at step {self.step}")
        error.backward()
        nn.utils.clip_grad_norm_(self.rest, self.recipe.clip)
        scale = self.scale()
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            with bfloat16_products():  # of Muon
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        keep = (1 - 1 / self.step) ** (self.recipe.power + 1)
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                self.average[name].lerp_(value, 1 - keep)
        return error.item()

    def scale(self) -> float:
        """Share of the peak rates at this step."""
        recipe = self.recipe
        scale = min(1, (self.step - self.start + 1) / recipe.warmup)
        scale /= math.sqrt(1 + self.step / recipe.settle)
        if recipe.end is not None:
            scale *= min(1, max(0, recipe.end - self.step) / recipe.cooldown)
        return scale

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        own = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        self.assign(self.average)
        try:
            yield
        finally:
            self.assign(own)

    @torch.no_grad()
    def assign(self, weights: dict[str, Tensor]) -> None:
        """Copy weights by name into the model."""
        for name, value in self.model.named_parameters():
            value.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write all that training continues from. The file is complete or missing."""
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "start": self.start,
                "recipe": asdict(self.recipe),
                "weights": dict(self.model.named_parameters()),
                "average": self.average,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
            partial,
        )
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continue from a file that `save` wrote, with this trainer's own recipe.

        Raises:
            DamagedError: the file cannot be read, or is of another model.
        """
        state: dict[str, Any] = read_tensors(path)
        try:
            self.step, self.start = state["step"], state["start"]
            self.assign(state["weights"])
            for name, value in self.average.items():
                value.copy_(state["average"][name])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise DamagedError(
                f"{path} is no checkpoint of this model ({error}): begin in another folder"
            ) from error
