"""Attention's backward pass: the launches of `triton_backward_kernels.py`. Nothing is read back from the device."""

import torch
from torch import Tensor

from sparsify_compiler.kernels.attention import triton_backward_kernels as kernels
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import BackwardConfig
from sparsify_compiler.kernels.triton.launcher import (
    Launch,
    alignment,
    shared_strides,
    stages_through,
    with_shared_strides,
    with_strides,
)
from sparsify_compiler.table import BlockTable


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference's `backward`. `config`: tiles, or a method for dK and dV, instead of those in `configs`."""
    config = config or configs.choose_backward(query, key, value, table)
    dtype = query.dtype
    d_query = query.new_empty(query.shape)
    inputs = query, key, value, grad_out
    rows = empty_rows(query)
    rows_launch(query, key, out, grad_out, lse, grad_lse, table, key_bias, scale, *rows, config)()
    if config.keys is None:
        d_key, d_value = (t.new_zeros(t.shape, dtype=torch.float32) for t in (key, value))
        queries_launch(*inputs, table, key_bias, scale, *rows, d_query, d_key, d_value, config)()
        return d_query, d_key.to(dtype), d_value.to(dtype)
    queries_launch(*inputs, table, key_bias, scale, *rows, d_query, None, None, config)()
    heads, kv_heads = query.shape[1], key.shape[1]
    # Tables differ by query head, so the gradients of one key head are summed at the end, before they are rounded.
    d_key, d_value = (
        t.new_empty(t.shape[0], heads, *t.shape[2:], dtype=dtype if heads == kv_heads else torch.float32)
        for t in (key, value)
    )
    keys_launch(*inputs, table, readers(table), key_bias, scale, *rows, d_key, d_value, config)()
    if heads > kv_heads:
        d_key, d_value = (d.unflatten(1, (kv_heads, -1)).sum(2) for d in (d_key, d_value))
    return d_query, d_key.to(dtype), d_value.to(dtype)


