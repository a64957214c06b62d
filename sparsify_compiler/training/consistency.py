"""Multistep latent consistency distillation: few steps instead of many (Heek et al., arXiv 2403.06807).

    trainer = ConsistencyTrainer(student, teacher, ConsistencyConfig(segments=5, guidance=5.0, shift=3.0))
    for video, text, no_text in data:
        trainer.loss(video, {"encoder_hidden_states": text}, {"encoder_hidden_states": no_text}).backward()
        optimizer.step(); optimizer.zero_grad()
        trainer.step()
    video = sample_few_steps(student, noise, {"encoder_hidden_states": text}, trainer.config)

It is the first stage of Efficient-vDiT (arXiv 2502.06155). The convention is that of flow matching, as in Wan:
x_t = (1 - t) video + t noise for t from 0 to 1. A model gets 1000 t and returns the velocity, noise - video. The
times of the teacher's sampler fall from 1 to 0. Its steps are split into segments of equal length. The student
f(x_t) = x_t + (e - t) v(x_t, t) learns the point where the teacher's trajectory through x_t ends its segment, at
time e. The target predicts this point from s, one step of the solver after t:

    x_s = x_t + (s - t) v_teacher(x_t, t),    f(x_t) = x_s + (e - s) v_target(x_s, s),

with guidance inside the teacher and the moving average of the student as target. A step of Euler and a step of DDIM
are the same here: DDIM moves to (1 - s) video + s noise with its predictions of both, which is x_t + (s - t) v. So
the velocity for the student is an average of the teacher's and the target's velocity, and is computed as one.
"""

import copy
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import _torch
from sparsify_compiler.config import integer
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.training.pairs import Model, modules_of

FORMAT = "sparsify-consistency-training-1"
Conditioning = Mapping[str, Any]
"""Arguments of a model, except `hidden_states`, `timestep` and `return_dict`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyConfig:
    """The settings of a consistency distillation."""

    segments: int
    """Number of segments of the trajectory, and of steps of the student. 1: one step from noise to the video."""
    solver_steps: int = 50
    """Number of steps of the teacher's sampler; a multiple of `segments`."""
    shift: float = 1.0
    """Shift of the times, as in the teacher's sampler: above 1, more of its steps lie near the noise."""
    guidance: float = 1.0
    """Guidance in the teacher: v = v_without + guidance (v_with - v_without). The student learns it."""
    ema: float = 0.95
    """Share of the target's own weights that it keeps at every step."""
    huber: float = 1e-3
    """c in the loss sqrt(d^2 + c^2) - c of a difference d: about squared for d below c, absolute above."""
    seed: int = 0
    """Seed of noise and times. Ranks with different videos need different seeds."""

    def __post_init__(self) -> None:
        for name, least in (("solver_steps", 1), ("segments", 1), ("seed", 0)):
            number = integer(getattr(self, name))
            if number is None or number < least:
                raise SparsifyError(
                    f"{name} must be an integer of at least {least}, got {getattr(self, name)!r}"
                )
        if self.solver_steps % self.segments:
            fitting = [n for n in range(1, self.solver_steps + 1) if self.solver_steps % n == 0]
            raise SparsifyError(
                f"segments must divide the {self.solver_steps} solver steps, got {self.segments}: try one of "
                f"{', '.join(map(str, fitting))}, or other solver_steps"
            )
        for name in ("shift", "huber"):
            if not _finite(getattr(self, name)) or getattr(self, name) <= 0:
                raise SparsifyError(f"{name} must be a finite number above 0, got {getattr(self, name)!r}")
        if not _finite(self.guidance) or self.guidance < 0:
            raise SparsifyError(f"guidance must be a finite number of at least 0, got {self.guidance!r}")
        if not _finite(self.ema) or not 0 <= self.ema < 1:
            raise SparsifyError(f"ema must be a number in [0, 1), got {self.ema!r}")

    @property
    def times(self) -> Tensor:
        """Times of the solver, falling from 1 to 0: float32 [solver_steps + 1]."""
        even = torch.linspace(1, 0, self.solver_steps + 1, dtype=torch.float64)
        return (self.shift * even / (1 + (self.shift - 1) * even)).float()

    @property
    def length(self) -> int:
        """Number of solver steps in a segment."""
        return self.solver_steps // self.segments


