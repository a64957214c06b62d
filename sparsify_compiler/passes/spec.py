"""The spec of a graph after each pass; the runner checks it, so that a broken pass fails at once."""

from torch import fx

from sparsify_compiler.passes.capture import all_sites, attention
from sparsify_compiler.passes.fx import modules
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.passes.reports import site_nodes
from sparsify_compiler.plan import AttentionPlan, AttentionSite, TokenLayout

_CARRIES: dict[str, dict[str, type]] = {
    "capture": {"site": AttentionSite},
    "infer_layouts": {"site": AttentionSite, "layout": TokenLayout},
    "as_parts": {"site": AttentionSite, "layout": TokenLayout},
    "plan_sites": {"site": AttentionSite, "layout": TokenLayout, "plan": AttentionPlan},
    "fix_sizes": {"site": AttentionSite, "layout": TokenLayout, "plan": AttentionPlan},
    "shard": {"site": AttentionSite, "layout": TokenLayout, "plan": AttentionPlan},
}
"""Pass -> key and type of each value in the meta of every captured attention after it."""


def check(gm: fx.GraphModule, after: str) -> None:
    """Assert the spec of a graph after the pass named `after`."""
    captured = [n for module in modules(gm) for n in module.graph.nodes if n.target is attention]
    if after not in _CARRIES:
        assert not captured, f"{after} left {captured}: every attention must be lowered or put back"
        _check_lowered(gm)
        return
    for node in captured:
        for key, kind in _CARRIES[after].items():
            assert isinstance(node.meta.get(key), kind), f"after {after}, {node} must carry a {kind.__name__}"
    indices = [node.meta["site"].index for node in all_sites(gm)]
    assert indices == list(range(len(indices))), f"after {after}, sites must be numbered 0.., got {indices}"


def _check_lowered(gm: fx.GraphModule) -> None:
    """Assert that the graph calls a site where a plan is sparse, and has the inputs that sites need."""
    plan, extra = graph_plan(gm), gm.meta["extra"]
    nodes = site_nodes(gm)
    dense = [node for node in nodes if node.meta["plan"].method == "dense"]
    assert not dense, f"{dense} are sites, but their plans are dense"
    if gm.meta["variant"].phase == "sparse":  # calls that share a body share its sites
        called = {node.meta["plan"].site.index for node in nodes}
        sparse = [one for one in plan.sparse if one.site.name not in gm.meta["variant"].guarded]
        missing = [one.site.name for one in sparse if one.site.index not in called]
        assert nodes or not sparse, f"no site is called for {missing}"
        assert not missing or len(list(modules(gm))) > 1, f"no site is called for {missing}"
    names = [str(node.target) for node in gm.graph.nodes if node.op == "placeholder"]
    wrong = [name for name in names[len(names) - len(extra) :] if not name.startswith("sparsify_")]
    assert not wrong, f"the last {len(extra)} inputs must be those of sites, got {wrong}"
