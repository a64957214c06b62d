"""The attention op and its providers."""

from sparsify_compiler.kernels.ops import block_sparse_attention

__all__ = ["block_sparse_attention"]
