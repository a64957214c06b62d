"""Attention problems to compare far fields on, and the near blocks that a method would select for them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsify_compiler.kernels.statistics import block_means, block_statistics
from sparsify_compiler.table import BlockTable

Problem = tuple[Tensor, Tensor, Tensor]


def planted_clusters(
    tokens: int, heads: int, head_dim: int, *, seed: int = 0, sharpness: float = 1.0
) -> Problem:
    """(query, key, value) [1, H, S, D]: tokens lie around centres, like the tokens of a video's objects.

    A query resembles the keys of its own cluster. The tokens of a cluster are neighbours in the sequence, and
    sizes of clusters differ. Values partly follow keys: a value is a linear map of the key, the cluster's own
    value and noise.
    """
    g = torch.Generator().manual_seed(seed)
    clusters = max(tokens // 48, 2)
    cuts = torch.rand(heads, clusters, generator=g).add(0.5).cumsum(-1)
    cuts = (cuts / cuts[:, -1:] * tokens).round().long().clamp(max=tokens)
    positions = torch.arange(tokens).expand(heads, -1).contiguous()
    label = torch.searchsorted(cuts, positions, right=True).clamp(max=clusters - 1)
    centres = torch.randn(heads, clusters, head_dim, generator=g)
    own = centres.gather(1, label[..., None].expand(-1, -1, head_dim))
    # Within a cluster keys vary along a few directions more than along the others.
    spread = 0.25 + torch.rand(heads, 1, head_dim, generator=g)
    query = own + 0.5 * torch.randn(heads, tokens, head_dim, generator=g)
    inner = spread * torch.randn(heads, tokens, head_dim, generator=g)
    key = own + 0.7 * inner
    follows = torch.randn(heads, head_dim, head_dim, generator=g) / math.sqrt(head_dim)
    own_value = torch.randn(heads, clusters, head_dim, generator=g).gather(
        1, label[..., None].expand(-1, -1, head_dim)
    )
    value = own_value + (key @ follows) + 0.3 * torch.randn(heads, tokens, head_dim, generator=g)
    return (sharpness * query)[None], key[None], value[None]


def diffuse(tokens: int, heads: int, head_dim: int, *, seed: int = 0) -> Problem:
    """(query, key, value) in which every query attends to all keys: weak, smooth scores, as at high noise."""
    g = torch.Generator().manual_seed(seed)
    # Smooth along the sequence: noise under a kernel that decays over some tens of tokens.
    steps = torch.randn(3, heads, tokens + 256, head_dim, generator=g)
    kernel = torch.exp(-torch.arange(256) / 32.0)
    kernel = kernel / kernel.square().sum().sqrt()
    smooth = torch.nn.functional.conv1d(steps.mT.reshape(-1, 1, tokens + 256), kernel[None, None])
    query, key, value = smooth[..., :tokens].reshape(3, heads, head_dim, tokens).mT
    rough = torch.randn(heads, tokens, head_dim, generator=g)
    mixing = torch.randn(heads, head_dim, head_dim, generator=g) / math.sqrt(head_dim)
    key = 0.6 * key + 0.3 * rough
    return 0.7 * query[None], key[None], (value + key @ mixing)[None]


def very_sharp(tokens: int, heads: int, head_dim: int, *, seed: int = 0) -> Problem:
    """Planted clusters with queries five times as long: a few keys hold all the mass."""
    return planted_clusters(tokens, heads, head_dim, seed=seed, sharpness=5.0)


GENERATORS: dict[str, Callable[..., Problem]] = {
    "planted clusters": planted_clusters,
    "diffuse": diffuse,
    "very sharp": very_sharp,
}


def nearest_blocks(query: Tensor, key: Tensor, q_size: int, kv_size: int, density: float) -> BlockTable:
    """A table of flat blocks. Each query block reads a share of the key blocks, those with the largest products of
    block means."""
    means = [t.unflatten(2, (-1, n)).float().mean(3) for t, n in ((query, q_size), (key, kv_size))]
    scores = means[0] @ means[1].mT
    kept = max(1, round(density * scores.shape[-1]))
    best = scores.topk(kept, dim=-1).indices
    blocks = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    q_sizes, kv_sizes = (
        torch.full((1, 1, n), size) for n, size in zip(scores.shape[2:], (q_size, kv_size), strict=True)
    )
    return BlockTable.from_block_mask(blocks, q_sizes, kv_sizes)


def relative_error(out: Tensor, exact: Tensor) -> float:
    """Mean over heads of ||out - exact|| / ||exact||."""
    difference = (out.double() - exact.double()).flatten(2).norm(dim=-1)
    return float((difference / exact.double().flatten(2).norm(dim=-1)).mean())


def query_side(query: Tensor, key: Tensor, value: Tensor, table: BlockTable) -> tuple[Tensor, Tensor]:
    """(out, lse) of only the far field, expanded at the mean query qbar of each query block instead of by key.

    Over the skipped blocks, under the softmax at qbar: log Z, mean output o, mean key mu, covariance C of keys and
    values, within blocks and between them. Then lse = log Z + s mu.(q - qbar) and out = o + s Cᵀ (q - qbar). This
    lse is a tangent below a convex function, so the far field never gets too much weight. It costs one key and one
    matrix per query block.
    """
    scale = query.shape[-1] ** -0.5
    log_weight, k, v, _, _, within = block_statistics(
        key, value, table.kv_bounds, table.kv_order, None, covariance=True
    )
    group = query.shape[1] // k.shape[1]
    log_weight, k, v, within = (t.repeat_interleave(group, 1) for t in (log_weight, k, v, within))
    mean_query, _ = block_means(query, table.q_bounds, table.q_order)
    scores = (scale * mean_query @ k.mT + log_weight[:, :, None]).masked_fill(table.block_mask(), -torch.inf)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    log_z = scores.logsumexp(-1)
    shares = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    mu, o = shares @ k, shares @ v
    centre, middle = k.mean(2, keepdim=True), v.mean(2, keepdim=True)
    moments = within + (k - centre)[..., :, None] * (v - middle)[..., None, :]
    c = torch.einsum("bhij,bhjde->bhide", shares, moments)
    c = c - (mu - centre)[..., :, None] * (o - middle)[..., None, :]
    block = table.block_of_token("q").expand(*query.shape[:2], -1)

    def of_token(tensor: Tensor) -> Tensor:
        index = block.reshape(*block.shape, *[1] * (tensor.dim() - 3)).expand(-1, -1, -1, *tensor.shape[3:])
        return tensor.gather(2, index)

    step = scale * (query.to(mu.dtype) - of_token(mean_query))
    lse = of_token(log_z) + (step * of_token(mu)).sum(-1)
    return of_token(o) + (step[..., None, :] @ of_token(c))[..., 0, :], lse
