"""Attention: the C++ kernel `csrc/attention.cpp`, or packed SDPA if it could not be built."""

import ctypes
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.kernels.attention import empty_gradients, empty_outputs, reference
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.kernels.far_field.virtual_keys import VirtualKeys
from sparsify_compiler.table import BlockTable


def forward(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_sparse_attention`."""
    out, lse = empty_outputs(query, value)
    if run(query, key, value, out, lse, key_bias, table, scale):
        return out, lse
    return packed_sdpa(query, key, value, table, key_bias, scale)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    table: BlockTable,
    scale: float,
    far: VirtualKeys | None = None,
) -> bool:
    """Fill `out` and `lse`, with or without a far field. Return False if there is no kernel."""
    kernel = library.symbol("sparsify_attention", Problem, _FarField)
    if kernel is None:
        return False
    problem, _kept = describe(query, key, value, out, lse, key_bias, table, scale)
    check = partial(table.check, query.shape[2], key.shape[2])
    if far is None:
        library.launch(kernel, problem, None, check=check)
        return True
    tensors = [
        *(_rows(t) for t in (far.key, far.value)),
        far.bias.contiguous(),
        far.matrices if far.matrices is None else far.matrices.contiguous().flatten(3),
        far.limits if far.limits is None else far.limits.contiguous(),
    ]
    views = (library.view(t) for t in tensors)
    library.launch(kernel, problem, _FarField(*views, *far.key.shape[1:3]), check=check)
    return True


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention.reference.backward`, which runs if there is no kernel.

    The same number of threads gives the same bits. Besides the gradients, the kernel needs memory for up to two
    fp32 sums of a key head's gradients for each thread.
    """
    kernel = library.symbol("sparsify_attention_backward", _BackwardProblem)
    if kernel is None:
        return reference.backward(grad_out, grad_lse, out, lse, query, key, value, table, key_bias, scale)
    gradients = empty_gradients(query, key, value)
    problem, _kept = describe(query, key, value, out, lse, key_bias, table, scale)
    grad_out = _rows(grad_out)
    views = (library.view(t) for t in (grad_out, grad_lse, *gradients))
    check = partial(table.check, query.shape[2], key.shape[2])
    library.launch(kernel, _BackwardProblem(problem, *views), check=check)
    return gradients


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    table: BlockTable,
    scale: float,
) -> tuple["Problem", list[Tensor | None]]:
    """The problem, and the tensors that must live as long as it does: some are copies."""
    batch, heads, q_tokens, head_dim = query.shape
    blocks, width = table.kv_indices.shape[-2:]
    tensors = [
        *(_rows(t) for t in (query, key, value, out)),
        lse,
        key_bias if key_bias is None else key_bias.float().contiguous(),
        *(t if t is None else t.contiguous() for t in table.tensors().values()),
    ]
    problem = Problem(
        *(library.view(t) for t in tensors),
        *(batch, heads, key.shape[1], q_tokens, key.shape[2]),
        *(blocks, table.kv_bounds.shape[-1] - 1, width, head_dim, value.shape[-1]),
        scale,
        library.DTYPES.index(query.dtype),
        torch.get_num_threads(),
    )
    return problem, tensors


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with rows that are dense in memory."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def packed_sdpa(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` without the kernel: gather the keys of each query block, then run dense flash attention.

    Its lse is wrong where a score is infinite or every key is hidden; there the reference computes everything.
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


class Problem(ctypes.Structure):
    """`struct Problem`."""

    _fields_ = (
        *((name, library.View) for name in ("query", "key", "value", "out", "lse", "key_bias")),
        *((name, library.View) for name in BlockTable.__slots__),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "q_tokens", "kv_tokens")),
        *((name, ctypes.c_int64) for name in ("q_blocks", "kv_blocks", "width", "head_dim", "value_dim")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class _FarField(ctypes.Structure):
    """`struct FarField`."""

    _fields_ = (
        *((name, library.View) for name in VirtualKeys._fields),
        *((name, ctypes.c_int64) for name in ("heads", "blocks")),
        *((name, library.View) for name in ("left", "keys", "bounds")),
    )


class _BackwardProblem(ctypes.Structure):
    """`struct BackwardProblem`."""

    _fields_ = (
        ("forward", Problem),
        *((n, library.View) for n in ("grad_out", "grad_lse", "grad_query", "grad_key", "grad_value")),
    )
