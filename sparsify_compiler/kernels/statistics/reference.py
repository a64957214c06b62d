"""The statistics of blocks, defined in plain torch. Two passes over a block: means, then centred moments."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify_compiler.kernels.statistics import (
    Statistics,
    empty_left,
    empty_means,
    empty_statistics,
    wide,
)
from sparsify_compiler.table import BlockTable, listed_of_rows


def block_means(tokens: Tensor, bounds: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `statistics.block_means`."""
    mean, mean_square = (t.zero_() for t in empty_means(tokens, bounds))
    for at, block, members in blocks(bounds, order, tokens.shape[2]):
        if members.numel():
            rows = tokens[at][:, :, members].to(mean.dtype)
            mean[at][:, :, block], mean_square[at][:, :, block] = rows.mean(2), rows.square().mean(2)
    return mean, mean_square


def block_means_backward(grad: Tensor, tokens: Tensor, bounds: Tensor, order: Tensor | None) -> Tensor:
    """Gradient of `tokens`: every token gets an equal share of its block's gradient."""
    out = torch.zeros(tokens.shape, dtype=grad.dtype, device=grad.device)
    for at, block, members in blocks(bounds, order, tokens.shape[2]):
        out[at][:, :, members] = grad[at][:, :, block, None] / max(members.numel(), 1)
    return out.to(tokens.dtype)


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
    log_weight, key_mean, value_mean, key_variance, value_variance, cross = found
    k, v, bias = _widen(key, value, key_bias, log_weight.shape[1])
    for at, block, members in blocks(bounds, order, key.shape[2]):
        weights, log_weight[at][:, :, block] = _weights(bias[at][:, :, members])
        keys, values = (_visible(t[at][:, :, members], weights) for t in (k, v))
        mean_key, mean_value = ((weights * t).sum(2, keepdim=True) for t in (keys, values))
        key_mean[at][:, :, block], value_mean[at][:, :, block] = mean_key[:, :, 0], mean_value[:, :, 0]
        if covariance:
            keys, values = keys - mean_key, values - mean_value
            key_variance[at][:, :, block] = (weights * keys.square()).sum(2)
            value_variance[at][:, :, block] = (weights * values.square()).sum(2)
            products, most = (weights * keys).mT @ values, torch.finfo(cross.dtype).max
            cross[at][:, :, block] = products.clamp(-most, most)
    return found


def pairs_read(q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor) -> Tensor:
    """See `statistics.pairs_read`."""
    table = BlockTable(
        q_bounds=q_bounds, kv_bounds=kv_bounds, kv_num_blocks=kv_num_blocks, kv_indices=kv_indices
    )
    return table.pairs_read()


def keys_left(keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
    """See `statistics.keys_left`."""
    left = empty_left(keys, counts).copy_(keys[:, :, None])
    for some, listed, used in listed_of_rows(counts, indices):
        left[:, :, some].scatter_add_(-1, block_of_key.long()[listed], -used.int())
    return left


def block_statistics_backward(
    grad_key_mean: Tensor,
    grad_value_mean: Tensor,
    grad_key_variance: Tensor,
    grad_value_variance: Tensor,
    grad_covariance: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value. A mean inside a centred moment has gradient 0, since centred values add up to 0:

    dk = w (dE[k] + 2 (k - E k) dvar[k] + dC (v - E v)),  dv = w (dE[v] + 2 (v - E v) dvar[v] + dCᵀ (k - E k)).
    """
    k, v, bias = _widen(key, value, key_bias, grad_key_mean.shape[1])
    dk, dv = (t.new_zeros(t.shape) for t in (k, v))
    for at, block, members in blocks(bounds, order, key.shape[2]):
        weights, _ = _weights(bias[at][:, :, members])
        keys, values = (_visible(t[at][:, :, members], weights) for t in (k, v))
        d_key = grad_key_mean[at][:, :, block, None].expand_as(keys)
        d_value = grad_value_mean[at][:, :, block, None].expand_as(values)
        if grad_covariance.numel():
            keys, values = (t - (weights * t).sum(2, keepdim=True) for t in (keys, values))
            d_cross = grad_covariance[at][:, :, block].to(keys.dtype)
            d_key = d_key + 2 * keys * grad_key_variance[at][:, :, block, None] + values @ d_cross.mT
            d_value = d_value + 2 * values * grad_value_variance[at][:, :, block, None] + keys @ d_cross
        dk[at][:, :, members], dv[at][:, :, members] = weights * d_key, weights * d_value
    if (group := dk.shape[1] // key.shape[1]) > 1:
        dk, dv = (d.unflatten(1, (-1, group)).sum(2) for d in (dk, dv))
    return dk.to(key.dtype), dv.to(value.dtype)


def blocks(
    bounds: Tensor, order: Tensor | None, tokens: int
) -> Iterator[tuple[tuple[slice, slice], int, Tensor]]:
    """((batches, heads), block, its tokens as int64 indices) of every block.

    Batches and heads that share their blocks are one slice.
    """
    given = [bounds] if order is None else [bounds, order]
    for b, h in itertools.product(*(range(max(t.shape[dim] for t in given)) for dim in (0, 1))):
        shared = [all(t.shape[dim] == 1 for t in given) for dim in (0, 1)]
        at = slice(None) if shared[0] else slice(b, b + 1), slice(None) if shared[1] else slice(h, h + 1)

        def one(tensor: Tensor, b: int = b, h: int = h) -> Tensor:
            return tensor[b % tensor.shape[0], h % tensor.shape[1]]

        permuted = torch.arange(tokens, device=bounds.device) if order is None else one(order).long()
        for block, (begin, end) in enumerate(itertools.pairwise(one(bounds).tolist())):
            yield at, block, permuted[begin:end]


def _widen(key: Tensor, value: Tensor, key_bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value in the dtype of statistics, with `heads` heads; bias as [B, G, S]."""
    dtype, batch = wide(key.dtype), key.shape[0]
    k, v = (t.to(dtype).repeat_interleave(heads // key.shape[1], dim=1) for t in (key, value))
    bias = k.new_zeros(1, 1, key.shape[2]) if key_bias is None else key_bias.to(dtype)
    return k, v, bias.expand(batch, heads, -1)


def _weights(bias: Tensor) -> tuple[Tensor, Tensor]:
    """[B, G, n] -> (weights [B, G, n, 1] with sum 1, or 0 if all are hidden; log of their sum before)."""
    blind = (bias == -torch.inf).all(-1, keepdim=True)
    weights = bias.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return weights[..., None], bias.logsumexp(-1)


def _visible(tokens: Tensor, weights: Tensor) -> Tensor:
    """The tokens, with 0 for those of weight 0, which may hold anything."""
    return tokens.masked_fill(weights == 0, 0.0)
