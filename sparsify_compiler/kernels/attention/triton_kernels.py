"""The Triton kernel of attention: flash attention over a `BlockTable`.

One program computes one tile of queries: BLOCK_M consecutive positions of one query block, so every row of
the tile reads the same keys. Grid: (tiles, heads, batches), tiles fastest, so that programs that run at the
same time share a head's keys in the L2 cache.

    query blocks    |    block 0     |b1|        block 2        |
    query tiles     | t0  | t1  | t2 |t3| t4  | t5  | t6  | t7  |        t2, t3, t7 are masked at their ends

Block i takes the tiles from number q_bounds[i] // BLOCK_M + i on. This leaves room for its ceil(size / BLOCK_M)
tiles before the first tile of the next block. First tiles rise with i, so a program finds its block by bisection
and needs no map of tiles. A program whose tile no block uses ends at once.

Where tiles are long, a block's last tile may be mostly empty. Then the last rows go into a shorter tile, of the
least length that holds them. Each length has its own launch, with one program for each block. A program ends at
once if its block has no rows left for that length.

    tiles of 128    | t0  | t1  |     t3      | t4  | t5  | t6  |                block 1 has 100 rows
    tails of 64                 |b0|                            |b2|

The listed key blocks are laid end to end, CHUNK of them at a time, and cut into tiles of BLOCK_N keys. So block
sizes do not matter: only the last tile of a chunk is partly empty.

    key positions   |  block 0  |b1| block 2 |   block 3   |             row lists 0, 2, 3
    end to end      |  block 0  | block 2 |   block 3   |
    key tiles       |  n0  |  n1  |  n2  |  n3  |  n4  |

Within a chunk, key number f of listed block c lies at position f + distances[c]. Neighbouring blocks have the
same distance, so they form one range. A tile in which the distance does not change (n0, n2, n3, n4) is a plain
range. In other tiles (n1) each lane finds its block: it counts the blocks that begin at it or before it.

Softmax is online and in base 2: log2(e) is folded into the scale and the bias. Lanes beyond the chunk have
key and value 0 and bias -inf, so scores need no mask.

Shapes in comments: M = BLOCK_M queries, N = BLOCK_N keys, D and Dv = padded HEAD_DIM and VALUE_DIM.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.helpers import (
    LOG2_E,
    _at,
    _block_of_tile,
    _finite,
    _load_rows,
    _padded,
    _rows,
)

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_sparse_attention_kernel(
    query,
    key,
    value,
    out,
    lse,
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
    out_strides,
    lse_strides,
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
    TAIL_OF: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Args: tensors as in `attention.block_sparse_attention`, and the strides of each in elements, 0 where a
    batch or head is shared. ALIGN: every row of query, key, value and out starts at a multiple of this many bytes.
    TAIL_OF: BLOCK_M of the full tiles, in a launch of tails; else 0. LEAST: at most this many rows go into shorter
    tails.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    q_bounds = _at(q_bounds, q_bounds_strides, batch, head)
    block = tile if TAIL_OF else _block_of_tile(tile, q_bounds, q_blocks, BLOCK_M)
    if q_order is not None:
        q_order = _at(q_order, q_order_strides, batch, head)
    q_token, is_query, rows = _tokens_of_tile(tile, block, q_bounds, q_order, BLOCK_M, TAIL_OF)
    if (rows <= LEAST) | ((TAIL_OF > 0) & (rows > BLOCK_M)):
        return

    query = _at(query, query_strides, batch, head)
    key = _at(key, key_strides, batch, head // queries_per_key_head)
    value = _at(value, value_strides, batch, head // queries_per_key_head)
    kv_bounds = _at(kv_bounds, kv_bounds_strides, batch, head)
    listed_blocks = tl.load(_at(kv_num_blocks, kv_num_blocks_strides, batch, head) + block)
    kv_indices = _at(kv_indices, kv_indices_strides, batch, head) + block.to(tl.int64) * kv_indices_strides[2]
    if kv_order is not None:
        kv_order = _at(kv_order, kv_order_strides, batch, head)
    if key_bias is not None:
        key_bias = _at(key_bias, key_bias_strides, batch, head)

    q = _load_rows(query, q_token, is_query, query_strides, HEAD_DIM, ALIGN)  # [M, D]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, _padded(VALUE_DIM)], tl.float32)  # [M, Dv]

    for chunk in range(0, listed_blocks, CHUNK):
        # first, sizes, distances [CHUNK]; keys, distance, range_end: numbers
        first, sizes, distances, keys = _lay_end_to_end(kv_indices, kv_bounds, chunk, listed_blocks, CHUNK)
        distance, range_end = _range_at(0, first, sizes, distances)
        for start in range(0, keys, BLOCK_N):
            is_key = start + tl.arange(0, BLOCK_N) < keys  # [N]
            token, distance, range_end = _tile_at(
                start, first, sizes, distances, distance, range_end, BLOCK_N
            )
            if kv_order is not None:
                token = tl.load(kv_order + token, mask=is_key, other=0)

            bias = _bias_of(token, is_key, keys - start, key_bias, key_bias_strides, BLOCK_N)  # [N]
            k = _load_rows(key, token, is_key, key_strides, HEAD_DIM, ALIGN)  # [N, D]
            scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2_E) + bias[None, :]  # [M, N]
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))  # [M]
            # An infinite maximum is not subtracted: -inf - -inf would make a row with no visible key NaN.
            weights = tl.exp2(scores - _finite(new_max)[:, None])  # [M, N]
            decay = tl.exp2(row_max - _finite(new_max))  # [M]
            row_sum = row_sum * decay + tl.sum(weights, axis=1)
            v = _load_rows(value, token, is_key, value_strides, VALUE_DIM, ALIGN)  # [N, Dv]
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")  # [M, Dv]
            row_max = new_max

    # Computed again, not kept through the loop, which uses every register.
    q_token, is_query, _ = _tokens_of_tile(tile, block, q_bounds, q_order, BLOCK_M, TAIL_OF)
    lse = _at(lse, lse_strides, batch, head)
    tl.store(lse + q_token, (_finite(row_max) + tl.log2(row_sum)) * LN_2, mask=is_query)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out = _at(out, out_strides, batch, head)
    elements, mask = _rows(out, q_token, is_query, out_strides, VALUE_DIM, ALIGN)
    tl.store(elements, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tokens_of_tile(tile, block, bounds, order, BLOCK: tl.constexpr, TAIL_OF: tl.constexpr = 0):
    """(tokens of a tile, whether each belongs to its block, number of the block's tokens from the tile's first on).

    TAIL_OF: the tile holds the tokens that full tiles of this length leave. The volatile load keeps the compiler
    from merging two calls into one.
    """
    begin = tl.load(bounds + block, volatile=True)
    end = tl.load(bounds + block + 1)
    first_row = end - (end - begin) % TAIL_OF if TAIL_OF else begin + (tile - begin // BLOCK - block) * BLOCK
    token = first_row + tl.arange(0, BLOCK)  # [BLOCK]
    is_token = token < end
    if order is not None:
        token = tl.load(order + token, mask=is_token, other=0)
    return token, is_token, end - first_row


@triton.jit
def _lay_end_to_end(kv_indices, kv_bounds, chunk, listed_blocks, CHUNK: tl.constexpr):
    """(first, sizes, distances, keys) of the listed blocks chunk : chunk + CHUNK.

    first: number of each block's first key; 2147483647 in lanes without a block. distances: position - number.
    keys: the total number of keys.
    """
    entry = chunk + tl.arange(0, CHUNK)  # [CHUNK], as all tensors below
    is_listed = entry < listed_blocks
    block = tl.load(kv_indices + entry, mask=is_listed, other=0)
    begin = tl.load(kv_bounds + block, mask=is_listed, other=0)
    sizes = tl.load(kv_bounds + block + 1, mask=is_listed, other=0) - begin
    first = tl.where(is_listed, tl.cumsum(sizes, axis=0) - sizes, 2147483647)
    return first, sizes, begin - first, tl.sum(sizes)


@triton.jit
def _tile_at(start, first, sizes, distances, distance, range_end, BLOCK: tl.constexpr):
    """(positions of the tokens numbered start : start + BLOCK, then `_range_at` for the start of the next tile)."""
    number = start + tl.arange(0, BLOCK)  # [BLOCK]
    position = number + distance
    # One outer `if`: with two in a row, Triton no longer copies keys and values ahead of the loop.
    if start + BLOCK >= range_end:
        if start + BLOCK > range_end:
            position = number + tl.gather(distances, _blocks_of(start, first, BLOCK), axis=0)
        distance, range_end = _range_at(start + BLOCK, first, sizes, distances)
    return position, distance, range_end


@triton.jit
def _blocks_of(start, first, BLOCK_N: tl.constexpr):
    """The listed block of each of the key numbers start : start + BLOCK_N."""
    lane = first - start  # [CHUNK]
    begun = tl.histogram(lane, BLOCK_N, mask=(lane >= 0) & (lane < BLOCK_N))  # [N]
    return tl.sum((lane < 0).to(tl.int32)) + tl.cumsum(begun, axis=0) - 1


@triton.jit
def _range_at(number, first, sizes, distances):
    """The range of neighbouring keys that contains `number`: (position - number, number of its end)."""
    distance = tl.sum(tl.where((first <= number) & (number - first < sizes), distances, 0))
    return distance, tl.min(tl.where((first > number) & (distances != distance), first, 2147483647))


@triton.jit
def _bias_of(token, is_key, lanes, key_bias, strides, BLOCK: tl.constexpr):
    """The term added to the scores, in base 2: the keys' bias or 0 in the first `lanes`, -inf in the others."""
    bias = tl.zeros([BLOCK], tl.float32)
    if key_bias is not None:
        bias = tl.load(key_bias + token.to(tl.int64) * strides[2], mask=is_key, other=0.0)
        bias = bias.to(tl.float32) * LOG2_E
    # Not is_key: the compiler would keep it for every tile whose copy is in progress.
    return tl.where(tl.arange(0, BLOCK) < lanes, bias, float("-inf"))
