"""The far field: a virtual key for each block of keys, merged with the output of the node."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from sparsify_compiler.exporting.standard.cube_blocks import CubeBlocks
from sparsify_compiler.exporting.standard.operations import (
    LEAST,
    attention,
    log_sum,
    mean,
    of_heads,
    take,
)
from sparsify_compiler.kernels.far_field.virtual_keys import MOST_SECOND_ORDER
from sparsify_compiler.runtime.site import JUDGED_ROWS

_HIDDEN = -1e29
_TINY = torch.finfo(torch.float32).tiny


class Statistics(NamedTuple):
    """Statistics of N blocks of keys in fp32, as `kernels.statistics` has them."""

    log_weight: Tensor
    """[B|1, G|1, N]; a large negative number for blocks without visible keys."""
    key_mean: Tensor
    """[B, G, N, D]; values have Dv."""
    value_mean: Tensor
    key_variance: Tensor
    """[B, G, N, D]; empty without the linear far field, as the rest."""
    value_variance: Tensor
    covariance: Tensor
    """[B, G, N, D * Dv]"""

    def of_heads(self, heads: int) -> Self:
        """The same, repeated to `heads`."""
        return type(self)(*(of_heads(one, heads) for one in self))


def statistics(
    key: Tensor, value: Tensor, key_bias: Tensor | None, tokens: Tensor, real: Tensor, *, linear: bool
) -> Statistics:
    """The statistics of blocks of keys.

    Args:
        tokens: [N, n] int64, the keys of each block, filled up to one number.
        real: [N, n] bool, whether it is a key of the block.
        linear: whether the linear far field reads them.
    """
    weights, log_weight = real.float(), real.sum(-1).float().log()[None, None]
    if key_bias is not None:
        bias = torch.where(real, take(key_bias.float().clamp(min=LEAST), tokens), LEAST)
        top = bias.amax(-1, keepdim=True)
        weights = torch.where(bias > _HIDDEN, (bias - top).exp(), 0.0)
        total = weights.sum(-1)
        log_weight = torch.where(total > 0, total.log() + top.squeeze(-1), LEAST)
    keys, values = (take(one, tokens).float() for one in (key, value))
    key_mean, value_mean = (mean(one, weights) for one in (keys, values))
    if not linear:
        none = key_mean.new_zeros(*key_mean.shape[:3], 0)
        return Statistics(log_weight, key_mean, value_mean, none, none, none)
    keys, values = keys - key_mean.unsqueeze(3), values - value_mean.unsqueeze(3)
    share = (weights / weights.sum(-1, keepdim=True).clamp(min=_TINY)).unsqueeze(-1)
    covariance = (share * keys).transpose(3, 4) @ values
    key_variance, value_variance = (mean(one.square(), weights) for one in (keys, values))
    return Statistics(log_weight, key_mean, value_mean, key_variance, value_variance, covariance.flatten(3))


class VirtualKeys(NamedTuple):
    """One virtual key for each of N blocks of keys."""

    statistics: Statistics
    """Those of the blocks, for each head of the queries."""
    bias: Tensor
    """[B, H, N] fp32, which is added to the scores."""


class Queries(NamedTuple):
    """The queries of the video, as the linear far field and the selection by gain see them. All are fp32."""

    mean: Tensor
    """[B, H, Nq, D], of each block."""
    square: Tensor
    """[B, H, Nq, D], the mean square of each block."""
    square_of_all: Tensor
    """[B, H, 1, D], the mean square of all queries."""
    scale: float
    """The factor of the scores."""

    def virtual_keys(self, found: Statistics) -> VirtualKeys:
        """The virtual keys of blocks, with the second order of their scores."""
        products = (self.square_of_all @ found.key_variance.transpose(2, 3)).squeeze(2)
        second_order = (self.scale**2 / 2 * products).clamp(max=MOST_SECOND_ORDER)
        return VirtualKeys(found, found.log_weight + second_order)

    def scores(self, virtual: VirtualKeys) -> Tensor:
        """[B, H, Nq, N], the scores of the mean of each block of queries."""
        products = self.mean @ virtual.statistics.key_mean.transpose(2, 3)
        return self.scale * products + virtual.bias.unsqueeze(2)


def queries_of(blocks: CubeBlocks, query: Tensor, rows: Tensor, scale: float) -> Queries:
    """`Queries` of [B, H, S, D]. `rows`: [B, H, Nq, tokens, D], the queries of each block."""
    square = query.float().square().mean(2, keepdim=True)
    return Queries(mean(rows, blocks.q_real), mean(rows.float().square(), blocks.q_real), square, scale)


class Far(NamedTuple):
    """The output of the virtual keys for the queries of the video, fp32."""

    out: Tensor
    """[B, H, Nq, tokens, Dv]"""
    lse: Tensor
    """[B, H, Nq, tokens]"""
    first_order: Tensor | None = None
    """[B, H, Nq, tokens, Dv], to be added to `out`; None where the far field has none."""


def far_of(virtual: VirtualKeys, scaled: Tensor, chosen: Tensor) -> Far:
    """The far field without a first order.

    Args:
        scaled: [B, H, Nq, tokens, D], the queries of each block times the scale.
        chosen: [B, H, Nq, K] int64, the blocks that are read, and so are not part of it.
    """
    found, sizes = virtual.statistics, scaled.shape[2:4]
    key, value = (one.to(scaled.dtype) for one in (found.key_mean, found.value_mean))
    bias = virtual.bias.unsqueeze(2).expand(*chosen.shape[:2], chosen.shape[2], -1)
    bias = bias.scatter(-1, chosen, LEAST)
    products = scaled.flatten(2, 3) @ key.transpose(2, 3)
    scores = products.float().unflatten(2, sizes) + bias.unsqueeze(3)
    shares = scores.softmax(-1)
    out = shares.to(value.dtype).flatten(2, 3) @ value
    return Far(out.float().unflatten(2, sizes), log_sum(scores, shares))


def first_order(found: Statistics, scores: Tensor, scaled: Tensor, chosen: Tensor) -> Tensor:
    """[B, H, Nq, tokens, Dv] fp32, the first order of the scores of virtual keys.

    Args:
        scores: [B, H, Nq, N], of the mean of each block of queries.
        scaled, chosen: as in `far_of`.
    """
    dtype = scaled.dtype
    shares = scores.scatter(-1, chosen, LEAST).softmax(-1)
    matrices = shares.to(dtype) @ _narrow(found.covariance, dtype)
    matrices = matrices.unflatten(-1, (scaled.shape[4], -1))
    limits = (shares @ found.value_variance).clamp(min=_TINY).sqrt().unsqueeze(3)
    return torch.minimum(torch.maximum((scaled @ matrices).float(), -limits), limits)


class Merge(nn.Module):
    """Merges the output of the node with the far field, in the heads for which that lowers the error.

    The error is that of a sample of rows, which are computed exactly.
    """

    sample: Tensor
    """The tokens of the sample, all of the video: no far field changes the others."""
    sample_places: Tensor
    """Their places among those of all blocks of queries."""

    def __init__(self, blocks: CubeBlocks, scale: float) -> None:
        super().__init__()
        layout, self.scale = blocks.layout, scale
        rows, tokens = min(JUDGED_ROWS, layout.tokens), layout.tokens
        positions = (torch.arange(rows) * 2 + 1) * tokens // (2 * rows)
        sample = blocks.q_order[0, 0, positions].long() - layout.before
        sample = sample[(sample >= 0) & (sample < layout.video_tokens)]
        self.register_buffer("sample", sample + layout.before, persistent=False)
        self.register_buffer("sample_places", blocks.places[sample], persistent=False)

    def forward(
        self,
        blocks: CubeBlocks,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        near: tuple[Tensor, Tensor],
        far: Far,
    ) -> Tensor:
        """[B, H, S, Dv]. `near`: (out, lse) of the node."""
        gate = None
        if len(self.sample):
            gate, far = self._judged(query, key, value, key_bias, near, far)
        whole = far.out if far.first_order is None else far.out + far.first_order
        (out, lse), layout = near, blocks.layout
        first, last = layout.before, layout.tokens - layout.after
        video = out[:, :, first:last]
        merged = _merged(video, lse[:, :, first:last], blocks.in_sequence(whole), blocks.in_sequence(far.lse))
        merged = merged if gate is None else torch.where(gate, merged, video)
        return torch.cat([out[:, :, :first], merged, out[:, :, last:]], 2) if blocks.others else merged

    def _judged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        near: tuple[Tensor, Tensor],
        far: Far,
    ) -> tuple[Tensor, Far]:
        """([B, H, 1, 1] bool, the heads that use the far field; the far field without first orders that do not
        lower the error)."""
        heads = query.shape[1]
        exact, _ = attention(
            query.index_select(2, self.sample),
            of_heads(key, heads),
            of_heads(value, heads),
            None if key_bias is None else key_bias.unsqueeze(2),
            self.scale,
            lse=False,
        )

        def error(out: Tensor) -> Tensor:
            return (out.float() - exact.float()).square().sum((2, 3), keepdim=True)

        def sampled(rows: Tensor) -> Tensor:
            return rows.flatten(2, 3).index_select(2, self.sample_places)

        out, lse = (one.index_select(2, self.sample) for one in near)
        least = error(_merged(out, lse, sampled(far.out), sampled(far.lse)))
        if (term := far.first_order) is not None:
            whole = error(_merged(out, lse, sampled(far.out) + sampled(term), sampled(far.lse)))
            far = far._replace(first_order=torch.where((whole <= least).unsqueeze(4), term, 0.0))
            least = torch.minimum(whole, least)
        return least <= error(out), far


def _merged(out: Tensor, lse: Tensor, far: Tensor, far_lse: Tensor) -> Tensor:
    """Near and far field, by their lse, in the dtype of `out`."""
    share = (far_lse - lse).sigmoid().unsqueeze(-1)
    return (out.float() + share * (far - out.float())).to(out.dtype)


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, clamped to its range."""
    most = torch.finfo(dtype).max
    return tensor.clamp(-most, most).to(dtype) if dtype == torch.float16 else tensor.to(dtype)
