"""Training: dynamic sparsity in two stages, distillation to fewer steps and of sparse students, search."""

from sparsify_compiler.training.search import search

__all__ = ["search"]
