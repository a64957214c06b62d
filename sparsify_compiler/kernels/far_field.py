"""The far field: blocks of keys that a query block does not read answer through their statistics.

A table says which key blocks a query block reads; that is the near field. Every other block j answers as one
virtual key, so the far field is the attention op once more, over N keys under the complement of the table, and
the two are merged by their lse. With n_j keys of mean kbar_j, value mean vbar_j, variance var_j per channel and
covariance C_j of keys and values (weighted by exp(key_bias)), and s the scale:

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

Neither form is always better than dropping, nor the first order than the zeroth, so a few rows are computed
exactly, and a head does without what raises their error. Nothing here reads a value back from the device.

What is best read is not what holds most mass: a block of like keys, or like values, is as good as its statistics
however much attention it gets. `min_gain` reads, beside what the table lists, the blocks that `linear` does badly:
the second order, which it leaves out, is about P_ij s² E q²·var_j of how far values of j lie from the output, where
P_ij is the share of block j in the attention of query block i (`gains`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.errors import unknown_choice
from sparsify_compiler.kernels import attention, providers, statistics
from sparsify_compiler.table import BlockTable

FAR_FIELDS = ("drop", "mean", "linear")

MOST_SECOND_ORDER = 0.5
"""Of a score: beyond it the third order is no smaller."""


class Report(NamedTuple):
    """What is known of a call, by head: fp32 tensors [B, H] on the device."""

    density: Tensor
    """Share of the query-key pairs that were read."""
    gate: Tensor
    """1 where the far field is merged, 0 where it is dropped: sampled rows say so."""
    recall: Tensor
    """Mean share of the true attention mass that the near field holds; NaN where no row is sampled."""


def attention_with_far_field(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    *,
    far_field: str,
    min_gain: float | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    provider: str = "auto",
    sampled_rows: int = 16,
) -> tuple[Tensor, Tensor, Report]:
    """Attention in which the blocks that a row of `table` does not list are dropped or approximated.

    Args:
        query, key, value, table, key_bias, scale, provider: as in `attention.block_sparse_attention`.
        far_field: `drop`, `mean` or `linear`.
        min_gain: with `linear`, a row also reads the blocks whose gain (`gains`) is above this.
        sampled_rows: queries of each head that are computed exactly, spread evenly over the positions of the
            table. A head does without the first order of `linear`, or without a far field, where that raises
            their summed squared error. 0: no guard, no recall.

    Returns:
        out, lse: as in `attention.block_sparse_attention`, near and far field merged.
        report: of each head.
    """
    if far_field not in FAR_FIELDS:
        raise unknown_choice("far_field", far_field, FAR_FIELDS)
    if min_gain is not None and (far_field != "linear" or not min_gain >= 0):
        raise ValueError(
            f"min_gain must be at least 0, with far_field='linear', got {min_gain} and {far_field!r}"
        )
    if sampled_rows < 0:
        raise ValueError(f"sampled_rows must be 0 or more, got {sampled_rows}")
    device = query.device.type
    query, key, value = attention.cast(query, key, value)
    attention.check(query, key, value, table, key_bias)
    provider = providers.choose(
        provider, device=device, dtype=query.dtype, head_dim=query.shape[-1], value_dim=value.shape[-1]
    ).name
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    with torch.autocast(device, enabled=False):
        sample = _Sample.of(query, table, min(sampled_rows, query.shape[2]))
        nothing = query.new_full(query.shape[:2], torch.nan, dtype=torch.float32)
        if far_field == "drop":
            report = _report(table, torch.zeros_like(nothing), nothing)
            out, lse = attention.block_sparse_attention(
                query, key, value, table, key_bias=key_bias, scale=scale, provider=provider
            )
            if sample is not None:
                with torch.no_grad():
                    _, exact_lse = exact_rows(
                        query, key, value, sample.rows, key_bias, scale, provider=provider
                    )
                    report = report._replace(recall=_recall(sample.take(lse), exact_lse))
            return out, lse, report
        table, far = virtual_keys(
            query,
            key,
            value,
            table,
            linear=far_field == "linear",
            min_gain=min_gain,
            key_bias=key_bias,
            scale=scale,
            provider=provider,
        )
        gate, recall = torch.ones_like(nothing), nothing
        if sample is not None:
            with torch.no_grad():
                far, gate, recall = _guard(sample, query, key, value, table, far, key_bias, scale, provider)
        report = _report(table, gate, recall)
        out, lse = near_and_far(
            query, key, value, table, far, key_bias=key_bias, scale=scale, provider=provider
        )
    return out, lse, report


def _report(table: BlockTable, gate: Tensor, recall: Tensor) -> Report:
    return Report(table.densities().float().expand_as(gate), gate, recall)


def exact_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    key_bias: Tensor | None,
    scale: float,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Dense attention of a few queries: (out [B, H, R, Dv], lse [B, H, R]).

    Args:
        rows: [B|1, H|1, R] int, the tokens of `query` to compute.
    """
    tokens = torch.arange(2, dtype=torch.int32, device=query.device)
    one = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
    everything = BlockTable(
        q_bounds=(tokens * rows.shape[-1])[None, None],
        kv_bounds=(tokens * key.shape[2])[None, None],
        kv_num_blocks=one,
        kv_indices=torch.zeros_like(one)[..., None],
    )
    return attention.block_sparse_attention(
        _take(query, rows), key, value, everything, key_bias=key_bias, scale=scale, provider=provider
    )


