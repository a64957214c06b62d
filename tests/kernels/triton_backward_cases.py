"""What the Triton kernels of the backward pass must compute. `test_triton.py` runs this file.

Every case goes all ways: dK and dV added to by atomics, computed block by block, and by groups of blocks.
"""

import pytest
import torch
from any_provider import POISONED, opcheck
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import DEVICE, table_of

from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.kernels.attention import empty_outputs, reference
from sparsify_compiler.kernels.attention.triton_backward import backward, readers
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import BackwardConfig, Config
from sparsify_compiler.kernels.triton.launcher import Launch
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.oracles import assert_gradients_close_to_float64
from sparsify_compiler.testing.strategies import qkv, tables

SMALL = Config(32, 16, 16, 4, 2)
SCATTERED, BY_BLOCK, GROUPED = (
    BackwardConfig(SMALL, None),
    BackwardConfig(SMALL, SMALL),
    BackwardConfig(SMALL, SMALL, configs.WORD),
)
WAYS = pytest.mark.parametrize(
    "way", [SCATTERED, BY_BLOCK, GROUPED], ids=["scattered", "by block", "grouped"]
)

pytestmark = POISONED


def gradients(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, bias: Tensor | None, scale: float, way: BackwardConfig
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(gradients of out and lse, what the kernels make of them)."""
    out, lse = reference.forward(q, k, v, table, bias, scale)
    generator = torch.Generator().manual_seed(1)
    given = tuple(torch.randn(t.shape, generator=generator).to(DEVICE, t.dtype) for t in (out, lse))
    return given, backward(*given, out, lse, q, k, v, table, bias, scale, way)


def check(q, k, v, table, way, *, bias=None, scale=0.3) -> tuple[Tensor, ...]:
    """Run the kernels and hold them to float64."""
    given, found = gradients(q, k, v, table, bias, scale, way)
    for gradient, tensor in zip(found, (q, k, v), strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.is_contiguous()
    assert_gradients_close_to_float64(found, *given, q, k, v, table.mask(), key_bias=bias, scale=scale)
    return found


def single_tokens(keys: int) -> BlockTable:
    """50 queries in four uneven blocks; every key a block of its own, some of which nobody reads."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(4, keys, generator=generator) < 0.3
    order = torch.randperm(keys, generator=generator).int()[None, None].to(DEVICE)
    return table_of(blocks.tolist(), [10, 0, 35, 5], [1] * keys, kv_order=order)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_table(data):
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 2), (2, 1)]))
    q_tokens, kv_tokens = data.draw(st.sampled_from([(33, 33), (50, 21), (1, 60), (20, 1)]))
    head_dim, value_dim = data.draw(st.sampled_from([(16, 16), (24, 40)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    table = data.draw(tables(batch=2, heads=heads, q_tokens=q_tokens, kv_tokens=kv_tokens)).to(DEVICE)
    q, k, v = qkv(2, heads, kv_heads, q_tokens, kv_tokens, head_dim, value_dim, dtype, device=DEVICE)
    bias = None
    if data.draw(st.booleans()):
        lead = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, heads]))
        bias = torch.randn(*lead, kv_tokens, generator=torch.Generator().manual_seed(2))
        bias = bias.masked_fill(bias > 1, -torch.inf).to(DEVICE)
    tiles = st.sampled_from([SMALL, Config(16, 32, 16, 4, 2), Config(64, 16, 64, 4, 2)])
    keys, group = data.draw(st.one_of(st.none(), tiles)), data.draw(st.sampled_from([1, configs.WORD]))
    check(q, k, v, table, BackwardConfig(data.draw(tiles), keys, group), bias=bias)


@WAYS
def test_a_table_for_each_head(way):
    """Grouped query heads, orders on both sides, other blocks and lists for every batch and head, a bias for each
    batch; some rows read no block and some blocks are empty."""
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.tensor([7, 0, 13, 1]), torch.tensor([20, 3, 0, 1, 2])]
    sizes = [torch.stack([t.roll(i) for i in range(8)]).unflatten(0, (2, 4)) for t in sizes]
    orders = [torch.rand(2, 4, n, generator=generator).argsort(-1).int() for n in (21, 26)]
    blocks = torch.rand(2, 4, 4, 5, generator=generator) < 0.5
    blocks[0, 1], blocks[1, 0, 2] = True, False
    table = BlockTable.from_block_mask(blocks, *sizes, q_order=orders[0], kv_order=orders[1]).to(DEVICE)
    bias = torch.randn(2, 1, 26, generator=generator)
    bias[0, :, :5] = -torch.inf
    check(*qkv(2, 4, 2, 21, 26, 16, 24, torch.float32, device=DEVICE), table, way, bias=bias.to(DEVICE))


