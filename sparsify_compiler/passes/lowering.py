"""Turn plans into ops.

    before   attention(q, k, v, m, scale)                  meta["plan"]
    after    table = get_attr(...)                         int32 constants of the graph, one set for each
             bias = where(m, 0, -inf)                      distinct table
             out, lse = block_sparse_attention(q, k, v, *table, bias, scale, provider)

A site whose plan is dense gets the call back that the model had. Tables reach the bodies of higher-order
operators as extra operands.
"""

from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.passes.capture import attention_nodes
from sparsify_compiler.passes.fx import bodies, tensor_of
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.table import BlockTable

_LEAST = -1e30
"""Of a finite bias: added to any score, it is that score's only digits."""

_Request = Callable[[str, Tensor], fx.Node]
"""(name, tensor) -> the node that stands for that constant in the graph at hand."""


def lower(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every `attention` node by what its plan says; see the module's picture."""
    first = next(iter(gm.graph.nodes))

    def constant(name: str, tensor: Tensor) -> fx.Node:
        gm.register_buffer(name, tensor, persistent=False)
        with gm.graph.inserting_before(first):
            return gm.graph.get_attr(name)

    _lower_module(gm, _Tables(), constant)
    return gm


class _Tables:
    """The distinct tables of a graph and its bodies, each built once; named in order of appearance."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[str, BlockTable]] = {}

    def of(self, plan: AttentionPlan, device: torch.device) -> dict[str, Tensor | None]:
        """Unique name -> tensor, in the order of the op's arguments."""
        key = plan.layout, plan.settings, device
        if key not in self._known:
            # On real tensors, whatever fake or device mode the compiler is in.
            with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
                table = plan.settings.table(plan.layout).to(device)  # type: ignore[attr-defined]
            self._known[key] = f"sparsify_table{len(self._known)}", table
        name, table = self._known[key]
        return {f"{name}_{field}": tensor for field, tensor in table.tensors().items()}


def _lower_module(gm: fx.GraphModule, tables: _Tables, constant: _Request) -> list[tuple[str, Tensor]]:
    """Lower one graph and its bodies, taking tables from `constant`; returns the tables it asked for."""
    nodes: dict[str, fx.Node] = {}
    asked: list[tuple[str, Tensor]] = []

    def request(name: str, tensor: Tensor) -> fx.Node:
        if name not in nodes:
            nodes[name] = constant(name, tensor)
            asked.append((name, tensor))
        return nodes[name]

    for node in attention_nodes(gm):
        original, result = node.meta["original"], node.meta["result"]
        if node.meta["plan"].method == "dense":
            result.replace_all_uses_with(original)
            _erase_inserted(gm.graph, result)
        else:
            _emit(gm.graph, node, tables, request)
            gm.graph.erase_node(node)
            if (
                node.meta["site"].spelling == "sdpa"
            ):  # what is left of attention by hand, the inner backend drops
                gm.graph.erase_node(original)
    lowered: dict[int, list[tuple[str, Tensor]]] = {}
    for body in list(bodies(gm)):
        module = body.module
        if id(module) not in lowered:
            lowered[id(module)] = _lower_module(module, tables, partial(_add_placeholder, module.graph))
        body.call.args = (*body.call.args, *(request(*table) for table in lowered[id(module)]))
    return asked


def _erase_inserted(graph: fx.Graph, node: fx.Node) -> None:
    """Erase what capture inserted for `node` and nobody reads any more.

    Not by dead-code elimination: a Dynamo graph mutates tensors by calls whose value nobody reads.
    """
    if node.meta.get("inserted") and not node.users:
        sources = node.all_input_nodes
        graph.erase_node(node)
        for source in sources:
            _erase_inserted(graph, source)


def _add_placeholder(graph: fx.Graph, name: str, tensor: Tensor) -> fx.Node:
    """A new last operand of a body, for a tensor that its caller passes."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before():
        return graph.placeholder(name)


def _emit(graph: fx.Graph, node: fx.Node, tables: _Tables, request: _Request) -> None:
    plan: AttentionPlan = node.meta["plan"]
    query, key, value, mask, scale = node.args
    device = tensor_of(query).device  # type: ignore[union-attr]
    table = [None if t is None else request(name, t) for name, t in tables.of(plan, device).items()]
    with graph.inserting_before(node):
        bias = None if mask is None else _key_bias(graph, mask)  # type: ignore[arg-type]
        op = torch.ops.sparsify.block_sparse_attention.default
        both = graph.call_function(op, (query, key, value, *table, bias, scale, plan.provider))
        out = graph.call_function(getitem, (both, 0))
    for new in (both, out):
        new.meta = {
            k: node.meta[k] for k in ("nn_module_stack", "stack_trace", "site", "plan") if k in node.meta
        }
    node.replace_all_uses_with(out)


def _key_bias(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """[B|1, H|1, Sk] additive bias from a mask that broadcasts to [B, H, Sq, Sk] and is constant along Sq."""
    value = tensor_of(mask)
    assert value is not None
    dims = value.dim()
    if dims >= 2:
        mask = graph.call_method("select", (mask, -2, 0))
    for _ in range(dims - 1 if dims >= 2 else 1, 3):
        mask = graph.call_method("unsqueeze", (mask, 0))
    if value.dtype != torch.bool:
        # Kernels scale the bias, which must not make -inf of the least number: rows that see hidden keys alone
        # weigh them all the same.
        finite = graph.call_method("clamp", (mask, _LEAST))
        return graph.call_function(torch.where, (graph.call_method("isneginf", (mask,)), mask, finite))
    return graph.call_function(torch.where, (mask, 0.0, float("-inf")))
