"""Clustering on the CPU: the definition in plain torch."""

from sparsify_compiler.kernels.reference.clustering import kmeans, sort_by_label, top_p_blocks

__all__ = ["kmeans", "sort_by_label", "top_p_blocks"]
