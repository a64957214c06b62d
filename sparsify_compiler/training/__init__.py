"""Training: dynamic sparsity in two stages, fewer steps, students held to their teachers, layer-wise search."""

from sparsify_compiler.training.search import search

__all__ = ["search"]
