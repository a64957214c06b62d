"""The gradients of provider `cpu` against those of float64 dense attention under `table.mask()`."""

import pytest
import torch
from any_provider import threads_of_torch
from cpu_problems import DTYPES, HEAD_DIMS, full_table, problems, symbol_without_amx, uniform_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.kernels.attention import cpu as attention
from sparsify_compiler.kernels.attention import reference
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import oracles
from sparsify_compiler.testing.strategies import qkv

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(params=["kernel", "kernel without AMX"])
def backward(request, monkeypatch):
    """The kernel in all its builds."""
    assert library.build_info().library is not None, library.build_info().reason
    if request.param == "kernel without AMX":
        monkeypatch.setattr(library, "symbol", symbol_without_amx)
    return attention.backward


def run(
    backward, query, key, value, table: BlockTable, bias: Tensor | None = None, scale: float = 0.2
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(drawn gradients of out and lse, those of query, key and value)."""
    out, lse = attention.forward(query, key, value, table, bias, scale)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, lse)]
    return tuple(given), backward(*given, out, lse, query, key, value, table, bias, scale)


def check(
    backward, query, key, value, table: BlockTable, bias: Tensor | None = None, scale: float = 0.2
) -> tuple[Tensor, Tensor, Tensor]:
    given, found = run(backward, query, key, value, table, bias, scale)
    for gradient, tensor in zip(found, (query, key, value), strict=True):
        assert (gradient.dtype, gradient.shape) == (tensor.dtype, tensor.shape)
        assert gradient.is_contiguous()
    mask = table.mask()
    oracles.assert_gradients_close_to_float64(
        found, *given, query, key, value, mask, key_bias=bias, scale=scale
    )
    return found


def some_blocks(rows: int, columns: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share


@given(problems(), st.integers(1, 3))
@settings(max_examples=120)
def test_equal_float64_on_any_table(problem, threads):
    def backward(*arguments):
        with threads_of_torch(threads):
            return attention.backward(*arguments)

    check(backward, *problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_and_odd_lengths(backward, dtype, head_dim):
    tensors = qkv(1, 2, 1, 233, 233, head_dim, head_dim, dtype, seed=head_dim)
    sizes = torch.tensor([50] * 4 + [33])[None, None]
    check(backward, *tensors, BlockTable.from_block_mask(some_blocks(5, 5, 0.6)[None, None], sizes, sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 8, 20, 50])
def test_single_keys_for_groups_of_queries(backward, dtype, queries):
    """Heads with lists of their own; a key that no query reads has gradient 0."""
    q, k, v = qkv(1, 4, 2, 200, 200, 32, 48, dtype)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(1, 4, 200 // queries, 200, generator=generator) < 0.2
    blocks[..., 77] = False
    sizes = (torch.full((1, 4, n), 200 // n) for n in blocks.shape[-2:])
    _, d_key, d_value = check(backward, q, k, v, BlockTable.from_block_mask(blocks, *sizes))
    assert not d_key[:, :, 77].any()
    assert not d_value[:, :, 77].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 64])
def test_permuted_tokens_of_heads_that_share_keys(backward, dtype, block):
    """Each head of queries lies its keys in an order of its own."""
    tensors = qkv(2, 4, 2, 256, 256, 64, 32, dtype)
    generator = torch.Generator().manual_seed(block)
    orders = {f"{s}_order": torch.rand(2, 4, 256, generator=generator).argsort(-1).int() for s in ("q", "kv")}
    blocks = torch.rand(1, 1, 4, 256 // block, generator=generator) < 0.3
    sizes = (torch.full((1, 1, n), 256 // n) for n in blocks.shape[-2:])
    check(backward, *tensors, BlockTable.from_block_mask(blocks, *sizes, **orders))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_queries_and_keys_than_the_caches_hold(backward, dtype):
    """Several batches of tiles, which go through the keys in several segments."""
    tensors = qkv(1, 1, 1, 3000, 3000, 64, 64, dtype)
    check(backward, *tensors, uniform_table(some_blocks(60, 150, 0.1), 50, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(backward, dtype):
    """Slices of one fused projection, a last dimension that is not dense, expanded keys and gradients."""
    table = full_table(90, 90)
    fused = torch.randn(2, 90, 4, 3 * 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    query, key, value = fused.transpose(1, 2).split(40, dim=-1)
    check(backward, query, key, value, table)
    check(backward, query.mT.contiguous().mT, key[..., ::2].repeat(1, 1, 1, 2), value[..., ::2], table)
    check(backward, query, key[:1, :1].expand_as(key), value[:1, :1].expand_as(value), table)
    out, lse = attention.forward(query, key, value, table, None, 0.2)
    one, zero = torch.ones(1, 1, 1, 1, dtype=dtype), torch.zeros(1, 1, 1)
    got, expected = (
        provider.backward(
            one.expand_as(out), zero.expand_as(lse), out, lse, query, key, value, table, None, 0.2
        )
        for provider in (attention, reference)
    )
    for gradient, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=oracles.FLOOR[dtype], atol=oracles.FLOOR[dtype])


@pytest.mark.parametrize(("q_tokens", "kv_tokens"), [(0, 10), (10, 0)])
def test_no_tokens(backward, q_tokens, kv_tokens):
    tensors = qkv(1, 2, 1, q_tokens, kv_tokens, 16, 16, torch.float32)
    _, found = run(backward, *tensors, full_table(q_tokens, kv_tokens))
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_and_a_bias_that_leaves_the_lse_no_digits(backward, dtype):
    """The first rows read no block, the next hidden keys alone, the next keys at -1e9 alone, the last all."""
    q, k, v = qkv(1, 1, 1, 64, 60, 16, 16, dtype)
    bias = torch.zeros(1, 1, 60)
    bias[..., :20], bias[..., 20:40] = -torch.inf, -1e9
    blocks = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    table = uniform_table(blocks, 16, 20)
    given, found = run(backward, q, k, v, table, bias)
    # Beside -1e9 scores have no digits in fp32: the definition's weights are equal there, float64's are not.
    wide = [t.float() for t in (q, k, v)]
    out, lse = reference.forward(*wide, table, bias, 0.2)
    expected = reference.backward(given[0].float(), given[1], out, lse, *wide, table, bias, 0.2)
    tolerance = 4 * oracles.FLOOR[dtype]
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got.float(), exact, rtol=tolerance, atol=tolerance * exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(backward, dtype):
    query, key, value = qkv(1, 1, 1, 70, 70, 64, 64, dtype)
    check(backward, query * 8, key * 8, value, full_table(70, 70), scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("dims", [(16, 16), (37, 21)])
@pytest.mark.parametrize("queries", [3, 21])
def test_what_is_not_finite_reaches_only_what_it_was_multiplied_with(
    backward, dtype, poison, where, dims, queries
):
    """One element of block 4 is poisoned, and so are the gradients of that block, except those of values, which do
    not depend on values. All others keep their bits."""
    tensors = dict(zip(("query", "key", "value"), qkv(1, 2, 2, 210, 210, *dims, dtype), strict=True))
    rows = torch.eye(10, dtype=torch.bool).repeat_interleave(21 // queries, 0)
    table = uniform_table(rows, queries, 21)
    _, clean = run(backward, **tensors, table=table)
    tensors[where][0, 0, 104, -1] = poison
    _, found = run(backward, **tensors, table=table)
    reached = torch.zeros(1, 2, 210, dtype=torch.bool)
    reached[0, 0, 84:105] = True
    for name, got, expected in zip(tensors, found, clean, strict=True):
        assert torch.equal(got[~reached], expected[~reached])
        assert torch.equal(got[reached], expected[reached]) == (name == where == "value")
        assert got[reached].isfinite().all() == (name == where == "value")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_threads_give_the_same_bits(dtype):
    """And other numbers of threads the same gradients, whether they divide a head or not."""
    tensors = qkv(2, 2, 1, 500, 500, 64, 64, dtype)
    table = uniform_table(some_blocks(10, 50, 0.4), 50, 10)
    for count in (1, 2, 3, 7):
        with threads_of_torch(count):
            found = check(attention.backward, *tensors, table)
            _, again = run(attention.backward, *tensors, table)
        assert all(map(torch.equal, found, again))


def test_autograd_calls_the_kernel(monkeypatch):
    query, key, value = (t.requires_grad_() for t in qkv(1, 2, 1, 40, 40, 16, 16, torch.float32))
    table = uniform_table(torch.eye(4, dtype=torch.bool), 10, 10)
    out, _ = block_sparse_attention(query, key, value, table, provider="cpu")
    exact, _ = oracles.masked_attention(query, key, value, table.mask())
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:  # no other provider
        patch.setattr(reference, "backward", None)
        got = torch.autograd.grad((out * weight).sum(), (query, key, value))
    expected = torch.autograd.grad((exact * weight).sum(), (query, key, value))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
