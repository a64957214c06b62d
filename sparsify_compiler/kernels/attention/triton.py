"""Attention: the choice of tiles from the shapes, and the launches. Nothing is read back from the device."""

from collections.abc import Iterator

from torch import Tensor

from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.attention.triton_backward import backward
from sparsify_compiler.kernels.attention.triton_kernels import block_sparse_attention_kernel
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import Config
from sparsify_compiler.kernels.triton.launcher import (
    Launch,
    alignment,
    shared_strides,
    stages_through,
    with_shared_strides,
    with_strides,
)
from sparsify_compiler.table import BlockTable

__all__ = ["backward", "forward"]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `attention.block_sparse_attention`. `config`: tiles to use instead of those in `configs`."""
    out, lse = attention.empty_outputs(query, value)
    config = config or configs.choose(query, key, value, table)
    if out.numel():
        for launch in forward_launches(query, key, value, table, key_bias, scale, out, lse, config):
            launch()
    return out, lse


def forward_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    config: Config,
) -> Iterator[Launch]:
    """The launches that fill `out` and `lse`: one for full tiles, then one for each length of tails."""
    batch, heads, tokens, head_dim = query.shape
    q_blocks = table.kv_num_blocks.shape[-1]
    inputs = {
        **with_strides(query=query, key=key, value=value, out=out, lse=lse),
        **with_shared_strides(**table.tensors()),
        "key_bias": key_bias,
        "key_bias_strides": shared_strides(key_bias),
        "q_blocks": q_blocks,
        "queries_per_key_head": heads // key.shape[1],
        "scale": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value.shape[-1],
        "ALIGN": alignment(query, key, value, out),
    }
    lengths = [tiles.block_m for tiles in (config, *config.tails)] + [0]
    for tiles, shorter in zip((config, *config.tails), lengths[1:], strict=True):
        arguments = inputs | {
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "CHUNK": tiles.chunk,
            "TAIL_OF": 0 if tiles is config else config.block_m,
            "LEAST": shorter,
        }
        # The most tiles that a table of these shapes can have; surplus programs end at once.
        programs = tokens // tiles.block_m + q_blocks if tiles is config else q_blocks
        stages = stages_through(table.kv_order, tiles)
        grid = programs, heads, batch
        yield Launch(block_sparse_attention_kernel, grid, arguments, tiles.num_warps, stages)
