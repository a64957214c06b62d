"""Decide what is done at every site: a pure function of sites, layouts and config.

before   attention(q, k, v, m, scale)     meta["site"], meta["layout"]
after    the same                         meta["plan"]: AttentionPlan
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import fx

from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.kernels import providers
from sparsify_compiler.passes.capture import all_sites
from sparsify_compiler.plan import AttentionPlan, AttentionSite, GraphPlan, TokenLayout


def plan_sites(gm: fx.GraphModule, *, config: SparsifyConfig, device: str | None = None) -> fx.GraphModule:
    """Attach to every node that carries a site the plan for it; see the module's picture.

    Args:
        device: device type to plan for, in place of the one the graph was traced on.
    """
    nodes = all_sites(gm)
    if device is not None:
        for node in nodes:
            node.meta["site"] = replace(node.meta["site"], device=device)
    pairs = [(node.meta["site"], node.meta.get("layout")) for node in nodes]
    for node, plan in zip(nodes, make_plan(pairs, config), strict=True):
        node.meta["plan"] = plan
    return gm


def make_plan(sites: Iterable[tuple[AttentionSite, TokenLayout | None]], config: SparsifyConfig) -> GraphPlan:
    """The plan of a graph.

    Raises:
        OptionError: a setting that does not fit the layout, such as more reference frames than frames.
        ProviderError: the provider asked for cannot run a site that is to be sparse.
    """
    densities: dict[object, float] = {}
    plans = []
    for site, layout in sites:
        layout = layout or TokenLayout(tokens=site.q_tokens)
        if why := _refusal(site, layout, config):
            plans.append(AttentionPlan(site=site, layout=layout, method="dense", reason=why))
            continue
        method = config.method.fit(layout)
        provider = providers.choose(
            config.provider,
            device=site.device,
            dtype=getattr(torch, site.dtype),
            head_dim=site.head_dim,
            value_dim=site.value_dim,
        )
        if (layout, method) not in densities:
            densities[layout, method] = method.table(layout).density()
        plans.append(
            AttentionPlan(
                site=site,
                layout=layout,
                method=method.name,
                settings=method,
                provider=provider.name,
                density=densities[layout, method],
                reason=f"{layout.reason}; {provider.name}: {provider.reason}",
            )
        )
    return GraphPlan(plans=tuple(plans))


def _refusal(site: AttentionSite, layout: TokenLayout, config: SparsifyConfig) -> str:
    """Why a site stays dense, or ""."""
    if site.refusal:
        return site.refusal
    if site.kind == "cross":
        return "cross-attention: the keys are not the tokens of the queries"
    if site.kind == "unknown":
        return layout.reason
    return config.method.refusal(layout)


def graph_plan(gm: fx.GraphModule) -> GraphPlan:
    """The plans attached to a graph, in site order."""
    return GraphPlan(plans=tuple(node.meta["plan"] for node in all_sites(gm)))
