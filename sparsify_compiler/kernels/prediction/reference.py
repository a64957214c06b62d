"""The prediction op, defined in plain torch. It computes in fp32 (fp64 for fp64 input)."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.kernels.prediction import empty_top_k

GROUPS_AT_ONCE = 64
"""Number of groups of each head whose scores are in memory at one time."""


def top_k_keys(
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    q_bounds: Tensor | None,
    key_bias: Tensor | None,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `prediction.top_k_keys`."""
    counts, indices = empty_top_k(query, q_bounds, width)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    most = min(width, key.shape[2])
    rank = torch.arange(key.shape[2], device=key.device)
    wanted = rank < budget.clamp(0, most)[:, :, None, None]
    bounds = None if q_bounds is None else q_bounds.tolist()
    for first in range(0, counts.shape[2], GROUPS_AT_ONCE):
        some = slice(first, first + GROUPS_AT_ONCE)
        if bounds is None:
            scores = _scores(query[:, :, some].to(dtype), key, key_bias, scale)
        else:
            edges = bounds[first : first + GROUPS_AT_ONCE + 1]
            together = [
                _attention(_scores(query[:, :, begin:end].to(dtype), key, key_bias, scale))
                for begin, end in pairwise(edges)
            ]
            scores = torch.stack(together, 2)
            if key_bias is not None:
                scores = scores.masked_fill(key_bias.to(dtype)[:, :, None] == -torch.inf, -torch.inf)
        falling, ranked = scores.sort(dim=-1, descending=True, stable=True)
        keeps = torch.zeros_like(scores, dtype=torch.bool)
        keeps.scatter_(-1, ranked, wanted & (falling > -torch.inf))
        count = keeps.sum(-1)
        counts[:, :, some] = count
        # A stable sort of "not kept" brings the selected keys to the front in rising order.
        listed = (~keeps).to(torch.int8).argsort(dim=-1, stable=True)[..., :most]
        is_chosen = rank[:most] < count[..., None]
        indices[:, :, some] = pad(torch.where(is_chosen, listed, 0), (0, width - most)).int()
    return counts, indices


def _attention(scores: Tensor) -> Tensor:
    """[B, H, S]: the sum over queries of the softmax of scores [B, H, Q, S]; -inf if there is no query."""
    shares = scores.clamp(max=torch.finfo(scores.dtype).max).softmax(-1)
    return shares.nan_to_num(0.0).sum(2) if scores.shape[2] else scores.sum(2) - torch.inf


def _scores(query: Tensor, key: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    scores = scale * (query @ key.mT)
    if key_bias is not None:
        bias = key_bias.to(scores.dtype)[:, :, None]
        scores = (scores + bias).masked_fill(bias == -torch.inf, -torch.inf)
    return scores.nan_to_num(torch.finfo(scores.dtype).min, torch.inf, -torch.inf)
