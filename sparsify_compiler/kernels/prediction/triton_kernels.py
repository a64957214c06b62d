"""The Triton kernels of prediction.

`top_k_kernel`: one program selects for BLOCK_M query groups of one head at a time. It computes their scores again
in every pass over the keys, which at a low rank costs less than storing them. There are four passes (`_select`).
Each of three counts scores by 11 bits, from the highest down, and so finds these bits of the groups' thresholds;
the last lists the keys.

For groups of several queries, it would cost too much to compute the scores again:

    softmax_kernel    queries, keys -> highest, part: the numbers that turn a query's scores into its softmax
    add_up_kernel     a group -> a row of its scores, which is stored -> the keys of the group

`top_k_kernel` and `add_up_kernel` have as many programs as their memory has room for, and each goes through groups
until none is left. So the number of launches does not depend on the number of groups.

Shapes in comments: M = BLOCK_M groups or queries, N = BLOCK_N keys, R = padded RANK, C = BINS_AT_ONCE counts.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.helpers import LOG2_E, _at, _load_rows

HIGHEST = tl.constexpr(3.4028234663852886e38)
"""The largest finite number. In a softmax +inf counts as HIGHEST; a NaN score counts as -HIGHEST."""
BINS = tl.constexpr(2048)
"""The numbers of 11 bits: counts of a group's scores in one pass."""
SIGN = tl.constexpr(-(2**31))


@triton.jit
def top_k_kernel(
    query,
    key,
    budget,
    key_bias,
    kv_num_blocks,
    kv_indices,
    counts,
    query_strides,
    key_strides,
    budget_strides,
    key_bias_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    heads,
    batches,
    groups,
    tokens,
    most,
    queries_per_key_head,
    scale,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BINS_AT_ONCE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid: (programs,). `most`: the most keys that a row can hold. `counts`: BLOCK_M * BINS for each program."""
    counts += tl.program_id(0).to(tl.int64) * BLOCK_M * BINS
    tiles = tl.cdiv(groups, BLOCK_M)
    for item in range(tl.program_id(0), tiles * heads * batches, tl.num_programs(0)):
        head = (item // tiles % heads).to(tl.int64)
        batch = (item // (tiles * heads)).to(tl.int64)
        group = item % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
        is_group = group < groups
        wanted = tl.minimum(tl.load(_at(budget, budget_strides, batch, head)), most)
        found = tl.zeros([BLOCK_M], tl.int32)
        if wanted > 0:
            keys = _at(key, key_strides, batch, head // queries_per_key_head)
            bias = None if key_bias is None else _at(key_bias, key_bias_strides, batch, head)
            q = _load_rows(
                _at(query, query_strides, batch, head), group, is_group, query_strides, RANK, ALIGN
            )  # [M, R]
            indices = _at(kv_indices, kv_indices_strides, batch, head)
            found = _select(
                *(q, keys, bias, indices + group.to(tl.int64) * kv_indices_strides[2], is_group, counts),
                *(wanted, tokens, scale, key_strides, key_bias_strides),
                *(RANK, BLOCK_M, BLOCK_N, BINS_AT_ONCE, ALIGN),
            )
        tl.store(_at(kv_num_blocks, kv_num_blocks_strides, batch, head) + group, found, mask=is_group)


@triton.jit
def _select(
    q,
    key,
    key_bias,
    row,
    is_group,
    counts,
    wanted,
    tokens,
    scale,
    key_strides,
    key_bias_strides,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BINS_AT_ONCE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Write the `wanted` best keys of BLOCK_M groups to `row`, pointers [M]; return their numbers, [M].

    The threshold of a group is the largest image (`_image`) that at least `wanted` scores reach.
    """
    lane = tl.arange(0, BLOCK_M)[:, None] * BINS  # [M, 1]
    threshold = tl.zeros([BLOCK_M], tl.int32)  # its bits so far
    needed = tl.zeros([BLOCK_M], tl.int32) + wanted  # number of scores to take among those with these bits
    is_short = needed < 0  # whether fewer than `wanted` keys are visible
    for step in range(3):
        shift = tl.maximum(21 - 11 * step, 0)
        for first in range(0, BINS, BINS_AT_ONCE):
            bins = first + tl.arange(0, BINS_AT_ONCE)[None, :]  # [1, C]
            tl.store(counts + lane + bins, tl.zeros([BLOCK_M, BINS_AT_ONCE], tl.int32))
        tl.debug_barrier()
        for start in range(0, tokens, BLOCK_N):
            scores = _scores(
                *(q, key, key_bias, start, tokens, scale),
                *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
            )  # [M, N]
            image = _image(scores) ^ SIGN
            # The bits above those of this step; of the first step there are none.
            differs = ((image ^ threshold[:, None]) >> tl.minimum(shift + 11, 31)) != 0
            is_counted = (scores > float("-inf")) & ((step == 0) | (differs == 0)) & is_group[:, None]
            bins = BINS - 1 - ((image >> shift) & (BINS - 1))  # the highest first
            tl.atomic_add(counts + lane + bins, 1, mask=is_counted, sem="relaxed")
        tl.debug_barrier()
        before = tl.zeros([BLOCK_M], tl.int32)  # scores in the bins so far
        above = tl.zeros([BLOCK_M], tl.int32)  # scores above the threshold's bin
        place = tl.zeros([BLOCK_M], tl.int32)  # the threshold's bin
        for first in range(0, BINS, BINS_AT_ONCE):
            bins = first + tl.arange(0, BINS_AT_ONCE)[None, :]
            count = tl.load(counts + lane + bins, cache_modifier=".cg")  # [M, C]
            is_above = (before[:, None] + tl.cumsum(count, axis=1)) < needed[:, None]
            place += tl.sum(is_above.to(tl.int32), axis=1)
            above += tl.sum(tl.where(is_above, count, 0), axis=1)
            before += tl.sum(count, axis=1)
        tl.debug_barrier()  # all counts were read before the next pass clears them
        is_short = is_short | ((step == 0) & (before < needed))
        threshold = threshold | ((BINS - 1 - tl.minimum(place, BINS - 1)) << shift)
        needed -= above

    ties = tl.where(is_short, 0, needed)
    limit = tl.where(is_short, _image(tl.full([BLOCK_M], float("-inf"), tl.float32)), threshold ^ SIGN)
    above_before = tl.zeros([BLOCK_M], tl.int32)
    tied_before = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, tokens, BLOCK_N):
        scores = _scores(
            *(q, key, key_bias, start, tokens, scale),
            *(key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN),
        )  # [M, N]
        image = _image(scores)
        is_above = (image > limit[:, None]).to(tl.int32)
        is_tied = (image == limit[:, None]).to(tl.int32)
        # One scan counts both, the ties in the upper half.
        both = is_above + (is_tied << 16)
        earlier = tl.cumsum(both, axis=1) - both
        tied = tied_before[:, None] + (earlier >> 16)
        is_chosen = (is_above | (is_tied & (tied < ties[:, None]).to(tl.int32))) > 0
        to = above_before[:, None] + (earlier & 0xFFFF) + tl.minimum(tied, ties[:, None])
        token = (start + tl.arange(0, BLOCK_N))[None, :]  # [1, N]
        # This pass never writes more than `wanted` keys.
        has_room = to < wanted
        tl.store(row[:, None] + to, token, mask=is_chosen & has_room & is_group[:, None])
        above_before += tl.sum(is_above, axis=1)  # [M]
        tied_before += tl.sum(is_tied, axis=1)
    return tl.minimum(above_before + tl.minimum(tied_before, ties), wanted)


@triton.jit
def _image(score):
    """An integer that rises with floats; -0 and 0 have the same."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


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
    kv_num_blocks,
    kv_indices,
    scores,
    counts,
    query_strides,
    key_strides,
    budget_strides,
    key_bias_strides,
    highest_strides,
    part_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    heads,
    batches,
    groups,
    tokens,
    room,
    most,
    queries_per_key_head,
    scale,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid: (programs,). Each program has BINS `counts` and a row of `scores`, of `room` numbers: whole tiles of
    BLOCK_N and of AT_ONCE keys. Keys are the rows of a product, so a small group leaves little of it empty.
    """
    counts += tl.program_id(0).to(tl.int64) * BINS
    scores += tl.program_id(0).to(tl.int64) * room
    for item in range(tl.program_id(0), groups * heads * batches, tl.num_programs(0)):
        group = item % groups
        head = (item // groups % heads).to(tl.int64)
        batch = (item // (groups * heads)).to(tl.int64)
        begin, end = tl.load(q_bounds + group), tl.load(q_bounds + group + 1)
        wanted = tl.minimum(tl.load(_at(budget, budget_strides, batch, head)), most)
        found = tl.zeros([1], tl.int32)
        if (wanted > 0) & (begin < end):
            keys = _at(key, key_strides, batch, head // queries_per_key_head)
            bias = None if key_bias is None else _at(key_bias, key_bias_strides, batch, head)
            for start in range(0, room, BLOCK_N):
                row = _added_up(
                    *(_at(query, query_strides, batch, head), keys, bias),
                    *(_at(highest, highest_strides, batch, head), _at(part, part_strides, batch, head)),
                    *(begin, end, start, tokens, scale, query_strides, key_strides, key_bias_strides),
                    *(RANK, BLOCK_M, BLOCK_N, ALIGN),
                )
                tl.store(scores + start + tl.arange(0, BLOCK_N), row)
            tl.debug_barrier()
            indices = _at(kv_indices, kv_indices_strides, batch, head)
            found = _select(
                *(scores + tl.zeros([1], tl.int64), None, None),
                indices + group.to(tl.int64) * kv_indices_strides[2] + tl.zeros([1], tl.int64),
                *(tl.full([1], 1, tl.int1), counts, wanted, room, scale, None, None),
                *(None, 1, AT_ONCE, BINS, ALIGN),
            )
            tl.debug_barrier()  # the row was read before the next group is written to it
        place = _at(kv_num_blocks, kv_num_blocks_strides, batch, head) + group
        tl.store(place + tl.zeros([1], tl.int64), found)


@triton.jit
def _added_up(
    query,
    key,
    key_bias,
    highest,
    part,
    begin,
    end,
    start,
    tokens,
    scale,
    query_strides,
    key_strides,
    key_bias_strides,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """[N]: the sum of the softmax of queries `begin` to `end`, for the keys from `start` on."""
    # [N, R] and [N]
    k, bias = _load_keys(key, key_bias, start, tokens, key_strides, key_bias_strides, RANK, BLOCK_N, ALIGN)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # [N, M]
    for first in range(begin, end, BLOCK_M):
        lane = first + tl.arange(0, BLOCK_M)  # [M]
        member = tl.minimum(lane, end - 1)  # surplus lanes repeat the last query, with part 0
        q = _load_rows(query, member, member < end, query_strides, RANK, ALIGN)  # [M, R]
        found = _finished(tl.dot(k, q.T, input_precision="ieee"), bias[:, None], scale)  # [N, M]
        parts = tl.load(part + member, mask=lane < end, other=0.0)
        sums += parts[None, :] * _share(found, tl.load(highest + member)[None, :])
    return tl.where(bias != float("-inf"), tl.sum(sums, axis=1), float("-inf"))


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
