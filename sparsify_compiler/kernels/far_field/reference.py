"""Near and far field, and their merge, defined in plain torch."""

from functools import partial

import torch
from torch import Tensor

from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.attention import reference as attention
from sparsify_compiler.kernels.far_field.near_and_far import in_parts
from sparsify_compiler.kernels.statistics.reference import blocks


def merge(
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
    """See `far_field.merge_far_field`."""
    out, lse = empty_outputs(query, near_out)
    far = _with_linear_term(query, far_out, matrices, limits, q_bounds, q_order, scale, lse.dtype)
    top = torch.maximum(near_lse, far_lse)
    top = top.masked_fill(top == -torch.inf, 0.0)
    near_weight, far_weight = (near_lse - top).exp(), (far_lse - top).exp()
    total = near_weight + far_weight
    merged = (near_weight[..., None] * near_out + far_weight[..., None] * far) / total[..., None]
    alone = far_lse == -torch.inf
    out.copy_(torch.where(alone[..., None], near_out, merged.to(out.dtype)))
    lse.copy_(torch.where(alone, near_lse, top + total.log()))
    return out, lse


near_and_far = partial(in_parts, attention.forward, merge)
"""See `far_field.near_and_far`."""


def merge_backward(
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
    """Gradients of all tensors (those of `matrices` and `limits` are empty if there are none).

    With a, b the shares of near and far and F = far + clamp(s q M):  dnear = a dO,  dfar = b dO,
    dlse_near = a (dO.(near - out) + dlse),  dlse_far = b (dO.(F - out) + dlse). Where the term is not clamped,
    dfar flows to q and M. Where it is clamped, dfar flows to the limit, with the sign of the term.
    """
    dtype = lse.dtype
    d_out, merged, near = (t.to(dtype) for t in (grad_out, out, near_out))
    blind = lse == -torch.inf
    base = lse.masked_fill(blind, 0.0)
    near_share, far_share = ((t - base).exp() for t in (near_lse, far_lse))
    far = _with_linear_term(query, far_out, matrices, limits, q_bounds, q_order, scale, dtype)
    # Values that no row reads may be anything, NaN included.
    near, far = (
        t.masked_fill((share == 0)[..., None], 0.0) for t, share in ((near, near_share), (far, far_share))
    )
    d_near_lse = near_share * ((d_out * (near - merged)).sum(-1) + grad_lse)
    d_far_lse = far_share * ((d_out * (far - merged)).sum(-1) + grad_lse)
    d_near, d_far = near_share[..., None] * d_out, far_share[..., None] * d_out
    d_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
    d_matrices, d_limits = (lse.new_zeros((0,) if t is None else t.shape) for t in (matrices, limits))
    if matrices is not None and limits is not None:
        for at, block, rows in blocks(q_bounds, q_order, query.shape[2]):
            queries, matrix, limit = query[at][:, :, rows].to(dtype), matrices[at][:, :, block], limits[at]
            limit, term = limit[:, :, block, None], scale * (queries @ matrix)
            d_rows, clamped = d_far[at][:, :, rows], term.abs() > limit
            d_limits[at][:, :, block] = (d_rows * term.sign()).masked_fill(~clamped, 0.0).sum(2)
            d_term = scale * d_rows.masked_fill(clamped, 0.0)
            d_query[at][:, :, rows] = d_term @ matrix.mT
            d_matrices[at][:, :, block] = queries.mT @ d_term
    # The layout of `grad_out` must not show: a compiler expects contiguous gradients.
    d_query, d_near, d_far = (t.to(query.dtype).contiguous() for t in (d_query, d_near, d_far))
    return d_query, d_near, d_near_lse, d_far, d_far_lse, d_matrices, d_limits


def _with_linear_term(
    query: Tensor,
    far_out: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """far_out + clamp(scale * query M), in `dtype`."""
    far = far_out.to(dtype, copy=True)
    if matrices is not None and limits is not None:
        for at, block, rows in blocks(q_bounds, q_order, query.shape[2]):
            term = scale * (query[at][:, :, rows].to(dtype) @ matrices[at][:, :, block])
            limit = limits[at][:, :, block, None]
            far[at][:, :, rows] += term.clamp(-limit, limit)
    return far
