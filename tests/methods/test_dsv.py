"""dsv against masks written token by token from its definition, and its predictor against autograd and counting."""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import OptionError
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.kernels.far_field import FAR_FIELDS, attention_with_far_field
from sparsify_compiler.methods import predictor
from sparsify_compiler.methods.dsv import CHOSEN_BY, GROUPS, Choice, Dsv, FittedDsv
from sparsify_compiler.methods.grid import Cube, cut, middle_of_token
from sparsify_compiler.methods.selection import Selection, State, Tokens
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.testing.far_fields import planted_clusters
from sparsify_compiler.testing.oracles import masked_attention
from sparsify_compiler.testing.strategies import qkv, site_of

PROVIDERS = ("reference", "cpu")
NOTHING = State(torch.tensor(False), ())


def select(
    method: Dsv, query: Tensor, key: Tensor, layout: TokenLayout, provider: str, shares: Tensor, **others: Any
) -> Selection:
    """What the method reads of these tensors with its first predictor."""
    site = site_of(query, key)
    method = method.fit(site, layout)
    tokens = Tokens(
        query=query, key=key, layout=layout, scale=query.shape[-1] ** -0.5, provider=provider, **others
    )
    learned = method.trained(site, layout) | {"shares": shares}
    return method.select(tokens, NOTHING, **method.constants(layout), **learned)[0]


