"""Find out whether a tensor keeps its content from one node of a graph to a later one.

The storage identifies a tensor: the fake tensors that Dynamo recorded for a view and for its base share one, as do
those of inputs that overlap. A node that is not proved to only read counts as writing to all its tensors.
"""

import operator
from collections.abc import Iterable, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsify_compiler import _torch
from sparsify_compiler.passes.fx import graphs_in, run_call, sizes_of, strides_of, value_of

_WRITERS = (
    operator.setitem, operator.iadd, operator.iand, operator.iconcat, operator.ifloordiv, operator.ilshift,
    operator.imatmul, operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub,
    operator.itruediv, operator.ixor,
)  # fmt: skip
"""Operators of Python that write to their first operand."""


def may_be_written(gm: fx.GraphModule, tensor: fx.Node, reader: fx.Node, place: fx.Node) -> bool:
    """Whether a node may write to a tensor, from `reader`, which reads it, up to the node before `place`.

    Args:
        reader, place: nodes of the graph of `gm`, in this order.
    """
    held = storages_of(tensor)
    node = place
    while node is not reader:
        node = node.prev
        written = _written(gm, node)
        if held is None or written is None or held & written:
            return True
        # Inputs may overlap in another call.
        if written and written & (inputs := _inputs(gm)) and held & inputs:
            return True
    return False


def written_in(gm: fx.GraphModule) -> frozenset[int] | None:
    """The storages that the nodes of a graph may write to, and those that may overlap them; None if all may."""
    written = _union(_written(gm, node) for node in gm.graph.nodes)
    inputs = _inputs(gm)
    return written | inputs if written is not None and written & inputs else written


def reshaping_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The calls that change a tensor's shape or memory in place: Dynamo records only the last ones."""
    return [node for node in graph.nodes if _reshapes(node)]


def reshaped_after(place: fx.Node, nodes: Sequence[fx.Node], reshaping: Sequence[fx.Node]) -> bool:
    """Whether one of these tensors is reshaped in place after `place`, by one of the nodes `reshaping`."""
    values = [value_of(node) for node in nodes] if reshaping else []
    return any(
        place < node
        and any(value is value_of(one) is not None for value in values for one in node.all_input_nodes)
        for node in reshaping
    )


def _reshapes(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.partition(".")[0]
    packet = getattr(torch.ops.aten, name, None) if name.endswith("_") else None
    return packet is not None and any(
        torch.Tag.inplace_view in getattr(packet, overload).tags for overload in packet.overloads()
    )


def storages_of(node: fx.Node) -> frozenset[int] | None:
    """The storages of all tensors that Dynamo recorded for a node; None if a tensor has none."""
    leaves = [leaf for leaf in tree_leaves(value_of(node)) if isinstance(leaf, Tensor)]
    found = [storage for leaf in leaves if (storage := _torch.storage_of(leaf)) is not None]
    return frozenset(found) if len(found) == len(leaves) else None


def _inputs(gm: fx.GraphModule) -> frozenset[int]:
    return _union(storages_of(node) for node in gm.graph.nodes if node.op == "placeholder") or frozenset()


def _written(gm: fx.GraphModule, node: fx.Node) -> frozenset[int] | None:
    """The storages that a node may write to; None if it may write to any."""
    if _only_reads(node):
        return frozenset()
    touched = _union(storages_of(one) for one in node.all_input_nodes)
    if touched is None or any(_is_unrecorded(gm, one) for one in node.all_input_nodes):
        return None
    if not touched:
        return touched
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        graphs = graphs_in(gm, node)
        return (
            _union(_written(body, one) for body in graphs for one in body.graph.nodes) if graphs else touched
        )
    try:
        return _written_by_running(node)
    except Exception:  # any operator may refuse fake tensors
        return touched


def _is_unrecorded(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a tensor that the graph holds, and Dynamo recorded nothing for it."""
    held = node.op == "get_attr" and value_of(node) is None
    return held and isinstance(getattr(gm, str(node.target), None), Tensor)


def _union(sets: Iterable[frozenset[int] | None]) -> frozenset[int] | None:
    """The union of all sets; None if one is None."""
    found: frozenset[int] = frozenset()
    for one in sets:
        if one is None:
            return None
        found |= one
    return found


def _only_reads(node: fx.Node) -> bool:
    """Whether the kind, name or schema of a node proves that it writes to nothing."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if "out" in node.kwargs:
        return False
    target = node.target
    if node.op == "call_method":
        name = str(target)
        in_place = (
            name.startswith("__i") or name == "__setitem__" if name.endswith("__") else name.endswith("_")
        )
        return not in_place
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable
    return (
        isinstance(target, BuiltinFunctionType)
        and target not in _WRITERS
        and not target.__name__.endswith("_")
    )


def _written_by_running(node: fx.Node) -> frozenset[int]:
    """The storages that a call writes to when it runs on new fake tensors."""
    owners: dict[int | None, frozenset[int]] = {}

    def fake(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return _torch.hint(value)
        if not isinstance(value, Tensor):
            return value
        sizes, strides, storage = sizes_of(value), strides_of(value), _torch.storage_of(value)
        if sizes is None or strides is None or storage is None:
            raise ValueError("its memory is known only at run time")
        twin = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        owners[_torch.storage_of(twin)] = frozenset([storage])
        return twin

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Writes() as writes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: tree_map(fake, value_of(one)))
        run_call(node, args, kwargs)
    return frozenset().union(*(owners.get(storage, frozenset()) for storage in writes.storages))


class _Writes(TorchDispatchMode):
    """Records the storages of tensors that operators write to, by their schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int | None] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                self.storages |= {
                    _torch.storage_of(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)
                }
        return func(*args, **kwargs)
