"""The prediction op on every provider, against brute force in float64.

The Triton provider needs a GPU, or the interpreter: `test_triton_in_the_interpreter` runs this file again in
a process that has it.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from any_provider import (
    HAS_TRITON,
    IS_SLOW,
    POISONED,
    device_of,
    examples,
    opcheck,
    pass_in_the_interpreter,
    threads_of_torch,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.errors import OptionError, ProviderError
from sparsify_compiler.kernels import providers
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.kernels.prediction import cpu, top_k_keys

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

LOWEST = torch.finfo(torch.float32).min
UNIT = 2.0**-24
"""Largest relative error of one operation in fp32."""

any_example = examples(4, 30)
pytestmark = POISONED


def budgets(*values: Any) -> Tensor:
    """[1, H] from numbers, or [B, H] from lists of them."""
    return torch.tensor(values if isinstance(values[0], list) else [values], dtype=torch.int32)


def run(provider: str, query: Tensor, key: Tensor, budget: Tensor, *, key_bias: Tensor | None = None, **more):
    device = device_of(provider)
    key_bias = key_bias if key_bias is None else key_bias.to(device)
    found = top_k_keys(
        *(t.to(device) for t in (query, key, budget)), key_bias=key_bias, provider=provider, **more
    )
    return tuple(t.cpu() for t in found)


def exact_scores(query: Tensor, key: Tensor, scale: float, key_bias: Tensor | None) -> Tensor:
    """[B, H, G, S] float64, from the definition, for finite queries and keys."""
    batch, heads = query.shape[:2]
    scores = torch.empty(*query.shape[:3], key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            of = h * key.shape[1] // heads
            scores[b, h] = scale * (query[b, h].double() @ key[b, of].double().T)
            if key_bias is not None:
                scores[b, h] += key_bias[b % key_bias.shape[0], h % key_bias.shape[1]].double()
    return scores


def best(scores: list[float], wanted: int) -> list[int]:
    """The indices of the highest scores above -inf, of equal ones the first, by rising index."""
    visible = [j for j, score in enumerate(scores) if score > -math.inf]
    return sorted(sorted(visible, key=lambda j: (-scores[j], j))[: max(wanted, 0)])


def rows(found: tuple[Tensor, ...]) -> list[list[int]]:
    """What is chosen in every row; the zeros beyond are checked."""
    counts, indices = found
    assert counts.dtype == indices.dtype == torch.int32
    assert indices.shape[:3] == counts.shape
    result = []
    for count, row in zip(counts.flatten().tolist(), indices.flatten(0, 2).tolist(), strict=True):
        assert 0 <= count <= len(row)
        assert not any(row[count:])
        result.append(row[:count])
    return result


def assert_best(
    found: tuple[Tensor, ...],
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    scale: float,
    key_bias,
    *,
    slack=0.0,
) -> None:
    """Every row is the best choice, except among scores within `slack` [B, H, G, S] of each other."""
    scores = exact_scores(query, key, scale, key_bias)
    width = found[1].shape[-1]
    wanted = budget.expand(scores.shape[:2])[:, :, None].expand(scores.shape[:3])
    slack = torch.as_tensor(slack).expand(scores.shape[:3])
    for chosen, score, budget_of_row, close in zip(
        rows(found),
        scores.flatten(0, 2).tolist(),
        wanted.flatten().tolist(),
        slack.flatten().tolist(),
        strict=True,
    ):
        expected = best(score, min(budget_of_row, width))
        if close == 0.0:
            assert chosen == expected
            continue
        assert len(chosen) == len(expected)
        assert chosen == sorted(set(chosen))
        least = min((score[j] for j in chosen), default=math.inf)
        most = max((score[j] for j in set(expected) - set(chosen)), default=-math.inf)
        assert least > -math.inf
        assert most <= least + close


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """(query, key, budget, others) in standard normal numbers, in shapes that divide by nothing.

    Query and key are slices of [B, S, H, R] with NaN outside of them.
    """
    layouts = [(1, 1, 1), (2, 1, 1), (1, 1, 2), *([] if IS_SLOW else [(2, 2, 3)])]
    batch, kv_heads, per_key_head = draw(st.sampled_from(layouts))
    heads, random = kv_heads * per_key_head, torch.Generator().manual_seed(draw(st.integers(0, 999)))
    groups = draw(st.sampled_from([1, 5, 17] if IS_SLOW else [0, 1, 7, 24, 25, 70]))
    tokens = draw(st.sampled_from([1, 31, 65] if IS_SLOW else [1, 2, 16, 63, 64, 129, 517]))
    rank = draw(st.sampled_from([1, 3, 16, 24, 64]))
    width = draw(st.sampled_from([1, 8, 64, 1024]))

    def inside(count: int, of_heads: int) -> Tensor:
        whole = torch.full((batch, count + 5, of_heads, rank + 1), torch.nan)
        whole[:, 3:-2, :, 1:] = torch.randn(batch, count, of_heads, rank, generator=random)
        return whole.to(dtype).transpose(1, 2)[:, :, 3:-2, 1:]

    dtype = draw(st.sampled_from(DTYPES))
    query, key = inside(groups, heads), inside(tokens, kv_heads)
    lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    budget = torch.randint(-1, tokens + 3, lead, generator=random, dtype=torch.int32)
    budget.flatten()[: draw(st.integers(0, 1))] = draw(st.sampled_from([0, 1, tokens]))
    key_bias = None
    if draw(st.booleans()):
        lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
        key_bias = torch.randn(*lead, tokens, generator=random).to(draw(st.sampled_from(DTYPES)))
        hidden = torch.rand(*lead, tokens, generator=random) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        key_bias[hidden] = -torch.inf
    scale = draw(st.sampled_from([1.0, 0.25, -0.5]))
    return query, key, budget, {"key_bias": key_bias, "scale": scale, "width": width}


@any_example
@given(problem=problems())
def test_integers_with_many_ties_are_chosen_exactly(provider, problem):
    query, key, budget, others = problem
    query, key = query.round(), key.round()
    bias = others["key_bias"] = (
        others["key_bias"] if others["key_bias"] is None else others["key_bias"].round()
    )
    found = run(provider, query, key, budget, **others)
    assert_best(found, query, key, budget, others["scale"], bias)


@any_example
@given(problem=problems())
def test_the_best_scores_are_chosen(provider, problem):
    query, key, budget, others = problem
    scale, bias = others["scale"], others["key_bias"]
    found = run(provider, query, key, budget, **others)
    sizes = exact_scores(query.abs(), key.abs(), abs(scale), None).amax(-1)
    largest_bias = 0.0 if bias is None else bias.float().nan_to_num(neginf=0.0).abs().max().item()
    slack = 2 * (query.shape[3] + 2) * UNIT * (sizes + largest_bias)
    assert_best(found, query, key, budget, scale, bias, slack=slack)


@any_example
@given(problem=problems())
def test_a_larger_budget_chooses_what_a_smaller_one_does_and_more(provider, problem):
    query, key, budget, others = problem
    fewer = run(provider, query, key, budget, **others)
    more = run(provider, query, key, budget + 3, **others)
    for small, large in zip(rows(fewer), rows(more), strict=True):
        assert set(small) <= set(large)


EXTREMES = [0.0, -0.0, 1.0, -1.0, LOWEST, -LOWEST, 1e-40, -1e-40, math.inf, -math.inf, math.nan]


@any_example
@given(
    scores=st.lists(st.floats(width=32) | st.sampled_from(EXTREMES), min_size=1, max_size=50),
    budget=st.integers(0, 50),
    hides=st.booleans(),
)
@example(scores=[math.nan, 2.0, LOWEST, -math.inf, LOWEST, math.nan], budget=3, hides=False)
@example(scores=[math.nan, 2.0, LOWEST, -math.inf, LOWEST, math.nan], budget=6, hides=False)
@example(scores=[-0.0, 0.0, -1e-40, -0.0, 0.0], budget=3, hides=False)
@example(scores=[math.inf, 1.0, math.inf, -LOWEST, math.inf], budget=2, hides=False)
@example(scores=[math.nan, math.inf, -math.inf, 1.0, math.nan], budget=3, hides=True)
@example(scores=[-math.inf] * 40, budget=20, hides=False)
def test_every_number_has_its_place(provider, scores, budget, hides):
    """Rank 1 and query 1, so keys are scores."""
    key, query = torch.tensor(scores)[None, None, :, None], torch.ones(1, 1, 1, 1)
    bias = torch.zeros(1, 1, len(scores))
    bias[0, 0, ::3] = -torch.inf
    found = run(provider, query, key, budgets(budget), width=64, key_bias=bias if hides else None)
    counted = [LOWEST if math.isnan(score) else score for score in scores]
    if hides:
        counted[::3] = [-math.inf] * len(counted[::3])
    assert rows(found) == [best(counted, budget)]


def test_budgets_of_heads(provider):
    """None, one, some, all, more than all; where nothing is wanted, not even NaN is looked at."""
    tokens, values = 19, torch.arange(19.0)
    query, key = torch.ones(2, 3, 2, 1), values.repeat(2, 3, 1)[..., None]
    key[0, 0], key[1, 2] = torch.nan, -values[:, None]
    counts, indices = run(provider, query, key, budgets([0, 1, 7], [tokens, 99, 2]), width=32)
    assert counts.tolist() == [[[0, 0], [1, 1], [7, 7]], [[19, 19], [19, 19], [2, 2]]]
    assert indices[0, 1, :, 0].tolist() == [18, 18]
    assert indices[0, 2, 1, :7].tolist() == [12, 13, 14, 15, 16, 17, 18]
    assert indices[1, 0, 0, :tokens].tolist() == list(range(tokens))
    assert indices[1, 2, 0, :2].tolist() == [0, 1]


def test_a_row_has_no_more_room_than_its_width(provider):
    key = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])[None, None, :, None]
    counts, indices = run(provider, torch.ones(1, 1, 2, 1), key, budgets(5), width=2)
    assert counts.tolist() == [[[2, 2]]]
    assert indices.tolist() == [[[[0, 2], [0, 2]]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_any_kind(provider, dtype):
    random = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, 9, 16, generator=random).to(dtype)
    key, bias = torch.randn(2, 1, 30, 16, generator=random).to(dtype), torch.randn(2, 1, 30, generator=random)
    chosen = {"width": 16, "scale": 0.25}
    expected = run(provider, query, key, budgets(9, 4), key_bias=bias, **chosen)
    spaced = torch.stack([bias, bias * torch.nan], -1)[..., 0]
    shared = budgets([9, 9], [4, 4]).T
    got = run(provider, query.mT.contiguous().mT, key.mT.contiguous().mT, shared, key_bias=spaced, **chosen)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    alone = run(provider, query[:1], key[:1], budgets(9, 4), key_bias=bias[:1], **chosen)
    both = run(
        provider, query[:1].expand_as(query), key[:1].expand_as(key), shared, key_bias=bias[:1], **chosen
    )
    for one, two in zip(alone, both, strict=True):
        assert torch.equal(one.expand_as(two), two)


def test_float64_on_the_reference():
    query = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    key = torch.tensor([1.0, 1.0 + 1e-12, 1.0], dtype=torch.float64)[None, None, :, None]
    assert rows(run("reference", query, key, budgets(1), width=1)) == [[1]]
    assert rows(run("reference", query.float(), key.float(), budgets(1), width=1)) == [[0]]


def group_scores(query: Tensor, key: Tensor, bounds: list[int], scale: float, bias: Tensor | None) -> Tensor:
    """[B, H, G, S] float64: the attention of the queries of a group, one after the other, added up."""
    scores = exact_scores(query, key, scale, bias)
    totals = torch.full((*scores.shape[:2], len(bounds) - 1, scores.shape[3]), -math.inf, dtype=torch.float64)
    for g, (first, last) in enumerate(itertools.pairwise(bounds)):
        for i in range(first, last):
            for b, h in itertools.product(*map(range, scores.shape[:2])):
                visible = scores[b, h, i] > -math.inf
                if not visible.any():
                    continue
                weights = (scores[b, h, i] - scores[b, h, i].max()).exp()
                added = totals[b, h, g].clamp(min=0.0) + weights / weights.sum()
                totals[b, h, g] = torch.where(visible, added, totals[b, h, g])
    return totals


@any_example
@given(problem=problems(), data=st.data())
def test_groups_read_what_their_queries_attend_to_together(provider, problem, data):
    """The attention that a choice catches is at most a rounding below the best that as many keys catch."""
    query, key, budget, others = problem
    queries, bias = query.shape[2], others["key_bias"]
    inner = data.draw(st.lists(st.integers(0, queries), max_size=6))
    bounds = sorted([0, queries, *inner])  # of equal ones, groups of nothing
    q_bounds = torch.tensor(bounds, dtype=torch.int32, device=device_of(provider))
    found = run(provider, query, key, budget, q_bounds=q_bounds, **others)
    totals = group_scores(query, key, bounds, others["scale"], bias).flatten(0, 2)
    sizes = exact_scores(query.abs(), key.abs(), abs(others["scale"]), None)
    largest = 0.0 if sizes.numel() == 0 else float(sizes.max())
    slack = 4 * (query.shape[3] + 8) * UNIT * (1 + largest + 8)
    wanted = budget.expand(query.shape[:2])[:, :, None].expand(*query.shape[:2], len(bounds) - 1).flatten()
    for chosen, total, most in zip(rows(found), totals, wanted.tolist(), strict=True):
        expected = best(total.tolist(), min(most, others["width"]))
        assert len(chosen) == len(expected)
        assert chosen == sorted(set(chosen))
        assert (total[chosen] > -math.inf).all()
        assert float(total[chosen].sum()) >= float(total[expected].sum()) * (1 - slack) - 1e-30


def test_many_groups_of_many_sizes():
    """More groups than a thread takes at once are as in the definition, except where rounding equals scores."""
    random = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, size, 8, generator=random) for size in (300, 90))
    inner = torch.randint(0, 301, (59,), generator=random).sort().values
    bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([300])]).int()
    found, expected = (
        run(name, query, key, budgets(7, 30), width=32, q_bounds=bounds) for name in ("cpu", "reference")
    )
    assert torch.equal(found[0], expected[0])
    differ = (found[1] != expected[1]).any(-1)
    assert int(differ.sum()) <= 1


def test_a_group_of_one_reads_what_its_query_does(provider):
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, size, 16, generator=random) for size in (9, 70))
    alone = run(provider, query, key, budgets(7, 20), width=32)
    grouped = run(
        provider, query, key, budgets(7, 20), width=32,
        q_bounds=torch.arange(10, dtype=torch.int32, device=device_of(provider)),
    )  # fmt: skip
    assert all(torch.equal(got, was) for got, was in zip(grouped, alone, strict=True))


def test_what_one_query_needs_is_read_for_all(provider):
    """Two queries, each with keys of its own: their middle would read neither's."""
    query = torch.tensor([[[[8.0, 0.0], [0.0, 8.0]]]])
    key = torch.tensor([[[[1.0, 0.0], [0.9, 0.9], [0.0, 1.0], [0.8, 0.8], [-1.0, -1.0]]]])
    key = key * 4
    together = torch.tensor([0, 2], dtype=torch.int32, device=device_of(provider))
    assert rows(run(provider, query, key, budgets(2), width=2, q_bounds=together)) == [[0, 2]]
    assert rows(run(provider, query.mean(2, keepdim=True), key, budgets(2), width=2)) == [[1, 3]]


