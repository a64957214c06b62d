"""The analysis of a whole model, which traces alike blocks once, finds the same as `explain`, which traces all."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler.backend import configure
from sparsify_compiler.hosts.whole import analyse
from sparsify_compiler.passes import pipeline
from sparsify_compiler.plan import AttentionPlan, Part
from sparsify_compiler.testing.models import CASES
from sparsify_compiler.testing.videos import Block, Video, latents

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

DENSE = {"method": "dense"}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that the analysis gets from Dynamo."""
    found: list[Any] = []
    original = pipeline.captured

    def recorded(gm: Any, config: Any) -> Any:
        found.append(gm)
        return original(gm, config)

    monkeypatch.setattr(pipeline, "captured", recorded)
    return found


def facts(found: Sequence[Part] | Sequence[AttentionPlan]) -> list[tuple[Any, ...]]:
    """Name, kind, layout and reason of every attention."""
    return [
        (
            one.name if isinstance(one, Part) else one.site.name,
            one.kind if isinstance(one, Part) else one.site.kind,
            one.layout,
            one.layout.reason,
        )
        for one in found
    ]


def check(model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        found = analyse(model, ((), inputs), configure(DENSE))
    torch._dynamo.reset()
    assert not found.failure
    expected = sparsify_compiler.explain(model, **inputs, options=DENSE)
    assert facts(found.parts) == facts(expected.plans)


@pytest.mark.alone  # names of modules are in globals of PyTorch while it traces, and other tests may leave some
@pytest.mark.parametrize(
    "family", ["wan_animate", "cogvideox", pytest.param("hunyuan_video", marks=pytest.mark.nightly)]
)
def test_the_analysis_by_blocks_is_that_of_the_whole(family: str) -> None:
    check(*CASES[family].build(batch=1))


class Odd(Block):
    """Does something with its tokens before attention."""

    does = "nothing"

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """As `Block`."""
        if self.does == "flips":
            x = x.flip(1)
        if self.does == "writes":
            x.copy_(x.flip(1).clone())
        if self.does == "shortens":
            return torch.cat([super().forward(x[:, :63], time), x[:, 63:]], 1)
        return super().forward(x, time)


@pytest.mark.alone
def test_blocks_that_differ_are_traced_apart(graphs: list[Any]) -> None:
    """The second of four blocks differs; the third and fourth get what it returns. Strides are of 2 kinds."""
    for does, traces in {"nothing": 1, "flips": 2, "writes": 2, "shortens": 3}.items():
        torch._dynamo.reset()
        graphs.clear()
        model = Video(0)
        blocks = [Odd(32) for _ in range(4)]
        for number, block in enumerate(blocks):
            block.does = does if number == 1 else "nothing"
        model.blocks = nn.ModuleList(blocks)
        check(model, {"hidden_states": latents((5, 7, 9)), "timestep": torch.tensor([900.0])})
        assert len(graphs) == traces, does
