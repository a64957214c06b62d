"""Wall-clock seconds of what runs on a device, fairly taken."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(function: Callable[[], Result], device: str = "cpu") -> tuple[float, Result]:
    """Seconds of one call, with all that it started on the device; and what it returned."""
    _synchronise(device)
    begin = time.perf_counter()
    result = function()
    _synchronise(device)
    return time.perf_counter() - begin, result


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: str = "cpu",
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each function over rounds in which all take turns, so that all see the same noise.

    A round before them does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function, device)[0])
        after_round()
    return {name: median(values) for name, values in seconds.items()}


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
