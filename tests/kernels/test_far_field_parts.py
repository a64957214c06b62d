"""Parts of the far field: what is worth reading, the guard and its exact rows, the merge with the near field."""

import math
from typing import Any

import pytest
import torch
from any_provider import POISONED, opcheck
from cpu_problems import uniform_table
from far_field_cases import DTYPES, EXAMPLES, FEW, INTERPRETED, PROVIDERS, TOLERANCE, problems, some_table
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_compiler import BlockTable
from sparsify_compiler.kernels import attention, far_field
from sparsify_compiler.kernels.far_field import attention_with_far_field, exact_rows
from sparsify_compiler.kernels.far_field.near_and_far import complement, merge_far_field, near_and_far
from sparsify_compiler.kernels.far_field.virtual_keys import virtual_keys
from sparsify_compiler.testing import far_fields, oracles
from sparsify_compiler.testing.strategies import qkv, tables

pytestmark = POISONED


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_the_guard_sees_that_dropping_is_better(provider, far_field):
    """A near key of value 0, skipped keys at 1 and -1 with values 1 and -e²: to drop them is exact for query 1."""
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1.0, -1.0]).reshape(1, 1, 3, 1)
    value = torch.tensor([0.0, 1.0, -(torch.e**2)]).reshape(1, 1, 3, 1)
    table = BlockTable.from_block_mask(
        torch.tensor([[[[True, False]]]]), torch.tensor([[[1]]]), torch.tensor([[[1, 2]]])
    )
    options: dict[str, Any] = {"far_field": far_field, "scale": 1.0, "provider": provider}
    out, lse, report = attention_with_far_field(query, key, value, table, **options)
    near = attention.block_sparse_attention(query, key, value, table, scale=1.0, provider=provider)
    assert report.gate.item() == 0
    assert torch.equal(out, near[0])
    assert torch.equal(lse, near[1])
    torch.testing.assert_close(report.recall.item(), 1 / (1 + torch.e + 1 / torch.e), rtol=1e-5, atol=0)
    unguarded, _, report = attention_with_far_field(query, key, value, table, **options, sampled_rows=0)
    assert report.gate.item() == 1
    assert unguarded.abs().item() > 0.2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_guard_decides_for_each_head(provider):
    query, key, value = qkv(2, 3, 3, 40, 40, 8, 8, torch.float32)
    value[1, 1] *= torch.nan  # whose error is no number
    _, _, report = attention_with_far_field(
        query, key, value, some_table(), far_field="linear", provider=provider
    )
    assert report.gate.tolist() == [[1, 1, 1], [1, 0, 1]]


@pytest.mark.parametrize("provider", PROVIDERS)
@given(problem=problems(), min_gain=st.sampled_from([0.0, 0.01, 0.1, 1.0, 10.0]))
@settings(max_examples=EXAMPLES)
def test_what_is_worth_reading_is_read(provider, problem, min_gain):
    """Every block that the table lists or whose gain is above the least, by the formula; none else."""
    query, key, value, table, bias = problem
    options: dict[str, Any] = {"key_bias": bias, "scale": 0.4, "provider": provider}
    exact, attention_of_blocks = oracles.gains(query, key, value, table, bias, 0.4)
    listed = table.block_mask().expand(exact.shape)
    got, far, _, kept, *_ = virtual_keys(query, key, value, table, linear=True, min_gain=min_gain, **options)
    read = got.block_mask()
    slack = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(query.dtype, 1e-4)
    clear = (exact - min_gain).abs() > slack * exact.max().clamp(min=1e-3)
    assert torch.equal(read[clear], (listed | (exact > min_gain))[clear])
    assert read[listed].all()
    assert got.kv_bounds is table.kv_bounds
    sizes = got.q_bounds.diff(dim=-1).expand(*read.shape[:2], -1)
    estimated = (attention_of_blocks * read).sum(-1).mul(sizes).sum(-1) / query.shape[2]
    assert kept is not None
    torch.testing.assert_close(kept.double(), estimated, rtol=slack, atol=slack)
    out = near_and_far(query, key, value, got, far, **options)
    like = oracles.far_field_attention(query, key, value, got, "linear", key_bias=bias, scale=0.4)
    for one, other in zip(out, like, strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=TOLERANCE[query.dtype], atol=TOLERANCE[query.dtype]
        )


