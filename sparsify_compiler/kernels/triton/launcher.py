"""The launch of a Triton kernel and its arguments, shared by all families of ops."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.kernels.triton.configs import Config


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with its grid, arguments and compiler options."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int = 2

    def __call__(self) -> None:
        if all(self.grid):
            with _place(next(tensors(self.arguments.values()))):
                self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, which may be tuples."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from tensors(argument)
        elif isinstance(argument, Tensor):
            yield argument


def _place(tensor: Tensor) -> AbstractContextManager[object]:
    """The place where a kernel with this tensor runs: its GPU, or the interpreter."""
    if tensor.device.type == "cpu":
        from sparsify_compiler.kernels.triton import interpreter

        return interpreter.interpreting()
    return torch.cuda.device_of(tensor)


def stages_through(order: Tensor | None, config: Config) -> int:
    """The number of stages for the compiler. A loop that finds its tokens through an order needs every second stage
    for the order."""
    return config.num_stages if order is None else 2 * config.num_stages - 1


def with_strides(**tensors: Tensor) -> dict[str, Any]:
    """The tensors and their strides, as arguments of a kernel."""
    return {**tensors, **{f"{name}_strides": t.stride() for name, t in tensors.items()}}


def with_shared_strides(**tensors: Tensor | None) -> dict[str, Any]:
    """The tensors made contiguous and their `shared_strides`, as arguments of a kernel."""
    index = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    return {**index, **{f"{name}_strides": shared_strides(t) for name, t in index.items()}}


def shared_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a tensor [B|1, H|1, ...]; 0 where a batch or head is shared, and if there is no tensor."""
    if tensor is None:
        return (0, 0)
    lead = (0 if tensor.shape[dim] == 1 else tensor.stride(dim) for dim in (0, 1))
    return (*lead, *tensor.stride()[2:])


def alignment(*tensors: Tensor) -> int:
    """The alignment of all rows of the tensors in bytes: every row starts at a multiple of it. At most 16."""
    return math.gcd(16, *(n for t in tensors for n in row_starts(t)))


def row_starts(tensor: Tensor) -> Iterator[int]:
    """Numbers of bytes whose sums and multiples are the addresses of a tensor's rows."""
    yield tensor.data_ptr()
    yield from (stride * tensor.element_size() for stride in tensor.stride()[:-1])
