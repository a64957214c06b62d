"""The Triton kernel of prediction.

One program chooses for BLOCK_M query groups of one head. It computes their scores again in every pass over the
keys, which with a low rank costs less than to store them, and keeps nothing but counts. Each of 16 passes finds
two bits of the groups' thresholds, from the highest down; one more lists the keys.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.kernel import _at, _load_rows


@triton.jit
def top_k_kernel(
    query,
    key,
    budget,
    key_bias,
    kv_num_blocks,
    kv_indices,
    query_strides,
    key_strides,
    budget_strides,
    key_bias_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    groups,
    tokens,
    most,
    queries_per_key_head,
    scale,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid: (tiles of groups, heads, batches). `most`: keys that a row has room for."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_group = group < groups
    kv_num_blocks = _at(kv_num_blocks, kv_num_blocks_strides, batch, head) + group
    wanted = tl.minimum(tl.load(_at(budget, budget_strides, batch, head)), most)
    if wanted <= 0:
        tl.store(kv_num_blocks, tl.zeros([BLOCK_M], tl.int32), mask=is_group)
    else:
        key = _at(key, key_strides, batch, head // queries_per_key_head)
        if key_bias is not None:
            key_bias = _at(key_bias, key_bias_strides, batch, head)
        query = _at(query, query_strides, batch, head)
        q = _load_rows(query, group, is_group, query_strides, RANK, ALIGN)

        # The largest threshold that `wanted` scores reach, as an integer that rises with floats; 0 where all
        # are reached by fewer. `beyond` of the scores are above it.
        threshold = tl.zeros([BLOCK_M], tl.int32)
        beyond = tl.zeros([BLOCK_M], tl.int32)
        for step in range(16):
            shift = 30 - 2 * step
            third = threshold | (tl.full([BLOCK_M], 3, tl.int32) << shift)
            second = threshold | (tl.full([BLOCK_M], 2, tl.int32) << shift)
            first = threshold | (tl.full([BLOCK_M], 1, tl.int32) << shift)
            at_third = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            at_second = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            at_first = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for start in range(0, tokens, BLOCK_N):
                scores = _scores(
                    *(q, key, key_bias, start, tokens, scale),
                    *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
                )
                at_third += (scores >= _float(third)[:, None]).to(tl.int32)
                at_second += (scores >= _float(second)[:, None]).to(tl.int32)
                at_first += (scores >= _float(first)[:, None]).to(tl.int32)
            reach_third = tl.sum(at_third, axis=1)
            reach_second = tl.sum(at_second, axis=1)
            reach_first = tl.sum(at_first, axis=1)
            # In this order: a threshold below all numbers is NaN, which no score reaches.
            is_third, is_second, is_first = (
                reach_third >= wanted,
                reach_second >= wanted,
                reach_first >= wanted,
            )
            below = tl.where(is_first, reach_second, reach_first)
            beyond = tl.where(is_third, beyond, tl.where(is_second, reach_third, below))
            lower = tl.where(is_first, first, threshold)
            threshold = tl.where(is_third, third, tl.where(is_second, second, lower))

        ties = tl.where(threshold == 0, 0, wanted - beyond)
        limit = tl.where(threshold == 0, float("-inf"), _float(threshold))
        above_before = tl.zeros([BLOCK_M], tl.int32)
        tied_before = tl.zeros([BLOCK_M], tl.int32)
        row = _at(kv_indices, kv_indices_strides, batch, head) + group.to(tl.int64) * kv_indices_strides[2]
        for start in range(0, tokens, BLOCK_N):
            scores = _scores(
                *(q, key, key_bias, start, tokens, scale),
                *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
            )
            is_above = (scores > limit[:, None]).to(tl.int32)
            is_tied = (scores == limit[:, None]).to(tl.int32)
            # One scan counts both, the ties in the upper half.
            counts = is_above + (is_tied << 16)
            before = tl.cumsum(counts, axis=1) - counts
            above = above_before[:, None] + (before & 0xFFFF)
            tied = tied_before[:, None] + (before >> 16)
            is_chosen = (is_above | (is_tied & (tied < ties[:, None]).to(tl.int32))) > 0
            place = above + tl.minimum(tied, ties[:, None])
            token = (start + tl.arange(0, BLOCK_N))[None, :]
            tl.store(row[:, None] + place, token, mask=is_chosen & is_group[:, None])
            above_before += tl.sum(is_above, axis=1)
            tied_before += tl.sum(is_tied, axis=1)
        tl.store(kv_num_blocks, above_before + tl.minimum(tied_before, ties), mask=is_group)


@triton.jit
def _scores(
    q,
    key,
    key_bias,
    start,
    tokens,
    scale,
    key_strides,
    key_bias_strides,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] fp32, the same bits in every pass; -inf where a key is hidden or not there."""
    token = start + tl.arange(0, BLOCK_N)
    is_key = token < tokens
    k = _load_rows(key, token, is_key, key_strides, RANK, ALIGN)
    scores = tl.dot(q, k.T, input_precision="ieee")
    if key_bias is None:
        scores = scores * scale
    else:
        bias = tl.load(key_bias + token.to(tl.int64) * key_bias_strides[2], mask=is_key, other=float("-inf"))
        bias = bias.to(tl.float32)
        scores = tl.fma(scores, scale, bias[None, :])  # by name: the compiler might fuse in one pass alone
        is_key = bias != float("-inf")
    scores = tl.where(scores == scores, scores, -3.4028234663852886e38)  # NaN is the lowest finite number
    return tl.where(is_key[None, :], scores, float("-inf"))


@triton.jit
def _float(image):
    """The float of an integer that, read without a sign, rises with floats. What is beyond infinities is NaN."""
    return tl.where(image < 0, image & 0x7FFFFFFF, ~image).to(tl.float32, bitcast=True)