def test_infinities_in_a_group(provider):
    """To the first query keys 0 to 3 are infinite, each a quarter of its attention, or nothing where its sign
    is changed; the second gives nearly all to key 4, and the third, of NaN, all keys alike.
    """
    query = torch.tensor([[3e38, 0.0], [0.0, 5.0], [math.nan, 0.0], [-3e38, 0.0], [0.0, 5.0], [-3e38, 0.0]])
    key = torch.zeros(1, 1, 9, 2)
    key[0, 0, :4, 0], key[0, 0, 4, 1] = 2.0, 1.0
    bounds = torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32, device=device_of(provider))
    for wanted, expected in (
        (1, [[4], [], [4], [4]]),
        (3, [[0, 1, 4], [], [4, 5, 6], [4, 5, 6]]),
        (9, [list(range(9)), [], list(range(9)), list(range(9))]),
    ):
        found = run(provider, query[None, None], key, budgets(wanted), width=16, q_bounds=bounds)
        assert rows(found) == expected


def test_groups_of_heads_that_choose_nothing(provider):
    """Their tokens are not looked at."""
    query, key = torch.ones(1, 2, 5, 1), torch.arange(7.0).repeat(1, 2, 1)[..., None]
    key[:, 0] = torch.nan
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device_of(provider))
    found = run(provider, query, key, budgets(0, 2), width=4, q_bounds=bounds)
    assert rows(found) == [[], [], [5, 6], [5, 6]]