class VirtualKeys(NamedTuple):
    """The blocks of keys, each as one virtual key."""

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
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[BlockTable, VirtualKeys]:
    """The table, with what `min_gain` adds to it, and what answers for the blocks that a row of it does not list.

    `mean` has neither M nor limits. No gradient flows through the second order of the scores.
    """
    log_weight, key_mean, value_mean, key_variance, value_variance, covariance = statistics.block_statistics(
        key, value, table.kv_bounds, table.kv_order, key_bias, covariance=linear, provider=provider
    )
    bias = _of_heads(log_weight, query.shape[1])
    matrices = limits = None
    if linear:
        mean_query, mean_square = statistics.block_means(
            query, table.q_bounds, table.q_order, provider=provider
        )
        sizes = table.q_bounds.diff(dim=-1).unsqueeze(-2).to(mean_square.dtype)
        mean_of_all = sizes @ mean_square / max(query.shape[2], 1)
        second_order = scale**2 / 2 * _per_query_block(mean_of_all, key_variance.mT)[:, :, 0]
        bias = bias + second_order.clamp(max=MOST_SECOND_ORDER)
        scores = scale * _per_query_block(mean_query, key_mean.mT) + bias.detach()[:, :, None]
        if min_gain is not None:
            with torch.no_grad():
                spread = scale**2 * _per_query_block(mean_square, key_variance.mT)
                gain = gains(scores, spread, value_mean, value_variance, table)
                table = listing(table, table.block_mask() | (gain > min_gain))
        shares = _shares(scores.masked_fill(table.block_mask(), -torch.inf))
        # In the dtype of the queries: half of what the far field takes on a GPU would else be this product in fp32.
        narrow = (_narrow(tensor, query.dtype) for tensor in (shares, covariance.flatten(3)))
        matrices = _per_query_block(*narrow).to(shares.dtype).unflatten(3, covariance.shape[3:])
        # Not 0, where a square root has no gradient.
        limits = _per_query_block(shares, value_variance).clamp(min=torch.finfo(shares.dtype).tiny).sqrt()
    key_mean, value_mean = (_narrow(t, query.dtype) for t in (key_mean, value_mean))
    return table, VirtualKeys(key_mean, value_mean, bias.detach(), matrices, limits)


