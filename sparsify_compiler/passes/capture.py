"""Find attention in a Dynamo graph and give it one spelling.

    before   out = scaled_dot_product_attention(q, k, v, attn_mask=m)       (or softmax(q kᵀ) v by hand)
    after    out = attention(q, k, v, m, scale)        node.meta["site"]: AttentionSite

The original call stays in the graph, unused, as node.meta["original"], so that lowering can restore it. A call that
cannot be rewritten stays; its site gives the reason. Calls stay, too, in the bodies that passes do not enter: those
of conditions, maps, loops and custom autograd functions.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify_compiler import _torch
from sparsify_compiler.names import ROOT, is_attention_kernel
from sparsify_compiler.passes.fx import (
    Operand,
    body_of,
    graphs_in,
    module_class,
    module_path,
    modules,
    node_of,
    recorded,
    run_call,
    sizes_of,
    tensor_of,
    value_of,
)
from sparsify_compiler.passes.replay import differs
from sparsify_compiler.passes.unfused import NotRead, Unfused, find_chain, read_chain
from sparsify_compiler.passes.writes import reshaped_after, reshaping_nodes
from sparsify_compiler.plan import AttentionSite, Spelling
from sparsify_compiler.uncompiled import Uncompiled

_SDPA = (
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_MODULE = (
    "inside nn.MultiheadAttention, which Dynamo keeps as one call; write it with scaled_dot_product_attention"
)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The one spelling of attention between capture and lowering; never runs.

    query [B, H, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv], mask bool or additive, broadcastable to
    [B, H, Sq, Sk].
    """
    raise AssertionError("lowering replaces every attention node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One attention call of the graph, in any spelling."""

    node: fx.Node
    """The output of the call."""
    operands: tuple[Operand, ...] = ()
    """Query, key and value; empty where they are not known."""
    mask: Operand | None = None
    scale: float | None = None
    unfused: Unfused | None = None
    """The reading of attention by hand."""
    spelling: Spelling = "sdpa"
    refusal: str = ""


def capture(gm: fx.GraphModule) -> fx.GraphModule:
    """Retarget every attention call, in higher-order bodies too, to `attention`; see the module's picture."""
    names: dict[str, int] = {}
    index = 0
    for module, inside in _graphs(gm):
        reshaping = reshaping_nodes(module.graph)
        for node in list(module.graph.nodes):
            call = _match(module, node)
            if call is None:
                continue
            tensors = [*call.operands, *([] if call.mask is None else [call.mask])]
            if inside:
                call = replace(call, refusal=inside[1])
            elif reshaped_after(node, [node, *(one.node for one in tensors)], reshaping):
                call = replace(call, refusal="one of its tensors is reshaped in place later on")
            site = _site(call, index, names, inside[0] if inside else node)
            index += 1
            if not site.refusal and call.unfused is not None:
                site = replace(site, refusal=differs(call.unfused))
            if site.refusal:
                node.meta["site"] = site
            else:
                _retarget(module.graph, call, site)
    return gm


def _graphs(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, tuple[fx.Node, str] | None]]:
    """(graph, None) if passes enter the graph; else (graph, (outermost call, reason))."""
    seen: set[int] = set()

    def closed(module: fx.GraphModule, node: fx.Node, outer: fx.Node) -> Iterator[tuple[fx.GraphModule, Any]]:
        name = _name(node)
        graphs = graphs_in(module, node)
        if name == "autograd_function_apply":
            graphs = graphs[:1]  # the second is its backward pass
        for graph in graphs if not is_attention_kernel(name) else ():
            if id(graph) not in seen:
                seen.add(id(graph))
                yield graph, (outer, f"inside {name}, which the compiler does not go into")
                for inner in graph.graph.nodes:
                    yield from closed(graph, inner, outer)

    for module in modules(gm):
        yield module, None
        for node in module.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator) and not body_of(module, node):
                yield from closed(module, node, node)


