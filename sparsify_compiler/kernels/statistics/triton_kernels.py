"""The Triton kernels of statistics: means and statistics of blocks, and the counts of what rows of a table list.

One program computes one block of tokens and VALUE_TILE channels of its values, BLOCK tokens at a time: a first pass
for the means, and a second for the centred moments.

Products of half precision are computed in TF32, which has no fewer bits (eleven), with sums in fp32. Products of
fp32 are computed in full.

Shapes in comments: N = BLOCK tokens, D = padded DIM or HEAD_DIM, V = VALUE_TILE.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.helpers import (
    _at,
    _finite,
    _load_columns,
    _load_rows,
    _padded,
    _tokens,
)


@triton.jit
def block_means_kernel(
    tokens,
    mean,
    mean_square,
    bounds,
    order,
    tokens_strides,
    mean_strides,
    bounds_strides,
    order_strides,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid: (blocks, heads, batches). Both results have the strides `mean_strides`."""
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    bounds = _at(bounds, bounds_strides, batch, head) + block
    begin, end = tl.load(bounds), tl.load(bounds + 1)
    tokens = _at(tokens, tokens_strides, batch, head)
    if order is not None:
        order = _at(order, order_strides, batch, head)
    total = tl.zeros([_padded(DIM)], tl.float32)  # [D]
    total_square = tl.zeros([_padded(DIM)], tl.float32)
    for start in range(begin, end, BLOCK):
        token, is_token = _tokens(start, end, order, BLOCK)  # [N]
        rows = _load_rows(tokens, token, is_token, tokens_strides, DIM, ALIGN).to(tl.float32)  # [N, D]
        total += tl.sum(rows, axis=0)  # [D]
        total_square += tl.sum(rows * rows, axis=0)
    count = tl.maximum(end - begin, 1).to(tl.float32)
    at = mean_strides[0] * batch + mean_strides[1] * head + mean_strides[2] * block
    _store(mean + at, total / count, DIM)
    _store(mean_square + at, total_square / count, DIM)