def empty_rows(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(delta, shift, log_sum) [B, H, Sq + 1] fp32; the last entry of each belongs to no query and has weight 0."""
    shape = *query.shape[:2], query.shape[2] + 1
    zeros = query.new_zeros(2, *shape, dtype=torch.float32)
    return zeros[0], query.new_full(shape, torch.inf, dtype=torch.float32), zeros[1]


def readers(table: BlockTable) -> Tensor:
    """[B|1, H|1, ceil(Nk / 64), Nq] int64: the transpose of the table, see `triton_backward_kernels.py`."""
    counts, indices = table.kv_num_blocks, table.kv_indices
    lead = torch.broadcast_shapes(counts.shape[:2], indices.shape[:2])
    words = -(-(table.kv_bounds.shape[-1] - 1) // configs.WORD)
    found = torch.zeros(*lead, words, counts.shape[-1], dtype=torch.int64, device=counts.device)
    readers_launch(table, found)()
    return found


def readers_launch(table: BlockTable, readers: Tensor) -> Launch:
    """The launch that sets the bits of `readers`, which must be 0 before."""
    batch, heads, _, q_blocks = readers.shape
    arguments = {
        **with_strides(readers=readers),
        **with_shared_strides(kv_num_blocks=table.kv_num_blocks, kv_indices=table.kv_indices),
        "CHUNK": 128,
    }
    return Launch(kernels.readers_kernel, (q_blocks, heads, batch), arguments, num_warps=4)


def rows_launch(
    query: Tensor,
    key: Tensor,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    d_lse: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    delta: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    config: BackwardConfig,
) -> Launch:
    """The launch that fills `delta`, `shift` and, if there is a bias, `log_sum`."""
    batch, heads, tokens, head_dim = query.shape
    tiles, q_blocks = config.queries, table.kv_num_blocks.shape[-1]
    arguments = {
        **with_strides(query=query, key=key, out=out, d_out=d_out, lse=lse, d_lse=d_lse, delta=delta),
        "shift": shift,
        "log_sum": log_sum,
        **with_shared_strides(**table.tensors()),
        "key_bias": key_bias,
        "key_bias_strides": shared_strides(key_bias),
        "q_blocks": q_blocks,
        "queries_per_key_head": heads // key.shape[1],
        "scale": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": out.shape[-1],
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "CHUNK": tiles.chunk,
        "ALIGN": alignment(query, key, out, d_out),
    }
    grid = _tiles(tokens, tiles.block_m, q_blocks), heads, batch
    return Launch(kernels.rows_kernel, grid, arguments, tiles.num_warps)


def queries_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    delta: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    d_query: Tensor,
    d_key: Tensor | None,
    d_value: Tensor | None,
    config: BackwardConfig,
) -> Launch:
    """The launch that fills `d_query` and adds to `d_key` and `d_value` [B, Hkv, Sk, D|Dv] fp32, if given."""
    batch, heads, tokens, head_dim = query.shape
    tiles, q_blocks = config.queries, table.kv_num_blocks.shape[-1]
    arguments = {
        **with_strides(query=query, key=key, value=value, d_out=d_out, delta=delta, d_query=d_query),
        "shift": shift,
        "log_sum": log_sum,
        "d_key": d_key,
        "d_key_strides": shared_strides(d_key),
        "d_value": d_value,
        "d_value_strides": shared_strides(d_value),
        **with_shared_strides(**table.tensors()),
        "key_bias": key_bias,
        "key_bias_strides": shared_strides(key_bias),
        "q_blocks": q_blocks,
        "queries_per_key_head": heads // key.shape[1],
        "scale": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value.shape[-1],
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "CHUNK": tiles.chunk,
        "ALIGN": alignment(
            query, key, value, d_out, d_query, *(t for t in (d_key, d_value) if t is not None)
        ),
    }
    grid = _tiles(tokens, tiles.block_m, q_blocks), heads, batch
    stages = stages_through(table.kv_order, tiles)
    return Launch(kernels.queries_kernel, grid, arguments, tiles.num_warps, stages)


def keys_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    table: BlockTable,
    readers: Tensor,
    key_bias: Tensor | None,
    scale: float,
    delta: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    config: BackwardConfig,
) -> Launch:
    """The launch that fills `d_key` and `d_value` [B, H, Sk, D|Dv]."""
    batch, heads, _, head_dim = query.shape
    tiles = config.keys
    assert tiles is not None
    group_bounds = torch.cat([table.kv_bounds[..., : -1 : config.group], table.kv_bounds[..., -1:]], -1)
    index = {
        name: tensor for name, tensor in table.tensors().items() if not name.startswith(("kv_n", "kv_i"))
    }
    arguments = {
        **with_strides(query=query, key=key, value=value, d_out=d_out, delta=delta, d_key=d_key),
        **with_strides(d_value=d_value),
        "shift": shift,
        "log_sum": log_sum,
        **with_shared_strides(readers=readers, group_bounds=group_bounds, **index),
        "key_bias": key_bias,
        "key_bias_strides": shared_strides(key_bias),
        "q_blocks": readers.shape[-1],
        "kv_blocks": table.kv_bounds.shape[-1] - 1,
        "q_tokens": query.shape[2],
        "queries_per_key_head": heads // key.shape[1],
        "scale": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value.shape[-1],
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "CHUNK": tiles.chunk,
        "GROUP": config.group,
        "ALIGN": alignment(query, key, value, d_out, d_key, d_value),
    }
    grid = _tiles(key.shape[2], tiles.block_n, group_bounds.shape[-1] - 1), heads, batch
    stages = stages_through(table.q_order, tiles)
    return Launch(kernels.keys_kernel, grid, arguments, tiles.num_warps, stages)


def _tiles(tokens: int, size: int, blocks: int) -> int:
    """The most tiles that bounds of these shapes can have; surplus programs end at once."""
    return tokens // size + blocks if tokens else 0
