"""The far field over any table and any blocks, against its formulas token by token."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from any_provider import POISONED, pass_in_the_interpreter
from cpu_problems import uniform_table
from far_field_cases import DTYPES, EXAMPLES, FEW, INTERPRETED, PROVIDERS, TOLERANCE, problems, some_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import BlockTable
from sparsify_compiler.errors import OptionError
from sparsify_compiler.kernels import attention, providers
from sparsify_compiler.kernels import far_field as far_field_ops
from sparsify_compiler.kernels.far_field import FAR_FIELDS, attention_with_far_field
from sparsify_compiler.kernels.far_field.near_and_far import merge_far_field
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks
from sparsify_compiler.testing import far_fields, oracles
from sparsify_compiler.testing.strategies import qkv, tables

pytestmark = POISONED


@pytest.mark.parametrize("provider", PROVIDERS)
@given(problem=problems(), far_field=st.sampled_from(FAR_FIELDS))
@settings(max_examples=EXAMPLES)
def test_equals_the_formulas(provider, problem, far_field):
    query, key, value, table, bias = problem
    exact = oracles.far_field_attention(query, key, value, table, far_field, key_bias=bias)
    got = attention_with_far_field(
        query, key, value, table, far_field=far_field, key_bias=bias, provider=provider, sampled_rows=0
    )
    tolerance = TOLERANCE[query.dtype]
    for one, like in zip(got[:2], exact, strict=True):
        torch.testing.assert_close(one.double(), like, rtol=tolerance, atol=tolerance)
    assert got[0].transpose(1, 2).is_contiguous()
    assert got[2].recall.isnan().all()


@st.composite
def partly_read(draw: st.DrawFn):
    """(query, key, value, table of single keys, bias, cubes of keys, `FarBlocks`): any choice, keys hidden too."""
    batch, heads = 2, 2 if INTERPRETED else 4
    kv_heads, tokens = draw(st.sampled_from([1, heads])), draw(st.sampled_from([12, 21]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    q_sizes = torch.tensor(draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    hidden = torch.rand(batch, draw(st.sampled_from([1, heads])), tokens, generator=g) < draw(
        st.sampled_from([0.0, 0.3])
    )
    bias = torch.randn(hidden.shape, generator=g).masked_fill(hidden, -torch.inf) if hidden.any() else None
    share = torch.rand(batch, heads, len(q_sizes), 1, generator=g) * draw(st.sampled_from([0.0, 0.6, 1.6]))
    read = (torch.rand(batch, heads, len(q_sizes), tokens, generator=g) < share) & ~hidden[:, :, None]
    table = BlockTable.from_block_mask(read, q_sizes[None, None], torch.ones(1, 1, tokens))
    edges = sorted({0, tokens, *draw(st.lists(st.integers(0, tokens), max_size=3))})
    order = torch.randperm(tokens, generator=g)
    cubes = [order[x:y].tolist() for x, y in itertools.pairwise(edges)]
    blocks = FarBlocks(
        order[None, None].int(),
        torch.tensor(edges)[None, None].int(),
        keys=torch.stack([(~hidden[:, :, cube]).sum(-1).int() for cube in cubes], -1),
        left=torch.stack([(~hidden[:, :, None] & ~read)[..., cube].sum(-1).int() for cube in cubes], -1),
    )
    tensors = qkv(batch, heads, kv_heads, int(q_sizes.sum()), tokens, 16, 8, dtype)
    return *tensors, table, bias, cubes, blocks


@pytest.mark.parametrize("provider", PROVIDERS)
@given(problem=partly_read(), far_field=st.sampled_from(["mean", "linear"]))
@settings(max_examples=EXAMPLES)
def test_blocks_answer_for_as_many_keys_as_are_left_of_them(provider, problem, far_field):
    query, key, value, table, bias, cubes, blocks = problem
    exact = oracles.far_field_attention(query, key, value, table, far_field, cubes=cubes, key_bias=bias)
    options = {"far_field": far_field, "key_bias": bias, "provider": provider, "sampled_rows": 0}
    got = attention_with_far_field(query, key, value, table, far_blocks=blocks, **options)
    tolerance = TOLERANCE[query.dtype]
    for one, like in zip(got[:2], exact, strict=True):
        torch.testing.assert_close(one.double(), like, rtol=tolerance, atol=tolerance)


def test_far_blocks_that_do_not_fit():
    query, key, value = qkv(1, 2, 2, 12, 12, 8, 8, torch.float32)
    table = BlockTable.from_block_mask(
        torch.eye(3, 12).bool()[None, None], torch.full((1, 1, 3), 4), torch.ones(1, 1, 12)
    )
    good = FarBlocks(
        torch.arange(12, dtype=torch.int32)[None, None],
        torch.tensor([[[0, 5, 12]]], dtype=torch.int32),
        keys=torch.tensor([[[5, 7]]], dtype=torch.int32),
        left=torch.full((1, 2, 3, 2), 5, dtype=torch.int32),
    )
    attention_with_far_field(query, key, value, table, far_field="mean", far_blocks=good)
    bad: dict[str, list[Any]] = {
        "order": [good.order[..., :5], good.order.long(), good.order[0]],
        "bounds": [good.bounds.expand(2, -1, -1), good.bounds[..., :2]],
        "keys": [good.keys[..., :1], good.keys.float(), good.keys.expand(3, -1, -1)],
        "left": [good.left[..., :1], good.left[:, :1], good.left[:, :, :2], good.left.long()],
    }
    for name, tensors in bad.items():
        for tensor in tensors:
            with pytest.raises(ValueError, match="of far_blocks must be int32"):
                attention_with_far_field(
                    *(query, key, value, table),
                    far_field="linear",
                    far_blocks=good._replace(**{name: tensor}),
                )
    for others in ({"far_field": "drop"}, {"far_field": "linear", "min_gain": 0.1}):
        with pytest.raises(ValueError, match="far_blocks are for a far field, without min_gain"):
            attention_with_far_field(query, key, value, table, far_blocks=good, **others)
    # More than there is counts as all there is.
    most, all_ = (
        attention_with_far_field(
            *(query, key, value, table), far_field="mean", far_blocks=good._replace(left=good.left * 0 + left)
        )[0]
        for left in (10**6, 7)
    )
    assert torch.equal(most, all_)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_gradients_flow_to_the_keys_that_are_left(provider, far_field):
    """The gradients are those of the formulas, by autograd in float64; sampled rows are in both tables."""
    query, key, value = (t.requires_grad_() for t in qkv(1, 2, 2, 12, 12, 16, 16, torch.float32))
    read = torch.rand(1, 2, 3, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    table = BlockTable.from_block_mask(read, torch.full((1, 1, 3), 4), torch.ones(1, 1, 12))
    cubes = [[0, 3, 4, 7, 11], [1, 2, 5, 6, 8, 9, 10]]
    blocks = FarBlocks(
        torch.tensor(cubes[0] + cubes[1])[None, None].int(),
        torch.tensor([[[0, 5, 12]]], dtype=torch.int32),
        keys=torch.tensor([[[5, 7]]], dtype=torch.int32),
        left=torch.stack([(~read)[..., cube].sum(-1).int() for cube in cubes], -1),
    )
    out, lse, report = attention_with_far_field(
        query, key, value, table, far_field=far_field, far_blocks=blocks, provider=provider, sampled_rows=12
    )
    assert (report.gate == 1).all()
    # The guard may leave the first order out of a head: the formulas have it in all or none.
    exact, exact_lse = oracles.far_field_attention(query, key, value, table, "mean", cubes=cubes)
    if far_field == "linear":
        out, lse, _ = attention_with_far_field(
            query,
            key,
            value,
            table,
            far_field=far_field,
            far_blocks=blocks,
            provider=provider,
            sampled_rows=0,
        )
        exact, exact_lse = oracles.far_field_attention(query, key, value, table, "linear", cubes=cubes)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weights).sum() + lse.sum(), (query, key, value))
    expected = torch.autograd.grad((exact * weights).sum() + exact_lse.sum(), (query, key, value))
    for one, like in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), like.double(), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("far_field", FAR_FIELDS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_reference_is_the_formulas_in_float64(far_field, data):
    table = data.draw(tables(batch=2, heads=2, q_tokens=15, kv_tokens=20))
    tensors = qkv(2, 2, 1, 15, 20, 4, 3, torch.float64)
    exact = oracles.far_field_attention(*tensors, table, far_field)
    got = attention_with_far_field(*tensors, table, far_field=far_field, provider="reference", sampled_rows=0)
    for one, like in zip(got[:2], exact, strict=True):
        torch.testing.assert_close(one, like, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("far_field", FAR_FIELDS)
def test_with_nothing_skipped_it_is_dense(provider, dtype, far_field):
    tensors = qkv(*FEW, 40, 40, 16, 24, dtype)
    table = uniform_table(torch.ones(4, 8, dtype=torch.bool), 10, 5)
    out, lse, report = attention_with_far_field(*tensors, table, far_field=far_field, provider=provider)
    oracles.assert_close_to_float64(out, lse, *tensors, torch.ones(40, 40, dtype=torch.bool))
    near = attention.block_sparse_attention(*tensors, table, provider=provider)
    assert torch.equal(out, near[0])
    assert torch.equal(lse, near[1])
    torch.testing.assert_close(report.recall, torch.ones(FEW[:2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_exact_where_the_keys_of_a_block_coincide(provider, far_field):
    query, key, value = qkv(1, 2, 2, 40, 40, 16, 16, torch.float32)
    table = some_table()
    order = table.kv_order[0, 0].long()
    key[:, :, order] = (
        key[:, :, order].unflatten(2, (8, 5))[:, :, :, :1].expand(-1, -1, -1, 5, -1).flatten(2, 3)
    )
    got = attention_with_far_field(query, key, value, table, far_field=far_field, provider=provider)
    mask = torch.ones(40, 40, dtype=torch.bool)
    exact = oracles.masked_attention(query, key, value, mask)
    for one, like in zip(got[:2], exact, strict=True):
        torch.testing.assert_close(one.double(), like, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data(), size=st.sampled_from([0.3, 1.0, 4.0]))
@settings(max_examples=EXAMPLES)
def test_a_mean_never_overweighs_the_far_field(provider, data, size):
    """Jensen: the mean of exponentials is at least the exponential of the mean."""
    query, key, value = (size * t for t in qkv(1, 2, 2, 30, 30, 8, 8, torch.float32))
    table = data.draw(tables(batch=1, heads=2, q_tokens=30, kv_tokens=30))
    _, lse, _ = attention_with_far_field(
        query, key, value, table, far_field="mean", provider=provider, sampled_rows=0
    )
    _, exact = oracles.masked_attention(query, key, value, torch.ones(30, 30, dtype=torch.bool))
    assert (lse <= exact + 1e-4 * (1 + exact.abs())).all()


@given(data=st.data(), size=st.sampled_from([0.3, 1.0, 4.0]))
@settings(max_examples=EXAMPLES)
def test_the_query_side_never_overweighs_the_far_field(data, size):
    query, key, value = (size * t for t in qkv(1, 2, 2, 30, 30, 8, 8, torch.float64))
    table = data.draw(tables(batch=1, heads=2, q_tokens=30, kv_tokens=30))
    _, lse = far_fields.query_side(query, key, value, table)
    _, exact = oracles.masked_attention(query, key, value, ~table.mask())
    assert (lse <= exact + 1e-9 * (1 + exact.abs().nan_to_num(posinf=0))).all()


def test_the_query_side_is_exact_where_the_queries_of_a_block_coincide():
    """Given exact statistics: key blocks of one token."""
    query, key, value = qkv(1, 2, 2, 40, 40, 16, 16, torch.float64)
    query = query[:, :, ::10].repeat_interleave(10, 2)
    table = uniform_table(torch.rand(4, 40, generator=torch.Generator().manual_seed(0)) < 0.5, 10, 1)
    got = far_fields.query_side(query, key, value, table)
    exact = oracles.masked_attention(query, key, value, ~table.mask())
    for one, like in zip(got, exact, strict=True):
        torch.testing.assert_close(one, like, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("provider", ["triton" if INTERPRETED else "reference"])
@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_gradients_are_those_of_the_formulas(provider, far_field):
    """The merge reads the lse of both fields, so theirs come with a gradient."""
    table, dtype = some_table(), torch.float32 if INTERPRETED else torch.float64
    rtol, atol = (1e-4, 1e-5) if INTERPRETED else (1e-8, 1e-9)
    tensors = [t.requires_grad_() for t in qkv(1, 2, 1, 40, 40, 4, 3, dtype)]
    gradients = []
    for out, lse, *_ in (
        attention_with_far_field(*tensors, table, far_field=far_field, provider=provider, sampled_rows=0),
        oracles.far_field_attention(*tensors, table, far_field),
    ):
        loss = (out * torch.linspace(-1, 1, 3)).sum() + lse.sin().sum()
        gradients.append(torch.autograd.grad(loss, tensors))
    for got, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(got, exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("far_field", FAR_FIELDS)
def test_deterministic(provider, far_field):
    tensors = qkv(1, 2, 2, 40, 40, 16, 16, torch.float32)
    first, second = (
        attention_with_far_field(*tensors, some_table(), far_field=far_field, provider=provider)
        for _ in range(2)
    )
    for one, other in zip((*first[:2], *first[2]), (*second[:2], *second[2]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="traced alike for every provider")
@pytest.mark.parametrize("far_field", FAR_FIELDS)
def test_compiles_without_a_break(far_field):
    tensors = qkv(1, 2, 1, 40, 40, 16, 16, torch.float32)
    table = some_table()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Any:
        out, lse, report = attention_with_far_field(query, key, value, table, far_field=far_field)
        return out, lse, *report

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, like in zip(compiled(*tensors), run(*tensors), strict=True):
        torch.testing.assert_close(got, like, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_autocast_leaves_statistics_alone(provider):
    tensors = qkv(1, 2, 2, 40, 40, 16, 16, torch.float32)
    low = [t.bfloat16() for t in tensors]
    like = attention_with_far_field(*low, some_table(), far_field="linear", provider=provider)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_with_far_field(*tensors, some_table(), far_field="linear", provider=provider)
    assert got[0].dtype == torch.bfloat16
    assert torch.equal(got[0], like[0])
    assert torch.equal(got[1], like[1])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("q_tokens", "kv_tokens"), [(0, 10), (10, 0)])
def test_no_tokens(provider, q_tokens, kv_tokens):
    tensors = qkv(1, 1, 1, q_tokens, kv_tokens, 16, 16, torch.float32)
    table = uniform_table(torch.zeros(1, 1, dtype=torch.bool), q_tokens, kv_tokens)
    out, lse, _ = attention_with_far_field(*tensors, table, far_field="linear", provider=provider)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_arguments_that_do_not_fit():
    tensors = qkv(1, 2, 2, 40, 40, 16, 16, torch.float32)
    with pytest.raises(OptionError, match="unknown far_field 'means'"):
        attention_with_far_field(*tensors, some_table(), far_field="means")
    with pytest.raises(ValueError, match="sampled_rows must be 0 or more, got -1"):
        attention_with_far_field(*tensors, some_table(), far_field="mean", sampled_rows=-1)
    with pytest.raises(ValueError, match=r"min_gain must be at least 0, with far_field='linear', got 1\.0"):
        attention_with_far_field(*tensors, some_table(), far_field="mean", min_gain=1.0)
    with pytest.raises(ValueError, match="min_gain must be at least 0"):
        attention_with_far_field(*tensors, some_table(), far_field="linear", min_gain=-1.0)
    with pytest.raises(ValueError, match="key must be"):
        attention_with_far_field(tensors[0], tensors[1][..., :8], tensors[2], some_table(), far_field="mean")
    out, lse = attention.block_sparse_attention(*tensors, some_table())
    with pytest.raises(ValueError, match=r"far_lse must be torch\.float32"):
        merge_far_field(
            tensors[0], out, lse, out, lse.double(), None, None, some_table().q_bounds, None, scale=1
        )
    with pytest.raises(ValueError, match="must be given together"):
        merge_far_field(tensors[0], out, lse, out, lse, None, lse, some_table().q_bounds, None, scale=1)


@pytest.mark.skipif(INTERPRETED, reason="a thousand tokens are many for an interpreter")
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("name", far_fields.GENERATORS)
def test_error_of_the_far_fields(name, density):
    """Linear at most half of dropping but where attention is very sharp; guarded, none above dropping anywhere."""
    query, key, value = far_fields.GENERATORS[name](1024, 4, 64)
    table = far_fields.nearest_blocks(query, key, 32, 16, density)
    exact, _ = oracles.masked_attention(query, key, value, torch.ones(1024, 1024, dtype=torch.bool))
    error = {
        far_field: far_fields.relative_error(
            attention_with_far_field(query, key, value, table, far_field=far_field)[0], exact
        )
        for far_field in FAR_FIELDS
    }
    assert error["mean"] <= error["drop"]
    assert error["linear"] <= (1.0 if name == "very sharp" else 0.5) * error["drop"]


@pytest.mark.skipif(INTERPRETED, reason="runs it")
def test_triton_in_its_interpreter() -> None:
    files = ("test_far_field.py", "test_far_field_parts.py", "test_statistics.py")
    paths = [*map(Path(__file__).with_name, files), Path(__file__).parents[1] / "runtime/test_site_parts.py"]
    pass_in_the_interpreter(*map(str, paths), "-k", "triton")


@pytest.mark.skipif(not INTERPRETED, reason="on other providers it is always these steps")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "far_field", "min_gain", "size"),
    [
        (torch.float32, 1, "linear", None, 3.0),
        (torch.float32, 2, "linear", 0.3, 1.0),
        (torch.bfloat16, 1, "mean", None, 4.0),
    ],
)
def test_few_launches_on_triton_equal_the_steps(
    monkeypatch, dtype, kv_heads, far_field, min_gain, size, parts
):
    """Of triton: the selection by gain, the virtual keys and the guard."""
    query, key, value = qkv(1, 2, kv_heads, 90, 150, 16, 24, dtype)
    g = torch.Generator().manual_seed(0)
    q_sizes, kv_sizes = torch.tensor([10] * 8 + [0, 10]), torch.tensor([5, 0, 7] + [3] * 46)
    order = torch.stack([torch.randperm(150, generator=g) for _ in range(2)])[None].int()
    of_queries = torch.stack([torch.randperm(90, generator=g) for _ in range(2)])[None].int()
    listed = torch.rand(1, 2, 10, 49, generator=g) < 0.1
    sizes = q_sizes[None, None], kv_sizes[None, None]
    table = BlockTable.from_block_mask(listed, *sizes, kv_order=order, q_order=of_queries)
    monkeypatch.setattr(far_field_ops, "_parts", lambda *_: parts)
    results = []
    for fuses in (True, False):
        monkeypatch.setattr(providers, "fuses", lambda _, fuses=fuses: fuses)
        options = {"far_field": far_field, "min_gain": min_gain, "provider": "triton"}
        out, lse, report = attention_with_far_field(size * query, key, value, table, **options)
        results.append((out, lse, *report))
    tolerance = TOLERANCE[dtype]
    for got, like in zip(*results, strict=True):
        torch.testing.assert_close(got, like, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert results[0][2].max() < 1
