"""Tile sizes of the Triton kernels: tables by GPU and head dim, and the choice from them.

The tests compile every row for its GPU, with and without orders and a key bias. GPUs of compute capability 8.6, 8.9
and 12.0 use the rows of 8.0, which fit their 99 KB of shared memory.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.table import BlockTable

SHORT_QUERIES = 96
"""Query blocks with a smaller mean length would leave much of a tile of 128 empty."""

SHORT_KEYS = 16
"""Key blocks with a smaller mean length: many must be laid end to end to fill a few tiles."""


@dataclass(frozen=True, slots=True)
class Config:
    """The tiles of one launch."""

    block_m: int
    """Queries in a tile."""
    block_n: int
    """Keys in a tile."""
    chunk: int
    """Number of listed key blocks laid end to end at a time, a power of two."""
    num_warps: int
    num_stages: int
    """Key tiles in shared memory at a time: one in use, the others being copied."""
    tails: tuple["Config", ...] = ()
    """Shorter tiles, of falling length, for the queries of a block that the full tiles leave."""


WORD = 64
"""Key blocks in a word of the table's transpose."""


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """The tiles of a backward pass."""

    queries: Config
    """Tiles of `queries_kernel`."""
    keys: Config | None
    """Tiles of `keys_kernel`, in which `chunk` counts query blocks; None if `queries_kernel` adds to dK and dV."""
    group: int = 1
    """Number of key blocks that share tiles of keys, 1 or WORD."""


# (compute capability, widest head dim): tiles for long blocks, tiles for short blocks. fp16 and bf16.
# Long blocks are laid end to end 32 at a time: that many fit a warp, and a block that ends within a tile costs
# fewer barriers. At (100, 128) it is 16, since 32 would spill with orders and a key bias.
_LAST = Config(32, 128, 32, 4, 2)
HALF = {
    (80, 64): (
        Config(128, 128, 32, 8, 2, tails=(Config(64, 128, 32, 4, 2), _LAST)),
        Config(64, 64, 128, 4, 4),
    ),
    (80, 128): (
        Config(128, 64, 32, 8, 3, tails=(Config(64, 64, 32, 4, 2), _LAST)),
        Config(64, 64, 256, 8, 3),
    ),
    (80, 256): (Config(64, 32, 32, 8, 2), Config(64, 32, 256, 8, 2)),
    (90, 64): (
        Config(128, 128, 32, 8, 3, tails=(Config(64, 128, 32, 4, 3), _LAST)),
        Config(64, 64, 256, 4, 3),
    ),
    (90, 128): (
        Config(128, 128, 32, 8, 2, tails=(Config(64, 64, 32, 4, 2), _LAST)),
        Config(64, 64, 128, 4, 3),
    ),
    (90, 256): (
        Config(128, 32, 32, 8, 2, tails=(Config(64, 64, 32, 8, 2), Config(32, 64, 32, 4, 2))),
        Config(64, 32, 256, 8, 2),
    ),
    (100, 64): (
        Config(128, 64, 32, 8, 3, tails=(Config(64, 64, 32, 4, 3), _LAST)),
        Config(64, 64, 256, 4, 3),
    ),
    (100, 128): (
        Config(128, 64, 16, 8, 2, tails=(Config(64, 64, 16, 4, 2), _LAST)),
        Config(64, 64, 256, 8, 3),
    ),
    (100, 256): (Config(64, 32, 32, 8, 2), Config(64, 16, 256, 8, 2)),
}

# Widest head dim: tiles, the same for all GPUs. fp32 is multiplied in full, without tensor cores: TF32 misses
# fp32's tolerance, and three TF32 products instead of one turn an infinite value into NaN.
SINGLE = {
    64: Config(64, 32, 256, 8, 2),
    128: Config(32, 32, 256, 8, 3),
    256: Config(16, 32, 256, 8, 2),
}

# Small, so that small tests have many tiles.
INTERPRETED = Config(32, 32, 16, 4, 1, tails=(Config(16, 32, 16, 4, 1),))

