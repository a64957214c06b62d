"""The Triton kernels of clustering.

No float is added by an atomic, so results are the same bits on every run, and no kernel waits for the host. All
grids are (programs of one head, heads, batches).

    k-means           start, then nearest -> means for each iteration
    sort by label     rank -> place
    top-p selection   scores -> select

K-means clusters one or two sets of points at once, such as the queries and the keys of a call: the heads of the
second set come after those of the first. `nearest` sorts the tokens of its tile by label, and writes a *cell* for
each label in the tile: where its tokens begin in the sorted tile, times 256, plus their number. `means` reads the
cells of one cluster, which lead to its tokens in rising order. In the last iteration it also writes this order.

Sorting by label alone cuts the tokens into longer tiles. `rank` numbers the tokens of each label within a tile and
counts them. Sums of the counts, computed between the two kernels, give the position where each tile's tokens of a
label begin. `place` puts them there.

Shapes in comments: M = BLOCK_M tokens or rows, N = BLOCK_N clusters, D = padded HEAD_DIM, T = TILE tokens,
C = CHUNK of them, W = WIDTH clusters.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

from sparsify_compiler.kernels.triton.helpers import LOG2_E, _at, _load_rows, _padded


@triton.jit
def start_kernel(
    first,
    second,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    WARM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The centroids before the first iteration, as `nearest` reads them. One program for BLOCK of them.

    Args:
        first, second: two sets of points, see `Points` in `triton.py`; the second may be None.
        heads: the number of heads of `first`.
    """
    head = tl.program_id(1).to(tl.int64)
    if second is None:
        _start(first, head, HEAD_DIM, BLOCK, TILES, WARM, ALIGN)
    else:
        if head < heads:
            _start(first, head, HEAD_DIM, BLOCK, TILES, WARM, ALIGN)
        else:
            _start(second, head - heads, HEAD_DIM, BLOCK, TILES, WARM, ALIGN)


@triton.jit
def _start(
    side,
    head,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    WARM: tl.constexpr,
    ALIGN: tl.constexpr,
):
    points, points_strides, before, before_strides, start, means, shifted, bias, common = side[:9]
    cells, _, totals, tokens, clusters, heads, tiles = side[9:16]
    batch = tl.program_id(2).to(tl.int64)
    cluster = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    is_cluster = cluster < clusters
    if tl.program_id(0) * BLOCK < clusters:
        points = _at(points, points_strides, batch, head)
        at = batch * heads + head
        sums = tl.zeros([BLOCK, _padded(HEAD_DIM)], tl.float32)  # [BLOCK, D]
        for from_ in range(0, clusters, BLOCK):
            other = from_ + tl.arange(0, BLOCK)
            token = tl.load(start + other, mask=other < clusters, other=0) % tokens
            sums += _load_rows(points, token, other < clusters, points_strides, HEAD_DIM, ALIGN).to(
                tl.float32
            )
        mean = tl.sum(sums, axis=0) / clusters  # [D]
        mean = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)  # 0 also for NaN
        if WARM:
            before = _at(before, before_strides, batch, head)
            c = _load_rows(before, cluster, is_cluster, before_strides, HEAD_DIM, 4)  # [BLOCK, D]
        else:
            token = tl.load(start + cluster, mask=is_cluster, other=0) % tokens
            c = _load_rows(points, token, is_cluster, points_strides, HEAD_DIM, ALIGN).to(tl.float32)
        column = tl.arange(0, _padded(HEAD_DIM))
        is_element = is_cluster[:, None] & (column < HEAD_DIM)[None, :]
        elements = (at * clusters + cluster)[:, None] * HEAD_DIM + column[None, :]
        d, offset = _shifted(c, mean[None, :], shifted.dtype.element_ty)
        tl.store(means + elements, c, mask=is_element)
        tl.store(shifted + elements, d, mask=is_element)
        tl.store(bias + at * clusters + cluster, offset, mask=is_cluster)
        tl.store(totals + at * clusters + cluster, 0, mask=is_cluster)
        if tl.program_id(0) == 0:
            tl.store(common + at * HEAD_DIM + column, mean, mask=column < HEAD_DIM)
        for from_ in range(0, tiles, TILES):
            tile = from_ + tl.arange(0, TILES)
            place = (at * clusters + cluster)[:, None] * tiles + tile[None, :]
            tl.store(cells + place, 0, mask=is_cluster[:, None] & (tile < tiles)[None, :])


