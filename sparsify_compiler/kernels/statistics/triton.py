"""The statistics of blocks: launches of the kernels in `triton_kernels.py`. Nothing is read from the device."""

import torch
from torch import Tensor

from sparsify_compiler.kernels.statistics import (
    Statistics,
    empty_left,
    empty_means,
    empty_pairs,
    empty_statistics,
)
from sparsify_compiler.kernels.statistics import triton_kernels as kernels
from sparsify_compiler.kernels.triton.launcher import Launch, alignment, shared_strides, with_strides

BLOCK = 32
"""Number of tokens that a program computes at one time."""
LISTED = 1024
"""Number of blocks of a row that a program counts at one time."""


def block_means(tokens: Tensor, bounds: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `statistics.block_means`."""
    mean, mean_square = empty_means(tokens, bounds)
    means_launch(tokens, bounds, order, mean, mean_square)()
    return mean, mean_square


def means_launch(
    tokens: Tensor, bounds: Tensor, order: Tensor | None, mean: Tensor, mean_square: Tensor
) -> Launch:
    """The launch that fills `mean` and `mean_square`."""
    bounds, order = bounds.contiguous(), order if order is None else order.contiguous()
    arguments = {
        "tokens": tokens,
        "mean": mean,
        "mean_square": mean_square,
        "bounds": bounds,
        "order": order,
        "tokens_strides": tokens.stride(),
        "mean_strides": mean.stride(),
        "bounds_strides": shared_strides(bounds),
        "order_strides": shared_strides(order),
        "DIM": tokens.shape[-1],
        "BLOCK": BLOCK,
        "ALIGN": alignment(tokens),
    }
    return Launch(kernels.block_means_kernel, (mean.shape[2], *mean.shape[1::-1]), arguments, num_warps=4)


def block_statistics(
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    covariance: bool,
) -> Statistics:
    """See `statistics.block_statistics`."""
    found = empty_statistics(key, value, bounds, order, key_bias, covariance)
    statistics_launch(key, value, bounds, order, key_bias, found)()
    return found


def statistics_launch(
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    found: Statistics,
) -> Launch:
    """The launch that fills `found`; second moments only if their tensors are not empty."""
    bounds, order = bounds.contiguous(), order if order is None else order.contiguous()
    log_weight, key_mean, value_mean, key_variance, value_variance, covariance = found
    batch, heads, blocks = log_weight.shape
    arguments = {
        "key": key,
        "value": value,
        "bounds": bounds,
        "order": order,
        "key_bias": key_bias,
        "log_weight": log_weight,
        "key_mean": key_mean,
        "value_mean": value_mean,
        "key_variance": key_variance,
        "value_variance": value_variance,
        "covariance": covariance if covariance.dim() > 1 else None,
        "key_strides": key.stride(),
        "value_strides": value.stride(),
        "bounds_strides": shared_strides(bounds),
        "order_strides": shared_strides(order),
        "key_bias_strides": shared_strides(key_bias),
        "blocks": blocks,
        "heads_per_key_head": heads // key.shape[1],
        "HEAD_DIM": key.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "VALUE_TILE": value_tile(key.shape[-1]),
        "BLOCK": BLOCK,
        "ALIGN": alignment(key),
        "PRECISION": precision(key.dtype),
    }
    tiles = -(-value.shape[-1] // value_tile(key.shape[-1]))
    return Launch(kernels.block_statistics_kernel, (blocks * tiles, heads, batch), arguments, num_warps=8)


def pairs_read(q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor) -> Tensor:
    """See `statistics.pairs_read`."""
    pairs = empty_pairs(q_bounds, kv_bounds, kv_num_blocks, kv_indices)
    pairs_launch(q_bounds, kv_bounds, kv_num_blocks, kv_indices, pairs)()
    return pairs


def pairs_launch(
    q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, pairs: Tensor
) -> Launch:
    """The launch that fills `pairs`."""
    tables = {
        "q_bounds": q_bounds,
        "kv_bounds": kv_bounds,
        "kv_num_blocks": kv_num_blocks,
        "kv_indices": kv_indices,
    }
    arguments = {
        **tables,
        **{f"{name}_strides": shared_strides(t) for name, t in tables.items()},
        **with_strides(pairs=pairs),
        "LISTED": LISTED,
    }
    return Launch(kernels.pairs_kernel, (pairs.shape[2], *pairs.shape[1::-1]), arguments, num_warps=4)


def keys_left(keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
    """See `statistics.keys_left`."""
    left = empty_left(keys, counts)
    left_launch(keys, block_of_key, counts, indices, left)()
    return left


def left_launch(keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor, left: Tensor) -> Launch:
    """The launch that fills `left`."""
    arguments = {
        "keys": keys,
        "keys_strides": shared_strides(keys),
        "block_of_key": block_of_key.contiguous(),
        **with_strides(counts=counts, indices=indices, left=left),
        "blocks": left.shape[-1],
        "LISTED": LISTED,
    }
    return Launch(kernels.left_kernel, (left.shape[2], *left.shape[1::-1]), arguments, num_warps=4)


def value_tile(head_dim: int) -> int:
    """Number of value channels that one program computes: fewer if keys have many channels."""
    return 64 if head_dim <= 128 else 32


def precision(dtype: torch.dtype) -> str:
    """The precision of products of fp32 numbers that were loaded from tensors of this type."""
    return "ieee" if dtype == torch.float32 else "tf32"
