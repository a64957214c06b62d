"""Clustering: the launches of the kernels in `triton_kernels.py`, and the work in torch between them.

Nothing is read back from the device.
"""

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.kernels.clustering import empty_kmeans, empty_sort, empty_top_p
from sparsify_compiler.kernels.clustering import triton_kernels as kernels
from sparsify_compiler.kernels.triton.launcher import Launch, alignment, with_strides

TILE = 512
"""Number of tokens that one program sorts. Longer tiles compare more pairs, shorter ones need more counts."""
CHUNK = 16
"""Number of tokens that a tile is compared with at one time."""
SELECTED_AT_ONCE = 1024
"""Number of clusters whose weights one program has in registers."""


def kmeans(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int
) -> tuple[Tensor, Tensor]:
    """See `clustering.kmeans`."""
    means, labels = empty_kmeans(points, centroids)
    is_warm = bool(warm)
    means.copy_(centroids if is_warm else points[:, :, start])
    for _ in range(later if is_warm else first):
        shifted, bias = shift(means, points.dtype)
        nearest(points, shifted, bias, labels)()
        order, bounds = sort_by_label(labels, means.shape[2])
        move_to_means(points, order, bounds, means)()
    return means, labels


def shift(centroids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(shifted [B, H, C, D] in the type of the points, bias [B, H, C]): the nearest centroid of a point x has the
    largest x.shifted + bias.

    The mean m of all centroids changes no distance, but rounding could lose the differences next to it. With
    d = c - m rounded, x.d - d.(d / 2 + m) is exact for the centroid m + d, so points need no shift.
    """
    common = centroids.mean(2, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    shifted = (centroids - common).to(dtype)
    rounded = shifted.float()
    return shifted, -(rounded * (0.5 * rounded + common)).sum(-1)


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


def nearest(points: Tensor, centroids: Tensor, bias: Tensor, labels: Tensor) -> Launch:
    """The launch that assigns points. fp32 is multiplied in full, without tensor cores, so in smaller tiles."""
    batch, heads, tokens, head_dim = points.shape
    if points.device.type == "cpu":
        block_m, block_n, num_warps, num_stages = 32, 32, 4, 1  # small, so that small tests have several
    elif points.dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = 64 if head_dim <= 64 else 32, 32, 8, 2
    else:
        block_m, block_n, num_warps, num_stages = 128, 64 if head_dim <= 128 else 32, 8, 3
    return Launch(
        kernels.nearest_kernel,
        (triton.cdiv(tokens, block_m), heads, batch),
        {
            **with_strides(points=points, centroids=centroids, bias=bias, labels=labels),
            **{"tokens": tokens, "clusters": centroids.shape[2], "HEAD_DIM": head_dim},
            **{"BLOCK_M": block_m, "BLOCK_N": block_n, "ALIGN": alignment(points, centroids)},
        },
        num_warps,
        num_stages,
    )


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


def move_to_means(points: Tensor, order: Tensor, bounds: Tensor, centroids: Tensor) -> Launch:
    """The launch that updates the centroids, in place."""
    batch, heads, _, head_dim = points.shape
    return Launch(
        kernels.means_kernel,
        (centroids.shape[2], heads, batch),
        {
            **with_strides(points=points, order=order, bounds=bounds, centroids=centroids),
            **{"HEAD_DIM": head_dim, "BLOCK": 32, "ALIGN": alignment(points)},
        },
        num_warps=4,
        num_stages=2,
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
