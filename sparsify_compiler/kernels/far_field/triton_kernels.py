"""The Triton kernels of the far field.

    virtual keys      compare -> list
    judge             sample, then three launches of attention -> judge
    near and far      merge, after two launches of attention

`compare` has the scores of the mean query of each block with the mean keys of all blocks, and its output. `list`
selects by gain, lists for each row the blocks that it reads and those that it does not read, and weighs the latter.
See `virtual_keys.py` for the formulas. One program has BLOCK_M rows and goes through BLOCK_N blocks at a time. All
numbers are fp32, and multiplied in full.

`sample` gathers a few queries of each head. From their attention to all keys, to the near field and to the virtual
keys, `judge` decides which terms of the far field a head uses.

In `merge` one program computes VALUE_TILE channels of BLOCK queries of one query block, which share the block's
matrix. Tiles are numbered as in `attention/triton_kernels.py`. Products and sums have the same precision as in
`statistics/triton_kernels.py`.

Shapes in comments: M = BLOCK_M rows or BLOCK queries, N = BLOCK_N blocks, D = padded HEAD_DIM, V = padded VALUE_DIM
or VALUE_TILE, C = CHUNK channels of queries.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.helpers import (
    _at,
    _block_of_tile,
    _load_columns,
    _padded,
    _tokens,
)

TINY = tl.constexpr(1.1754943508222875e-38)
"""The least normal number of fp32."""


@triton.jit
def compare_kernel(
    mean_query,
    mean_square,
    log_weight,
    key_mean,
    value_mean,
    key_variance,
    scores,
    bias,
    far_key,
    far_value,
    lse,
    out,
    q_bounds,
    q_bounds_strides,
    rows,
    blocks,
    tokens,
    heads_per_group,
    scale,
    most_second_order,
    largest,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """scores[row, block] = scale mean_query . key_mean + bias; lse and out of this attention to the means.

    Grid: (tiles of rows, heads, batches). All tensors except `q_bounds` are contiguous. The first tile also writes
    bias, and the means as keys and values in the type of the queries, at most `largest`.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = batch * tl.num_programs(1) + head
    group = batch * (tl.num_programs(1) // heads_per_group) + head // heads_per_group
    q_bounds = _at(q_bounds, q_bounds_strides, batch, head)
    column, value_column = tl.arange(0, _padded(HEAD_DIM)), tl.arange(0, _padded(VALUE_DIM))
    is_column, is_value = column < HEAD_DIM, value_column < VALUE_DIM

    squares = tl.zeros([BLOCK_M, _padded(HEAD_DIM)], tl.float32)  # [M, D]
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        size = _size(q_bounds, row, row < rows)
        squares += size[:, None] * _matrix(
            mean_square, at * rows + row, row < rows, column, is_column, HEAD_DIM
        )
    square_of_all = tl.sum(squares, axis=0) / tl.maximum(tokens, 1)  # [D]

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_row = row < rows
    q = _matrix(mean_query, at * rows + row, is_row, column, is_column, HEAD_DIM)  # [M, D]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, _padded(VALUE_DIM)], tl.float32)  # [M, V]
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)  # [N]
        is_block = block < blocks
        k = _matrix(key_mean, group * blocks + block, is_block, column, is_column, HEAD_DIM)  # [N, D]
        v = _matrix(value_mean, group * blocks + block, is_block, value_column, is_value, VALUE_DIM)  # [N, V]
        spread = _matrix(key_variance, group * blocks + block, is_block, column, is_column, HEAD_DIM)
        second_order = 0.5 * scale * scale * tl.sum(spread * square_of_all[None, :], axis=1)  # [N]
        second_order = tl.minimum(second_order, most_second_order, propagate_nan=tl.PropagateNan.ALL)
        weight = tl.load(log_weight + group * blocks + block, mask=is_block, other=float("-inf"))
        offset = weight + second_order
        score = scale * tl.dot(q, k.T, input_precision="ieee") + offset[None, :]  # [M, N]
        score = tl.where(is_block[None, :], score, float("-inf"))
        elements = (at * rows + row)[:, None] * blocks + block[None, :]
        tl.store(scores + elements, score, mask=is_row[:, None] & is_block[None, :])
        if tile == 0:
            tl.store(bias + at * blocks + block, offset, mask=is_block)
            if head % heads_per_group == 0:
                _store_narrow(
                    far_key, group * blocks + block, k, is_block, column, is_column, largest, HEAD_DIM
                )
                _store_narrow(
                    far_value, group * blocks + block, v, is_block, value_column, is_value, largest, VALUE_DIM
                )
        higher = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(score - base[:, None])  # [M, N]
        kept = tl.exp(top - base)
        total = total * kept + tl.sum(weights, axis=1)
        sums = tl.dot(weights, v, sums * kept[:, None], input_precision="ieee")
        top = higher
    tl.store(lse + at * rows + row, tl.where(total == 0.0, float("-inf"), top + tl.log(total)), mask=is_row)
    mean = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    elements = (at * rows + row)[:, None] * VALUE_DIM + value_column[None, :]
    tl.store(out + elements, mean, mask=is_row[:, None] & is_value[None, :])