@WAYS
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (48, torch.float32),
        (72, torch.float16),
        (80, torch.bfloat16),
        (96, torch.bfloat16),
        (256, torch.float16),
    ],
    ids=str,
)
def test_head_dims(head_dim, dtype, way):
    table = table_of([[1, 0, 1], [0, 1, 1]], [20, 13], [5, 3, 25])
    check(*qkv(1, 1, 1, 33, 33, head_dim, head_dim, dtype, device=DEVICE), table, way)


@WAYS
def test_key_blocks_of_one_token(way):
    """More of them than a word has bits; keys that nobody reads have gradient 0."""
    table = single_tokens(70)
    _, dk, dv = check(*qkv(1, 1, 1, 50, 70, 16, 24, torch.float32, device=DEVICE), table, way)
    is_read = table.mask().any(-2)[..., None]
    assert not is_read.all()
    for gradient in (dk, dv):
        assert not gradient.masked_select(~is_read).any()
        assert gradient.masked_select(is_read).all()


def test_the_transpose_of_a_table():
    """More listed blocks than are looked at at a time, what lies beyond a row's count, a row for each head."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(1, 2, 3, 300, generator=generator) < torch.tensor([0.9, 0.1, 0.5])[:, None]
    sizes = torch.full((1, 2, 3), 5), torch.ones(1, 2, 300, dtype=torch.long)
    table = BlockTable.from_block_mask(blocks, *sizes).to(DEVICE)
    beyond = torch.arange(table.kv_indices.shape[-1], device=DEVICE) >= table.kv_num_blocks[..., None]
    table.kv_indices[beyond] = 299
    words = readers(table)
    block = torch.arange(300, device=DEVICE)
    found = words[:, :, block // configs.WORD] >> (block % configs.WORD)[:, None] & 1
    assert torch.equal(found.mT.bool().cpu(), blocks)
    assert not (words[:, :, -1] >> 300 % configs.WORD).any()


@WAYS
def test_more_blocks_than_are_laid_end_to_end_at_a_time(way):
    """On both sides; tiles within a block, over several, and over an empty one."""
    sizes = torch.tensor([1, 0, 40, 15, 2] + [2] * 13)
    generator = torch.Generator().manual_seed(0)
    table = BlockTable.from_block_mask(
        torch.rand(1, 1, 18, 18, generator=generator) < 0.6,
        sizes[None, None],
        sizes.flip(0)[None, None],
        q_order=torch.randperm(84, generator=generator).int()[None, None],
    ).to(DEVICE)
    check(*qkv(1, 1, 1, 84, 84, 16, 16, torch.bfloat16, device=DEVICE), table, way)


@WAYS
def test_hidden_keys_and_a_bias_that_leaves_the_lse_no_digits(way):
    """The first rows read no block, the next hidden keys alone, the next keys at -1e9 alone, the last all."""
    q, k, v = qkv(1, 1, 1, 64, 60, 16, 16, torch.float32, device=DEVICE)
    bias = torch.zeros(1, 1, 60, device=DEVICE)
    bias[..., :20], bias[..., 20:40] = -torch.inf, -1e9
    table = table_of([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], [16] * 4, [20] * 3)
    given, found = gradients(q, k, v, table, bias, 0.3, way)
    # Beside -1e9 scores have no digits in fp32: the definition's weights are equal there, float64's are not.
    expected = reference.backward(
        *given, *reference.forward(q, k, v, table, bias, 0.3), q, k, v, table, bias, 0.3
    )
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    dq, dk, dv = found
    assert not dq[:, :, :32].any()
    assert not dk[:, :, :20].any()
    assert not dv[:, :, :20].any()
    assert dq[:, :, 32:].all()
    assert dv[:, :, 20:].all()


@WAYS
@pytest.mark.parametrize("where", ["key", "value"])
def test_non_finite_keys_reach_the_rows_that_read_them(where, way):
    """And other keys through these rows alone. Queries 0-19 read keys 0-28 and 30-59, 20-39 read 0-29."""
    q, k, v = qkv(1, 1, 1, 60, 60, 16, 16, torch.float32, device=DEVICE)
    (k if where == "key" else v)[:, :, 29] = torch.nan
    table = table_of([[1, 0, 1], [1, 1, 0], [0, 1, 0]], [20] * 3, [29, 1, 30])
    _, (dq, dk, dv) = gradients(q, k, v, table, None, 0.3, way)
    assert dq[:, :, :20].isfinite().all()
    assert dq[:, :, 20:].isnan().all()
    for gradient in (dk, dv) if where == "key" else (dk,):
        assert gradient[:, :, 30:].isfinite().all()
        assert gradient[:, :, :30].isnan().all()


@WAYS
def test_strides_of_any_kind(way):
    """Last dims strided, batches and heads expanded; the gradients of a sum, which are one number expanded."""
    q, k, v = qkv(2, 2, 2, 33, 50, 32, 16, torch.float32, device=DEVICE)
    q, v = (t.mT.contiguous().mT for t in (q, v))
    k = k[:1, :1].expand(2, 2, -1, -1)
    bias = torch.randn(1, 2, 100, device=DEVICE)[..., ::2]
    table = table_of([[1, 1], [0, 1]], [20, 13], [20, 30])
    out, lse = reference.forward(q, k, v, table, bias, 0.3)
    given = (
        torch.ones(1, 1, 1, 1, device=DEVICE).expand_as(out),
        torch.ones(1, 1, 1, device=DEVICE).expand_as(lse),
    )
    found = backward(*given, out, lse.mT.contiguous().mT, q, k, v, table, bias, 0.3, way)
    assert_gradients_close_to_float64(found, *given, q, k, v, table.mask(), key_bias=bias, scale=0.3)


@WAYS
@pytest.mark.parametrize(("q_tokens", "kv_tokens"), [(0, 0), (5, 0), (0, 5)])
def test_no_tokens(q_tokens, kv_tokens, way):
    q, k, v = qkv(1, 1, 1, q_tokens, kv_tokens, 16, 16, torch.float32, device=DEVICE)
    _, found = gradients(q, k, v, table_of([[1]], [q_tokens], [kv_tokens]), None, 0.3, way)
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("way", [BY_BLOCK, GROUPED], ids=["by block", "grouped"])
def test_without_atomics_every_run_gives_the_same_bits(way):
    tensors, table = qkv(1, 2, 1, 50, 8, 16, 16, torch.bfloat16, device=DEVICE), single_tokens(8)
    runs = [gradients(*tensors, table, None, 0.3, way)[1] for _ in range(3 if DEVICE == "cuda" else 2)]
    assert all(torch.equal(one, other) for run in runs for one, other in zip(run, runs[0], strict=True))


@WAYS
def test_nothing_is_read_back_from_the_device(way, monkeypatch):
    """Tensors on meta have no values to read."""
    monkeypatch.setattr(Launch, "__call__", lambda self: None)
    q, k, v = (t.to("meta") for t in qkv(1, 2, 1, 50, 40, 16, 24, torch.bfloat16))
    out, lse = empty_outputs(q, v)
    found = backward(out, lse, out, lse, q, k, v, single_tokens(40).to("meta"), None, 0.3, way)
    for gradient, tensor in zip(found, (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize(
    ("key_block", "deterministic", "keys", "group"),
    [(1, False, False, 1), (1, True, True, configs.WORD), (20, False, True, 1), (20, True, True, 1)],
)
def test_through_autograd(key_block, deterministic, keys, group, monkeypatch):
    """Short key blocks take atomics, unless torch is to be deterministic."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    q, k, v = (t.requires_grad_() for t in qkv(1, 1, 1, 50, 40, 16, 16, torch.float32, device=DEVICE))
    table = single_tokens(40) if key_block == 1 else table_of([[1, 0], [1, 1]], [30, 20], [20, 20])
    way = configs.choose_backward(q, k, v, table)
    assert (way.keys is not None, way.group) == (keys, group)
    out, lse = block_sparse_attention(q, k, v, table, provider="triton")
    given = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), (q, k, v), given)
    assert_gradients_close_to_float64(found, *given, *(t.detach() for t in (q, k, v)), table.mask())


