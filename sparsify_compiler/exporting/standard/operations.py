"""Functions of tensors that the parts of a site share."""

import torch
from torch import Tensor

LEAST = -1e30
"""A bias that hides a key."""


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse fp32) of [..., queries, D] and [..., keys, D]; `bias` [..., 1, keys] is added to the scores.

    Where all keys are hidden, out is 0 and lse is -inf. Without `lse` it is None.
    """
    scores = (query * scale) @ key.transpose(-1, -2)
    if bias is not None:
        least = torch.finfo(query.dtype).min / 2
        bias = bias.to(query.dtype).clamp(min=least)
        scores = scores + bias
    shares = scores.softmax(-1)
    out = shares @ value
    weight = log_sum(scores, shares) if lse else None
    if bias is not None:
        hidden = bias.amax(-1, keepdim=True) <= least
        out = torch.where(hidden, 0.0, out)
        weight = weight if weight is None else torch.where(hidden.squeeze(-1), -torch.inf, weight)
    return out, weight


def log_sum(scores: Tensor, shares: Tensor) -> Tensor:
    """The log of the sum of exp(scores) over the last dimension, fp32, by their softmax."""
    return scores.amax(-1).float() - shares.amax(-1).float().log()


def take(tensor: Tensor, places: Tensor) -> Tensor:
    """[B, H, N, n, ...] from [B, H, S, ...], for places [N, n]."""
    return tensor.index_select(2, places.flatten()).unflatten(2, places.shape)


def of_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, G, ...] repeated to `heads`."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def mean(rows: Tensor, weights: Tensor) -> Tensor:
    """[..., N, D] fp32 means of [..., N, tokens, D], weighted by [..., N, tokens]; 0 where all weights are 0."""
    weights = weights.float()
    sums = (weights.unsqueeze(-2) @ rows.float()).squeeze(-2)
    return sums / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def laid_out(out: Tensor) -> Tensor:
    """The output in memory as [B, S, H, D], as sites return it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
