"""Virtual keys: each block of keys as one key, by its statistics; and the choice of blocks that are better read.

One virtual key approximates a block j that a query block does not read. With n_j keys of mean kbar_j, value mean
vbar_j, variance var_j per channel, covariance C_j of keys and values (weighted by exp(key_bias)), and s the scale:

    mean    score s q.kbar_j + log n_j, value vbar_j. The zeroth order, as in SVG-EAR (arXiv 2603.08982).
    linear  score s q.kbar_j + log n_j + v_j, value vbar_j + s C_jᵀ q. For Gaussian keys with a diagonal covariance,
            the value is exact, and so is the score with v_j = s²/2 q².var_j. The sum of C_j under the far softmax
            is computed once for each query block, at its mean query: M_i. PISA (arXiv 2602.01077) has the first
            order as one matrix for the whole sequence, over flat blocks.

An expansion is good where its terms are small. Where attention is sharp they grow without bound: the far field then
has ten times the error of dropping, in too few rows for a sample to show it. So both terms of `linear` are bounded:
s q M_i moves no channel further than the standard deviation of the values that it approximates, and v_j is at most
1/2. With q² averaged over the queries of a head, v_j is a bias. Each query's own q² gives as large an error, and
would double the head dim.

The blocks with most mass are not the best to read: statistics describe a block of similar keys, or similar values,
well, even if it gets much attention. `min_gain` reads, in addition to the table, the blocks that `linear`
approximates badly. The second order, which `linear` omits, is about P_ij s² E q²·var_j times the distance of the
values of j from the output, where P_ij is the share of block j in the attention of query block i (`gains`).

A table of single keys has no blocks that could approximate the skipped keys, so coarser blocks come with it
(`FarBlocks`). Row i may then read some keys of block j and leave m_ij of n_j unread. The block's virtual key
approximates these, with the weight of m_ij keys: score + log m_ij - log n_j. To remove the keys that are read from
the means would need sums over the keys of every row.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import providers, statistics
from sparsify_compiler.kernels.far_field.error_target import LEAST_GAIN, AllHeads, ErrorTarget, Reading
from sparsify_compiler.table import BlockTable

MOST_SECOND_ORDER = 0.5
"""Largest second-order term of a score. Above it, the third order is no smaller than the second."""
MOST_SPREAD = 8.0
"""Largest variance of scores that an estimate of an error counts in full. exp of half of it is 55."""


class FarBlocks(NamedTuple):
    """Blocks that approximate those of their keys that a row does not read; shared by batch and heads."""

    order: Tensor
    """[1, 1, S] int32, as `BlockTable.kv_order`."""
    bounds: Tensor
    """[1, 1, N+1] int32, as `BlockTable.kv_bounds`."""
    keys: Tensor
    """[B|1, H|1, N] int32, number of visible keys of each block."""
    left: Tensor
    """[B, H, Nq, N] int32, number of these keys that each query block does not read. A provider that fuses writes
    its table into this memory where no gradients are needed."""

    def check(self, query: Tensor, key: Tensor, table: BlockTable) -> None:
        """Raise OperandError unless these blocks fit the keys and the rows of the table. Reads no value."""
        batch, heads, rows = *query.shape[:2], table.q_bounds.shape[-1] - 1
        tokens, blocks = key.shape[2], self.bounds.shape[-1] - 1
        shapes: dict[str, list[tuple[int, ...]]] = {
            "order": [(1,), (1,), (tokens,)],
            "bounds": [(1,), (1,), (blocks + 1,)],
            "keys": [(1, batch), (1, heads), (blocks,)],
            "left": [(batch,), (heads,), (rows,), (blocks,)],
        }
        for name, allowed in shapes.items():
            tensor = getattr(self, name)
            fits = len(tensor.shape) == len(allowed) and all(
                size in sizes for size, sizes in zip(tensor.shape, allowed, strict=True)
            )
            if not fits or tensor.dtype != torch.int32 or tensor.device != query.device:
                wanted = ", ".join(" or ".join(map(str, sorted(set(sizes)))) for sizes in allowed)
                raise OperandError(
                    f"{name} of far_blocks must be int32 [{wanted}] on {query.device}, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )


class VirtualKeys(NamedTuple):
    """The virtual keys: one for each block, or with `FarBlocks` one for each number of keys left unread."""

    key: Tensor
    """[B, G, N, D] in the dtype of the queries, G dividing their heads."""
    value: Tensor
    """[B, G, N, Dv]."""
    bias: Tensor
    """[B, H, N] fp32 (fp64 for fp64 input), added to the scaled scores; -inf for a virtual key that is not used."""
    matrices: Tensor | None
    """M of `linear`, [B, H, Nq, D, Dv] in the dtype of `bias`, or of the queries if no gradients are needed."""
    limits: Tensor | None
    """Limits of s q M, [B, H, Nq, Dv]."""


class Found(NamedTuple):
    """Results of `virtual_keys`."""

    table: BlockTable
    """The table, with the blocks that `min_gain` or `target` adds."""
    far: VirtualKeys
    others: BlockTable | None
    """A table of the virtual keys that each row reads. None if they are the table's blocks: then a row reads those
    that it does not list."""
    kept: Tensor | None
    """With `min_gain` or `target`, the attention mass that queries are estimated to read, [B, H]."""
    reading: Reading | None
    """With `target`, the result of `ErrorTarget.reading`."""
    density: Tensor | None
    """`table.densities()` in fp32, [B, H], where it is known."""


def virtual_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    *,
    linear: bool,
    min_gain: float | None = None,
    best: int = 0,
    target: ErrorTarget | None = None,
    all_heads: AllHeads | None = None,
    blocks: FarBlocks | None = None,
    known: tuple[Tensor, ...] | None = None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> Found:
    """Virtual keys for the keys that a row of a table does not list, of the table's own blocks or of `blocks`.

    Args:
        best: with `min_gain`, each row also reads this number of the other blocks, those with the largest gains.
        target: in place of `min_gain`, the largest error of the output. Blocks are read until the error that is
            estimated to remain is below it.
        known: `statistics.block_statistics` of these blocks, where it is known.

    `mean` has neither M nor limits. No gradient flows through the second order of the scores.
    """
    bounds, order = (table.kv_bounds, table.kv_order) if blocks is None else (blocks.bounds, blocks.order)
    log_weight, key_mean, value_mean, key_variance, value_variance, covariance = (
        known
        if known is not None
        else statistics.block_statistics(
            key, value, bounds, order, key_bias, covariance=linear, provider=provider
        )
    )
    bias = _of_heads(log_weight, query.shape[1])
    matrices = limits = kept = reading = None
    if linear:
        mean_query, mean_square = statistics.block_means(
            query, table.q_bounds, table.q_order, provider=provider
        )
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        apart = blocks is not None or target is not None or all_heads is not None
        if providers.fuses(provider) and not (learns or best or apart):
            found = Listed(
                *torch.ops.sparsify.list_blocks(
                    *(query, mean_query, mean_square, log_weight, key_mean, value_mean),
                    *(key_variance, value_variance, table.q_bounds, table.kv_bounds, table.kv_num_blocks),
                    *(table.kv_indices, min_gain, scale, provider),
                )
            )
            return _as_listed(found, table, covariance, read=min_gain is not None)
        sizes = table.q_bounds.diff(dim=-1).unsqueeze(-2).to(mean_square.dtype)
        mean_of_all = sizes @ mean_square / max(query.shape[2], 1)
        second_order = scale**2 / 2 * _per_query_block(mean_of_all, key_variance.mT)[:, :, 0]
        bias = bias + second_order.clamp(max=MOST_SECOND_ORDER)
        scores = scale * _per_query_block(mean_query, key_mean.mT) + bias.detach()[:, :, None]
        if blocks is not None:
            share = blocks.left.to(bias.dtype) / blocks.keys.clamp(min=1)[:, :, None].to(bias.dtype)
            scores = (scores + share.log()).masked_fill(share == 0, -torch.inf)
        else:
            listed = table.block_mask()
        if min_gain is not None or target is not None:
            with torch.no_grad():
                spread = scale**2 * _per_query_block(mean_square, key_variance.mT)
                attention = _shares(scores)
                if target is not None:
                    spread = _all_orders(spread)
                gain = gains(attention, spread, value_mean, value_variance, table, all_heads)
                if target is not None:
                    gain = gain.clamp(min=LEAST_GAIN).masked_fill(scores == -torch.inf, 0)
                    shares = _shares_of_pairs(table, gain.dtype)
                    reading = target.reading(gain, shares, ~listed, all_heads)
                    more = reading.more
                else:
                    more = gain > (math.inf if min_gain is None else min_gain)
                if best:
                    ranked = gain.masked_fill(listed, -1.0).topk(min(best, gain.shape[-1]), sorted=False)
                    more = more.scatter(-1, ranked.indices, True)
                listed = listed | more
                table = table.listing(listed)
                kept = (sizes @ (attention * listed).sum(-1, keepdim=True))[:, :, 0, 0] / max(
                    query.shape[2], 1
                )
                del spread, attention, gain, more
        shares = _shares(scores if blocks is not None else scores.masked_fill(listed, -torch.inf))
        # In the dtype of the queries: in fp32 this product would be half of the far field's time on a GPU.
        narrow_shares, shape = _narrow(shares, query.dtype), covariance.shape[3:]
        products = _per_query_block(narrow_shares, _narrow(covariance.flatten(3), query.dtype))
        del covariance  # the largest tensor of a site
        matrices = products.to(shares.dtype).unflatten(3, shape)
        # Not 0, since a square root has no gradient there.
        limits = _per_query_block(shares, value_variance).clamp(min=torch.finfo(shares.dtype).tiny).sqrt()
    key_mean, value_mean = (_narrow(t, query.dtype) for t in (key_mean, value_mean))
    far = VirtualKeys(key_mean, value_mean, bias.detach(), matrices, limits)
    if blocks is None:
        return Found(table, far, None, kept, reading, None)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    in_place = providers.fuses(provider) and not learns
    return Found(table, *_for_each_number(far, table, blocks, in_place=in_place), kept, reading, None)


class Judged(NamedTuple):
    """Results of `sparsify::judged` by the sampled rows of each head."""

    limits: Tensor
    """`VirtualKeys.limits`, 0 in heads whose first order raises it; empty without one."""
    gate: Tensor
    """Gate and recall are those of `far_field.Report`."""
    recall: Tensor


class Listed(NamedTuple):
    """Results of `sparsify::list_blocks`; N blocks of keys."""

    counts: Tensor
    """[B, H, Nq] int32, as `BlockTable.kv_num_blocks`: those that are read."""
    indices: Tensor
    """[B, H, Nq, N] int32, as `BlockTable.kv_indices`."""
    other_counts: Tensor
    """The same for all other blocks."""
    other_indices: Tensor
    key: Tensor
    """Keys, values, bias and limits are those of `VirtualKeys`."""
    value: Tensor
    bias: Tensor
    limits: Tensor
    shares: Tensor
    """[B, H, Nq, N] in the dtype of the queries: the softmax of the scores of the others."""
    kept: Tensor
    """[2, B, H, Nq] fp32: the attention to the blocks that are read, and the share of the keys that are in them,
    times the block's share of the queries."""


