"""Find attention in a Dynamo graph and give it one spelling.

    before   out = scaled_dot_product_attention(q, k, v, attn_mask=m)       (or softmax(q kᵀ) v by hand)
    after    out = attention(q, k, v, m, scale)        node.meta["site"]: AttentionSite

The call that was there stays in the graph, unused, as node.meta["original"], so that lowering can put it back
as it was. A call that cannot be rewritten is left alone; its site says why.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify_compiler.passes.fx import insert_after, module_class, module_path, modules, sizes_of, tensor_of
from sparsify_compiler.passes.unfused import match_unfused
from sparsify_compiler.plan import AttentionSite

_MODULE = (
    "inside nn.MultiheadAttention, which Dynamo keeps as one call; write it with scaled_dot_product_attention"
)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The one spelling of attention between capture and lowering; never runs.

    query [B, H, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv], mask bool or additive, constant along
    the queries.
    """
    raise AssertionError("lowering replaces every attention node")


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call as the graph has it, whatever its spelling."""

    node: fx.Node
    """Its output."""
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float | None
    spelling: str
    refusal: str = ""
    finish: Callable[[fx.Node], fx.Node] | None = None
    """Brings [B, H, Sq, Dv] into the layout of `node`, where that differs."""


def capture(gm: fx.GraphModule) -> fx.GraphModule:
    """Retarget every attention call, in higher-order bodies too, to `attention`; see the module's picture."""
    names: dict[str, int] = {}
    index = 0
    for module in modules(gm):
        for node in list(module.graph.nodes):
            call = _match(node)
            if call is None:
                continue
            site = _site(call, index, names)
            index += 1
            if site.refusal:
                node.meta["site"] = site
            else:
                _retarget(module.graph, call, site)
        module.recompile()
    return gm


def _match(node: fx.Node) -> Call | None:
    if node.op != "call_function":
        return None
    if node.target is F.scaled_dot_product_attention:
        return _sdpa(node, *node.args, **node.kwargs)
    if node.target is F.multi_head_attention_forward:
        named = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
        query, key, value = (named[name] for name in ("query", "key", "value"))
        return Call(node, query, key, value, None, None, "sdpa", _MODULE)  # type: ignore[arg-type]
    match = match_unfused(node)
    return None if match is None else Call(node=node, spelling="unfused", **match)


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
    return Call(node, query, key, value, attn_mask, scale if not refusal else None, "sdpa", refusal)


def _site(call: Call, index: int, names: dict[str, int]) -> AttentionSite:
    """Describe a call from the fake tensors Dynamo recorded; a call that can't be described is refused."""
    name = module_path(call.node) or "attention"
    names[name] = names.get(name, 0) + 1
    name = name if names[name] == 1 else f"{name}#{names[name]}"
    unknown = AttentionSite(
        name=name, index=index, module=module_class(call.node), batch=0,
        heads=0, kv_heads=0, q_tokens=0, kv_tokens=0, head_dim=0, value_dim=0,
        dtype="", device="", scale=0.0, spelling=call.spelling,  # type: ignore[arg-type]
    )  # fmt: skip
    tensors = [tensor_of(node) for node in (call.query, call.key, call.value, call.node)]
    if any(t is None for t in tensors):
        return replace(unknown, refusal=call.refusal or "its tensors were not recorded by Dynamo")
    q, k, v, out = tensors
    shapes = [sizes_of(t) for t in (q, k, v)]  # type: ignore[arg-type]
    if any(shape is None for shape in shapes):
        return replace(unknown, refusal="its sizes are known only at run time")
    q_shape, k_shape, v_shape = (_four(shape) for shape in shapes)  # type: ignore[arg-type]
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        return replace(unknown, refusal=f"query must have 3 or 4 dimensions, got {len(q_shape)}")
    site = replace(
        unknown,
        batch=q_shape[0],
        heads=q_shape[1],
        kv_heads=k_shape[1],
        q_tokens=q_shape[2],
        kv_tokens=k_shape[2],
        head_dim=q_shape[3],
        value_dim=v_shape[3],
        dtype=str(_compute_dtype(q, k, v, out)).removeprefix("torch."),  # type: ignore[arg-type]
        device=q.device.type,  # type: ignore[union-attr]
        scale=1 / math.sqrt(q_shape[3]) if call.scale is None else float(call.scale),
        mask="none" if call.mask is None else "key",
    )
    return replace(
        site, refusal=call.refusal or _shape_refusal(site, k_shape, v_shape) or _mask_refusal(call, site)
    )


def _compute_dtype(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> torch.dtype:
    """The output's, as SDPA and autocast have it; the widest of the inputs' where they differ by hand."""
    if q.dtype == k.dtype == v.dtype or out.dtype not in (q.dtype, k.dtype, v.dtype):
        return out.dtype
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[B, S, D] is attention with one head."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape


def _shape_refusal(site: AttentionSite, key: tuple[int, ...], value: tuple[int, ...]) -> str:
    if key[0] != site.batch or value[0] != site.batch or value[1] != key[1]:
        return f"batch or heads are broadcast: key {key}, value {value}"
    if site.kv_heads == 0 or site.heads % site.kv_heads:
        return f"{site.heads} query heads over {site.kv_heads} key heads"
    return ""


def _mask_refusal(call: Call, site: AttentionSite) -> str:
    if call.mask is None:
        return ""
    mask = tensor_of(call.mask)
    shape = None if mask is None else sizes_of(mask)
    if mask is None or shape is None:
        return "its mask was not recorded by Dynamo"
    if len(shape) >= 2 and shape[-2] != 1 and mask.stride(-2) != 0:
        return "its mask depends on the query"
    if not shape or len(shape) > 4 or shape[-1] != site.kv_tokens:
        return f"its mask has shape {shape}"
    if mask.requires_grad:
        return "its mask needs a gradient"
    return ""


def _retarget(graph: fx.Graph, call: Call, site: AttentionSite) -> None:
    node, mask = call.node, call.mask
    tensors = [call.query, call.key, call.value]
    values = [tensor_of(one) for one in (*tensors, node)]
    flat = values[0].dim() == 3  # type: ignore[union-attr]
    mixed = site.spelling == "unfused" and len({value.dtype for value in values}) > 1  # type: ignore[union-attr]
    if flat:
        tensors = [insert_after(one, "unsqueeze", 1) for one in tensors]
        if mask is not None and tensor_of(mask).dim() == 3:  # type: ignore[union-attr]
            mask = insert_after(mask, "unsqueeze", 1)
    if mixed:
        tensors = [insert_after(one, "to", getattr(torch, site.dtype)) for one in tensors]
    with graph.inserting_before(node):
        new = result = graph.call_function(attention, (*tensors, mask, site.scale))
    if mixed:
        result = insert_after(result, "to", values[-1].dtype)  # type: ignore[union-attr]
    if flat:
        result = insert_after(result, "squeeze", 1)
    if call.finish is not None:
        result = call.finish(result)
    node.replace_all_uses_with(result)
    new.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    new.meta |= {"site": site, "original": node, "result": result, "inserted": True}


def attention_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The captured `attention` nodes of one graph (not of its bodies), in order."""
    return [node for node in gm.graph.nodes if node.target is attention]


def all_sites(gm: fx.GraphModule) -> list[fx.Node]:
    """Every node that carries a site, captured or refused, in the graph and its bodies, by site index."""
    nodes = [node for module in modules(gm) for node in module.graph.nodes if "site" in node.meta]
    return sorted(nodes, key=lambda node: node.meta["site"].index)
