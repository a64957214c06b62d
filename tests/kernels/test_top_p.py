"""Sorting by label and selection by share on every provider, against brute force in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from any_provider import IS_SLOW, POISONED, device_of, examples, generator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.kernels.clustering import sort_by_label, top_p_blocks

pytestmark = POISONED
any_example = examples(5, 25)
CENTROIDS = torch.zeros(2, 4, 3, 8)


@any_example
@given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 1200), st.integers(1, 200), st.integers(0, 99))
def test_order_is_a_stable_sort(provider, batch, heads, tokens, clusters, seed):
    labels = torch.randint(clusters, (batch, tokens, heads), generator=generator(seed), dtype=torch.int32)
    labels = labels.to(device_of(provider)).transpose(1, 2)
    order, bounds = sort_by_label(labels, clusters, provider=provider)
    assert (order.dtype, order.shape) == (torch.int32, (batch, heads, tokens))
    assert (bounds.dtype, bounds.shape) == (torch.int32, (batch, heads, clusters + 1))
    for b in range(batch):
        for h in range(heads):
            of_token = labels[b, h].tolist()
            assert order[b, h].tolist() == sorted(range(tokens), key=lambda t: (of_token[t], t))
            expected = [sum(label < c for label in of_token) for c in range(clusters + 1)]
            assert bounds[b, h].tolist() == expected


def estimated_shares(q: Tensor, k: Tensor, sizes: Tensor, scale: float) -> Tensor:
    """[B, H, Nq, Nk] float64: P from its definition."""
    batch, heads, rows, _ = q.shape
    shares = torch.zeros(batch, heads, rows, k.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            of = h * k.shape[1] // heads
            n = sizes[b % sizes.shape[0], of % sizes.shape[1]].double().cpu()
            scores = scale * (q[b, h].double() @ k[b, of].double().T).cpu()
            masses = n * (scores - scores.amax(-1, keepdim=True)).exp()
            shares[b, h] = masses / masses.sum(-1, keepdim=True)
    return shares


def assert_selected(selected: Any, shares: Tensor, top_p: float, min_blocks: int) -> None:
    """The fewest clusters in the order of falling share, within rounding."""
    counts, indices, kept = (t.cpu() for t in selected)
    *lead, clusters = shares.shape
    assert (counts.dtype, list(counts.shape)) == (torch.int32, lead)
    assert (indices.dtype, indices.shape) == (torch.int32, shares.shape)
    assert (kept.dtype, list(kept.shape)) == (torch.float32, lead)
    floor, close = min(min_blocks, clusters), 1e-5
    rows = zip(
        counts.flatten().tolist(), indices.flatten(0, 2).tolist(), kept.flatten().tolist(), strict=True
    )
    for (count, row, mass), share in zip(rows, shares.flatten(0, 2).tolist(), strict=True):
        inside, outside = row[:count], row[count:]
        assert inside == sorted(inside)
        assert outside == sorted(outside)
        assert sorted(row) == list(range(clusters))
        assert count >= floor
        assert mass == pytest.approx(math.fsum(share[j] for j in inside), abs=close)
        assert mass >= min(top_p, 1) - close
        if top_p >= 1:
            assert count == clusters
            assert mass == 1
        elif inside:
            least = min(share[j] for j in inside)
            assert all(share[j] <= least + close for j in outside)
            assert count == floor or mass - least < top_p + close


@st.composite
def selections(draw: st.DrawFn, provider: str) -> tuple[Tensor, Tensor, Tensor]:
    """(q_centroids, kv_centroids, kv_sizes), empty clusters among them."""
    any_heads = itertools.product((1, 2), repeat=3)
    few_heads = [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)]
    batch, kv_heads, group = draw(st.sampled_from(few_heads if IS_SLOW else [*any_heads]))
    rows = draw(st.sampled_from([1, 3] if IS_SLOW else [1, 5, 70]))
    clusters = draw(st.sampled_from([1, 2, 16, 33, *([] if IS_SLOW else [100])]))
    dim, random = draw(st.sampled_from([4, 16, 80])), generator(draw(st.integers(0, 99)))
    lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads]))
    sizes = torch.randint(draw(st.sampled_from([2, 50])), (*lead, clusters), generator=random)
    sizes[..., -1] = 3
    tensors = (
        draw(st.sampled_from([0.1, 1.0, 3.0]))
        * torch.randn(batch, kv_heads * group, rows, dim, generator=random),
        torch.randn(batch, kv_heads, clusters, dim, generator=random),
        sizes.int(),
    )
    q, k, sizes = (t.to(device_of(provider)) for t in tensors)
    return q, k, sizes


@any_example
@given(data=st.data(), min_blocks=st.sampled_from([0, 1, 4, 1000]))
def test_selection_keeps_the_fewest_that_hold_the_share(provider, data, min_blocks):
    q, k, sizes = data.draw(selections(provider))
    shares, before = estimated_shares(q, k, sizes, 0.3), None
    for top_p in (0.0, 0.3, 0.9, 0.999, 1.0):
        selected = top_p_blocks(q, k, sizes, scale=0.3, top_p=top_p, min_blocks=min_blocks, provider=provider)
        assert_selected(selected, shares, top_p, min_blocks)
        assert before is None or (selected[0] >= before).all(), "a larger share may not keep less"
        before = selected[0]


@pytest.mark.parametrize(("top_p", "min_blocks"), [(0.0, 1500), (0.7, 0), (0.7, 2000), (0.99, 1)])
def test_selection_among_thousands(provider, top_p, min_blocks):
    """More than a program of the Triton kernel has in registers. Scores are integers, so many shares are alike."""
    random, device = generator(0), device_of(provider)
    q, k = (torch.randint(-1, 2, (1, 1, n, 16), generator=random).float() for n in (2, 2500))
    sizes = torch.randint(5, (1, 1, 2500), generator=random).int()
    q, k, sizes = (t.to(device) for t in (q, k, sizes))
    selected = top_p_blocks(q, k, sizes, scale=0.5, top_p=top_p, min_blocks=min_blocks, provider=provider)
    shares = estimated_shares(q, k, sizes, 0.5)
    assert_selected(selected, shares, top_p, min_blocks)
    counts, indices = (t[0, 0].tolist() for t in selected[:2])
    for count, row, share in zip(counts, indices, shares[0, 0].tolist(), strict=True):
        by_share = sorted(range(2500), key=lambda j: (-share[j], j))
        assert row[:count] == sorted(by_share[:count])


@pytest.mark.parametrize(
    ("sizes", "top_p", "min_blocks", "expected"),
    [
        ([1, 1, 2, 4], 0.5, 0, [3]),
        ([1, 1, 2, 4], 0.51, 0, [2, 3]),
        ([1, 1, 2, 4], 0.8, 0, [0, 2, 3]),
        ([1, 1, 2, 4], 0.875, 0, [0, 2, 3]),
        ([1, 1, 2, 4], 0.876, 0, [0, 1, 2, 3]),
        ([1, 1, 2, 4], 0.1, 3, [0, 2, 3]),
        ([4, 4, 4, 4], 0.5, 0, [0, 1]),
        ([4, 4, 4, 4], 0.5, 3, [0, 1, 2]),
        ([4, 0, 0, 4], 0.999, 0, [0, 3]),
        ([4, 0, 0, 4], 0.5, 3, [0, 1, 3]),
        ([4, 0, 0, 4], 1.0, 0, [0, 1, 2, 3]),
        ([4, 0, 0, 4], 0.0, 0, []),
        ([0, 0, 0, 0], 0.5, 1, [0, 1, 2, 3]),
    ],
)
def test_ties_and_empty_clusters(provider, sizes, top_p, min_blocks, expected):
    """Scores are all alike, so shares are sizes; every figure is a dyadic fraction."""
    q, k = torch.zeros(1, 1, 3, 16), torch.ones(1, 1, 4, 16)
    tensors = (t.to(device_of(provider)) for t in (q, k, torch.tensor(sizes, dtype=torch.int32)[None, None]))
    counts, indices, kept = top_p_blocks(
        *tensors, scale=1.0, top_p=top_p, min_blocks=min_blocks, provider=provider
    )
    assert counts.flatten().tolist() == [len(expected)] * 3
    others = [j for j in range(4) if j not in expected]
    assert indices.flatten(0, 2).tolist() == [expected + others] * 3
    share = 1 if not others else sum(sizes[j] for j in expected) / sum(sizes)
    assert kept.flatten().tolist() == [share] * 3


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_rows_that_are_not_finite_keep_everything_and_the_others_are_as_before(provider, poison):
    random, device = generator(0), device_of(provider)
    q, k = torch.randn(1, 2, 2, 16, generator=random), torch.randn(1, 2, 40, 16, generator=random)
    q, k, sizes = (t.to(device) for t in (q, k, torch.ones(1, 1, 40, dtype=torch.int32)))
    chosen = {"scale": 0.5, "top_p": 0.6, "min_blocks": 1, "provider": provider}
    clean = top_p_blocks(q, k, sizes, **chosen)
    q[0, 1, 1, 0] = poison
    counts, indices, kept = top_p_blocks(q, k, sizes, **chosen)
    assert counts[0, 1, 1] == 40
    assert indices[0, 1, 1].tolist() == list(range(40))
    assert kept[0, 1, 1] == 1
    others = torch.ones(1, 2, 2, dtype=torch.bool)
    others[0, 1, 1] = False
    for got, was in zip((counts, indices, kept), clean, strict=True):
        assert torch.equal(got[others], was[others])
    k[0, 0, 3] = poison  # inf - inf, too: most rows see NaN
    counts, indices, _ = top_p_blocks(q, k, sizes, **chosen)
    assert ((counts >= 1) & (counts <= 40)).all()
    assert torch.equal(indices.sort(-1).values, torch.arange(40, device=device).int().expand_as(indices))


def test_scores_far_apart_do_not_overflow(provider):
    device = device_of(provider)
    q = torch.tensor([[[[300.0], [-300.0]]]], device=device)
    k = torch.tensor([[[[-300.0], [300.0], [299.0]]]], device=device)
    sizes = torch.ones(1, 1, 3, dtype=torch.int32, device=device)
    counts, indices, kept = top_p_blocks(q, k, sizes, scale=1.0, top_p=0.9, min_blocks=1, provider=provider)
    assert counts.tolist() == [[[1, 1]]]
    assert indices[..., 0].tolist() == [[[1, 0]]]
    assert kept.tolist() == [[[1.0, 1.0]]]


def test_sort_refuses():
    with pytest.raises(ValueError, match=r"labels must be int32 \[B, H, S\], got int64 \[1, 1, 4\]"):
        sort_by_label(torch.zeros(1, 1, 4, dtype=torch.long), 3)
    with pytest.raises(ValueError, match=r"got int32 \[4\]"):
        sort_by_label(torch.zeros(4, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="clusters must be at least 1, got 0"):
        sort_by_label(torch.zeros(1, 1, 4, dtype=torch.int32), 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_centroids": CENTROIDS.half()}, "q_centroids must be float32"),
        ({"kv_centroids": CENTROIDS[0]}, "kv_centroids must be float32"),
        ({"kv_centroids": CENTROIDS[:1]}, "kv_centroids must be"),
        ({"kv_centroids": CENTROIDS[..., :4]}, "kv_centroids must be"),
        ({"kv_centroids": CENTROIDS[:, :, :0]}, "at least one cluster"),
        ({"q_centroids": CENTROIDS[:, :3]}, "multiple of key heads, got 3 and 4"),
        ({"kv_sizes": torch.ones(2, 4, 3)}, r"kv_sizes must be int32 .* got float32"),
        ({"kv_sizes": torch.ones(2, 3, 3, dtype=torch.int32)}, r"\[1 or 2, 1 or 4, 3\]"),
        ({"kv_sizes": torch.ones(3, dtype=torch.int32)}, "kv_sizes must be"),
        ({"kv_sizes": torch.ones(1, 1, 3, dtype=torch.int32, device="meta")}, "kv_sizes on meta"),
        ({"top_p": -0.1}, "top_p must be a share of at least 0, got -0.1"),
        ({"top_p": math.nan}, "got nan"),
        ({"min_blocks": -1}, "min_blocks must be at least 0, got -1"),
    ],
)
def test_top_p_refuses(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        **{"q_centroids": CENTROIDS, "kv_centroids": CENTROIDS},
        **{"kv_sizes": torch.ones(1, 1, 3, dtype=torch.int32), "scale": 1.0, "top_p": 0.9, "min_blocks": 1},
    } | change
    with pytest.raises(ValueError, match=words):
        top_p_blocks(**arguments, provider="reference")
