"""The device of the steps: the GPU, or the CPU in a dry run. All differences between the two are here."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sparsify_compiler.kernels.triton import configs

T = TypeVar("T")


class Gpu:
    """The CUDA GPU of this machine."""

    name = "cuda"
    dense: ClassVar = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    """Kernels of dense attention to compare with."""

    def size(self, real: T, tiny: T) -> T:
        """A size for the GPU, or for a dry run."""
        return real

    def facts(self) -> dict[str, Any]:
        """A description of the device."""
        found = torch.cuda.get_device_properties(0)
        return {
            "name": found.name,
            "capability": [found.major, found.minor],
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }

    def architecture(self) -> int:
        """The row of `configs` for the device."""
        return configs.architecture(torch.device("cuda", 0))

    def synchronise(self) -> None:
        """Wait for all work; raise its errors."""
        torch.cuda.synchronize()

    def stamp(self) -> Any:
        """A moment on the device, for `between`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Milliseconds from one stamp to another, after `synchronise`."""
        return float(first.elapsed_time(last))

    def run_ahead(self) -> None:
        """Keep the device busy for about 50 ms, so that the next launches queue without gaps."""
        factor = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
        for _ in range(35):
            factor @ factor

    def not_synchronising(self) -> AbstractContextManager[None]:
        """Make operations raise that wait for the device."""
        return _sync_debug_mode()

    def captured(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """(result, replay) of a CUDA graph of the function; each replay writes the result again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
        return result, graph.replay

    def peak_bytes(self, function: Callable[[], object]) -> int:
        """The peak of memory allocated during a call, in addition to the memory before."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def compiled(self, function: Any) -> Any:
        """The function, compiled by Inductor."""
        return torch.compile(function, dynamic=False)

    def release(self) -> None:
        """Free cached memory."""
        torch.cuda.empty_cache()


@contextmanager
def _sync_debug_mode() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class DryRun:
    """The CPU in place of an H200, with interpreted kernels: everything runs, and no number has a meaning."""

    name = "cpu"
    dense: ClassVar = {"cudnn": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}

    def size(self, real: T, tiny: T) -> T:
        return tiny

    def facts(self) -> dict[str, Any]:
        return {
            "name": "none: a dry run",
            "capability": [9, 0],
            "multiprocessors": 132,
            "memory_gib": 140.0,
            "cuda": None,
        }

    def architecture(self) -> int:
        return 90

    def synchronise(self) -> None:
        pass

    def stamp(self) -> float:
        return time.perf_counter()

    def between(self, first: float, last: float) -> float:
        return 1e3 * (last - first)

    def run_ahead(self) -> None:
        pass

    def not_synchronising(self) -> AbstractContextManager[None]:
        return _nothing_read_back()

    def captured(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        result = function()

        def replay() -> None:
            for old, new in zip(_tensors(result), _tensors(function()), strict=True):
                old.copy_(new)

        return result, replay

    def peak_bytes(self, function: Callable[[], object]) -> int:
        return sum(t.nbytes for t in _tensors(function()))

    def compiled(self, function: Any) -> Any:
        return function

    def release(self) -> None:
        pass


Device = Gpu | DryRun

READS = ("__bool__", "__float__", "__index__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist")
"""Methods of a tensor that wait for a device."""


@contextmanager
def _nothing_read_back() -> Iterator[None]:
    """Make reading a value raise, except for a bool without dimensions, which is on the CPU also with a GPU."""

    def guarded(name: str) -> Any:
        read = getattr(Tensor, name)

        def call(self: Tensor, *arguments: Any, **options: Any) -> Any:
            if self.dtype == torch.bool and self.dim() == 0:
                return read(self, *arguments, **options)
            raise RuntimeError(f"Tensor.{name} would wait for a GPU")

        return call

    with ExitStack() as patches:
        for name in READS:
            patches.enter_context(mock.patch.object(Tensor, name, guarded(name)))
        yield


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in _tensors(part)] if isinstance(result, (tuple, list)) else []