@pytest.mark.skipif(not HAS_TRITON, reason="needs a GPU or the interpreter")
def test_triton_takes_groups_a_few_at_a_time(monkeypatch):
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, size, 3, generator=random) for size in (20, 40))
    bounds = torch.tensor([0, 1, 1, 3, 4, 7, 9, 16, 16, 20], dtype=torch.int32, device=device_of("triton"))
    chosen = {"width": 16, "q_bounds": bounds}
    at_once = run("triton", query, key, budgets(11), **chosen)
    launches = providers.load("triton", "prediction")
    monkeypatch.setattr(launches, "SCORES_AT_ONCE", 2 * 64)  # two programs
    in_turn = run("triton", query, key, budgets(11), **chosen)
    assert all(torch.equal(got, was) for got, was in zip(in_turn, at_once, strict=True))


@pytest.mark.skipif(not IS_SLOW, reason="needs the interpreter, where a kernel's functions can be replaced")
@pytest.mark.parametrize("budget", [3, 40])
def test_triton_writes_no_more_than_was_asked_for_whatever_the_last_pass_finds(monkeypatch, budget):
    """The pass that writes sees other scores than the passes before it: all keys are better than the threshold."""
    from sparsify_compiler.kernels.prediction import triton as launches
    from sparsify_compiler.kernels.prediction import triton_kernels as kernels

    scores, seen = kernels._scores, []

    def changed(*arguments):
        seen.append(arguments)
        return scores(*arguments) + (1e6 if len(seen) > 3 * 2 else 0.0)

    monkeypatch.setattr(kernels, "_scores", changed)
    query, key = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 40, 16)  # two tiles of keys, each seen 4 times
    counts = torch.full((1, 1, 5), -1, dtype=torch.int32)
    memory = torch.full((1, 1, 5, 64), -1, dtype=torch.int32)
    inputs = launches.scored(query, key, budgets(budget), None, 0.25)
    launches.choose(inputs, counts, memory[..., :4])()
    wanted = min(budget, 4)
    assert len(seen) == 4 * 2
    assert counts.tolist() == [[[wanted] * 5]]
    assert memory[0, 0, :, :wanted].tolist() == [[*range(wanted)]] * 5
    assert (memory[..., wanted:] == -1).all()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_threads(dtype, grouped):
    random = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 30, 31, 77, 100], dtype=torch.int32) if grouped else None
    query, key = (torch.randn(2, 2, size, 16, generator=random).to(dtype) for size in (100, 700))
    results = []
    for count in (1, 2, 3):
        with threads_of_torch(count):
            results.append(run("cpu", query, key, budgets(50), width=64, q_bounds=bounds))
    for result in results[1:]:
        assert all(torch.equal(got, was) for got, was in zip(result, results[0], strict=True))


