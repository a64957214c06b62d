"""Whether a CUDA graph can replay operations: a lint of what runs, on tensors of any device, meta too.

A replay repeats launches and addresses. It repeats no Python, so nothing that the host decided by reading an input,
no size that depends on a value, and nothing that the operations leave behind.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = ("is_pinned", "pin_memory", "_pin_memory", "record_stream")
"""Operators that ask or change the memory of the host, or the streams of the device."""
NUMBERS = (torch.NumberType, torch.BoolType, torch.IntType, torch.FloatType)
SHAPES = ("dim", "is_contiguous", "is_same_size", "numel", "size", "storage_offset", "stride", "sym_size")
"""Operators that return numbers without reading values."""
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""Functions that copy numbers of Python to a device. No operator shows the copy."""
MASKED = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")
"""Operators whose sizes depend on values only where an index is a mask."""


class Lint(TorchDispatchMode):
    """In `checking`, every operation that a CUDA graph could not replay adds a line to `faults`.

    Tensors of the CPU are constants of a program unless they are among `inputs` or were computed from these: the
    host may read a constant, since every replay would read the same.
    """

    def __init__(self, inputs: Iterable[Tensor | None], device: str) -> None:
        """Args:
        inputs: the tensors that differ from replay to replay, in place.
        device: the type of the device.
        """
        super().__init__()
        self.faults: list[str] = []
        self._functions = _Functions(self)
        self._device = device
        self._inputs = [one.untyped_storage() for one in inputs if one is not None]
        self._changing = {id(one) for one in self._inputs}
        self._alive: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check one operation, then run it."""
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        changing = any(map(self._changes, given))
        self._check(func, args, kwargs, changing=changing)
        out = func(*args, **kwargs)
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        before, after = ({one.device.type for one in some} for some in (given, made))
        apart = bool(before and after) and before.isdisjoint(after)
        if apart or (func.overloadpacket.__name__ == "copy_" and len(before) > 1):
            self._fault(func, "a copy between devices")
        for one in made:
            self._note(func, one, changing=changing)
        return out

    @contextmanager
    def checking(self) -> Iterator[None]:
        """Check operators and functions of Python. Inside of custom ops, the mode has to be entered again."""
        with self._functions, self:
            yield

    def check_made(self, func: Any, made: Any) -> None:
        """Check a tensor that a function of Python made of numbers."""
        if isinstance(made, Tensor) and made.device.type == self._device:
            self.faults.append(f"numbers of Python are copied to the device: {func.__name__}")

    def check_launch(self, kernel: str, tensors: Iterable[Tensor]) -> None:
        """Check the tensors that a kernel reads and writes."""
        places = {one.device.type for one in tensors} - {self._device}
        self.faults += [f"a launch reads memory of another device: {kernel}, on {place}" for place in places]

    def left(self, results: Iterable[Tensor]) -> list[str]:
        """The operators that made memory which still exists, apart from that of the results."""
        kept = {id(one.untyped_storage()) for one in results}
        return [name for at, name in self._alive.items() if at not in kept]

    def _changes(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device or id(tensor.untyped_storage()) in self._changing

    def _check(self, func: Any, args: Any, kwargs: Any, *, changing: bool) -> None:
        name, tags = func.overloadpacket.__name__, func.tags
        is_number = any(isinstance(one.type, NUMBERS) for one in func._schema.returns)
        if is_number and changing and name not in (*SHAPES, *HOST):
            self._fault(func, "the host reads a value")
        if self._depends_on_values(func, args, kwargs):
            self._fault(func, "a size depends on a value")
        if torch.Tag.cudagraph_unsafe in tags or name in HOST:
            self._fault(func, "the operator works on the host")

    def _depends_on_values(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the size of the result depends on values. Inside of custom ops, operators made of others come
        whole, without the tags of their parts."""
        name, overload = func.overloadpacket.__name__, func._overloadname
        if name in MASKED:
            indices = [one for one in args[1] if one is not None]
            return any(one.dtype in (torch.bool, torch.uint8) for one in indices)
        if name == "repeat_interleave":
            return overload != "self_int" and "output_size" not in kwargs
        if name == "where":
            return len(args) == 1
        return torch.Tag.dynamic_output_shape in func.tags

    def _note(self, func: Any, tensor: Tensor, *, changing: bool) -> None:
        storage = tensor.untyped_storage()
        at = id(storage)
        if at in self._alive or any(one is storage for one in self._inputs):
            return
        self._alive[at] = str(func)
        if changing:
            self._changing.add(at)
        weakref.finalize(storage, self._forget, at)

    def _forget(self, at: int) -> None:
        self._alive.pop(at, None)
        self._changing.discard(at)

    def _fault(self, func: Any, what: str) -> None:
        self.faults.append(f"{what}: {func}")


class _Functions(TorchFunctionMode):
    """The part of a lint that sees functions of Python."""

    def __init__(self, lint: Lint) -> None:
        super().__init__()
        self._lint = lint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and check its result."""
        made = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS:
            self._lint.check_made(func, made)
        return made