class ConsistencyTrainer:
    """Computes the loss and updates the target, while a plain PyTorch loop trains the student.

    It draws times and noise itself: they depend only on the seed and on the number of earlier draws.

    A student with method `svg2` or `cubes` needs `dense_steps=0`: the target is called without gradients, so these
    calls would count as the steps of a generation.
    """

    def __init__(self, student: Model, teacher: Model, config: ConsistencyConfig) -> None:
        """Args:
            student: a module, compiled or not. At the start it is a copy of the teacher.
            teacher: a model with the same parameters; called without gradients, twice a step with guidance.

        Raises:
            SparsifyError: one is not a module, their parameters differ, or they share parameters.
        """
        self._module, _ = modules_of(student, teacher)
        self.student, self.teacher, self.config = student, teacher, config
        self._average = copy.deepcopy(self._module).requires_grad_(False).eval()
        self._average.zero_grad()  # gradients are copied along
        self.target = _torch.compiled_like(student, self._average)
        """The moving average of the student, compiled like the student."""
        self.draws = 0
        """Number of losses computed so far."""

    def loss(
        self, video: Tensor, conditioning: Conditioning, unconditional: Conditioning | None = None
    ) -> Tensor:
        """The loss of a batch, a float32 scalar. Its gradient reaches only the student.

        Args:
            video: clean latents [B, ...], in the dtype for the models.
            conditioning: further arguments of the models, e.g. {"encoder_hidden_states": [B, L, C]}.
            unconditional: the same without the prompt, for guidance.

        Raises:
            SparsifyError: there is guidance and no `unconditional`.
        """
        seeds = random.Random(f"{self.config.seed} {self.draws}")
        self.draws += 1
        generator = torch.Generator().manual_seed(seeds.getrandbits(32))
        steps = torch.randint(self.config.solver_steps, (len(video),), generator=generator)
        generator = torch.Generator(video.device).manual_seed(seeds.getrandbits(32))
        noise = torch.randn(video.shape, generator=generator, dtype=torch.float32, device=video.device)
        losses = consistency_loss(
            self.student,
            self.target,
            self.teacher,
            self.config,
            video,
            noise,
            steps,
            conditioning,
            unconditional,
        )
        return losses.mean()

    @torch.no_grad()
    def step(self) -> None:
        """Move the target towards the student, and copy its buffers. Call this after every optimizer step."""
        for average, own in zip(self._average.parameters(), self._module.parameters(), strict=True):
            average.lerp_(own, 1 - self.config.ema)
        for kept, copied in zip(self._average.buffers(), self._module.buffers(), strict=True):
            kept.copy_(copied)

    def state_dict(self) -> dict[str, Any]:
        """The state to resume training exactly, together with the states of the student and the optimizer."""
        target = {name: tensor.clone() for name, tensor in self._average.state_dict().items()}
        return {"format": FORMAT, "draws": self.draws, "target": target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`, with this trainer's own config: with fewer segments, for instance.

        Raises:
            SparsifyError: the state is not from `state_dict`, or belongs to another model.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise SparsifyError("state must be a result of ConsistencyTrainer.state_dict, got something else")
        draws = integer(state.get("draws"))
        if draws is None or draws < 0 or not isinstance(state.get("target"), Mapping):
            raise SparsifyError("the state must have the number of draws and the weights of the target")
        try:
            self._average.load_state_dict(state["target"])
        except RuntimeError as error:
            raise SparsifyError(f"the state belongs to another model: {error}") from error
        self.draws = draws


def consistency_loss(
    student: Model,
    target: Model,
    teacher: Model,
    config: ConsistencyConfig,
    video: Tensor,
    noise: Tensor,
    steps: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
) -> Tensor:
    """The difference of the student from the target one solver step later: float32 [B], a mean over each video.

    The loss compares the videos predicted from x_t, as Heek et al. do: t times the difference of the velocities.

    Args:
        video, noise: [B, ...], clean latents and the noise to mix them with.
        steps: int64 [B], the solver step of each video, 0 to solver_steps - 1.
    """
    if config.guidance != 1 and unconditional is None:
        raise SparsifyError(
            f"guidance {config.guidance} needs the arguments without a prompt: give unconditional, or guidance=1"
        )
    times, ends = config.times, (steps // config.length + 1) * config.length
    here, after, end = (times[places].to(video.device) for places in (steps, steps + 1, ends))
    state = torch.lerp(video.float(), noise.float(), _over(here, video)).to(video.dtype)
    with torch.no_grad():
        solved = velocity(teacher, state, here, conditioning)
        if config.guidance != 1:
            assert unconditional is not None
            without = velocity(teacher, state, here, unconditional)
            solved = without + config.guidance * (solved - without)
        further = state.float() + _over(after - here, video) * solved
        onwards = velocity(target, further.to(video.dtype), after, conditioning)
        reference = torch.lerp(onwards, solved, _over((here - after) / (here - end), video))
    difference = _over(here, video) * (velocity(student, state, here, conditioning) - reference)
    return ((difference.square() + config.huber**2).sqrt() - config.huber).flatten(1).mean(1)


@torch.no_grad()
def sample_few_steps(
    model: Model, noise: Tensor, conditioning: Conditioning, config: ConsistencyConfig
) -> Tensor:
    """Generate latents from noise, with one call of the model for every segment: shape and dtype of `noise`.

    The student has learned guidance, so no second call is needed.
    """
    state = noise.float()
    for here, end in pairwise(config.times[:: config.length].tolist()):
        time = torch.full((len(noise),), here, dtype=torch.float32, device=noise.device)
        state = state + (end - here) * velocity(model, state.to(noise.dtype), time, conditioning)
    return state.to(noise.dtype)


def velocity(model: Model, state: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
    """The model's velocity at `state` [B, ...] and `time` [B], from 0 to 1: float32, in the shape of `state`."""
    result = model(hidden_states=state, timestep=1000 * time, **conditioning, return_dict=False)
    return result[0].float()


def _over(numbers: Tensor, video: Tensor) -> Tensor:
    """[B] as [B, 1, ...], for the dimensions of a video."""
    return numbers.view(-1, *[1] * (video.ndim - 1))


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