def test_opcheck():
    q, k, v = qkv(2, 2, 1, 20, 20, 16, 16, torch.float32, device=DEVICE)
    table = table_of([[1, 0], [1, 1]], [5, 15], [13, 7])
    bias = torch.randn(1, 1, 20, device=DEVICE)
    out, lse = reference.forward(q, k, v, table, bias, 0.25)
    arguments = (torch.ones_like(out), torch.ones_like(lse), out, lse, q, k, v)
    opcheck(
        torch.ops.sparsify.block_sparse_attention_backward.default,
        (*arguments, *table.tensors().values(), bias, 0.25, "triton"),
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@WAYS
def test_cuda_graph(way):
    """Check a graph that is captured once and replayed with other queries and another table of the same shapes."""
    q, k, v = qkv(1, 2, 2, 500, 500, 64, 64, torch.bfloat16, device=DEVICE)
    table = table_of([[1, 0], [1, 1]], [200, 300], [300, 200])
    out, lse = reference.forward(q, k, v, table, None, 0.3)
    arguments = torch.randn_like(out), torch.randn_like(lse), out, lse, q, k, v, table, None, 0.3, way
    backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = backward(*arguments)
    q.copy_(torch.randn_like(q))
    table.q_bounds.copy_(torch.tensor([0, 333, 500]))
    table.kv_indices[0, 0, 0, 0] = 1
    for kept, new in zip((out, lse), reference.forward(q, k, v, table, None, 0.3), strict=True):
        kept.copy_(new)
    graph.replay()
    assert_gradients_close_to_float64(found, *arguments[:2], q, k, v, table.mask(), scale=0.3)
