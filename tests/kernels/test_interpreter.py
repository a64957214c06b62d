"""Half precision in Triton's interpreter, operation by operation, against torch's bfloat16."""

import itertools
import math
import operator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from sparsify_compiler.kernels.triton.interpreter import interpreting, rounded, widened

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
"""All bfloat16 numbers there are: NaN, infinities, zeros of both signs and numbers without a leading 1."""


@pytest.fixture
def builder():
    with interpreting():
        yield interpreter.interpreter_builder


def handle(tensor: torch.Tensor) -> TensorHandle:
    """A tensor as the interpreter holds it."""
    if tensor.dtype == torch.bfloat16:
        return TensorHandle(tensor.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    return TensorHandle(tensor.numpy(), {torch.float32: tl.float32, torch.int32: tl.int32}[tensor.dtype])


def numbers(found: TensorHandle) -> torch.Tensor:
    """What a handle holds, as torch holds it."""
    if found.dtype.scalar == tl.bfloat16:
        assert found.data.dtype == np.uint16
        return torch.from_numpy(found.data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(found.data)


def assert_same(found: TensorHandle, expected: torch.Tensor) -> None:
    """In every bit, but that any NaN is as good as another."""
    got = numbers(found)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit()[~got.isnan()], expected.signbit()[~got.isnan()])


def test_every_number_is_widened_and_comes_back():
    assert_same(TensorHandle(widened(handle(EVERY).data), tl.float32), EVERY.float())
    assert_same(TensorHandle(rounded(EVERY.float().numpy()), tl.bfloat16), EVERY)


def test_numbers_between_are_rounded_to_the_nearest_even(builder):
    """Halfway, one bit to either side of it, and anywhere, up to what overflows."""
    low = EVERY.float().view(torch.int32)
    between = torch.cat([low + part for part in (0x7FFF, 0x8000, 0x8001)]).view(torch.float32)
    anywhere = torch.randint(-(2**31), 2**31, (9999,), generator=torch.Generator().manual_seed(0))
    for exact in (between, anywhere.to(torch.int32).view(torch.float32)):
        assert_same(builder.create_fp_trunc(handle(exact), tl.bfloat16), exact.bfloat16())


def test_casts_from_and_to_other_types(builder):
    assert_same(builder.create_fp_ext(handle(EVERY), tl.float32), EVERY.float())
    whole = torch.arange(-3000, 3000, dtype=torch.int32)
    assert_same(builder.create_si_to_fp(handle(whole), tl.bfloat16), whole.bfloat16())
    small = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16() * 100
    assert_same(builder.create_fp_to_si(handle(small), tl.int32), small.int())
    assert numbers(builder.get_bf16(0.1)).tolist() == [torch.tensor(0.1).bfloat16().item()]


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
def test_arithmetic_is_rounded_once(builder, name):
    of_builder = {"add": "create_fadd", "sub": "create_fsub", "mul": "create_fmul", "truediv": "create_fdiv"}
    shuffled = EVERY[torch.randperm(len(EVERY), generator=torch.Generator().manual_seed(0))]
    found = getattr(builder, of_builder[name])(handle(EVERY), handle(shuffled))
    assert_same(found, getattr(operator, name)(EVERY, shuffled))


def test_other_operations(builder):
    shuffled = EVERY.flip(0).roll(77)
    is_less = numbers(builder.create_fcmpOLT(handle(EVERY), handle(shuffled)))
    assert torch.equal(is_less, shuffled > EVERY)
    condition = TensorHandle(is_less.numpy(), tl.int1)
    assert_same(
        builder.create_select(condition, handle(EVERY), handle(shuffled)),
        torch.where(is_less, EVERY, shuffled),
    )
    positive = EVERY[EVERY > 0]
    close = {"rtol": 2**-8, "atol": 0.0}
    torch.testing.assert_close(numbers(builder.create_sqrt(handle(positive))), positive.sqrt(), **close)
    torch.testing.assert_close(numbers(builder.create_rsqrt(handle(positive))), positive.rsqrt(), **close)
    small = torch.linspace(-2, 2, 100).bfloat16()
    torch.testing.assert_close(numbers(builder.create_exp2(handle(small))), small.exp2(), **close)
    torch.testing.assert_close(numbers(builder.create_erf(handle(small))), small.erf(), **close)
    found = numbers(builder.create_fma(*[handle(small)] * 3))
    torch.testing.assert_close(found, (small.float() ** 2 + small.float()).bfloat16(), **close)


PRECISION = interpreter._ir.INPUT_PRECISION


def test_products_of_bfloat16_are_summed_in_fp32(builder):
    g = torch.Generator().manual_seed(0)
    a, b, d = torch.randn(16, 64, generator=g), torch.randn(64, 32, generator=g), torch.randn(16, 32)
    a, b = a.bfloat16(), b.bfloat16()
    found = builder.create_dot(handle(a), handle(b), handle(d), PRECISION.IEEE, 0)
    torch.testing.assert_close(
        numbers(found).double(), a.double() @ b.double() + d.double(), rtol=0, atol=1e-4
    )


def test_tf32_reads_eleven_bits_and_ieee_reads_all(builder):
    below = torch.tensor([[1 + 2**-10 - 2**-23]])
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    for precision, expected in ((PRECISION.TF32, 1.0), (PRECISION.IEEE, below.item())):
        found = builder.create_dot(handle(below), handle(one), handle(zero), precision, 0)
        assert numbers(found).item() == expected


def test_what_depends_on_an_order_is_refused(builder):
    operand = tl.tensor(handle(torch.ones(4).bfloat16()), tl.block_type(tl.bfloat16, [4]))
    with pytest.raises(NotImplementedError, match="use float32"):
        ReduceOps(0, tl.standard._sum_combine, False).apply(operand)
    with pytest.raises(NotImplementedError, match="use float32"):
        builder.create_atomic_rmw(None, None, handle(EVERY), None, None, None)
    in_fp32 = tl.tensor(handle(torch.ones(4)), tl.block_type(tl.float32, [4]))
    assert ReduceOps(0, tl.standard._sum_combine, False).apply(in_fp32).handle.data == 4


@pytest.mark.parametrize("scalar", [tl.float32, tl.bfloat16, tl.int1, tl.pointer_type(tl.float16)], ids=str)
def test_types_and_tensors_are_those_of_the_language(scalar):
    def made() -> list[str]:
        types = [scalar, tl.block_type(tl.int32, [4, 16]).with_element_ty(scalar)]
        types.append(interpreter.interpreter_builder.get_block_ty(scalar, [8]))
        found = [
            (vars(t), sorted(vars(tl.tensor(None, t)).items()), interpreter._get_np_dtype(t)) for t in types
        ]
        return [repr(one) for one in found]

    expected = made()
    with interpreting():
        assert made() == made() == expected


def test_operands_meet_in_the_shapes_of_the_language():
    numbers = [np.arange(math.prod(shape)).reshape(shape) for shape in ((4,), (1, 4), (2, 1), (2, 4))]
    blocks = [tl.tensor(TensorHandle(n, tl.int64), tl.block_type(tl.int64, list(n.shape))) for n in numbers]
    scalar = tl.tensor(TensorHandle(np.array([7]), tl.int64), tl.int64)

    def met() -> list[str]:
        broadcast = interpreter.interpreter_semantic.broadcast_impl_value
        pairs = [broadcast(*pair) for pair in itertools.product([*blocks, scalar], repeat=2)]
        return [repr((one.type, one.handle.data)) for pair in pairs for one in pair]

    expected = met()
    with interpreting():
        assert met() == expected


def test_nothing_stays_behind():
    def state() -> list[Any]:
        places = (
            interpreter.ReduceScanOpInterface,
            interpreter.InterpretedFunction,
            interpreter.TritonSemantic,
        )
        inside = [dict(vars(place)) for place in (interpreter, tl.tensor, tl.block_type, *places)]
        return [*inside, interpreter.interpreter_builder.options, type(interpreter.interpreter_builder)]

    def fails() -> None:
        assert type(interpreter.interpreter_builder) is not InterpreterBuilder
        raise KeyError

    before = state()
    with pytest.raises(KeyError), interpreting():
        fails()
    assert type(interpreter.interpreter_builder) is InterpreterBuilder
    assert state() == before