@triton.jit
def list_kernel(
    mean_square,
    value_mean,
    key_variance,
    value_variance,
    scores,
    lse,
    out,
    flags,
    counts,
    indices,
    new_counts,
    new_indices,
    other_counts,
    other_indices,
    shares,
    limits,
    kept,
    q_bounds,
    kv_bounds,
    counts_strides,
    indices_strides,
    q_bounds_strides,
    kv_bounds_strides,
    rows,
    blocks,
    width,
    tokens,
    heads_per_group,
    scale,
    min_gain,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """List, for each row, the blocks of `indices` and those with a gain above `min_gain`, and apart from them all
    others, by rising number. shares[row] is the softmax of the scores of the others; limits is the root of the
    values' variance under it; kept[0, row] is the attention to the blocks that are
    read, and kept[1, row] the share of the keys that are in them, times the row's share of the queries.

    Grid: (tiles of rows, heads, batches). Tensors without strides are contiguous. `flags` is memory, one
    number for each row and block.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    at = batch * heads + head
    group = batch * (heads // heads_per_group) + head // heads_per_group
    column, value_column = tl.arange(0, _padded(HEAD_DIM)), tl.arange(0, _padded(VALUE_DIM))
    is_column, is_value = column < HEAD_DIM, value_column < VALUE_DIM
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_row = row < rows

    flags += (at * rows + row)[:, None] * blocks  # [M, 1]
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)[None, :]
        tl.store(
            flags + block, tl.zeros([BLOCK_M, BLOCK_N], tl.int8), mask=is_row[:, None] & (block < blocks)
        )
    tl.debug_barrier()
    listed = tl.load(_at(counts, counts_strides, batch, head) + row * counts_strides[2], mask=is_row, other=0)
    indices = _at(indices, indices_strides, batch, head) + row.to(tl.int64)[:, None] * indices_strides[2]
    for first in range(0, tl.minimum(tl.max(listed), width), BLOCK_N):
        place = first + tl.arange(0, BLOCK_N)[None, :]
        is_listed = is_row[:, None] & (place < listed[:, None])
        block = tl.load(indices + place * indices_strides[3], mask=is_listed, other=0)
        tl.store(flags + block, tl.full([BLOCK_M, BLOCK_N], 1, tl.int8), mask=is_listed)
    tl.debug_barrier()

    if min_gain is not None:
        power = _power(
            out, q_bounds, q_bounds_strides, batch, heads, rows, value_column, is_value, VALUE_DIM, NUMBERS
        )
    kv_bounds = _at(kv_bounds, kv_bounds_strides, batch, head)
    keys = tl.load(kv_bounds + blocks).to(tl.float32)
    o = _matrix(out, at * rows + row, is_row, value_column, is_value, VALUE_DIM)  # [M, V]
    square = _matrix(mean_square, at * rows + row, is_row, column, is_column, HEAD_DIM)  # [M, D]
    length = tl.sum(o * o, axis=1)  # [M]
    base = tl.load(lse + at * rows + row, mask=is_row, other=0.0)
    base = tl.where(base == float("-inf"), 0.0, base)
    read = tl.zeros([BLOCK_M], tl.float32)
    read_keys = tl.zeros([BLOCK_M], tl.float32)
    near, far = tl.zeros([BLOCK_M], tl.int32), tl.zeros([BLOCK_M], tl.int32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    new_indices += (at * rows + row)[:, None] * blocks
    other_indices += (at * rows + row)[:, None] * blocks
    scores += (at * rows + row)[:, None] * blocks
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)  # [N]
        is_block = block < blocks
        is_pair = is_row[:, None] & is_block[None, :]  # [M, N]
        is_read = tl.load(flags + block[None, :], mask=is_pair, other=0) > 0
        score = tl.load(scores + block[None, :], mask=is_pair, other=float("-inf"))
        share = tl.exp(score - base[:, None])
        size = _size(kv_bounds, block, is_block)  # [N]
        if min_gain is not None:
            v = _matrix(
                value_mean, group * blocks + block, is_block, value_column, is_value, VALUE_DIM
            )  # [N, V]
            of_values = _matrix(
                value_variance, group * blocks + block, is_block, value_column, is_value, VALUE_DIM
            )
            of_keys = _matrix(key_variance, group * blocks + block, is_block, column, is_column, HEAD_DIM)
            spread = scale * scale * tl.dot(square, of_keys.T, input_precision="ieee")  # [M, N]
            apart = length[:, None] - 2.0 * tl.dot(o, v.T, input_precision="ieee")
            apart = tl.maximum(apart + tl.sum(v * v + of_values, axis=1)[None, :], 0.0)
            part = size / tl.maximum(keys, 1.0)  # [N]
            error = share * spread
            gain = error * error * apart / tl.maximum(power, TINY) / tl.maximum(part, TINY)[None, :]
            is_read = is_read | ((gain > min_gain) & (part > 0.0)[None, :])
        is_read = is_read & is_pair
        is_other = is_pair & (is_read == 0)
        tl.store(flags + block[None, :], is_read.to(tl.int8), mask=is_pair)
        numbers, others = is_read.to(tl.int32), is_other.to(tl.int32)
        of_block = tl.zeros([BLOCK_M, BLOCK_N], tl.int32) + block[None, :]
        tl.store(new_indices + near[:, None] + tl.cumsum(numbers, axis=1) - 1, of_block, mask=is_read)
        tl.store(other_indices + far[:, None] + tl.cumsum(others, axis=1) - 1, of_block, mask=is_other)
        near += tl.sum(numbers, axis=1)
        far += tl.sum(others, axis=1)
        read += tl.sum(tl.where(is_read, share, 0.0), axis=1)
        read_keys += tl.sum(tl.where(is_read, size[None, :], 0.0), axis=1)
        score = tl.where(is_other, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        over = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - over) + tl.sum(tl.exp(score - over[:, None]), axis=1)
        top = higher
    tl.store(new_counts + at * rows + row, near, mask=is_row)
    tl.store(other_counts + at * rows + row, far, mask=is_row)
    of_queries = _size(_at(q_bounds, q_bounds_strides, batch, head), row, is_row) / tl.maximum(tokens, 1)
    tl.store(kept + at * rows + row, read * of_queries, mask=is_row)
    kept += tl.num_programs(2).to(tl.int64) * heads * rows
    tl.store(kept + at * rows + row, read_keys / tl.maximum(keys, 1.0) * of_queries, mask=is_row)
    tl.debug_barrier()

    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)
    variance = tl.zeros([BLOCK_M, _padded(VALUE_DIM)], tl.float32)  # [M, V]
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        is_pair = is_row[:, None] & (block < blocks)[None, :]
        is_other = is_pair & (tl.load(flags + block[None, :], mask=is_pair, other=1) == 0)
        score = tl.load(scores + block[None, :], mask=is_other, other=float("-inf"))
        share = tl.exp(score - top[:, None]) / total[:, None]
        of_values = _matrix(
            value_variance, group * blocks + block, block < blocks, value_column, is_value, VALUE_DIM
        )
        variance = tl.dot(share, of_values, variance, input_precision="ieee")
        elements = (at * rows + row)[:, None] * blocks + block[None, :]
        tl.store(shares + elements, share.to(shares.dtype.element_ty), mask=is_pair)
    elements = (at * rows + row)[:, None] * VALUE_DIM + value_column[None, :]
    limit = tl.sqrt(tl.maximum(variance, TINY, propagate_nan=tl.PropagateNan.ALL))
    tl.store(limits + elements, limit, mask=is_row[:, None] & is_value[None, :])


@triton.jit
def _power(
    out,
    q_bounds,
    strides,
    batch,
    heads,
    rows,
    column,
    is_column,
    VALUE_DIM: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """The mean over the queries of all heads of the squared length of `out`."""
    squares = tl.zeros([NUMBERS], tl.float32)
    for first in range(0, heads * rows, NUMBERS):
        number = first + tl.arange(0, NUMBERS)
        is_number = number < heads * rows
        bounds = q_bounds + batch * strides[0] + (number // rows).to(tl.int64) * strides[1]
        queries = tl.load(bounds + rows, mask=is_number, other=1).to(tl.float32)
        size = _size(bounds, number % rows, is_number)
        o = _matrix(out, batch * heads * rows + number, is_number, column, is_column, VALUE_DIM)
        squares += tl.sum(o * o, axis=1) * size / tl.maximum(queries, 1.0)
    return tl.sum(squares) / heads


@triton.jit
def _size(bounds, block, is_block):
    """The number of tokens of blocks, in fp32; 0 where `is_block` is false."""
    begin = tl.load(bounds + block, mask=is_block, other=0)
    return (tl.load(bounds + block + 1, mask=is_block, other=0) - begin).to(tl.float32)


@triton.jit
def _matrix(pointer, row, is_row, column, is_column, DIM: tl.constexpr):
    """Rows of a contiguous matrix of DIM columns, in fp32; 0 where there is none."""
    elements = pointer + row.to(tl.int64)[:, None] * DIM + column[None, :]
    return tl.load(elements, mask=is_row[:, None] & is_column[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_narrow(pointer, row, matrix, is_row, column, is_column, largest, DIM: tl.constexpr):
    """Store rows of a contiguous matrix in its type, with numbers of at most `largest`."""
    elements = pointer + row.to(tl.int64)[:, None] * DIM + column[None, :]
    if largest is not None:
        matrix = tl.minimum(matrix, largest, propagate_nan=tl.PropagateNan.ALL)
        matrix = tl.maximum(matrix, -largest, propagate_nan=tl.PropagateNan.ALL)
    tl.store(elements, matrix.to(pointer.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def merge_kernel(
    query,
    near_out,
    near_lse,
    far_out,
    far_lse,
    matrices,
    limits,
    out,
    lse,
    q_bounds,
    q_order,
    query_strides,
    near_out_strides,
    near_lse_strides,
    far_out_strides,
    far_lse_strides,
    out_strides,
    lse_strides,
    q_bounds_strides,
    q_order_strides,
    q_blocks,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (query tiles * value tiles, heads, batches). Matrices and limits are contiguous. CHUNK rows of a matrix
    are multiplied at a time."""
    tiles: tl.constexpr = (VALUE_DIM + VALUE_TILE - 1) // VALUE_TILE
    query_tile = tl.program_id(0) // tiles
    value_tile = tl.program_id(0) % tiles
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    q_bounds = _at(q_bounds, q_bounds_strides, batch, head)
    block = _block_of_tile(query_tile, q_bounds, q_blocks, BLOCK)
    begin, end = tl.load(q_bounds + block), tl.load(q_bounds + block + 1)
    first_row = begin + (query_tile - begin // BLOCK - block) * BLOCK
    if first_row >= end:
        return
    if q_order is not None:
        q_order = _at(q_order, q_order_strides, batch, head)
    token, is_query = _tokens(first_row, end, q_order, BLOCK)  # [M]
    columns = value_tile * VALUE_TILE + tl.arange(0, VALUE_TILE)  # [V]
    is_column = columns < VALUE_DIM

    near = _at(near_lse, near_lse_strides, batch, head) + token * near_lse_strides[2]
    far = _at(far_lse, far_lse_strides, batch, head) + token * far_lse_strides[2]
    near = tl.load(near, mask=is_query, other=0.0)  # [M]
    far = tl.load(far, mask=is_query, other=0.0)
    is_alone = far == float("-inf")
    top = tl.maximum(near, far, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == float("-inf"), 0.0, top)
    near_weight = tl.exp(near - base)
    far_weight = tl.exp(far - base)
    total = near_weight + far_weight

    near_out = _at(near_out, near_out_strides, batch, head)
    far_out = _at(far_out, far_out_strides, batch, head)
    near_rows = _load_columns(near_out, token, is_query, near_out_strides, columns, is_column)  # [M, V]
    far_rows = _load_columns(far_out, token, is_query, far_out_strides, columns, is_column)
    if matrices is not None:
        query = _at(query, query_strides, batch, head)
        at = (batch * tl.num_programs(1) + head) * q_blocks + block
        limit = tl.load(limits + at * VALUE_DIM + columns, mask=is_column, other=0.0)[None, :]  # [1, V]
        term = tl.zeros([BLOCK, VALUE_TILE], tl.float32)  # [M, V]
        for first in range(0, HEAD_DIM, CHUNK):
            rows = first + tl.arange(0, CHUNK)  # [C]
            is_row = rows < HEAD_DIM
            q = _load_columns(query, token, is_query, query_strides, rows, is_row)  # [M, C]
            elements = (at * HEAD_DIM + rows)[:, None] * VALUE_DIM + columns[None, :]  # [C, V]
            matrix = tl.load(matrices + elements, mask=is_row[:, None] & is_column[None, :], other=0.0)
            term = tl.dot(q, matrix.to(tl.float32), term, input_precision=PRECISION)  # [M, V]
        term *= scale
        term = tl.where(term > limit, limit, term)
        far_rows += tl.where(term < -limit, -limit, term)
    merged = near_rows * (near_weight / total)[:, None] + far_rows * (far_weight / total)[:, None]
    merged = tl.where(is_alone[:, None], near_rows, merged)

    out = _at(out, out_strides, batch, head)
    elements = out + token.to(tl.int64)[:, None] * out_strides[2] + columns[None, :] * out_strides[3]
    tl.store(elements, merged.to(out.dtype.element_ty), mask=is_query[:, None] & is_column[None, :])
    if value_tile == 0:
        merged_lse = tl.where(is_alone, near, top + tl.log(total))  # [M]
        tl.store(_at(lse, lse_strides, batch, head) + token * lse_strides[2], merged_lse, mask=is_query)


@triton.jit
def sample_kernel(
    query,
    q_bounds,
    q_order,
    samples,
    bounds,
    parts_table,
    query_strides,
    q_bounds_strides,
    q_order_strides,
    q_blocks,
    tokens,
    keys,
    count,
    parts,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Copy `count` queries of a head, from the middle of equal parts of its positions, once for each part of keys.

    Grid: (1, heads, batches). bounds[block]: the number of samples before each block of queries. `parts_table` has
    the four index tensors of a table in which each copy reads one part, [4, parts + 1].
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = batch * tl.num_programs(1) + head
    column = tl.arange(0, _padded(HEAD_DIM))
    number = tl.arange(0, ROWS)  # [ROWS]
    is_row = number < count
    position = ((2 * number + 1).to(tl.int64) * tokens // (2 * count)).to(tl.int32)
    position = tl.where(is_row, position, 2147483647)
    token = position
    if q_order is not None:
        token = tl.load(_at(q_order, q_order_strides, batch, head) + position, mask=is_row, other=0)
    rows = _at(query, query_strides, batch, head) + token.to(tl.int64)[:, None] * query_strides[2]
    is_element = is_row[:, None] & (column < HEAD_DIM)[None, :]
    values = tl.load(rows + column[None, :] * query_strides[3], mask=is_element, other=0.0)
    for copy in range(parts):
        place = (at * parts + copy) * count + number
        tl.store(samples + place[:, None] * HEAD_DIM + column[None, :], values, mask=is_element)
    q_bounds = _at(q_bounds, q_bounds_strides, batch, head)
    for first in range(0, q_blocks + 1, WIDTH):
        block = first + tl.arange(0, WIDTH)
        bound = tl.load(q_bounds + block, mask=block <= q_blocks, other=0)
        before = tl.sum((position[None, :] < bound[:, None]).to(tl.int32), axis=1)
        tl.store(bounds + at * (q_blocks + 1) + block, before, mask=block <= q_blocks)
    if at == 0:
        for first in range(0, parts + 1, WIDTH):
            part = first + tl.arange(0, WIDTH)
            place = parts_table + part
            tl.store(place, part * count, mask=part <= parts)
            tl.store(place + parts + 1, (part.to(tl.int64) * keys // parts).to(tl.int32), mask=part <= parts)
            tl.store(place + 2 * (parts + 1), tl.full([WIDTH], 1, tl.int32), mask=part <= parts)
            tl.store(place + 3 * (parts + 1), part, mask=part <= parts)


@triton.jit
def judge_kernel(
    samples,
    bounds,
    exact_out,
    exact_lse,
    near_out,
    near_lse,
    far_out,
    far_lse,
    matrices,
    limits,
    new_limits,
    gate,
    recall,
    q_order,
    exact_out_strides,
    near_out_strides,
    near_lse_strides,
    far_out_strides,
    far_lse_strides,
    q_order_strides,
    q_blocks,
    tokens,
    count,
    parts,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add up the squared errors of a head's samples without the far field, with it, and with its first order. Set
    the limits to 0 where the first order does not help, and far_lse to -inf where the far field does not.

    Grid: (1, heads, batches). Near and far field have all queries. Tensors without strides are contiguous. A merged
    row is rounded as `merge` rounds it.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = batch * tl.num_programs(1) + head
    column = tl.arange(0, _padded(VALUE_DIM))  # [V]
    is_column = column < VALUE_DIM
    part = tl.arange(0, PARTS)
    is_part = part < parts
    dtype: tl.constexpr = exact_out.dtype.element_ty
    exact_out = _at(exact_out, exact_out_strides, batch, head)
    near_out = _at(near_out, near_out_strides, batch, head) + column * near_out_strides[3]
    far_out = _at(far_out, far_out_strides, batch, head) + column * far_out_strides[3]
    near_lse = _at(near_lse, near_lse_strides, batch, head)
    far_lse = _at(far_lse, far_lse_strides, batch, head)
    if q_order is not None:
        q_order = _at(q_order, q_order_strides, batch, head)
    without, plain, whole, mass = 0.0, 0.0, 0.0, 0.0
    block = 0
    for row in range(count):
        lse = tl.load(exact_lse + (at * parts + part) * count + row, mask=is_part, other=float("-inf"))
        top = tl.max(lse, axis=0)
        top = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        weights = tl.exp(lse - top)  # [PARTS]
        total = tl.sum(weights, axis=0)
        elements = exact_out + (part * count + row)[:, None] * exact_out_strides[2]
        elements += column[None, :] * exact_out_strides[3]
        outs = tl.load(elements, mask=is_part[:, None] & is_column[None, :], other=0.0).to(tl.float32)
        exact = tl.sum(weights[:, None] * outs, axis=0) / tl.where(total == 0.0, 1.0, total)  # [V]
        exact = exact.to(dtype).to(tl.float32)
        lse_of_all = top + tl.log(total)

        token = tl.cast(2 * row + 1, tl.int64) * tokens // (2 * count)
        if q_order is not None:
            token = tl.load(q_order + token).to(tl.int64)
        near = tl.load(near_out + token * near_out_strides[2], mask=is_column, other=0.0).to(tl.float32)
        far = tl.load(far_out + token * far_out_strides[2], mask=is_column, other=0.0).to(tl.float32)
        of_near = tl.load(near_lse + token * near_lse_strides[2])
        of_far = tl.load(far_lse + token * far_lse_strides[2])
        mass += tl.where(total == 0.0, 1.0, tl.exp(of_near - tl.where(total == 0.0, 0.0, lse_of_all)))
        without += _squares(near, exact)
        plain += _squares(_merged(near, far, of_near, of_far, dtype), exact)
        if limits is not None:
            while tl.load(bounds + at * (q_blocks + 1) + block + 1) <= row:
                block += 1
            place = at * q_blocks + block
            term = tl.zeros([_padded(VALUE_DIM)], tl.float32)  # [V]
            for first in range(0, HEAD_DIM, CHUNK):
                channel = first + tl.arange(0, CHUNK)  # [C]
                is_channel = channel < HEAD_DIM
                q = tl.load(
                    samples + (at * parts * count + row) * HEAD_DIM + channel, mask=is_channel, other=0.0
                )
                matrix = _matrix(
                    matrices, place * HEAD_DIM + channel, is_channel, column, is_column, VALUE_DIM
                )
                term += tl.sum(q.to(tl.float32)[:, None] * matrix, axis=0)
            limit = tl.load(limits + place * VALUE_DIM + column, mask=is_column, other=0.0)
            term *= scale
            term = tl.where(term > limit, limit, term)
            far += tl.where(term < -limit, -limit, term)
            whole += _squares(_merged(near, far, of_near, of_far, dtype), exact)
    if limits is not None:
        helps = whole <= plain
        plain = tl.where(helps, whole, plain)
        for first in range(0, q_blocks * VALUE_DIM, WIDTH):
            number = first + tl.arange(0, WIDTH)
            place = at * q_blocks * VALUE_DIM + number
            limit = tl.load(limits + place, mask=number < q_blocks * VALUE_DIM, other=0.0)
            tl.store(new_limits + place, tl.where(helps, limit, 0.0), mask=number < q_blocks * VALUE_DIM)
    is_used = plain <= without  # a NaN error is no improvement
    if not is_used:
        nothing = tl.full([WIDTH], float("-inf"), tl.float32)
        for first in range(0, tokens, WIDTH):
            number = first + tl.arange(0, WIDTH)
            tl.store(far_lse + number * far_lse_strides[2], nothing, mask=number < tokens)
    tl.store(gate + at, tl.where(is_used, 1.0, 0.0))
    tl.store(recall + at, mass / count)


@triton.jit
def _merged(near, far, near_lse, far_lse, dtype: tl.constexpr):
    """One row of `merge`, rounded to the type of its output."""
    top = tl.maximum(near_lse, far_lse, propagate_nan=tl.PropagateNan.ALL)
    base = tl.where(top == float("-inf"), 0.0, top)
    near_weight = tl.exp(near_lse - base)
    far_weight = tl.exp(far_lse - base)
    total = near_weight + far_weight
    merged = near * (near_weight / total) + far * (far_weight / total)
    return tl.where(far_lse == float("-inf"), near, merged).to(dtype).to(tl.float32)


@triton.jit
def _squares(row, exact):
    """The sum of squared differences of two rows."""
    return tl.sum((row - exact) * (row - exact), axis=0)
