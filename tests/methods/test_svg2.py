"""svg2 against masks written token by token from its definition."""

import math

import pytest
import torch
from choosing import PROVIDERS, expected_mask, heads, kept_pairs, layouts, means, select
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_compiler import OptionError
from sparsify_compiler.methods.svg2 import RELEASED, Svg2, clusters_for
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.testing.strategies import qkv, site_of


@pytest.mark.parametrize("provider", PROVIDERS)
@settings(max_examples=15)
@given(
    layout=layouts,
    heads=heads,
    clusters=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    top_p=st.sampled_from([0.2, 0.5, 0.9, 1.0]),
    ratio=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 99),
)
def test_svg2_reads_what_its_clusters_say(provider, layout, heads, clusters, top_p, ratio, seed):
    query, key, _ = qkv(2, *heads, layout.tokens, layout.tokens, 16, 16, torch.float32, seed=seed)
    method = Svg2(
        q_clusters=clusters[0], kv_clusters=clusters[1], top_p=top_p, min_kv_ratio=ratio, kmeans_iters=(3, 1)
    )
    (table, kept_mass, *_), (q_centroids, kv_centroids) = select(method, query, key, layout, provider)
    assert bool((kept_mass >= top_p - 1e-5).all())
    mask = table.mask()
    video = slice(layout.before, layout.tokens - layout.after)
    q_blocks, kv_blocks = (
        table.block_of_token(side)[..., video] - int(layout.before > 0) for side in ("q", "kv")
    )
    for b in range(2):
        for h in range(heads[0]):
            kv_head = h * heads[1] // heads[0]
            q_labels, kv_labels = q_blocks[b, h].tolist(), kv_blocks[b, h].tolist()
            tokens = query[b, h, video], key[b, kv_head, video]
            for side, labels, centroids in zip(
                tokens, (q_labels, kv_labels), (q_centroids[b, h], kv_centroids[b, kv_head]), strict=True
            ):
                own = means(side, torch.tensor(labels), len(centroids))
                full = torch.tensor([c in labels for c in range(len(centroids))])
                assert torch.allclose(own[full], centroids[full], atol=1e-5), "a centroid is its tokens' mean"
            kept, close = kept_pairs(
                q_centroids[b, h],
                kv_centroids[b, kv_head],
                [kv_labels.count(j) for j in range(clusters[1])],
                0.25,
                top_p,
                max(1, math.ceil(ratio * clusters[1] - 1e-9)),
            )
            if top_p == 1:
                assert mask[b, h].all()
            elif not close:
                assert torch.equal(mask[b, h], expected_mask(layout, q_labels, kv_labels, kept))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_warm_start_goes_on_from_where_the_last_call_ended(provider):
    """So many iterations cold are as many in two calls, bit for bit; and a seed gives what it gave."""
    layout = TokenLayout(tokens=60, grid=(3, 4, 5))
    query, key, _ = qkv(1, 2, 2, 60, 60, 16, 16, torch.float32)
    both = {"q_clusters": 4, "kv_clusters": 6}
    _, whole = select(Svg2(kmeans_iters=(5, 2), **both), query, key, layout, provider)
    method = Svg2(kmeans_iters=(3, 2), **both)
    _, cold = select(method, query, key, layout, provider)
    _, warm = select(method, query, key, layout, provider, warm=cold)
    assert all(torch.equal(a, b) for a, b in zip(whole, warm, strict=True))
    _, again = select(method, query, key, layout, provider)
    assert all(torch.equal(a, b) for a, b in zip(cold, again, strict=True))
    _, other = select(Svg2(kmeans_iters=(3, 2), seed=1, **both), query, key, layout, provider)
    assert not all(torch.equal(a, b) for a, b in zip(cold, other, strict=True))


def test_cluster_counts_pass_through_the_released_settings():
    for tokens, q_clusters, kv_clusters in RELEASED:
        assert clusters_for(tokens) == (q_clusters, kv_clusters)
    counts = [clusters_for(tokens) for tokens in range(1, 200_000, 997)]
    assert counts == sorted(counts), "never fewer clusters for more tokens"
    assert all(1 <= q <= tokens for (q, _), tokens in zip(counts, range(1, 200_000, 997), strict=True))


def test_more_clusters_than_tokens_are_refused():
    layout = TokenLayout(tokens=20, grid=(1, 4, 5))
    with pytest.raises(OptionError, match="q_clusters must be at most the 20 tokens of the video, got 21"):
        Svg2(q_clusters=21).fit(site_of(torch.empty(1, 1, 20, 8)), layout)
