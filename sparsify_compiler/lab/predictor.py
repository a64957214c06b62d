"""A predictor for method `dsv`, trained for a model whose own weights stay as they are."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify_compiler.lab import files, world
from sparsify_compiler.lab.training import Recipe, Stage, batch, loss
from sparsify_compiler.training.dsv import DSVTrainer

STEPS, BATCH = 300, 2
ALMOST_ALL = 0.99
"""Share of the keys that every head gets in training. At inference a smaller `kv_budget` holds for all heads."""
NEVER = 1e-9
"""A loss that the predictor does not reach."""


def learn_predictor(
    model: nn.Module, path: Path, frames: int = world.FRAMES, *, steps: int = STEPS, profile_every: int = 25
) -> None:
    """Train a predictor on the queries and keys of training videos, and write it as `DSVTrainer` does.

    Args:
        model: the evaluation model. It stays as it is.
        profile_every: steps between profiles. Training ends at the first profile after `steps`.
    """
    own = copy.deepcopy(model).requires_grad_()
    options: dict[str, Any] = {"method": "dsv", "kv_budget": ALMOST_ALL, "inner_backend": "eager"}
    torch.compiler.reset()
    compiled = torch.compile(own, backend="sparsify", dynamic=False, options=options)
    trainer = DSVTrainer(compiled, threshold=NEVER, profile_every=(profile_every, profile_every))
    recipe = Recipe(stages=(Stage(frames=frames, batch=BATCH, steps=steps),))
    while trainer.stage == 1:
        if trainer.steps >= steps:
            trainer.threshold = math.inf
        loss(compiled, batch(recipe, trainer.steps))
        trainer.step()
    files.write(path, trainer.save_predictor)