@given(problem=problems(), best=st.integers(1, 3))
@settings(max_examples=EXAMPLES)
def test_the_blocks_with_the_largest_gains_are_read(problem, best):
    """Each row reads `best` blocks that the table does not list, and no other block has a larger gain."""
    query, key, value, table, bias = problem
    options: dict[str, Any] = {"key_bias": bias, "scale": 0.4, "provider": "reference"}
    exact, _ = oracles.gains(query, key, value, table, bias, 0.4)
    listed = table.block_mask().expand(exact.shape)
    got, *_ = virtual_keys(query, key, value, table, linear=True, min_gain=math.inf, best=best, **options)
    added = got.block_mask() & ~listed
    assert got.block_mask()[listed].all()
    assert torch.equal(added.sum(-1), (~listed).sum(-1).clamp(max=best))
    left = exact.masked_fill(listed | added, -1.0).amax(-1)
    worst = exact.masked_fill(~added, torch.inf).amin(-1)
    slack = {torch.bfloat16: 3e-2, torch.float16: 3e-3}.get(query.dtype, 1e-4) * exact.max().clamp(min=1e-3)
    assert (left <= worst + slack).all()


@pytest.mark.skipif(INTERPRETED, reason="a thousand tokens are many for an interpreter")
def test_what_is_worth_reading_errs_less_than_what_is_looked_at_most():
    """At equal density, over heads that attend differently: what mass alone cannot weigh against each other."""
    problems = [far_fields.GENERATORS[name](1024, 2, 64) for name in far_fields.GENERATORS]
    query, key, value = (torch.cat(tensors, dim=1) for tensors in zip(*problems, strict=True))
    exact, _ = oracles.masked_attention(query, key, value, torch.ones(1024, 1024, dtype=torch.bool))
    nothing = uniform_table(torch.zeros(32, 64, dtype=torch.bool), 32, 16)

    def error(table: BlockTable, **options: Any) -> tuple[float, float]:
        out, _, report = attention_with_far_field(
            query, key, value, table, far_field="linear", sampled_rows=0, **options
        )
        return float((out - exact).norm() / exact.norm()), float(report.density.mean())

    for min_gain in (0.3, 0.03, 0.003):
        found, density = error(nothing, min_gain=min_gain)
        by_mass, like = error(far_fields.nearest_blocks(query, key, 32, 16, density))
        assert like >= density - 1 / 64
        assert found < by_mass


