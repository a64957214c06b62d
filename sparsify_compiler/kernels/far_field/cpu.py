"""Near and far field: the C++ kernels, or the reference if they could not be built.

`csrc/attention.cpp` computes both fields in one pass; `csrc/far_field.cpp` merges separate results.
`csrc/with_far_field.cpp` does all that a call with a far field needs.
"""

import ctypes
from functools import partial

import torch
from torch import Tensor

from sparsify_compiler.kernels.attention import cpu as attention
from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.kernels.far_field import reference
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks, VirtualKeys
from sparsify_compiler.kernels.statistics import heads_of_statistics
from sparsify_compiler.table import BlockTable, check_blocks


def near_and_far(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `far_field.near_and_far`."""
    out, lse = empty_outputs(query, value)
    if attention.run(query, key, value, out, lse, key_bias, table, scale, far):
        return out, lse
    return reference.near_and_far(query, key, value, table, far, key_bias, scale)


def fill_with_far_field(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    report: Tensor,
    key_bias: Tensor | None,
    table: BlockTable,
    blocks: FarBlocks | None,
    linear: bool,
    min_gain: float | None,
    best: int,
    sampled_rows: int,
    scale: float,
) -> bool:
    """Fill `out`, `lse` and `report`, as `in_one_call.attention_with_far_field` returns them. Return False if there
    is no kernel."""
    kernel = library.symbol("sparsify_attention_with_far_field", _WithFarField)
    if kernel is None:
        return False
    problem, kept = attention.describe(query, key, value, out, lse, key_bias, table, scale)
    # The list keeps copies that `contiguous` may make alive until the kernel has run.
    bounds, order = (table.kv_bounds, table.kv_order) if blocks is None else (blocks.bounds, blocks.order)
    own = (bounds, order, None, None) if blocks is None else (bounds, order, blocks.left, blocks.keys)
    tensors = [*(t if t is None else t.contiguous() for t in own), report]
    call = _WithFarField(
        ctypes.pointer(problem),
        *(library.view(t) for t in tensors),
        *(heads_of_statistics(key, bounds, order, key_bias), bounds.shape[-1] - 1, sampled_rows, best),
        *(-1.0 if min_gain is None else min_gain, linear),
    )

    def check() -> None:
        table.check(query.shape[2], key.shape[2])
        check_blocks("far_blocks.", bounds, order, key.shape[2])

    library.launch(kernel, call, check=check)
    del kept
    return True


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
    kernel = library.symbol("sparsify_merge_far_field", _Problem)
    if kernel is None:
        return reference.merge(
            query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order, scale
        )
    out, lse = empty_outputs(query, near_out)
    batch, heads, tokens, head_dim = query.shape
    # The list keeps copies that `contiguous` may make alive until the kernel has run.
    tensors = [
        query if query.stride(-1) == 1 else query.contiguous(),
        near_out if near_out.stride(-1) == 1 else near_out.contiguous(),
        near_lse,
        far_out if far_out.stride(-1) == 1 else far_out.contiguous(),
        far_lse,
        matrices if matrices is None else matrices.contiguous().flatten(3),
        limits if limits is None else limits.contiguous(),
        q_bounds.contiguous(),
        q_order if q_order is None else q_order.contiguous(),
        out,
        lse,
    ]
    problem = _Problem(
        *(library.view(t) for t in tensors),
        *(batch, heads, tokens, q_bounds.shape[-1] - 1, head_dim, near_out.shape[-1]),
        scale,
        library.DTYPES.index(query.dtype),
        torch.get_num_threads(),
    )
    library.launch(kernel, problem, check=partial(check_blocks, "q_", q_bounds, q_order, tokens))
    return out, lse


class _WithFarField(ctypes.Structure):
    """`struct WithFarField`."""

    _fields_ = (
        ("problem", ctypes.POINTER(attention.Problem)),
        *((name, library.View) for name in ("bounds", "order", "left", "keys", "report")),
        *((name, ctypes.c_int64) for name in ("groups", "blocks", "sampled_rows", "best")),
        ("min_gain", ctypes.c_float),
        ("linear", ctypes.c_int32),
    )


class _Problem(ctypes.Structure):
    """`struct Merge`."""

    _fields_ = (
        *((name, library.View) for name in ("query", "near_out", "near_lse", "far_out", "far_lse")),
        *((name, library.View) for name in ("matrices", "limits", "q_bounds", "q_order", "out", "lse")),
        *((n, ctypes.c_int64) for n in ("batch", "heads", "tokens", "q_blocks", "head_dim", "value_dim")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )
