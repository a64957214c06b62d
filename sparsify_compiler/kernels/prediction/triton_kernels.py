"""The Triton kernels of prediction.

`top_k_kernel`: one program selects for BLOCK_M query groups of one head. It computes their scores again in every
pass over the keys, which at a low rank costs less than storing them, and keeps only counts. Each of 16 passes finds
two bits of the groups' thresholds, from the highest down; one more pass lists the keys.

For groups of several queries, it would cost too much to compute the scores again:

    softmax_kernel    queries, keys -> highest, part: the numbers that turn a query's scores into its softmax
    add_up_kernel     some groups -> rows of their scores, which are stored
    top_k_kernel      these rows -> the keys of these groups

Shapes in comments: M = BLOCK_M groups or queries, N = BLOCK_N keys, R = padded RANK.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.helpers import LOG2_E, _at, _load_rows

HIGHEST = tl.constexpr(3.4028234663852886e38)
"""The largest finite number. In a softmax +inf counts as HIGHEST; a NaN score counts as -HIGHEST."""


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
    """Grid: (tiles of groups, heads, batches). `most`: the most keys that a row can hold. Without a `key`, `query`
    holds rows of scores [B, H, groups, tokens].
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_group = group < groups
    kv_num_blocks = _at(kv_num_blocks, kv_num_blocks_strides, batch, head) + group
    wanted = tl.minimum(tl.load(_at(budget, budget_strides, batch, head)), most)
    if wanted <= 0:
        tl.store(kv_num_blocks, tl.zeros([BLOCK_M], tl.int32), mask=is_group)
    else:
        if key_bias is not None:
            key_bias = _at(key_bias, key_bias_strides, batch, head)
        query = _at(query, query_strides, batch, head)
        if key is None:
            q = query + tl.minimum(group, groups - 1).to(tl.int64) * query_strides[2]  # [M]
        else:
            key = _at(key, key_strides, batch, head // queries_per_key_head)
            q = _load_rows(query, group, is_group, query_strides, RANK, ALIGN)  # [M, R]

        # The largest threshold that at least `wanted` scores reach, as an integer that rises with floats; 0 if
        # fewer reach every threshold. `beyond`: number of scores above the threshold.
        threshold = tl.zeros([BLOCK_M], tl.int32)  # [M]
        beyond = tl.zeros([BLOCK_M], tl.int32)
        for step in range(16):
            shift = 30 - 2 * step
            third = threshold | (tl.full([BLOCK_M], 3, tl.int32) << shift)
            second = threshold | (tl.full([BLOCK_M], 2, tl.int32) << shift)
            first = threshold | (tl.full([BLOCK_M], 1, tl.int32) << shift)
            at_third = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)  # [M, N]
            at_second = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            at_first = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
            for start in range(0, tokens, BLOCK_N):
                scores = _scores(
                    *(q, key, key_bias, start, tokens, scale),
                    *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
                )  # [M, N]
                at_third += (scores >= _float(third)[:, None]).to(tl.int32)
                at_second += (scores >= _float(second)[:, None]).to(tl.int32)
                at_first += (scores >= _float(first)[:, None]).to(tl.int32)
            reach_third = tl.sum(at_third, axis=1)  # [M]
            reach_second = tl.sum(at_second, axis=1)
            reach_first = tl.sum(at_first, axis=1)
            # The order matters: a threshold below all numbers is NaN, which no score reaches.
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
        # [M]
        row = _at(kv_indices, kv_indices_strides, batch, head) + group.to(tl.int64) * kv_indices_strides[2]
        for start in range(0, tokens, BLOCK_N):
            scores = _scores(
                *(q, key, key_bias, start, tokens, scale),
                *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
            )  # [M, N]
            is_above = (scores > limit[:, None]).to(tl.int32)
            is_tied = (scores == limit[:, None]).to(tl.int32)
            # One scan counts both, the ties in the upper half.
            counts = is_above + (is_tied << 16)
            before = tl.cumsum(counts, axis=1) - counts
            above = above_before[:, None] + (before & 0xFFFF)
            tied = tied_before[:, None] + (before >> 16)
            is_chosen = (is_above | (is_tied & (tied < ties[:, None]).to(tl.int32))) > 0
            place = above + tl.minimum(tied, ties[:, None])
            token = (start + tl.arange(0, BLOCK_N))[None, :]  # [1, N]
            # This pass never writes more than `wanted` keys.
            has_room = place < wanted
            tl.store(row[:, None] + place, token, mask=is_chosen & has_room & is_group[:, None])
            above_before += tl.sum(is_above, axis=1)  # [M]
            tied_before += tl.sum(is_tied, axis=1)
        found = tl.minimum(above_before + tl.minimum(tied_before, ties), wanted)
        tl.store(kv_num_blocks, found, mask=is_group)


@triton.jit
def softmax_kernel(
    query,
    key,
    budget,
    key_bias,
    highest,
    part,
    query_strides,
    key_strides,
    budget_strides,
    key_bias_strides,
    highest_strides,
    part_strides,
    queries,
    tokens,
    queries_per_key_head,
    scale,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid: (tiles of queries, heads, batches). A query's softmax is part exp(min(score, highest) - highest),
    which is finite for all scores; part is 0 where no key is visible.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if tl.load(_at(budget, budget_strides, batch, head)) <= 0:
        return
    key = _at(key, key_strides, batch, head // queries_per_key_head)
    if key_bias is not None:
        key_bias = _at(key_bias, key_bias_strides, batch, head)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_query = token < queries
    query = _at(query, query_strides, batch, head)
    q = _load_rows(query, token, is_query, query_strides, RANK, ALIGN)  # [M, R]
    most = tl.full([BLOCK_M], -HIGHEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        scores = _scores(
            *(q, key, key_bias, start, tokens, scale),
            *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
        )  # [M, N]
        new_most = tl.minimum(tl.maximum(most, tl.max(scores, axis=1)), HIGHEST)  # [M]
        total = total * _share(most, new_most) + tl.sum(_share(scores, new_most[:, None]), axis=1)
        most = new_most
    tl.store(_at(highest, highest_strides, batch, head) + token, most, mask=is_query)
    part = _at(part, part_strides, batch, head)
    tl.store(part + token, tl.where(total > 0.0, 1.0 / total, 0.0), mask=is_query)


@triton.jit
def add_up_kernel(
    query,
    key,
    budget,
    key_bias,
    highest,
    part,
    q_bounds,
    scores,
    query_strides,
    key_strides,
    budget_strides,
    key_bias_strides,
    highest_strides,
    part_strides,
    scores_strides,
    tokens,
    queries_per_key_head,
    scale,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid: (groups x tiles of keys, heads, batches). `q_bounds` begins with the first of these groups. Rows of
    `scores` hold whole tiles. Keys are the rows of a product, so a small group leaves little of it empty.
    """
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if tl.load(_at(budget, budget_strides, batch, head)) <= 0:
        return
    tiles = tl.cdiv(tokens, BLOCK_N)
    group = tl.program_id(0) // tiles
    start = tl.program_id(0) % tiles * BLOCK_N
    key = _at(key, key_strides, batch, head // queries_per_key_head)
    if key_bias is not None:
        key_bias = _at(key_bias, key_bias_strides, batch, head)
    # [N, R] and [N]
    k, bias = _load_keys(key, key_bias, start, tokens, key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN)
    query = _at(query, query_strides, batch, head)
    highest = _at(highest, highest_strides, batch, head)
    part = _at(part, part_strides, batch, head)

    begin, end = tl.load(q_bounds + group), tl.load(q_bounds + group + 1)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # [N, M]
    for first in range(begin, end, BLOCK_M):
        lane = first + tl.arange(0, BLOCK_M)  # [M]
        member = tl.minimum(lane, end - 1)  # surplus lanes repeat the last query, with part 0
        q = _load_rows(query, member, member < end, query_strides, RANK, ALIGN)  # [M, R]
        found = _finished(tl.dot(k, q.T, input_precision="ieee"), bias[:, None], scale)  # [N, M]
        parts = tl.load(part + member, mask=lane < end, other=0.0)
        sums += parts[None, :] * _share(found, tl.load(highest + member)[None, :])
    row = tl.where((bias != float("-inf")) & (begin < end), tl.sum(sums, axis=1), float("-inf"))  # [N]
    scores = _at(scores, scores_strides, batch, head) + group.to(tl.int64) * scores_strides[2]
    tl.store(scores + start + tl.arange(0, BLOCK_N), row)


@triton.jit
def _share(score, highest):
    """exp(score - highest), and 1 for a larger score. `highest` is finite."""
    return tl.exp2((tl.minimum(score, highest) - highest) * LOG2_E)


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
    """[BLOCK_M, BLOCK_N] fp32, the same bits in every pass; -inf where a key is hidden or beyond the last.
    Without a `key`, `q` holds pointers [BLOCK_M] to rows of scores.
    """
    if key is None:
        token = start + tl.arange(0, BLOCK_N)
        return tl.load(q[:, None] + token[None, :], mask=(token < tokens)[None, :], other=float("-inf"))
    else:
        k, bias = _load_keys(
            *(key, key_bias, start, tokens),
            *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
        )
        return _finished(tl.dot(q, k.T, input_precision="ieee"), bias[None, :], scale)


@triton.jit
def _load_keys(
    key,
    key_bias,
    start,
    tokens,
    key_strides,
    key_bias_strides,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(keys [BLOCK_N, padded RANK], their bias [BLOCK_N] fp32, -inf where a key is hidden or beyond the last)."""
    token = start + tl.arange(0, BLOCK_N)
    is_key = token < tokens
    k = _load_rows(key, token, is_key, key_strides, RANK, ALIGN)
    if key_bias is None:
        return k, tl.where(is_key, 0.0, float("-inf"))
    else:
        bias = tl.load(key_bias + token.to(tl.int64) * key_bias_strides[2], mask=is_key, other=float("-inf"))
        return k, bias.to(tl.float32)


@triton.jit
def _finished(products, bias, scale):
    """Scores from products and the bias of their keys."""
    scores = tl.fma(products, scale, bias)  # explicit: the compiler might fuse in only one pass
    scores = tl.where(scores == scores, scores, -HIGHEST)
    return tl.where(bias == float("-inf"), float("-inf"), scores)


@triton.jit
def _float(image):
    """The float of an integer that, read as unsigned, rises with floats. Beyond the infinities it is NaN."""
    return tl.where(image < 0, image & 0x7FFFFFFF, ~image).to(tl.float32, bitcast=True)
