"""The Triton kernel of the far field: the merge of near and far.

One program computes VALUE_TILE channels of BLOCK queries of one query block, which share the block's matrix. Tiles
are numbered as in `attention/triton_kernels.py`. Products and sums have the same precision as in
`statistics/triton_kernels.py`.

Shapes in comments: M = BLOCK queries, V = VALUE_TILE, C = CHUNK channels of queries.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.helpers import _at, _block_of_tile, _load_columns, _tokens


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
            term = tl.dot(q, matrix, term, input_precision=PRECISION)  # [M, V]
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