def middles(grid: Cube, cube: Cube) -> list[int]:
    """For each token, the one in the middle of its cube, written out."""
    found = []
    for place in itertools.product(*map(range, grid)):
        first = [p // edge * edge for p, edge in zip(place, cube, strict=True)]
        extent = [min(edge, size - f) for f, edge, size in zip(first, cube, grid, strict=True)]
        t, y, x = (f + e // 2 for f, e in zip(first, extent, strict=True))
        found.append((t * grid[1] + y) * grid[2] + x)
    return found


@given(data=st.data())
def test_reads_the_keys_that_its_middle_scores_highest(data: st.DataObject) -> None:
    """With the identity as predictor: the true top-K, ties and tails included, text always, dense heads all."""
    provider = data.draw(st.sampled_from(PROVIDERS))
    grid = tuple(data.draw(st.integers(1, size)) for size in (4, 5, 5))
    cube = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    video = math.prod(grid)
    layout = TokenLayout(tokens=before + video + after, grid=grid, before=before, after=after)
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
    keys = data.draw(st.integers(1, video))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    query, key = (
        torch.randint(-2, 3, (2, h, layout.tokens, 4), generator=generator).float() for h in (heads, kv_heads)
    )
    shares = torch.full((heads,), keys / video)
    if dense := data.draw(st.booleans()):
        shares[-1] = 1.0
    method = Dsv(rank=4, query_group=cube, kv_budget=keys, chosen_by="middle")
    table = select(method, query, key, layout, provider, shares).table
    mask = table.mask().expand(2, heads, -1, -1)
    middle = middles(grid, cube)
    for b, h in itertools.product(range(2), range(heads)):
        if keys == video or (dense and h == heads - 1):
            assert mask[b, h].all()
            continue
        for token in range(video):
            scores = (
                key[b, h * kv_heads // heads, before : before + video] @ query[b, h, before + middle[token]]
            )
            ranked = sorted(range(video), key=lambda j, scores=scores: (-float(scores[j]), j))
            expected = {before + j for j in ranked[:keys]}
            expected |= {*range(before), *range(before + video, layout.tokens)}
            assert set(mask[b, h, token].nonzero()[:, 0].tolist()) == expected


@given(data=st.data())
def test_reads_the_keys_that_its_queries_attend_to_most_together(data: st.DataObject) -> None:
    """With the identity as predictor: as much of the cube's true attention to the video as any choice catches."""
    provider = data.draw(st.sampled_from(PROVIDERS))
    grid = tuple(data.draw(st.integers(1, size)) for size in (4, 5, 5))
    cube = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    before, video = data.draw(st.integers(0, 3)), math.prod(grid)
    layout = TokenLayout(tokens=before + video, grid=grid, before=before)
    keys = data.draw(st.integers(1, video))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    query, key = (3 * torch.randn(1, 1, layout.tokens, 4, generator=generator) for _ in range(2))
    method = Dsv(rank=4, query_group=cube, kv_budget=keys)
    table = select(
        method, query, key, layout, provider, torch.full((1,), min(keys, video - 0.1) / video)
    ).table
    mask = table.mask()[0, 0]
    assert mask[:, :before].all()
    attention = (query[0, 0, before:].double() @ key[0, 0, before:].double().T / 2).softmax(-1)
    middle = torch.tensor(middles(grid, cube))
    for one in middle.unique():
        together = attention[middle == one].sum(0)
        chosen = mask[middle == one][:, before:]
        assert (chosen == chosen[0]).all()
        assert int(chosen[0].sum()) == keys
        assert float(together[chosen[0]].sum()) >= float(together.topk(keys).values.sum()) * (1 - 1e-4)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_all_keys_are_dense_attention(provider: str) -> None:
    layout = TokenLayout(tokens=3 * 4 * 5, grid=(3, 4, 5))
    query, key, value = qkv(1, 2, 2, 60, 60, 16, 16, torch.float32)
    method = Dsv(rank=3, query_group=(2, 2, 2), kv_budget=60)
    for share in (59.9 / 60, 1.0):  # 60 single keys; one block
        table = select(method, query, key, layout, provider, torch.full((2,), share)).table
        out, _ = block_sparse_attention(query, key, value, table, provider=provider)
        exact, _ = masked_attention(query, key, value, torch.ones(60, 60, dtype=torch.bool))
        torch.testing.assert_close(out.double(), exact, atol=2e-6, rtol=0)


def test_a_hidden_key_is_not_chosen():
    layout = TokenLayout(tokens=12, grid=(1, 3, 4))
    query, key, _ = qkv(1, 2, 2, 12, 12, 8, 8, torch.float32)
    bias = torch.zeros(1, 1, 12)
    bias[..., 5] = -torch.inf
    method = Dsv(rank=8, query_group=(1, 1, 1), kv_budget=11)
    table = select(method, query, key, layout, "cpu", torch.full((2,), 11 / 12), key_bias=bias).table
    expected = torch.ones(12, dtype=torch.bool)
    expected[5] = False
    assert (table.mask() == expected).all()


@given(data=st.data())
def test_cubes_answer_for_the_keys_that_are_not_read(data: st.DataObject) -> None:
    """Counted off the table's mask: text, hidden keys, dense heads, shared key heads, cubes that are cut off."""
    grid = tuple(data.draw(st.integers(1, size)) for size in (5, 5, 3))
    before, after, video = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2)), math.prod(grid)
    layout = TokenLayout(tokens=before + video + after, grid=grid, before=before, after=after)
    kv_heads, keys = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, video))
    query, key, _ = qkv(2, 2, kv_heads, layout.tokens, layout.tokens, 8, 8, torch.float32)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    shape = 2, data.draw(st.sampled_from([1, 2])), layout.tokens
    hidden = torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.4]))
    hidden[:, :, before : before + 1] = False
    bias = None
    if hidden.any():
        bias = torch.randn(shape, generator=generator).masked_fill(hidden, -torch.inf)
    hidden = hidden.expand(-1, 2, -1)
    shares = torch.tensor([keys / video, 1.0 if data.draw(st.booleans()) else keys / video])
    method = Dsv(rank=8, query_group=(2, 2, 1), kv_budget=keys)
    got = select(method, query, key, layout, "cpu", shares, key_bias=bias, far_field="mean")
    mask, far = got.table.mask().expand(2, 2, -1, -1), got.far_blocks
    assert far is not None
    assert sorted(far.order[0, 0].tolist()) == list(range(layout.tokens))
    groups = [*itertools.pairwise(got.table.q_bounds[0, 0].tolist())]
    cubes = [far.order[0, 0, x:y].tolist() for x, y in itertools.pairwise(far.bounds[0, 0].tolist())]
    assert len({tuple(cube) for cube in cubes}) == len(cubes)
    for b, h in itertools.product(range(2), range(2)):
        for g, (x, _) in enumerate(groups):
            if shares[h] == 1:
                assert (far.left[b, h, g] == 0).all()
                continue
            assert got.table.q_order is not None
            row = mask[b, h, int(got.table.q_order[0, 0, x])]
            left = [sum(not row[t] and not hidden[b, h, t] for t in cube) for cube in cubes]
            assert far.left[b, h, g].tolist() == left
    for b, h in itertools.product(range(2), range(2)):
        of_video = [cube for cube in cubes if before <= cube[0] < before + video]
        seen = [sum(not hidden[b, h, t] for t in cube) for cube in of_video]
        first = int(before > 0)
        assert (
            far.keys[b % far.keys.shape[0], h % far.keys.shape[1], first : first + len(seen)].tolist() == seen
        )
        assert all(max(cube) < before + video for cube in of_video)
    assert select(method, query, key, layout, "cpu", shares, key_bias=bias).far_blocks is None


