"""Clustering: the launches of the kernels in `triton_kernels.py`, and the work in torch between them.

Nothing is read back from the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.kernels.clustering import empty_blocks, empty_sort, empty_top_p
from sparsify_compiler.kernels.clustering import triton_kernels as kernels
from sparsify_compiler.kernels.triton.launcher import Launch, alignment, with_strides

TILE = 512
"""Number of tokens that one program sorts. Longer tiles compare more pairs, shorter ones need more counts."""
CHUNK = 16
"""Number of tokens that a tile is compared with at one time."""
STARTED = 32
"""Number of centroids that one program prepares for k-means."""
SELECTED_AT_ONCE = 1024
"""Number of clusters whose weights one program has in registers."""


def kmeans(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int
) -> tuple[Tensor, Tensor]:
    """See `clustering.kmeans`."""
    side = Points.of(points, centroids, start, labels=True)
    iterate((side,), warm=bool(warm), first=first, later=later)
    assert side.labels is not None
    return side.means, side.labels


def cluster(
    query: Tensor,
    key: Tensor,
    q_centroids: Tensor,
    kv_centroids: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    warm: bool,
    first: int,
    later: int,
    before: int,
    after: int,
    *,
    blocks: bool,
) -> list[Tensor]:
    """See `clustering.cluster`: both sides in the same launches. Without `blocks` centroids alone."""
    heads, sides, found = query.shape[1], [], list[Tensor]()
    for points, centroids, start in ((query, q_centroids, q_start), (key, kv_centroids, kv_start)):
        memory = empty_blocks(points, len(start), heads, before, after) if blocks else []
        of_clusters = None
        if memory:
            order, bounds, sizes = memory
            of_clusters = Blocks(order, bounds, sizes, before, after)
        sides.append(Points.of(points, centroids, start, blocks=of_clusters))
        found += [sides[-1].means, *memory]
    iterate(sides, warm=warm, first=first, later=later)
    return found


class Blocks(NamedTuple):
    """Memory for the blocks that clusters form in the sequence, as in `clustering.Side`."""

    order: Tensor
    bounds: Tensor
    sizes: Tensor
    before: int
    after: int

    def arguments(self) -> tuple[Tensor | int, ...]:
        """As the kernels read them."""
        heads, whole = self.order.shape[1:]
        return (*self, whole, self.bounds.shape[2], heads // self.sizes.shape[1], heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """A set of points that are clustered, and the memory of its clustering."""

    points: Tensor
    """[B, H, S, D]."""
    centroids: Tensor
    """[B, H, C, D] fp32, those of the call before."""
    start: Tensor
    means: Tensor
    """[B, H, C, D] fp32, those of now."""
    shifted: Tensor
    """[B, H, C, D] in the type of the points, `means` without the vector that they have in common, rounded."""
    bias: Tensor
    """[B, H, C] fp32."""
    common: Tensor
    """[B, H, D] fp32, this vector: the mean of the points of `start`, so it is one for all iterations."""
    cells: Tensor
    """[B, H, C, tiles] int16, see `triton_kernels.py`."""
    sorted: Tensor
    """[B, H, S] int32, the tokens of each tile by label."""
    totals: Tensor
    """[B, H, C] int32, the number of points of each label."""
    tile: int
    """Number of points in a tile."""
    labels: Tensor | None = None
    """[B, H, S] int32, or None if nobody reads them."""
    blocks: Blocks | None = None

    @classmethod
    def of(
        cls,
        points: Tensor,
        centroids: Tensor,
        start: Tensor,
        *,
        labels: bool = False,
        blocks: Blocks | None = None,
    ) -> "Points":
        """The set, with uninitialised memory."""
        batch, heads, tokens, head_dim = points.shape
        lead, tile = centroids.shape[:3], nearest_tiles(points)[0]
        return cls(
            points=points,
            centroids=centroids,
            start=start,
            means=centroids.new_empty(centroids.shape),
            shifted=points.new_empty(centroids.shape),
            bias=centroids.new_empty(lead),
            common=centroids.new_empty(batch, heads, head_dim),
            cells=points.new_empty(*lead, triton.cdiv(tokens, tile), dtype=torch.int16),
            sorted=points.new_empty(points.shape[:3], dtype=torch.int32),
            totals=points.new_empty(lead, dtype=torch.int32),
            tile=tile,
            labels=points.new_empty(points.shape[:3], dtype=torch.int32) if labels else None,
            blocks=blocks,
        )

    def arguments(self) -> tuple[Any, ...]:
        """As the kernels read them."""
        _, heads, tokens, _ = self.points.shape
        return (
            *(self.points, self.points.stride(), self.centroids, self.centroids.stride(), self.start),
            *(self.means, self.shifted, self.bias, self.common, self.cells, self.sorted, self.totals),
            *(tokens, self.means.shape[2], heads, self.cells.shape[3], self.labels),
            None if self.blocks is None else self.blocks.arguments(),
        )


def iterate(sides: Sequence[Points], *, warm: bool, first: int, later: int) -> None:
    """Run k-means on one or two sets of points."""
    for launch in kmeans_launches(sides, warm=warm, iterations=later if warm else first):
        launch()


def kmeans_launches(sides: Sequence[Points], *, warm: bool, iterations: int) -> Iterator[Launch]:
    """The launches of k-means: one, then two for each iteration."""
    one = sides[0]
    batch, heads, _, head_dim = one.points.shape
    of_all = sum(side.points.shape[1] for side in sides)
    most = max(side.means.shape[2] for side in sides)
    block_m, block_n, num_warps, num_stages = nearest_tiles(one.points)
    given = [side.arguments() for side in sides]
    shared = {"first": given[0], "second": given[1] if len(given) > 1 else None, "heads": heads}
    shared |= {"HEAD_DIM": head_dim, "ALIGN": alignment(*(side.points for side in sides))}
    yield Launch(
        kernels.start_kernel,
        (triton.cdiv(most, STARTED), of_all, batch),
        shared | {"BLOCK": STARTED, "TILES": 32, "WARM": warm},
        num_warps=4,
        num_stages=1,
    )
    for number in range(iterations):
        last = number == iterations - 1
        yield Launch(
            kernels.nearest_kernel,
            (max(side.cells.shape[3] for side in sides), of_all, batch),
            shared | {"BLOCK_M": block_m, "BLOCK_N": block_n, "COUNTED": last and one.blocks is not None},
            num_warps,
            num_stages,
        )
        yield Launch(
            kernels.means_kernel,
            (most, of_all, batch),
            shared | {"BLOCK_M": block_m, "BLOCK": 32, "TILES": 256, "WIDTH": 1024, "LAST": last},
            num_warps=4,
            num_stages=2,
        )


def nearest_tiles(points: Tensor) -> tuple[int, int, int, int]:
    """(points in a tile, centroids in a tile, warps, stages). fp32 is multiplied in full, without tensor cores,
    so in smaller tiles."""
    head_dim = points.shape[-1]
    if points.device.type == "cpu":
        return 32, 32, 4, 1  # small, so that small tests have several
    if points.dtype == torch.float32:
        return 64 if head_dim <= 64 else 32, 32, 8, 2
    return 128, 32, 8, 3  # with 64 centroids, registers would spill on 10.0


def sort_by_label(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """See `clustering.sort_by_label`."""
    order, bounds = empty_sort(labels, clusters)
    batch, heads, tokens = labels.shape
    tiles = max(1, triton.cdiv(tokens, TILE))
    ranks = labels.new_empty(labels.shape)
    counts = labels.new_zeros(batch, heads, clusters, tiles)
    rank(labels, ranks, counts)()
    passed = counts.cumsum(-1, dtype=torch.int32)
    bounds.copy_(pad(passed[..., -1].cumsum(-1, dtype=torch.int32), (1, 0)))
    place(labels, ranks, passed, bounds, order)()
    return order, bounds


def top_p_blocks(
    q_centroids: Tensor, kv_centroids: Tensor, kv_sizes: Tensor, scale: float, top_p: float, floor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `clustering.top_p_blocks`."""
    outputs = empty_top_p(q_centroids, kv_centroids)
    products = q_centroids.new_empty(*q_centroids.shape[:3], kv_centroids.shape[2])
    if products.numel():
        scores(q_centroids, kv_centroids, products)()
        kv_sizes = kv_sizes.expand(*kv_centroids.shape[:2], -1)
        select(products, kv_sizes, *outputs, scale, top_p, floor)()
    return outputs


