"""Attention written by hand: softmax(scale * q kᵀ + mask) v, in the spellings people use.

Read backwards from the second product. Products: `@`, `matmul`, `bmm`, `baddbmm` (the first), `einsum`. Between
them: casts, `* scale` or `/ scale` with a number, `+ mask` or `masked_fill(mask, -inf)`, softmax over the last
dimension, dropout. Anything else, and it is not attention to us.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparsify_compiler.passes.fx import insert_after, tensor_of

_MATMUL = (torch.matmul, operator.matmul, torch.bmm)
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as", "contiguous")
_WRITERS = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)
_REGROUPS = ("view", "reshape", "flatten", "unflatten", torch.flatten, torch.reshape)
_HIDDEN = -1e9
"""A score filled with this or less weighs nothing beside others, and among its like all weigh the same."""


def match_unfused(node: fx.Node) -> dict[str, Any] | None:
    """The parts of the attention whose second product is `node`, as fields of `capture.Call`, or None."""
    second = _product(node)
    if second is None:
        return None
    weights, value, finish = second
    refusal = ""
    weights = _skip_views(weights)
    if _is(weights, F.dropout):
        arguments = dict(zip(("input", "p", "training"), weights.args, strict=False)) | dict(weights.kwargs)
        if arguments.get("training", True) and arguments.get("p", 0.5) > 0:
            refusal = "dropout inside attention"
        weights = _skip_views(arguments["input"])
    scores = _softmax_input(weights)
    if scores is None:
        return None
    lead = tuple(tensor_of(weights).shape[:-2])  # type: ignore[union-attr]
    scores, mask = _mask(_skip_views(scores))
    scores, scale = _scale(scores)
    first = _scores_product(scores)
    if first is None:
        return None
    query, key, factor, added = first
    if len(lead) not in (1, 2) or (added is not None and mask is not None):
        return None
    operands = query, key, value()
    if not _private(scores, node) or any(map(_written, operands)):
        return None
    query, key, values = (_led_by(operand, lead) for operand in operands)
    return {
        "query": query,
        "key": key,
        "value": values,
        "mask": mask if added is None else added,
        "scale": scale * factor,
        "refusal": refusal,
        "finish": _finish(node, lead, finish),
    }


def _is(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these functions, or a method of one of these names."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return any(node.target is target or node.target == target for target in targets)


def _plain(node: Any, *targets: Any) -> bool:
    """As `_is`, and the call has nothing but positional arguments: no `out`, no `alpha`, no rounding mode."""
    return _is(node, *targets) and not node.kwargs


def _private(first: fx.Node, last: fx.Node) -> bool:
    """Whether nothing but the way from `first` to `last` sees what lies on it, so that nothing can change it."""
    while first is not last:
        if len(first.users) != 1:
            return False
        first = next(iter(first.users))
    return True


def _written(node: fx.Node) -> bool:
    """Whether some call writes into this tensor."""
    return any(
        (user.args[:1] == (node,) and _in_place(user)) or user.kwargs.get("out") is node
        for user in node.users
    )


def _in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    return (
        node.target in _WRITERS
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
    )


def _skip_views(node: Any) -> Any:
    """Through casts, and through reshapes that regroup the batch dimensions of scores alone."""
    while _is(node, *_CASTS, *_REGROUPS):
        if _is(node, *_REGROUPS):
            after, before = tensor_of(node), tensor_of(node.args[0])
            if after is None or before is None or after.shape[-2:] != before.shape[-2:]:
                break
        node = node.args[0]
    return node


def _led_by(node: fx.Node, lead: tuple[Any, ...]) -> fx.Node:
    """`node` with batch dimensions `lead` (and its last two), regrouped where it has others."""
    value = tensor_of(node)
    if value is None or value.dim() - 2 == len(lead):
        return node
    return (
        insert_after(node, "flatten", 0, 1)
        if len(lead) == 1
        else insert_after(node, "unflatten", 0, tuple(map(int, lead)))
    )


def _finish(node: fx.Node, lead: tuple[Any, ...], finish: "_Finish | None") -> "_Finish | None":
    """Also regroup the output's batch dimensions, where the second product had others than the scores."""
    out = tensor_of(node)
    if finish is not None or out is None or out.dim() - 2 == len(lead):
        return finish
    if len(lead) == 1:
        sizes = tuple(int(size) for size in out.shape[:-2])
        return lambda result: insert_after(result, "unflatten", 0, sizes)
    return lambda result: insert_after(result, "flatten", 0, 1)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _softmax_input(node: Any) -> fx.Node | None:
    if not _is(node, F.softmax, torch.softmax, "softmax"):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    out = tensor_of(node)
    if out is None or not isinstance(dim, int) or dim % out.dim() != out.dim() - 1:
        return None
    return node.args[0] if node.args else node.kwargs.get("input")


