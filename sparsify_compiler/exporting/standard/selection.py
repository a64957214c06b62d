"""The selection: the K blocks of video keys that each block of video queries reads."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.exporting.standard.cube_blocks import CubeBlocks
from sparsify_compiler.exporting.standard.far_field import Queries, VirtualKeys, statistics
from sparsify_compiler.exporting.standard.operations import LEAST, mean, of_heads, take


def by_mass(blocks: CubeBlocks, rows: Tensor, key: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    """[B, H, Nq, K] int64, the blocks with the largest mass, as `BlockMethod` defines it.

    Args:
        rows: [B, H, Nq, tokens, D], the queries of each block.
    """
    means = mean(take(key, blocks.kv_tokens), blocks.kv_real)
    counts = blocks.kv_real.sum(-1).float()
    if key_bias is not None:
        layout = blocks.layout
        video = key_bias[..., layout.before : layout.tokens - layout.after].float().clamp(min=LEAST)
        whole = pad((video - video.amax(-1, keepdim=True)).exp(), (layout.before, layout.after))
        counts = (take(whole, blocks.kv_tokens) * blocks.kv_real).sum(-1).round().unsqueeze(2)
    products = mean(rows, blocks.q_real) @ of_heads(means, rows.shape[1]).transpose(2, 3)
    # Equal counts add nothing, so they round nothing either.
    return (
        (scale * products + (counts / counts.amax(-1, keepdim=True)).log())
        .topk(blocks.read, -1, sorted=False)
        .indices
    )


def by_gain(
    blocks: CubeBlocks,
    queries: Queries,
    virtual: VirtualKeys,
    scores: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
) -> Tensor:
    """[B, H, Nq, K] int64, the blocks with the largest gain, as `kernels.far_field.virtual_keys.gains`.

    The power of the output, by which gains are divided, is the same for all blocks of a row.

    Args:
        virtual: those of the blocks of video keys.
        scores: [B, H, Nq, N], those of `virtual`.
    """
    parts, every = [virtual.statistics], [scores]
    for where, run in blocks.other_runs.items():
        real = torch.ones_like(run[None], dtype=torch.bool)
        found = statistics(key, value, key_bias, run[None], real, linear=True)
        other = queries.virtual_keys(found.of_heads(scores.shape[1]))
        place = 0 if where == "before" else len(parts)
        parts.insert(place, other.statistics)
        every.insert(place, queries.scores(other))
    _, _, value_mean, key_variance, value_variance, _ = (
        torch.cat(tensors, 2) for tensors in zip(*parts, strict=True)
    )
    shares = torch.cat(every, 3).softmax(-1)
    spread = queries.square @ key_variance.transpose(2, 3)
    out = shares @ value_mean
    of_values = (value_mean.square() + value_variance).sum(-1).unsqueeze(2)
    apart = out.square().sum(-1, keepdim=True) - 2 * (out @ value_mean.transpose(2, 3)) + of_values
    gain = (shares * spread * queries.scale**2).square() * apart.clamp(min=0) / blocks.sizes
    first = int(blocks.layout.before > 0)
    gain = gain[..., first : first + len(blocks.kv_tokens)]
    return gain.topk(blocks.read, -1, sorted=False).indices
