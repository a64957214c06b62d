"""Functions that the Triton kernels of several ops call. Their names begin with `_`: they are never launched."""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _at(pointer, strides, batch, head):
    """Pointer to the first element of a tensor's batch and head."""
    return pointer + batch * strides[0] + head * strides[1]


@triton.jit
def _block_of_tile(tile, bounds, blocks, BLOCK: tl.constexpr):
    """The last block whose first tile is `tile` or before it."""
    low = 0
    high = blocks - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(bounds + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _tokens(start, end, order, BLOCK: tl.constexpr):
    """(tokens at the positions from `start` on, whether each position lies before `end`)."""
    token = start + tl.arange(0, BLOCK)
    is_token = token < end
    if order is not None:
        token = tl.load(order + token, mask=is_token, other=0)
    return token, is_token


@triton.jit
def _load_rows(pointer, token, keep, strides, DIM: tl.constexpr, ALIGN: tl.constexpr):
    """[tokens, padded DIM] rows of a matrix; 0 where `keep` is false and beyond DIM."""
    elements, mask = _rows(pointer, token, keep, strides, DIM, ALIGN)
    return tl.load(elements, mask=mask, other=0.0)


@triton.jit
def _load_columns(pointer, token, keep, strides, columns, is_column):
    """[tokens, columns] of a matrix in fp32; 0 where `keep` or `is_column` is false."""
    elements = pointer + token.to(tl.int64)[:, None] * strides[2] + columns[None, :] * strides[3]
    return tl.load(elements, mask=keep[:, None] & is_column[None, :], other=0.0).to(tl.float32)


@triton.jit
def _rows(pointer, token, keep, strides, DIM: tl.constexpr, ALIGN: tl.constexpr):
    """(pointers [tokens, padded DIM] to rows of a matrix, mask of those to use)."""
    column = tl.arange(0, _padded(DIM))
    row = tl.multiple_of(pointer + token.to(tl.int64) * strides[2], ALIGN)
    return row[:, None] + column[None, :] * strides[3], keep[:, None] & (column < DIM)[None, :]


@triton.jit
def _finite(x):
    """x, or 0 where it is infinite."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.constexpr_function
def _padded(dim):
    """The width in registers of a row of `dim` elements: `tl.dot` takes powers of two, at least 16."""
    return max(16, triton.next_power_of_2(dim))
