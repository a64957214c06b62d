"""Run attention by hand on random tensors and compare it with the attention that `unfused.py` reads in it.

Where they differ, the call stays as it is. The shapes are those of the graph, because its literals fit no others.
Scores are small, medium and large, because caps and clamps change only large ones.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sparsify_compiler import _torch
from sparsify_compiler.passes.fx import Step, recorded, sizes_of, step_through, tensor_of, value_of
from sparsify_compiler.passes.unfused import Sizes, Unfused, factors, softmax_dim

MOST_SCORES = 2**22
"""The most scores for which it runs."""
SPREADS = (0.1, 10.0, 100.0)
"""Standard deviations of the scores."""
TOLERANCE = 1e-3
"""Relative error of the output, on top of four times the error of plain attention in the same type."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """The number of a value: first the tensors from outside, then the results of the calls."""

    number: int


@dataclass(frozen=True, slots=True)
class _Outside:
    """A tensor from outside."""

    sizes: Sizes
    """The sizes of its memory: 1 where it is expanded."""
    expanded: Sizes
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Call:
    """A product, or a call between the products."""

    function: str | Callable[..., Any]
    """The name of a method, or a function."""
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    """The type of its result."""
    adds_up: bool
    """Whether it is a product or a softmax. It then computes in the type of its result, at least float32, for
    arguments of any type, since autocast may have chosen that type."""


class _Part(NamedTuple):
    """An operand of the attention."""

    number: int
    """The number of its tensor from outside."""
    steps: tuple[Step, ...]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        return step_through(tensors[self.number], self.steps)


@dataclass(frozen=True, slots=True)
class _Form:
    """Attention by hand without its graph; two calls with the same spelling have equal forms."""

    outside: tuple[_Outside, ...]
    calls: tuple[_Call, ...]
    operands: tuple[_Part, ...]
    """Query, key and value."""
    mask: _Part | None
    scale: float
    finish: tuple[Step, ...]
    dtype: torch.dtype
    """The type of the scores after the first product."""


def differs(found: Unfused) -> str:
    """The reason why attention by hand is not the attention read in it; empty if it is, or has too many scores."""
    sizes = sizes_of(recorded(found.chain[0]))
    if sizes is None or not 0 < math.prod(sizes) <= MOST_SCORES:
        return ""
    form = _form_of(found)
    return "one of its tensors has sizes known only at run time" if form is None else _difference(form)


def _form_of(found: Unfused) -> _Form | None:
    """The form of attention by hand; None where sizes are known only at run time."""
    parts = [found.query, found.key, found.value, *([] if found.mask is None else [found.mask])]
    tensors = list(dict.fromkeys(part.node for part in parts))
    chain = list(found.chain)
    # The mask may be read through an inversion; a tensor without effect is not among the operands.
    for one in dict.fromkeys(one for node in found.chain for one in node.all_input_nodes):
        if tensor_of(one) is not None and one not in chain and one not in tensors:
            if found.mask is not None and one.all_input_nodes == [found.mask.node]:
                chain.insert(0, one)
            else:
                tensors.append(one)
    numbers = {node: number for number, node in enumerate((*tensors, *chain))}

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return _Slot(numbers[value]) if value in numbers else argument(value_of(value))
        if isinstance(value, (tuple, list)):
            return tuple(map(argument, value))
        if _is_device(value):
            return "cpu"
        return _torch.hint(value) if isinstance(value, torch.SymInt) else value

    outside = [memory for node in tensors if (memory := _outside(recorded(node))) is not None]
    if len(outside) < len(tensors):
        return None
    return _Form(
        outside=tuple(outside),
        calls=tuple(
            _Call(
                node.target,
                argument(node.args),
                tuple((name, argument(value)) for name, value in node.kwargs.items()),
                recorded(node).dtype,
                factors(node) is not None or softmax_dim(node) is not None,
            )
            for node in chain
        ),
        operands=tuple(_Part(numbers[part.node], part.steps) for part in parts[:3]),
        mask=None if found.mask is None else _Part(numbers[found.mask.node], found.mask.steps),
        scale=found.scale,
        finish=found.finish,
        dtype=recorded(found.chain[0]).dtype,
    )


def _is_device(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = torch.device(value)
        except RuntimeError:  # the equation of an einsum
            return False
    return isinstance(value, torch.device)


def _outside(tensor: Tensor) -> _Outside | None:
    sizes = sizes_of(tensor)
    if sizes is None:
        return None
    held = (1 if _torch.hint(step) == 0 else size for size, step in zip(sizes, tensor.stride(), strict=True))
    return _Outside(tuple(held), sizes, tensor.dtype)


@lru_cache(maxsize=256)
@torch.no_grad()
def _difference(form: _Form) -> str:
    """The difference that a run of both shows, in words."""
    with (
        torch._subclasses.fake_tensor.unset_fake_temporarily(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):
        try:
            spread = next((spread for spread in SPREADS if _differs_at(form, spread)), None)
        except Exception as error:  # an operator may have no kernel for this type on a CPU
            return f"it cannot be run on random tensors: {type(error).__name__}: {error}".partition("\n")[0]
    if spread is None:
        return ""
    return f"on random tensors it is not the attention that it looks like, for scores of about {spread:g}"


def _differs_at(form: _Form, spread: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    tensors = [_random(outside, generator) for outside in form.outside]
    _prepare(form, tensors, spread)
    exact = _attention(form, tensors, torch.float64)
    error = _relative_error(_run(form, tensors), exact)
    if error <= TOLERANCE:
        return False
    plain = _relative_error(_attention(form, tensors, form.dtype), exact)
    # Where plain attention overflows, there is nothing to compare with.
    return math.isfinite(plain) and not error <= TOLERANCE + 4 * plain


def _random(outside: _Outside, generator: torch.Generator) -> Tensor:
    """Normal numbers; of booleans, seven of ten are true."""
    numbers = torch.randn(outside.sizes, generator=generator, dtype=torch.float32)
    drawn = numbers < 0.5 if outside.dtype == torch.bool else numbers.to(outside.dtype)
    return drawn.expand(outside.expanded)


def _prepare(form: _Form, tensors: list[Tensor], spread: float) -> None:
    """Scale the scores to a standard deviation; with a mask, hide three of ten keys, but never the first."""
    query, key, _ = form.operands
    channels = query.of(tensors).shape[-1]
    factor = math.sqrt(spread / (abs(form.scale) * math.sqrt(channels))) if form.scale else 1.0
    for number in {query.number, key.number}:
        tensors[number] = tensors[number] * factor
    if form.mask is not None:
        drawn = tensors[form.mask.number].clone()
        if drawn.dtype == torch.bool:
            kept = step_through(
                torch.tensor([True]), [step for step in form.mask.steps if step[0] in _OF_VALUES]
            )
            drawn[..., 0] = bool(kept if kept.dtype == torch.bool else kept == 0)
        else:
            drawn[drawn > 0.5] = -torch.inf
            drawn[..., 0] = 0.0
        tensors[form.mask.number] = drawn


_OF_VALUES = ("logical_not", "to", "mul")
"""Steps that change values."""


def _run(form: _Form, tensors: Sequence[Tensor]) -> Tensor:
    """The output of the calls."""
    values = list(tensors)

    def filled(value: Any, dtype: torch.dtype | None) -> Any:
        if isinstance(value, tuple):
            return tuple(filled(one, dtype) for one in value)
        if not isinstance(value, _Slot):
            return value
        found = values[value.number]
        return found.to(dtype) if dtype is not None and found.is_floating_point() else found

    for call in form.calls:
        args = filled(call.args, _wide(call.dtype) if call.adds_up else None)
        kwargs = dict(filled(call.kwargs, None))
        if isinstance(call.function, str):
            out = getattr(args[0], call.function)(*args[1:], **kwargs)
        else:
            out = call.function(*args, **kwargs)
        values.append(out.to(call.dtype) if call.adds_up else out)
    return values[-1]


def _attention(form: _Form, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The output of the attention read in the calls, computed in a type."""
    query, key, value = (part.of(tensors).to(dtype).to(_wide(dtype)) for part in form.operands)
    scores = form.scale * (query @ key.transpose(-1, -2)).to(dtype)
    if form.mask is not None:
        mask = form.mask.of(tensors)
        additive = mask.dtype != torch.bool
        scores = scores + mask.to(dtype) if additive else scores.masked_fill(~mask, -torch.inf)
    out = (scores.softmax(-1).to(_wide(dtype)) @ value).to(dtype)
    return step_through(out if dtype == torch.float64 else out.to(form.calls[-1].dtype), form.finish)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which kernels accumulate."""
    return torch.promote_types(dtype, torch.float32)


def _relative_error(got: Tensor, exact: Tensor) -> float:
    """The error relative to `exact`; not finite where a number is not, or the sizes differ."""
    if got.shape != exact.shape:
        return math.inf
    return float((got.double() - exact).norm() / exact.norm())
