"""Poisoned memory: elements that a kernel does not write show in its output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

INDEX = -(2**30)
"""A value far outside the range of every index."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make `Tensor.new_empty`, which makes the outputs of kernels, return NaN or `INDEX`, except for booleans."""
    plain = Tensor.new_empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        tensor = plain(*arguments, **options)
        if tensor.dtype == torch.bool:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(max(INDEX, torch.iinfo(tensor.dtype).min))

    with mock.patch.object(Tensor, "new_empty", poisoned):
        yield
