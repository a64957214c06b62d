"""Prediction: the launches of the kernels in `triton_kernels.py`. Nothing is read back from the device."""

from typing import Any

import torch
import triton
from torch import Tensor

from sparsify_compiler.kernels.prediction import empty_top_k
from sparsify_compiler.kernels.prediction import triton_kernels as kernels
from sparsify_compiler.kernels.triton.launcher import Launch, alignment, shared_strides, with_strides

SCORES_AT_ONCE = 2**25
"""Number of scores stored at one time for groups of several queries, 128 MiB; four groups are always stored."""


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
    groups, q_bounds = counts.shape[2], q_bounds.contiguous()
    scores = empty_scores(query, key, groups)
    for first in range(0, groups, scores.shape[2]):
        some = slice(first, first + scores.shape[2])
        rows = scores[:, :, : groups - first]
        add_up(inputs, highest, part, q_bounds[first:], rows)()
        choose_stored(rows, inputs, counts[:, :, some], indices[:, :, some])()
    return counts, indices


def empty_scores(query: Tensor, key: Tensor, groups: int) -> Tensor:
    """[B, H, groups stored at a time, S rounded up to whole tiles] fp32, uninitialised.

    All groups are stored or a multiple of four, so that the pointers to all have the same alignment and need only
    one compilation.
    """
    batch, heads = query.shape[:2]
    tile = add_up_tiles(query)[1]
    room = triton.cdiv(key.shape[2], tile) * tile
    fours = max(1, SCORES_AT_ONCE // (4 * max(1, batch * heads) * room))
    return query.new_empty(batch, heads, max(1, min(groups, 4 * fours)), room, dtype=torch.float32)


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
    arguments = {
        **inputs,
        **with_strides(kv_num_blocks=counts, kv_indices=indices),
        "groups": groups,
        "most": min(indices.shape[3], inputs["tokens"]),
        **{"BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    grid = (triton.cdiv(groups, block_m), heads, batch)
    return Launch(kernels.top_k_kernel, grid, arguments, num_warps, num_stages)


def choose_stored(scores: Tensor, inputs: dict[str, Any], counts: Tensor, indices: Tensor) -> Launch:
    """The launch that does the same as `choose`, from rows of scores."""
    batch, heads, groups, room = scores.shape
    block_m, block_n, num_warps, num_stages = stored_tiles(scores)
    arguments = {
        **inputs,
        **with_strides(query=scores, kv_num_blocks=counts, kv_indices=indices),
        **{"key": None, "key_bias": None, "RANK": None},
        "groups": groups,
        "tokens": room,
        "most": min(indices.shape[3], inputs["tokens"]),
        **{"BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    grid = (triton.cdiv(groups, block_m), heads, batch)
    return Launch(kernels.top_k_kernel, grid, arguments, num_warps, num_stages)


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


def add_up(inputs: dict[str, Any], highest: Tensor, part: Tensor, q_bounds: Tensor, scores: Tensor) -> Launch:
    """The launch that fills `scores` of the first groups of `q_bounds`, except for heads that select nothing."""
    batch, heads, groups, room = scores.shape
    block_m, block_n, num_warps, num_stages = add_up_tiles(inputs["query"])
    arguments = {
        **inputs,
        **with_strides(highest=highest, part=part, scores=scores),
        **{"q_bounds": q_bounds, "BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    grid = (groups * (room // block_n), heads, batch)
    return Launch(kernels.add_up_kernel, grid, arguments, num_warps, num_stages)


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


def stored_tiles(scores: Tensor) -> tuple[int, int, int, int]:
    """Tiles of one row, so that a few groups keep every multiprocessor busy, with many warps, so that a
    multiprocessor has few rows and its L1 cache may hold them from pass to pass.
    """
    return (8, 32, 4, 1) if scores.device.type == "cpu" else (1, 4096, 32, 2)


def softmax_tiles(query: Tensor) -> tuple[int, int, int, int]:
    """Tiles of `softmax_kernel`, with many keys: it reduces every tile over its keys, so fewer tiles cost less."""
    if query.device.type == "cpu":
        return 16, 32, 4, 1
    return (64, 16, 4, 2) if query.dtype == torch.float32 else (64, 64, 4, 3)


def add_up_tiles(query: Tensor) -> tuple[int, int, int, int]:
    """Tiles of `add_up_kernel`: few rows, since groups may be small, and only so many keys that registers are
    left for five programs of four warps on a multiprocessor.
    """
    if query.device.type == "cpu":
        return 16, 32, 4, 1
    return (16, 64, 8, 2) if query.dtype == torch.float32 else (16, 128, 4, 2)
