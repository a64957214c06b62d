"""Fix the sizes that sparse attention depends on, so that Dynamo guards on them and others get another program.

    before   attention(q, k, v, m, scale)     meta["plan"]; sizes may be symbols
    after    the same                         sizes that a plan depends on are numbers

These are the axes that layouts were inferred from; tokens, heads and dims of query, key and value; and every other
free size that changes a layout. The pass finds the latter by trying other sizes: labels may be lost on the way, so
that no symbol of the sequence shows where its text ends. A batch, or the length of a prompt elsewhere in the model,
stays free.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import fx
from torch.utils._pytree import tree_map

from sparsify_compiler import _torch
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.passes.capture import attention_nodes
from sparsify_compiler.passes.fx import copy_graph, modules, recorded
from sparsify_compiler.passes.planning import refusal
from sparsify_compiler.plan import SiteKind, TokenLayout

Infer = Callable[[fx.GraphModule], fx.GraphModule]
Layouts = list[tuple[SiteKind, TokenLayout, str]]
"""(kind, layout, reason to stay dense) of each sparse site."""


def fix_sizes(gm: fx.GraphModule, *, infer: Infer) -> fx.GraphModule:
    """Fix the sizes that sparse sites depend on; see the module's picture.

    Args:
        infer: the pass that gave the graph its layouts.
    """
    specialise = gm.meta.pop("specialise", None)
    sites = _sparse_nodes(gm)
    if not sites:
        return gm
    if specialise is not None:
        specialise()
    for node in sites:
        for operand in node.args[:3]:
            for size in recorded(operand).shape[1:]:
                int(size)
    free = _torch.free_sizes(
        node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder"
    )
    hints = {symbol: hint for symbol, size in free.items() if (hint := _torch.hint(size)) is not None}
    factors = {symbol: hint * factor for (symbol, hint), factor in zip(hints.items(), _PRIMES, strict=False)}
    if len(hints) <= len(_PRIMES) and _changes(gm, hints | factors, infer) is False:
        return gm
    for symbol, hint in hints.items():
        tried = [_changes(gm, hints | {symbol: other}, infer) for other in (2 * hint, hint + 1)]
        if True in tried or False not in tried:
            int(free[symbol])
    return gm


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)
"""Factors for sizes that change together: no two of them cancel out."""


def _changes(gm: fx.GraphModule, sizes: Mapping[Any, int], infer: Infer) -> bool | None:
    """Whether the layouts of sparse sites change where symbols have these sizes; None if they are not known."""
    if not sizes:
        return False
    before, twin = _layouts(gm), copy_graph(gm)
    for module in modules(twin):
        for node in module.graph.nodes:
            if "example_value" in node.meta:
                resize = partial(_torch.resized, sizes=sizes)
                node.meta["example_value"] = tree_map(resize, node.meta["example_value"])
    try:
        with _torch.quiet_fakes():
            after = _layouts(infer(twin))
    except SparsifyError:
        return None
    if any(layout.grid is None for _, layout, _ in after):
        return None
    return before != after


def _layouts(gm: fx.GraphModule) -> Layouts:
    pairs = [(node.meta["site"], node.meta["layout"]) for node in _sparse_nodes(gm)]
    return [(site.kind, layout, refusal(site, layout)) for site, layout in pairs]


def _sparse_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    nodes = [node for module in modules(gm) for node in attention_nodes(module)]
    return [node for node in nodes if node.meta["plan"].method != "dense"]
