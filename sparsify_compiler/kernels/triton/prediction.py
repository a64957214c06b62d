"""Prediction: the launch of the kernel in `prediction_kernels.py`. Nothing is read back from the device."""

import torch
import triton
from torch import Tensor

from sparsify_compiler.kernels.prediction import empty_top_k
from sparsify_compiler.kernels.triton import prediction_kernels as kernels
from sparsify_compiler.kernels.triton.launcher import Launch, alignment, shared_strides, with_strides


def top_k_keys(
    query: Tensor, key: Tensor, budget: Tensor, key_bias: Tensor | None, width: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `prediction.top_k_keys`."""
    counts, indices = empty_top_k(query, width)
    indices.zero_()
    if query.device.type == "cpu":  # interpreted: there tl.dot takes the bits of a bf16 for an integer
        query, key = query.float(), key.float()
    choose(query, key, budget, key_bias, scale, counts, indices)()
    return counts, indices


def choose(
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    key_bias: Tensor | None,
    scale: float,
    counts: Tensor,
    indices: Tensor,
) -> Launch:
    """Fills `counts`, and of `indices`, all zeros, what is chosen."""
    batch, heads, groups, rank = query.shape
    block_m, block_n, num_warps, num_stages = tiles(query)
    shared = {"budget": budget, "key_bias": key_bias}
    arguments = {
        **with_strides(query=query, key=key, kv_num_blocks=counts, kv_indices=indices),
        **shared,
        **{f"{name}_strides": shared_strides(t) for name, t in shared.items()},
        "groups": groups,
        "tokens": key.shape[2],
        "most": min(indices.shape[3], key.shape[2]),
        "queries_per_key_head": heads // key.shape[1],
        "scale": scale,
        "RANK": rank,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "ALIGN": alignment(query, key),
    }
    grid = (triton.cdiv(groups, block_m), heads, batch)
    return Launch(kernels.top_k_kernel, grid, arguments, num_warps, num_stages)


def tiles(query: Tensor) -> tuple[int, int, int, int]:
    """(groups, keys, warps, stages), the largest that leave registers for two programs on a multiprocessor, as
    one alone would wait for its loads. fp32 is multiplied in full, without tensor cores, so in smaller tiles.
    """
    if query.device.type == "cpu":
        return 16, 32, 4, 1  # small, so that small tests have many
    if query.dtype == torch.float32:
        return 32, 16, 4, 2
    return 64, 32, 8, 3