@triton.jit
def _shifted(c, common, dtype: tl.constexpr):
    """(d, bias): of all centroids c, the nearest to a point x has the largest x.d + bias.

    A common vector changes no distance, but rounding could lose the differences next to it. With d = c - common
    rounded to the type of the points, x.d - d.(d / 2 + common) is exact for the centroid common + d, so points need
    no shift.
    """
    d = (c - common).to(dtype)
    rounded = d.to(tl.float32)
    return d, -tl.sum(rounded * (0.5 * rounded + common), axis=1)


@triton.jit
def nearest_kernel(
    first,
    second,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COUNTED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The label of each point: the centroid with the largest point . shifted + bias. One program for BLOCK_M.

    Each lane of a tile keeps its own best over all tiles of centroids, so the lanes of a row are compared once.

    Args:
        COUNTED: whether to count the points of each label, for all tiles.
    """
    head = tl.program_id(1).to(tl.int64)
    if second is None:
        _nearest(first, head, HEAD_DIM, BLOCK_M, BLOCK_N, COUNTED, ALIGN)
    else:
        if head < heads:
            _nearest(first, head, HEAD_DIM, BLOCK_M, BLOCK_N, COUNTED, ALIGN)
        else:
            _nearest(second, head - heads, HEAD_DIM, BLOCK_M, BLOCK_N, COUNTED, ALIGN)


@triton.jit
def _nearest(
    side,
    head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COUNTED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    points, points_strides, _, _, _, _, shifted, bias, _ = side[:9]
    cells, sorted_, totals, tokens, clusters, heads, tiles, labels = side[9:17]
    tile = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    at = batch * heads + head
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    is_token = token < tokens
    if tile < tiles:
        points = _at(points, points_strides, batch, head)
        shifted += at * clusters * HEAD_DIM
        bias += at * clusters

        x = _load_rows(points, token, is_token, points_strides, HEAD_DIM, ALIGN)  # [M, D]
        lane = tl.arange(0, BLOCK_N)  # [N]
        column = tl.arange(0, _padded(HEAD_DIM))
        best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        best_first = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for from_ in range(0, clusters, BLOCK_N):
            is_cluster = from_ + lane < clusters
            elements = shifted + (from_ + lane)[:, None] * HEAD_DIM + column[None, :]
            c = tl.load(
                elements, mask=is_cluster[:, None] & (column < HEAD_DIM)[None, :], other=0.0
            )  # [N, D]
            offset = tl.load(bias + from_ + lane, mask=is_cluster, other=float("-inf"))  # [N]
            scores = tl.dot(x, c.T, input_precision="ieee") + offset[None, :]  # [M, N]
            is_better = scores > best  # never true for NaN
            best = tl.where(is_better, scores, best)
            best_first = tl.where(is_better, from_, best_first)
        is_top = best == tl.max(best, axis=1)[:, None]  # [M, N]
        label = tl.min(tl.where(is_top, best_first + lane[None, :], 2147483647), axis=1)  # [M]
        if labels is not None:
            tl.store(labels + at * tokens + token, label, mask=is_token)

        label = tl.where(is_token, label, 2147483647)  # behind all others
        other = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [M], along the second axis
        # One sum counts three things, of at most 128 each: smaller labels, equal ones before, and equal ones.
        is_same = (label[:, None] == label[None, :]).to(tl.int32)  # [M, M]
        numbers = (label[None, :] < label[:, None]).to(tl.int32) + (is_same << 16)
        numbers += tl.where(other[None, :] < token[:, None], is_same << 8, 0)
        numbers = tl.sum(numbers, axis=1)  # [M]
        begin, rank, count = numbers & 255, (numbers >> 8) & 255, numbers >> 16
        tl.store(sorted_ + at * tokens + tile * BLOCK_M + begin + rank, token, mask=is_token)
        is_first = is_token & (rank == 0)
        cell = (at * clusters + label) * tiles + tile
        tl.store(cells + cell, (begin * 256 + count).to(tl.int16), mask=is_first)
        if COUNTED:
            tl.atomic_add(totals + at * clusters + label, count, mask=is_first, sem="relaxed")


@triton.jit
def means_kernel(
    first,
    second,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Move each centroid to the mean of its points, if it has any. One program for each centroid.

    Args:
        LAST: whether it is the last iteration. Then the blocks of the clusters are written, if there is memory for
            them; otherwise the centroids as `nearest` reads them, and cells without tokens.
    """
    head = tl.program_id(1).to(tl.int64)
    if second is None:
        _means(first, head, HEAD_DIM, BLOCK_M, BLOCK, TILES, WIDTH, LAST, ALIGN)
    else:
        if head < heads:
            _means(first, head, HEAD_DIM, BLOCK_M, BLOCK, TILES, WIDTH, LAST, ALIGN)
        else:
            _means(second, head - heads, HEAD_DIM, BLOCK_M, BLOCK, TILES, WIDTH, LAST, ALIGN)


@triton.jit
def _means(
    side,
    head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
):
    points, points_strides, _, _, _, means, shifted, bias, common = side[:9]
    cells, sorted_, totals, tokens, clusters, heads, tiles, _, blocks = side[9:18]
    cluster = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    at = batch * heads + head
    if cluster < clusters:
        points = _at(points, points_strides, batch, head)
        cells += (at * clusters + cluster) * tiles
        sorted_ += at * tokens
        if LAST and blocks is not None:
            begin = 0
            for from_ in range(0, cluster, WIDTH):
                other = from_ + tl.arange(0, WIDTH)  # [W]
                begin += tl.sum(tl.load(totals + at * clusters + other, mask=other < cluster, other=0))
        sums = tl.zeros([BLOCK, _padded(HEAD_DIM)], tl.float32)  # [BLOCK, D]
        size = 0
        for from_ in range(0, tiles, TILES):
            tile = from_ + tl.arange(0, TILES)  # [TILES]
            count = tl.load(cells + tile, mask=tile < tiles, other=0).to(tl.int32) & 255
            through = tl.cumsum(count, axis=0)
            found = tl.sum(count)  # a number
            for number in range(0, found, BLOCK):
                member = number + tl.arange(0, BLOCK)  # [BLOCK]
                is_member = member < found
                is_before = through[None, :] <= member[:, None]  # [BLOCK, TILES]
                passed = tl.max(tl.where(is_before, through[None, :], 0), axis=1)  # [BLOCK]
                own = from_ + tl.sum(is_before.to(tl.int32), axis=1)
                cell = tl.load(cells + own, mask=is_member, other=0).to(tl.int32)
                place = own * BLOCK_M + (cell >> 8) + member - passed
                token = tl.load(sorted_ + place, mask=is_member, other=0)
                sums += _load_rows(points, token, is_member, points_strides, HEAD_DIM, ALIGN).to(tl.float32)
                if LAST and blocks is not None:
                    _store_order(blocks, batch, head, begin + size + member, token, is_member)
            size += found
            if not LAST:
                tl.debug_barrier()  # all threads have read the cells
                tl.store(cells + tile, tl.zeros([TILES], tl.int16), mask=tile < tiles)
        if size > 0:
            column = tl.arange(0, _padded(HEAD_DIM))
            is_column = column < HEAD_DIM
            mean = tl.sum(sums, axis=0) / size  # [D]
            tl.store(means + (at * clusters + cluster) * HEAD_DIM + column, mean, mask=is_column)
            if not LAST:
                offset = tl.load(common + at * HEAD_DIM + column, mask=is_column, other=0.0)[None, :]
                d, of_centroid = _shifted(mean[None, :], offset, shifted.dtype.element_ty)  # [1, D], [1]
                elements = shifted + (at * clusters + cluster) * HEAD_DIM + column[None, :]
                tl.store(elements, d, mask=is_column[None, :])
                tl.store(bias + at * clusters + cluster + tl.arange(0, 1), of_centroid)
        if LAST and blocks is not None:
            _store_bounds(blocks, batch, head, cluster, clusters, begin, size, WIDTH)


@triton.jit
def _store_order(blocks, batch, head, position, token, is_member):
    """Store tokens of the video at positions of the video, for all heads that share these blocks."""
    order, _, _, before, _, whole, _, repeat, heads = blocks
    for copy in range(repeat):
        row = (batch * heads + head * repeat + copy) * whole
        tl.store(order + row + before + position, before + token, mask=is_member)


@triton.jit
def _store_bounds(blocks, batch, head, cluster, clusters, begin, size, WIDTH: tl.constexpr):
    """Store the bounds of a cluster; the program of the first one also stores the tokens outside of the video."""
    order, bounds, sizes, before, after, whole, count, repeat, heads = blocks
    leading = tl.minimum(before, 1)  # a block before the video, or none
    tl.store(sizes + (batch * (heads // repeat) + head) * clusters + cluster, size)
    for copy in range(repeat):
        row = batch * heads + head * repeat + copy
        tl.store(bounds + row * count + leading + cluster, before + begin)
        if cluster == 0:
            tl.store(bounds + row * count, 0)
            tl.store(bounds + row * count + count - 1, whole)
            tl.store(bounds + row * count + leading + clusters, whole - after)
            for from_ in range(0, before, WIDTH):
                token = from_ + tl.arange(0, WIDTH)
                tl.store(order + row * whole + token, token, mask=token < before)
            for from_ in range(whole - after, whole, WIDTH):
                token = from_ + tl.arange(0, WIDTH)
                tl.store(order + row * whole + token, token, mask=token < whole)


@triton.jit
def rank_kernel(
    labels,
    ranks,
    counts,
    labels_strides,
    ranks_strides,
    counts_strides,
    tokens,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """ranks[token] = number of tokens before it in its tile with its label. counts[label, tile] = number of tokens
    with the label, written by the last of them; counts of labels that are not in the tile are not written."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    labels = _at(labels, labels_strides, batch, head)
    token = tile * TILE + tl.arange(0, TILE)  # [T]
    is_token = token < tokens
    label = tl.load(labels + token.to(tl.int64) * labels_strides[2], mask=is_token, other=-1)
    before = tl.zeros([TILE], tl.int32)
    count = tl.zeros([TILE], tl.int32)
    for first in range(0, TILE, CHUNK):
        other = tile * TILE + first + tl.arange(0, CHUNK)  # [C]
        other_label = tl.load(labels + other.to(tl.int64) * labels_strides[2], mask=other < tokens, other=-2)
        is_same = label[:, None] == other_label[None, :]  # [T, C]
        is_before = is_same & (other[None, :] < token[:, None])
        before += tl.sum(is_before.to(tl.int32), axis=1)  # [T]
        count += tl.sum(is_same.to(tl.int32), axis=1)
    tl.store(_at(ranks, ranks_strides, batch, head) + token, before, mask=is_token)
    counts = _at(counts, counts_strides, batch, head) + label.to(tl.int64) * counts_strides[2] + tile
    tl.store(counts, count, mask=is_token & (before + 1 == count))


@triton.jit
def place_kernel(
    labels,
    ranks,
    passed,
    bounds,
    order,
    labels_strides,
    ranks_strides,
    passed_strides,
    bounds_strides,
    order_strides,
    tokens,
    TILE: tl.constexpr,
):
    """order[place of the token] = token. `passed`: number of a label's tokens in a tile and the tiles before it."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)  # [T]
    is_token = token < tokens
    labels = _at(labels, labels_strides, batch, head)
    label = tl.load(labels + token.to(tl.int64) * labels_strides[2], mask=is_token, other=0).to(tl.int64)
    passed = _at(passed, passed_strides, batch, head) + label * passed_strides[2] + tile - 1
    place = tl.load(_at(bounds, bounds_strides, batch, head) + label, mask=is_token, other=0)
    place += tl.load(passed, mask=is_token & (tile > 0), other=0)
    place += tl.load(_at(ranks, ranks_strides, batch, head) + token, mask=is_token, other=0)
    tl.store(_at(order, order_strides, batch, head) + place, token, mask=is_token)


@triton.jit
def scores_kernel(
    q_centroids,
    kv_centroids,
    scores,
    q_centroids_strides,
    kv_centroids_strides,
    scores_strides,
    rows,
    clusters,
    queries_per_key_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """scores[row, cluster] = q_centroids[row] . kv_centroids[cluster]. One program for each tile."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    across = tl.cdiv(clusters, BLOCK_N)
    row = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    cluster = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    q_centroids = _at(q_centroids, q_centroids_strides, batch, head)
    kv_centroids = _at(kv_centroids, kv_centroids_strides, batch, head // queries_per_key_head)
    q = _load_rows(q_centroids, row, row < rows, q_centroids_strides, HEAD_DIM, ALIGN)  # [M, D]
    k = _load_rows(kv_centroids, cluster, cluster < clusters, kv_centroids_strides, HEAD_DIM, ALIGN)  # [N, D]
    scores = _at(scores, scores_strides, batch, head) + row.to(tl.int64)[:, None] * scores_strides[2]
    is_score = (row < rows)[:, None] & (cluster < clusters)[None, :]  # [M, N]
    tl.store(scores + cluster[None, :], tl.dot(q, k.T, input_precision="ieee"), mask=is_score)


@triton.jit
def select_kernel(
    scores,
    kv_sizes,
    kv_num_blocks,
    kv_indices,
    kept,
    scores_strides,
    kv_sizes_strides,
    kv_num_blocks_strides,
    kv_indices_strides,
    kept_strides,
    clusters,
    queries_per_key_head,
    scale,
    top_p,
    floor,
    WIDTH: tl.constexpr,
):
    """Select the clusters of one row in one program, WIDTH at a time and without sorting. Every pass computes the
    weights again.

    The bits of non-negative floats rise with the floats. So each of 16 passes finds two bits of the largest
    threshold for which the weights at or above it hold the share and are at least `floor` in number. Of the
    weights equal to the threshold, only the first few that are needed are kept.
    """
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_sizes = _at(kv_sizes, kv_sizes_strides, batch, head // queries_per_key_head)
    scores = _at(scores, scores_strides, batch, head) + row.to(tl.int64) * scores_strides[2]
    scale = scale * LOG2_E

    highest = tl.full([WIDTH], float("-inf"), tl.float32)  # [W]
    for start in range(0, clusters, WIDTH):
        score, size = _load_clusters(scores, kv_sizes, kv_sizes_strides, start, clusters, WIDTH)
        highest = tl.maximum(highest, tl.where(size == 0, float("-inf"), score * scale))
    top = tl.max(highest)  # a number
    masses = tl.zeros([WIDTH], tl.float32)  # [W]
    for start in range(0, clusters, WIDTH):
        masses += _weights(scores, kv_sizes, kv_sizes_strides, start, clusters, scale, top, WIDTH)
    # If no score is above -inf, the weights are NaN.
    total = tl.sum(masses)  # a number
    target = top_p * total

    threshold = tl.full([], 0, tl.uint32)
    reached = clusters  # number of weights at or above the threshold
    beyond = 0  # number of weights above it, and their sum
    beyond_mass = 0.0
    for step in range(16):
        shift = 30 - 2 * step
        third = threshold | (tl.full([], 3, tl.uint32) << shift)
        second = threshold | (tl.full([], 2, tl.uint32) << shift)
        first = threshold | (tl.full([], 1, tl.uint32) << shift)
        third_masses = tl.zeros([WIDTH], tl.float32)  # [W], like the next five
        second_masses = tl.zeros([WIDTH], tl.float32)
        first_masses = tl.zeros([WIDTH], tl.float32)
        third_counts = tl.zeros([WIDTH], tl.int32)
        second_counts = tl.zeros([WIDTH], tl.int32)
        first_counts = tl.zeros([WIDTH], tl.int32)
        for start in range(0, clusters, WIDTH):
            weight = _weights(scores, kv_sizes, kv_sizes_strides, start, clusters, scale, top, WIDTH)
            bits = weight.to(tl.uint32, bitcast=True)  # [W]
            third_masses += tl.where(bits >= third, weight, 0.0)
            second_masses += tl.where(bits >= second, weight, 0.0)
            first_masses += tl.where(bits >= first, weight, 0.0)
            third_counts += (bits >= third).to(tl.int32)
            second_counts += (bits >= second).to(tl.int32)
            first_counts += (bits >= first).to(tl.int32)
        third_mass, third_count = tl.sum(third_masses), tl.sum(third_counts)  # numbers
        second_mass, second_count = tl.sum(second_masses), tl.sum(second_counts)
        first_mass, first_count = tl.sum(first_masses), tl.sum(first_counts)
        if (third_mass >= target) & (third_count >= floor):
            threshold = third
            reached = third_count
        elif (second_mass >= target) & (second_count >= floor):
            threshold = second
            reached = second_count
            beyond = third_count
            beyond_mass = third_mass
        elif (first_mass >= target) & (first_count >= floor):
            threshold = first
            reached = first_count
            beyond = second_count
            beyond_mass = second_mass
        else:
            beyond = first_count
            beyond_mass = first_mass

    weight = tl.where(reached > beyond, threshold.to(tl.float32, bitcast=True), 0.0)
    missing = tl.maximum(target - beyond_mass, 0.0)
    ties = tl.minimum(tl.ceil(missing / tl.where(weight > 0.0, weight, 1.0)), clusters).to(tl.int32)
    ties = tl.minimum(tl.maximum(ties, floor - beyond), reached - beyond)
    keeps_all = (floor >= clusters) | ~(total > 0.0)
    count = tl.where(keeps_all, clusters, beyond + ties)
    tl.store(_at(kv_num_blocks, kv_num_blocks_strides, batch, head) + row, count)
    share = tl.where(count == clusters, 1.0, (beyond_mass + ties * weight) / total)
    tl.store(_at(kept, kept_strides, batch, head) + row, share)

    kv_indices = _at(kv_indices, kv_indices_strides, batch, head) + row.to(tl.int64) * kv_indices_strides[2]
    above_before = 0
    tied_before = 0
    for start in range(0, clusters, WIDTH):
        column = start + tl.arange(0, WIDTH)  # [W], as all tensors below
        is_cluster = column < clusters
        weights = _weights(scores, kv_sizes, kv_sizes_strides, start, clusters, scale, top, WIDTH)
        bits = weights.to(tl.uint32, bitcast=True)
        is_above = (is_cluster & (bits > threshold)).to(tl.int32)
        is_tied = (is_cluster & (bits == threshold)).to(tl.int32)
        # One scan counts both, the ties in the upper half.
        counts = is_above + (is_tied << 16)
        before = tl.cumsum(counts, axis=0) - counts
        tied = tied_before + (before >> 16)
        kept_before = above_before + (before & 0xFFFF) + tl.minimum(tied, ties)
        is_kept = (is_above | (is_tied & (tied < ties).to(tl.int32))) > 0
        place = tl.where(is_kept, kept_before, count + column - kept_before)
        place = tl.where(keeps_all, column, place)
        tl.store(kv_indices + place, column, mask=is_cluster & (place < clusters))
        above_before += tl.sum(is_above)
        tied_before += tl.sum(is_tied)


@triton.jit
def _load_clusters(scores, kv_sizes, kv_sizes_strides, start, clusters, WIDTH: tl.constexpr):
    """(scores, sizes) of the clusters start : start + WIDTH; size 0 beyond the last cluster."""
    column = start + tl.arange(0, WIDTH)  # [W]
    is_cluster = column < clusters
    size = tl.load(kv_sizes + column * kv_sizes_strides[2], mask=is_cluster, other=0)
    return tl.load(scores + column, mask=is_cluster, other=0.0), size


@triton.jit
def _weights(scores, kv_sizes, kv_sizes_strides, start, clusters, scale, top, WIDTH: tl.constexpr):
    """size exp2(score - top), the same bits in every pass; 0 beyond the last cluster."""
    score, size = _load_clusters(scores, kv_sizes, kv_sizes_strides, start, clusters, WIDTH)
    score = tl.fma(score, scale, -top)  # explicit: the compiler might fuse in only one pass
    return tl.where(size == 0, 0.0, size * tl.exp2(score))
