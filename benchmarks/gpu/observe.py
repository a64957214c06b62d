"""Observation of launches from outside: every launch of the package goes through `Launch.__call__`."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch

from benchmarks.gpu.device import Device
from sparsify_compiler.kernels.triton.launcher import Launch, tensors

Launched = dict[str, list[str]]
"""Name of a kernel -> types in which it was launched."""


@contextmanager
def around(listener: Callable[[Launch], AbstractContextManager[object]]) -> Iterator[None]:
    """Put every launch inside the listener's context."""
    plain = Launch.__call__

    def call(self: Launch) -> None:
        with listener(self):
            plain(self)

    with mock.patch.object(Launch, "__call__", call):
        yield


@contextmanager
def launched() -> Iterator[Launched]:
    """Yield the launches inside that have returned; the dict is filled during the block."""
    seen: Launched = {}

    @contextmanager
    def listen(launch: Launch) -> Iterator[None]:
        yield
        types = seen.setdefault(launch.kernel.__name__, [])
        if (one := type_of(launch)) not in types:
            types.append(one)

    with around(listen):
        yield seen


def type_of(launch: Launch) -> str:
    """The narrowest float type among the tensors of a launch, which is the type of its inputs."""
    floats = {t.dtype for t in tensors(launch.arguments.values()) if t.is_floating_point()}
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return str(next((t for t in narrow if t in floats), torch.int32))[6:]


def milliseconds_of_kernels(device: Device, function: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Name of a kernel -> (total milliseconds, number of launches) in one call, whose launches have no gaps."""
    stamps = []

    @contextmanager
    def listen(launch: Launch) -> Iterator[None]:
        first = device.stamp()
        yield
        stamps.append((launch.kernel.__name__, first, device.stamp()))

    device.run_ahead()
    with around(listen):
        function()
    device.synchronise()
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, first, last in stamps:
        total, count = found[name]
        found[name] = total + device.between(first, last), count + 1
    return dict(found)
