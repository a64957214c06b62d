"""Find where the attentions of a graph are in a model, so that one program can serve many blocks.

A graph that Dynamo made of a part of a model names an attention relative to that part. The path of a Parameter that
the graph reads near the attention is known at every call, and so is the part.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from sparsify_compiler import _torch
from sparsify_compiler.passes.capture import all_sites
from sparsify_compiler.passes.fx import bodies, modules, tensor_of
from sparsify_compiler.plan import AttentionSite
from sparsify_compiler.runtime.program import Place

_NOT_OF_A_PATH = {"_modules", "_parameters", "_buffers", "__dict__"}


def find_places(analysed: fx.GraphModule, gm: fx.GraphModule) -> tuple[Place, ...]:
    """The place of every attention of a graph, in order.

    Args:
        analysed: the copy of the graph that carries the sites.
        gm: Dynamo's graph, whose inputs say where Dynamo reads them from.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    paths = [_path(_torch.source_name(node)) if _torch.is_model_tensor(node) else "" for node in placeholders]
    inputs = [node for node in analysed.graph.nodes if node.op == "placeholder"]
    parameters = {node: place for place, (node, path) in enumerate(zip(inputs, paths, strict=True)) if path}
    found = []
    for node in all_sites(analysed):
        site: AttentionSite = node.meta["site"]
        nearest = _nearest(_in_graph(analysed, node), parameters)
        found.append(
            Place(
                name=site.name.partition("#")[0],
                like=likeness(site),
                parameter=nearest,
                path="" if nearest is None else paths[nearest],
                may_be_video=bool(site.refusal) or site.q_tokens == site.kv_tokens,
            )
        )
    return tuple(found)


def likeness(site: AttentionSite) -> tuple[Any, ...]:
    """Heads, tokens, sizes and the kind of mask: two attentions that differ in them are not the same."""
    sizes = site.heads, site.kv_heads, site.q_tokens, site.kv_tokens, site.head_dim, site.value_dim
    return *sizes, site.mask


def fix_tokens(gm: fx.GraphModule) -> None:
    """Fix the sizes of all attentions that may be over a video, with the batch.

    The graph is planned when it is called. Then it is too late to guard on sizes.
    """
    for node in all_sites(gm):
        site = node.meta["site"]
        if not site.refusal and site.q_tokens == site.kv_tokens:
            for operand in node.args[:3]:
                value = tensor_of(operand)
                for size in () if value is None else value.shape:
                    int(size)


def _in_graph(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node, or the call in the graph of the body that holds it."""
    for body in bodies(gm):
        if any(node.graph is module.graph for module in modules(body.module)):
            return body.call
    return node


def _nearest(node: fx.Node, inputs: Mapping[fx.Node, int]) -> int | None:
    """The place of the input that the fewest operators separate from a node: first of those before it, then of
    those that are read after it."""
    ways = (*_outwards(node, backwards=True), *_outwards(node, backwards=False))
    return next((inputs[one] for one in ways if one in inputs), None)


def _outwards(node: fx.Node, *, backwards: bool) -> Iterator[fx.Node]:
    """All nodes that lead to a node, or that it leads to with what they read; the nearest first."""
    seen, ring = {node}, [node]
    while ring:
        following: list[fx.Node] = []
        for one in ring:
            near = [*one.all_input_nodes] if backwards or one is not node else []
            for other in [*near, *([] if backwards else one.users)]:
                if other not in seen:
                    seen.add(other)
                    following.append(other)
        yield from following
        ring = following


def _path(source: str) -> str:
    """`attn1.norm_q.weight` for `L['self']._modules['attn1']._modules['norm_q']._parameters['weight']`."""
    parts = [part for part in re.findall(r"\w+", source) if part not in _NOT_OF_A_PATH]
    return ".".join(parts[2:])
