"""Sparse attention in standard operators against the ops, for every kind of table, grid and mask."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler.exporting.standard import Attend, Bodies, CubesSite, StaticSite, check
from sparsify_compiler.methods import StaticMethod, constants_of
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.policy import entry_of
from sparsify_compiler.runtime.site import SparseSite
from sparsify_compiler.runtime.site_inputs import SiteInputs
from sparsify_compiler.testing.strategies import site_of

CUBES = {
    "method": "cubes",
    "cube": (2, 3, 4),
    "query_cube": (2, 4, 4),
    "top_p": None,
    "min_gain": None,
    "min_kv_ratio": 0.2,
}
METHODS: dict[str, dict[str, Any]] = {
    "tile": {"method": "tile", "reference_frames": 1},
    "sta": {"method": "sta", "tile": (2, 3, 4), "window": (1, 3, 1)},
    "sta by head": {
        "method": "sta",
        "tile": (2, 3, 4),
        "window": [(1, 3, 1), (3, 1, 1), (1, 1, 3), (3, 3, 3)],
    },
    "cubes, drop": {**CUBES, "far_field": "drop"},
    "cubes, mean": {**CUBES, "far_field": "mean"},
    "cubes, linear": {**CUBES, "far_field": "linear"},
    "cubes, gain": {**CUBES, "kv_budget": 0.2, "far_field": "linear"},
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Relative RMS error: a few times that of one rounding in each type."""


def plan_of(options: dict[str, Any], query: Tensor, kv_heads: int, before: int, grid: Any) -> AttentionPlan:
    tokens = query.shape[2]
    layout = TokenLayout(
        tokens=tokens, grid=grid, before=before, after=tokens - before - grid[0] * grid[1] * grid[2]
    )
    entry = entry_of(options)
    site = replace(site_of(query), kv_heads=kv_heads)
    method = entry.method.fit(site, layout)
    return AttentionPlan(
        site=site, layout=layout, method=method.name, settings=method, provider="cpu",
        far_field=entry.far_field, reason="",
    )  # fmt: skip


def hidden(kind: str, batch: int, tokens: int, before: int) -> Tensor | None:
    """A key bias: of padded text, which differs in the batch; or of keys within the video."""
    if kind == "none":
        return None
    bias = torch.zeros(batch, 1, tokens)
    if kind == "text":
        bias[0, :, -2:] = -torch.inf
    else:
        bias[0, :, before : before + 4] = -torch.inf
        bias[0, :, before + 9 : before + 13] = -1e30
        bias[1, :, before + 5] = -2.0
    return bias


def both(plan: AttentionPlan, *inputs: Any) -> tuple[Tensor, Tensor]:
    """(the output in standard operators, the output of the ops)"""
    check(plan)
    constants = constants_of(plan.settings, plan.layout)
    exact = SparseSite(plan, SiteInputs(constants=tuple(constants)))(*inputs, *constants.values())
    kind = StaticSite if isinstance(plan.settings, StaticMethod) else CubesSite
    got = kind(Attend(plan), plan)(*inputs)
    assert got.stride() == exact.stride()
    return got, exact


def error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).double().norm() / exact.double().norm())


@pytest.mark.parametrize("mask", ["none", "text", "video"])
@pytest.mark.parametrize(("before", "after", "kv_heads"), [(0, 0, 4), (5, 0, 2), (3, 4, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_every_table_and_mask(method: str, before: int, after: int, kv_heads: int, mask: str) -> None:
    torch.manual_seed(0)
    grid = (5, 7, 9)
    tokens = before + 315 + after
    query = 2 * torch.randn(2, 4, tokens, 8)
    key, value = torch.randn(2, 2, kv_heads, tokens, 8)
    plan = plan_of(METHODS[method], query, kv_heads, before, grid)
    got, exact = both(plan, query, key, value, hidden(mask, 2, tokens, before))
    assert error(got, exact) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["tile", "cubes, mean", "cubes, gain"])
def test_low_precision(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 131, 8).to(dtype)
    plan = plan_of(METHODS[method], query, 2, 3, (4, 4, 8))
    got, exact = both(plan, query, key, value, hidden("text", 2, 131, 3))
    assert error(got, exact) < TOLERANCE[dtype]


def test_the_far_field_is_used_for_heads_that_gain_by_it() -> None:
    """The first head attends everywhere alike, so means describe what it skips. In the second, few keys of each
    block get all attention, and their values are the opposite of the others', so means mislead."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 315, 8)
    query[:, 0] *= 0.02
    value[:, 0] += 3 * torch.linspace(-1, 1, 315)[:, None]
    few = torch.arange(315) % 7 == 0
    query[:, 1] = torch.tensor([4.0] + [0.0] * 7)
    key[:, 1] = torch.where(few[:, None], query[:, 1], 0.1 * key[:, 1])
    value[:, 1] = torch.where(few[:, None], 5.0, -1.0) + 0.1 * value[:, 1]
    found = {}
    for method in ("cubes, drop", "cubes, mean"):
        found[method], exact = both(plan_of(METHODS[method], query, 2, 0, (5, 7, 9)), query, key, value, None)
        assert error(found[method], exact) < TOLERANCE[torch.float32]
    apart = (found["cubes, mean"] - found["cubes, drop"]).norm(dim=(2, 3))[0]
    assert apart[0] > 1.0
    assert apart[1] == 0.0


def test_a_site_between_other_tokens_is_traced_without_values() -> None:
    query, key, value = torch.randn(3, 2, 2, 87, 8)
    plan = plan_of(METHODS["cubes, gain"], query, 2, 4, (4, 4, 5))
    bodies = Bodies()
    site = CubesSite(Attend(plan, bodies), plan)
    torch.export.export(site, (query, key, value, None), strict=False)
    assert len(bodies.found) == 1


def test_a_row_without_visible_keys_is_zero() -> None:
    query, key, value = torch.randn(3, 1, 2, 60, 8)
    bias = torch.full((1, 1, 60), -torch.inf)
    bias[..., 0] = 0.0  # a key of the first tile alone
    plan = plan_of({"method": "sta", "tile": (1, 4, 5), "window": (1, 1, 1)}, query, 2, 0, (3, 4, 5))
    got, exact = both(plan, query, key, value, bias)
    torch.testing.assert_close(got, exact)
    assert not got[:, :, 20:].any()
