"""A case: how to make a small model of a family, and the attention calls to expect in it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]
"""(frames, height, width) in latent tokens, after patching."""

Inputs = dict[str, Any]
"""Keyword arguments of a model's forward."""

Made = tuple[Any, Inputs]
"""A model and its inputs. Any, since a type checker does not see that a model of diffusers is an nn.Module."""

Make = Callable[[Grid, int], Made]

GRID: Grid = (5, 7, 9)
"""The usual grid: three different odd sizes, so that no other product matches it by chance."""

TEXT = 11
"""Number of tokens of every prompt."""

LAYERS = 2
"""Number of layers of each kind in every model."""

NOISE = 0.1
"""Standard deviation of the noise that is added to every weight."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One attention call: the video tokens in its sequence, and the numbers of other tokens around them."""

    grid: Grid | None
    """None: this attention must stay dense (over text, within a frame, along time, cross)."""
    before: int = 0
    """Number of other tokens before the video's in the sequence."""
    after: int = 0
    """Number of other tokens after the video's."""
    kind: Literal["self", "joint", "cross"] = "self"

    @property
    def tokens(self) -> int | None:
        """Number of query tokens of the call; None without a grid."""
        if self.grid is None:
            return None
        return self.before + math.prod(self.grid) + self.after


CROSS = Expected(grid=None, kind="cross")
DENSE = Expected(grid=None)
"""Self-attention among tokens outside the video, or among a part of the video's tokens."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model family: a function that makes a small model, and its attention calls in the order of a forward."""

    name: str
    make: Make
    """(grid, batch) -> (model, forward's keyword arguments), drawn from the global generator."""
    calls: Callable[[Grid, int], list[Expected]]
    """Every call of scaled_dot_product_attention, for a grid and a batch."""

    def expect(self, grid: Grid = GRID, batch: int = 2) -> list[Expected]:
        """The attention calls of the model that `build` makes for the same grid and batch."""
        return self.calls(grid, batch)

    def build(self, grid: Grid = GRID, batch: int = 2, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The model in eval mode and the inputs of one forward; the state of the global generator stays."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model, inputs = self.make(grid, batch)
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=NOISE)
        return model.eval(), inputs | {"return_dict": False}


CASES: dict[str, Case] = {}


def family(calls: Callable[[Grid, int], list[Expected]]) -> Callable[[Make], Make]:
    """Add a case to `CASES`, with the name of the function that makes its model."""

    def register(make: Make) -> Make:
        CASES[make.__name__] = Case(name=make.__name__, make=make, calls=calls)
        return make

    return register


def latents(grid: Grid, batch: int, *, channels: int = 4, patch: Grid = (1, 2, 2)) -> Tensor:
    """[B, C, F, H, W] noise, whose patches form the grid."""
    return torch.randn(batch, channels, *(n * p for n, p in zip(grid, patch, strict=True)))


def prompt(batch: int, width: int = 16, tokens: int = TEXT) -> Inputs:
    return {"encoder_hidden_states": torch.randn(batch, tokens, width)}


def lengths(batch: int) -> list[int]:
    """Number of tokens of each prompt without padding."""
    return [TEXT - 3 - item % 4 for item in range(batch)]


def padding(batch: int) -> Tensor:
    """[B, TEXT] of 1 and 0: prompts of different lengths, each padded at its end."""
    return (torch.arange(TEXT) < torch.tensor(lengths(batch))[:, None]).long()


def time_step(batch: int) -> Inputs:
    return {"timestep": torch.full((batch,), 500)}


def layers_with_cross(grid: Grid, batch: int) -> list[Expected]:
    """Self-attention over the video, then cross-attention to the prompt, in every layer."""
    return [Expected(grid=grid), CROSS] * LAYERS


def text_first(grid: Grid, batch: int) -> list[Expected]:
    """Joint attention with the text before the video in every layer."""
    return [Expected(grid=grid, before=TEXT, kind="joint")] * LAYERS


def history(grid: Grid, *scales: int) -> int:
    """Number of tokens of one frame of history, summed over scales; height and width are padded to patches."""
    return sum(-(-grid[1] // n) * -(-grid[2] // n) for n in scales)


def output_of(result: Any) -> Tensor:
    """The tensor in the result of a model's forward: itself, in a tuple, or in an output of diffusers."""
    if isinstance(result, Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result.sample


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of a model's parameter; the model's own gradients are cleared."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
