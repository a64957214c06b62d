"""The Triton kernels of the backward pass with the shipped tiles, compiled for GPUs on a machine that needs none.

Compiled with orders and a key bias, which take the most registers.
"""

import re
from typing import Any

import pytest
import torch
from compiling import SHARED_MEMORY, TENSOR_CORES, compiled, spilled_bytes

from sparsify_compiler.kernels.triton import backward
from sparsify_compiler.kernels.triton.configs import (
    BACKWARD_HALF,
    BACKWARD_SINGLE,
    WORD,
    BackwardConfig,
    Config,
)
from sparsify_compiler.kernels.triton.launcher import Launch
from sparsify_compiler.table import BlockTable

BATCH, HEADS, TOKENS = 2, 8, 32768

# Short blocks are cut up at 64 as at 128 but on 10.0, and take half the registers.
HALF = [
    pytest.param(way, arch, width, torch.bfloat16, id=f"{way}-sm_{arch}-D{width}")
    for arch, width in BACKWARD_HALF
    for way in ("queries", "scattered", "by block", "grouped")
    if width == 128 or (width == 64 and (arch == 100 or way in ("queries", "by block")))
]
OTHERS = [
    *(
        pytest.param(way, 90, 256, torch.bfloat16, id=f"{way}-sm_90-D256")
        for way in ("scattered", "by block")
    ),
    *(
        pytest.param(way, 80, 128, torch.float32, id=f"{way}-sm_80-D128-fp32")
        for way in ("scattered", "grouped")
    ),
]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(*shape: int) -> torch.Tensor:
    return tensor(1, HEADS, *shape, dtype=torch.int32)


def table_of(kv_blocks: int) -> BlockTable:
    return BlockTable(
        q_bounds=index(22),
        kv_bounds=index(kv_blocks + 1),
        kv_num_blocks=index(21),
        kv_indices=index(21, 16),
        q_order=index(TOKENS),
        kv_order=index(TOKENS),
    )


def launches(head_dim: int, dtype: torch.dtype, config: BackwardConfig) -> dict[str, Launch]:
    """What a backward pass launches, by name of the kernel."""
    q, k, v, out, d_out = (
        tensor(BATCH, TOKENS, HEADS, head_dim, dtype=dtype).transpose(1, 2) for _ in range(5)
    )
    lse, bias = tensor(BATCH, HEADS, TOKENS), tensor(BATCH, 1, TOKENS)
    rows = backward.empty_rows(q)
    table = table_of(21 if config.group == 1 else TOKENS)
    readers = tensor(1, HEADS, -(-table.kv_bounds.shape[-1] // WORD), 21, dtype=torch.int64)
    d_query, d_key, d_value = (tensor(BATCH, HEADS, TOKENS, head_dim, dtype=dtype) for _ in range(3))
    sums = (None, None) if config.keys else (d_key.float(), d_value.float())
    inputs = q, k, v, d_out, table
    found = {
        "rows": backward.rows_launch(q, k, out, d_out, lse, lse, table, bias, 0.1, *rows, config),
        "queries": backward.queries_launch(*inputs, bias, 0.1, *rows, d_query, *sums, config),
        "readers": backward.readers_launch(table, readers),
    }
    if config.keys:
        found["keys"] = backward.keys_launch(*inputs, readers, bias, 0.1, *rows, d_key, d_value, config)
    return found


def launch_of(way: str, arch: int, head_dim: int, dtype: torch.dtype) -> tuple[Launch, Config]:
    """The launch that a way rests on, and its tiles."""
    if dtype == torch.float32:
        queries = keys = (BACKWARD_SINGLE[head_dim],) * 2
    else:
        queries, keys = BACKWARD_HALF[arch, 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256]
    kernel, config = {
        "queries": ("queries", BackwardConfig(queries[0], keys[0])),
        "scattered": ("queries", BackwardConfig(queries[1], None)),
        "by block": ("keys", BackwardConfig(queries[0], keys[0])),
        "grouped": ("keys", BackwardConfig(queries[1], keys[1], WORD)),
    }[way]
    tiles = config.keys if kernel == "keys" and config.keys else config.queries
    return launches(head_dim, dtype, config)[kernel], tiles


def float_atomics(kernel: Any) -> list[str]:
    """Those on global memory; integers are counted by atomics on shared memory."""
    return re.findall(r"\b(?:red|atom)\.global.*", kernel.asm["ptx"])


@pytest.mark.parametrize(("way", "arch", "width", "dtype"), [*HALF, *OTHERS])
def test_shipped_tiles(way, arch, width, dtype, tmp_path):
    """They fit into shared memory, do not spill, copy ahead of the loop, and add with atomics where asked to."""
    launch, tiles = launch_of(way, arch, width, dtype)
    kernel = compiled(launch, arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert kernel.asm["ttgir"].count("async_copy_global_to_local") >= 2 * tiles.num_stages
    assert bool(float_atomics(kernel)) == (way == "scattered")
    assert spilled_bytes(kernel, tmp_path) == 0
    if dtype != torch.float32:
        assert (TENSOR_CORES[arch] if width < 256 else "mma.sync") in kernel.asm["ptx"]


@pytest.mark.parametrize(("arch", "head_dim"), [(80, 48), (90, 72)])
def test_head_dims_between_powers_of_two(arch, head_dim, tmp_path):
    launch, _ = launch_of("by block", arch, head_dim, torch.bfloat16)
    kernel = compiled(launch, arch)
    assert TENSOR_CORES[arch] in kernel.asm["ptx"]
    assert spilled_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize(("name", "arch"), [("rows", 80), ("rows", 90), ("rows", 100), ("readers", 90)])
def test_what_comes_before(name, arch, tmp_path):
    queries, keys = BACKWARD_HALF[arch, 128]
    kernel = compiled(launches(128, torch.bfloat16, BackwardConfig(queries[0], keys[0]))[name], arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert spilled_bytes(kernel, tmp_path) == 0
