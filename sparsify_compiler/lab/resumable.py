"""Stages of a run. A killed stage continues exactly where it stopped; a finished one is not repeated."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.lab.files import REMOVE, DamagedError, read_tensors, write
from sparsify_compiler.progress import bars

FORMAT = "sparsify-stage-1"
SAVE_EVERY = 120.0
"""Seconds between checkpoints."""


class Part(Protocol):
    """An object that a stage changes: a model, an optimizer, a trainer."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of training."""

    name: str
    steps: int
    parts: Mapping[str, Part]
    """Name -> object. They are all that a step changes."""
    advance: Callable[[int], float]
    """Runs a step by its number, from 0; returns its loss. A step depends on its number and the parts only."""


def train(stage: Stage, path: Path) -> list[float]:
    """Run a stage, or the rest of it. Afterwards the parts are as at the end of the stage.

    Returns:
        The loss of every step.

    Raises:
        DamagedError: the checkpoint cannot be read, or is of another stage.
        SparsifyError: a loss is not finite. That step is not saved.
    """
    losses = _restore(stage, path)
    if len(losses) == stage.steps:
        return losses
    saved = time.monotonic()
    with bars() as bar:
        task = bar.add_task(stage.name, total=stage.steps, completed=len(losses))
        while len(losses) < stage.steps:
            loss = stage.advance(len(losses))
            if not math.isfinite(loss):
                raise SparsifyError(
                    f"the loss must be finite, got {loss} at step {len(losses)} of {stage.name}"
                )
            losses.append(loss)
            bar.update(task, advance=1, description=f"{stage.name}: loss {loss:.4f}")
            if len(losses) == stage.steps or time.monotonic() >= saved + SAVE_EVERY:
                _save(stage, losses, path)
                saved = time.monotonic()
    return losses


def _save(stage: Stage, losses: list[float], path: Path) -> None:
    parts = {name: part.state_dict() for name, part in stage.parts.items()}
    state = {"format": FORMAT, "stage": stage.name, "losses": losses, "parts": parts}
    write(path, lambda partial: torch.save(state, partial))


def _restore(stage: Stage, path: Path) -> list[float]:
    """Load the checkpoint into the parts, if there is one; return the losses so far."""
    if not path.exists():
        return []
    state = read_tensors(path)
    try:
        if (state["format"], state["stage"]) != (FORMAT, stage.name):
            raise ValueError(f"it is of {state['stage']!r}, not of {stage.name!r}")
        for name, part in stage.parts.items():
            part.load_state_dict(state["parts"][name])
        return list(state["losses"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedError(f"{path} is no checkpoint of this stage ({error}): {REMOVE}") from error