@pytest.mark.parametrize("provider", PROVIDERS)
def test_exact_rows_are_rows_of_dense_attention(provider):
    query, key, value = qkv(2, 4, 2, 30, 25, 16, 24, torch.float32)
    bias = torch.randn(2, 4, 25, generator=torch.Generator().manual_seed(0))
    dense, dense_lse = oracles.masked_attention(
        query, key, value, torch.ones(30, 25, dtype=torch.bool), key_bias=bias, scale=0.3
    )
    rows = torch.randint(30, (2, 4, 7), generator=torch.Generator().manual_seed(0))
    out, lse = exact_rows(query, key, value, rows, bias, 0.3, provider=provider)
    torch.testing.assert_close(lse.double(), dense_lse.gather(2, rows), rtol=1e-5, atol=1e-5)
    index = rows[..., None].expand(-1, -1, -1, 24)
    torch.testing.assert_close(out.double(), dense.gather(2, index), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_rows_read_their_keys_in_parts(provider, dtype, monkeypatch):
    """Four parts of uneven length. Hidden keys leave nothing to see in one part, and nothing at all to one head."""
    monkeypatch.setattr(far_field, "_parts", lambda *_: 4)
    query, key, value = (t.requires_grad_() for t in qkv(2, 4, 2, 30, 25, 16, 24, dtype))
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(2, 4, 25, generator=generator)
    bias[..., :7] = bias[1, 3] = -torch.inf
    rows = torch.rand(2, 4, 30, generator=generator).argsort(-1)[..., :7]
    out, lse = exact_rows(query, key, value, rows, bias, 0.3, provider=provider)
    assert (out.dtype, out.shape, lse.shape) == (dtype, (2, 4, 7, 24), (2, 4, 7))
    given = torch.randn_like(out), torch.randn_like(lse)
    d_query, d_key, d_value = torch.autograd.grad((out, lse), (query, key, value), given)
    index = rows[..., None].expand(-1, -1, -1, 16)
    dense = query.detach().gather(2, index), key.detach(), value.detach(), torch.ones(7, 25, dtype=torch.bool)
    oracles.assert_close_to_float64(out.detach(), lse.detach(), *dense, key_bias=bias, scale=0.3)
    oracles.assert_gradients_close_to_float64(
        (d_query.gather(2, index), d_key, d_value), *given, *dense, key_bias=bias, scale=0.3
    )
    assert not d_query.scatter(2, index, 0.0).any(), "a row that was not asked for has a gradient"


def test_exact_rows_of_many_keys_fill_a_gpu():
    """Of 40 heads with 75,600 keys; text tokens, which are many, are not repeated more often than that takes."""
    assert 40 * far_field._parts(16, 75600, "cuda") >= 8 * 132
    assert far_field._parts(512, 75600, "cuda") == 2
    assert far_field._parts(2000, 75600, "cuda") == far_field._parts(16, 300, "cuda") == 1
    assert far_field._parts(0, 0, "cuda") == far_field._parts(16, 75600, "cpu") == 1


@given(st.data())
@settings(max_examples=EXAMPLES)
def test_the_complement_lists_what_the_table_does_not(data):
    table = data.draw(tables(batch=2, heads=2, q_tokens=20, kv_tokens=20))
    far = complement(table)
    assert torch.equal(far.block_mask(), ~table.block_mask())
    counted = far.kv_num_blocks
    assert (counted == far.block_mask().sum(-1)).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(provider, dtype):
    """Rows with near, far, both and neither; far rows that nobody reads hold NaN."""
    query, near, far = qkv(2, 3, 3, 41, 41, 24, 24, dtype)
    bounds, order = torch.tensor([[[0, 9, 9, 41]]]).int(), torch.randperm(41).int()[None, None]
    matrices, limits = torch.randn(2, 3, 3, 24, 24), torch.rand(2, 3, 3, 24)
    near_lse, far_lse = torch.randn(2, 2, 3, 41)
    near_lse[:, :, ::3], far_lse[:, :, ::2] = -torch.inf, -torch.inf
    near[:, :, ::3] = 0
    far[:, :, ::2] = torch.nan
    got = merge_far_field(
        query, near, near_lse, far, far_lse, matrices, limits, bounds, order, scale=0.3, provider=provider
    )
    block = torch.zeros(41, dtype=torch.long)
    block[order[0, 0, 9:].long()] = 2
    term = 0.3 * (query.double()[..., None, :] @ matrices.double()[:, :, block])[..., 0, :]
    term = term.clamp(-limits.double()[:, :, block], limits.double()[:, :, block])
    weight = (far_lse - torch.logaddexp(near_lse, far_lse)).double().exp()[..., None]
    both = (1 - weight) * near.double() + weight * (far.double() + term)
    alone = (far_lse == -torch.inf)[..., None]
    tolerance = TOLERANCE[dtype] / 4
    expected = torch.where(alone, near.double(), both)
    torch.testing.assert_close(got[0].double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], torch.logaddexp(near_lse, far_lse))
    assert torch.equal(got[0][alone[..., 0]], near[alone[..., 0]])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_with_strided_views(provider, grad):
    batch, heads = (1, 1) if INTERPRETED else (2, 4)
    query, near, far = (
        t.requires_grad_(grad) for t in qkv(batch, heads, heads, 40, 40, 24, 24, torch.float32)
    )
    table = some_table()
    near_lse, far_lse = torch.randn(2, batch, heads, 40).requires_grad_(grad)
    matrices = torch.randn(batch, heads, 4, 24, 24).mT.requires_grad_(grad)
    limits = torch.rand(batch, heads, 4, 24).requires_grad_(grad)
    for pair in ((matrices, limits), (None, None)):
        opcheck(
            torch.ops.sparsify.merge_far_field.default,
            (query, near, near_lse, far, far_lse, *pair, table.q_bounds, table.q_order, 0.3, provider),
        )


