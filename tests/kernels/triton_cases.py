"""What the Triton kernel must compute, on a GPU or in the interpreter. `test_triton.py` runs this file.

By hand: `pytest tests/kernels/triton_cases.py` on a GPU, or with TRITON_INTERPRET=1 anywhere.
"""

import pytest
import torch
from any_provider import POISONED, opcheck
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify_compiler.kernels import attention, block_sparse_attention
from sparsify_compiler.kernels.attention.triton import forward
from sparsify_compiler.kernels.triton.configs import Config
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.oracles import assert_close_to_float64
from sparsify_compiler.testing.strategies import qkv, tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAILS = Config(32, 32, 32, 4, 2), Config(16, 16, 16, 4, 2)
TILES = [Config(16, 16, 16, 4, 2), Config(32, 16, 64, 4, 2), Config(64, 32, 16, 4, 2, tails=TAILS)]
"""Small, so that blocks are cut, joined and chunked in every way on few tokens."""

pytestmark = POISONED


def table_of(blocks, q_sizes, kv_sizes, **orders) -> BlockTable:
    """A table shared by all batches and heads, from nested lists."""
    lists = (torch.tensor(x, device=DEVICE)[None, None] for x in (blocks, q_sizes, kv_sizes))
    return BlockTable.from_block_mask(*lists, **orders)


