"""Virtual keys: each block of keys as one key, by its statistics; and which blocks are better read.

A block j that a query block does not read answers as one virtual key. With n_j keys of mean kbar_j, value mean
vbar_j, variance var_j per channel, covariance C_j of keys and values (weighted by exp(key_bias)), and s the scale:

    mean    score s q.kbar_j + log n_j, value vbar_j. The zeroth order, as in SVG-EAR (arXiv 2603.08982).
    linear  score s q.kbar_j + log n_j + v_j, value vbar_j + s C_jᵀ q. Were the keys of a block Gaussian, with a
            diagonal covariance, the value would be exact, and the score with v_j = s²/2 q².var_j. The sum of C_j
            under the far softmax is taken once for each query block, at its mean query: M_i. PISA (arXiv
            2602.01077) has the first order as one matrix for the whole sequence, over flat blocks.

An expansion is good where its terms are small, and where attention is sharp they grow without end: the far field
then errs ten times as much as dropping, in rows too few for a sample to see. So both terms of `linear` are
bounded: s q M_i moves no channel further than the standard deviation of the values it stands for, and v_j is at
most 1/2. With q² averaged over the queries of a head, v_j is a bias; each query's own q² errs as much, and would
double the head dim.

What is best read is not what holds most mass: a block of like keys, or like values, is as good as its statistics
however much attention it gets. `min_gain` reads, beside what the table lists, the blocks that `linear` does badly:
the second order, which it leaves out, is about P_ij s² E q²·var_j of how far values of j lie from the output, where
P_ij is the share of block j in the attention of query block i (`gains`).

A table of single keys has no blocks to stand for what it skips, so it comes with coarser ones (`FarBlocks`). Row i
may then read some keys of block j and leave m_ij of n_j unread. These answer as the block does, but with the weight
of m_ij keys: score + log m_ij - log n_j. To take out of the means what is read would need sums over the keys of
every row.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import statistics
from sparsify_compiler.table import BlockTable

MOST_SECOND_ORDER = 0.5
"""Of a score: beyond it the third order is no smaller."""


class FarBlocks(NamedTuple):
    """Blocks of keys that answer for those of their keys which a row does not read; shared by batch and heads."""

    order: Tensor
    """[1, 1, S] int32, as `BlockTable.kv_order`."""
    bounds: Tensor
    """[1, 1, N+1] int32, as `BlockTable.kv_bounds`."""
    keys: Tensor
    """[B|1, H|1, N] int32, how many keys of each can be seen."""
    left: Tensor
    """[B, H, Nq, N] int32, how many of these each query block does not read."""

    def check(self, query: Tensor, key: Tensor, table: BlockTable) -> None:
        """Raise OperandError unless these blocks are of such keys and a table of such rows. Looks at no value."""
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
    """The blocks of keys, each as one virtual key, or with `FarBlocks` as one for each number of keys left."""

    key: Tensor
    """[B, G, N, D] in the dtype of the queries, G dividing their heads."""
    value: Tensor
    """[B, G, N, Dv]."""
    bias: Tensor
    """[B, H, N] fp32 (fp64 for fp64 input), added to the scaled scores; -inf for what does not answer."""
    matrices: Tensor | None
    """M of `linear`, [B, H, Nq, D, Dv] in the dtype of `bias`."""
    limits: Tensor | None
    """Of s q M, [B, H, Nq, Dv]."""


def virtual_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    *,
    linear: bool,
    min_gain: float | None = None,
    blocks: FarBlocks | None = None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[BlockTable, VirtualKeys, BlockTable | None, Tensor | None]:
    """What answers for the keys that a row of a table does not list: the table's own blocks, or `blocks`.

    Returns:
        table: with what `min_gain` adds to it.
        far: the virtual keys.
        others: which of these each row reads; None, where they are the table's blocks: those it does not list.
        kept: with `min_gain` the attention mass that queries are estimated to read, [B, H].

    `mean` has neither M nor limits. No gradient flows through the second order of the scores.
    """
    bounds, order = (table.kv_bounds, table.kv_order) if blocks is None else (blocks.bounds, blocks.order)
    log_weight, key_mean, value_mean, key_variance, value_variance, covariance = statistics.block_statistics(
        key, value, bounds, order, key_bias, covariance=linear, provider=provider
    )
    bias = _of_heads(log_weight, query.shape[1])
    matrices = limits = kept = None
    if linear:
        mean_query, mean_square = statistics.block_means(
            query, table.q_bounds, table.q_order, provider=provider
        )
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
        if min_gain is not None:
            with torch.no_grad():
                spread = scale**2 * _per_query_block(mean_square, key_variance.mT)
                attention = _shares(scores)
                listed = listed | (gains(attention, spread, value_mean, value_variance, table) > min_gain)
                table = table.listing(listed)
                kept = (sizes @ (attention * listed).sum(-1, keepdim=True))[:, :, 0, 0] / max(
                    query.shape[2], 1
                )
        shares = _shares(scores if blocks is not None else scores.masked_fill(listed, -torch.inf))
        # In the dtype of the queries: half of what the far field takes on a GPU would else be this product in fp32.
        narrow = (_narrow(tensor, query.dtype) for tensor in (shares, covariance.flatten(3)))
        matrices = _per_query_block(*narrow).to(shares.dtype).unflatten(3, covariance.shape[3:])
        # Not 0, where a square root has no gradient.
        limits = _per_query_block(shares, value_variance).clamp(min=torch.finfo(shares.dtype).tiny).sqrt()
    key_mean, value_mean = (_narrow(t, query.dtype) for t in (key_mean, value_mean))
    far = VirtualKeys(key_mean, value_mean, bias.detach(), matrices, limits)
    if blocks is None:
        return table, far, None, kept
    return table, *_for_each_number(far, table, blocks), kept


def _for_each_number(
    far: VirtualKeys, table: BlockTable, blocks: FarBlocks
) -> tuple[VirtualKeys, BlockTable]:
    """A virtual key for every number of keys, from 1 on, that a block may stand for, as many as there are keys; and
    which of them each query block of `table` reads."""
    first, sizes = blocks.bounds[..., :-1], blocks.bounds.diff(dim=-1)
    tokens = torch.arange(blocks.order.shape[-1] + 1, dtype=torch.int32, device=first.device)
    block = torch.repeat_interleave(sizes[0, 0], output_size=len(tokens) - 1)
    number = tokens[1:] - first[0, 0][block]
    of_one = far.bias - blocks.keys.clamp(min=1).to(far.bias.dtype).log()
    listed = table.listing(blocks.left > 0)
    # A number beyond a block's keys, which no method gives, is taken for all of them.
    column = (first[:, :, None] + torch.minimum(blocks.left, sizes[:, :, None]) - 1).clamp(min=0)
    far = far._replace(
        key=far.key[:, :, block],
        value=far.value[:, :, block],
        bias=of_one[..., block] + number.to(far.bias.dtype).log(),
    )
    indices = column.gather(-1, listed.kv_indices.long())
    return far, replace(listed, kv_indices=indices, kv_bounds=tokens[None, None], kv_order=None)


def gains(
    shares: Tensor, spread: Tensor, value_mean: Tensor, value_variance: Tensor, table: BlockTable
) -> Tensor:
    """What reading a block is worth: the squared error of the output that it saves, for each share of the keys.

    With o_i = sum over j of P_ij vbar_j and |o|² the mean of its square over the tokens of all heads:

        gain_ij = (P_ij spread_ij)² (|vbar_j - o_i|² + sum of var(v)_j) / |o|² / (keys of j / all keys)

    At a gain of 0.01, a hundredth of the keys lowers the relative squared error by 0.0001. Errors of blocks are
    taken to be independent, so that their squares add up; then reading every block of more than a certain gain
    leaves the least error that so much reading can.

    Args:
        shares: [B, H, Nq, N], P, the attention of the mean query to the virtual keys of all blocks.
        spread: [B, H, Nq, N], variance of the scores of a pair of blocks about that of their means.
        value_mean, value_variance: [B, G, N, Dv], G dividing H.

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
    power = ((queries * out.square().sum(-1)).sum(-1) / queries.sum(-1).clamp(min=1)).mean(1)
    tiny = torch.finfo(out.dtype).tiny
    part = (keys / keys.sum(-1, keepdim=True).clamp(min=1))[:, :, None]
    error = (shares * spread).square() * apart.clamp(min=0) / power.clamp(min=tiny)[:, None, None, None]
    return (error / part.clamp(min=tiny)).masked_fill(part == 0, 0.0)


def _shares(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; 0 where nothing is to be seen."""
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def _of_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, G, ...] for each of `heads`, as a view where they are as many."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _per_query_block(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, Nq, X] @ [B, G, X, Y] -> [B, H, Nq, Y], each head of the right shared by H / G of the left."""
    heads, groups = left.shape[1], right.shape[1]
    if heads == groups:
        return left @ right
    shared = left.unflatten(1, (groups, heads // groups)).flatten(2, 3) @ right
    return shared.unflatten(2, (heads // groups, -1)).flatten(1, 2)


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, within its range, where that is less: bfloat16 has that of fp32."""
    most = torch.finfo(dtype).max
    if most < 0.99 * torch.finfo(tensor.dtype).max:
        tensor = tensor.clamp(-most, most)
    return tensor.to(dtype)
