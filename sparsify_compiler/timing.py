"""Wall-clock seconds of functions that run on a device, with functions timed in turns."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

Result = TypeVar("Result")


def timed(
    function: Callable[[], Result], device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Result]:
    """(seconds of one call, with all work that it starts on the device; the result of the call)."""
    _synchronise(device)
    begin = clock()
    result = function()
    _synchronise(device)
    return clock() - begin, result


def interleaved_medians(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    device: str = "cpu",
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Median seconds of each function over rounds in which all take turns, so that all have the same noise.

    A first round does not count.
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