def check(q, k, v, table, *, key_bias=None, scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op and hold it to float64."""
    out, lse = block_sparse_attention(q, k, v, table, key_bias=key_bias, scale=scale, provider="triton")
    assert_close_to_float64(out, lse, q, k, v, table.mask(), key_bias=key_bias, scale=scale)
    return out, lse


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_table(data):
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2)]))
    q_tokens, kv_tokens = data.draw(st.sampled_from([(40, 63), (70, 37), (1, 130), (48, 1)]))
    head_dim, value_dim = data.draw(st.sampled_from([(16, 16), (24, 40)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    table = data.draw(tables(batch=2, heads=heads, q_tokens=q_tokens, kv_tokens=kv_tokens)).to(DEVICE)
    q, k, v = qkv(2, heads, kv_heads, q_tokens, kv_tokens, head_dim, value_dim, dtype, device=DEVICE)
    bias = None
    if data.draw(st.booleans()):
        bias = torch.randn(
            data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, heads])), kv_tokens
        )
        bias = bias.masked_fill(bias > 1, -torch.inf).to(DEVICE)
    out, lse = forward(q, k, v, table, bias, 0.3, config=data.draw(st.sampled_from(TILES)))
    assert out.stride() == attention.empty_outputs(q, v)[0].stride()
    assert_close_to_float64(out, lse, q, k, v, table.mask(), key_bias=bias, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 72, 80, 96, 128, 256])
def test_head_dims(head_dim, dtype):
    table = table_of([[1, 0, 1], [0, 1, 1]], [40, 23], [5, 33, 25])
    check(*qkv(1, 1, 1, 63, 63, head_dim, head_dim, dtype, device=DEVICE), table)


@pytest.mark.parametrize("ordered", [False, True])
def test_what_full_tiles_leave_of_a_block(ordered):
    """Nothing; what fills a tail of each length, leaves one row of it empty, or is one row too long for it."""
    sizes = [64, 1, 15, 0, 16, 17, 31, 32, 33, 63, 64 + 16, 64 + 32, 64 + 33, 128, 128 + 1]
    tokens = sum(sizes)
    generator = torch.Generator().manual_seed(0)
    table = BlockTable.from_block_mask(
        torch.rand(1, 1, len(sizes), 5, generator=generator) < 0.7,
        torch.tensor(sizes)[None, None],
        torch.tensor([9, 0, 20, 3, 8])[None, None],
        q_order=torch.randperm(tokens, generator=generator).int()[None, None] if ordered else None,
    ).to(DEVICE)
    q, k, v = qkv(1, 1, 1, tokens, 40, 16, 16, torch.float32, device=DEVICE)
    out, lse = forward(q, k, v, table, None, 0.3, config=TILES[-1])
    assert_close_to_float64(out, lse, q, k, v, table.mask(), scale=0.3)


def test_a_thousand_tokens_in_uneven_blocks():
    sizes = torch.tensor([1, 0, 399, 64, 200, 336])
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(1, 2, 6, 6, generator=generator) < 0.5
    table = BlockTable.from_block_mask(
        blocks,
        sizes.expand(1, 2, -1),
        sizes.flip(0).expand(1, 2, -1),
        kv_order=torch.randperm(1000, generator=generator).int()[None, None],
    )
    check(*qkv(1, 2, 1, 1000, 1000, 64, 64, torch.bfloat16, device=DEVICE), table.to(DEVICE))


def test_key_blocks_of_one_token():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(4, 150, generator=generator) < 0.3
    check(
        *qkv(1, 1, 1, 100, 150, 32, 32, torch.float32, device=DEVICE),
        table_of(blocks.tolist(), [25] * 4, [1] * 150),
    )


def test_strides_of_any_kind():
    """The last dim strided, and batch and head expanded."""
    q, k, v = qkv(2, 2, 2, 63, 50, 32, 16, torch.float32, device=DEVICE)
    q, v = (t.mT.contiguous().mT for t in (q, v))
    k = k[:1, :1].expand(2, 2, -1, -1)
    bias = torch.randn(1, 2, 100, device=DEVICE)[..., ::2]
    check(q, k, v, table_of([[1, 1], [0, 1]], [30, 33], [20, 30]), key_bias=bias)


def test_offsets_beyond_32_bits():
    """A row further than 2**31 elements away."""
    q, k, v = qkv(1, 1, 1, 3, 3, 16, 16, torch.float16, device=DEVICE)
    far = torch.empty_strided(k.shape, (0, 0, 2**30, 1), dtype=k.dtype, device=DEVICE).copy_(k)
    check(q, far, v, table_of([[1]], [3], [3]))


def test_rows_without_blocks_and_hidden_keys():
    q, k, v = qkv(1, 1, 1, 96, 64, 16, 16, torch.float32, device=DEVICE)
    bias = torch.zeros(1, 1, 64, device=DEVICE)
    bias[..., :32] = -torch.inf
    out, lse = check(q, k, v, table_of([[0, 0], [1, 0], [1, 1]], [32] * 3, [32] * 2), key_bias=bias)
    assert not out[:, :, :64].any()
    assert (lse[:, :, :64] == -torch.inf).all()
    assert lse[:, :, 64:].isfinite().all()


@pytest.mark.parametrize("q_tokens", [0, 5])
def test_no_tokens(q_tokens):
    q, k, v = qkv(1, 1, 1, q_tokens, 0, 16, 16, torch.float32, device=DEVICE)
    out, lse = block_sparse_attention(q, k, v, table_of([[1]], [q_tokens], [0]), provider="triton")
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_scores_far_below_and_above_zero():
    """The running maximum starts at -inf and must not meet it with exp2 of a large difference."""
    q, k, v = qkv(1, 1, 1, 32, 96, 16, 16, torch.float32, device=DEVICE)
    q, k[:, :, :48], k[:, :, 48:] = q.abs() + 1, -k[:, :, :48].abs() - 1, k[:, :, 48:].abs() + 1
    check(q, k, v, table_of([[1, 1, 1]], [32], [16, 32, 48]), scale=40.0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["key", "value"])
def test_non_finite_tokens_reach_the_rows_that_read_them(where, poison):
    q, k, v = qkv(1, 1, 1, 60, 60, 16, 16, torch.float32, device=DEVICE)
    (k if where == "key" else v)[:, :, 29] = poison
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).int()[None, None].to(DEVICE)
    for table in (
        table_of([[1, 0, 1], [1, 1, 0], [0, 1, 0]], [20] * 3, [29, 1, 30]),
        table_of([[1, 0, 1], [1, 1, 0], [0, 1, 0]], [20] * 3, [19, 11, 30], q_order=order, kv_order=order),
    ):
        out, lse = block_sparse_attention(q, k, v, table, provider="triton")
        reads = table.mask()[:, :, :, 29]
        reference, reference_lse = block_sparse_attention(q, k, v, table, provider="reference")
        assert torch.equal(out.isfinite(), reference.isfinite())
        assert torch.equal(lse.isnan(), reference_lse.isnan())
        assert torch.equal(lse.isinf(), reference_lse.isinf())
        assert out[~reads].isfinite().all()


@pytest.mark.parametrize("ordered", [False, True])
def test_opcheck(ordered):
    q, k, v = (t.requires_grad_() for t in qkv(2, 2, 1, 40, 40, 16, 16, torch.float32, device=DEVICE))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int()[None, None].to(DEVICE)
    orders = {"q_order": order, "kv_order": order} if ordered else {}
    table = table_of([[1, 0], [1, 1]], [15, 25], [30, 10], **orders)
    arguments = (q, k, v, *table.tensors().values(), None, 0.25, "triton")
    opcheck(torch.ops.sparsify.block_sparse_attention.default, arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_cuda_graph():
    """Check a graph that is captured once and replayed with other queries and another table of the same shapes."""
    q, k, v = qkv(1, 2, 2, 500, 500, 64, 64, torch.bfloat16, device=DEVICE)
    table = table_of([[1, 0], [1, 1]], [200, 300], [300, 200])
    block_sparse_attention(q, k, v, table, provider="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = block_sparse_attention(q, k, v, table, provider="triton")
    q.copy_(torch.randn_like(q))
    table.q_bounds.copy_(torch.tensor([0, 333, 500]))
    table.kv_indices[0, 0, 0, 0] = 1
    graph.replay()
    assert_close_to_float64(out, lse, q, k, v, table.mask())
