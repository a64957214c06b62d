"""Ops `sparsify::near_and_far` and `sparsify::merge_far_field`: keys that are read, and virtual keys of the rest.

The far field is the attention op once more, over one virtual key for each block under the complement of the table;
the two are merged by their lse, and the first order is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.kernels import attention, providers, statistics
from sparsify_compiler.kernels.virtual_keys import VirtualKeys
from sparsify_compiler.table import BlockTable


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
    """(out, lse) of the keys that `table` lists and of the virtual keys of the others, merged.

    One op where nobody asks for gradients and the blocks are the table's; else near field, far field and
    `merge_far_field`.
    """
    tensors = (query, key, value, *far)
    if others is not None or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ):

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
    """`near_and_far` as it is defined: near field, far field, merge, by a provider's functions for these."""
    near = attend(query, key, value, table, key_bias, scale)
    rest = attend(query, far.key, far.value, others or complement(table), far.bias, scale)
    return merge(query, *near, *rest, far.matrices, far.limits, table.q_bounds, table.q_order, scale)


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
