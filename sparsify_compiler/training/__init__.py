"""Training: dynamic sparsity in two stages, and the layer-wise search for a policy."""

from sparsify_compiler.training.search import search

__all__ = ["search"]
