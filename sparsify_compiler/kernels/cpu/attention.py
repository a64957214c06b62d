"""Attention: the C++ kernel `csrc/attention.cpp`, or packed SDPA where it could not be built."""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.kernels.reference import attention as reference
from sparsify_compiler.kernels.reference.attention import backward
from sparsify_compiler.table import BlockTable

__all__ = ["backward", "forward"]


def forward(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_sparse_attention`."""
    kernel = library.symbol("sparsify_attention", _Problem)
    if kernel is None:
        return packed_sdpa(query, key, value, table, key_bias, scale)
    out, lse = empty_outputs(query, value)
    batch, heads, _, head_dim = query.shape
    # The list keeps what `contiguous` may have copied alive until the kernel has run.
    tensors = [
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)),
        out,
        lse,
        key_bias if key_bias is None else key_bias.float().contiguous(),
        *(t if t is None else t.contiguous() for t in table.tensors().values()),
    ]
    kernel(
        ctypes.byref(
            _Problem(
                *(library.view(t, batch, heads) for t in tensors),
                *(batch, heads, key.shape[1], table.kv_indices.shape[-2], head_dim, value.shape[-1]),
                scale,
                library.DTYPES.index(query.dtype),
                torch.get_num_threads(),
            )
        )
    )
    return out, lse


def packed_sdpa(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` without the kernel: the keys of each query block gathered, then dense flash attention.

    That attention gives no right lse where a score is infinite or every key is hidden: the reference does.
    """
    out, lse = empty_outputs(query, value)
    group, width = query.shape[1] // key.shape[1], max(query.shape[-1], value.shape[-1])
    q, k, v = (pad(t, (0, width - t.shape[-1])) for t in (query, key, value))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    bias = key_bias if key_bias is None else key_bias.to(query.dtype).expand(*query.shape[:2], -1)
    for at, rows, columns in reference.query_blocks(table):
        if not rows.numel():
            continue
        if not columns.numel():
            out[at][:, :, rows], lse[at][:, :, rows] = 0.0, -torch.inf
            continue
        listed_bias = None if bias is None else bias[at][:, :, None, columns]
        block_out, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(q[at][:, :, rows], k[at][:, :, columns], v[at][:, :, columns]),
            attn_mask=listed_bias,
            scale=scale,
        )
        hidden = listed_bias is not None and bool((listed_bias.amax(-1) == -torch.inf).any())
        if hidden or not block_lse.isfinite().all():
            return reference.forward(query, key, value, table, key_bias, scale)
        out[at][:, :, rows], lse[at][:, :, rows] = block_out[..., : value.shape[-1]], block_lse
    return out, lse


class _Problem(ctypes.Structure):
    """`struct Problem`."""

    _fields_ = (
        *((name, library.View) for name in ("query", "key", "value", "out", "lse", "key_bias")),
        *((name, library.View) for name in BlockTable.__slots__),
        *((n, ctypes.c_int64) for n in ("batch", "heads", "kv_heads", "q_blocks", "head_dim", "value_dim")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )
