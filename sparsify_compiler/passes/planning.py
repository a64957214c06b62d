"""Plan every site: a pure function of sites, layouts and config.

before   attention(q, k, v, m, scale)     meta["site"], meta["layout"]
after    the same                         meta["plan"]: AttentionPlan; the graph's: GraphPlan
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparsify_compiler.config import SitePolicy, SparsifyConfig
from sparsify_compiler.kernels import providers
from sparsify_compiler.methods import DynamicMethod, LearningMethod, StaticMethod, TrainedMethod
from sparsify_compiler.passes.capture import all_sites
from sparsify_compiler.plan import AttentionPlan, AttentionSite, Entry, GraphPlan, Part, TokenLayout, count_of

Pair = tuple[AttentionSite, TokenLayout]
Decision = tuple[Entry | None, str]
"""(entry of a site, reason); None if it stays dense."""


def plan_sites(gm: fx.GraphModule, *, config: SparsifyConfig, device: str | None = None) -> fx.GraphModule:
    """Attach its plan to every node that carries a site; see the module's picture.

    Args:
        device: device type to plan for, instead of the one the graph was traced on.
    """
    nodes = all_sites(gm)
    if device is not None:
        for node in nodes:
            node.meta["site"] = replace(node.meta["site"], device=device)
    pairs = [(node.meta["site"], node.meta.get("layout")) for node in nodes]
    decided = [node.meta["decision"] for node in nodes if "decision" in node.meta]
    plan = make_plan(pairs, config, decided or None)
    plans = [
        one if node.graph is gm.graph else _in_a_body(one) for node, one in zip(nodes, plan, strict=True)
    ]
    gm.meta["plan"] = replace(plan, plans=tuple(plans))
    for node, one in zip(nodes, plans, strict=True):
        node.meta["plan"] = one
    return gm


def _in_a_body(plan: AttentionPlan) -> AttentionPlan:
    """The plan of a site in the body of a higher-order operator: only sites of the graph itself keep state."""
    if not isinstance(plan.settings, DynamicMethod):
        return plan
    return replace(
        plan, reason=f"{plan.reason}; in a body, where it keeps no state and reports nothing to stats"
    )


def as_parts(gm: fx.GraphModule, *, parts: Sequence[Part]) -> fx.GraphModule:
    """Give every site its kind, layout and decision from the analysis of the whole model."""
    for node, part in zip(all_sites(gm), parts, strict=True):
        site = node.meta["site"]
        node.meta["site"] = replace(site, kind=part.kind, name=part.name or site.name)
        node.meta["layout"], node.meta["decision"] = part.layout, (part.entry, part.reason)
    return gm


def decide(pairs: Sequence[Pair], config: SparsifyConfig) -> list[Decision]:
    """The entry of each site of a model, and the reason.

    Raises:
        PolicyError: the policy is for another model or grid.
    """
    refusals = [refusal(*pair) for pair in pairs]
    eligible = [pair for pair, why in zip(pairs, refusals, strict=True) if not why]
    chosen = iter(
        _by_method(eligible, config) if config.policy is None else _by_policy(eligible, config.policy)
    )
    return [(None, why) if why else next(chosen) for why in refusals]


def dense_steps(decisions: Iterable[Decision], config: SparsifyConfig) -> int | float:
    """First steps of a generation that run dense, if any site is sparse.

    A default is 0 or a share of the steps: where methods differ, the largest one holds.
    """
    sparse = [entry.method for entry, _ in decisions if entry is not None and entry.method.name != "dense"]
    return _or_default(config.dense_steps, max(one.dense_steps for one in sparse)) if sparse else 0


def make_plan(
    sites: Iterable[tuple[AttentionSite, TokenLayout | None]],
    config: SparsifyConfig,
    decided: Sequence[Decision] | None = None,
) -> GraphPlan:
    """The plan of a graph.

    Args:
        decided: the decision for each site, if they were made for a whole model; else they are made for the graph.

    Raises:
        OptionError: a setting that does not fit the layout, such as more reference frames than frames.
        PolicyError: the policy is for another model or grid.
        ProviderError: the requested provider cannot run a site that the method makes sparse.
    """
    pairs = [(site, layout or TokenLayout(tokens=site.q_tokens)) for site, layout in sites]
    decisions = decide(pairs, config) if decided is None else decided
    known_as = _known_as(pairs, decisions)
    densities: dict[object, float | None] = {}
    plans = []
    for (site, layout), (entry, reason) in zip(pairs, decisions, strict=True):
        if entry is None or entry.method.name == "dense":
            plans.append(AttentionPlan(site=site, layout=layout, method="dense", reason=reason))
            continue
        site = replace(site, known_as=known_as.get(site.name, ""))
        method = entry.method.fit(site, layout)
        provider = providers.choose(
            config.provider,
            device=site.device,
            dtype=getattr(torch, site.dtype),
            head_dim=site.head_dim,
            value_dim=site.value_dim,
        )
        if (layout, method) not in densities:
            table = method.table(layout) if isinstance(method, StaticMethod) else None
            densities[layout, method] = None if table is None else table.density()
        plans.append(
            AttentionPlan(
                site=site,
                layout=layout,
                method=method.name,
                settings=method,
                provider=provider.name,
                far_field=entry.far_field,
                density=densities[layout, method],
                reason="; ".join(
                    filter(
                        None, [layout.reason, reason, f"{provider.name}: {provider.reason}", _until(method)]
                    )
                ),
            )
        )
    return GraphPlan(plans=tuple(plans), dense_steps=dense_steps(decisions, config))


def _by_method(eligible: Sequence[Pair], config: SparsifyConfig) -> list[Decision]:
    """(entry, reason) of each site, by one method for all; None if it stays dense."""
    method = config.method
    assert method is not None
    entry = Entry(method=method, far_field=_or_default(config.far_field, method.far_field))
    refused = [method.refusal(layout) for _, layout in eligible]
    first = count_of(_or_default(config.dense_layers, method.dense_layers), refused.count(""))
    chosen: list[Decision] = []
    for why in refused:
        if not why and first > 0:
            first -= 1
            why = "among the first layers, which stay dense (dense_layers)"
        chosen.append((None, why) if why else (entry, ""))
    return chosen


def _by_policy(eligible: Sequence[Pair], policy: SitePolicy) -> list[Decision]:
    """(entry, reason) of each site, by a policy, which covers only sites with a grid."""
    chosen = iter(policy.of([pair for pair in eligible if pair[1].grid is not None]))
    return [(None, layout.reason) if layout.grid is None else next(chosen) for _, layout in eligible]


def _known_as(eligible: Sequence[Pair], entries: Sequence[Decision]) -> dict[str, str]:
    """Site -> the name that its trained tensors have, for sites whose method reads trained tensors."""
    readers: dict[TrainedMethod, list[str]] = {}
    for (site, _), (entry, _) in zip(eligible, entries, strict=True):
        if entry is not None and isinstance(entry.method, TrainedMethod):
            readers.setdefault(entry.method, []).append(site.name)
    found: dict[str, str] = {}
    for method, names in readers.items():
        found |= method.known_as(names)
    return found


def _until(method: object) -> str:
    """The reason why a plan is dense for now; empty if it is not."""
    waits = isinstance(method, LearningMethod) and method.learns
    return "dense until a trainer (DSVTrainer) or a predictor's file says what to read" if waits else ""


def _or_default(asked: Any, default: Any) -> Any:
    return default if asked is None else asked


def refusal(site: AttentionSite, layout: TokenLayout) -> str:
    """The reason why a site stays dense with every method; empty if there is none."""
    if site.refusal:
        return site.refusal
    if site.kind == "cross":
        return f"cross-attention: the {layout.reason}"
    return layout.reason if site.kind == "unknown" else ""


def learns(plan: AttentionPlan) -> bool:
    """Whether a site reads tensors that are not trained yet."""
    return isinstance(plan.settings, LearningMethod) and plan.settings.learns


def plans_within(gm: fx.GraphModule) -> tuple[AttentionPlan, ...]:
    """The plans of the sites of a graph and its bodies, without index and name.

    Both differ between calls of one body. Names stay where a trainer identifies sites by them.
    """
    plans = (node.meta["plan"] for node in all_sites(gm))
    return tuple(
        plan
        if isinstance(plan.settings, LearningMethod)
        else replace(plan, site=replace(plan.site, name="", index=0))
        for plan in plans
    )


def graph_plan(gm: fx.GraphModule) -> GraphPlan:
    """The plan attached to a graph, with its sites in order."""
    return gm.meta["plan"]
