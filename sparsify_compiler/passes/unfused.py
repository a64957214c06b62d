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

from sparsify_compiler.passes.fx import tensor_of

_MATMUL = (torch.matmul, operator.matmul, torch.bmm)
_CASTS = ("to", "float", "half", "bfloat16", "type", "type_as", "contiguous")
_REGROUPS = ("view", "reshape", "flatten", "unflatten", torch.flatten, torch.reshape)
_HIDDEN = torch.finfo(torch.float16).min
"""Scores filled with this or less weigh nothing in any dtype."""


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
    return {
        "query": _led_by(query, lead),
        "key": _led_by(key, lead),
        "value": _led_by(value(), lead),
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


def _skip_views(node: Any) -> Any:
    """Through casts, and through reshapes that regroup the batch dimensions of scores alone."""
    while _is(node, *_CASTS, *_REGROUPS):
        if _is(node, *_REGROUPS):
            after, before = tensor_of(node), tensor_of(node.args[0])
            if after is None or before is None or after.shape[-2:] != before.shape[-2:]:
                break
        node = node.args[0]
    return node


def _led_by(node: fx.Node, lead: tuple[int, ...]) -> fx.Node:
    """`node` with batch dimensions `lead` (and its last two), regrouped where it has others."""
    value = tensor_of(node)
    if value is None or value.dim() - 2 == len(lead):
        return node
    return _after(node, "flatten", 0, 1) if len(lead) == 1 else _after(node, "unflatten", 0, lead)


def _finish(node: fx.Node, lead: tuple[int, ...], finish: "_Finish | None") -> "_Finish | None":
    """Also regroup the output's batch dimensions, where the second product had others than the scores."""
    out = tensor_of(node)
    if finish is not None or out is None or out.dim() - 2 == len(lead):
        return finish
    if len(lead) == 1:
        return lambda graph, result: graph.call_method("unflatten", (result, 0, tuple(out.shape[:-2])))
    return lambda graph, result: graph.call_method("flatten", (result, 0, 1))


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
    if _is(node, operator.add, torch.add, "add", operator.iadd) and len(node.args) == 2:
        a, b = node.args
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            a_tensor, b_tensor = tensor_of(a), tensor_of(b)
            if a_tensor is not None and b_tensor is not None:
                scores, mask = (a, b) if a_tensor.numel() >= b_tensor.numel() else (b, a)
                return _skip_views(scores), mask
    if _is(node, "masked_fill", torch.masked_fill) and len(node.args) == 3:
        scores, hidden, fill = node.args
        if isinstance(hidden, fx.Node) and (number := _number(fill)) is not None and number <= _HIDDEN:
            return _skip_views(scores), _negated(hidden)
    return node, None


def _negated(mask: fx.Node) -> fx.Node:
    """The boolean mask that is true where `mask` is not."""
    if _is(mask, operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not"):
        return mask.args[0]  # type: ignore[return-value]
    return _after(mask, "logical_not")


def _scale(node: Any) -> tuple[Any, float]:
    """(scores before a multiplication by a number, that number)."""
    if _is(node, operator.mul, torch.mul, "mul", operator.imul):
        for x, factor in (node.args, node.args[::-1]):
            if isinstance(x, fx.Node) and (number := _number(factor)) is not None:
                return _skip_views(x), number
    if _is(node, operator.truediv, torch.div, "div", operator.itruediv) and len(node.args) == 2:
        number = _number(node.args[1])
        if number:
            return _skip_views(node.args[0]), 1.0 / number
    return node, 1.0


def _scores_product(node: Any) -> tuple[fx.Node, fx.Node, float, fx.Node | None] | None:
    """(query, key, factor, added mask) of the first product q kᵀ."""
    if _is(node, torch.baddbmm, "baddbmm") and len(node.args) == 3:
        added, query, key_t = node.args
        beta, alpha = _number(node.kwargs.get("beta", 1)), _number(node.kwargs.get("alpha", 1))
        if beta not in (0.0, 1.0) or alpha is None:
            return None
        return query, _transposed(key_t), alpha, added if beta else None
    if _is(node, *_MATMUL, "matmul", "bmm", "__matmul__") and len(node.args) == 2:
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


_Finish = Callable[[fx.Graph, fx.Node], fx.Node]


def _product(node: fx.Node) -> tuple[Any, Callable[[], fx.Node], _Finish | None] | None:
    """(weights, how to get the value as [..., Sk, Dv], how to finish the output) of the second product."""
    if _is(node, *_MATMUL, "matmul", "bmm", "__matmul__") and len(node.args) == 2:
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

    def finish(graph: fx.Graph, result: fx.Node) -> fx.Node:
        return graph.call_method("permute", (result, *[natural.index(letter) for letter in out]))

    return a, lambda: _permuted(b, right, [*batch, j, *rest]), None if out == natural else finish


def _einsum(node: Any) -> tuple[list[str], list[str], list[str], fx.Node, fx.Node] | None:
    """(left, right and output letters, left and right operand) of a two-operand einsum without ellipsis."""
    if not _is(node, torch.einsum):
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
    return _after(node, "permute", *dims)


def _transposed(node: fx.Node) -> fx.Node:
    """The key, given its transpose; reuses the tensor that was transposed."""
    if _is(node, "transpose", torch.transpose) and len(node.args) == 3:
        x, a, b = node.args
        value = tensor_of(x)
        if value is not None and isinstance(a, int) and isinstance(b, int):
            last = {value.dim() - 1, value.dim() - 2}
            if {a % value.dim(), b % value.dim()} == last:
                return x  # type: ignore[return-value]
    return _after(node, "transpose", -1, -2)


def _after(node: fx.Node, method: str, *dims: Any) -> fx.Node:
    """A method's result, placed right after it, with the fake tensor Dynamo would have recorded."""
    with node.graph.inserting_after(node):
        view = node.graph.call_method(method, (node, *dims))
    if (value := tensor_of(node)) is not None:
        view.meta["example_value"] = getattr(value, method)(*dims)
    return view
