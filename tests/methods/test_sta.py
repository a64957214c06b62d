"""Sliding tile attention against its paper: the window of each token, pair by pair; options, policies, search."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsify_compiler
from sparsify_compiler import OptionError
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.methods.sta import Sta
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.policy import Policy
from sparsify_compiler.testing.oracles import masked_attention
from sparsify_compiler.testing.strategies import qkv, site_of
from sparsify_compiler.training.search import search

Sizes = tuple[int, ...]


def window_of(i: int, count: int, size: int) -> set[int]:
    """The tiles that tile i of a dimension reads: slide a window over the dimension, take the one nearest to i."""
    windows = [range(first, first + size) for first in range(count - size + 1)]
    return set(min(windows, key=lambda tiles: abs(sum(tiles) / size - i)))


def sta_mask(layout: TokenLayout, tile: Sizes, windows: list[Sizes]) -> Tensor:
    """[H, S, S] bool, token pair by token pair from the paper's definition."""
    counts = [math.ceil(size / edge) for size, edge in zip(layout.grid, tile, strict=True)]
    places: list[Sizes | None] = [None] * layout.before
    places += [
        tuple(x // edge for x, edge in zip(place, tile, strict=True))
        for place in product(*map(range, layout.grid))
    ]
    places += [None] * layout.after

    def sees(query: Sizes | None, key: Sizes | None, window: Sizes) -> bool:
        if query is None or key is None:
            return True
        return all(k in window_of(q, *sizes) for q, k, *sizes in zip(query, key, counts, window, strict=True))

    return torch.tensor([[[sees(q, k, window) for k in places] for q in places] for window in windows])


@st.composite
def problems(draw: st.DrawFn) -> tuple[TokenLayout, Sizes, list[Sizes], Any]:
    """(a layout, a tile, the window of each of two heads or of all, the option): grids that do not divide, tiles
    larger than the grid, text on either side."""
    grid = tuple(draw(st.integers(1, most)) for most in (5, 6, 7))
    tile = tuple(draw(st.integers(1, 3)) for _ in range(3))
    before, after = draw(st.sampled_from([0, 2])), draw(st.sampled_from([0, 3]))
    layout = TokenLayout(tokens=before + math.prod(grid) + after, grid=grid, before=before, after=after)
    windows, given = [], []
    for _ in range(draw(st.integers(1, 2))):
        counts = [math.ceil(size / edge) for size, edge in zip(grid, tile, strict=True)]
        odd = [draw(st.sampled_from([None, *range(1, count + 1, 2)])) for count in counts]
        given.append(odd)
        windows.append(tuple(count if w is None else w for count, w in zip(counts, odd, strict=True)))
    return layout, tile, windows, given if len(windows) > 1 else given[0]


@settings(max_examples=40)
@given(problems(), st.sampled_from(["reference", "cpu"]))
def test_each_tile_reads_the_window_around_it(problem: Any, provider: str) -> None:
    """The table, its density, its refusal, and attention under it by a provider."""
    layout, tile, windows, option = problem
    exact = sta_mask(layout, tile, windows)
    method = Sta(tile=tile, window=option)
    query, key, value = qkv(1, 2, 1, layout.tokens, layout.tokens, 16, 16, torch.float32)
    table = method.fit(site_of(query, key), layout).table(layout)
    assert torch.equal(table.mask()[0], exact)
    assert table.density() == pytest.approx(exact.double().mean().item())
    assert bool(method.refusal(layout)) == bool(exact.all())
    out, _ = block_sparse_attention(query, key, value, table, provider=provider)
    wanted, _ = masked_attention(query, key, value, exact[None])
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_papers_window() -> None:
    """30 x 48 x 80 tokens in tiles of 6 x 8 x 8: 5 x 6 x 10 tiles, of which each reads 3 x 3 x 3."""
    layout = TokenLayout(tokens=30 * 48 * 80, grid=(30, 48, 80))
    method = Sta().fit(site_of(torch.empty(1, 1, 1, 8)), layout)
    assert (method.tile, method.window) == ((6, 8, 8), (3, 3, 3))
    assert method.table(layout).density() == pytest.approx(27 / 300)
    small = TokenLayout(tokens=6 * 16 * 33, grid=(6, 16, 33))
    assert Sta().fit(site_of(torch.empty(1, 1, 1, 8)), small).window == (1, 2, 3)


class Model(nn.Module):
    """Attention of 3 x 5 x 7 video tokens and 2 of text, in two heads; under a mask if there is one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.qkv = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 96)
        self.eval()

    def forward(self, video: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = torch.cat([text, self.conv(video).flatten(2).mT], 1)
        query, key, value = (4 * self.qkv(tokens)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)


LAYOUT = TokenLayout(tokens=107, grid=(3, 5, 7), before=2)
DRAWN = torch.randn(1744, generator=torch.Generator().manual_seed(0))
INPUTS = {"video": DRAWN[:1680].view(1, 4, 3, 10, 14), "text": DRAWN[1680:].view(1, 2, 32)}
TILE, COUNTS = (2, 2, 2), (2, 3, 4)
compiled = pytest.mark.usefixtures("fresh_dynamo")


def options(**others: Any) -> dict[str, Any]:
    return {"method": "sta", "tile": TILE, "inner_backend": "eager", **others}


@compiled
@pytest.mark.parametrize("window", [(1, 3, 3), [(1, 1, 3), (None, 3, 1)]])
@torch.no_grad()
def test_a_compiled_model_attends_in_windows(window: Any) -> None:
    model = Model()
    fast = torch.compile(model, backend="sparsify", options=options(window=window), fullgraph=True)
    windows = window if isinstance(window, list) else [window]
    sizes = [tuple(w or n for w, n in zip(one, COUNTS, strict=True)) for one in windows]
    mask = sta_mask(LAYOUT, TILE, sizes)
    torch.testing.assert_close(fast(**INPUTS), model(**INPUTS, mask=mask), rtol=1e-4, atol=1e-5)
    (measured,) = sparsify_compiler.stats(fast).measurements
    torch.testing.assert_close(measured.density, mask.float().mean((1, 2)).expand(1, 2))
    (plan,) = sparsify_compiler.explain(fast, **INPUTS).plans
    assert plan.layout == LAYOUT


@compiled
@torch.no_grad()
def test_a_far_field_comes_closer_to_dense() -> None:
    model, errors = Model(), []
    for far_field in FAR_FIELDS:
        chosen = options(window=(1, 1, 1), far_field=far_field)
        out = torch.compile(model, backend="sparsify", options=chosen)(**INPUTS)
        errors.append(float((out - model(**INPUTS)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[-1] < errors[0]


@compiled
@torch.no_grad()
def test_a_search_tries_it_and_a_policy_chooses_it(tmp_path: Path) -> None:
    model, label = Model(), "sta tile=2x2x2 window=1x3xNone"
    exact, dense = model(**INPUTS, mask=sta_mask(LAYOUT, TILE, [(1, 3, 4)])), model(**INPUTS)
    menu = [{"method": "sta", "tile": TILE, "window": (1, 3, None)}]
    found = search(model, [INPUTS], menu=menu, r=math.inf, total=math.inf)
    loss = float((exact - dense).square().sum() / dense.square().sum())
    assert found.layers[0].trials[label].loss == pytest.approx(loss, rel=1e-3)
    policy = replace(found, layers=(replace(found.layers[0], choice=label),))
    path = policy.save(tmp_path / "policy.json")
    assert Policy.load(path).menu == policy.menu
    fast = torch.compile(model, backend="sparsify", options={"policy": path, "inner_backend": "eager"})
    torch.testing.assert_close(fast(**INPUTS), exact, rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("chosen", [{"tile": (6, 8, 8)}, {"window": (None, None, None)}])
def test_a_window_over_everything_leaves_the_site_dense(chosen: dict[str, Any]) -> None:
    (plan,) = sparsify_compiler.explain(Model(), options=options(**chosen), **INPUTS).plans
    assert plan.method == "dense"
    assert "covers all tiles" in plan.reason
    assert "try a smaller tile or window" in plan.reason
    assert Sta().refusal(TokenLayout(tokens=4, reason="no grid")) == "no grid"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": (3, 4, 3)}, r"odd integer.*None for all.*got 4 in \(3, 4, 3\): try 3 or 5"),
        ({"window": (3, -1, 3)}, "odd integer of at least 1.*got -1"),
        ({"window": (3, 0, 3)}, "odd integer of at least 1.*got 0"),
        ({"window": (3, True, 3)}, "odd integer.*got True"),
        ({"window": (3, 3.0, 3)}, "odd integer.*got 3.0"),
        ({"window": (3, 3)}, r"three sizes in tiles.*such as \(3, 3, 3\), or a list.*got \(3, 3\)"),
        ({"window": 3}, r"three sizes in tiles.*got 3"),
        ({"window": []}, r"three sizes in tiles.*got \[\]"),
        ({"window": [(3, 3, 3), (3, 3)]}, r"three sizes in tiles.*got \(3, 3\)"),
        ({"window": (1, 5, 1)}, r"at most 2 x 3 x 4, the tiles.*got 1 x 5 x 1: None takes all.*smaller tile"),
        ({"window": [(1, 1, 1)] * 3}, "one window for all heads or a list of 2.*got a list of 3"),
        ({"tile": (0, 2, 2)}, "tile must be an integer of at least 1, got 0"),
        ({"tile": (2, 2)}, "tile must be three integers"),
        ({"tile": (2, 2, True)}, "tile must be an integer of at least 1, got True"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sta(**{"tile": TILE, **wrong}).fit(site_of(torch.empty(1, 2, 107, 16)), LAYOUT)
