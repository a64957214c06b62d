"""Calls of the evaluation model to calibrate on: validation scenes, at every noise level."""

from typing import Any

from torch import tensor

from sparsify_compiler.lab import world
from sparsify_compiler.lab.model import encode, to_model
from sparsify_compiler.lab.sampling import noise
from sparsify_compiler.lab.training import LEVELS, mixed

FIRST = 1000
"""Index of the first scene in `world.VALIDATION`. Validation itself uses the scenes from 0."""


def calibration_inputs(frames: int = world.FRAMES) -> list[dict[str, Any]]:
    """Keyword arguments of one call for each of `LEVELS`, batch 1. Every call has its own scene and prompt."""
    calls = []
    for number, level in enumerate(LEVELS, FIRST):
        scene = world.scene(world.VALIDATION, number)
        batch = mixed(
            to_model(world.videos([scene], frames)),
            noise([number], frames),
            tensor([level]),
            encode([scene.prompt]),
        )
        calls.append(
            {
                "hidden_states": batch.noisy,
                "timestep": 1000 * batch.time,
                "encoder_hidden_states": batch.text,
                "return_dict": False,
            }
        )
    return calls