# (compute capability, widest head dim): (tiles of `queries_kernel` for long and for short blocks, the same for
# `keys_kernel`). fp16 and bf16. None has been timed yet. They overlap copies with work and do not spill, with or
# without orders and a key bias, except 8 bytes without them at (80, 64) and (80, 128) in Triton 3.6.
_LONG, _SHORT = Config(128, 64, 32, 8, 2), Config(64, 32, 256, 8, 2)
_LONG_KEYS, _SHORT_KEYS = Config(64, 64, 32, 8, 2), Config(32, 64, 256, 8, 2)
_WIDE, _SHORT_WIDE = Config(32, 32, 32, 8, 2), Config(32, 32, 256, 8, 2)
BACKWARD_HALF = {
    (80, 64): ((Config(128, 32, 32, 8, 2), _SHORT), (Config(32, 128, 32, 8, 2), _SHORT_KEYS)),
    (90, 64): ((_LONG, _SHORT), (Config(64, 128, 32, 8, 2), _SHORT_KEYS)),
    (100, 64): ((_LONG, Config(64, 32, 256, 4, 2)), (Config(64, 128, 32, 8, 2), _SHORT_KEYS)),
    **{(arch, 128): ((_LONG, _SHORT), (_LONG_KEYS, _SHORT_KEYS)) for arch in (80, 90, 100)},
    **{(arch, 256): ((_WIDE, _SHORT_WIDE), (_WIDE, _SHORT_WIDE)) for arch in (80, 90, 100)},
}

# Widest head dim: tiles of both kernels for blocks of any size. fp32. At most 32 bytes spill, in Triton 3.6 and
# 3.7; with 4 warps at 64, 3.6 would spill 600.
BACKWARD_SINGLE = {
    64: Config(32, 32, 128, 8, 2),
    128: Config(16, 32, 128, 8, 2),
    256: Config(16, 16, 128, 8, 2),
}


def choose(query: Tensor, key: Tensor, value: Tensor, table: BlockTable) -> Config:
    """The tiles for these tensors, from their shapes only: nothing is read from the device."""
    if query.device.type == "cpu":
        return INTERPRETED
    widest = width(max(query.shape[-1], value.shape[-1]))
    if query.dtype == torch.float32:
        return SINGLE[widest]
    q_blocks, kv_blocks = table.q_bounds.shape[-1] - 1, table.kv_bounds.shape[-1] - 1
    short = query.shape[2] < SHORT_QUERIES * q_blocks or key.shape[2] < SHORT_KEYS * kv_blocks
    return HALF[architecture(query.device), widest][short]


def choose_backward(query: Tensor, key: Tensor, value: Tensor, table: BlockTable) -> BackwardConfig:
    """The tiles for the backward pass; they also depend on `torch.are_deterministic_algorithms_enabled()`."""
    widest = width(max(query.shape[-1], value.shape[-1]))
    if query.device.type == "cpu":
        queries = keys = INTERPRETED, INTERPRETED
    elif query.dtype == torch.float32:
        queries = keys = BACKWARD_SINGLE[widest], BACKWARD_SINGLE[widest]
    else:
        queries, keys = BACKWARD_HALF[architecture(query.device), widest]
    q_blocks, kv_blocks = table.q_bounds.shape[-1] - 1, table.kv_bounds.shape[-1] - 1
    if 2 * key.shape[2] >= keys[0].block_n * kv_blocks:  # they fill half of a tile on average
        return BackwardConfig(queries[query.shape[2] < SHORT_QUERIES * q_blocks], keys[0])
    if torch.are_deterministic_algorithms_enabled():
        return BackwardConfig(queries[1], keys[1], WORD)
    return BackwardConfig(queries[1], None)


def width(head_dim: int) -> int:
    """The widest head dim of the row of the tables for this head dim."""
    return next(w for w in (64, 128, 256) if head_dim <= w)


@functools.cache
def architecture(device: torch.device) -> int:
    """The row of the tables for a GPU."""
    return row(torch.cuda.get_device_capability(device)[0])


def row(major: int) -> int:
    """The row of the tables for a GPU, from the first number of its compute capability."""
    return {9: 90, 10: 100, 11: 100}.get(major, 80)
