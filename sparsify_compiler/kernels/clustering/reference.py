"""The clustering ops, defined in plain torch. They compute in fp32 (fp64 for fp64 points)."""

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.kernels.clustering import empty_kmeans, empty_sort, empty_top_p

TOKENS_AT_ONCE = 1024
"""Number of tokens whose distances to all centroids are in memory at one time."""

Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])


def kmeans(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int
) -> tuple[Tensor, Tensor]:
    """See `clustering.kmeans`."""
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    is_warm = bool(warm)
    outputs = empty_kmeans(points, centroids)
    points = points.to(dtype)
    means = centroids.to(dtype) if is_warm else points[:, :, start]
    for _ in range(later if is_warm else first):
        labels = _nearest(points, means)
        means = _means(points, labels, means)
    return _stored(outputs, means, labels)


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """[B, H, S] int64: the centroid that maximises x.c - |c|²/2, and so minimises |x - c|².

    The mean of all centroids is subtracted first: it changes no distance, and would cost the products their last
    digits. NaN is never the maximum, so a point without a finite distance gets label 0.
    """
    offset = centroids.mean(2, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    centroids = centroids - offset
    bias = centroids.square().sum(-1) / 2
    labels = [
        ((some - offset) @ centroids.mT - bias[:, :, None])
        .nan_to_num(-torch.inf, torch.inf, -torch.inf)
        .argmax(-1)
        for some in points.split(TOKENS_AT_ONCE, 2)
    ]
    return torch.cat(labels, 2)


def _means(points: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """[B, H, C, D]: the mean of the points of each label, or the old centroid if there are none."""
    sums = points.new_zeros(centroids.shape).scatter_add_(2, labels[..., None].expand_as(points), points)
    sizes = points.new_zeros(centroids.shape[:3]).scatter_add_(2, labels, points.new_ones(labels.shape))
    return torch.where(sizes[..., None] > 0, sums / sizes[..., None], centroids)


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
    """See `clustering.cluster`."""
    heads, tokens = query.shape[1], before + query.shape[2] + after
    found = []
    for points, centroids, start in ((query, q_centroids, q_start), (key, kv_centroids, kv_start)):
        means, labels = kmeans(points, centroids, start, torch.tensor(warm), first, later)
        found.append(means)
        if not blocks:
            continue
        order, bounds = sort_by_label(labels, len(start))
        sizes = bounds.diff(dim=-1)
        order, bounds = (
            one.repeat_interleave(heads // points.shape[1], 1) + before for one in (order, bounds)
        )
        places = torch.arange(tokens, dtype=torch.int32, device=order.device).expand(*order.shape[:2], -1)
        order = torch.cat([places[..., :before], order, places[..., tokens - after :]], -1)
        bounds = pad(pad(bounds, (int(before > 0), 0), value=0), (0, int(after > 0)), value=tokens)
        found += [order, bounds, sizes]
    return found


def sort_by_label(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """See `clustering.sort_by_label`."""
    index = labels.long()
    sizes = index.new_zeros(*labels.shape[:2], clusters).scatter_add_(2, index, torch.ones_like(index))
    order = index.argsort(dim=-1, stable=True)
    return _stored(empty_sort(labels, clusters), order, pad(sizes.cumsum(-1), (1, 0)))


def top_p_blocks(
    q_centroids: Tensor, kv_centroids: Tensor, kv_sizes: Tensor, scale: float, top_p: float, floor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `clustering.top_p_blocks`; at least `floor` clusters are kept."""
    outputs = empty_top_p(q_centroids, kv_centroids)
    batch, heads, _, _ = q_centroids.shape
    kv_heads, clusters = kv_centroids.shape[1:3]
    kv_centroids, kv_sizes = (
        t.expand(batch, kv_heads, *t.shape[2:]).repeat_interleave(heads // kv_heads, 1)
        for t in (kv_centroids, kv_sizes)
    )
    sizes = kv_sizes[:, :, None].float()
    scores = (scale * (q_centroids @ kv_centroids.mT)).masked_fill(sizes == 0, -torch.inf)
    weights = sizes * (scores - scores.amax(-1, keepdim=True)).exp()
    shares = weights / weights.sum(-1, keepdim=True)
    falling, ranked = shares.sort(dim=-1, descending=True, stable=True)
    before = pad(falling.cumsum(-1), (1, 0))[..., :-1]
    chosen = ~(before >= top_p)  # a NaN never reaches the share
    chosen[..., :floor] = True
    keeps = torch.zeros_like(chosen).scatter_(-1, ranked, chosen)
    count = keeps.sum(-1)
    kept = torch.where(keeps, shares, 0.0).sum(-1).masked_fill(count == clusters, 1.0)
    # A stable sort of "not kept" brings the kept clusters to the front in rising order.
    indices = (~keeps).to(torch.int8).argsort(dim=-1, stable=True)
    return _stored(outputs, count, indices, kept)


def _stored(outputs: Outputs, *values: Tensor) -> Outputs:
    """Copy the values into the op's outputs, in their types and layout."""
    for output, value in zip(outputs, values, strict=True):
        output.copy_(value)
    return outputs