def _mask(node: Any) -> tuple[Any, fx.Node | None]:
    """(scores without their mask, the mask: additive, or boolean with True where a key is seen)."""
    if _plain(node, operator.add, torch.add, "add", operator.iadd):
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            a_tensor, b_tensor = tensor_of(a), tensor_of(b)
            if a_tensor is not None and b_tensor is not None and a_tensor.is_floating_point():
                scores, mask = (a, b) if a_tensor.numel() >= b_tensor.numel() else (b, a)
                if tensor_of(mask).is_floating_point():  # type: ignore[union-attr]
                    return _skip_views(scores), mask
    if _plain(node, "masked_fill", torch.masked_fill):
        scores, hidden, fill = node.args
        if isinstance(hidden, fx.Node) and (number := _number(fill)) is not None and number <= _HIDDEN:
            exact = number == -torch.inf
            return _skip_views(scores), _negated(hidden) if exact else insert_after(
                hidden, torch.where, number, 0.0
            )
    return node, None


def _negated(mask: fx.Node) -> fx.Node:
    """The boolean mask that is true where `mask` is not."""
    if _is(mask, operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not"):
        return mask.args[0]  # type: ignore[return-value]
    return insert_after(mask, "logical_not")


def _scale(node: Any) -> tuple[Any, float]:
    """(scores before a multiplication by a number, that number)."""
    if _plain(node, operator.mul, torch.mul, "mul", operator.imul):
        for x, factor in (node.args, node.args[::-1]):
            if isinstance(x, fx.Node) and (number := _number(factor)) is not None:
                return _skip_views(x), number
    if _plain(node, operator.truediv, torch.div, "div", operator.itruediv):
        number = _number(node.args[1])
        if number:
            return _skip_views(node.args[0]), 1.0 / number
    return node, 1.0


def _scores_product(node: Any) -> tuple[fx.Node, fx.Node, float, fx.Node | None] | None:
    """(query, key, factor, added mask) of the first product q kᵀ."""
    if (
        _is(node, torch.baddbmm, "baddbmm")
        and len(node.args) == 3
        and node.kwargs.keys() <= {"beta", "alpha"}
    ):
        added, query, key_t = node.args
        beta, alpha = _number(node.kwargs.get("beta", 1)), _number(node.kwargs.get("alpha", 1))
        if beta not in (0.0, 1.0) or alpha is None:
            return None
        return query, _transposed(key_t), alpha, added if beta else None
    if _plain(node, *_MATMUL, "matmul", "bmm", "__matmul__"):
        query, key_t = node.args
        return query, _transposed(key_t), 1.0, None
    if (parsed := _einsum(node)) is None:
        return None
    left, right, out, a, b = parsed
    if len(out) not in (3, 4):
        return None
    *batch, i, j = out
    if i not in left:
        left, right, a, b = right, left, b, a
    inner = [letter for letter in left if letter in right and letter not in out]
    if (
        len(inner) != 1
        or sorted(left) != sorted([*batch, i, *inner])
        or sorted(right) != sorted([*batch, j, *inner])
    ):
        return None
    return _permuted(a, left, [*batch, i, *inner]), _permuted(b, right, [*batch, j, *inner]), 1.0, None


_Finish = Callable[[fx.Node], fx.Node]


def _product(node: fx.Node) -> tuple[Any, Callable[[], fx.Node], _Finish | None] | None:
    """(weights, how to get the value as [..., Sk, Dv], how to finish the output) of the second product."""
    if _plain(node, *_MATMUL, "matmul", "bmm", "__matmul__"):
        weights, value = node.args
        if isinstance(weights, fx.Node) and isinstance(value, fx.Node):
            return weights, lambda: value, None
    if (parsed := _einsum(node)) is None:
        return None
    left, right, out, a, b = parsed
    if len(left) not in (3, 4):
        return None
    *batch, i, j = left
    rest = [letter for letter in right if letter not in left]
    if len(rest) != 1 or j not in right or sorted(right) != sorted([*batch, j, *rest]):
        return None
    natural = [*batch, i, *rest]
    if sorted(out) != sorted(natural):
        return None

    def finish(result: fx.Node) -> fx.Node:
        return insert_after(result, "permute", *[natural.index(letter) for letter in out])

    return a, lambda: _permuted(b, right, [*batch, j, *rest]), None if out == natural else finish


def _einsum(node: Any) -> tuple[list[str], list[str], list[str], fx.Node, fx.Node] | None:
    """(left, right and output letters, left and right operand) of a two-operand einsum without ellipsis."""
    if not _plain(node, torch.einsum):
        return None
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    equation = equation.replace(" ", "") if isinstance(equation, str) else ""
    if len(operands) != 2 or "..." in equation or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    return list(left), list(right), list(out), *operands


def _permuted(node: fx.Node, have: list[str], want: list[str]) -> fx.Node:
    if have == want:
        return node
    dims = [have.index(letter) for letter in want]
    return insert_after(node, "permute", *dims)


def _transposed(node: fx.Node) -> fx.Node:
    """The key, given its transpose; reuses the tensor that was transposed."""
    if _is(node, "transpose", torch.transpose) and len(node.args) == 3:
        x, a, b = node.args
        value = tensor_of(x)
        if value is not None and isinstance(a, int) and isinstance(b, int):
            last = {value.dim() - 1, value.dim() - 2}
            if {a % value.dim(), b % value.dim()} == last:
                return x  # type: ignore[return-value]
    return insert_after(node, "transpose", -1, -2)
