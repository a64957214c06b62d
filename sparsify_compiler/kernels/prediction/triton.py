"""Prediction: the launches of the kernels in `triton_kernels.py`. Nothing is read back from the device."""

from typing import Any

import torch
import triton
from torch import Tensor

from sparsify_compiler.kernels.prediction import empty_top_k
from sparsify_compiler.kernels.prediction import triton_kernels as kernels
from sparsify_compiler.kernels.triton.launcher import Launch, alignment, shared_strides, with_strides

SCORES_AT_ONCE = 2**27
"""Number of scores stored at one time for groups of several queries, 512 MiB. At least a group's are."""
PROGRAMS = 1024
"""Most programs of a launch that stores scores or counts: several on every multiprocessor."""
BINS: int = kernels.BINS.value


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
    counts, indices = empty_top_k(query, q_bounds, width)
    indices.zero_()
    inputs = scored(query, key, budget, key_bias, scale)
    if q_bounds is None:
        choose(inputs, counts, indices)()
        return counts, indices
    highest, part = query.new_empty(2, *query.shape[:3], dtype=torch.float32)
    softmax(inputs, highest, part)()
    add_up(inputs, highest, part, q_bounds.contiguous(), counts, indices)()
    return counts, indices


def scored(
    query: Tensor, key: Tensor, budget: Tensor, key_bias: Tensor | None, scale: float
) -> dict[str, Any]:
    """The arguments for a kernel that computes scores."""
    shared = {"budget": budget, "key_bias": key_bias}
    return {
        **with_strides(query=query, key=key),
        **shared,
        **{f"{name}_strides": shared_strides(t) for name, t in shared.items()},
        "tokens": key.shape[2],
        "queries_per_key_head": query.shape[1] // key.shape[1],
        "scale": scale,
        "RANK": query.shape[3],
        "ALIGN": alignment(query, key),
    }


def choose(inputs: dict[str, Any], counts: Tensor, indices: Tensor) -> Launch:
    """The launch that fills `counts`, and writes the selected keys into the zeros of `indices`; every query is a
    group."""
    batch, heads, groups = counts.shape
    block_m, block_n, num_warps, num_stages = tiles(inputs["query"])
    programs = min(triton.cdiv(groups, block_m) * heads * batch, PROGRAMS)
    arguments = {
        **inputs,
        **with_strides(kv_num_blocks=counts, kv_indices=indices),
        "counts": counts.new_empty(programs * block_m * BINS),
        **{"heads": heads, "batches": batch, "groups": groups},
        "most": min(indices.shape[3], inputs["tokens"]),
        **{"BLOCK_M": block_m, "BLOCK_N": block_n, "BINS_AT_ONCE": min(BINS, 4096 // block_m)},
    }
    return Launch(kernels.top_k_kernel, (programs, 1, 1), arguments, num_warps, num_stages)


def softmax(inputs: dict[str, Any], highest: Tensor, part: Tensor) -> Launch:
    """The launch that fills `highest` and `part` [B, H, Q], except for heads that select nothing."""
    batch, heads, queries = highest.shape
    block_m, block_n, num_warps, num_stages = softmax_tiles(inputs["query"])
    arguments = {
        **inputs,
        **with_strides(highest=highest, part=part),
        **{"queries": queries, "BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    grid = (triton.cdiv(queries, block_m), heads, batch)
    return Launch(kernels.softmax_kernel, grid, arguments, num_warps, num_stages)


def add_up(
    inputs: dict[str, Any],
    highest: Tensor,
    part: Tensor,
    q_bounds: Tensor,
    counts: Tensor,
    indices: Tensor,
) -> Launch:
    """The launch that does the same as `choose`, for the groups of `q_bounds`."""
    batch, heads, groups = counts.shape
    block_m, block_n, at_once, num_warps, num_stages = add_up_tiles(inputs["query"])
    room = triton.cdiv(inputs["tokens"], at_once) * at_once
    programs = min(groups * heads * batch, PROGRAMS, max(1, SCORES_AT_ONCE // room))
    arguments = {
        **inputs,
        **with_strides(highest=highest, part=part, kv_num_blocks=counts, kv_indices=indices),
        "q_bounds": q_bounds,
        "scores": highest.new_empty(programs * room),
        "counts": counts.new_empty(programs * BINS),
        **{"heads": heads, "batches": batch, "groups": groups, "room": room},
        "most": min(indices.shape[3], inputs["tokens"]),
        **{"BLOCK_M": block_m, "BLOCK_N": block_n, "AT_ONCE": at_once},
    }
    return Launch(kernels.add_up_kernel, (programs, 1, 1), arguments, num_warps, num_stages)


# Tiles are (rows, keys, warps, stages). fp32 is multiplied in full, without tensor cores, so in smaller tiles. For
# the interpreter they are small, so that small tests have several.


def tiles(query: Tensor) -> tuple[int, int, int, int]:
    """The largest tiles that leave registers for two programs on a multiprocessor: one alone would wait for its
    loads."""
    if query.device.type == "cpu":
        return 16, 32, 4, 1
    if query.dtype == torch.float32:
        return 32, 16, 4, 2
    return 64, 32, 8, 3


def softmax_tiles(query: Tensor) -> tuple[int, int, int, int]:
    """Tiles of `softmax_kernel`, with many keys: it reduces every tile over its keys, so fewer tiles cost less."""
    if query.device.type == "cpu":
        return 16, 32, 4, 1
    return (64, 16, 4, 2) if query.dtype == torch.float32 else (64, 64, 4, 3)


def add_up_tiles(query: Tensor) -> tuple[int, int, int, int, int]:
    """(queries, keys, stored scores that a program takes at one time, warps, stages): few queries, since groups may
    be small, and only so many keys that registers are left for several programs on a multiprocessor.
    """
    if query.device.type == "cpu":
        return 16, 32, 64, 4, 1
    return (16, 64, 2048, 8, 2) if query.dtype == torch.float32 else (16, 128, 2048, 8, 2)
