"""Prediction: the C++ kernel of `csrc/prediction.cpp`, or the reference if it could not be built."""

import ctypes

import torch
from torch import Tensor

from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.kernels.prediction import empty_top_k, reference
from sparsify_compiler.table import check_bounds


def top_k_keys(
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    q_bounds: Tensor | None,
    key_bias: Tensor | None,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `prediction.top_k_keys`."""
    kernel = library.symbol("sparsify_top_k_keys", _TopK)
    if kernel is None:
        return reference.top_k_keys(query, key, budget, q_bounds, key_bias, width, scale)
    outputs = empty_top_k(query, q_bounds, width)
    batch, heads, queries, rank = query.shape
    # The list keeps copies that `contiguous` may make alive until the kernel has run.
    tensors = [
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (query, key)),
        budget[:, :, None],
        q_bounds if q_bounds is None else q_bounds.contiguous()[None, None],
        key_bias if key_bias is None else key_bias.float().contiguous(),
        *outputs,
    ]
    problem = _TopK(
        *(library.view(t) for t in tensors),
        *(batch, heads, key.shape[1], queries, outputs[0].shape[2], key.shape[2], rank, width),
        scale,
        library.DTYPES.index(query.dtype),
        torch.get_num_threads(),
    )

    def check() -> None:
        assert q_bounds is not None
        check_bounds("q_bounds", q_bounds, queries)

    library.launch(kernel, problem, check=check)
    return outputs


class _TopK(ctypes.Structure):
    """`struct TopK`."""

    _fields_ = (
        *((name, library.View) for name in ("query", "key", "budget", "q_bounds", "key_bias")),
        *((name, library.View) for name in ("kv_num_blocks", "kv_indices")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "kv_heads", "queries", "groups", "tokens", "rank", "width")
        ),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )
