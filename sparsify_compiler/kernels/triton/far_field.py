"""Near and far field merged."""

from sparsify_compiler.kernels.reference.far_field import merge

__all__ = ["merge"]
