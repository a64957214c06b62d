"""A body that Dynamo shares among calls: what is found and decided at one call is not taken for another's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import planned
from torch import Tensor, fx, nn
from torch.compiler import nested_compile_region
from torch.utils.checkpoint import checkpoint

from sparsify_compiler.backend import configure, sparsify
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.fx import bodies, modules
from sparsify_compiler.runtime.program import Program, Variant

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID = (3, 2, 5)
WIDTH = 16
conv = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
VIDEO = torch.randn(2, 4, 3, 4, 10, generator=torch.Generator().manual_seed(0))
PERM = torch.randperm(30, generator=torch.Generator().manual_seed(1))
FRAME = PERM // 10
SAME_FRAME = (FRAME[:, None] == FRAME) | (FRAME[:, None] == 0) | (FRAME == 0)
"""[30, 30]: the pairs of shuffled tokens that a tile of one reference frame keeps."""


def attend(x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = ((x * n).sin()[:, None] for n in (1, 2, 3))
    return F.scaled_dot_product_attention(q, k, v, mask)[:, 0]


@nested_compile_region
def region(x: Tensor) -> Tensor:
    return attend(x)


@nested_compile_region
def layer(x: Tensor) -> Tensor:
    return region(x) + region(x * 2)


def embed(video: Tensor) -> Tensor:
    return conv(video).flatten(2).transpose(1, 2).contiguous()


def shuffled(x: Tensor) -> Tensor:
    return x[:, PERM].contiguous()


CALLS: dict[str, tuple[Callable[[Tensor], Any], list[tuple[int, int, int] | None]]] = {
    "moved tokens first": (lambda x: (region(shuffled(x)), region(x)), [None, GRID]),
    "moved tokens last": (lambda x: (region(x), region(shuffled(x))), [GRID, None]),
    "in turn": (lambda x: (region(x), region(shuffled(x)), region(x * 2)), [GRID, None, GRID]),
    "within another": (lambda x: (layer(shuffled(x)), layer(x)), [None, None, GRID, GRID]),
}
"""(function of the tokens, grid of every attention)"""


@pytest.mark.parametrize("name", CALLS)
def test_every_call_has_its_own_layout(name: str) -> None:
    function, grids = CALLS[name]
    plans = planned(lambda video: function(embed(video)), VIDEO)
    assert [plan.layout.grid for plan in plans] == grids
    assert [plan.site.index for plan in plans] == list(range(len(grids)))
    assert len({plan.site.name for plan in plans}) == len(grids)


def test_the_first_calls_stay_dense_if_asked() -> None:
    plans = planned(lambda video: [region(embed(video)) for _ in range(3)], VIDEO, dense_layers=1)
    assert [plan.method for plan in plans] == ["dense", "tile", "tile"]


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_every_call_is_compiled_as_planned(name: str) -> None:
    function, _ = CALLS[name]
    programs: list[Program] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Program:
        options = {"method": "tile", "reference_frames": 1, "inner_backend": "aot_eager"}
        programs.append(sparsify(gm, inputs, options=options))
        return programs[-1]

    outputs = torch.compile(lambda video: function(embed(video)), backend=backend)(VIDEO)
    x = embed(VIDEO)
    in_order = SAME_FRAME[PERM.argsort()][:, PERM.argsort()]
    masks = iter([None if plan.method == "dense" else in_order for plan in programs[0].plan])
    for output, tokens in zip(outputs, _tokens(name, x), strict=True):
        if name == "within another":
            exact = attend(tokens, next(masks)) + attend(tokens * 2, next(masks))
        else:
            exact = attend(tokens, next(masks))
        torch.testing.assert_close(output, exact)


def _tokens(name: str, x: Tensor) -> list[Tensor]:
    """What every call of a case gets."""
    if name in ("moved tokens first", "within another"):
        return [shuffled(x), x]
    return [x, shuffled(x)] if name == "moved tokens last" else [x, shuffled(x), x * 2]


def test_calls_that_are_planned_alike_share_a_body_again() -> None:
    def function(video: Tensor) -> list[Tensor]:
        x = embed(video)
        return [region(x), region(shuffled(x)), region(x * 2)]

    graphs: list[fx.GraphModule] = []
    config = configure({"method": "tile"})

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        analysed = pipeline.analyse(gm, config)
        graphs.extend(
            [
                gm,
                analysed,
                *(pipeline.rewrite(analysed, config, Variant(phase)) for phase in ("sparse", "dense")),
            ]
        )
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend)(VIDEO)
    assert [len(list(modules(gm))) for gm in graphs] == [2, 4, 3, 3]
    for gm in graphs:
        names = {body.attribute: body.call.args[1] for body in bodies(gm)}
        assert len(set(names.values())) == len(names)  # PyTorch takes bodies of one name for one


def test_a_checkpointed_layer_within_a_region() -> None:
    @nested_compile_region
    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(attend, x, use_reentrant=False)

    def function(video: Tensor) -> list[Tensor]:
        x = embed(video)
        return [checkpointed(shuffled(x)), checkpointed(x)]

    assert [plan.layout.grid for plan in planned(function, VIDEO)] == [None, GRID]


def test_a_plan_says_where_a_site_keeps_no_state() -> None:
    def model(video: Tensor) -> Tensor:
        x = embed(video)
        return attend(x) + region(x) + region(2 * x)

    plans = planned(model, VIDEO, method="cubes", cube=(1, 1, 2), dense_layers=0)
    assert ["keeps no state" in plan.reason for plan in plans] == [False, True, True]
    assert not any("keeps no state" in plan.reason for plan in planned(model, VIDEO, reference_frames=1))
