"""Videos from the model: Euler steps along the flow, with classifier-free guidance.

The convention is Wan's: x_t = (1 - t) video + t noise for t from 0 to 1. The model gets 1000 t and predicts the
velocity, noise - video.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparsify_compiler.config import integer
from sparsify_compiler.errors import OptionError
from sparsify_compiler.lab.model import encode, to_pixels, unconditional
from sparsify_compiler.lab.world import FRAMES, HEIGHT, WIDTH

Velocity = Callable[..., tuple[Tensor, ...]]
"""A model, called with (hidden_states, timestep, encoder_hidden_states, return_dict=False)."""

STEPS, GUIDANCE, SHIFT = 30, 3.0, 3.0


def times(steps: int = STEPS, shift: float = SHIFT) -> Tensor:
    """The schedule, from 1 to 0: float32 [steps + 1]. A shift above 1 spends more steps near the noise.

    Raises:
        OptionError: steps are below 1, or the shift is no positive number.
    """
    check_shift(shift)
    if (integer(steps) or 0) < 1:
        raise OptionError(f"steps must be an integer of at least 1, got {steps!r}")
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def check_shift(shift: float) -> None:
    """Check the shift of a schedule.

    Raises:
        OptionError: it is no positive number.
    """
    if not 0 < shift < math.inf:
        raise OptionError(f"shift must be a positive number, got {shift!r}")


def noise(seeds: Sequence[int], frames: int = FRAMES) -> Tensor:
    """Noise to start from, each video's from its own seed: float32 [seeds, 3, frames, HEIGHT, WIDTH]."""
    size = (3, frames, HEIGHT, WIDTH)
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample(
    model: Velocity,
    prompts: Sequence[str],
    start: Tensor,
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    shift: float = SHIFT,
) -> Tensor:
    """Videos of the prompts: float32 of the shape and on the device of `start`, RGB from 0 to 1.

    With guidance other than 1, the prompts and the empty prompt are in one batch.
    """
    states = trajectory(model, prompts, start, steps=steps, guidance=guidance, shift=shift)
    (last,) = deque(states, maxlen=1)
    return to_pixels(last)


@torch.no_grad()
def trajectory(
    model: Velocity,
    prompts: Sequence[str],
    start: Tensor,
    *,
    steps: int,
    guidance: float,
    shift: float = SHIFT,
) -> Iterator[Tensor]:
    """States on the way to the videos, in the model's own units: `start`, then the state after each step."""
    if not math.isfinite(guidance):
        raise OptionError(f"guidance must be a finite number, got {guidance!r}")
    yield start
    state, text = start, encode(prompts).to(start.device)
    for now, after in pairwise(times(steps, shift).tolist()):
        state = state + (after - now) * guided(model, state, now, text, guidance)
        yield state


def guided(model: Velocity, state: Tensor, time: float, text: Tensor, guidance: float) -> Tensor:
    """Velocity with guidance: float32, of the shape of `state`.

    Args:
        state: [B, ...].
        time: 0 to 1.
        text: embedded prompts [B, TEXT_TOKENS, TEXT_DIM].
    """
    if guidance != 1:
        state, text = torch.cat([state, state]), torch.cat([text, unconditional(len(text)).to(text.device)])
    moment = torch.full((len(state),), 1000 * time, device=state.device)
    (velocity,) = model(state, moment, text, return_dict=False)
    if guidance == 1:
        return velocity.float()
    with_prompt, without = velocity.float().chunk(2)
    return without + guidance * (with_prompt - without)
