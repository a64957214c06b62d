"""Turn plans into ops.

    before   attention(q, k, v, m, scale)                  meta["plan"]
    after    table = get_attr(...)                         int32 constants of the graph, one set for each
             bias = where(m, 0, -inf)                      distinct table
             out, lse = block_sparse_attention(q, k, v, *table, bias, scale, provider)

A site whose plan is dense gets the call back that the model had. Tables reach the bodies of higher-order
operators as extra operands.
"""

from operator import getitem as _getitem
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.passes.capture import attention_nodes
from sparsify_compiler.passes.fx import bodies, tensor_of
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.table import BlockTable

_TableKey = tuple[Any, ...]


def lower(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace every `attention` node by what its plan says; see the module's picture."""
    needed = _lower_module(gm)
    cached: dict[str, fx.Node] = {}
    for name, (tensor, placeholder) in needed.items():
        gm.register_buffer(name, tensor, persistent=False)
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            cached[name] = gm.graph.get_attr(name)
        placeholder.replace_all_uses_with(cached[name])
        gm.graph.erase_node(placeholder)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _lower_module(gm: fx.GraphModule) -> dict[str, tuple[Tensor, fx.Node]]:
    """Lower one graph and its bodies; returns the tables it needs: name -> (tensor, new placeholder)."""
    needed: dict[str, tuple[Tensor, fx.Node]] = {}

    def request(name: str, tensor: Tensor) -> fx.Node:
        if name not in needed:
            last = [node for node in gm.graph.nodes if node.op == "placeholder"]
            anchor = last[-1] if last else None
            context = gm.graph.inserting_after(anchor) if anchor else gm.graph.inserting_before()
            with context:
                needed[name] = tensor, gm.graph.placeholder(name)
        return needed[name][1]

    for node in attention_nodes(gm):
        if node.meta["plan"].method == "dense":
            node.meta["result"].replace_all_uses_with(node.meta["original"])
        else:
            _emit(gm.graph, node, request)
    done: dict[int, dict[str, tuple[Tensor, fx.Node]]] = {}
    for body in list(bodies(gm)):
        if id(body.module) not in done:
            done[id(body.module)] = _lower_module(body.module)
            body.module.graph.eliminate_dead_code()
            body.module.recompile()
        operands = [request(name, tensor) for name, (tensor, _) in done[id(body.module)].items()]
        body.call.args = (*body.call.args, *operands)
    return needed


def _emit(graph: fx.Graph, node: fx.Node, request: Any) -> None:
    plan: AttentionPlan = node.meta["plan"]
    query, key, value, mask, scale = node.args
    device = tensor_of(node).device  # type: ignore[union-attr]
    table = _table(plan, device)
    prefix = f"sparsify_{plan.method}_{abs(hash((plan.layout, plan.settings, str(device)))) % 10**8}"
    tensors = [
        None if tensor is None else request(f"{prefix}_{name}", tensor)
        for name, tensor in table.tensors().items()
    ]
    with graph.inserting_before(node):
        bias = None if mask is None else _key_bias(graph, mask)  # type: ignore[arg-type]
        op = torch.ops.sparsify.block_sparse_attention.default
        both = graph.call_function(op, (query, key, value, *tensors, bias, scale, plan.provider))
        out = graph.call_function(_getitem, (both, 0))
    for new in (both, out):
        new.meta = {
            k: node.meta[k] for k in ("nn_module_stack", "stack_trace", "plan", "site") if k in node.meta
        }
    node.replace_all_uses_with(out)


def _table(plan: AttentionPlan, device: torch.device) -> BlockTable:
    # Built on real tensors, whatever fake or device mode the compiler is in.
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
        return plan.settings.table(plan.layout).to(device)  # type: ignore[attr-defined]


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
        return mask
    return graph.call_function(torch.where, (mask, 0.0, float("-inf")))
