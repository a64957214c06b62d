"""Ops `sparsify::near_and_far`, `sparsify::near_and_others` and `sparsify::merge_far_field`: keys that are read,
and virtual keys for the rest.

The far field is a second call of the attention op, with one virtual key for each block, under the complement of the
table. The two results are merged by their lse, and the first order is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import attention, providers, statistics
from sparsify_compiler.kernels.far_field.virtual_keys import VirtualKeys
from sparsify_compiler.table import BlockTable, check_blocks


def near_and_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    *,
    others: BlockTable | None = None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the keys that `table` lists, merged with the virtual keys of the others.

    It is one op if no gradients are needed and either the blocks are the table's or the provider fuses; else near
    field, far field and `merge_far_field`.
    """
    tensors = (query, key, value, *far)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if others is not None and providers.fuses(provider) and not learns:
        return torch.ops.sparsify.near_and_others(
            *(query, key, value, *table.tensors().values(), key_bias, *far),
            *(others.kv_bounds, others.kv_num_blocks, others.kv_indices, scale, provider),
        )
    if others is not None or learns:

        def attend(query: Tensor, key: Tensor, value: Tensor, table: BlockTable, *rest: Any) -> Any:
            return torch.ops.sparsify.block_sparse_attention(
                query, key, value, *table.tensors().values(), *rest, provider
            )

        def merge(*arguments: Any) -> Any:
            return torch.ops.sparsify.merge_far_field(*arguments, provider)

        return in_parts(attend, merge, query, key, value, table, far, key_bias, scale, others)
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
    others: BlockTable | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of `near_and_far`: near field, far field and merge, by a provider's functions for these."""
    near = attend(query, key, value, table, key_bias, scale)
    rest = attend(query, far.key, far.value, others or complement(table), far.bias, scale)
    return merge(query, *near, *rest, far.matrices, far.limits, table.q_bounds, table.q_order, scale)


@custom_op("sparsify::near_and_far")
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
    table = BlockTable.of(q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order)
    far = VirtualKeys(far_key, far_value, far_bias, matrices, limits)
    _check_near_and_far(query, key, value, table, key_bias, far)
    attention.check_values(query, key, table, provider)
    far = far._replace(matrices=_as_read(matrices, limits, provider))
    return providers.load(provider, "far_field").near_and_far(query, key, value, table, far, key_bias, scale)


@_near_and_far_op.register_fake
def _near_and_far_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    table, key_bias, far = BlockTable.of(*rest[:6]), rest[6], VirtualKeys(*rest[7:12])
    _check_near_and_far(query, key, value, table, key_bias, far)
    return attention.empty_outputs(query, value)


@custom_op("sparsify::near_and_others")
def _near_and_others_op(
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
    other_bounds: Tensor,
    other_counts: Tensor,
    other_indices: Tensor,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """`sparsify::near_and_far`, with the table of the virtual keys that each row reads."""
    from sparsify_compiler.kernels.far_field import triton

    table = BlockTable.of(q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order)
    others = BlockTable.of(q_bounds, other_bounds, other_counts, other_indices, q_order, None)
    far = VirtualKeys(far_key, far_value, far_bias, matrices, limits)
    check_near_and_others(query, key, value, table, far, others, key_bias, provider)
    return triton.near_and_far(query, key, value, table, far, key_bias, scale, others)


def check_near_and_others(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    others: BlockTable,
    key_bias: Tensor | None,
    provider: str,
) -> None:
    """Raise OperandError for operands that do not fit together. `others`: the table of the virtual keys."""
    for keys, values, one, bias in ((key, value, table, key_bias), (far.key, far.value, others, far.bias)):
        attention.check(query, keys, values, one, bias)
        attention.check_values(query, keys, one, provider)
    term = _linear_term(far.matrices, far.limits, query, value.shape[3], table.q_bounds)
    attention.check_exactly(query.device, *term)


@_near_and_others_op.register_fake
def _near_and_others_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return attention.empty_outputs(query, value)


def _check_near_and_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    far: VirtualKeys,
) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    attention.check(query, key, value, table, key_bias)
    batch, heads, _, head_dim = query.shape
    blocks, groups = table.kv_bounds.shape[-1] - 1, far.key.shape[1] if far.key.dim() == 4 else 0
    if groups == 0 or heads % groups:
        raise OperandError(
            f"far.key must be [{batch}, G, {blocks}, {head_dim}] with G dividing {heads} heads, "
            f"got {tuple(far.key.shape)}"
        )
    wide = statistics.wide(query.dtype)
    attention.check_exactly(
        query.device,
        ("far.key", far.key, (batch, groups, blocks, head_dim), query.dtype),
        ("far.value", far.value, (batch, groups, blocks, value.shape[3]), query.dtype),
        ("far.bias", far.bias, (batch, heads, blocks), wide),
        *_linear_term(far.matrices, far.limits, query, value.shape[3], table.q_bounds),
    )


