"""Attention: tiles chosen from the shapes, then the launch."""

from torch import Tensor

from sparsify_compiler.kernels.reference.attention import backward
from sparsify_compiler.kernels.triton import configs, launcher
from sparsify_compiler.table import BlockTable

__all__ = ["backward", "forward"]


def forward(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_sparse_attention`. Reads nothing back from the device, so CUDA graphs can capture it."""
    return launcher.launch(
        query, key, value, table, key_bias, scale, config=configs.choose(query, key, value, table)
    )
