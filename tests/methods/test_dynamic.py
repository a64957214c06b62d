"""svg2 and cubes against masks written token by token from their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import OptionError
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.methods import DynamicMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.grid import cut
from sparsify_compiler.methods.selection import Selection, State, Tokens
from sparsify_compiler.methods.svg2 import RELEASED, Svg2, clusters_for
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.testing.oracles import masked_attention
from sparsify_compiler.testing.strategies import qkv, site_of

PROVIDERS = ("reference", "cpu")


def select(
    method: DynamicMethod,
    query: Tensor,
    key: Tensor,
    layout: TokenLayout,
    provider: str,
    learnt: tuple[Tensor, ...] | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Selection, tuple[Tensor, ...]]:
    """One call of a method, warm if `learnt` is given."""
    method = method.fit(site_of(query, key), layout)
    shapes = method.state(site_of(query, key), layout).values()
    state = State(torch.tensor(learnt is not None), learnt or tuple(torch.zeros(shape) for shape in shapes))
    scale = query.shape[-1] ** -0.5
    tokens = Tokens(query=query, key=key, layout=layout, scale=scale, provider=provider, key_bias=key_bias)
    return method.select(tokens, state, **method.constants(layout))


def kept_pairs(
    q_means: Tensor, kv_means: Tensor, kv_sizes: list[int], scale: float, top_p: float, least: int
) -> tuple[list[set[int]], bool]:
    """The key blocks that each query block keeps, from the paper's words in float64; and whether any choice was so
    close that rounding may turn it."""
    kept, close = [], False
    for q in q_means.double():
        scores = [
            scale * float(q @ k) + math.log(n) if n else -math.inf
            for k, n in zip(kv_means.double(), kv_sizes, strict=True)
        ]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        total = sum(weights)
        ranked = sorted(range(len(weights)), key=lambda j: (-weights[j], j))
        row: set[int] = set()
        mass = 0.0
        for place, j in enumerate(ranked):
            if mass >= top_p and len(row) >= least:
                following = weights[ranked[place]] / total
                previous = weights[ranked[place - 1]] / total
                close |= previous - following < 1e-5
                break
            close |= abs(mass - top_p) < 1e-5 and len(row) >= least
            row.add(j)
            mass += weights[j] / total
        close |= abs(mass - top_p) < 1e-5
        kept.append(row)
    return kept, close


def expected_mask(
    layout: TokenLayout, q_labels: list[int], kv_labels: list[int], kept: list[set[int]]
) -> Tensor:
    """[S, S] bool: video by the labels, other tokens see and are seen by everything."""
    video = range(layout.before, layout.tokens - layout.after)
    rows = [
        [
            i not in video
            or j not in video
            or kv_labels[j - layout.before] in kept[q_labels[i - layout.before]]
            for j in range(layout.tokens)
        ]
        for i in range(layout.tokens)
    ]
    return torch.tensor(rows)


layouts = st.builds(
    lambda grid, before, after: TokenLayout(
        tokens=before + math.prod(grid) + after, grid=grid, before=before, after=after
    ),
    st.sampled_from([(1, 4, 5), (3, 3, 5), (2, 5, 7), (4, 4, 4)]),
    st.sampled_from([0, 1, 6]),
    st.sampled_from([0, 3]),
)
heads = st.sampled_from([(1, 1), (2, 2), (4, 2)])


def means(tokens: Tensor, labels: Tensor, count: int) -> Tensor:
    """[count, D] mean of the tokens that carry each label, 0 where none does."""
    return torch.stack(
        [tokens[labels == c].mean(0) if (labels == c).any() else 0 * tokens[0] for c in range(count)]
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@settings(max_examples=15)
@given(
    layout=layouts,
    heads=heads,
    cube=st.tuples(*[st.integers(1, 4)] * 3),
    query_cube=st.tuples(*[st.integers(1, 5)] * 3),
    top_p=st.sampled_from([0.2, 0.5, 0.9, 1.0]),
    ratio=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 99),
)
def test_cubes_are_what_they_say(provider, layout, heads, cube, query_cube, top_p, ratio, seed):
    query, key, _ = qkv(2, *heads, layout.tokens, layout.tokens, 16, 16, torch.float32, seed=seed)
    method = Cubes(cube=cube, query_cube=query_cube, top_p=top_p, min_kv_ratio=ratio)
    (table, *_), _ = select(method, query, key, layout, provider)
    mask = table.mask().expand(2, heads[0], -1, -1)
    _, height, width = layout.grid
    places = [(t // (height * width), t // width % height, t % width) for t in range(math.prod(layout.grid))]

    def number(sizes: tuple[int, int, int]) -> tuple[list[int], int]:
        cells = [tuple(p // size for p, size in zip(place, sizes, strict=True)) for place in places]
        distinct = sorted(set(cells))
        return [distinct.index(cell) for cell in cells], len(distinct)

    (q_labels, q_count), (kv_labels, kv_count) = number(query_cube), number(cube)
    video = slice(layout.before, layout.tokens - layout.after)
    sizes = [kv_labels.count(j) for j in range(kv_count)]
    for b in range(2):
        for h in range(heads[0]):
            kv = key[b, h * heads[1] // heads[0], video]
            kept, close = kept_pairs(
                means(query[b, h, video], torch.tensor(q_labels), q_count),
                means(kv, torch.tensor(kv_labels), kv_count),
                sizes,
                0.25,
                top_p,
                max(1, math.ceil(ratio * kv_count - 1e-9)),
            )
            if not close and top_p < 1:
                assert torch.equal(mask[b, h], expected_mask(layout, q_labels, kv_labels, kept))
            if top_p == 1:
                assert mask[b, h].all()


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
        table._block_of_token(side)[..., video] - int(layout.before > 0) for side in ("q", "kv")
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
@pytest.mark.parametrize("hidden", [-math.inf, -10_000.0])
@pytest.mark.parametrize(("heads", "biased"), [((2, 2), 1), ((4, 2), 4)])
@pytest.mark.parametrize(
    "method",
    [Svg2(q_clusters=4, kv_clusters=12, top_p=0.5), Cubes(cube=(1, 5, 5), query_cube=(2, 5, 5), top_p=0.5)],
    ids=["svg2", "cubes"],
)
def test_hidden_keys_are_not_chosen(provider, method, heads, biased, hidden):
    """Padding that every query is drawn to, were it not hidden, as at the edge of a padded video."""
    layout = TokenLayout(tokens=206, grid=(4, 5, 10), before=6)
    query, key, _ = qkv(2, *heads, 206, 206, 16, 16, torch.float32)
    query, padding = query + 1.0, slice(156, None)
    key[:, :, padding] = 2.5
    bias = torch.zeros(2, biased, 206)
    bias[..., padding] = hidden
    (table, kept, *_), _ = select(method, query, key, layout, provider, key_bias=bias)
    scores = (query @ key.repeat_interleave(heads[0] // heads[1], 1).mT) / 4 + bias[:, :, None]
    video = slice(layout.before, None)
    mass = scores[:, :, video, video].softmax(-1).masked_fill(~table.mask()[:, :, video, video], 0.0).sum(-1)
    assert mass.mean() > 0.4
    assert bool((kept >= 0.5 - 1e-5).all())


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "method",
    [Svg2(q_clusters=5, kv_clusters=9, top_p=1.0), Cubes(cube=(2, 2, 3), top_p=1.0)],
    ids=["svg2", "cubes"],
)
def test_top_p_of_one_is_dense(provider, method):
    layout = TokenLayout(tokens=70, grid=(2, 5, 6), before=4, after=6)
    query, key, value = qkv(2, 4, 2, 70, 70, 48, 48, torch.float32)
    (table, *_), _ = select(method, query, key, layout, provider)
    out, _ = block_sparse_attention(query, key, value, table, provider=provider)
    exact, _ = masked_attention(query, key, value, torch.ones(70, 70, dtype=torch.bool))
    assert torch.allclose(out.double(), exact, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_warm_start_goes_on_from_where_the_last_call_ended(provider):
    """So many iterations cold are as many in two calls, bit for bit; and a seed gives what it gave."""
    layout = TokenLayout(tokens=60, grid=(3, 4, 5))
    query, key, _ = qkv(1, 2, 2, 60, 60, 16, 16, torch.float32)
    both = {"q_clusters": 4, "kv_clusters": 6}
    _, whole = select(Svg2(kmeans_iters=(5, 2), **both), query, key, layout, provider)
    method = Svg2(kmeans_iters=(3, 2), **both)
    _, cold = select(method, query, key, layout, provider)
    _, warm = select(method, query, key, layout, provider, learnt=cold)
    assert all(torch.equal(a, b) for a, b in zip(whole, warm, strict=True))
    _, again = select(method, query, key, layout, provider)
    assert all(torch.equal(a, b) for a, b in zip(cold, again, strict=True))
    _, other = select(Svg2(kmeans_iters=(3, 2), seed=1, **both), query, key, layout, provider)
    assert not all(torch.equal(a, b) for a, b in zip(cold, other, strict=True))


def test_cut_puts_every_token_into_its_cube_once():
    order, bounds = cut((5, 7, 9), (2, 4, 4))
    assert torch.equal(order[0, 0].sort().values, torch.arange(315, dtype=torch.int32))
    assert bounds[0, 0, -1] == 315
    assert bounds.diff().max() == 32
    assert bounds.diff().min() == 1 * 3 * 1


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