def rank(labels: Tensor, ranks: Tensor, counts: Tensor) -> Launch:
    """The launch for the first half of sorting."""
    batch, heads, tokens = labels.shape
    return Launch(
        kernels.rank_kernel,
        (counts.shape[3], heads, batch),
        {
            **with_strides(labels=labels, ranks=ranks, counts=counts),
            **{"tokens": tokens, "TILE": TILE, "CHUNK": CHUNK},
        },
        num_warps=8,
        num_stages=1,
    )


def place(labels: Tensor, ranks: Tensor, passed: Tensor, bounds: Tensor, order: Tensor) -> Launch:
    """The launch for the second half of sorting."""
    batch, heads, tokens = labels.shape
    return Launch(
        kernels.place_kernel,
        (passed.shape[3], heads, batch),
        {
            **with_strides(labels=labels, ranks=ranks, passed=passed, bounds=bounds, order=order),
            **{"tokens": tokens, "TILE": TILE},
        },
        num_warps=4,
        num_stages=1,
    )


def scores(q_centroids: Tensor, kv_centroids: Tensor, products: Tensor) -> Launch:
    """The launch that computes the products of all centroids."""
    batch, heads, rows, head_dim = q_centroids.shape
    clusters = kv_centroids.shape[2]
    block = 32 if head_dim <= 128 else 16
    return Launch(
        kernels.scores_kernel,
        (triton.cdiv(rows, block) * triton.cdiv(clusters, block), heads, batch),
        {
            **with_strides(q_centroids=q_centroids, kv_centroids=kv_centroids, scores=products),
            **{"rows": rows, "clusters": clusters},
            "queries_per_key_head": heads // kv_centroids.shape[1],
            **{"HEAD_DIM": head_dim, "BLOCK_M": block, "BLOCK_N": block},
            "ALIGN": alignment(q_centroids, kv_centroids),
        },
        num_warps=8,
        num_stages=1,
    )


def select(
    products: Tensor,
    kv_sizes: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kept: Tensor,
    scale: float,
    top_p: float,
    floor: int,
) -> Launch:
    """The launch that selects clusters from the products."""
    batch, heads, rows, clusters = products.shape
    width = min(SELECTED_AT_ONCE, triton.next_power_of_2(clusters))
    return Launch(
        kernels.select_kernel,
        (rows, heads, batch),
        {
            **with_strides(scores=products, kv_sizes=kv_sizes, kv_num_blocks=kv_num_blocks),
            **with_strides(kv_indices=kv_indices, kept=kept),
            **{"clusters": clusters, "queries_per_key_head": heads // kv_sizes.shape[1]},
            **{"scale": scale, "top_p": top_p, "floor": floor, "WIDTH": width},
        },
        num_warps=min(8, max(1, width // 128)),
        num_stages=1,
    )