def _match(gm: fx.GraphModule, node: fx.Node) -> Call | None:
    if node.op not in ("call_function", "call_method"):
        return None
    chain = find_chain(node)
    if (chain or node.target in _SDPA) and _torch.is_transformed(tensor_of(node)):
        spelling: Spelling = "unfused" if chain else "sdpa"
        return Call(node=node, spelling=spelling, refusal="inside a transform of torch.func (vmap, grad)")
    if node.target in _SDPA:
        return _sdpa(node, *node.args, **node.kwargs)
    if node.target is F.multi_head_attention_forward:
        return Call(node=node, refusal=_MODULE)
    if chain is not None:
        return _unfused(gm, chain)
    return _flex(gm, node) or _kernel(node) or _hidden(node)


def _unfused(gm: fx.GraphModule, chain: tuple[fx.Node, ...]) -> Call:
    try:
        found = read_chain(gm, chain)
    except NotRead as why:
        return Call(node=chain[-1], spelling="unfused", refusal=str(why))
    return Call(
        node=chain[-1],
        operands=(found.query, found.key, found.value),
        mask=found.mask,
        scale=found.scale,
        unfused=found,
        spelling="unfused",
        refusal=found.refusal,
    )


def _flex(gm: fx.GraphModule, node: fx.Node) -> Call | None:
    """A call of FlexAttention that changes no score and masks nothing; None for other calls.

    Its block mask must be the one that FlexAttention makes where it gets none: one block that holds all tokens.
    """
    if node.target is not torch.ops.higher_order.flex_attention or node.kwargs:
        return None
    query, key, value, score, blocks, scale, _, *others = node.args
    assert isinstance(blocks, tuple), "the fields of a block mask"
    *numbers, q_block, kv_block, mask = blocks
    users = list(node.users)
    tensors = [one for one in (query, key, value) if tensor_of(one) is not None]
    if len(tensors) < 3 or not isinstance(scale, (int, float)):
        return None
    queries, keys = (recorded(one).shape[-2] for one in tensors[:2])
    plain = (
        others == [(), ()]
        and len(users) == 1
        and users[0] is node.next
        and (users[0].target, users[0].args[1]) == (operator.getitem, 0)
        and isinstance(q_block, int)
        and isinstance(kv_block, int)
        and q_block >= queries
        and kv_block >= keys
        and [getattr(one, "target", one) for one in numbers[2:6]] == [torch.ones, torch.zeros, None, None]
        and _returns_its_first(gm, score)
        and _returns_true(gm, mask)
    )
    if not plain:
        return None
    operands = tuple(Operand(node_of(one)) for one in tensors)
    return Call(node=users[0], operands=operands, scale=scale, spelling="flex")


def _body(gm: fx.GraphModule, node: Any) -> tuple[list[fx.Node], Any] | None:
    """(nodes, what it returns) of a function that a higher-order call gets."""
    body = getattr(gm, str(node.target), None) if isinstance(node, fx.Node) else None
    if not isinstance(body, fx.GraphModule):
        return None
    *nodes, output = body.graph.nodes
    returned = output.args[0]
    return nodes, returned[0] if isinstance(returned, (tuple, list)) and len(returned) == 1 else returned


def _returns_its_first(gm: fx.GraphModule, node: Any) -> bool:
    body = _body(gm, node)
    return body is not None and bool(body[0]) and body[1] is body[0][0]


def _returns_true(gm: fx.GraphModule, node: Any) -> bool:
    body = _body(gm, node)
    if body is None or not isinstance(body[1], fx.Node):
        return False
    made = [one for one in body[0] if one.op != "placeholder"]
    return made == [body[1]] and body[1].target == "new_ones" and body[1].kwargs.get("dtype") == torch.bool


def _kernel(node: fx.Node) -> Call | None:
    """The call of an attention kernel, by its name: FlexAttention, the kernels of ATen and other libraries."""
    if node.op != "call_function" or not is_attention_kernel(name := _name(node)):
        return None
    tensors = [one for one in node.args[:3] if isinstance(one, fx.Node) and tensor_of(one) is not None]
    why = f"a call of {name}; write it with scaled_dot_product_attention"
    if len(tensors) == 3 and (name == "flex_attention" or "_scaled_dot_product" in name):
        return Call(node=node, operands=tuple(map(Operand, tensors)), refusal=why)
    return Call(node=node, refusal=why) if tensors else None


