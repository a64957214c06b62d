"""Reports of passes against counts by hand, and the spec against lowerings that are broken on purpose."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsify_compiler
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.lowering import lower
from sparsify_compiler.runtime.program import Variant

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"method": "tile", "reference_frames": 1, "inner_backend": "eager"}
DYNAMIC = {"method": "cubes", "dense_steps": 0, "dense_layers": 0, "inner_backend": "eager"}
VIDEO = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TEXT = torch.ones(1, 5, 8)


class Model(nn.Module):
    """Self-attention over a video, cross-attention to a text, and attention whose weights are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, 8, 1)

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(video).flatten(2).transpose(1, 2)[:, None]
        x = F.scaled_dot_product_attention(x.sin(), x.cos(), x)
        x = F.scaled_dot_product_attention(x, text[:, None], text[:, None])
        weights = (x @ x.transpose(-1, -2)).softmax(-1)
        return weights @ x, weights


def test_passes_report_what_they_matched_changed_and_refused() -> None:
    explained = sparsify_compiler.explain(Model().eval(), VIDEO, TEXT, options=OPTIONS, verbose=True)
    (reports,) = explained.passes
    counts = [(one.name, one.matched, one.changed, one.refused) for one in reports]
    assert counts == [
        ("capture", 3, 2, 1),
        ("infer_layouts", 2, 1, 1),
        ("plan_sites", 2, 1, 1),
        ("fix_sizes", 1, 1, 0),
    ]
    assert dict(reports[0].operators) == {"attention": 2}
    assert "pass capture: " in str(explained)
    assert "3 sites matched, 2 changed, 1 refused" in str(explained)
    assert sparsify_compiler.explain(Model().eval(), VIDEO, TEXT, options=OPTIONS).passes == ()


def test_a_dump_says_what_lowering_did(tmp_path: Any) -> None:
    options = OPTIONS | {"dump": str(tmp_path)}
    with torch.no_grad():
        torch.compile(Model(), backend="sparsify", options=options)(VIDEO, TEXT)
    first = (tmp_path / "004_lower.py").read_text().splitlines()[0]
    assert "1 sites matched, 1 changed, 0 refused" in first
    assert "+1 TableSite" in first
    assert "-2 attention" in first
    assert "-1 scaled_dot_product_attention" in first


def without_sites(gm: fx.GraphModule, *, variant: Variant, **rest: Any) -> fx.GraphModule:
    """Puts every call back."""
    gm = lower(gm, variant=Variant("dense", variant.trains), **rest)
    gm.meta["variant"] = variant
    return gm


def without_inputs(gm: fx.GraphModule, **rest: Any) -> fx.GraphModule:
    """Forgets an input of its sites."""
    gm = lower(gm, **rest)
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    last.target = last.name = "another"
    return gm


@pytest.mark.parametrize(
    ("broken", "options", "message"),
    [
        (without_sites, OPTIONS, "no site is called for"),
        (without_sites, DYNAMIC, "no site is called for"),
        (without_inputs, DYNAMIC, "must be those of sites"),
    ],
)
def test_a_broken_lowering_fails_where_it_broke(
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[..., fx.GraphModule],
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(broken, "__name__", "lower")
    monkeypatch.setattr(pipeline, "lower", broken)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(Model(), backend="sparsify", options=options)(VIDEO, TEXT)
