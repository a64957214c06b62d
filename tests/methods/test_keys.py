"""keys against its definition, key by key in float64, and against what it is to be better than."""

import itertools
import math
from typing import Any

import pytest
import torch
from choosing import PROVIDERS, select
from hypothesis import given
from hypothesis import strategies as st

import sparsify_compiler
from sparsify_compiler import OptionError
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.kernels.far_field import FAR_FIELDS, attention_with_far_field
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.testing.far_fields import planted_clusters
from sparsify_compiler.testing.models import CASES, GRID
from sparsify_compiler.testing.oracles import masked_attention
from sparsify_compiler.testing.strategies import qkv, site_of


@given(data=st.data())
def test_each_cluster_reads_the_keys_that_its_mean_query_scores_highest(data: st.DataObject) -> None:
    """Text always, hidden keys never; every query is in one cluster; the far field counts the rest."""
    provider = data.draw(st.sampled_from(PROVIDERS))
    grid = tuple(data.draw(st.integers(1, size)) for size in (3, 5, 5))
    before, after, video = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2)), math.prod(grid)
    layout = TokenLayout(tokens=before + video + after, grid=grid, before=before, after=after)
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
    budget, clusters = data.draw(st.integers(1, video)), data.draw(st.integers(1, video))
    query, key, _ = qkv(2, heads, kv_heads, layout.tokens, layout.tokens, 8, 8, torch.float32)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    hidden = torch.rand(2, 1, layout.tokens, generator=generator) < data.draw(st.sampled_from([0.0, 0.5]))
    hidden[..., :before] = hidden[..., before + video :] = False
    bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf) if hidden.any() else None
    method = Keys(kv_budget=budget, q_clusters=clusters, kmeans_iters=(3, 1))
    got, (centroids,) = select(method, query, key, layout, provider=provider, key_bias=bias, far_field="mean")
    table, far = got.table, got.far_blocks
    assert far is not None
    assert table.q_order is not None
    mask = table.mask().expand(2, heads, -1, -1)
    assert not got.whole, "other queries than the video's read everything"
    for b, h in itertools.product(range(2), range(heads)):
        keys = key[b, h * kv_heads // heads].double()
        queries = query[b, h, before : before + video].double()
        seen = set((~hidden[b, 0, before : before + video]).nonzero()[:, 0].tolist())
        order, bounds = table.q_order[b, h].tolist(), table.q_bounds[b, h].tolist()
        assert sorted(order) == list(range(video))
        for cluster, (x, y) in enumerate(itertools.pairwise(bounds)):
            if x == y:
                continue
            mean = queries[order[x:y]].mean(0)
            torch.testing.assert_close(centroids[b, h, cluster].double(), mean, atol=1e-5, rtol=1e-5)
            rows = mask[b, h, order[x:y]]
            assert (rows == rows[0]).all()
            assert rows[0, :before].all()
            assert rows[0, before + video :].all()
            read = set(rows[0, before : before + video].nonzero()[:, 0].tolist())
            assert len(read) == min(budget, len(seen))
            assert read <= seen
            scores = keys[before : before + video] @ mean
            if read and seen - read:
                least = min(float(scores[t]) for t in read)
                assert least >= max(float(scores[t]) for t in seen - read) - 1e-4
            assert int(far.left[b, h, cluster].sum()) == len(seen) - len(read)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_all_keys_are_dense_attention(provider: str) -> None:
    layout = TokenLayout(tokens=3 * 4 * 5, grid=(3, 4, 5))
    query, key, value = qkv(1, 2, 2, 60, 60, 16, 16, torch.float32)
    got, _ = select(Keys(kv_budget=1.0), query, key, layout, provider=provider)
    out, _ = block_sparse_attention(query, key, value, got.table, provider=provider)
    exact, _ = masked_attention(query, key, value, torch.ones(60, 60, dtype=torch.bool))
    torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=0)


