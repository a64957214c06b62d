"""Values of tensors on the meta device, as far as they follow from the arguments of a call.

A model may ask for values: the length of a prompt from its mask, or whether an image is given. On the meta device
tensors have none. This mode computes next to the meta tensors what depends on arguments and buffers only, and so
gives the sizes and numbers that the model asks for.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

_META = torch.device("meta")
_aten = torch.ops.aten
_LARGEST = 2**22
"""The largest number of elements whose values are computed."""
_DECIDED_BY_ALL_BUT_THE_FIRST = (_aten.index.Tensor, _aten.masked_select.default)
"""Operators that take the first tensor's elements at places that the others give."""


class Values(TorchDispatchMode):
    """A mode that knows the values of some meta tensors."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.were_read = False
        """Whether a size or a number of the model came from values."""
        self._values: Any = WeakIdKeyDictionary()
        self._overwritten: set[int] = set()
        """The storages that got values which are not known."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: otherwise Dynamo compiles nothing under a mode."""
        return True

    def put(self, meta: Tensor, real: Tensor) -> None:
        """Give a meta tensor the values of a real one."""
        if not real.is_meta and real.numel() <= _LARGEST:
            self._values[meta] = real.detach().cpu()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        on_meta = any(one.is_meta for one in tensors) or kwargs.get("device") == _META
        if (
            not on_meta
            or not isinstance(func, torch._ops.OpOverload)
            or any(type(one) not in (Tensor, torch.nn.Parameter) for one in tensors)
        ):
            return func(*args, **kwargs)
        if _asks(func, args, kwargs):
            return self._from_values(func, args, kwargs)
        result = func(*args, **kwargs)
        real = self._computed(func, args, kwargs)
        if func._schema.is_mutable:
            if real is None:
                self._overwritten |= {_storage(one) for one in _written(func, args, kwargs) if one.is_meta}
        elif real is not None:
            for meta, value in zip(_tensors(result), _tensors(real), strict=True):
                self.put(meta, value)
        return result

    def _from_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator whose size, or number, depends on values."""
        free = args[0] if func in _DECIDED_BY_ALL_BUT_THE_FIRST else None
        unknown = [one for one in _tensors((args, kwargs)) if self._value(one) is None]
        if any(one is not free for one in unknown):
            return func(*args, **kwargs)  # raises, as without this mode

        def real(one: Tensor) -> Tensor:
            value = self._value(one)
            return torch.zeros((), dtype=one.dtype).expand(one.shape) if value is None else value

        self.were_read = True
        result = _on_cpu(func, args, kwargs, real)
        if func is _aten._to_copy.default:
            return result

        def meta(value: Tensor) -> Tensor:
            one = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
            if not unknown:
                self.put(one, value)
            return one

        return tree_map_only(Tensor, meta, result)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator on values; None if it is not known."""
        tensors = _tensors((args, kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags or any(self._value(one) is None for one in tensors):
            return None
        try:
            return _on_cpu(func, args, kwargs, lambda one: self._value(one))
        except Exception:  # an operator that the CPU does not have
            return None

    def _value(self, tensor: Tensor) -> Tensor | None:
        if not tensor.is_meta:
            return tensor.detach().cpu() if tensor.numel() <= _LARGEST else None
        return None if _storage(tensor) in self._overwritten else self._values.get(tensor)


def _asks(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the meta device cannot give the result of an operator."""
    if func is _aten._to_copy.default:
        return args[0].is_meta and kwargs.get("device") not in (None, _META)
    if func is _aten.index.Tensor:
        return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _on_cpu(func: Any, args: Any, kwargs: Any, real: Callable[[Tensor], Any]) -> Any:
    args, kwargs = tree_map_only(Tensor, real, (args, kwargs))
    return func(*args, **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})


def _written(func: Any, args: Any, kwargs: Any) -> Iterable[Tensor]:
    named = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    writes = {one.name for one in func._schema.arguments if one.alias_info and one.alias_info.is_write}
    return _tensors([value for name, value in named.items() if name in writes])


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
