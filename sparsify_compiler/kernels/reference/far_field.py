"""Near and far field merged, defined in plain torch."""

import torch
from torch import Tensor

from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.reference.statistics import blocks


def merge(
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `far_field.merge_far_field`."""
    out, lse = empty_outputs(query, near_out)
    far = _with_linear_term(query, far_out, matrices, q_bounds, q_order, scale, lse.dtype)
    top = torch.maximum(near_lse, far_lse)
    top = top.masked_fill(top == -torch.inf, 0.0)
    near_weight, far_weight = (near_lse - top).exp(), (far_lse - top).exp()
    total = near_weight + far_weight
    merged = (near_weight[..., None] * near_out + far_weight[..., None] * far) / total[..., None]
    alone = far_lse == -torch.inf
    out.copy_(torch.where(alone[..., None], near_out, merged.to(out.dtype)))
    lse.copy_(torch.where(alone, near_lse, top + total.log()))
    return out, lse


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
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all tensors (that of `matrices` empty where there are none).

    With a, b the shares of near and far and F = far + s q M:  dnear = a dO,  dfar = b dO,  dq = s b dO Mᵀ,
    dM = s qᵀ (b dO) over a block,  dlse_near = a (dO.(near - out) + dlse),  dlse_far = b (dO.(F - out) + dlse).
    """
    dtype = lse.dtype
    d_out, merged, near = (t.to(dtype) for t in (grad_out, out, near_out))
    blind = lse == -torch.inf
    base = lse.masked_fill(blind, 0.0)
    near_share, far_share = ((t - base).exp() for t in (near_lse, far_lse))
    far = _with_linear_term(query, far_out, matrices, q_bounds, q_order, scale, dtype)
    # What no row reads may hold anything.
    near, far = (
        t.masked_fill((share == 0)[..., None], 0.0) for t, share in ((near, near_share), (far, far_share))
    )
    d_near_lse = near_share * ((d_out * (near - merged)).sum(-1) + grad_lse)
    d_far_lse = far_share * ((d_out * (far - merged)).sum(-1) + grad_lse)
    d_near, d_far = near_share[..., None] * d_out, far_share[..., None] * d_out
    d_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
    d_matrices = lse.new_zeros((0,) if matrices is None else matrices.shape)
    if matrices is not None:
        for at, block, rows in blocks(q_bounds, q_order, query.shape[2]):
            d_rows = scale * d_far[at][:, :, rows]
            d_query[at][:, :, rows] = d_rows @ matrices[at][:, :, block].mT
            d_matrices[at][:, :, block] = query[at][:, :, rows].to(dtype).mT @ d_rows
    d_query, d_near, d_far = (t.to(query.dtype) for t in (d_query, d_near, d_far))
    return d_query, d_near, d_near_lse, d_far, d_far_lse, d_matrices


def _with_linear_term(
    query: Tensor,
    far_out: Tensor,
    matrices: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """far_out + scale * query M, in `dtype`."""
    far = far_out.to(dtype, copy=True)
    if matrices is not None:
        for at, block, rows in blocks(q_bounds, q_order, query.shape[2]):
            far[at][:, :, rows] += scale * (query[at][:, :, rows].to(dtype) @ matrices[at][:, :, block])
    return far
