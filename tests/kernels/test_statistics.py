"""Means and statistics of blocks against float64, block by block, on every provider."""

import itertools
import math
from typing import Any

import pytest
import torch
from any_provider import POISONED, opcheck
from far_field_cases import DTYPES, EXAMPLES, FEW, PROVIDERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.kernels import cpu
from sparsify_compiler.kernels.statistics import block_means, block_statistics, keys_left, pairs_read
from sparsify_compiler.testing.strategies import key_biases, qkv, tables

pytestmark = POISONED


def members(bounds: Tensor, order: Tensor | None, b: int, h: int, tokens: int) -> list[list[int]]:
    """The tokens of each block."""

    def one(tensor: Tensor) -> list[int]:
        return tensor[b % tensor.shape[0], h % tensor.shape[1]].tolist()

    at = list(range(tokens)) if order is None else one(order)
    return [at[x:y] for x, y in itertools.pairwise(one(bounds))]


def expected(key: Tensor, value: Tensor, bounds: Tensor, order: Any, bias: Any, heads: int) -> list[Tensor]:
    """The six statistics in float64."""
    found: list[list[Tensor]] = [[] for _ in range(6)]
    for b, h in itertools.product(range(key.shape[0]), range(heads)):
        head = h * key.shape[1] // heads
        for block in members(bounds, order, b, h, key.shape[2]):
            logs = torch.zeros(len(block), dtype=torch.float64)
            if bias is not None:
                logs = bias[b % bias.shape[0], h % bias.shape[1]].double()[block]
            seen = [i for i, x in enumerate(logs.tolist()) if x != -math.inf]
            k, v = (t[b, head].double()[block][seen] for t in (key, value))
            w = logs[seen].softmax(0)
            k_mean, v_mean = w @ k, w @ v
            k, v = k - k_mean, v - v_mean
            cross = torch.einsum("t,td,te->de", w, k, v)
            row = (logs.logsumexp(0), k_mean, v_mean, w @ k**2, w @ v**2, cross)
            for column, entry in zip(found, row, strict=True):
                column.append(entry)
    lead = (key.shape[0], heads, bounds.shape[-1] - 1)
    return [torch.stack(column).unflatten(0, lead) for column in found]


def close(got: Tensor, exact: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


@st.composite
def problems(draw: st.DrawFn):
    """(key, value, bounds, order, bias, heads of the result)"""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    tokens = draw(st.sampled_from([1, 17, 100]))
    head_dim, value_dim = (draw(st.sampled_from([1, 5, 16, 40, 72])) for _ in range(2))
    heads, dtype, seed = kv_heads * group, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    _, key, value = qkv(batch, heads, kv_heads, 1, tokens, head_dim, value_dim, dtype, seed=seed)
    table = draw(tables(batch=batch, heads=heads, q_tokens=1, kv_tokens=tokens))
    bias = draw(key_biases(batch=batch, heads=heads, tokens=tokens, seed=seed))
    private = any(t is not None and t.shape[1] > 1 for t in (table.kv_bounds, table.kv_order, bias))
    return key, value, table.kv_bounds, table.kv_order, bias, heads if private else kv_heads


@pytest.mark.parametrize("provider", PROVIDERS)
@given(problem=problems())
@settings(max_examples=2 * EXAMPLES)
def test_statistics_equal_float64(provider, problem):
    key, value, bounds, order, bias, heads = problem
    exact = expected(key, value, bounds, order, bias, heads)
    for covariance in (True, False):
        got = block_statistics(key, value, bounds, order, bias, covariance=covariance, provider=provider)
        for one, like in zip(got[: 6 if covariance else 3], exact, strict=False):
            assert one.dtype == torch.float32
            close(one, like, 2e-5 if key.dtype == torch.float32 or provider != "triton" else 1e-3)
        assert covariance or not any(t.numel() for t in got[3:])
    mean, mean_square = block_means(
        key, bounds[:, :1], None if order is None else order[:, :1], provider=provider
    )
    alone = None if order is None else order[:, :1]
    exact_mean = expected(key, value, bounds[:, :1], alone, None, key.shape[1])
    close(mean, exact_mean[1])
    close(mean_square, exact_mean[3] + exact_mean[1] ** 2)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_cancels(provider):
    """Keys far from 0 that hardly differ."""
    _, key, value = qkv(1, 1, 1, 1, 300, 16, 16, torch.float32)
    key, value = 1000.0 + 0.01 * key, value - 500.0
    bounds = torch.tensor([[[0, 130, 300]]]).int()
    exact = expected(key, value, bounds, None, None, 1)
    got = block_statistics(key, value, bounds, None, None, covariance=True, provider=provider)
    torch.testing.assert_close(got[3].double(), exact[3], rtol=2e-3, atol=0)
    torch.testing.assert_close(got[5].double(), exact[5], rtol=2e-2, atol=2e-5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_hidden_tokens_may_hold_anything(provider, poison):
    _, key, value = qkv(1, 2, 2, 1, 40, 16, 16, torch.float32)
    bias = torch.zeros(1, 1, 40)
    bias[..., 7] = bias[..., 20:30] = -torch.inf
    bounds = torch.tensor([[[0, 20, 30, 30, 40]]]).int()
    clean = block_statistics(key, value, bounds, None, bias, covariance=True, provider=provider)
    key[:, :, 7], value[:, :, 20:30] = poison, poison
    got = block_statistics(key, value, bounds, None, bias, covariance=True, provider=provider)
    for one, other in zip(got, clean, strict=True):
        assert torch.equal(one, other)
    assert (got[0][..., 1:3] == -torch.inf).all()
    assert not any(t[:, :, 1:3].any() for t in got[1:])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_bias_of_any_size(provider):
    """Beside 1e9 a sum of weights has no digits left, nor beside -1e9."""
    _, key, value = qkv(1, 1, 1, 1, 20, 8, 8, torch.float32)
    bounds = torch.tensor([[[0, 10, 20]]]).int()
    bias = torch.full((1, 1, 20), -1e9)
    bias[..., 10:] = 1e9
    got = block_statistics(key, value, bounds, None, bias, covariance=True, provider=provider)
    plain = block_statistics(key, value, bounds, None, None, covariance=True, provider=provider)
    for one, other in zip(got[1:], plain[1:], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck_with_strided_views(provider, grad):
    _, key, value = (t.requires_grad_(grad) for t in qkv(*FEW, 1, 40, 24, 16, torch.float32))
    bounds = torch.tensor([[[0, 11, 11, 40]]]).int()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int()[None, None]
    bias = torch.randn(1, FEW[1], 40, generator=torch.Generator().manual_seed(0))
    for covariance in (True, False):
        opcheck(
            torch.ops.sparsify.block_statistics.default,
            (key, value, bounds, order, bias, covariance, provider),
        )
    opcheck(torch.ops.sparsify.block_means.default, (key, bounds, order, provider))


@pytest.mark.parametrize("covariance", [True, False])
def test_gradcheck(covariance):
    _, key, value = (t.requires_grad_() for t in qkv(2, 2, 1, 1, 9, 3, 2, torch.float64))
    bounds = torch.tensor([[[0, 4, 4, 9]], [[0, 1, 5, 9]]]).int()
    bias = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(0)).double()
    bias[..., 2] = -torch.inf
    kept = slice(1, 6 if covariance else 3)

    def statistics_of(*tensors: Tensor) -> Any:
        return block_statistics(*tensors, bounds, None, bias, covariance=covariance, provider="reference")[
            kept
        ]

    assert torch.autograd.gradcheck(statistics_of, (key, value))
    assert torch.autograd.gradcheck(lambda t: block_means(t, bounds, None, provider="reference")[0], (key,))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_tokens_or_no_blocks(provider, tokens):
    _, key, value = qkv(1, 2, 2, 1, tokens, 8, 8, torch.float32)
    bounds = torch.tensor([[[0, tokens]]]).int() if tokens else torch.zeros(1, 1, 1).int()
    got = block_statistics(key, value, bounds, None, None, covariance=True, provider=provider)
    assert got[0].shape == (1, 2, bounds.shape[-1] - 1)


def test_without_a_compiler_the_reference_runs(monkeypatch):
    monkeypatch.setattr(cpu.library, "symbol", lambda *_: None)
    _, key, value = qkv(1, 2, 2, 1, 40, 8, 8, torch.bfloat16)
    bounds = torch.tensor([[[0, 11, 40]]]).int()
    got, like = (
        block_statistics(key, value, bounds, None, None, covariance=True, provider=p)
        for p in ("cpu", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(got, like, strict=True))


KEY, VALUE = qkv(2, 4, 2, 1, 6, 8, 8, torch.float32)[1:]
BOUNDS = torch.tensor([[[0, 6]]]).int()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": KEY[0]}, "key must have shape"),
        ({"value": VALUE[:, :, :3]}, "must agree in batch"),
        ({"value": VALUE.half()}, "must agree in batch"),
        ({"bounds": BOUNDS.long()}, "bounds must be int32, got torch.int64"),
        ({"bounds": BOUNDS.expand(3, 1, 2)}, "bounds must be"),
        ({"bounds": BOUNDS.expand(1, 3, 2)}, "multiple of key heads, got 3 and 2"),
        ({"order": torch.zeros(1, 1, 5).int()}, "order must be"),
        ({"key_bias": torch.zeros(1, 1, 5)}, "key_bias must be"),
        ({"key_bias": torch.zeros(1, 1, 6).int()}, "float tensor"),
        ({"key": KEY.to("meta"), "value": VALUE.to("meta")}, "must be on meta"),
    ],
)
def test_arguments_that_do_not_fit(change, words):
    arguments = {"key": KEY, "value": VALUE, "bounds": BOUNDS, "order": None, "key_bias": None} | change
    with pytest.raises(ValueError, match=words):
        block_statistics(**arguments, covariance=True)


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_pairs_are_those_of_the_mask(provider: str, data: st.DataObject) -> None:
    table = data.draw(tables(batch=2, heads=2, q_tokens=data.draw(st.integers(1, 9)), kv_tokens=9))
    bounds = table.q_bounds
    got = pairs_read(
        bounds, table.kv_bounds, table.kv_num_blocks, table.kv_indices, provider=provider
    ).expand(2, 2, -1)
    mask = table.mask().expand(2, 2, -1, -1).sum(-1)
    for b, h in itertools.product(range(2), range(2)):
        rows = members(bounds, table.q_order, b, h, mask.shape[2])
        assert got[b, h].tolist() == [int(mask[b, h, row].sum()) for row in rows]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shared", [True, False])
def test_keys_that_rows_do_not_list(provider: str, shared: bool) -> None:
    """Counted one by one; what follows the listed keys of a row is ignored."""
    generator = torch.Generator().manual_seed(int(shared))
    tokens, width, blocks = 2000, 1300, 1100
    block = torch.randint(blocks, (tokens,), generator=generator).int()
    keys = torch.randint(50, 60, (1, 1, blocks) if shared else (2, 3, blocks), generator=generator).int()
    counts = torch.tensor([0, 1, 1024, 1300]).int().expand(2, 3, 4).contiguous()
    indices = torch.rand(2, 3, 4, tokens, generator=generator).argsort(-1)[..., :width].int()
    got = keys_left(keys, block, counts, indices, provider=provider)
    for b, h, row in itertools.product(range(2), range(3), range(4)):
        read = [int(block[t]) for t in indices[b, h, row, : counts[b, h, row]].tolist()]
        expected = keys[b % keys.shape[0], h % keys.shape[1]] - torch.tensor(
            read, dtype=torch.int64
        ).bincount(minlength=blocks)
        assert got[b, h, row].tolist() == expected.tolist()
    indices[:, :, 1, 1:] = 10**9
    assert torch.equal(keys_left(keys, block, counts, indices, provider=provider)[:, :, 1], got[:, :, 1])


@pytest.mark.skipif("triton" not in PROVIDERS, reason="of the Triton kernel")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_covariances_are_the_wide_ones_rounded(dtype: torch.dtype) -> None:
    """As on a GPU; those beyond the range of float16 are its largest number."""
    from sparsify_compiler.kernels.statistics import empty_statistics, triton

    _, key, value = qkv(1, 2, 2, 1, 50, 16, 24, dtype)
    key, value = key * 500, value * 500
    bounds = torch.tensor([[[0, 20, 20, 50]]]).int()
    found = empty_statistics(key, value, bounds, None, None, True)
    narrow = (*found[:5], found[5].to(dtype))
    for results in (found, narrow):
        triton.statistics_launch(key, value, bounds, None, None, results)()
    most = torch.finfo(dtype).max
    assert (found[5].abs() > 65504).any()
    assert torch.equal(narrow[5], found[5].clamp(-most, most).to(dtype))
