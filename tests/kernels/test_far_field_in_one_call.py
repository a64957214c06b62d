"""A call with a far field in one C++ call, next to the same call in parts."""

import pytest
import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels.far_field import Report, attention_with_far_field, in_one_call, in_parts
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks
from sparsify_compiler.table import BlockTable

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
Q_TOKENS, KV_TOKENS = 61, 83


def _bounds(tokens: int, blocks: int, heads: int, g: torch.Generator) -> Tensor:
    """Random bounds of blocks, of which some are empty."""
    inner = torch.randint(tokens + 1, (1, heads, blocks - 1), generator=g).sort().values
    ends = torch.tensor([0, tokens]).expand(1, heads, 2)
    return torch.cat([ends[..., :1], inner, ends[..., 1:]], -1).int()


def _order(tokens: int, heads: int, g: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(tokens, generator=g) for _ in range(heads)])[None].int()


def _table(heads: int, g: torch.Generator, q_blocks: int = 21, kv_blocks: int = 18) -> BlockTable:
    listed = torch.rand(1, heads, q_blocks, kv_blocks, generator=g) < 0.3
    table = BlockTable.from_block_mask(listed, torch.ones(1, 1, q_blocks), torch.ones(1, 1, kv_blocks))
    return BlockTable.of(
        _bounds(Q_TOKENS, q_blocks, heads, g),
        _bounds(KV_TOKENS, kv_blocks, heads, g),
        table.kv_num_blocks,
        table.kv_indices,
        _order(Q_TOKENS, heads, g),
        _order(KV_TOKENS, heads, g),
    )


def _tensors(
    dtype: torch.dtype, kv_heads: int, g: torch.Generator, head_dim: int = 24, value_dim: int = 40
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((4, Q_TOKENS, head_dim), (kv_heads, KV_TOKENS, head_dim), (kv_heads, KV_TOKENS, value_dim))
    return tuple(torch.randn(2, *shape, generator=g).to(dtype) for shape in shapes)  # type: ignore[return-value]


def _far_blocks(g: torch.Generator, rows: int) -> FarBlocks:
    bounds = _bounds(KV_TOKENS, 11, 1, g)
    keys = bounds.diff(dim=-1)
    left = (torch.rand(2, 4, rows, 11, generator=g) * (keys[:, :, None] + 1)).int()
    return FarBlocks(_order(KV_TOKENS, 1, g), bounds, keys, left)


def _both(*tensors: Tensor, table: BlockTable, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """Out, lse and report, in one call and in parts."""
    query = tensors[0]
    whole = {"far_field": "linear", "min_gain": None, "best": 0, "far_blocks": None, "key_bias": None}
    whole |= {"scale": query.shape[-1] ** -0.5, "provider": "cpu", "sampled_rows": 16, **options}
    assert in_one_call.supports(*tensors, "cpu")
    found = attention_with_far_field(*tensors, table, **whole)  # type: ignore[arg-type]
    like = in_parts(*tensors, table, **whole)  # type: ignore[arg-type]
    assert found[2].target is like[2].target is None
    return [*found[:2], *found[2][:4]], [*like[:2], *(t.expand(query.shape[:2]) for t in like[2][:4])]


def _assert_close(found: list[Tensor], like: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip(("out", "lse", *Report._fields[:4]), found, like, strict=True):
        torch.testing.assert_close(
            one,
            other,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, n=name: f"{n}: {text}",
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "options",
    [
        {"far_field": "mean"},
        {},
        {"sampled_rows": 0},
        {"sampled_rows": Q_TOKENS},
        {"min_gain": 0.1},
        {"min_gain": 1e9, "best": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_parts(dtype, options, biased):
    g = torch.Generator().manual_seed(0)
    tensors = _tensors(dtype, 4, g)
    bias = torch.randn(2, 4, KV_TOKENS, generator=g)
    bias[:, :, 5:20] = -torch.inf
    found, like = _both(*tensors, table=_table(4, g), key_bias=bias if biased else None, **options)
    _assert_close(found, like, TOLERANCE[dtype])


@pytest.mark.parametrize("far_field", ["mean", "linear"])
def test_shared_key_heads_and_partly_read_blocks(far_field):
    g = torch.Generator().manual_seed(1)
    tensors, table = _tensors(torch.float32, 2, g, 64, 64), _table(1, g)
    _assert_close(*_both(*tensors, table=table, far_field=far_field), 1e-5)
    blocks = _far_blocks(g, table.kv_indices.shape[2])
    _assert_close(*_both(*tensors, table=table, far_field=far_field, far_blocks=blocks), 1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_matrices_of_some_heads_at_a_time(kv_heads):
    """Those of all heads would take 33 MiB, more than are in memory at a time."""
    g = torch.Generator().manual_seed(2)
    tensors, table = (
        _tensors(torch.float32, kv_heads, g, 128, 128),
        _table(4 if kv_heads == 4 else 1, g, q_blocks=64),
    )
    _assert_close(*_both(*tensors, table=table, min_gain=0.1), 1e-5)


def test_the_number_of_threads_changes_no_bit():
    g = torch.Generator().manual_seed(2)
    tensors, table, before, results = _tensors(torch.float32, 4, g), _table(4, g), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            results.append(
                attention_with_far_field(*tensors, table, far_field="linear", min_gain=0.3, provider="cpu")
            )
        finally:
            torch.set_num_threads(before)
    (out, lse, report), (other_out, other_lse, other_report) = results
    for one, other in zip((out, lse, *report), (other_out, other_lse, *other_report), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_refuses_blocks_that_do_not_fit():
    g = torch.Generator().manual_seed(3)
    tensors, table = _tensors(torch.float32, 4, g), _table(4, g)
    blocks = _far_blocks(g, table.kv_indices.shape[2])
    wrong = blocks._replace(bounds=blocks.bounds + 1)
    with pytest.raises(OperandError, match="far_blocks"):
        attention_with_far_field(*tensors, table, far_field="linear", far_blocks=wrong, provider="cpu")
