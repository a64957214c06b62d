"""The ops and their providers."""

from sparsify_compiler.kernels.attention import block_sparse_attention

__all__ = ["block_sparse_attention"]
