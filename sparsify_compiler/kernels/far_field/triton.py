"""Near and far field: two launches of attention, then the merge, whose kernel is in `triton_kernels.py`."""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.attention import triton as attention
from sparsify_compiler.kernels.far_field import triton_kernels as kernels
from sparsify_compiler.kernels.far_field.near_and_far import in_parts
from sparsify_compiler.kernels.statistics.triton import precision, value_tile
from sparsify_compiler.kernels.triton.launcher import Launch, shared_strides


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
    merge_launch(
        *(query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order, scale),
        *(out, lse),
    )()
    return out, lse


def merge_into_near(query: Tensor, near_out: Tensor, near_lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`merge`, whose `out` takes the memory of `near_out`: a program reads what it writes, and no other."""
    lse = torch.empty_like(near_lse)
    arguments: tuple[Any, ...] = (query, near_out, near_lse, *rest, near_out, lse)
    merge_launch(*arguments)()
    return near_out, lse


near_and_far = partial(in_parts, attention.forward, merge_into_near)
"""See `far_field.near_and_far`."""


def merge_launch(
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
    out: Tensor,
    lse: Tensor,
) -> Launch:
    """The launch that fills `out` and `lse`."""
    q_bounds, q_order = q_bounds.contiguous(), q_order if q_order is None else q_order.contiguous()
    batch, heads, tokens, head_dim = query.shape
    columns = value_tile(head_dim)
    # The number of queries equals that of channels, so their product is square. In fp32 it does not fit registers.
    block = 32 if query.dtype == torch.float32 else columns
    blocks = q_bounds.shape[-1] - 1
    tensors = {
        "query": query,
        "near_out": near_out,
        "near_lse": near_lse,
        "far_out": far_out,
        "far_lse": far_lse,
        "out": out,
        "lse": lse,
    }
    arguments = {
        **tensors,
        "matrices": matrices if matrices is None else matrices.contiguous(),
        "limits": limits if limits is None else limits.contiguous(),
        "q_bounds": q_bounds,
        "q_order": q_order,
        **{f"{name}_strides": t.stride() for name, t in tensors.items()},
        "q_bounds_strides": shared_strides(q_bounds),
        "q_order_strides": shared_strides(q_order),
        "q_blocks": blocks,
        "scale": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": near_out.shape[-1],
        "VALUE_TILE": columns,
        "BLOCK": block,
        # fp32 is multiplied without tensor cores, from registers: few channels fit at a time.
        "CHUNK": 16 if query.dtype == torch.float32 else max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": precision(query.dtype),
    }
    # The most tiles that q_bounds of these shapes can have; surplus programs end at once.
    tiles = (tokens // block + blocks if tokens else 0) * -(-near_out.shape[-1] // columns)
    return Launch(kernels.merge_kernel, (tiles, heads, batch), arguments, num_warps=8)