def _as_listed(found: Listed, table: BlockTable, covariance: Tensor, *, read: bool) -> Found:
    """The results of `virtual_keys`. `read`: whether the table changes."""
    kept, density = found.kept.sum(-1)
    columns = torch.arange(table.kv_bounds.shape[-1], dtype=torch.int32, device=found.counts.device)
    others = replace(
        table,
        kv_bounds=columns[None, None],
        kv_order=None,
        kv_num_blocks=found.other_counts,
        kv_indices=found.other_indices,
    )
    matrices = _per_query_block(found.shares, _narrow(covariance.flatten(3), found.shares.dtype))
    matrices = matrices.unflatten(3, covariance.shape[3:])
    far = VirtualKeys(found.key, found.value, found.bias, matrices, found.limits)
    if not read:
        return Found(table, far, others, None, None, density)
    table = replace(table, kv_num_blocks=found.counts, kv_indices=found.indices)
    return Found(table, far, others, kept, None, density)


@custom_op("sparsify::list_blocks")
def _list_blocks(
    query: Tensor,
    mean_query: Tensor,
    mean_square: Tensor,
    log_weight: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    key_variance: Tensor,
    value_variance: Tensor,
    q_bounds: Tensor,
    kv_bounds: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    min_gain: float | None,
    scale: float,
    provider: str,
) -> list[Tensor]:
    """Select by gain, and weigh the blocks that are not read: `virtual_keys` from the statistics on."""
    from sparsify_compiler.kernels.far_field import triton

    found = empty_listed(query, mean_query, value_mean)
    triton.list_blocks(
        *(query, mean_query, mean_square, log_weight, key_mean, value_mean, key_variance, value_variance),
        *(q_bounds, kv_bounds, kv_num_blocks, kv_indices, min_gain, scale, found),
    )
    return list(found)


@_list_blocks.register_fake
def _list_blocks_fake(query: Tensor, mean_query: Tensor, *rest: Any) -> list[Tensor]:
    return list(empty_listed(query, mean_query, rest[3]))


def empty_listed(query: Tensor, mean_query: Tensor, value_mean: Tensor) -> Listed:
    """Uninitialised results of `list_blocks`."""
    batch, groups, blocks, value_dim = value_mean.shape
    rows, heads, head_dim = mean_query.shape[:3], query.shape[1], query.shape[3]

    def integers(*shape: int) -> Tensor:
        return mean_query.new_empty(shape, dtype=torch.int32)

    return Listed(
        counts=integers(*rows),
        indices=integers(*rows, max(blocks, 1)),
        other_counts=integers(*rows),
        other_indices=integers(*rows, max(blocks, 1)),
        key=query.new_empty(batch, groups, blocks, head_dim),
        value=query.new_empty(batch, groups, blocks, value_dim),
        bias=mean_query.new_empty(batch, heads, blocks),
        limits=mean_query.new_empty(*rows, value_dim),
        shares=query.new_empty(*rows, blocks),
        kept=mean_query.new_empty(2, *rows),
    )


def _for_each_number(
    far: VirtualKeys, table: BlockTable, blocks: FarBlocks, *, in_place: bool
) -> tuple[VirtualKeys, BlockTable]:
    """(virtual keys, table of those that each query block of `table` reads).

    A block has a virtual key for every number of its keys that may be left unread, from 1 on. So there is one
    virtual key for each key.
    """
    first, sizes = blocks.bounds[..., :-1], blocks.bounds.diff(dim=-1)
    tokens = torch.arange(blocks.order.shape[-1] + 1, dtype=torch.int32, device=first.device)
    block = torch.repeat_interleave(sizes[0, 0], output_size=len(tokens) - 1)
    number = tokens[1:] - first[0, 0][block]
    of_one = far.bias - blocks.keys.clamp(min=1).to(far.bias.dtype).log()
    far = far._replace(
        key=far.key[:, :, block],
        value=far.value[:, :, block],
        bias=of_one[..., block] + number.to(far.bias.dtype).log(),
    )
    none_left = blocks.left <= 0
    # A number larger than the block counts as all of its keys. No method gives one.
    column = torch.minimum(blocks.left, sizes[:, :, None], out=blocks.left if in_place else None)
    column += first[:, :, None] - 1
    # One more block, without a key, for blocks that have no keys left.
    column.masked_fill_(none_left, len(tokens) - 1)
    bounds = torch.nn.functional.pad(tokens, (0, 1), value=len(tokens) - 1)
    counts = torch.full((1, 1, column.shape[2]), column.shape[3], dtype=torch.int32, device=column.device)
    return far, replace(
        table, kv_num_blocks=counts, kv_indices=column, kv_bounds=bounds[None, None], kv_order=None
    )