def complement(table: BlockTable) -> BlockTable:
    """A table of virtual keys, one for each key block. A row lists the blocks that it does not list in `table`."""
    skipped = ~table.block_mask()
    columns = torch.arange(skipped.shape[-1] + 1, dtype=torch.int32, device=skipped.device)
    return replace(table.listing(skipped), kv_bounds=columns[None, None], kv_order=None)


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
    far = far_out + scale query M, with the second term clamped to +-limits.

    A row whose far_lse is -inf is the near row bit for bit, for any values in far_out and M.

    Args:
        query: [B, H, Sq, D]; read only if there are matrices.
        near_out, far_out: [B, H, Sq, Dv] in the dtype of `query`.
        near_lse, far_lse: [B, H, Sq] fp32 (fp64 for fp64 input).
        matrices: [B, H, Nq, D, Dv] in the dtype of lse or, without gradients, of `query`: M of each query block; or
            None.
        limits: [B, H, Nq, Dv] in the dtype of lse, not negative; None if there are no matrices.
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


@custom_op("sparsify::merge_far_field")
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
    _check_merge(query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order)
    if providers.checks_values(provider, query.device):
        check_blocks("q_", q_bounds, q_order, query.shape[2])
    matrices = _as_read(matrices, limits, provider)
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
    q_bounds: Tensor,
    q_order: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    _check_merge(query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order)
    return attention.empty_outputs(query, near_out)


@custom_op("sparsify::merge_far_field_backward")
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
    from sparsify_compiler.kernels.far_field import reference

    return reference.merge_backward(
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


_merge_backward_op.register_autograd(statistics.no_second_derivative)


def _merge_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _provider = inputs
    ctx.save_for_backward(*output, *tensors)


def _merge_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: checkpointing does not return them a second time
    *grads, grad_matrices, grad_limits = torch.ops.sparsify.merge_far_field_backward(
        grad_out, grad_lse, *saved, ctx.scale
    )
    if saved[7] is None:
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
    q_bounds: Tensor,
    q_order: Tensor | None,
) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    for name, tensor in (("query", query), ("near_out", near_out)):
        if tensor.dim() != 4:
            raise OperandError(f"{name} must have shape [B, H, Sq, D], got {tuple(tensor.shape)}")
    statistics.check_block_shapes(query, query.shape[1], q_bounds, q_order, "q_")
    wide, rows, value_dim = statistics.wide(query.dtype), tuple(query.shape[:3]), near_out.shape[3]
    attention.check_exactly(
        query.device,
        ("near_out", near_out, (*rows, value_dim), query.dtype),
        ("near_lse", near_lse, rows, wide),
        ("far_out", far_out, (*rows, value_dim), query.dtype),
        ("far_lse", far_lse, rows, wide),
        *_linear_term(matrices, limits, query, value_dim, q_bounds),
    )


def _as_read(matrices: Tensor | None, limits: Tensor | None, provider: str) -> Tensor | None:
    """The matrices in a dtype that the provider reads."""
    if matrices is None or limits is None or providers.fuses(provider):
        return matrices
    return matrices.to(limits.dtype)


def _linear_term(
    matrices: Tensor | None, limits: Tensor | None, query: Tensor, value_dim: int, q_bounds: Tensor
) -> list[tuple[str, Tensor, tuple[int, ...], torch.dtype]]:
    """The arguments of `check_exactly` for the linear term, if there is one."""
    if (matrices is None) != (limits is None):
        raise OperandError("matrices and limits must be given together, got one without the other")
    if matrices is None or limits is None:
        return []
    wide, lead = statistics.wide(query.dtype), (*query.shape[:2], q_bounds.shape[-1] - 1)
    matrix_dtype = query.dtype if matrices.dtype == query.dtype else wide
    return [
        ("matrices", matrices, (*lead, query.shape[3], value_dim), matrix_dtype),
        ("limits", limits, (*lead, value_dim), wide),
    ]