def test_opcheck_with_strided_views(provider):
    device = device_of(provider)
    query, key = (torch.randn(1, size, 2, 16, device=device).transpose(1, 2) for size in (5, 20))
    bias = torch.randn(1, 2, 40, device=device)[..., ::2]
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    for some_bias, some_bounds in ((None, None), (bias, None), (bias, bounds)):
        arguments = (query, key[:, :1], budgets(3, 7).to(device), some_bounds, some_bias, 8, 0.25, provider)
        opcheck(torch.ops.sparsify.top_k_keys.default, arguments)


def test_autocast_and_autograd_change_nothing(provider):
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, size, 16, generator=random) for size in (6, 60))
    bias = torch.randn(1, 1, 60, generator=random)
    plain = run(provider, query, key, budgets(13), key_bias=bias, width=16)
    query, key, bias = (t.requires_grad_() for t in (query, key, bias))
    with torch.autocast(device_of(provider), torch.bfloat16):
        results = run(provider, query, key, budgets(13), key_bias=bias, width=16)
    for got, was in zip(results, plain, strict=True):
        assert torch.equal(got, was)
        assert not got.requires_grad


def test_one_program_serves_every_budget(provider):
    device = device_of(provider)
    query, key = (torch.randn(1, 1, size, 16, device=device) for size in (3, 30))
    program = torch.compile(
        lambda budget: torch.ops.sparsify.top_k_keys(query, key, budget, None, None, 8, 1.0, provider),
        backend="aot_eager",
        fullgraph=True,
    )
    for wanted in (5, 2, 0):
        with torch.compiler.set_stance("default" if wanted == 5 else "fail_on_recompile"):
            got = program(budgets(wanted).to(device))
        expected = run(provider, query, key, budgets(wanted), width=8)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))