def gains(
    shares: Tensor,
    spread: Tensor,
    value_mean: Tensor,
    value_variance: Tensor,
    table: BlockTable,
    all_heads: AllHeads | None = None,
) -> Tensor:
    """The gain of reading a block: the squared error of the output that it removes, per share of the keys.

    With o_i = sum over j of P_ij vbar_j and |o|² the mean of its square over the tokens of all heads:

        gain_ij = (P_ij spread_ij)² (|vbar_j - o_i|² + sum of var(v)_j) / |o|² / (keys of j / all keys)

    At a gain of 0.01, reading a hundredth of the keys lowers the relative squared error by 0.0001. Errors of blocks
    are assumed independent, so their squares add up. Then reading every block above one gain leaves the least error
    for this number of keys.

    Args:
        shares: [B, H, Nq, N], P, the attention of the mean query to the virtual keys of all blocks.
        spread: [B, H, Nq, N], variance of the scores of a pair of blocks around the score of their means.
        value_mean, value_variance: [B, G, N, Dv], G dividing H.
        all_heads: as in `attention_with_far_field`.

    Returns:
        [B, H, Nq, N], not negative; 0 for blocks without keys.
    """
    out = _per_query_block(shares, value_mean)
    apart = (
        out.square().sum(-1, keepdim=True)
        - 2 * _per_query_block(out, value_mean.mT)
        + _of_heads((value_mean.square() + value_variance).sum(-1), out.shape[1])[:, :, None]
    )
    queries, keys = (bounds.diff(dim=-1).to(out.dtype) for bounds in (table.q_bounds, table.kv_bounds))
    power = (queries * out.square().sum(-1)).sum(-1) / queries.sum(-1).clamp(min=1)
    power = (power if all_heads is None else all_heads(power[..., None])[..., 0]).mean(1)
    tiny = torch.finfo(out.dtype).tiny
    part = (keys / keys.sum(-1, keepdim=True).clamp(min=1))[:, :, None]
    error = (shares * spread).square() * apart.clamp(min=0) / power.clamp(min=tiny)[:, None, None, None]
    return (error / part.clamp(min=tiny)).masked_fill(part == 0, 0.0)


def _shares_of_pairs(table: BlockTable, dtype: torch.dtype) -> Tensor:
    """[B|1, H|1, Nq, N]: the share of each pair of blocks in all pairs of queries and keys."""
    queries, keys = (bounds.diff(dim=-1).to(dtype) for bounds in (table.q_bounds, table.kv_bounds))
    queries, keys = (sizes / sizes.sum(-1, keepdim=True).clamp(min=1) for sizes in (queries, keys))
    return queries[..., None] * keys[:, :, None]


def _all_orders(spread: Tensor) -> Tensor:
    """The error of a weight, in place of its second order: 2 (exp(spread / 2) - 1), for Gaussian scores.

    It ranks blocks by gain as the second order does where scores spread little. Where they spread more, the second
    order leaves the errors of wide blocks out, and the sum of its estimates differs more from the true error.
    """
    return 2 * torch.expm1(spread.clamp(max=MOST_SPREAD) / 2)


def _shares(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; 0 where all scores are -inf."""
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _of_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, G, ...] repeated to `heads`; unchanged if G equals `heads`."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _per_query_block(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, Nq, X] @ [B, G, X, Y] -> [B, H, Nq, Y]; H / G heads of `left` share each head of `right`."""
    heads, groups = left.shape[1], right.shape[1]
    if heads == groups:
        return left @ right
    shared = left.unflatten(1, (groups, heads // groups)).flatten(2, 3) @ right
    return shared.unflatten(2, (heads // groups, -1)).flatten(1, 2)


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, clamped if that has a smaller range. bfloat16 has the range of fp32."""
    most = torch.finfo(dtype).max
    if most < 0.99 * torch.finfo(tensor.dtype).max:
        tensor = tensor.clamp(-most, most)
    return tensor.to(dtype)