def _hidden(node: fx.Node) -> Call | None:
    """The call of a function that Dynamo keeps whole, if it computes attention on meta tensors."""
    if node.op != "call_function" or not _torch.is_allowed_in_graph(node.target):
        return None
    inside = Uncompiled(None)
    try:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _on_meta)
        with inside, torch.no_grad():
            run_call(node, args, kwargs)
    except Exception:  # the function may raise anything, and then it is not known to compute attention
        return None
    if not inside.plans:
        return None
    return Call(node=node, refusal=f"inside {_name(node)}, which allow_in_graph hides from the compiler")


def _on_meta(node: fx.Node) -> Any:
    """The value of a node, on the meta device and without symbols if it is a tensor."""
    value = value_of(node)
    sizes = sizes_of(value) if isinstance(value, Tensor) else None
    return torch.empty(sizes, dtype=recorded(node).dtype, device="meta") if sizes is not None else value


def _name(node: fx.Node) -> str:
    """The name of the function that a node calls; for an operator, with its library."""
    operator = isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return str(node.target) if operator else str(getattr(node.target, "__name__", node.target))


def _sdpa(
    node: fx.Node,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
) -> Call:
    refusal = ""
    if is_causal is not False:
        refusal = "causal attention"
    elif dropout_p != 0.0:
        refusal = f"dropout inside attention (dropout_p = {dropout_p})"
    elif not (scale is None or isinstance(scale, (int, float))):
        refusal = "its scale is computed in the graph"
    return Call(
        node=node,
        operands=(Operand(query), Operand(key), Operand(value)),
        mask=None if attn_mask is None else Operand(attn_mask),
        scale=None if refusal else scale,
        refusal=refusal,
    )


def _site(call: Call, index: int, names: dict[str, int], place: fx.Node) -> AttentionSite:
    """Describe a call from the fake tensors Dynamo recorded; refuse a call that it cannot describe.

    Args:
        place: the node that gives the module where the call's own node has none.
    """
    name = module_path(call.node) or module_path(place) or ROOT
    names[name] = names.get(name, 0) + 1
    name = name if names[name] == 1 else f"{name}#{names[name]}"
    unknown = AttentionSite(
        name=name, index=index, module=module_class(call.node), batch=0,
        heads=0, kv_heads=0, q_tokens=0, kv_tokens=0, head_dim=0, value_dim=0,
        dtype="", device="", scale=0.0, spelling=call.spelling,
    )  # fmt: skip
    tensors = [value for one in call.operands if (value := one.value) is not None]
    if len(tensors) < 3:
        return replace(unknown, refusal=call.refusal or "its tensors were not recorded by Dynamo")
    q, k, v = tensors
    shapes = [shape for tensor in tensors if (shape := sizes_of(tensor)) is not None]
    if len(shapes) < 3:
        return replace(unknown, refusal=call.refusal or "its sizes are known only at run time")
    if len({len(shape) for shape in shapes}) > 1:  # heads or batch: they broadcast
        return replace(unknown, refusal=call.refusal or "its query, key and value differ in dimensions")
    q_shape, k_shape, v_shape = (_four(shape) for shape in shapes)
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return replace(
            unknown, refusal=call.refusal or f"query must have 3 or 4 dimensions, got {len(q_shape)}"
        )
    site = replace(
        unknown,
        batch=q_shape[0],
        heads=q_shape[1],
        kv_heads=k_shape[1],
        q_tokens=q_shape[2],
        kv_tokens=k_shape[2],
        head_dim=q_shape[3],
        value_dim=v_shape[3],
        dtype=str(_compute_dtype(q, k, v, tensor_of(call.node))).removeprefix("torch."),
        device=q.device.type,
        scale=1 / math.sqrt(q_shape[3]) if call.scale is None else float(call.scale),
        mask=_mask_kind(call.mask),
    )
    return replace(
        site, refusal=call.refusal or _shape_refusal(site, k_shape, v_shape) or _mask_refusal(call, site)
    )