def test_what_is_left_errs_less_by_its_means_than_dropped() -> None:
    """On planted clusters; videos are compared in `sparsify bench quality`."""
    layout = TokenLayout(tokens=4 * 8 * 16, grid=(4, 8, 16))
    query, key, value = planted_clusters(layout.tokens, 2, 32)
    exact, _ = masked_attention(query, key, value, torch.ones(layout.tokens, layout.tokens, dtype=torch.bool))
    errors = {}
    for far_field in FAR_FIELDS:
        got, _ = select(Keys(kv_budget=0.1), query, key, layout, provider="cpu", far_field=far_field)
        out, _, report = attention_with_far_field(
            query, key, value, got.table, far_field=far_field, far_blocks=got.far_blocks
        )
        assert float(report.density.mean()) == pytest.approx(0.1, abs=0.01)
        errors[far_field] = float((out.double() - exact).norm() / exact.norm())
    assert errors["mean"] < 0.7 * errors["drop"], errors
    assert errors["linear"] < 0.7 * errors["drop"], errors


def test_a_warm_start_goes_on_from_the_centroids_of_the_call_before() -> None:
    layout = TokenLayout(tokens=60, grid=(3, 4, 5))
    query, key, _ = qkv(1, 2, 2, 60, 60, 8, 8, torch.float32)
    short, long = (Keys(q_clusters=6, kmeans_iters=pair) for pair in ((2, 3), (5, 1)))
    _, (first,) = select(short, query, key, layout, "cpu")
    _, (second,) = select(short, query, key, layout, "cpu", (first,))
    _, (straight,) = select(long, query, key, layout, "cpu")
    assert torch.equal(second, straight)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video"])
def test_in_a_compiled_generation_it_reads_its_budget(family: str) -> None:
    """One graph, without a break; at a budget of all keys it is eager, at a tenth it is not."""
    for budget in (1.0, 0.1):
        torch._dynamo.reset()
        model, inputs = CASES[family].make(GRID, 1)
        options = {
            "method": "keys",
            "kv_budget": budget,
            "dense_steps": 0,
            "dense_layers": 0,
            "inner_backend": "eager",
        }
        fast = torch.compile(model.eval(), backend="sparsify", options=options, fullgraph=True)
        with torch.no_grad():
            got = fast(**inputs, return_dict=False)[0]
            eager = model(**inputs, return_dict=False)[0]
        error = float((got - eager).abs().max())
        if budget == 1.0:
            assert error < 2e-5
            continue
        assert error > 1e-4
        density = sparsify_compiler.stats(model).density
        if family == "wan":
            assert density == pytest.approx(32 / 315)
        else:
            assert 0.1 < density < 0.5, "text is read as well"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_budget": 0}, "kv_budget must be an integer of at least 1 or a share"),
        ({"kv_budget": 1.5}, "kv_budget must be an integer of at least 1 or a share"),
        ({"kv_budget": True}, "kv_budget must be an integer of at least 1 or a share"),
        ({"kv_budget": float("nan")}, "kv_budget must be an integer of at least 1 or a share"),
        ({"q_clusters": 0}, "q_clusters must be an integer of at least 1"),
        ({"kmeans_iters": 3}, "kmeans_iters must be two integers"),
        ({"kmeans_iters": (3, 0)}, r"kmeans_iters\[1\] must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Keys(**options)


def test_options_that_do_not_fit_the_site() -> None:
    layout = TokenLayout(tokens=20, grid=(1, 4, 5))
    site = site_of(torch.empty(1, 2, 20, 8))
    with pytest.raises(OptionError, match="q_clusters must be at most the 20 tokens of the video, got 21"):
        Keys(q_clusters=21).fit(site, layout)
    with pytest.raises(OptionError, match="kv_budget must be at most the 20 tokens of the video, got 21"):
        Keys(kv_budget=21).fit(site, layout)
    assert Keys().refusal(TokenLayout(tokens=20, reason="no grid")) == "no grid"