def test_gradients_are_contiguous_whatever_the_layout_of_the_gradient_that_comes():
    batch, heads, _ = FEW
    query, near, far = qkv(batch, heads, heads, 40, 40, 24, 24, torch.float32)
    table, lse = some_table(), torch.randn(3, batch, heads, 40)
    for grad in (torch.randn(batch, heads, 24, 40).mT, torch.randn(batch, 40, heads, 24).transpose(1, 2)):
        operands = (grad, lse[0], near, lse[1], query, near, lse[1], far, lse[2], None, None)
        torch.library.opcheck(
            torch.ops.sparsify.merge_far_field_backward.default,
            (*operands, table.q_bounds, table.q_order, 0.3),
            test_utils="test_faketensor",
        )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("linear", [False, True])
def test_opcheck_of_both_fields(provider, linear):
    tensors, table = qkv(*FEW, 40, 40, 24, 16, torch.float32), some_table()
    _, far, *_ = virtual_keys(*tensors, table, linear=linear, key_bias=None, scale=0.3, provider=provider)
    arguments = (*tensors, *table.tensors().values(), None, *far, 0.3, provider)
    opcheck(torch.ops.sparsify.near_and_far.default, arguments)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dims", [(24, 16)] if INTERPRETED else [(24, 16), (5, 150), (64, 64)])
@pytest.mark.parametrize("queries", [20] if INTERPRETED else [2, 40, 300])
def test_both_fields_at_once_are_both_merged(provider, dtype, head_dims, queries):
    """Blocks of every path of a kernel, head 1 without a far field, whose near field then keeps its bits."""
    tokens, keys = (80, 40) if INTERPRETED else (600, 200)
    heads, kv_heads = (2, 1) if INTERPRETED else (4, 2)
    query, key, value = qkv(1, heads, kv_heads, tokens, keys, *head_dims, dtype)
    blocks = torch.rand(tokens // queries, keys // 5, generator=torch.Generator().manual_seed(0)) < 0.4
    blocks[0] = True  # nothing is far
    blocks[1] = False  # nothing is near
    table = uniform_table(blocks, queries, 5, kv_order=torch.randperm(keys).int()[None, None])
    options = {"key_bias": torch.randn(1, heads, keys), "scale": head_dims[0] ** -0.5, "provider": provider}
    _, far, *_ = virtual_keys(query, key, value, table, linear=True, **options)
    bias = far.bias.clone()
    bias[:, 1] = -torch.inf
    far = far._replace(bias=bias)
    got = near_and_far(query, key, value, table, far, **options)
    near = attention.block_sparse_attention(query, key, value, table, **options)
    with torch.enable_grad():
        like = near_and_far(query.requires_grad_(), key, value, table, far, **options)
    torch.testing.assert_close(got[0], like[0], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(got[1], like[1], rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 2e-2)
    for one, other in zip(got, near, strict=True):
        assert torch.equal(one[:, 1], other[:, 1])


def test_only_linear_has_matrices():
    """Those of a query head each, from statistics of a key head each."""
    tensors = qkv(1, 4, 2, 40, 40, 16, 24, torch.float32)
    options: dict[str, Any] = {"key_bias": None, "scale": 0.25, "provider": "reference"}
    _, far, *_ = virtual_keys(*tensors, some_table(), linear=True, **options)
    assert far.matrices.shape == (1, 4, 4, 16, 24)
    assert far.limits.shape == (1, 4, 4, 24)
    _, far, *_ = virtual_keys(*tensors, some_table(), linear=False, **options)
    assert far.matrices is far.limits is None
