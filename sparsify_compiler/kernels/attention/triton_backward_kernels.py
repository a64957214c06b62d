"""The Triton kernels of attention's backward pass.

With P the weights and delta = rowsum(dO * O) - dlse:  dS = P * (dO Vᵀ - delta),  dQ = scale dS K,
dK = scale dSᵀ Q,  dV = Pᵀ dO. The forward pass keeps nothing of P: every kernel computes it again.

    rows       delta of every query, and the numbers that turn its scores into weights
    queries    dQ: one program computes one tile of queries and goes through the listed keys, like the forward pass
    readers    the table's transpose: the query blocks that read each key block
    keys       dK and dV: one program computes one tile of keys and goes through the queries that read it

Grids: (tiles, heads, batches); for `readers` (query blocks, heads, batches).

The transpose is a matrix of bits. Bit j of word [g, i] says whether query block i reads key block 64 g + j. It is
as large as a table that lists a 32nd of all pairs. Atomics on integers build it, so the result is the same on every
run. The query blocks that read a tile of keys are laid end to end, as the forward pass lays key blocks; all others
count as empty.

A tile of keys belongs to GROUP consecutive key blocks. With GROUP 1, no product is wasted: a query that reads one
key of the tile reads them all. But blocks of single keys would leave their tiles almost empty. With GROUP 64 they
fill their tiles; a query that reads any of these blocks is multiplied with all of them, under a mask. There a query
that is not finite also makes keys NaN that it does not read.

Alternatively `queries` adds to dK and dV while it runs. For short key blocks this is much less work. It uses
atomics on floats, whose order and rounding differ from run to run.

Shapes in comments are as in `triton_kernels.py`.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.attention.triton_kernels import (
    _bias_of,
    _blocks_of,
    _lay_end_to_end,
    _range_at,
    _tile_at,
    _tokens_of_tile,
)
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.helpers import (
    LOG2_E,
    _at,
    _block_of_tile,
    _finite,
    _load_rows,
    _padded,
    _rows,
)

WORD = tl.constexpr(configs.WORD)
COARSE = tl.constexpr(1024.0)
"""A larger lse is computed again, as shift and log_sum: with a bias of -1e9, rounding leaves it no digit of the
weights."""


@triton.jit
def rows_kernel(
    query,
    key,
    out,
    d_out,
    lse,
    d_lse,
    delta,
    shift,
    log_sum,
    q_bounds,
    kv_bounds,
    kv_num_blocks,
    kv_indices,
    q_order,
    kv_order,
    key_bias,
    query_strides,
    key_strides,
    out_strides,
    d_out_strides,
    lse_strides,
    d_lse_strides,
    delta_strides,
    q_bounds_strides,
    kv_bounds_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    q_order_strides,
    kv_order_strides,
    key_bias_strides,
    q_blocks,
    queries_per_key_head,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Fill delta, shift and log_sum, which have the same strides.

    A score s in base 2 has the weight 2 ** (s - shift - log_sum). Without a bias log_sum is 0 and is not written.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    q_bounds = _at(q_bounds, q_bounds_strides, batch, head)
    block = _block_of_tile(tile, q_bounds, q_blocks, BLOCK_M)
    if q_order is not None:
        q_order = _at(q_order, q_order_strides, batch, head)
    q_token, is_query, rows = _tokens_of_tile(tile, block, q_bounds, q_order, BLOCK_M)
    if rows <= 0:
        return

    # [M, Dv]
    o = _load_rows(_at(out, out_strides, batch, head), q_token, is_query, out_strides, VALUE_DIM, ALIGN)
    do = _load_rows(
        _at(d_out, d_out_strides, batch, head), q_token, is_query, d_out_strides, VALUE_DIM, ALIGN
    )
    # [M]
    of_lse = tl.load(
        _at(d_lse, d_lse_strides, batch, head) + q_token * d_lse_strides[2], mask=is_query, other=0.0
    )
    row = tl.load(_at(lse, lse_strides, batch, head) + q_token * lse_strides[2], mask=is_query, other=0.0)
    at = batch * delta_strides[0] + head * delta_strides[1] + q_token
    tl.store(delta + at, tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1) - of_lse, mask=is_query)
    row_shift = tl.where(row == float("-inf"), 0.0, row * LOG2_E)

    if key_bias is not None:
        row_log_sum = tl.zeros([BLOCK_M], tl.float32)
        size = tl.abs(row)
        if tl.max(tl.where(size < float("inf"), size, 0.0)) > COARSE:
            key = _at(key, key_strides, batch, head // queries_per_key_head)
            kv_bounds = _at(kv_bounds, kv_bounds_strides, batch, head)
            listed_blocks = tl.load(_at(kv_num_blocks, kv_num_blocks_strides, batch, head) + block)
            kv_indices = (
                _at(kv_indices, kv_indices_strides, batch, head) + block.to(tl.int64) * kv_indices_strides[2]
            )
            if kv_order is not None:
                kv_order = _at(kv_order, kv_order_strides, batch, head)
            key_bias = _at(key_bias, key_bias_strides, batch, head)
            q = _load_rows(
                _at(query, query_strides, batch, head), q_token, is_query, query_strides, HEAD_DIM, ALIGN
            )  # [M, D]
            row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            for chunk in range(0, listed_blocks, CHUNK):
                first, sizes, distances, keys = _lay_end_to_end(
                    kv_indices, kv_bounds, chunk, listed_blocks, CHUNK
                )
                distance, range_end = _range_at(0, first, sizes, distances)
                for start in range(0, keys, BLOCK_N):
                    is_key = start + tl.arange(0, BLOCK_N) < keys  # [N]
                    token, distance, range_end = _tile_at(
                        start, first, sizes, distances, distance, range_end, BLOCK_N
                    )
                    if kv_order is not None:
                        token = tl.load(kv_order + token, mask=is_key, other=0)
                    bias = _bias_of(token, is_key, keys - start, key_bias, key_bias_strides, BLOCK_N)
                    k = _load_rows(key, token, is_key, key_strides, HEAD_DIM, ALIGN)  # [N, D]
                    # [M, N]
                    scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E) + bias[None, :]
                    new_max = tl.maximum(row_max, tl.max(scores, axis=1))  # [M]
                    row_sum = row_sum * tl.exp2(row_max - _finite(new_max))
                    row_sum += tl.sum(tl.exp2(scores - _finite(new_max)[:, None]), axis=1)
                    row_max = new_max
            row_shift = _finite(row_max)
            row_log_sum = tl.where(row_sum == 0.0, 0.0, tl.log2(row_sum))
        tl.store(log_sum + at, row_log_sum, mask=is_query)
    tl.store(shift + at, row_shift, mask=is_query)


@triton.jit
def queries_kernel(
    query,
    key,
    value,
    d_out,
    delta,
    shift,
    log_sum,
    d_query,
    d_key,
    d_value,
    q_bounds,
    kv_bounds,
    kv_num_blocks,
    kv_indices,
    q_order,
    kv_order,
    key_bias,
    query_strides,
    key_strides,
    value_strides,
    d_out_strides,
    delta_strides,
    d_query_strides,
    d_key_strides,
    d_value_strides,
    q_bounds_strides,
    kv_bounds_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    q_order_strides,
    kv_order_strides,
    key_bias_strides,
    q_blocks,
    queries_per_key_head,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Fill d_query, and add to d_key and d_value [B, Hkv, Sk, D|Dv] fp32, if given."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    q_bounds = _at(q_bounds, q_bounds_strides, batch, head)
    block = _block_of_tile(tile, q_bounds, q_blocks, BLOCK_M)
    if q_order is not None:
        q_order = _at(q_order, q_order_strides, batch, head)
    q_token, is_query, rows = _tokens_of_tile(tile, block, q_bounds, q_order, BLOCK_M)
    if rows <= 0:
        return

    query = _at(query, query_strides, batch, head)
    key = _at(key, key_strides, batch, head // queries_per_key_head)
    value = _at(value, value_strides, batch, head // queries_per_key_head)
    d_out = _at(d_out, d_out_strides, batch, head)
    kv_bounds = _at(kv_bounds, kv_bounds_strides, batch, head)
    listed_blocks = tl.load(_at(kv_num_blocks, kv_num_blocks_strides, batch, head) + block)
    kv_indices = _at(kv_indices, kv_indices_strides, batch, head) + block.to(tl.int64) * kv_indices_strides[2]
    if kv_order is not None:
        kv_order = _at(kv_order, kv_order_strides, batch, head)
    if key_bias is not None:
        key_bias = _at(key_bias, key_bias_strides, batch, head)
    if d_key is not None:
        d_key = _at(d_key, d_key_strides, batch, head // queries_per_key_head)
        d_value = _at(d_value, d_value_strides, batch, head // queries_per_key_head)

    q = _load_rows(query, q_token, is_query, query_strides, HEAD_DIM, ALIGN)  # [M, D]
    do = _load_rows(d_out, q_token, is_query, d_out_strides, VALUE_DIM, ALIGN)  # [M, Dv]
    at = batch * delta_strides[0] + head * delta_strides[1] + q_token  # [M]
    row_delta = tl.load(delta + at, mask=is_query, other=0.0)
    row_shift = tl.load(shift + at, mask=is_query, other=float("inf"))  # weight 0
    if key_bias is not None:
        row_log_sum = tl.load(log_sum + at, mask=is_query, other=0.0)
    acc = tl.zeros([BLOCK_M, _padded(HEAD_DIM)], tl.float32)  # [M, D]

    for chunk in range(0, listed_blocks, CHUNK):
        first, sizes, distances, keys = _lay_end_to_end(kv_indices, kv_bounds, chunk, listed_blocks, CHUNK)
        distance, range_end = _range_at(0, first, sizes, distances)
        for start in range(0, keys, BLOCK_N):
            is_key = start + tl.arange(0, BLOCK_N) < keys  # [N]
            token, distance, range_end = _tile_at(
                start, first, sizes, distances, distance, range_end, BLOCK_N
            )
            if kv_order is not None:
                token = tl.load(kv_order + token, mask=is_key, other=0)
            bias = _bias_of(token, is_key, keys - start, key_bias, key_bias_strides, BLOCK_N)
            k = _load_rows(key, token, is_key, key_strides, HEAD_DIM, ALIGN)  # [N, D]
            v = _load_rows(value, token, is_key, value_strides, VALUE_DIM, ALIGN)  # [N, Dv]
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E) + bias[None, :]  # [M, N]
            scores = scores - row_shift[:, None]
            if key_bias is not None:
                scores = scores - row_log_sum[:, None]
            weights = tl.exp2(scores)
            d_weights = tl.dot(do, v.T, input_precision="ieee")  # [M, N]
            d_scores = (weights * (d_weights - row_delta[:, None])).to(k.dtype)
            acc = tl.dot(d_scores, k, acc, input_precision="ieee")  # [M, D]
            if d_key is not None:
                sums, mask = _rows(d_value, token, is_key, d_value_strides, VALUE_DIM, ALIGN)
                sum_v = tl.dot(weights.to(do.dtype).T, do, input_precision="ieee")  # [N, Dv]
                tl.atomic_add(sums, sum_v, mask=mask, sem="relaxed")
                sums, mask = _rows(d_key, token, is_key, d_key_strides, HEAD_DIM, ALIGN)
                sum_k = tl.dot(d_scores.T, q, input_precision="ieee")  # [N, D]
                tl.atomic_add(sums, sum_k * scale, mask=mask, sem="relaxed")

    q_token, is_query, _ = _tokens_of_tile(tile, block, q_bounds, q_order, BLOCK_M)
    d_query = _at(d_query, d_query_strides, batch, head)
    elements, mask = _rows(d_query, q_token, is_query, d_query_strides, HEAD_DIM, ALIGN)
    tl.store(elements, (acc * scale).to(d_query.dtype.element_ty), mask=mask)


@triton.jit
def readers_kernel(
    readers,
    kv_num_blocks,
    kv_indices,
    readers_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    CHUNK: tl.constexpr,
):
    """Set the bits of one query block in `readers` [B|1, H|1, ceil(Nk / 64), Nq] int64, which is 0 before."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    readers = _at(readers, readers_strides, batch, head) + block
    listed_blocks = tl.load(_at(kv_num_blocks, kv_num_blocks_strides, batch, head) + block)
    kv_indices = _at(kv_indices, kv_indices_strides, batch, head) + block.to(tl.int64) * kv_indices_strides[2]
    for chunk in range(0, listed_blocks, CHUNK):
        entry = chunk + tl.arange(0, CHUNK)  # [CHUNK]
        is_listed = entry < listed_blocks
        listed = tl.load(kv_indices + entry, mask=is_listed, other=0).to(tl.int64)
        bit = tl.full([CHUNK], 1, tl.int64) << (listed % WORD)
        tl.atomic_or(readers + listed // WORD * readers_strides[2], bit, mask=is_listed, sem="relaxed")


@triton.jit
def keys_kernel(
    query,
    key,
    value,
    d_out,
    delta,
    shift,
    log_sum,
    d_key,
    d_value,
    readers,
    group_bounds,
    q_bounds,
    kv_bounds,
    q_order,
    kv_order,
    key_bias,
    query_strides,
    key_strides,
    value_strides,
    d_out_strides,
    delta_strides,
    d_key_strides,
    d_value_strides,
    readers_strides,
    group_bounds_strides,
    q_bounds_strides,
    kv_bounds_strides,
    q_order_strides,
    kv_order_strides,
    key_bias_strides,
    q_blocks,
    kv_blocks,
    q_tokens,
    queries_per_key_head,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Fill d_key and d_value [B, H, Sk, D|Dv], separately for each query head.

    group_bounds: every GROUP-th element of kv_bounds, and its last.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group_bounds = _at(group_bounds, group_bounds_strides, batch, head)
    group = _block_of_tile(tile, group_bounds, tl.cdiv(kv_blocks, GROUP), BLOCK_N)
    position, is_key, rows = _tokens_of_tile(tile, group, group_bounds, None, BLOCK_N)
    if rows <= 0:
        return

    query = _at(query, query_strides, batch, head)
    key = _at(key, key_strides, batch, head // queries_per_key_head)
    value = _at(value, value_strides, batch, head // queries_per_key_head)
    d_out = _at(d_out, d_out_strides, batch, head)
    at_row = batch * delta_strides[0] + head * delta_strides[1]
    q_bounds = _at(q_bounds, q_bounds_strides, batch, head)
    if q_order is not None:
        q_order = _at(q_order, q_order_strides, batch, head)
    token = position
    if kv_order is not None:
        kv_order = _at(kv_order, kv_order_strides, batch, head)
        token = tl.load(kv_order + position, mask=is_key, other=0)
    readers = _at(readers, readers_strides, batch, head)
    readers += (group * GROUP // WORD).to(tl.int64) * readers_strides[2]
    if GROUP == 1:
        bits = tl.full([], 1, tl.int64) << (group % WORD)
    else:
        # bit [N]; bits: a number
        bit = _bit_of_block(position, group, _at(kv_bounds, kv_bounds_strides, batch, head), kv_blocks)
        bits = tl.reduce_or(tl.where(is_key, bit, 0), axis=0)

    k = _load_rows(key, token, is_key, key_strides, HEAD_DIM, ALIGN)  # [N, D]
    v = _load_rows(value, token, is_key, value_strides, VALUE_DIM, ALIGN)  # [N, Dv]
    if key_bias is not None:
        key_bias = _at(key_bias, key_bias_strides, batch, head)
        bias = _bias_of(token, is_key, BLOCK_N, key_bias, key_bias_strides, BLOCK_N)  # [N]
    acc_k = tl.zeros([BLOCK_N, _padded(HEAD_DIM)], tl.float32)  # [N, D]
    acc_v = tl.zeros([BLOCK_N, _padded(VALUE_DIM)], tl.float32)  # [N, Dv]

    for chunk in range(0, q_blocks, CHUNK):
        words, first, sizes, distances, queries = _lay_readers_end_to_end(
            readers, bits, q_bounds, chunk, q_blocks, CHUNK
        )
        distance, range_end = _range_at(0, first, sizes, distances)
        for start in range(0, queries, BLOCK_M):
            is_query = start + tl.arange(0, BLOCK_M) < queries  # [M]
            if GROUP == 1:
                q_token, distance, range_end = _tile_at(
                    start, first, sizes, distances, distance, range_end, BLOCK_M
                )
            else:
                block = _blocks_of(start, first, BLOCK_M)  # [M]
                q_token = start + tl.arange(0, BLOCK_M) + tl.gather(distances, block, axis=0)
                is_read = (tl.gather(words, block, axis=0)[None, :] & bit[:, None]) != 0  # [N, M]
            if q_order is not None:
                q_token = tl.load(q_order + q_token, mask=is_query, other=0)

            q = _load_rows(query, q_token, is_query, query_strides, HEAD_DIM, ALIGN)  # [M, D]
            scores = tl.dot(k, q.T, input_precision="ieee") * (scale * LOG2_E)  # [N, M]
            if key_bias is not None:
                scores = scores + bias[:, None]
            # Lanes beyond the queries read the last row, which belongs to no query: cheaper than a mask.
            at = at_row + tl.where(is_query, q_token, q_tokens)
            scores = scores - tl.load(shift + at)[None, :]
            if key_bias is not None:
                scores = scores - tl.load(log_sum + at)[None, :]
            weights = tl.exp2(scores)
            if GROUP > 1:
                weights = tl.where(is_read, weights, 0.0)
            do = _load_rows(d_out, q_token, is_query, d_out_strides, VALUE_DIM, ALIGN)  # [M, Dv]
            acc_v = tl.dot(weights.to(do.dtype), do, acc_v, input_precision="ieee")  # [N, Dv]
            d_weights = tl.dot(v, do.T, input_precision="ieee")  # [N, M]
            row_delta = tl.load(delta + at)  # [M]
            d_scores = weights * (d_weights - row_delta[None, :])
            if GROUP > 1:
                d_scores = tl.where(is_read, d_scores, 0.0)
            acc_k = tl.dot(d_scores.to(q.dtype), q, acc_k, input_precision="ieee")  # [N, D]

    token, is_key, _ = _tokens_of_tile(tile, group, group_bounds, kv_order, BLOCK_N)
    d_key = _at(d_key, d_key_strides, batch, head)
    elements, mask = _rows(d_key, token, is_key, d_key_strides, HEAD_DIM, ALIGN)
    tl.store(elements, (acc_k * scale).to(d_key.dtype.element_ty), mask=mask)
    d_value = _at(d_value, d_value_strides, batch, head)
    elements, mask = _rows(d_value, token, is_key, d_value_strides, VALUE_DIM, ALIGN)
    tl.store(elements, acc_v.to(d_value.dtype.element_ty), mask=mask)


@triton.jit
def _bit_of_block(position, group, kv_bounds, kv_blocks):
    """The bit of each position's key block in the word of its group."""
    block = group * WORD + tl.arange(0, WORD)  # [WORD]
    end = tl.load(kv_bounds + block + 1, mask=block < kv_blocks, other=2147483647)
    number = tl.sum((end[None, :] <= position[:, None]).to(tl.int64), axis=1)  # [N]
    return tl.full(position.shape, 1, tl.int64) << (number % WORD)


@triton.jit
def _lay_readers_end_to_end(readers, bits, q_bounds, chunk, q_blocks, CHUNK: tl.constexpr):
    """(words, then the results of `_lay_end_to_end`) of the query blocks chunk : chunk + CHUNK.

    A block with none of `bits` in its word counts as empty.
    """
    block = chunk + tl.arange(0, CHUNK)  # [CHUNK], as all tensors below
    is_block = block < q_blocks
    word = tl.load(readers + block, mask=is_block, other=0)
    begin = tl.load(q_bounds + block, mask=is_block, other=0)
    end = tl.load(q_bounds + block + 1, mask=is_block, other=0)
    sizes = tl.where((word & bits) != 0, end - begin, 0)
    first = tl.where(is_block, tl.cumsum(sizes, axis=0) - sizes, 2147483647)
    return word, first, sizes, begin - first, tl.sum(sizes)
