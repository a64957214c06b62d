"""Attention with a far field: blocks that a query block does not read are dropped, or approximated by statistics.

The key blocks that a table lists for a query block are its near field. The other blocks are its far field: one
virtual key for each (`virtual_keys.py`), merged with the near field (`near_and_far.py`).

No form of the far field is always better than dropping, and the first order is not always better than the zeroth.
So a few rows are computed exactly, and a head does not use the terms that raise their error. Nothing here reads a
value back from the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError, unknown_choice
from sparsify_compiler.kernels import attention, providers, statistics
from sparsify_compiler.kernels.far_field import in_one_call, near_and_far, virtual_keys
from sparsify_compiler.kernels.far_field.error_target import AllHeads, ErrorTarget, Reading
from sparsify_compiler.kernels.far_field.near_and_far import complement, merge_far_field
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks, Judged, VirtualKeys
from sparsify_compiler.table import BlockTable

FAR_FIELDS = ("drop", "mean", "linear")

PART_OF_KEYS = 1024
"""Least number of keys in a part, where exact rows read the keys in parts."""
ROWS_AT_ONCE = 1024
"""Largest product of exact rows and parts, where there are several parts."""


class Provider(Protocol):
    """The functions of a provider of the far field. They get the tensors of the ops, checked."""

    def near_and_far(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: BlockTable,
        far: VirtualKeys,
        key_bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), in the layout of `attention.empty_outputs`."""

    def merge(
        self,
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
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of `merge_far_field`, in the layout of `attention.empty_outputs`."""


class TargetReport(NamedTuple):
    """The errors of a call with a target, each the relative error of the output of all heads; [B] fp32."""

    estimated: Tensor
    """The error by the estimate that chose the blocks."""
    measured: Tensor
    """The same error on sampled rows."""
    state: Tensor
    """The state of the next call."""


class Report(NamedTuple):
    """Measurements of a call for each head: fp32 tensors [B, H] on the device."""

    density: Tensor
    """Share of the query-key pairs that were read."""
    gate: Tensor
    """1 where the far field is merged, 0 where it is dropped, as sampled rows decide."""
    recall: Tensor
    """Mean share of the true attention mass in the near field, over sampled rows; NaN if no row is sampled."""
    kept: Tensor
    """The same share, estimated from the means of blocks for all queries; NaN without `min_gain` or `target`."""
    target: TargetReport | None = None
    """The errors of a call with a target."""


class Known(NamedTuple):
    """Results of `before_parts`: for all heads of a site whose heads are computed part by part."""

    statistics: tuple[Tensor, ...]
    """`statistics.Statistics` of the blocks that approximate the keys."""
    exact_out: Tensor
    """The rows that judge the far field, under parts of the keys: [B, H, P * R, Dv]."""
    exact_lse: Tensor
    """[B, H, P * R]."""

    def of_heads(self, heads: slice, of_keys: slice) -> "Known":
        """Those of some query heads and of their key heads."""
        every = self.exact_lse.shape[1]
        found = (
            one[:, heads if one.shape[1] == every else of_keys] for one in self.statistics if one.dim() > 1
        )
        empty = (one for one in self.statistics if one.dim() == 1)
        return Known((*found, *empty), self.exact_out[:, heads], self.exact_lse[:, heads])


def before_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_order: Tensor | None,
    bounds: Tensor,
    order: Tensor | None,
    *,
    key_bias: Tensor | None,
    scale: float | None,
    provider: str,
    count: int,
) -> Known:
    """Launch for all heads what depends on no list of keys, for `attention_with_far_field` with `mean`.

    Args:
        query, key, value, q_order, key_bias, scale: as `attention_with_far_field` gets them and its table.
        bounds, order: those of its `FarBlocks`.
        provider: one for which `providers.fuses` holds.
        count: its `sampled_rows`.
    """
    found = statistics.block_statistics(
        key, value, bounds, order, key_bias, covariance=False, provider=provider
    )
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    out, lse = torch.ops.sparsify.sampled(query, key, value, q_order, key_bias, count, scale)
    return Known(found, out, lse)


def attention_with_far_field(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    *,
    far_field: str,
    min_gain: float | None = None,
    best: int = 0,
    target: ErrorTarget | None = None,
    far_blocks: FarBlocks | None = None,
    density: Tensor | None = None,
    known: Known | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    provider: str = "auto",
    sampled_rows: int = 16,
    all_heads: AllHeads | None = None,
    computed: Sequence[tuple[slice, slice]] | None = None,
    look: Callable[[BlockTable], None] | None = None,
) -> tuple[Tensor, Tensor, Report]:
    """Attention in which the blocks that a row of `table` does not list are dropped or approximated.

    Args:
        query, key, value, table, key_bias, scale, provider: as in `attention.block_sparse_attention`.
        far_field: `drop`, `mean` or `linear`.
        min_gain: with `linear`, a row also reads the blocks whose gain (`gains`) is above this.
        best: with `min_gain`, a row also reads this number of the other blocks, those with the largest gains.
        target: with `linear`, in place of `min_gain`: a row also reads blocks until the error is below a target.
            It needs sampled rows, whose places then differ from call to call.
        far_blocks: for a table of single keys, the blocks that approximate the keys that a row does not list. If
            None, the blocks of the table approximate them.
        density: `table.densities()` in fp32 [B, H], where it is known.
        known: `before_parts` for these heads, where it ran.
        sampled_rows: number of queries of each head that are computed exactly, spread evenly over the positions of
            the table. A head does not use the first order of `linear`, or the far field at all, if it raises their
            summed squared error. 0: the far field is always used, and the recall is unknown.
        all_heads: where `query` has some heads of a site, makes numbers of all its heads, [B, H, n], of theirs.
        computed: (heads, queries) to compute, where `key` has as many heads as `query`; None: all. Other rows are
            0, with lse -inf. Decisions and reports do not depend on it.
        look: gets the table of the blocks that are read, with those that `min_gain`, `best` and `target` add.

    Returns:
        out, lse: as in `attention.block_sparse_attention`, with near and far field merged.
        report: measurements for each head.
    """
    if far_field not in FAR_FIELDS:
        raise unknown_choice("far_field", far_field, FAR_FIELDS)
    if min_gain is not None and (far_field != "linear" or not min_gain >= 0):
        raise OperandError(
            f"min_gain must be at least 0, with far_field='linear', got {min_gain} and {far_field!r}"
        )
    if target is not None and (far_field != "linear" or min_gain is not None or sampled_rows < 1):
        raise OperandError(
            "a target needs far_field='linear' and sampled rows, without min_gain, got "
            f"{far_field!r}, {sampled_rows} rows and min_gain={min_gain}"
        )
    if far_blocks is not None and (far_field == "drop" or min_gain is not None or target is not None):
        raise OperandError(
            "far_blocks are for a far field, without min_gain or a target, got "
            f"{far_field!r} and min_gain={min_gain}"
        )
    if sampled_rows < 0:
        raise OperandError(f"sampled_rows must be 0 or more, got {sampled_rows}")
    device = query.device.type
    query, key, value = attention.cast(query, key, value)
    attention.check(query, key, value, table, key_bias)
    if far_blocks is not None:
        far_blocks.check(query, key, table)
    provider = providers.choose(
        provider, device=device, dtype=query.dtype, head_dim=query.shape[-1], value_dim=value.shape[-1]
    ).name
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    alone = all_heads is None and computed is None and target is None
    if far_field != "drop" and alone and in_one_call.supports(query, key, value, provider):
        out, lse, numbers = in_one_call.attention_with_far_field(
            *(query, key, value, table),
            linear=far_field == "linear",
            min_gain=min_gain,
            best=best,
            far_blocks=far_blocks,
            key_bias=key_bias,
            scale=scale,
            sampled_rows=sampled_rows,
        )
        if look is not None:  # the call keeps to itself which blocks it adds
            with torch.no_grad():
                found = virtual_keys.virtual_keys(
                    *(query, key, value, table),
                    linear=far_field == "linear",
                    min_gain=min_gain,
                    best=best,
                    blocks=far_blocks,
                    key_bias=key_bias,
                    scale=scale,
                    provider=provider,
                )
            look(found[0])
        density, gate, recall, kept = numbers.unbind(-1)
        return out, lse, Report(density, gate, recall, kept)
    return in_parts(
        *(query, key, value, table),
        density=density,
        known=known,
        far_field=far_field,
        min_gain=min_gain,
        best=best,
        target=target,
        far_blocks=far_blocks,
        key_bias=key_bias,
        scale=scale,
        provider=provider,
        sampled_rows=sampled_rows,
        all_heads=all_heads,
        computed=computed,
        look=look,
    )


def in_parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    *,
    far_field: str,
    min_gain: float | None,
    best: int,
    target: ErrorTarget | None = None,
    far_blocks: FarBlocks | None,
    density: Tensor | None = None,
    known: Known | None = None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
    sampled_rows: int,
    all_heads: AllHeads | None = None,
    computed: Sequence[tuple[slice, slice]] | None = None,
    look: Callable[[BlockTable], None] | None = None,
) -> tuple[Tensor, Tensor, Report]:
    """`attention_with_far_field`, by an op for each part, of arguments that fit together."""
    with providers.without_autocast(query.device.type):
        count = min(sampled_rows, query.shape[2])
        nothing = query.new_full(query.shape[:2], torch.nan, dtype=torch.float32)
        if far_field == "drop":
            sample = _Sample.of(query, table, count)
            if look is not None:
                look(table)
            report = _report(table, torch.zeros_like(nothing), nothing, nothing, provider, density)

            def near(query: Tensor, heads: slice, table: BlockTable) -> tuple[Tensor, Tensor]:
                bias = _of_some(key_bias, heads)
                return attention.block_sparse_attention(
                    *(query, key[:, heads], value[:, heads], table),
                    key_bias=bias,
                    scale=scale,
                    provider=provider,
                )

            out, lse = _computed(near, query, value, table, computed=computed)
            if sample is not None:
                with torch.no_grad():
                    _, exact_lse = exact_rows(
                        query, key, value, sample.rows, key_bias, scale, provider=provider
                    )
                    read = sample.take(lse)
                    if computed is not None:  # sampled rows may be others
                        _, read = near(sample.take(query), slice(None), sample.rows_of(table))
                    report = report._replace(recall=_recall(read, exact_lse))
            return out, lse, report
        table, far, others, kept, reading, found = virtual_keys.virtual_keys(
            query,
            key,
            value,
            table,
            linear=far_field == "linear",
            min_gain=min_gain,
            best=best,
            target=target,
            all_heads=all_heads,
            blocks=far_blocks,
            known=None if known is None else known.statistics,
            key_bias=key_bias,
            scale=scale,
            provider=provider,
        )
        density = density if found is None else found
        if look is not None:
            look(table)
        gate, recall, errors, outputs = None, nothing, None, None
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        given = query, key, value, table, far, others, key_bias, scale, provider, count
        if count and target is None and computed is None and not learns and providers.fuses(provider):
            *outputs, gate, recall = _judged(*given, known)
        elif count:
            with torch.no_grad():
                far, gate, recall, errors = _judge(*given, None if target is None else target.offsets(count))
        gate = torch.ones_like(nothing) if gate is None else gate
        estimated = nothing if kept is None else kept.float()
        report = _report(table, gate, recall, estimated, provider, density)
        if target is not None and reading is not None and errors is not None:
            with torch.no_grad():
                report = report._replace(target=_target_report(target, reading, *errors, all_heads))

        if outputs is not None:
            return outputs[0], outputs[1], report

        def near_and_others(query: Tensor, heads: slice, *tables: BlockTable) -> tuple[Tensor, Tensor]:
            return near_and_far.near_and_far(
                *(query, key[:, heads], value[:, heads], tables[0]),
                VirtualKeys(*(_of_some(one, heads) for one in far)),
                others=tables[1] if len(tables) > 1 else None,
                key_bias=_of_some(key_bias, heads),
                scale=scale,
                provider=provider,
            )

        tables = (table,) if others is None else (table, others)
        out, lse = _computed(near_and_others, query, value, *tables, computed=computed)
    return out, lse, report


def _of_some(tensor: Any, heads: slice) -> Any:
    """Some heads of [B, H|1, ...], or None."""
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]


def _computed(
    attend: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    value: Tensor,
    *tables: BlockTable,
    computed: Sequence[tuple[slice, slice]] | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of some rows of some heads, by a function of queries, their heads and the tables of these rows."""
    if computed is None:
        return attend(query, slice(None), *tables)
    out, lse = attention.empty_outputs(query, value)
    out, lse = out.zero_(), lse.fill_(-torch.inf)
    for heads, queries in computed:
        places = torch.arange(queries.start, queries.stop, device=query.device)
        if len(places):
            of_rows = (table.of_heads(heads).of_queries(places) for table in tables)
            out[:, heads, queries], lse[:, heads, queries] = attend(query[:, heads, queries], heads, *of_rows)
    return out, lse


def _report(
    table: BlockTable, gate: Tensor, recall: Tensor, kept: Tensor, provider: str, density: Tensor | None
) -> Report:
    if density is not None:
        return Report(density, gate, recall, kept)
    rows = table.q_bounds, table.kv_bounds, table.kv_num_blocks, table.kv_indices
    pairs = statistics.pairs_read(*rows, provider=provider)
    return Report(table.densities(pairs).float().expand_as(gate), gate, recall, kept)


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

    The rows read the keys part by part, and the results of the parts are merged by their lse.

    Args:
        rows: [B|1, H|1, R] int, the tokens of `query` to compute.
    """
    count, tokens = rows.shape[-1], key.shape[2]
    parts = _parts(count, tokens, query.device.type)
    bounds = torch.arange(parts + 1, dtype=torch.int32, device=query.device)
    numbers = bounds[None, None, :-1]
    table = BlockTable(
        q_bounds=(bounds * count)[None, None],
        kv_bounds=(bounds * tokens // parts)[None, None],
        kv_num_blocks=torch.ones_like(numbers),
        kv_indices=numbers[..., None],
    )
    once_for_each = _take(query, rows)[:, :, None].expand(-1, -1, parts, -1, -1).flatten(2, 3)
    out, lse = attention.block_sparse_attention(
        once_for_each, key, value, table, key_bias=key_bias, scale=scale, provider=provider
    )
    if parts == 1:
        return out, lse
    return merge_parts(out.unflatten(2, (parts, count)), lse.unflatten(2, (parts, count)))


def _parts(rows: int, keys: int, device: str) -> int:
    """The number of parts into which a head's keys are cut for a few rows. On a CPU one head keeps a core busy,
    but a GPU has more multiprocessors than a model has heads."""
    return 1 if device == "cpu" else max(1, min(keys // PART_OF_KEYS, ROWS_AT_ONCE // max(rows, 1)))


def merge_parts(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention to all keys, from those of parts of them: [B, H, P, R, Dv] and [B, H, P, R]."""
    top = lse.detach().amax(2, keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)  # an infinity is not subtracted from itself
    weights = (lse - top).exp()
    total = weights.sum(2)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    merged = (weights[..., None] * out).sum(2) / total[..., None]
    return merged.to(out.dtype), (top.squeeze(2) + total.log()).masked_fill(blind, -torch.inf)


def _judge(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    others: BlockTable | None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
    count: int,
    offsets: Tensor | None,
) -> tuple[VirtualKeys, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(`far` without the terms that raise the error of `count` rows of a head, gate and recall as in `Report`, the
    squared error and the squared output of these rows [B, H]). `offsets`: as in `_Sample.of`."""
    sample = _Sample.of(query, table, count, offsets)
    assert sample is not None
    rows, table = sample.take(query), sample.rows_of(table)
    exact, exact_lse = exact_rows(query, key, value, sample.rows, key_bias, scale, provider=provider)
    near, near_lse = attention.block_sparse_attention(
        rows, key, value, table, key_bias=key_bias, scale=scale, provider=provider
    )
    others = complement(table) if others is None else sample.rows_of(others)
    far_rows = attention.block_sparse_attention(
        rows, far.key, far.value, others, key_bias=far.bias, scale=scale, provider=provider
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
    # A NaN error is no improvement.
    dropped = _error(near, exact)
    gate = least <= dropped
    far = far._replace(bias=far.bias.masked_fill(~gate[..., None], -torch.inf))
    errors = torch.where(gate, least, dropped), _error(torch.zeros_like(exact), exact)
    return far, gate.float(), _recall(near_lse, exact_lse), errors


def _target_report(
    target: ErrorTarget, reading: Reading, error: Tensor, output: Tensor, all_heads: AllHeads | None
) -> TargetReport:
    """The errors of a call, by its estimate and by the squared error and squared output of sampled rows, [B, H]."""

    def of_all(numbers: Tensor) -> Tensor:
        return numbers if all_heads is None else all_heads(numbers[..., None])[..., 0]

    whole = of_all(output).sum(1, keepdim=True)
    measured = torch.where(error == 0, 0.0, error / whole).float()
    remains = reading.remains.float()
    estimated = reading.estimated.float().nan_to_num()
    of_site = of_all(measured).sum(1)
    state = target.measured(remains, measured, of_site)
    return TargetReport(of_all(estimated).sum(1).sqrt(), of_site.sqrt(), state)


def _judged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    others: BlockTable | None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
    count: int,
    known: Known | None,
) -> list[Tensor]:
    """`_judge` and then `near_and_far`, as one op without gradients: out, lse, gate and recall."""
    others = complement(table) if others is None else others
    exact = [] if known is None else [known.exact_out, known.exact_lse]
    return torch.ops.sparsify.judged(
        *(query, key, value, *table.tensors().values(), *far, others.kv_bounds, others.kv_num_blocks),
        *(others.kv_indices, key_bias, exact, count, scale, provider),
    )


@custom_op("sparsify::sampled")
def _sampled_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_order: Tensor | None,
    key_bias: Tensor | None,
    count: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Near field of the rows that judge the far field, under parts of the keys, see `Known`."""
    from sparsify_compiler.kernels.far_field import triton

    ends = torch.arange(2, dtype=torch.int32, device=query.device)[None, None] * query.shape[2]
    parts = _parts(count, key.shape[2], query.device.type)
    _, _, exact = triton.exact_samples(query, key, value, ends, q_order, key_bias, count, parts, scale)
    return exact


@_sampled_op.register_fake
def _sampled_fake(
    query: Tensor, key: Tensor, value: Tensor, q_order: Any, key_bias: Any, count: int, _: float
) -> tuple[Tensor, Tensor]:
    copies = count * _parts(count, key.shape[2], query.device.type)
    return attention.empty_outputs(query.new_empty(*query.shape[:2], copies, query.shape[3]), value)


@custom_op("sparsify::judged")
def _judged_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_bounds: Tensor,
    kv_bounds: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_order: Tensor | None,
    kv_order: Tensor | None,
    far_key: Tensor,
    far_value: Tensor,
    far_bias: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    other_bounds: Tensor,
    other_counts: Tensor,
    other_indices: Tensor,
    key_bias: Tensor | None,
    exact: list[Tensor],
    count: int,
    scale: float,
    provider: str,
) -> list[Tensor]:
    """Near and far field, judged by `count` rows of each head. The last tables are those of the virtual keys.
    `exact`: the result of `sampled`, or nothing."""
    from sparsify_compiler.kernels.far_field import triton

    table = BlockTable.of(q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order)
    others = BlockTable.of(q_bounds, other_bounds, other_counts, other_indices, q_order, None)
    far = VirtualKeys(far_key, far_value, far_bias, matrices, limits)
    near_and_far.check_near_and_others(query, key, value, table, far, others, key_bias, provider)
    gate, recall = (far_bias.new_empty(query.shape[:2]) for _ in range(2))
    found = Judged(far_bias.new_empty((0,) if limits is None else limits.shape), gate, recall)
    parts = _parts(count, key.shape[2], query.device.type)
    known = (exact[0], exact[1]) if exact else None
    out, lse = triton.judged(
        query, key, value, table, far, others, key_bias, known, count, parts, scale, found
    )
    return [out, lse, gate, recall]


@_judged_op.register_fake
def _judged_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> list[Tensor]:
    gate, recall = (rest[8].new_empty(query.shape[:2]) for _ in range(2))
    return [*attention.empty_outputs(query, value), gate, recall]


@dataclass(frozen=True, slots=True)
class _Sample:
    """A few queries of each head, by rising position, and the bounds of the query blocks among them."""

    rows: Tensor
    """[B|1, H|1, R] int64, the tokens."""
    q_bounds: Tensor
    """[B|1, H|1, Nq+1] int32."""

    @classmethod
    def of(
        cls, query: Tensor, table: BlockTable, count: int, offsets: Tensor | None = None
    ) -> "_Sample | None":
        """The positions in the middle of `count` equal parts of the sequence, or at other places in these parts.

        Args:
            offsets: [B, H, R] in [0, 1), the place of each position in its part.
        """
        if count == 0:
            return None
        tokens, numbers = query.shape[2], torch.arange(count, device=query.device)
        if offsets is None:
            positions = ((numbers * 2 + 1) * tokens // (2 * count))[None, None]
        else:
            positions = ((numbers + offsets) * (tokens / count)).long().clamp(max=tokens - 1)
        rows = positions
        if table.q_order is not None:
            lead = torch.broadcast_shapes(positions.shape[:2], table.q_order.shape[:2])
            rows = table.q_order.expand(*lead, -1).gather(-1, positions.expand(*lead, -1)).long()
        before = positions[..., None] < table.q_bounds[:, :, None, :]
        return cls(rows, before.sum(2, dtype=torch.int32))

    def take(self, tensor: Tensor) -> Tensor:
        """These rows of [B, H, Sq] or [B, H, Sq, D]."""
        return _take(tensor, self.rows)

    def rows_of(self, table: BlockTable) -> BlockTable:
        """The table for these rows only."""
        return replace(table, q_bounds=self.q_bounds, q_order=None)


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    rows = rows.long().expand(*tensor.shape[:2], -1)
    if tensor.dim() == 3:
        return tensor.gather(2, rows)
    return tensor.gather(2, rows[..., None].expand(-1, -1, -1, tensor.shape[-1]))


def _recall(near_lse: Tensor, exact_lse: Tensor) -> Tensor:
    """[B, H] mean share of the attention mass that is kept; 1 for a row without visible keys."""
    kept = (near_lse - exact_lse.masked_fill(exact_lse == -torch.inf, 0.0)).exp()
    return kept.masked_fill(exact_lse == -torch.inf, 1.0).mean(-1).float()


def _error(rows: Tensor, exact: Tensor) -> Tensor:
    """[B, H] summed squared error."""
    return (
        (rows.to(statistics.wide(rows.dtype)) - exact.to(statistics.wide(rows.dtype))).square().sum((-1, -2))
    )
