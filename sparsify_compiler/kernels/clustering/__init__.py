"""The ops that select blocks by semantic clusters, after Sparse VideoGen2 (arXiv 2505.18875).

    sparsify::kmeans          tokens -> a cluster for each, from a cold or a warm start
    sparsify::cluster         queries and keys -> their clusters as blocks of the sequence, in one call
    sparsify::sort_by_label   clusters -> an order in which the tokens of a cluster are neighbours
    sparsify::top_p_blocks    centroids -> the key clusters that each query cluster reads

All are decisions, not differentiable functions: inputs are detached, and autocast changes nothing. This
file imports only torch. A provider's kernels are imported when an op first runs on it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import providers
from sparsify_compiler.table import check_range


class Side(NamedTuple):
    """The clusters of the queries, or of the keys, of a video."""

    centroids: Tensor
    """[B, G, C, D] fp32."""
    order: Tensor
    """[B, H, S] int32: the tokens of the sequence, those of a cluster next to each other; others in their place."""
    bounds: Tensor
    """[B, H, N + 1] int32: the blocks of the sequence. Each cluster is one; the tokens before the video are one and
    so are those after it."""
    sizes: Tensor
    """[B, G, C] int32: the number of tokens of each cluster."""


class Provider(Protocol):
    """The functions of a provider of clustering. They get the tensors of the ops, checked."""

    def kmeans(
        self, points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int
    ) -> tuple[Tensor, Tensor]:
        """(centroids, labels), in the layout of `empty_kmeans`."""

    def cluster(
        self,
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
        """The fields of both sides of `cluster`, those of blocks in the layout of `empty_blocks`. Without `blocks`
        the centroids alone."""

    def sort_by_label(self, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        """(order, bounds), in the layout of `empty_sort`."""

    def top_p_blocks(
        self,
        q_centroids: Tensor,
        kv_centroids: Tensor,
        kv_sizes: Tensor,
        scale: float,
        top_p: float,
        floor: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(kv_num_blocks, kv_indices, kept), in the layout of `empty_top_p`; rows keep `floor` clusters or more."""


