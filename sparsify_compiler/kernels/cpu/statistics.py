"""The statistics of blocks."""

from sparsify_compiler.kernels.reference.statistics import block_means, block_statistics

__all__ = ["block_means", "block_statistics"]
