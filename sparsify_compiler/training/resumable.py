"""Stages of a run that is a folder: each goes on exactly where it was killed, and is not repeated once it is done.

A file is written under another name first and then put in place, so it is whole or not there.
"""

import json
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sparsify_compiler.errors import SparsifyError

FORMAT = "sparsify-stage-1"
SAVE_EVERY = 120.0
"""Seconds between checkpoints."""


class DamagedError(SparsifyError):
    """A file of a run cannot be read."""


class Part(Protocol):
    """What a stage changes: a model, an optimizer, a trainer."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stretch of training."""

    name: str
    steps: int
    parts: Mapping[str, Part]
    """All that a step changes, by name."""
    advance: Callable[[int], float]
    """One step, of this number from 0: its loss. What it does is a function of the number and the parts alone."""


def train(stage: Stage, path: Path) -> list[float]:
    """The loss of every step. Afterwards the parts are as at the end of the stage, whether it ran now or before.

    Raises:
        DamagedError: the checkpoint cannot be read, or is of something else.
        SparsifyError: a loss is not finite; nothing of that step is saved.
    """
    losses = _restore(stage, path)
    if len(losses) == stage.steps:
        return losses
    saved = time.monotonic()
    with progress() as bar:
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


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The tensor in a file; made, and written there, if there is none."""
    if not path.exists():
        write(path, lambda partial: torch.save(make(), partial))
    tensor = read_tensors(path)
    if not isinstance(tensor, Tensor):
        raise DamagedError(f"{path} must hold a tensor, got {type(tensor).__name__}: {_REMOVE}")
    return tensor


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Lets `writer` write the file that is given to it, and puts it in the place of `path`."""
    partial = path.with_name(path.name + ".partial")
    writer(partial)
    partial.replace(path)


def read_tensors(path: Path) -> Any:
    """What torch.save wrote into a file, every byte of it checked.

    Raises:
        DamagedError: it is cut off or altered.
    """
    # A damaged file may raise anything; torch itself does not look at the sums of a zip file.
    try:
        with zipfile.ZipFile(path) as file:
            if name := file.testzip():
                raise zipfile.BadZipFile(f"{name} has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedError(f"{path} is damaged ({type(error).__name__}: {error}): {_REMOVE}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DamagedError: it holds none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither text nor JSON
        raise DamagedError(f"{path} is damaged ({error}): {_REMOVE}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path} must hold a JSON object, got {type(content).__name__}: {_REMOVE}")
    return content


def progress() -> Progress:
    """A bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


_REMOVE = "remove it, and what it held is made again"


def _save(stage: Stage, losses: list[float], path: Path) -> None:
    parts = {name: part.state_dict() for name, part in stage.parts.items()}
    state = {"format": FORMAT, "stage": stage.name, "losses": losses, "parts": parts}
    write(path, lambda partial: torch.save(state, partial))


def _restore(stage: Stage, path: Path) -> list[float]:
    """The losses so far."""
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
        raise DamagedError(f"{path} is no checkpoint of this stage ({error}): {_REMOVE}") from error