def kmeans(
    points: Tensor,
    centroids: Tensor,
    start: Tensor,
    warm: Tensor,
    *,
    first: int,
    later: int,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run Lloyd's k-means by squared Euclidean distance, separately for each batch and head.

    An iteration assigns every point to the nearest centroid (at equal distance, the one of lower index). Then it
    moves each centroid to the mean of its points; a centroid without points does not move.

    Args:
        points: [B, H, S, D] fp32, fp16, bf16 (reference: also fp64), any strides.
        centroids: [B, H, C, D] fp32, the result of an earlier call. Only a warm start reads it.
        start: [C] int64, the tokens (each in 0..S-1) whose points are the centroids of a cold start.
        warm: 0-d bool on the CPU, for points on any device. It is a tensor, so that one compiled program does
            cold and warm starts. It is on the CPU, so that reading it does not wait for a GPU.
        first: iterations of a cold start, at least 1.
        later: iterations of a warm start, at least 1.
        provider: `reference`, `cpu`, `triton`, or `auto` for the fastest that runs on these tensors.

    Returns:
        centroids: [B, H, C, D] fp32 after the last iteration.
        labels: [B, H, S] int32, the clusters of the last assignment: a centroid is the mean of the points with
            its label. A point that is not finite also has a label in 0..C-1.

    Raises:
        OperandError: arguments do not fit together.
        ProviderError: the requested provider cannot run on these tensors.
    """
    name = _choose(provider, points)
    return torch.ops.sparsify.kmeans(
        points.detach(), centroids.detach(), start, warm, int(first), int(later), name
    )


def cluster(
    query: Tensor,
    key: Tensor,
    q_centroids: Tensor,
    kv_centroids: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    warm: Tensor,
    *,
    first: int,
    later: int,
    before: int,
    after: int,
    provider: str,
) -> tuple[Side, Side]:
    """`kmeans` of the queries and of the keys of a video, and the blocks that the clusters form in the sequence.

    Args:
        query: [B, H, V, D], the video's tokens, of a type and strides as in `kmeans`.
        key: [B, Hkv, V, D], H a multiple of Hkv.
        q_centroids, kv_centroids, q_start, kv_start, warm, first, later: as in `kmeans`, for each of both.
        before, after: the numbers of tokens before and after the video.
        provider: the name of a provider that runs on these tensors.
    """
    inputs = (t.detach() for t in (query, key, q_centroids, kv_centroids))
    numbers = [int(first), int(later), int(before), int(after)]
    found = torch.ops.sparsify.cluster(*inputs, q_start, kv_start, warm, numbers, True, provider)
    return Side(*found[:4]), Side(*found[4:])


def kmeans_of_both(
    query: Tensor,
    key: Tensor,
    q_centroids: Tensor,
    kv_centroids: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    warm: Tensor,
    *,
    first: int,
    later: int,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """The centroids of `cluster` alone: (those of the queries, those of the keys)."""
    inputs = (t.detach() for t in (query, key, q_centroids, kv_centroids))
    numbers = [int(first), int(later), 0, 0]
    q_means, kv_means = torch.ops.sparsify.cluster(*inputs, q_start, kv_start, warm, numbers, False, provider)
    return q_means, kv_means


def sort_by_label(labels: Tensor, clusters: int, *, provider: str = "auto") -> tuple[Tensor, Tensor]:
    """Sort the tokens of each batch and head by rising label, and tokens of one label by rising position.

    Args:
        labels: [B, H, S] int32, each in 0..clusters-1, any strides.
        clusters: number of labels, at least 1.
        provider: as for `kmeans`.

    Returns:
        order: [B, H, S] int32, the token at each position.
        bounds: [B, H, clusters + 1] int32: cluster c lies at positions bounds[c] : bounds[c + 1].

    Raises:
        OperandError: arguments do not fit together.
        ProviderError: the requested provider cannot run on these tensors.
    """
    return torch.ops.sparsify.sort_by_label(labels, int(clusters), _choose(provider, labels))


def top_p_blocks(
    q_centroids: Tensor,
    kv_centroids: Tensor,
    kv_sizes: Tensor,
    *,
    scale: float,
    top_p: float,
    min_blocks: int,
    provider: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the fewest key clusters that hold the share `top_p` of each query cluster's estimated attention.

    With n_j the size of key cluster j, query cluster i gives it the estimated share

        P_ij = n_j exp(scale q_i . k_j) / sum over l of n_l exp(scale q_i . k_l)

    Clusters are kept in the order of falling P (at equal P, the one of lower index first) until their sum
    reaches `top_p`, including the cluster that reaches it. A row with a NaN keeps every cluster.

    Args:
        q_centroids: [B, H, Nq, D] fp32.
        kv_centroids: [B, Hkv, Nk, D] fp32, H a multiple of Hkv; query head h reads key head h * Hkv // H.
        kv_sizes: [B|1, Hkv|1, Nk] int32, tokens in each key cluster; P is 0 where there are none.
        scale: factor on the scores, as in the attention itself.
        top_p: share to keep, at least 0. From 1 on all clusters are kept, empty ones too.
        min_blocks: least number of clusters to keep, in the same order; all clusters if there are fewer.
        provider: as for `kmeans`.

    Returns:
        kv_num_blocks: [B, H, Nq] int32, the number of clusters kept.
        kv_indices: [B, H, Nq, Nk] int32: the kept clusters by rising index, then the others by rising index.
        kept: [B, H, Nq] fp32, the sum of P over the kept clusters; 1 where all are kept.

    Raises:
        OperandError: arguments do not fit together.
        ProviderError: the requested provider cannot run on these tensors.
    """
    return torch.ops.sparsify.top_p_blocks(
        q_centroids.detach(),
        kv_centroids.detach(),
        kv_sizes,
        float(scale),
        float(top_p),
        int(min_blocks),
        _choose(provider, q_centroids),
    )


def _choose(provider: str, tensor: Tensor) -> str:
    """The name of the provider to run. Every provider reads sizes and labels, which are integers."""
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    width = tensor.shape[-1] if tensor.dim() == 4 else 1
    return providers.choose(
        provider, device=tensor.device.type, dtype=dtype, head_dim=width, value_dim=width
    ).name


@custom_op("sparsify::kmeans")
def _kmeans(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int, provider: str
) -> tuple[Tensor, Tensor]:
    _check_kmeans(points, centroids, start, warm, first, later)
    if providers.reads_values(points.device) and not bool(warm):
        check_range("start", start, points.shape[2] - 1)
    with providers.without_autocast(points.device.type):
        return providers.load(provider, "clustering").kmeans(points, centroids, start, warm, first, later)


@_kmeans.register_fake
def _kmeans_fake(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int, _: Any
) -> tuple[Tensor, Tensor]:
    _check_kmeans(points, centroids, start, warm, first, later)
    return empty_kmeans(points, centroids)


def empty_kmeans(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (centroids, labels): every provider returns exactly this layout."""
    return centroids.new_empty(centroids.shape), points.new_empty(points.shape[:3], dtype=torch.int32)


@custom_op("sparsify::cluster")
def _cluster(
    query: Tensor,
    key: Tensor,
    q_centroids: Tensor,
    kv_centroids: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    warm: Tensor,
    numbers: Sequence[int],
    blocks: bool,
    provider: str,
) -> list[Tensor]:
    inputs = query, key, q_centroids, kv_centroids, q_start, kv_start
    _check_cluster(*inputs, warm, numbers)
    if providers.reads_values(query.device) and not bool(warm):
        for name, start, points in (("q_start", q_start, query), ("kv_start", kv_start, key)):
            check_range(name, start, points.shape[2] - 1)
    with providers.without_autocast(query.device.type):
        module = providers.load(provider, "clustering")
        return module.cluster(*inputs, bool(warm), *numbers, blocks=blocks)


@_cluster.register_fake
def _cluster_fake(
    query: Tensor,
    key: Tensor,
    q_centroids: Tensor,
    kv_centroids: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    warm: Tensor,
    numbers: Sequence[int],
    blocks: bool,
    _: Any,
) -> list[Tensor]:
    _check_cluster(query, key, q_centroids, kv_centroids, q_start, kv_start, warm, numbers)
    found: list[Tensor] = []
    for points, centroids in ((query, q_centroids), (key, kv_centroids)):
        found.append(centroids.new_empty(centroids.shape))
        if blocks:
            found += empty_blocks(points, centroids.shape[2], query.shape[1], *numbers[2:])
    return found


def empty_blocks(points: Tensor, clusters: int, heads: int, before: int, after: int) -> list[Tensor]:
    """Uninitialised order, bounds and sizes of `Side`."""
    batch, groups, tokens, _ = points.shape
    count = clusters + (before > 0) + (after > 0) + 1
    shapes = (batch, heads, before + tokens + after), (batch, heads, count), (batch, groups, clusters)
    return [points.new_empty(shape, dtype=torch.int32) for shape in shapes]


@custom_op("sparsify::sort_by_label")
def _sort_by_label(labels: Tensor, clusters: int, provider: str) -> tuple[Tensor, Tensor]:
    _check_sort(labels, clusters)
    if providers.checks_values(provider, labels.device):
        check_range("labels", labels, clusters - 1)
    return providers.load(provider, "clustering").sort_by_label(labels, clusters)


@_sort_by_label.register_fake
def _sort_by_label_fake(labels: Tensor, clusters: int, _: Any) -> tuple[Tensor, Tensor]:
    _check_sort(labels, clusters)
    return empty_sort(labels, clusters)


def empty_sort(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (order, bounds)."""
    return labels.new_empty(labels.shape), labels.new_empty(*labels.shape[:2], clusters + 1)


@custom_op("sparsify::top_p_blocks")
def _top_p_blocks(
    q_centroids: Tensor,
    kv_centroids: Tensor,
    kv_sizes: Tensor,
    scale: float,
    top_p: float,
    min_blocks: int,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_top_p(q_centroids, kv_centroids, kv_sizes, top_p, min_blocks)
    with providers.without_autocast(q_centroids.device.type):
        return providers.load(provider, "clustering").top_p_blocks(
            q_centroids, kv_centroids, kv_sizes, scale, top_p, floor(kv_centroids, top_p, min_blocks)
        )


@_top_p_blocks.register_fake
def _top_p_blocks_fake(
    q_centroids: Tensor,
    kv_centroids: Tensor,
    kv_sizes: Tensor,
    scale: float,
    top_p: float,
    min_blocks: int,
    _: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_top_p(q_centroids, kv_centroids, kv_sizes, top_p, min_blocks)
    return empty_top_p(q_centroids, kv_centroids)


def empty_top_p(q_centroids: Tensor, kv_centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (kv_num_blocks, kv_indices, kept)."""
    lead = q_centroids.shape[:3]
    return (
        q_centroids.new_empty(lead, dtype=torch.int32),
        q_centroids.new_empty(*lead, kv_centroids.shape[2], dtype=torch.int32),
        q_centroids.new_empty(lead),
    )


def floor(kv_centroids: Tensor, top_p: float, min_blocks: int) -> int:
    """The number of clusters that a row always keeps: all if top_p >= 1, since a sum may round up to 1 early."""
    clusters = kv_centroids.shape[2]
    return clusters if top_p >= 1 else min(min_blocks, clusters)


def _check_kmeans(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int
) -> None:
    """Raise OperandError for arguments that do not fit together. Reads no value."""
    if points.dim() != 4 or not points.is_floating_point():
        raise OperandError(f"points must be a float tensor [B, H, S, D], got {_described(points)}")
    batch, heads, tokens, head_dim = points.shape
    if tokens == 0:
        raise OperandError(f"points must hold at least one token, got shape {tuple(points.shape)}")
    fits = centroids.dim() == 4 and centroids.shape == (batch, heads, centroids.shape[2], head_dim)
    if not fits or centroids.dtype != torch.float32:
        raise OperandError(
            f"centroids must be float32 [{batch}, {heads}, C, {head_dim}] for points {tuple(points.shape)}, "
            f"got {_described(centroids)}"
        )
    clusters = centroids.shape[2]
    if clusters == 0:
        raise OperandError(f"centroids must hold at least one cluster, got shape {tuple(centroids.shape)}")
    if start.shape != (clusters,) or start.dtype != torch.int64:
        raise OperandError(
            f"start must be int64 [{clusters}], a token for each centroid, got {_described(start)}"
        )
    _check_devices(points=points, centroids=centroids, start=start)
    if warm.dim() != 0 or warm.dtype != torch.bool or warm.device.type != "cpu":
        raise OperandError(
            f"warm must be a 0-d bool tensor on the CPU, got {_described(warm)} on {warm.device}"
        )
    if first < 1 or later < 1:
        raise OperandError(f"first and later must be at least 1 iteration, got {first} and {later}")


def _check_cluster(
    query: Tensor,
    key: Tensor,
    q_centroids: Tensor,
    kv_centroids: Tensor,
    q_start: Tensor,
    kv_start: Tensor,
    warm: Tensor,
    numbers: Sequence[int],
) -> None:
    first, later, before, after = numbers
    for points, centroids, start in ((query, q_centroids, q_start), (key, kv_centroids, kv_start)):
        _check_kmeans(points, centroids, start, warm, first, later)
    (batch, heads, tokens, width), kv_heads = query.shape, key.shape[1]
    if key.shape != (batch, kv_heads, tokens, width) or kv_heads == 0 or heads % kv_heads:
        raise OperandError(
            f"key must be [{batch}, Hkv, {tokens}, {width}], Hkv dividing {heads} heads, got {tuple(key.shape)}"
        )
    if query.dtype != key.dtype or query.device != key.device:
        raise OperandError(
            f"query and key must agree in dtype and device, got {query.dtype} on {query.device}, "
            f"{key.dtype} on {key.device}"
        )
    if before < 0 or after < 0:
        raise OperandError(f"before and after must be numbers of tokens, got {before} and {after}")


def _check_sort(labels: Tensor, clusters: int) -> None:
    if labels.dim() != 3 or labels.dtype != torch.int32:
        raise OperandError(f"labels must be int32 [B, H, S], got {_described(labels)}")
    if clusters < 1:
        raise OperandError(f"clusters must be at least 1, got {clusters}")


def _check_top_p(
    q_centroids: Tensor, kv_centroids: Tensor, kv_sizes: Tensor, top_p: float, min_blocks: int
) -> None:
    for name, tensor in (("q_centroids", q_centroids), ("kv_centroids", kv_centroids)):
        if tensor.dim() != 4 or tensor.dtype != torch.float32:
            raise OperandError(f"{name} must be float32 [B, H, N, D], got {_described(tensor)}")
    batch, heads, _, head_dim = q_centroids.shape
    kv_heads, clusters = kv_centroids.shape[1:3]
    if kv_centroids.shape != (batch, kv_heads, clusters, head_dim) or clusters == 0:
        raise OperandError(
            f"kv_centroids must be [{batch}, Hkv, Nk, {head_dim}] for q_centroids {tuple(q_centroids.shape)}, "
            f"with at least one cluster, got {_described(kv_centroids)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise OperandError(f"query heads must be a multiple of key heads, got {heads} and {kv_heads}")
    shape = tuple(kv_sizes.shape)
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, kv_heads) and shape[2] == clusters
    if not fits or kv_sizes.dtype != torch.int32:
        raise OperandError(
            f"kv_sizes must be int32 [1 or {batch}, 1 or {kv_heads}, {clusters}], got {_described(kv_sizes)}"
        )
    _check_devices(q_centroids=q_centroids, kv_centroids=kv_centroids, kv_sizes=kv_sizes)
    if not top_p >= 0:
        raise OperandError(f"top_p must be a share of at least 0, got {top_p}")
    if min_blocks < 0:
        raise OperandError(f"min_blocks must be at least 0, got {min_blocks}")


def _check_devices(**tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise OperandError(f"these tensors must be on one device, got {places}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
