"""Attention written by hand: softmax(scale * q kᵀ + mask) v, in the spellings people use.

A softmax over the keys between two products looks like attention. `find_chain` searches backwards from the second
product; `read_chain` reads strictly, forwards from the first. Products are `@`, `matmul`, `bmm`, `einsum` and, as
the first, `baddbmm`. Between them are, in this order, casts to types that hold the scores, `* scale` or `/ scale`
by numbers, a mask (`+ mask`, `masked_fill(mask, -inf)`, `where(mask, scores, -inf)`), softmax over the last
dimension, and dropout. Batch dimensions may be regrouped. In all other cases the call stays as it is, with the
reason.

Rewritten attention reads its tensors at the second product, so nothing may write to them in between.
"""

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sparsify_compiler.passes.fx import Operand, Step, node_of, recorded, sizes_of, tensor_of, written_by
from sparsify_compiler.passes.writes import may_be_written

_MATMULS = {operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm", "__matmul__"}
_BADDBMMS = {torch.baddbmm, "baddbmm"}
_ADDED_MATMULS = {*_BADDBMMS, torch.addmm, "addmm"}
_EINSUMS = {torch.einsum}
_SOFTMAXES = {F.softmax, torch.softmax, "softmax"}
_LIKE_SOFTMAX = {*_SOFTMAXES, F.softmin, F.log_softmax, torch.log_softmax, "log_softmax"}
_EXPONENTIALS = {torch.exp, "exp", "exp_"}
"""A softmax that is written out takes one of these."""
_DROPOUTS = {F.dropout}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous"}
_REGROUPS = {"view", "reshape", "flatten", "unflatten", torch.flatten, torch.reshape, torch.unflatten}
_TRANSPOSES = {"transpose", torch.transpose, "swapaxes", torch.swapaxes}
_PERMUTES = {"permute", torch.permute}
_TIMES = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}
_DIVIDES = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_", "true_divide"}
_PLUS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FILLS = {torch.masked_fill, "masked_fill", "masked_fill_"}
_CHOOSES = {torch.where, "where"}
_INVERTS = {operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not", "__invert__"}
_HIDDEN = -1e9
"""A score of this value or less has no weight next to others; in a row of such scores all weigh the same."""
_HIDING = -1e30
"""Large enough to swamp any score that it is added to."""
_MOST_NODES = 16
"""The most nodes searched between a product and the softmax."""

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfused:
    """Attention by hand: output = finish(softmax(scale * q kᵀ + mask) v)."""

    chain: tuple[fx.Node, ...]
    """The nodes from the first product to the second; each reads the one before."""
    query: Operand
    """[*lead, Sq, D], for scores [*lead, Sq, Sk]"""
    key: Operand
    """[*lead, Sk, D]"""
    value: Operand
    """[*lead, Sk, Dv]"""
    mask: Operand | None
    """Additive, or boolean with True where a key is seen; broadcasts to the scores."""
    scale: float
    finish: tuple[Step, ...]
    """Steps from [*lead, Sq, Dv] to the form of the output."""
    refusal: str
    """Why it cannot be rewritten; empty if it can."""


class NotRead(Exception):
    """A softmax between two products is not read as attention; the message gives the reason."""


def find_chain(node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes from the first product to `node`, if it is the second product of apparent attention."""
    for weights, dim in _contracted(node):
        after = _climb(weights, dim, lambda one, dim: softmax_dim(one) == dim or _is(one, _EXPONENTIALS))
        if after is None:
            continue
        scores = _argument(after[-1][0], 0, "input")
        before = _climb(scores, after[-1][1], lambda one, _: bool(factors(one)))
        if before is not None:
            return (*(one for one, _ in (*reversed(before), *reversed(after))), node)
    return None


def _contracted(node: fx.Node) -> Iterator[tuple[fx.Node, int]]:
    """(operand, dimension from the end) for each operand of a product, which sums over this dimension."""
    if (parsed := _einsum(node)) is not None:
        left, right, out, a, b = parsed
        for letters, others, operand in ((left, right, a), (right, left, b)):
            summed = [i for i, letter in enumerate(letters) if letter in others and letter not in out]
            if len(summed) == 1:
                yield operand, summed[0] - len(letters)
    elif both := factors(node):
        yield both[0], -1
        yield both[1], -2


def _climb(start: Any, dim: int, found: Callable[[fx.Node, int], bool]) -> list[tuple[fx.Node, int]] | None:
    """The path from `start` up to a node that `found` accepts, along tensors that have its dimension `dim`."""
    ways = [[(start, dim)]] if isinstance(start, fx.Node) else []
    seen: set[fx.Node] = set()
    while ways and len(seen) < _MOST_NODES:
        way = ways.pop()
        node, dim = way[-1]
        if node in seen:
            continue
        seen.add(node)
        if found(node, dim):
            return way
        # Through a write only where no other way leads to it.
        ways = [[*way, (one, dim)] for one in _written_from(node)] + ways
        ways += [[*way, step] for step in _carried(node, dim)]
    return None


def _written_from(node: fx.Node) -> list[fx.Node]:
    """The calls whose result is written to a tensor, of its sizes: by `out=`, `copy_`, or an assignment."""
    found = []
    for user in node.users:
        if node in written_by(user, user.args, user.kwargs):
            found += [
                one
                for one in (user, *user.all_input_nodes)
                if one is not node and _sizes(one) == _sizes(node)
            ]
    return found


def _carried(node: fx.Node, dim: int) -> list[tuple[fx.Node, int]]:
    """(input, its dimension that becomes `dim` of the output), for a call that keeps the last sizes."""
    if node.op not in ("call_function", "call_method") or factors(node):
        return []
    out = _sizes(node)
    if (order := _order(node, len(out))) is not None:
        return [(node_of(node.args[0]), order[dim] - len(out))]
    sizes = [(one, _sizes(one)) for one in reversed(node.all_input_nodes)]
    return [(one, dim) for one, have in sizes if have and out and have[min(dim, -2) :] == out[min(dim, -2) :]]


def _order(node: fx.Node, rank: int) -> list[int] | None:
    """The dimension of the input for each dimension of the output, if a call moves dimensions."""
    dims = list(range(rank))
    if _is(node, _PERMUTES):
        given = node.args[1] if len(node.args) == 2 else node.args[1:]
        moved = list(given) if isinstance(given, (tuple, list)) else []
        whole = len(moved) == rank and all(isinstance(dim, int) for dim in moved)
        return [dim % rank for dim in moved] if whole else None
    if node.target is getattr and node.args[1:] in (("mT",), ("T",)):
        swapped: tuple[Any, ...] = (-1, -2)
    elif _is(node, _TRANSPOSES):
        swapped = node.args[1:]
    else:
        return None
    if rank < 2 or len(swapped) != 2 or not all(isinstance(dim, int) for dim in swapped):
        return None
    a, b = swapped
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def softmax_dim(node: fx.Node) -> int | None:
    """The dimension, from the end, of a softmax or its logarithm."""
    if not _is(node, _LIKE_SOFTMAX):
        return None
    dim, rank = _argument(node, 1, "dim"), len(_sizes(node))
    return dim % rank - rank if isinstance(dim, int) and rank else None


def read_chain(gm: fx.GraphModule, chain: tuple[fx.Node, ...]) -> Unfused:
    """The attention in a chain of `find_chain`.

    Raises:
        NotRead: a node between its products is not part of attention, or is out of order.
    """
    product, last = chain[0], chain[-1]
    if any(one not in reader.all_input_nodes for one, reader in pairwise(chain)):
        raise NotRead("its scores or weights are written to another tensor")
    if all(softmax_dim(node) is None for node in chain):
        raise NotRead(
            "its softmax is written out, with exp: call torch.softmax or scaled_dot_product_attention"
        )
    middle = next(i for i, node in enumerate(chain) if softmax_dim(node) is not None)
    _check_types(chain, middle)
    query, key, scale, added = _first_product(product)
    lead_node = next((node for node in chain[:-1] if len(_sizes(node)) == 4), product)
    lead = _sizes(lead_node)[:-2]
    if len(lead) not in (1, 2):
        raise NotRead(f"its scores have {len(lead) + 2} dimensions")
    mask = None if added is None else _led(added, product, lead_node, broadcasts=True)
    reads = {"query": (query.node, product), "key": (key.node, product)}
    if added is not None:
        reads["mask"] = added.node, product
    for before, node in pairwise(chain[:middle]):
        if _is_cast(node) or _is_regroup(node, before):
            continue
        if (number := _factor(node, before)) is not None:
            if mask is not None:
                raise NotRead("its mask is scaled with its scores")
            scale *= number
        elif (found := _mask(node, before)) is not None:
            if mask is not None:
                raise NotRead("it has two masks")
            read, reader = found
            mask = _led(read, node, lead_node, broadcasts=True)
            reads["mask"] = read.node, reader
        else:
            raise NotRead(f"its scores go through {_name(node)}")
    softmax = chain[middle]
    if not _is(softmax, _SOFTMAXES):
        raise NotRead(f"its weights are those of {_name(softmax)}")
    if softmax_dim(softmax) != -1:
        raise NotRead("its softmax does not run over the last dimension")
    refusal = ""
    for before, node in pairwise(chain[middle:-1]):
        if _is(node, _DROPOUTS):
            if _argument(node, 2, "training", True) and _number(_argument(node, 1, "p", 0.5)) != 0:
                refusal = "dropout inside attention"
        elif not (_is_cast(node) or _is_regroup(node, before)):
            raise NotRead(f"its weights go through {_name(node)}")
    weights = chain[-2]
    value, finish = _second_product(last, weights)
    parts = {"query": (query, product), "key": (key, product), "value": (value, weights)}
    query, key, value = (
        _led(operand, place, lead_node, name=name) for name, (operand, place) in parts.items()
    )
    return Unfused(
        chain=chain,
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=scale,
        finish=(*_regrouping(lead_node, weights), *finish),
        refusal=refusal
        or _watched(chain, middle)
        or _written(gm, reads, last)
        or _ungraded(chain, query, key),
    )


def _check_types(chain: Sequence[fx.Node], middle: int) -> None:
    """Raise NotRead where scores or weights pass through a type that does not hold them, or another device."""
    tensors = [tensor for node in chain if (tensor := tensor_of(node)) is not None]
    if len(tensors) < len(chain):
        raise NotRead("its tensors were not recorded by Dynamo")
    first, last = tensors[0], tensors[-1]
    for i, (node, tensor) in enumerate(zip(chain, tensors, strict=True)):
        held = first.dtype if i <= middle else last.dtype
        what = "scores" if i <= middle else "weights"
        dtype = tensor.dtype
        if not _holds(dtype, held):
            raise NotRead(f"its {what} are cast from {held} to {dtype}")
        if tensor.device != first.device:
            raise NotRead(f"its {what} change device")
        if not _sizes(node):
            raise NotRead("its sizes are known only at run time")
    if first.dtype != last.dtype and _autocasts(chain[-1]):
        raise NotRead("autocast is not the same at both of its products")


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a type has every number of another one. Types of 8 bits do not promote: they hold none."""
    wide = dtype.is_floating_point and min(dtype.itemsize, other.itemsize) > 1
    return wide and torch.promote_types(dtype, other) == dtype


def _autocasts(product: fx.Node) -> bool:
    """Whether autocast is on at a product: its operands promote to a type other than its output's."""
    a, b = (recorded(one).dtype for one in _multiplied(product))
    return torch.promote_types(a, b) != recorded(product).dtype


def _watched(chain: Sequence[fx.Node], middle: int) -> str:
    """The reason, if another node reads or writes a tensor between the products."""
    for i, (node, following) in enumerate(pairwise(chain)):
        if set(node.users) != {following}:
            return f"its {'weights' if i >= middle else 'scores'} are used elsewhere too"
    return ""


def _written(gm: fx.GraphModule, reads: Mapping[str, tuple[fx.Node, fx.Node]], last: fx.Node) -> str:
    """The reason, if a node may write to a tensor between its reader and the second product."""
    for name, (node, reader) in reads.items():
        if may_be_written(gm, node, reader, last):
            return f"its {name} is written to between its products"
    return ""


def _ungraded(chain: Sequence[fx.Node], query: Operand, key: Operand) -> str:
    """The reason, if gradients end between the products but would continue by the rewritten call."""
    *between, last = (recorded(node).requires_grad for node in chain)
    wanted = any(recorded(one.node).requires_grad for one in (query, key))
    return "gradients are switched off between its products" if last and wanted and not all(between) else ""


# ---- Products ----------------------------------------------------------------------------------------------------


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that a node multiplies as matrices."""
    if (parsed := _einsum(node)) is not None:
        return parsed[3], parsed[4]
    start = 1 if _is(node, _ADDED_MATMULS) else 0 if _is(node, _MATMULS) else None
    if start is None or len(node.args) != start + 2:
        return None
    a, b = node.args[start:]
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _multiplied(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two tensors that a product multiplies."""
    both = factors(product)
    assert both is not None, f"{product} multiplies no two tensors"
    return both


def _first_product(node: fx.Node) -> tuple[Operand, Operand, float, Operand | None]:
    """(query, key, factor, added mask) of q kᵀ."""
    if _is(node, _BADDBMMS) and node.kwargs.keys() <= {"beta", "alpha"}:
        query, key_t = _multiplied(node)
        beta, alpha = (_number(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
        if beta not in (0.0, 1.0) or alpha is None:
            raise NotRead("its first product is a baddbmm with a factor for its mask")
        mask = Operand(node_of(node.args[0])) if beta else None
        return Operand(query), Operand(key_t).then(("transpose", -1, -2)), alpha, mask
    if _is(node, _MATMULS) and not node.kwargs:
        query, key_t = _multiplied(node)
        return Operand(query), Operand(key_t).then(("transpose", -1, -2)), 1.0, None
    if (parsed := _einsum(node)) is None or len(parsed[2]) < 2:
        raise NotRead(f"its first product is a {_name(node)} with options")
    left, right, out, a, b = parsed
    *batch, i, j = out
    if i not in left:
        left, right, a, b = right, left, b, a
    inner = [letter for letter in left if letter in right and letter not in out]
    rows = _permuted(Operand(a), left, [*batch, i, *inner])
    columns = _permuted(Operand(b), right, [*batch, j, *inner])
    return rows, columns, 1.0, None


def _second_product(node: fx.Node, weights: fx.Node) -> tuple[Operand, tuple[Step, ...]]:
    """(value, steps from [..., Sq, Dv] to the output)."""
    if _is(node, _MATMULS) and not node.kwargs:
        first, second = _multiplied(node)
        if first is not weights or second is weights:
            raise NotRead("its second product does not have the weights on the left")
        return Operand(second), ()
    if (parsed := _einsum(node)) is None:
        raise NotRead(f"its second product is a {_name(node)} with options")
    left, right, out, a, b = parsed
    if a is not weights:
        left, right, a, b = right, left, b, a
    *batch, i, j = left
    rest = [letter for letter in right if letter not in left]
    natural = [*batch, i, *rest]
    if b is weights or len(rest) != 1 or sorted(out) != sorted(natural):
        raise NotRead("its second product is an einsum that sums over more than the keys")
    finish = () if out == natural else (("permute", *[natural.index(letter) for letter in out]),)
    return _permuted(Operand(b), right, [*batch, j, *rest]), finish


def _einsum(node: fx.Node) -> tuple[list[str], list[str], list[str], fx.Node, fx.Node] | None:
    """(left, right and output letters, left and right operand) of a two-operand einsum without ellipsis."""
    if not _is(node, _EINSUMS) or node.kwargs:
        return None
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    equation = equation.replace(" ", "") if isinstance(equation, str) else ""
    nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
    if not len(nodes) == len(operands) == 2 or "." in equation or "->" not in equation:
        return None
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    return list(left), list(right), list(out), nodes[0], nodes[1]


def _permuted(operand: Operand, have: list[str], want: list[str]) -> Operand:
    if sorted(have) != sorted(want) or len(set(have)) != len(have):
        raise NotRead("its einsum is no product of matrices")
    return operand if have == want else operand.then(("permute", *[have.index(letter) for letter in want]))


# ---- Between the products ----------------------------------------------------------------------------------------


def _is_cast(node: fx.Node) -> bool:
    """Whether a node changes nothing but type or strides."""
    return _is(node, _CASTS)


def _is_regroup(node: fx.Node, before: fx.Node) -> bool:
    """Whether a node reshapes the batch dimensions of scores, and nothing else."""
    return (
        _is(node, _REGROUPS)
        and _sizes(node)[-2:] == _sizes(before)[-2:]
        and recorded(node).dtype == recorded(before).dtype
    )


def _factor(node: fx.Node, scores: fx.Node) -> float | None:
    """The finite number by which a node multiplies scores."""
    if node.kwargs or len(node.args) != 2:
        return None
    a, b = node.args
    if _is(node, _TIMES):
        number = _number(b if a is scores else a)
    else:
        number = _number(b) if _is(node, _DIVIDES) and a is scores else None
        number = 1.0 / number if number else None
    return number if number is not None and math.isfinite(number) else None


def _mask(node: fx.Node, scores: fx.Node) -> tuple[Operand, fx.Node] | None:
    """(mask, the node that reads it) if a node adds a mask to scores, or hides some of them."""
    if _is(node, _PLUS) and not node.kwargs and len(node.args) == 2 and _sizes(node) == _sizes(scores):
        a, b = node.args
        mask = b if a is scores else a
        value = tensor_of(mask)
        if value is None or not value.dtype.is_floating_point or mask is scores:
            return None
        return Operand(node_of(mask)), node
    if _is(node, _FILLS) and _argument(node, 0, "input") is scores:
        hidden, fill = _argument(node, 1, "mask"), _argument(node, 2, "value")
        return _hiding(node, scores, hidden, fill, seen=False)
    if _is(node, _CHOOSES) and len(node.args) == 3 and not node.kwargs:
        # where(condition, x, y), x.where(condition, y)
        x, condition, y = (
            node.args if node.op == "call_method" else (node.args[1], node.args[0], node.args[2])
        )
        if x is scores:
            return _hiding(node, scores, condition, y, seen=True)
        if y is scores:
            return _hiding(node, scores, condition, x, seen=False)
    return None


def _hiding(
    node: fx.Node, scores: fx.Node, condition: Any, fill: Any, *, seen: bool
) -> tuple[Operand, fx.Node] | None:
    """(mask, the node that reads it) if a condition keeps or fills scores.

    Args:
        seen: whether the condition is true where scores are kept.
    """
    number = _number(fill)
    hides = max(_HIDDEN, torch.finfo(recorded(scores).dtype).min)
    if number is None or not number <= hides or not _is_bool(condition) or _sizes(node) != _sizes(scores):
        return None
    reader = node
    if _is(condition, _INVERTS) and _is_bool(condition.args[0]):
        condition, reader, seen = condition.args[0], condition, not seen
    mask = Operand(condition)
    if number == -math.inf:
        return (mask if seen else mask.then(("logical_not",))), reader
    hidden = mask.then(("logical_not",)) if seen else mask
    return hidden.then(("to", torch.float32), ("mul", _HIDING)), reader


def _is_bool(node: Any) -> bool:
    value = tensor_of(node)
    return value is not None and value.dtype == torch.bool


# ---- Batch dimensions --------------------------------------------------------------------------------------------


def _led(
    operand: Operand, place: fx.Node, lead_node: fx.Node, *, broadcasts: bool = False, name: str = "mask"
) -> Operand:
    """An operand of the scores or weights `place`, with the batch dimensions of `lead_node`.

    Args:
        broadcasts: whether the operand may have fewer or smaller dimensions, as a mask.
    """
    value = operand.value
    sizes = None if value is None else sizes_of(value)
    if sizes is None:
        raise NotRead(f"its {name} was not recorded by Dynamo")
    here = _sizes(place)[:-2]
    steps = _regrouping(place, lead_node)
    if broadcasts:
        if len(sizes) < len(here) + 2 or not steps:
            return operand
        if sizes[:-2] == (1,):
            return operand.then(("unsqueeze", 0))
    if sizes[:-2] != here:
        raise NotRead(f"its {name} has the sizes {sizes}, its scores have {_sizes(place)}")
    return operand.then(*steps)


def _regrouping(before: fx.Node, after: fx.Node) -> tuple[Step, ...]:
    """Steps from the batch dimensions of scores `before` to those of `after`."""
    have, want = _sizes(before)[:-2], _sizes(after)[:-2]
    if have == want:
        return ()
    if math.prod(have) == math.prod(want) and {len(have), len(want)} == {1, 2}:
        if len(want) == 1:
            return (("flatten", 0, 1),)
        return (("unflatten", 0, (-1, int(recorded(after).shape[1]))),)
    raise NotRead(f"its batch dimensions {list(have)} are regrouped to {list(want)}")


# ---- Nodes -------------------------------------------------------------------------------------------------------


def _is(node: Any, targets: Collection[Any]) -> bool:
    """Whether a node calls one of these functions, or a method of one of these names."""
    return (
        isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets
    )


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _sizes(node: Any) -> Sizes:
    """The sizes of a node's tensor, not specialised; empty if it has none, or they are known only at run time."""
    value = tensor_of(node)
    return () if value is None else sizes_of(value) or ()


def _name(node: fx.Node) -> str:
    if node.target is getattr:
        return f".{node.args[1]}"
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