def _compute_dtype(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> torch.dtype:
    """The output's type, as SDPA and autocast choose it; the widest input type where types differ by hand.

    Args:
        out: None for a call with several outputs.
    """
    if out is None:
        return q.dtype
    if q.dtype == k.dtype == v.dtype or out.dtype not in (q.dtype, k.dtype, v.dtype):
        return out.dtype
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with a head axis: [B, S, D] is attention with one head."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape


def _shape_refusal(site: AttentionSite, key: tuple[int, ...], value: tuple[int, ...]) -> str:
    if key[0] != site.batch or value[0] != site.batch or value[1] != key[1]:
        return f"batch or heads are broadcast: key {key}, value {value}"
    if key[2:] != (site.kv_tokens, site.head_dim) or value[2] != site.kv_tokens:
        return f"tokens or channels are broadcast: key {key}, value {value}, query head dim {site.head_dim}"
    if site.kv_heads == 0 or site.heads % site.kv_heads:
        return f"{site.heads} query heads over {site.kv_heads} key heads"
    return ""


def _mask_kind(operand: Operand | None) -> Literal["none", "key", "query"]:
    """Whether a mask has one row for all queries, or one for each."""
    if operand is None:
        return "none"
    mask = operand.value
    has_rows = mask is not None and mask.dim() >= 2 and mask.shape[-2] != 1 and mask.stride(-2) != 0
    return "query" if has_rows else "key"


def _mask_refusal(call: Call, site: AttentionSite) -> str:
    if call.mask is None:
        return ""
    mask = call.mask.value
    shape = None if mask is None else sizes_of(mask)
    if mask is None or shape is None:
        return "its mask was not recorded by Dynamo"
    if not shape or len(shape) > 4 or shape[-1] != site.kv_tokens:
        return f"its mask has shape {shape}"
    if mask.requires_grad:
        return "its mask needs a gradient"
    return ""


def _retarget(graph: fx.Graph, call: Call, site: AttentionSite) -> None:
    """Insert `attention`, and the steps for its operands, right before the call, where SDPA would read."""
    node, operands, mask = call.node, call.operands, call.mask
    finish = () if call.unfused is None else call.unfused.finish
    types = {recorded(one).dtype for one in operands}
    if recorded(operands[0]).dim() == 3:
        operands = tuple(one.then(("unsqueeze", 1)) for one in operands)
        finish = (("squeeze", 1), *finish)
        if mask is not None and recorded(mask).dim() == 3:
            mask = mask.then(("unsqueeze", 1))
    if call.unfused is not None and len({*types, recorded(node).dtype}) > 1:
        operands = tuple(one.then(("to", getattr(torch, site.dtype))) for one in operands)
        finish = (("to", recorded(node).dtype), *finish)
    tensors = [one.insert_before(node) for one in operands]
    bias = None if mask is None else mask.insert_before(node)
    with graph.inserting_before(node):
        new = graph.call_function(attention, (*tensors, bias, site.scale))
    result = Operand(new, finish).insert_before(node)
    node.replace_all_uses_with(result)
    new.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    new.meta |= {"site": site, "original": node, "result": result, "inserted": True}
    result.meta["example_value"] = tensor_of(node)


def attention_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The captured `attention` nodes of one graph (not of its bodies), in order."""
    return [node for node in gm.graph.nodes if node.target is attention]


def all_sites(gm: fx.GraphModule) -> list[fx.Node]:
    """Every node that carries a site, captured or refused, in the graph and all bodies, by site index."""
    nodes = [node for module, _ in _graphs(gm) for node in module.graph.nodes if "site" in node.meta]
    return sorted(nodes, key=lambda node: node.meta["site"].index)