def gains(
    scores: Tensor, spread: Tensor, value_mean: Tensor, value_variance: Tensor, table: BlockTable
) -> Tensor:
    """What reading a block is worth: the estimated error of the output that it saves, for each share of the keys.

    With P the softmax of the scores, o_i = sum over j of P_ij vbar_j, and the whole output's root mean square
    |o| over the tokens of all heads:

        gain_ij = P_ij spread_ij sqrt(|vbar_j - o_i|² + sum of var(v)_j) / |o| / (keys of j / all keys)

    At a gain of 1, a hundredth of the keys lowers the relative error by about a hundredth. Where every block with
    more than a certain gain is read, the error is the least that so much reading can reach, were errors to add up.

    Args:
        scores: [B, H, Nq, N], of the mean query for each virtual key.
        spread: [B, H, Nq, N], variance of the scores of a pair of blocks about it.
        value_mean, value_variance: [B, G, N, Dv], G dividing H.

    Returns:
        [B, H, Nq, N], not negative; 0 for blocks without keys.
    """
    shares = _shares(scores)
    out = _per_query_block(shares, value_mean)
    apart = (
        out.square().sum(-1, keepdim=True)
        - 2 * _per_query_block(out, value_mean.mT)
        + _of_heads((value_mean.square() + value_variance).sum(-1), out.shape[1])[:, :, None]
    )
    queries, keys = (bounds.diff(dim=-1).to(out.dtype) for bounds in (table.q_bounds, table.kv_bounds))
    power = (queries * out.square().sum(-1)).sum(-1) / queries.sum(-1).clamp(min=1)
    size = power.mean(1).clamp(min=torch.finfo(out.dtype).tiny).sqrt()[:, None, None, None]
    part = (keys / keys.sum(-1, keepdim=True).clamp(min=1))[:, :, None]
    gain = shares * spread * apart.clamp(min=0).sqrt() / size / part.clamp(min=torch.finfo(out.dtype).tiny)
    return gain.masked_fill(part == 0, 0.0)


def near_and_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    *,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the keys that `table` lists and of the virtual keys of the others, merged.

    One op where nobody asks for gradients; else near field, far field and `merge_far_field`, which have them.
    """
    tensors = (query, key, value, *far)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):

        def attend(query: Tensor, key: Tensor, value: Tensor, table: BlockTable, *rest: Any) -> Any:
            return torch.ops.sparsify.block_sparse_attention(
                query, key, value, *table.tensors().values(), *rest, provider
            )

        def merge(*arguments: Any) -> Any:
            return torch.ops.sparsify.merge_far_field(*arguments, provider)

        return in_parts(attend, merge, query, key, value, table, far, key_bias, scale)
    return torch.ops.sparsify.near_and_far(
        query, key, value, *table.tensors().values(), key_bias, *far, scale, provider
    )


def in_parts(
    attend: Callable[..., tuple[Tensor, Tensor]],
    merge: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`near_and_far` as it is defined: near field, far field, merge, by a provider's functions for these."""
    near = attend(query, key, value, table, key_bias, scale)
    others = attend(query, far.key, far.value, complement(table), far.bias, scale)
    return merge(query, *near, *others, far.matrices, far.limits, table.q_bounds, table.q_order, scale)


@torch.library.custom_op("sparsify::near_and_far", mutates_args=())
def _near_and_far_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_bounds: Tensor,
    kv_bounds: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_order: Tensor | None,
    kv_order: Tensor | None,
    key_bias: Tensor | None,
    far_key: Tensor,
    far_value: Tensor,
    far_bias: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    table = BlockTable(
        q_bounds=q_bounds,
        kv_bounds=kv_bounds,
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        q_order=q_order,
        kv_order=kv_order,
    )
    far = VirtualKeys(far_key, far_value, far_bias, matrices, limits)
    return providers.load(provider, "far_field").near_and_far(query, key, value, table, far, key_bias, scale)


@_near_and_far_op.register_fake
def _near_and_far_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return attention.empty_outputs(query, value)


def complement(table: BlockTable) -> BlockTable:
    """The table over virtual keys, one for each key block, in which a row lists what it does not in `table`."""
    skipped = ~table.block_mask()
    columns = torch.arange(skipped.shape[-1] + 1, dtype=torch.int32, device=skipped.device)
    return replace(listing(table, skipped), kv_bounds=columns[None, None], kv_order=None)