def test_without_a_compiler_the_definition_runs(monkeypatch):
    monkeypatch.setattr(library, "symbol", lambda *_: None)
    query, key = torch.ones(1, 2, 3, 4), torch.arange(6.0)[None, None, :, None].expand(1, 1, 6, 4)
    counts, indices = cpu.top_k_keys(query, key, budgets(2), None, None, 4, 1.0)
    assert (counts == 2).all()
    assert (indices == torch.tensor([4, 5, 0, 0])).all()


QUERY, KEY = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 5, 8)
BIAS = torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"query": QUERY[0]},
            ValueError,
            r"query must be a float tensor \[B, H, Q, R\].* got float32 \[4, 6",
        ),
        ({"query": QUERY.int()}, ValueError, r"got int32 \[2, 4, 6, 8\]"),
        ({"query": QUERY[..., :0]}, ValueError, "with R >= 1"),
        ({"query": QUERY.double(), "key": KEY.double(), "provider": "cpu"}, ProviderError, "dtype"),
        ({"key": KEY[0]}, ValueError, r"key must be float32 \[2, Hkv, S, 8\].* got float32 \[2, 5, 8\]"),
        ({"key": KEY[:1]}, ValueError, r"key must be float32 \[2, Hkv, S, 8\].* got float32 \[1, 2, 5, 8\]"),
        ({"key": KEY[..., :4]}, ValueError, "key must be"),
        ({"key": KEY.half()}, ValueError, "got float16"),
        ({"key": KEY[:, :, :0]}, ValueError, "at least one token"),
        ({"key": QUERY[:, :3, :5]}, ValueError, "multiple of key heads, got 4 and 3"),
        ({"key": KEY[:, :0]}, ValueError, "multiple of key heads, got 4 and 0"),
        ({"budget": budgets(1).long()}, ValueError, r"budget must be int32 \[1 or 2, 1 or 4\], got int64"),
        ({"budget": budgets(1, 2)}, ValueError, r"budget must be .* got int32 \[1, 2\]"),
        ({"budget": budgets(1)[0]}, ValueError, r"budget must be .* got int32 \[1\]"),
        ({"budget": budgets(1).to("meta")}, ValueError, "on one device, .* budget on meta"),
        (
            {"key_bias": BIAS.int()},
            ValueError,
            r"key_bias must be a float tensor \[1 or 2, 1 or 4, 5\] or None",
        ),
        ({"key_bias": BIAS[..., :4]}, ValueError, r"key_bias must be .* got float32 \[2, 4, 4\]"),
        ({"key_bias": BIAS[:, :3]}, ValueError, "key_bias must be"),
        ({"key_bias": BIAS[0]}, ValueError, "key_bias must be"),
        ({"key_bias": BIAS.to("meta")}, ValueError, "key_bias on meta"),
        (
            {"q_bounds": budgets(0, 6)},
            ValueError,
            r"q_bounds must be int32 \[G \+ 1\] or None, got int32 \[1, 2\]",
        ),
        ({"q_bounds": torch.zeros(3)}, ValueError, r"q_bounds must be .* got float32 \[3\]"),
        ({"q_bounds": budgets(0, 6)[0].to("meta")}, ValueError, "q_bounds on meta"),
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"provider": "gpu"}, OptionError, "provider 'gpu'"),
    ],
)
def test_refuses(change: dict[str, Any], error: Any, words: str) -> None:
    arguments: dict[str, Any] = {
        **{"query": QUERY, "key": KEY, "budget": budgets(1), "key_bias": BIAS},
        **{"width": 4, "provider": "reference"},
    } | change
    with pytest.raises(error, match=words):
        top_k_keys(**arguments)


@pytest.mark.skipif(HAS_TRITON, reason="its cases run in this process")
def test_triton_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "triton")
