"""The op: its definition, its gradients, what torch asks of an op, and how it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import BlockTable, OptionError, ProviderError
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.testing.oracles import assert_close_to_float64, masked_attention
from sparsify_compiler.testing.strategies import qkv, tables

SHAPES = st.tuples(
    st.sampled_from([1, 2]), st.sampled_from([(2, 2), (4, 2), (3, 1)]), st.integers(1, 40), st.integers(1, 40)
)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def whole(tokens: int) -> BlockTable:
    return BlockTable.from_block_mask(
        torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.full((1, 1, 1), tokens), torch.full((1, 1, 1), tokens)
    )


def bias_for(data: st.DataObject, batch: int, heads: int, tokens: int) -> Tensor | None:
    if not data.draw(st.booleans()):
        return None
    shape = data.draw(st.sampled_from([1, batch])), data.draw(st.sampled_from([1, heads])), tokens
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return bias.masked_fill(bias > 1.0, -torch.inf)


@given(st.data(), SHAPES, st.sampled_from(DTYPES))
def test_reference_is_masked_attention(data: st.DataObject, shape: Any, dtype: torch.dtype) -> None:
    batch, (heads, kv_heads), q_tokens, kv_tokens = shape
    table = data.draw(tables(batch=batch, heads=heads, q_tokens=q_tokens, kv_tokens=kv_tokens))
    bias = bias_for(data, batch, heads, kv_tokens)
    q, k, v = qkv(batch, heads, kv_heads, q_tokens, kv_tokens, 16, 24, dtype)
    out, lse = block_sparse_attention(q, k, v, table, key_bias=bias, provider="reference")
    assert_close_to_float64(out, lse, q, k, v, table.mask(), key_bias=bias)


@given(st.data(), SHAPES)
def test_gradients_are_those_of_masked_attention(data: st.DataObject, shape: Any) -> None:
    batch, (heads, kv_heads), q_tokens, kv_tokens = shape
    table = data.draw(tables(batch=batch, heads=heads, q_tokens=q_tokens, kv_tokens=kv_tokens))
    bias = bias_for(data, batch, heads, kv_tokens)
    q, k, v = (
        t.requires_grad_() for t in qkv(batch, heads, kv_heads, q_tokens, kv_tokens, 8, 12, torch.float64)
    )
    mask = table.mask()
    results = [
        block_sparse_attention(q, k, v, table, key_bias=bias, provider="reference"),
        masked_attention(q, k, v, mask, key_bias=bias),
    ]
    gradients = []
    for out, lse in results:
        finite = lse.detach().isfinite()  # a row that reads nothing has no gradient
        loss = (out * torch.linspace(-1, 1, out.shape[-1]))[finite].sum() + lse[finite].sin().sum()
        gradients.append(torch.autograd.grad(loss, (q, k, v)))
    for got, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)


def test_gradcheck() -> None:
    table = small_table()
    inputs = [t.requires_grad_() for t in qkv(1, 2, 2, 7, 6, 4, 3, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *t: block_sparse_attention(*t, table, provider="reference")[0],
        inputs,
        check_batched_grad=False,
    )


def small_table() -> BlockTable:
    """7 queries, 6 keys: two heads of their own, permuted queries, an empty block, a row of one block."""
    blocks = torch.tensor(
        [[[True, False, True], [False, True, False]], [[True, True, True], [False, False, True]]]
    )
    order = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (7, 7)])
    return BlockTable.from_block_mask(
        blocks[None],
        torch.tensor([[[3, 4], [6, 1]]]),
        torch.tensor([[[2, 0, 4], [1, 4, 1]]]),
        q_order=order[None].int(),
    )


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(provider: str, grad: bool) -> None:
    """Fakes, schema and autograd agree with what runs, on [B, S, H, D]-strided views."""
    table = small_table()
    inputs = [t.requires_grad_(grad) for t in qkv(1, 2, 1, 7, 6, 16, 16, torch.float32)]
    bias = torch.randn(1, 1, 6)
    arguments = (*inputs, *table.tensors().values(), bias, 0.25, provider)
    torch.library.opcheck(torch.ops.sparsify.block_sparse_attention.default, arguments)
    out, lse = torch.ops.sparsify.block_sparse_attention(*arguments)
    assert out.transpose(1, 2).is_contiguous()
    detached = [t.detach() for t in (torch.ones_like(out), torch.ones_like(lse), out, lse, *inputs)]
    backward = (*detached, *table.tensors().values(), bias, 0.25, provider)
    torch.library.opcheck(torch.ops.sparsify.block_sparse_attention_backward.default, backward)


def test_poisoned_keys_reach_the_rows_that_read_them() -> None:
    blocks = torch.tensor([[[[True, False], [False, True]]]])
    table = BlockTable.from_block_mask(blocks, torch.full((1, 1, 2), 4), torch.full((1, 1, 2), 4))
    for poison in (torch.nan, torch.inf, -torch.inf):
        for which in (1, 2):
            tensors = list(qkv(1, 1, 1, 8, 8, 8, 8, torch.float32))
            tensors[which][:, :, 6] = poison
            out, _ = block_sparse_attention(*tensors, table, provider="reference")
            assert out[:, :, :4].isfinite().all()
            if which == 2:
                assert not out[:, :, 4:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("provider", ["reference", "cpu"])
def test_autocast_is_that_of_sdpa(dtype: torch.dtype, provider: str) -> None:
    q, k, v = qkv(1, 2, 2, 9, 9, 16, 16, torch.float32)
    with torch.autocast("cpu", dtype):
        out, _ = block_sparse_attention(q, k.to(dtype), v, whole(9), provider=provider)
        like = torch.nn.functional.scaled_dot_product_attention(q, k.to(dtype), v)
        assert out.dtype == like.dtype == dtype
        wide, _ = block_sparse_attention(q.double(), k.double(), v.double(), whole(9), provider="reference")
        assert wide.dtype == torch.float64
    low = [t.to(dtype) for t in (q, k, v)]
    assert_close_to_float64(out, None, *low, torch.ones(9, 9, dtype=torch.bool))


def test_key_bias_takes_no_gradient() -> None:
    q, k, v = qkv(1, 1, 1, 4, 4, 8, 8, torch.float32)
    bias = torch.zeros(1, 1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="key_bias must not need a gradient"):
        block_sparse_attention(q, k, v, whole(4), key_bias=bias, provider="reference")


Q, K, V = qkv(2, 4, 2, 6, 6, 16, 16, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": Q[0]}, ValueError, "query must have shape"),
        ({"key": K[:1]}, ValueError, "key must be"),
        ({"key": K[..., :8]}, ValueError, "key must be"),
        ({"query": Q[:, :3]}, ValueError, "multiple of key heads, got 3 and 2"),
        ({"key": K.half()}, ValueError, "agree in dtype"),
        ({"key_bias": torch.zeros(6)}, ValueError, "key_bias must be"),
        ({"key_bias": torch.zeros(2, 3, 6)}, ValueError, "key_bias must be"),
        ({"key_bias": torch.ones(1, 1, 6, dtype=torch.bool)}, ValueError, "float tensor"),
        ({"provider": "gpu"}, OptionError, "provider 'gpu'"),
        ({"provider": "triton"}, ProviderError, "provider 'triton' cannot run here"),
        ({"query": Q.int(), "key": K.int(), "value": V.int()}, ProviderError, "dtype"),
        ({"query": Q.to("meta")}, ValueError, "on"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], error: Any, words: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments: dict[str, Any] = {"query": Q, "key": K, "value": V, "table": whole(6)} | change
    with pytest.raises(error, match=words):
        block_sparse_attention(**arguments)


def test_a_table_of_the_wrong_shape_or_type() -> None:
    good = whole(6).tensors()
    for name, tensor, words in (
        ("kv_indices", good["kv_indices"].long(), "int32"),
        ("kv_num_blocks", good["kv_num_blocks"].expand(1, 1, 3), "kv_num_blocks must end with"),
        ("q_bounds", good["q_bounds"].expand(3, 1, 2), "must begin with"),
        ("q_order", torch.zeros(1, 1, 5, dtype=torch.int32), "q_order must end with"),
    ):
        with pytest.raises(ValueError, match=words):
            block_sparse_attention(Q, K, V, BlockTable(**(good | {name: tensor})))
