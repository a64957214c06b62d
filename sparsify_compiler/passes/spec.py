"""What may exist in a graph after each pass; checked by the runner, so that a broken pass fails where it broke."""

from torch import fx

from sparsify_compiler.passes.capture import all_sites, attention
from sparsify_compiler.passes.fx import modules
from sparsify_compiler.plan import AttentionPlan, AttentionSite, TokenLayout

_CARRIES: dict[str, dict[str, type]] = {
    "capture": {"site": AttentionSite},
    "infer_layouts": {"site": AttentionSite, "layout": TokenLayout},
    "plan_sites": {"site": AttentionSite, "layout": TokenLayout, "plan": AttentionPlan},
    "fix_sizes": {"site": AttentionSite, "layout": TokenLayout, "plan": AttentionPlan},
}
"""Pass -> what the meta of every captured attention carries afterwards."""


def check(gm: fx.GraphModule, after: str) -> None:
    """Assert what must hold after the pass named `after`."""
    captured = [n for module in modules(gm) for n in module.graph.nodes if n.target is attention]
    if after not in _CARRIES:
        assert not captured, f"{after} left {captured}: every attention must be lowered or put back"
        return
    for node in captured:
        for key, kind in _CARRIES[after].items():
            assert isinstance(node.meta.get(key), kind), f"after {after}, {node} must carry a {kind.__name__}"
    indices = [node.meta["site"].index for node in all_sites(gm)]
    assert indices == list(range(len(indices))), f"after {after}, sites must be numbered 0.., got {indices}"