def listing(table: BlockTable, kept: Tensor) -> BlockTable:
    """The table of the same blocks whose rows list what `kept`, bool [B, H, Nq, N], says, in rising order."""
    blocks = kept.shape[-1]
    columns = torch.arange(blocks, dtype=torch.int32, device=kept.device)
    # Each kept block moves to the place that counting gives it, the others to one that is cut off.
    place = torch.where(kept, kept.cumsum(-1) - 1, blocks)
    indices = torch.zeros(*kept.shape[:-1], blocks + 1, dtype=torch.int32, device=kept.device)
    indices = indices.scatter(-1, place, columns.expand_as(place))
    return replace(
        table, kv_num_blocks=kept.sum(-1, dtype=torch.int32), kv_indices=indices[..., : max(blocks, 1)]
    )


def merge_far_field(
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    *,
    scale: float,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(e^near_lse near_out + e^far_lse far) / (e^near_lse + e^far_lse), and the log of that sum, where
    far = far_out + scale query M, the latter kept within +-limits.

    A row whose far_lse is -inf is the near row bit for bit, whatever far_out and M hold.

    Args:
        query: [B, H, Sq, D]; read where there are matrices.
        near_out, far_out: [B, H, Sq, Dv] in the dtype of `query`.
        near_lse, far_lse: [B, H, Sq] fp32 (fp64 for fp64 input).
        matrices: [B, H, Nq, D, Dv] in the dtype of lse, M of each query block, or None.
        limits: [B, H, Nq, Dv] in the dtype of lse, not negative; None where there are no matrices.
        q_bounds, q_order: the query blocks, as in `BlockTable`.

    Returns:
        out: as `near_out`, laid out in memory as [B, Sq, H, Dv].
        lse: [B, H, Sq].
    """
    name = providers.choose(
        provider,
        device=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=near_out.shape[-1],
    ).name
    return torch.ops.sparsify.merge_far_field(
        query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order, scale, name
    )


@torch.library.custom_op("sparsify::merge_far_field", mutates_args=())
def _merge_op(
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    _check_merge(query, near_out, near_lse, far_out, far_lse, matrices, limits)
    return providers.load(provider, "far_field").merge(
        query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order, scale
    )


@_merge_op.register_fake
def _merge_fake(
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    _check_merge(query, near_out, near_lse, far_out, far_lse, matrices, limits)
    return attention.empty_outputs(query, near_out)


@torch.library.custom_op("sparsify::merge_far_field_backward", mutates_args=())
def _merge_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return providers.load("reference", "far_field").merge_backward(
        grad_out,
        grad_lse,
        *(out, lse, query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order, scale),
    )


@_merge_backward_op.register_fake
def _merge_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (query, near_out, near_lse, far_out, far_lse)
    query, near_out, near_lse, far_out, far_lse = (t.new_empty(t.shape) for t in inputs)
    matrices, limits = (lse.new_empty((0,) if t is None else t.shape) for t in (matrices, limits))
    return query, near_out, near_lse, far_out, far_lse, matrices, limits


def _merge_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _provider = inputs
    ctx.save_for_backward(*output, *tensors)


def _merge_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *grads, grad_matrices, grad_limits = torch.ops.sparsify.merge_far_field_backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.scale
    )
    if ctx.saved_tensors[7] is None:
        grad_matrices = grad_limits = None
    return (*grads, grad_matrices, grad_limits, *[None] * 4)


_merge_op.register_autograd(_merge_backward, setup_context=_merge_setup)


def _check_merge(
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
) -> None:
    """A kernel reads memory by the query's type: raise ValueError where a shape or type does not fit."""
    wide = statistics.wide(query.dtype)
    lead, head_dim, value_dim = tuple(query.shape[:3]), query.shape[3], near_out.shape[-1]
    expected = [
        ("near_out", near_out, (*lead, value_dim), query.dtype),
        ("near_lse", near_lse, lead, wide),
        ("far_out", far_out, (*lead, value_dim), query.dtype),
        ("far_lse", far_lse, lead, wide),
    ]
    if (matrices is None) != (limits is None):
        raise ValueError("matrices and limits come together, got one without the other")
    if matrices is not None and limits is not None:
        lead = (*query.shape[:2], matrices.shape[2])
        expected.append(("matrices", matrices, (*lead, head_dim, value_dim), wide))
        expected.append(("limits", limits, (*lead, value_dim), wide))
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {dtype} {shape} on {query.device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )


def _guard(
    sample: "_Sample",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[VirtualKeys, Tensor, Tensor]:
    """`far` without what raises the error of a head's sampled rows; gate and recall, as in `Report`."""
    rows, table = sample.take(query), sample.rows_of(table)
    exact, exact_lse = exact_rows(query, key, value, sample.rows, key_bias, scale, provider=provider)
    near, near_lse = attention.block_sparse_attention(
        rows, key, value, table, key_bias=key_bias, scale=scale, provider=provider
    )
    far_rows = attention.block_sparse_attention(
        rows, far.key, far.value, complement(table), key_bias=far.bias, scale=scale, provider=provider
    )

    def error(matrices: Tensor | None, limits: Tensor | None) -> Tensor:
        merged, _ = merge_far_field(
            *(rows, near, near_lse, *far_rows, matrices, limits, table.q_bounds, None),
            scale=scale,
            provider=provider,
        )
        return _error(merged, exact)

    least = error(None, None)
    if far.limits is not None:
        whole = error(far.matrices, far.limits)
        helps = whole <= least
        least = torch.where(helps, whole, least)
        far = far._replace(limits=far.limits * helps[..., None, None])
    # An error that is no number is no improvement.
    gate = least <= _error(near, exact)
    far = far._replace(bias=far.bias.masked_fill(~gate[..., None], -torch.inf))
    return far, gate.float(), _recall(near_lse, exact_lse)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A few queries of each head, in rising position, and where the query blocks begin among them."""

    rows: Tensor
    """[B|1, H|1, R] int64, tokens."""
    q_bounds: Tensor
    """[B|1, H|1, Nq+1] int32."""

    @classmethod
    def of(cls, query: Tensor, table: BlockTable, count: int) -> "_Sample | None":
        """Positions in the middle of `count` equal parts of the sequence."""
        if count == 0:
            return None
        tokens = query.shape[2]
        positions = (torch.arange(count, device=query.device) * 2 + 1) * tokens // (2 * count)
        rows = positions[None, None] if table.q_order is None else table.q_order[:, :, positions].long()
        before = positions[:, None] < table.q_bounds[:, :, None, :]
        return cls(rows, before.sum(2, dtype=torch.int32))

    def take(self, tensor: Tensor) -> Tensor:
        """These rows of [B, H, Sq] or [B, H, Sq, D]."""
        return _take(tensor, self.rows)

    def rows_of(self, table: BlockTable) -> BlockTable:
        """The table of these rows alone."""
        return replace(table, q_bounds=self.q_bounds, q_order=None)


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    rows = rows.long().expand(*tensor.shape[:2], -1)
    if tensor.dim() == 3:
        return tensor.gather(2, rows)
    return tensor.gather(2, rows[..., None].expand(-1, -1, -1, tensor.shape[-1]))


def _recall(near_lse: Tensor, exact_lse: Tensor) -> Tensor:
    """[B, H]; a row that sees no key at all misses none."""
    kept = (near_lse - exact_lse.masked_fill(exact_lse == -torch.inf, 0.0)).exp()
    return kept.masked_fill(exact_lse == -torch.inf, 1.0).mean(-1).float()


def _error(rows: Tensor, exact: Tensor) -> Tensor:
    """[B, H] summed squared error."""
    return (
        (rows.to(statistics.wide(rows.dtype)) - exact.to(statistics.wide(rows.dtype))).square().sum((-1, -2))
    )


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
    """In another dtype, within its range."""
    most = torch.finfo(dtype).max
    return tensor.clamp(-most, most).to(dtype)