def test_what_is_left_errs_less_by_its_means_than_dropped() -> None:
    """On planted clusters, where cubes are runs of like tokens in part; measured in `sparsify bench quality`."""
    layout = TokenLayout(tokens=4 * 8 * 16, grid=(4, 8, 16))
    query, key, value = planted_clusters(layout.tokens, 2, 32)
    method, shares = Dsv(rank=32, query_group=(1, 2, 2), kv_budget=0.1), torch.full((2,), 0.1)
    exact, _ = masked_attention(query, key, value, torch.ones(layout.tokens, layout.tokens, dtype=torch.bool))
    errors = {}
    for far_field in FAR_FIELDS:
        got = select(method, query, key, layout, "cpu", shares, far_field=far_field)
        out, _, _ = attention_with_far_field(
            query, key, value, got.table, far_field=far_field, far_blocks=got.far_blocks
        )
        errors[far_field] = float((out.double() - exact).norm() / exact.norm())
    assert errors["mean"] < 0.7 * errors["drop"], errors
    assert errors["linear"] < 0.7 * errors["drop"], errors


@given(st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_cubes_cover_the_grid_once_and_have_their_middle_inside(grid: Cube, cube: Cube) -> None:
    order, bounds = cut(grid, cube)
    assert order[0, 0].argsort()[order[0, 0].long()].equal(torch.arange(math.prod(grid)))
    assert middle_of_token(grid, cube).tolist() == middles(grid, cube)
    middle = middle_of_token(grid, cube)[order[0, 0].long()]
    for first, last in itertools.pairwise(bounds[0, 0].tolist()):
        assert middle[first:last].unique().numel() == 1
        assert int(middle[first]) in order[0, 0, first:last]


def test_the_predictors_gradients_are_those_of_autograd():
    """The loss written with torch's own functions, in float64; query heads share key heads."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 2, 11, 8).double()
    weights = torch.randn(6, 8, 3).double().requires_grad_()
    loss, gradients = predictor.loss_and_gradients(query, key, weights.detach())
    wide = key.repeat_interleave(2, 1)
    true = query @ wide.mT
    low_key = (key @ weights[4:]).repeat_interleave(2, 1)
    predicted = (query @ weights[:4]) @ low_key.mT
    cosine = torch.nn.functional.cosine_similarity(true, predicted, dim=-1)
    norms = predicted.norm(dim=-1) / true.norm(dim=-1)
    expected = (0.95 * (1 - cosine) + 0.05 * (norms - 1) ** 2).mean((0, 2))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), weights)[0])


def test_full_rank_predicts_exactly():
    query, key, _ = qkv(1, 2, 2, 6, 9, 16, 16, torch.float32)
    weights = predictor.initial_weights(4, 16, 16)
    loss, gradients = predictor.loss_and_gradients(query, key, weights)
    assert loss.abs().max() < 1e-6
    assert gradients.abs().max() < 1e-6


@pytest.mark.parametrize("chosen_by", CHOSEN_BY)
@pytest.mark.parametrize("text", [0, 3])
def test_a_profile_counts_what_a_loop_counts(text: int, chosen_by: str) -> None:
    """Critical keys, needed keys, overlap and kept mass of one head, by sorting Python lists."""
    torch.manual_seed(1)
    layout = TokenLayout(tokens=2 * 4 * 4 + text, grid=(2, 4, 4), after=text)
    query, key = (2 * torch.randn(1, layout.tokens, 8) for _ in range(2))
    weights = predictor.initial_weights(2, 8, 3)
    mass, video = 0.8, 32
    shares = torch.tensor([0.3])
    groups = GROUPS[:3]
    seen = predictor.profile(
        *(query, key, None, weights, shares, layout, groups),
        **{"chosen_by": chosen_by, "mass": mass, "scale": 0.5, "turn": 0},
    )
    rows = (0.5 * query[0, :video] @ key[0].T).softmax(-1).double()
    predicted = (query[0, :video] @ weights[0]) @ (key[0, :video] @ weights[1]).T
    counts = []
    for row in rows.tolist():
        total, count = 0.0, 0
        for weight in sorted(row, reverse=True):
            if total >= mass:
                break
            total, count = total + weight, count + 1
        counts.append(count)
    assert float(seen.critical) == pytest.approx(sum(counts) / 32 / layout.tokens)
    top = math.ceil(sum(counts) / 32 / layout.tokens * video - 1e-5)
    for g, group in enumerate(groups):
        held, missed, shared = *torch.zeros(2, video, dtype=torch.float64), 0
        middle_of = middles((2, 4, 4), group)
        for token, middle in enumerate(middle_of):
            votes = predicted[middle].double()
            if chosen_by == "all":
                votes = sum(
                    (0.5 * predicted[i].double()).softmax(-1) for i in range(32) if middle_of[i] == middle
                )
            ranked = sorted(range(video), key=lambda j, votes=votes: (-float(votes[j]), j))
            of_token = rows[token, video:].sum() + rows[token, ranked].cumsum(0)
            held, missed = held + of_token, missed + (1 - of_token).square()
            best = [
                set(sorted(range(video), key=lambda j, t=t: (-float(rows[t, j]), j))[:top])
                for t in (token, middle)
            ]
            shared += len(best[0] & best[1])
        held, missed = held / 32, missed / 32
        for i, share in enumerate(predictor.SHARES):
            count = max(1, round(share * video))
            assert float(seen.missed[g, i, 0]) == pytest.approx(float(missed[count - 1]), abs=1e-5)
        assert float(seen.overlap[g, 0]) == pytest.approx(shared / 32 / top, abs=1e-5)
        assert float(seen.kept[g, 0]) == pytest.approx(float(held[round(0.3 * video) - 1]), abs=1e-5)


def test_the_share_that_keeps_a_mass_is_read_off_the_curve():
    """Of curves that bend downwards it is no less than the least share that keeps the mass, and at most the next
    measured one; at the ends it is the first share and all keys."""
    shares = torch.tensor(predictor.SHARES)
    for power in (0.1, 0.3, 0.8):
        found = float(predictor.shares_to_keep(0.9, (1 - shares**power).square()))
        exact = 0.9 ** (1 / power)
        assert exact - 1e-6 <= found <= max(exact * 2**0.5, predictor.SHARES[0])
        assert found**power >= 0.9 - 1e-6
    assert float(predictor.shares_to_keep(0.5, (0.4 - 0.4 * shares).square())) == pytest.approx(
        predictor.SHARES[0]
    )
    assert float(predictor.shares_to_keep(1.0, (1 - 0.99 * shares).square())) == 1.0


def test_turns_look_at_all_cubes():
    layout = TokenLayout(tokens=4 * 8 * 8, grid=(4, 8, 8))
    seen = [predictor.sampled_tokens(layout, (2, 4, 4), turn) for turn in range(8)]
    assert torch.cat(seen).unique().numel() == layout.tokens
    assert all(tokens.numel() == 32 for tokens in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"mass": 0.0}, "mass must be a number in"),
        ({"mass": 1.5}, "mass must be a number in"),
        ({"chosen_by": "corner"}, "chosen_by must be one of all, middle, got 'corner'"),
        ({"query_group": (2, 2)}, "query_group must be three integers"),
        ({"query_group": (2, 0, 2)}, "query_group must be an integer of at least 1"),
        ({"kv_budget": 0}, "kv_budget must be an integer of at least 1 or a share"),
        ({"kv_budget": 1.2}, "kv_budget must be an integer of at least 1 or a share"),
        ({"predictor": 3}, "predictor must be the path of a file"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Dsv(**options)


def test_options_that_do_not_fit_the_site():
    layout = TokenLayout(tokens=20, grid=(1, 4, 5))
    site = site_of(torch.empty(1, 2, 20, 8))
    with pytest.raises(OptionError, match="rank must be at most the head dim 8, got 16"):
        Dsv(rank=16).fit(site, layout)
    assert Dsv().fit(site, layout).rank == 8
    with pytest.raises(OptionError, match="kv_budget must be at most the 20 tokens of the video, got 21"):
        Dsv(rank=4, kv_budget=21).fit(site, layout)


def test_a_predictors_file(tmp_path: Path) -> None:
    layout = TokenLayout(tokens=20, grid=(1, 4, 5))
    path = tmp_path / "predictor.safetensors"
    trained = predictor.Trained(
        weights=torch.randn(4, 8, 3), shares=torch.tensor([0.3, 1.0]), group=(1, 2, 2), chosen_by="middle"
    )
    predictor.save_predictor(path, {"here": trained})
    site = site_of(torch.empty(1, 2, 20, 8))
    method = Dsv(predictor=path).fit(site, layout)
    assert (method.rank, method.query_group, method.width(20)) == (3, (1, 2, 2), 16)
    assert (method.chosen_by, Dsv(predictor=path, chosen_by="all").fit(site, layout).chosen_by) == (
        "middle",
        "all",
    )
    assert not method.learns
    learned = method.trained(site, layout)
    assert torch.equal(learned["weights"], trained.weights)
    assert torch.equal(learned["shares"], trained.shares)
    less = Dsv(predictor=path, kv_budget=5, rank=3).fit(site, layout)
    assert less.trained(site, layout)["shares"].tolist() == [0.25, 1.0]
    with pytest.raises(
        OptionError,
        match="rank must be that of the predictor's file, 3, or left out, got 4: for another rank",
    ):
        Dsv(predictor=path, rank=4).fit(site, layout)
    with pytest.raises(OptionError, match=r"knows no attention 'there' but here"):
        Dsv(predictor=path).fit(site_of(torch.empty(1, 2, 20, 8), name="there"), layout)
    with pytest.raises(OptionError, match="is of another model"):
        Dsv(predictor=path).fit(site_of(torch.empty(1, 4, 20, 8)), layout)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OptionError, match="predictor must be a safetensors file"):
        Dsv(predictor=path).fit(site, layout)
    with pytest.raises(OptionError, match="predictor must be a safetensors file"):
        Dsv(predictor=tmp_path / "none").fit(site, layout)


def test_widths_are_powers_of_two():
    fitted = partial(FittedDsv, rank=16, chosen_by="all")
    for most in (0.26, 0.3, 0.5):
        assert fitted().settle(Choice((2, 2, 2), 0.5, "all")).width(100) == 64, most
    assert fitted(kv_budget=65).width(100) == 128
