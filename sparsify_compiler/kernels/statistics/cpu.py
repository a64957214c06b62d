"""The statistics of blocks: the C++ kernel `csrc/statistics.cpp`, or the reference if it could not be built."""

import ctypes
from functools import partial

import torch
from torch import Tensor

from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.kernels.statistics import (
    Statistics,
    empty_left,
    empty_means,
    empty_pairs,
    empty_statistics,
    reference,
)
from sparsify_compiler.table import check_blocks, check_lists, check_range


def block_means(tokens: Tensor, bounds: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `statistics.block_means`: the kernel's key statistics, without values."""
    kernel = library.symbol("sparsify_block_statistics", _Problem)
    if kernel is None:
        return reference.block_means(tokens, bounds, order)
    mean, mean_square = empty_means(tokens, bounds)
    results = (None, mean, mean_square, None, None, None, None)
    _launch(tokens, None, bounds, order, None, results, tokens.shape[1])
    return mean, mean_square


def block_statistics(
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    covariance: bool,
) -> Statistics:
    """See `statistics.block_statistics`."""
    kernel = library.symbol("sparsify_block_statistics", _Problem)
    if kernel is None:
        return reference.block_statistics(key, value, bounds, order, key_bias, covariance)
    found = empty_statistics(key, value, bounds, order, key_bias, covariance)
    log_weight, key_mean, value_mean, key_variance, value_variance, cross = found
    moments = (key_variance, value_variance, cross.flatten(3)) if covariance else (None, None, None)
    results = (log_weight, key_mean, None, value_mean, *moments)
    _launch(key, value, bounds, order, key_bias, results, log_weight.shape[1])
    return found


def pairs_read(q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor) -> Tensor:
    """See `statistics.pairs_read`."""
    kernel = library.symbol("sparsify_pairs_read", _PairsRead)
    if kernel is None:
        return reference.pairs_read(q_bounds, kv_bounds, kv_num_blocks, kv_indices)
    pairs = empty_pairs(q_bounds, kv_bounds, kv_num_blocks, kv_indices)
    tensors = [*(t.contiguous() for t in (q_bounds, kv_bounds, kv_num_blocks, kv_indices)), pairs]
    problem = _PairsRead(
        *(library.view(t) for t in tensors),
        *(*pairs.shape, kv_indices.shape[-1], kv_bounds.shape[-1] - 1),
        torch.get_num_threads(),
    )
    check = partial(check_lists, "kv_num_blocks", "kv_indices", kv_num_blocks, kv_indices, problem.blocks)
    library.launch(kernel, problem, check=check)
    return pairs


def keys_left(keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
    """See `statistics.keys_left`."""
    kernel = library.symbol("sparsify_keys_left", _KeysLeft)
    if kernel is None:
        return reference.keys_left(keys, block_of_key, counts, indices)
    left, blocks, tokens = empty_left(keys, counts), keys.shape[-1], block_of_key.shape[0]
    whole = [t.contiguous() for t in (keys, block_of_key[None, None], counts, indices)]
    problem = _KeysLeft(
        *(library.view(t) for t in (*whole, left)),
        *(*counts.shape, indices.shape[-1], blocks, tokens),
        torch.get_num_threads(),
    )

    def check() -> None:
        check_range("block_of_key", block_of_key, blocks - 1)
        check_lists("counts", "indices", counts, indices, tokens)

    library.launch(kernel, problem, check=check)
    return left


def _launch(
    key: Tensor,
    value: Tensor | None,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    results: tuple[Tensor | None, ...],
    heads: int,
) -> None:
    kernel = library.symbol("sparsify_block_statistics", _Problem)
    assert kernel is not None
    batch, kv_heads, tokens = key.shape[:3]
    # The list keeps copies that `contiguous` may make alive until the kernel has run.
    tensors = [
        *(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (key, value)),
        bounds.contiguous(),
        order if order is None else order.contiguous(),
        key_bias if key_bias is None else key_bias.float().contiguous(),
        *results,
    ]
    problem = _Problem(
        *(library.view(t) for t in tensors),
        *(batch, heads, kv_heads, tokens, bounds.shape[-1] - 1),
        *(key.shape[-1], 0 if value is None else value.shape[-1]),
        library.DTYPES.index(key.dtype),
        torch.get_num_threads(),
    )
    library.launch(kernel, problem, check=partial(check_blocks, "", bounds, order, tokens))


class _Problem(ctypes.Structure):
    """`struct Statistics`."""

    _fields_ = (
        *((name, library.View) for name in ("key", "value", "bounds", "order", "key_bias")),
        *((name, library.View) for name in ("log_weight", "key_mean", "key_mean_square", "value_mean")),
        *((name, library.View) for name in ("key_variance", "value_variance", "covariance")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "tokens", "blocks")),
        *((name, ctypes.c_int64) for name in ("head_dim", "value_dim")),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _PairsRead(ctypes.Structure):
    """`struct PairsRead`."""

    _fields_ = (
        *((name, library.View) for name in ("q_bounds", "kv_bounds", "kv_num_blocks", "kv_indices", "pairs")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "width", "blocks")),
        ("threads", ctypes.c_int32),
    )


class _KeysLeft(ctypes.Structure):
    """`struct KeysLeft`."""

    _fields_ = (
        *((name, library.View) for name in ("keys", "block_of_key", "counts", "indices", "left")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rows", "width", "blocks", "tokens")),
        ("threads", ctypes.c_int32),
    )
