"""One node on a rank's share of the tokens: its arguments, the share of its operands, and its result.

    whole    view(x, [2, 60, 3, 8])      x is [2, 60, 24], with 60 tokens in dimension 1
    local    view(x, [2, 20, 3, 8])      on each of three ranks

A dimension along the tokens is a list of parts (`parallel/shares.py`). Labels show which dimensions these are, and
a run on fake tensors of a share proves the new arguments. Nothing here changes a graph.
"""

import operator
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from sparsify_compiler._torch import quiet_fakes
from sparsify_compiler.parallel.shares import Part, local_length, pieces
from sparsify_compiler.passes.axes import Label, length
from sparsify_compiler.passes.axis_rules import tensors_in
from sparsify_compiler.passes.fx import node_of, run_call, written_by
from sparsify_compiler.passes.token_axis import TokenTracker

Place = tuple[int, int, list[Part]]
"""(dimension, repeats outside of the parts, parts) of the tokens of a tensor."""


@dataclass(slots=True)
class View:
    """One rank's side of the graph: the local values of nodes that have tokens."""

    rank: int
    values: dict[fx.Node, Any] = field(default_factory=dict)


class Localizer:
    """Finds what the nodes of a graph are on a rank's share of the tokens."""

    def __init__(
        self, tracker: TokenTracker, whole: dict[fx.Node, Any], pointwise: set[fx.Node], size: int
    ) -> None:
        """Args:
        tracker: knows the labels of all values.
        whole: node -> its value in one process.
        pointwise: nodes whose operators are pointwise.
        size: the number of ranks.
        """
        self.tracker, self.whole, self.pointwise, self.size = tracker, whole, pointwise, size

    def place(self, value: Any) -> Place | None:
        """The place of the tokens in a tensor that has them in one dimension, all and in order."""
        labels = self.tracker.of(value)
        dims = [dim for dim, label in enumerate(labels) if self.tracker.has(label)]
        if len(dims) != 1 or (parts := self.tracker.parts(labels[dims[0]])) is None:
            return None
        return dims[0], *parts

    def has_tokens(self, value: Tensor) -> bool:
        """Whether a dimension of a tensor has tokens."""
        return any(map(self.tracker.has, self.tracker.of(value)))

    def shape(self, value: Tensor, rank: int) -> tuple[int, ...]:
        """The sizes of a rank's share of a tensor."""
        sizes = []
        for label, size in zip(self.tracker.of(value), value.shape, strict=True):
            found = self.tracker.parts(label) if self.tracker.has(label) else None
            sizes.append(size if found is None else found[0] * local_length(found[1], rank, self.size))
        return tuple(sizes)

    def share_of(self, value: Tensor, place: Place, rank: int) -> Tensor:
        """A rank's share of a tensor of all tokens."""
        dim, repeats, parts = place
        split = value.unflatten(dim, (repeats, -1)) if repeats > 1 else value
        at = dim + (repeats > 1)
        runs = [one.whole for one in pieces(parts, rank, self.size)]
        cut = [split.narrow(at, run.start, run.stop - run.start) for run in runs]
        joined_ = torch.cat(cut, at) if len(cut) > 1 else cut[0]
        return joined_.flatten(dim, at) if repeats > 1 else joined_

    def cuts(self, node: fx.Node, whole: Any, local: Container[fx.Node]) -> dict[fx.Node, Place]:
        """The operands that every rank has and of which a node needs a share, with the place of the tokens.

        Args:
            whole: the node's value in one process.
            local: nodes of which ranks have their share already.

        Raises:
            LookupError: an operand has no share, with the reason.
        """
        if node.target is operator.setitem:
            if not isinstance(node.args[2], fx.Node) or not isinstance(self.whole[node.args[2]], Tensor):
                return {}
            target, index = self.whole[node_of(node.args[0])], node.args[1]
            if _has_nodes(index):
                raise LookupError("it writes at places that are computed")
            with self.tracker:
                labels, operands = self.tracker.of(target[index]), [node.args[2]]
            along = None
        else:
            joins = node.target in (torch.cat, torch.concat)
            if not isinstance(whole, Tensor) or not (node in self.pointwise or joins):
                return {}
            labels, operands = self.tracker.of(whole), node.all_input_nodes
            along = _dim_of(node) % whole.dim() if joins else None
        written = written_by(node, node.args, node.kwargs)
        cuts: dict[fx.Node, Place] = {}
        for one in operands:
            x = self.whole[one]
            if one in local or not isinstance(x, Tensor):
                continue
            for dim in range(x.dim()):
                at = dim + len(labels) - x.dim()
                if at < 0 or at == along or not self.tracker.has(labels[at]) or x.shape[dim] == 1:
                    continue
                parts = self.tracker.parts(labels[at])
                if parts is None or x.shape[dim] != length(labels[at]) or one in cuts or one in written:
                    raise LookupError("an operand of all tokens cannot be cut")
                cuts[one] = dim, *parts
        return cuts

    def run(self, node: fx.Node, whole: Any, cuts: dict[fx.Node, Place], view: View) -> tuple[Any, Any, Any]:
        """(args, kwargs, result) of a node on a rank's tokens; `cuts` as that function returns it.

        Raises:
            LookupError: the result is not the rank's share of `whole`, with the reason.
        """
        args, kwargs = self._arguments(node, whole, view.rank)

        def value(one: fx.Node) -> Any:
            if one in view.values:
                return view.values[one]
            return self.share_of(self.whole[one], cuts[one], view.rank) if one in cuts else self.whole[one]

        try:
            with quiet_fakes():
                result = run_call(node, *fx.node.map_arg((args, kwargs), value))
        except Exception as error:
            raise LookupError(f"it fails on a share of the tokens: {error}") from None
        got, wanted = tree_leaves(result), tree_leaves(whole)
        fits = len(got) == len(wanted) and all(
            tuple(one.shape) == self.shape(of, view.rank) and one.dtype == of.dtype
            for one, of in zip(got, wanted, strict=True)
            if isinstance(of, Tensor)
        )
        if not fits:
            raise LookupError("its sizes do not follow the tokens")
        return args, kwargs, result

    def _arguments(self, node: fx.Node, whole: Any, rank: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, with the literal sizes and places that a rank's share has."""
        args: tuple[Any, ...] = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        name = getattr(node.target, "__name__", node.target)
        shapes = [self.shape(one, rank) for one in tensors_in(whole)]
        if name in ("getitem", "setitem") and isinstance(x := self.whole[args[0]], Tensor):
            return (args[0], self._index(x, args[1], rank), *args[2:]), kwargs
        if name in ("view", "reshape", "expand") and len(args) > 1 and not isinstance(args[1], torch.dtype):
            return (args[0], *_sizes_like(args[1:], shapes[0])), kwargs
        if name in ("new_zeros", "new_ones", "new_empty"):
            return (args[0], *_sizes_like(args[1:], shapes[0])), kwargs
        if node.target in (torch.zeros, torch.ones, torch.empty):
            return _sizes_like(args, shapes[0]), kwargs
        if node.target is torch.full or name == "new_full":
            before = args[:-2]
            return (*before, shapes[0], args[-1]), kwargs
        if name == "unflatten":
            x, dim, sizes = args
            dim %= self.whole[x].dim()
            return (x, dim, shapes[0][dim : dim + len(sizes)]), kwargs
        if name in ("split", "split_with_sizes", "narrow"):
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) if name != "narrow" else args[1]
            label = self.tracker.of(self.whole[args[0]])[dim]
            if self.tracker.has(label):
                if name != "narrow":
                    return (args[0], [shape[dim] for shape in shapes], *args[2:]), kwargs
                first, last = (self._boundary(label, at, rank) for at in (args[2], args[2] + args[3]))
                return (args[0], dim, first, last - first), kwargs
        return args, kwargs

    def _index(self, x: Tensor, index: Any, rank: int) -> Any:
        """An index of a tensor, with places among the tokens as a rank has them."""
        items = index if isinstance(index, tuple) else (index,)
        if _has_nodes(items):
            if self.has_tokens(x):
                raise LookupError("it takes tokens at places that are computed")
            return index
        labels, dim, local = self.tracker.of(x), 0, []
        used = sum(one is not None and one is not Ellipsis for one in items)
        for one in items:
            if one is Ellipsis:
                dim += x.dim() - used
            elif one is not None:
                if isinstance(one, slice) and one != slice(None) and self.tracker.has(labels[dim]):
                    first, last, step = one.indices(x.shape[dim])
                    if step != 1:
                        raise LookupError("it takes every n-th token")
                    one = slice(*(self._boundary(labels[dim], at, rank) for at in (first, max(first, last))))
                dim += 1
            local.append(one)
        return tuple(local) if isinstance(index, tuple) else local[0]

    def _boundary(self, label: Label, position: int, rank: int) -> int:
        """A position of the whole dimension as one of a rank's share."""
        found = self.tracker.parts(label)
        if found is None or found[0] > 1:
            raise LookupError("a slice cuts repeated tokens")
        whole = local = 0
        for part in found[1]:
            if position == whole or (not part.tokens and whole <= position < whole + part.whole):
                return local + position - whole
            whole += part.whole
            local += part.local(rank, self.size)
        if position == whole:
            return local
        raise LookupError("a slice cuts the tokens")


def _has_nodes(index: Any) -> bool:
    """Whether a place of an index is computed."""
    found: list[fx.Node] = []
    fx.node.map_arg(index, found.append)
    return bool(found)


def _dim_of(node: fx.Node) -> int:
    """The dimension along which a call joins tensors."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(dim, int)
    return dim


def _sizes_like(args: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
    """Sizes in the form in which a call gets them: as one argument, or one for each."""
    return (tuple(shape),) if len(args) == 1 and isinstance(args[0], (tuple, list)) else tuple(shape)
