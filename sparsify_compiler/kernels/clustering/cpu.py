"""Clustering: the C++ kernels of `csrc/clustering.cpp`, or the reference if they could not be built."""

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.kernels.clustering import (
    empty_blocks,
    empty_kmeans,
    empty_sort,
    empty_top_p,
    reference,
)
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.table import check_range


def kmeans(
    points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, first: int, later: int
) -> tuple[Tensor, Tensor]:
    """See `clustering.kmeans`."""
    kernel = library.symbol("sparsify_kmeans", _KMeans)
    if kernel is None:
        return reference.kmeans(points, centroids, start, warm, first, later)
    found = empty_kmeans(points, centroids)
    problem, _kept = _points(points, centroids, start, bool(warm), first, later, *found)
    kernel(ctypes.byref(problem))
    return found


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
    """See `clustering.cluster`: both sides in one call. Without `blocks` centroids alone."""
    kernel = library.symbol("sparsify_kmeans", _KMeans)
    if kernel is None:
        inputs = query, key, q_centroids, kv_centroids, q_start, kv_start
        return reference.cluster(*inputs, warm, first, later, before, after, blocks=blocks)
    heads, other, found, kept = query.shape[1], None, list[Tensor](), list[Any]()
    for points, centroids, start in ((key, kv_centroids, kv_start), (query, q_centroids, q_start)):
        means = centroids.new_empty(centroids.shape)
        of_blocks = empty_blocks(points, len(start), heads, before, after) if blocks else []
        problem, tensors = _points(points, centroids, start, warm, first, later, means, None, *of_blocks)
        problem.before, problem.after, problem.copies = before, after, heads // points.shape[1]
        if other is not None:
            problem.other = ctypes.addressof(other)
        other = problem
        kept.append((problem, tensors))
        found = [means, *of_blocks, *found]
    kernel(ctypes.byref(problem))
    return found


def _points(
    points: Tensor,
    centroids: Tensor,
    start: Tensor,
    is_warm: bool,
    first: int,
    later: int,
    means: Tensor,
    labels: Tensor | None,
    *blocks: Tensor,
) -> tuple["_KMeans", list[Tensor | None]]:
    """The problem, and the tensors that must live as long as it does: some are copies."""
    batch, heads, tokens, head_dim = points.shape
    tensors = [
        points if points.stride(-1) == 1 else points.contiguous(),
        centroids.contiguous() if is_warm else None,
        None if is_warm else start.contiguous()[None, None],
        *(means, labels, *blocks, *[None] * (3 - len(blocks))),
    ]
    problem = _KMeans(
        *(library.view(t) for t in tensors),
        *(batch, heads, tokens, means.shape[2], head_dim, 0, 0, 1),
        later if is_warm else first,
        library.DTYPES.index(points.dtype),
        torch.get_num_threads(),
        None,
    )
    return problem, tensors


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
        *((name, library.View) for name in ("points", "from", "start")),
        *((name, library.View) for name in ("centroids", "labels", "order", "bounds", "sizes")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "clusters", "head_dim")),
        *((name, ctypes.c_int64) for name in ("before", "after", "copies")),
        *((name, ctypes.c_int32) for name in ("iterations", "dtype", "threads")),
        ("other", ctypes.c_void_p),
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
