"""Provider `cpu`: C++ kernels, built on first use with the machine's compiler; without a compiler, torch calls."""

import torch

from sparsify_compiler.kernels.cpu import library


def supports(*, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """The reason why the kernel cannot run, or None. It supports all head dimensions."""
    if device != "cpu":
        return f"device must be cpu, got {device}"
    if dtype not in library.DTYPES:
        return f"dtype must be one of {', '.join(str(d)[6:] for d in library.DTYPES)}, got {str(dtype)[6:]}"
    return None
