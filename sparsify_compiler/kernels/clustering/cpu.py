"""Clustering: the C++ kernels of `csrc/clustering.cpp`, or the reference if they could not be built."""

import ctypes
from functools import partial

import torch
from torch import Tensor

from sparsify_compiler.kernels.clustering import empty_kmeans, empty_sort, empty_top_p, reference
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.table import check_range


def kmeans(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int
) -> tuple[Tensor, Tensor]:
    """See `clustering.kmeans`."""
    kernel = library.symbol("sparsify_kmeans", _KMeans)
    if kernel is None:
        return reference.kmeans(points, centroids, start, warm, first, later)
    means, labels = empty_kmeans(points, centroids)
    is_warm = bool(warm)
    means.copy_(centroids if is_warm else points[:, :, start])
    if points.stride(-1) != 1:
        points = points.contiguous()
    batch, heads, tokens, head_dim = points.shape
    problem = _KMeans(
        *(library.view(t) for t in (points, means, labels)),
        *(batch, heads, tokens, means.shape[2], head_dim),
        later if is_warm else first,
        library.DTYPES.index(points.dtype),
        torch.get_num_threads(),
    )
    kernel(ctypes.byref(problem))
    return means, labels


def sort_by_label(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """See `clustering.sort_by_label`."""
    kernel = library.symbol("sparsify_sort_by_label", _Sort)
    if kernel is None:
        return reference.sort_by_label(labels, clusters)
    order, bounds = empty_sort(labels, clusters)
    batch, heads, tokens = labels.shape
    views = (library.view(t) for t in (labels, order, bounds))
    problem = _Sort(*views, batch, heads, tokens, clusters, torch.get_num_threads())
    library.launch(kernel, problem, check=partial(check_range, "labels", labels, clusters - 1))
    return order, bounds


def top_p_blocks(
    q_centroids: Tensor, kv_centroids: Tensor, kv_sizes: Tensor, scale: float, top_p: float, floor: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `clustering.top_p_blocks`."""
    kernel = library.symbol("sparsify_top_p_blocks", _TopP)
    if kernel is None:
        return reference.top_p_blocks(q_centroids, kv_centroids, kv_sizes, scale, top_p, floor)
    outputs = empty_top_p(q_centroids, kv_centroids)
    batch, heads, rows, head_dim = q_centroids.shape
    # The list keeps copies that `contiguous` may make alive until the kernel has run.
    tensors = [
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (q_centroids, kv_centroids)),
        kv_sizes.contiguous(),
        *outputs,
    ]
    problem = _TopP(
        *(library.view(t) for t in tensors),
        *(batch, heads, kv_centroids.shape[1], rows, kv_centroids.shape[2], head_dim, floor),
        *(top_p, scale, torch.get_num_threads()),
    )
    kernel(ctypes.byref(problem))
    return outputs


class _KMeans(ctypes.Structure):
    """`struct KMeans`."""

    _fields_ = (
        *((name, library.View) for name in ("points", "centroids", "labels")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "clusters", "head_dim")),
        *((name, ctypes.c_int32) for name in ("iterations", "dtype", "threads")),
    )


class _Sort(ctypes.Structure):
    """`struct Sort`."""

    _fields_ = (
        *((name, library.View) for name in ("labels", "order", "bounds")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "clusters")),
        ("threads", ctypes.c_int32),
    )


class _TopP(ctypes.Structure):
    """`struct TopP`."""

    _fields_ = (
        *((name, library.View) for name in ("q_centroids", "kv_centroids", "kv_sizes")),
        *((name, library.View) for name in ("kv_num_blocks", "kv_indices", "kept")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "rows", "clusters", "head_dim", "floor")
        ),
        ("top_p", ctypes.c_double),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )
