"""Triton's interpreter, with the half precision of a GPU.

NumPy has no bfloat16. The interpreter stores its bits as integers, and treats them as integers in products and
arithmetic. It truncates where a GPU rounds, and it computes TF32 products in full precision. Inside
`interpreting()` arithmetic on bfloat16 is done in fp32 and rounded to the nearest, ties to even, and operands of a
TF32 product lose their last 13 bits.

Reductions, scans and atomics of bfloat16 are refused: a GPU rounds after every step, in an unknown order. Kernels
do them in fp32.

`interpreting()` also removes repeated work. The interpreter patches Triton's language at every call of a function,
which takes two fifths of its time; here it does so once for each module and launch. The interpreter computes sums,
differences and products of integers a second time in 64 bits, for a check that it then skips; here the check is
off. The interpreter derives NumPy types, block types and shapes again for every operation; here they are kept.

This file uses private parts of Triton's interpreter, of versions 3.6 and 3.7.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)

TF32_BITS = np.uint32(0xFFFFE000)
"""The bits of an fp32 number that a TF32 product reads."""


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The fp32 numbers with these bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rounded(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, ties to even. NaN stays NaN."""
    bits = np.ascontiguousarray(numbers).view(np.uint32).reshape(numbers.shape)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    nearest = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint32(0x7FC0), nearest).astype(np.uint16)


@contextmanager
def interpreting() -> Iterator[None]:
    """Compute with bfloat16 and TF32 as a GPU does, in one launch of a kernel."""
    builder = interpreter.interpreter_builder
    patched: set[int] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **options)

    changes = {
        (builder, "__class__"): _Builder,
        (builder, "options"): replace(builder.options, sanitize_overflow=builder.options.debug),
        (InterpretedFunction, "__call__"): call,
        (ReduceScanOpInterface, "check_tensor"): _check_tensor,
        (interpreter, "_get_np_dtype"): _numpy_type,
        (tl.tensor, "__init__"): _set_up_tensor,
        (tl.block_type, "with_element_ty"): lambda self, scalar: _block_type(scalar, self.shape),
        (TritonSemantic, "broadcast_impl_value"): _broadcast,
    }
    before = {place: getattr(*place) for place in changes}
    try:
        for place, change in changes.items():
            setattr(*place, change)
        yield
    finally:
        for place, original in before.items():
            setattr(*place, original)


_plain_numpy_type = interpreter._get_np_dtype
_numpy_types: dict[str, Any] = {}


def _numpy_type(dtype: Any) -> Any:
    """The NumPy type of the elements, kept by the name of their type."""
    name = dtype.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _plain_numpy_type(dtype)
    return _numpy_types[name]


_block_types: dict[tuple[str, tuple[int, ...]], Any] = {}


def _block_type(scalar: Any, shape: Any) -> Any:
    """The type of a block of pointers or numbers."""
    if scalar.is_ptr():
        return tl.block_type(scalar, shape)
    key = scalar.name, tuple(shape)
    if key not in _block_types:
        _block_types[key] = tl.block_type(scalar, shape)
    return _block_types[key]


@cache
def _constants(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A tensor's (numel, shape), as constants of the language."""
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])


def _set_up_tensor(self: Any, handle: Any, type: Any) -> None:
    """`tl.tensor.__init__`, with shapes that are kept."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _constants(tuple(type.shape) if type.is_block() else ())


_plain_broadcast = TritonSemantic.broadcast_impl_value


def _broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Broadcast as Triton's language does; most operands have the same shape already."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    broadcast: tuple[Any, Any] = _plain_broadcast(self, lhs, rhs)
    return broadcast


def _is_bfloat16(handle: Any) -> bool:
    # The NumPy type first: it is faster to find.
    return (
        isinstance(handle, TensorHandle)
        and handle.data.dtype == np.uint16
        and handle.dtype.scalar == tl.bfloat16
    )


def _in_fp32(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The operation of a builder, computed in fp32 for bfloat16 operands."""

    def computed(self: Any, *operands: Any) -> Any:
        wide = [TensorHandle(widened(o.data), tl.float32) if _is_bfloat16(o) else o for o in operands]
        result = operation(self, *wide)
        if not any(map(_is_bfloat16, operands)) or result.data.dtype != np.float32:
            return result
        return TensorHandle(rounded(result.data), tl.bfloat16)

    return computed


class _Builder(InterpreterBuilder):
    """The interpreter's operations, with bfloat16 and TF32."""

    binary_op = _in_fp32(InterpreterBuilder.binary_op)
    ternary_op = _in_fp32(InterpreterBuilder.ternary_op)
    unary_op = _in_fp32(InterpreterBuilder.unary_op)
    create_fma = _in_fp32(InterpreterBuilder.create_fma)
    create_rsqrt = _in_fp32(InterpreterBuilder.create_rsqrt)
    create_erf = _in_fp32(InterpreterBuilder.create_erf)

    def get_block_ty(self, dtype: Any, shape: Any) -> Any:
        """The type of a block."""
        return _block_type(dtype, shape)

    def get_bf16(self, value: float) -> Any:
        """A constant."""
        return TensorHandle(rounded(np.array([value], dtype=np.float32)), tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        """A number in another type."""
        if _is_bfloat16(src):
            src = TensorHandle(widened(src.data), tl.float32)
        if dst_type.scalar != tl.bfloat16:
            return super().cast_impl(src, dst_type)
        return TensorHandle(rounded(src.data.astype(np.float32)), tl.bfloat16)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        """a @ b + d, summed in the type of d."""
        cuts = input_precision == interpreter._ir.INPUT_PRECISION.TF32
        a, b = (_factor(handle, cuts) for handle in (a, b))
        return super().create_dot(a, b, d, input_precision, *rest)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, *rest: Any) -> Any:
        """An atomic operation on a type that NumPy has."""
        _refuse_bfloat16(val)
        return super().create_atomic_rmw(rmwOp, ptr, val, *rest)


def _factor(handle: Any, cuts: bool) -> Any:
    """An operand of a product as the multiplier reads it."""
    if _is_bfloat16(handle):
        return TensorHandle(widened(handle.data), tl.float32)
    if cuts and handle.dtype.scalar == tl.float32:
        bits = np.ascontiguousarray(handle.data).view(np.uint32) & TF32_BITS
        return TensorHandle(bits.view(np.float32), tl.float32)
    return handle


_plain_check = ReduceScanOpInterface.check_tensor


def _check_tensor(self: Any, operands: Any) -> None:
    """Check the operands of a reduction or scan as the interpreter does, and refuse bfloat16."""
    _plain_check(self, operands)
    for operand in operands:
        _refuse_bfloat16(operand.handle)


def _refuse_bfloat16(handle: Any) -> None:
    if _is_bfloat16(handle):
        raise NotImplementedError(
            "reductions, scans and atomics of bfloat16 cannot be interpreted as a GPU computes them: "
            "use float32"
        )
