"""cubes against masks written token by token from their definition; choices of blocks in cubes and in svg2."""

import math

import pytest
import torch
from choosing import PROVIDERS, expected_mask, heads, kept_pairs, layouts, means, select
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.kernels.far_field.virtual_keys import virtual_keys
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.grid import cut
from sparsify_compiler.methods.svg2 import Svg2
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.testing.oracles import masked_attention
from sparsify_compiler.testing.strategies import qkv


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


@pytest.mark.parametrize("far_field", ["drop", "mean", "linear"])
def test_a_budget_is_the_number_of_blocks(far_field):
    layout = TokenLayout(tokens=70, grid=(2, 5, 6), before=4, after=6)
    query, key, value = qkv(2, 4, 2, 70, 70, 16, 16, torch.float32)
    method = Cubes(cube=(1, 2, 3), query_cube=(2, 2, 3), kv_budget=0.3)  # 4 of 12 blocks
    (table, _, _, min_gain, _, best, _), _ = select(method, query, key, layout, "cpu", far_field=far_field)
    if far_field == "linear":
        assert best == 4
        table, *_ = virtual_keys(
            query, key, value, table, linear=True, min_gain=min_gain, best=best, key_bias=None, scale=0.25,
            provider="cpu",
        )  # fmt: skip
    listed = table.block_mask()
    assert (listed[:, :, 1:-1, 1:-1].sum(-1) == 4).all()
    assert listed[:, :, [0, -1]].all()  # text reads everything
    assert listed[..., [0, -1]].all()


def test_cut_puts_every_token_into_its_cube_once():
    order, bounds = cut((5, 7, 9), (2, 4, 4))
    assert torch.equal(order[0, 0].sort().values, torch.arange(315, dtype=torch.int32))
    assert bounds[0, 0, -1] == 315
    assert bounds.diff().max() == 32
    assert bounds.diff().min() == 1 * 3 * 1
