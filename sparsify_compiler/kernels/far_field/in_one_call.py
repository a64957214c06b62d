"""Op `sparsify::attention_with_far_field`: a whole call of `attention_with_far_field` for provider `cpu`.

Between the kernels of a call lie some hundred small operations on tables and statistics. They take about as long as
the kernels where a video is small, and the threads wait meanwhile. Here C++ does all of it in one parallel region
(`kernels/cpu/csrc/with_far_field.cpp`). Calls that need gradients, those with a target, those of several ranks, and
the one call of a video that shows its table run in parts.
"""

from typing import Any

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks
from sparsify_compiler.table import BlockTable


def supports(query: Tensor, key: Tensor, value: Tensor, provider: str) -> bool:
    """Whether the op can run on these tensors. It has no gradients, and exported files do not use it."""
    if provider != "cpu" or torch.compiler.is_exporting():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))


def attention_with_far_field(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    *,
    linear: bool,
    min_gain: float | None,
    best: int,
    far_blocks: FarBlocks | None,
    key_bias: Tensor | None,
    scale: float,
    sampled_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, report) of `far_field.attention_with_far_field`; report: [B, H, 4] fp32, a `Report`'s fields."""
    return torch.ops.sparsify.attention_with_far_field(
        *(query, key, value, *table.tensors().values(), key_bias, *(far_blocks or [None] * 4)),
        *(linear, -1.0 if min_gain is None else min_gain, best, sampled_rows, scale),
    )


@custom_op("sparsify::attention_with_far_field")
def _op(
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
    far_order: Tensor | None,
    far_bounds: Tensor | None,
    far_keys: Tensor | None,
    far_left: Tensor | None,
    linear: bool,
    min_gain: float,
    best: int,
    sampled_rows: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    table = BlockTable.of(q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order)
    attention.check(query, key, value, table, key_bias)
    given = (far_order, far_bounds, far_keys, far_left)
    blocks = None if far_bounds is None else FarBlocks(*given)  # type: ignore[arg-type]
    if blocks is not None:
        blocks.check(query, key, table)
    out, lse = attention.empty_outputs(query, value)
    report = query.new_empty(*query.shape[:2], 4, dtype=torch.float32)
    from sparsify_compiler.kernels.far_field import cpu, in_parts

    least = None if min_gain < 0 else min_gain
    problem = (query, key, value, out, lse, report, key_bias, table, blocks)
    filled = all(t.numel() for t in (query, key, value)) and cpu.fill_with_far_field(
        *problem, linear, least, best, sampled_rows, scale
    )
    if filled:
        return out, lse, report
    out, lse, numbers = in_parts(
        *(query, key, value, table),
        far_field="linear" if linear else "mean",
        min_gain=least,
        best=best,
        far_blocks=blocks,
        key_bias=key_bias,
        scale=scale,
        provider="cpu",
        sampled_rows=sampled_rows,
    )
    return out, lse, torch.stack(numbers[:4], -1)


@_op.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    report = query.new_empty(*query.shape[:2], 4, dtype=torch.float32)
    return (*attention.empty_outputs(query, value), report)
