"""Wall-clock seconds of what runs on a device."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(step: Callable[[], Result], device: str) -> tuple[float, Result]:
    """Of one call, with all that it started on the device; and what it returned."""
    _synchronise(device)
    start = time.perf_counter()
    result = step()
    _synchronise(device)
    return time.perf_counter() - start, result


def interleaved(
    steps: Mapping[str, Callable[[], object]], *, rounds: int, device: str, advance: Callable[[], None]
) -> dict[str, float]:
    """Median seconds of each step; all take turns, so that all see the same noise of the machine."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, device)[0])
        advance()
    return {name: median(values) for name, values in seconds.items()}


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
