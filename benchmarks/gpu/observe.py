"""What is launched, seen from outside: every launch of the package goes through `Launch.__call__`."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from sparsify_compiler.kernels.triton.launcher import Launch

Launched = dict[str, list[str]]
"""Name of a kernel -> the types it was launched in."""


@contextmanager
def around(listener: Callable[[Launch], AbstractContextManager[object]]) -> Iterator[None]:
    """Every launch inside happens within the listener's context."""
    plain = Launch.__call__

    def call(self: Launch) -> None:
        with listener(self):
            plain(self)

    with mock.patch.object(Launch, "__call__", call):
        yield


@contextmanager
def launched() -> Iterator[Launched]:
    """What is launched inside, and has returned; filled as it goes."""
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
    """The narrowest floating type among the tensors of a launch, which is that of its inputs."""
    tensors = [t for t in launch.arguments.values() if isinstance(t, Tensor)]
    floats = {t.dtype for t in tensors if t.is_floating_point()}
    narrow = (torch.bfloat16, torch.float16, torch.float32)
    return str(next((t for t in narrow if t in floats), torch.int32))[6:]


def milliseconds_of_kernels(device: Device, function: Callable[[], object]) -> dict[str, tuple[float, int]]:
    """Name of a kernel -> (milliseconds in all, launches) of one call, whose launches follow each other closely."""
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