@triton.jit
def block_statistics_kernel(
    key,
    value,
    bounds,
    order,
    key_bias,
    log_weight,
    key_mean,
    value_mean,
    key_variance,
    value_variance,
    covariance,
    key_strides,
    value_strides,
    bounds_strides,
    order_strides,
    key_bias_strides,
    blocks,
    heads_per_key_head,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (blocks * value tiles, heads, batches). Results are contiguous. Without `covariance`, there are no
    second moments."""
    tiles: tl.constexpr = (VALUE_DIM + VALUE_TILE - 1) // VALUE_TILE
    block = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    bounds = _at(bounds, bounds_strides, batch, head) + block
    begin, end = tl.load(bounds), tl.load(bounds + 1)
    key = _at(key, key_strides, batch, head // heads_per_key_head)
    value = _at(value, value_strides, batch, head // heads_per_key_head)
    if order is not None:
        order = _at(order, order_strides, batch, head)

    top = tl.where(end > begin, 0.0, float("-inf"))
    if key_bias is not None:
        key_bias = _at(key_bias, key_bias_strides, batch, head)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)  # [N]
        for start in range(begin, end, BLOCK):
            token, is_token = _tokens(start, end, order, BLOCK)
            highest = tl.maximum(highest, _load_bias(key_bias, token, is_token, key_bias_strides))
        top = tl.max(highest)  # a number

    columns = tile * VALUE_TILE + tl.arange(0, VALUE_TILE)  # [V]
    is_column = columns < VALUE_DIM
    total = tl.zeros([BLOCK], tl.float32)  # [N]
    mean_k = tl.zeros([_padded(HEAD_DIM)], tl.float32)  # [D]
    mean_v = tl.zeros([VALUE_TILE], tl.float32)  # [V]
    for start in range(begin, end, BLOCK):
        token, is_token = _tokens(start, end, order, BLOCK)
        weight = _weights(key_bias, token, is_token, key_bias_strides, top)  # [N]
        # Tokens of weight 0 may hold anything, so they are not loaded.
        k = _load_rows(key, token, weight > 0.0, key_strides, HEAD_DIM, ALIGN).to(tl.float32)  # [N, D]
        v = _load_columns(value, token, weight > 0.0, value_strides, columns, is_column)  # [N, V]
        total += weight
        mean_k += tl.sum(weight[:, None] * k, axis=0)  # [D]
        mean_v += tl.sum(weight[:, None] * v, axis=0)  # [V]
    sum_of_weights = tl.sum(total)  # a number
    inverse = tl.where(sum_of_weights > 0.0, 1.0 / sum_of_weights, 0.0)
    mean_k = mean_k * inverse
    mean_v = mean_v * inverse

    at = (batch * tl.num_programs(1) + head) * blocks + block
    tl.store(value_mean + at * VALUE_DIM + columns, mean_v, mask=is_column)
    if tile == 0:
        tl.store(log_weight + at, _finite(top) + tl.log(sum_of_weights))
        _store(key_mean + at * HEAD_DIM, mean_k, HEAD_DIM)

    if covariance is not None:
        variance_k = tl.zeros([_padded(HEAD_DIM)], tl.float32)  # [D]
        variance_v = tl.zeros([VALUE_TILE], tl.float32)  # [V]
        moment = tl.zeros([_padded(HEAD_DIM), VALUE_TILE], tl.float32)  # [D, V]
        for start in range(begin, end, BLOCK):
            token, is_token = _tokens(start, end, order, BLOCK)
            weight = _weights(key_bias, token, is_token, key_bias_strides, top)
            k = _load_rows(key, token, weight > 0.0, key_strides, HEAD_DIM, ALIGN).to(tl.float32)
            v = _load_columns(value, token, weight > 0.0, value_strides, columns, is_column)
            weight = weight * inverse
            # Lanes of weight 0 are no longer 0 here, but add nothing.
            k = k - mean_k[None, :]
            v = v - mean_v[None, :]
            weighted_v = weight[:, None] * v  # [N, V]
            variance_k += tl.sum(weight[:, None] * k * k, axis=0)  # [D]
            variance_v += tl.sum(weighted_v * v, axis=0)  # [V]
            moment = tl.dot(k.T, weighted_v, moment, input_precision=PRECISION)  # [D, V]
        tl.store(value_variance + at * VALUE_DIM + columns, variance_v, mask=is_column)
        if covariance.dtype.element_ty == tl.float16:
            moment = tl.clamp(moment, -65504.0, 65504.0)
        rows = tl.arange(0, _padded(HEAD_DIM))
        elements = (at * HEAD_DIM + rows)[:, None] * VALUE_DIM + columns[None, :]  # [D, V]
        tl.store(covariance + elements, moment, mask=(rows < HEAD_DIM)[:, None] & is_column[None, :])
        if tile == 0:
            _store(key_variance + at * HEAD_DIM, variance_k, HEAD_DIM)


@triton.jit
def pairs_kernel(
    q_bounds,
    kv_bounds,
    kv_num_blocks,
    kv_indices,
    pairs,
    q_bounds_strides,
    kv_bounds_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    pairs_strides,
    LISTED: tl.constexpr,
):
    """Grid: (rows, heads, batches)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    count = tl.load(_at(kv_num_blocks, kv_num_blocks_strides, batch, head) + row * kv_num_blocks_strides[2])
    kv_bounds = _at(kv_bounds, kv_bounds_strides, batch, head)
    listed = _at(kv_indices, kv_indices_strides, batch, head) + row * kv_indices_strides[2]
    total = tl.zeros([LISTED], tl.int32)
    for start in range(0, count, LISTED):
        column = start + tl.arange(0, LISTED)
        is_used = column < count
        bound = (
            kv_bounds
            + tl.load(listed + column * kv_indices_strides[3], mask=is_used, other=0) * (kv_bounds_strides[2])
        )
        end = tl.load(bound + kv_bounds_strides[2], mask=is_used, other=0)
        total += end - tl.load(bound, mask=is_used, other=0)
    q_bounds = _at(q_bounds, q_bounds_strides, batch, head) + row * q_bounds_strides[2]
    queries = tl.load(q_bounds + q_bounds_strides[2]) - tl.load(q_bounds)
    found = tl.sum(total).to(tl.int64) * queries
    tl.store(_at(pairs, pairs_strides, batch, head) + row * pairs_strides[2], found)


@triton.jit
def left_kernel(
    keys,
    block_of_key,
    counts,
    indices,
    left,
    keys_strides,
    counts_strides,
    indices_strides,
    left_strides,
    blocks,
    LISTED: tl.constexpr,
):
    """Grid: (rows, heads, batches). A program writes the keys of all blocks, then takes away the listed ones."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    keys = _at(keys, keys_strides, batch, head)
    left = _at(left, left_strides, batch, head) + row * left_strides[2]
    for start in range(0, blocks, LISTED):
        block = start + tl.arange(0, LISTED)
        is_block = block < blocks
        tl.store(left + block, tl.load(keys + block * keys_strides[2], mask=is_block, other=0), mask=is_block)
    tl.debug_barrier()  # all threads of the program have written
    count = tl.load(_at(counts, counts_strides, batch, head) + row * counts_strides[2])
    listed = _at(indices, indices_strides, batch, head) + row * indices_strides[2]
    for start in range(0, count, LISTED):
        column = start + tl.arange(0, LISTED)
        is_used = column < count
        block = tl.load(block_of_key + tl.load(listed + column, mask=is_used, other=0), mask=is_used, other=0)
        tl.atomic_add(left + block, tl.full([LISTED], -1, tl.int32), mask=is_used, sem="relaxed")


@triton.jit
def _load_bias(key_bias, token, is_token, strides):
    bias = tl.load(key_bias + token.to(tl.int64) * strides[2], mask=is_token, other=float("-inf"))
    return bias.to(tl.float32)


@triton.jit
def _weights(key_bias, token, is_token, strides, top):
    """exp(bias - top), 0 beyond the block."""
    if key_bias is not None:
        return tl.exp(_load_bias(key_bias, token, is_token, strides) - _finite(top))
    return tl.where(is_token, 1.0, 0.0)


@triton.jit
def _store(pointer, row, DIM: tl.constexpr):
    column = tl.arange(0, _padded(DIM))
    tl.store(pointer + column, row, mask=column < DIM)
