"""Attention: tiles chosen from the shapes, then the launch. Nothing is read back from the device."""

from torch import Tensor

from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.backward import backward
from sparsify_compiler.kernels.triton.configs import Config
from sparsify_compiler.kernels.triton.kernel import block_sparse_attention_kernel
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
    """See `attention.block_sparse_attention`. `config`: other tiles than the shipped ones."""
    out, lse = attention.empty_outputs(query, value)
    config = config or configs.choose(query, key, value, table)
    if out.numel():
        forward_launch(query, key, value, table, key_bias, scale, out, lse, config)()
    return out, lse


def forward_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    config: Config,
) -> Launch:
    """Fills `out` and `lse`."""
    batch, heads, tokens, head_dim = query.shape
    q_blocks = table.kv_num_blocks.shape[-1]
    arguments = {
        **with_strides(query=query, key=key, value=value, out=out, lse=lse),
        **with_shared_strides(**table.tensors()),
        "key_bias": key_bias,
        "key_bias_strides": shared_strides(key_bias),
        "q_blocks": q_blocks,
        "queries_per_key_head": heads // key.shape[1],
        "scale": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value.shape[-1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNK": config.chunk,
        "ALIGN": alignment(query, key, value, out),
    }
    # No table of these shapes has more tiles; those it has not end at once.
    grid = tokens // config.block_m + q_blocks, heads, batch
    stages = stages_through(table.kv_order, config)
    return Launch(block_sparse_attention_kernel, grid, arguments, config.num_warps, stages)
