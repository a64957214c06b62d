"""Provider `triton`: the fast kernels on NVIDIA GPUs from Ampere on; on the CPU they run in Triton's interpreter.

This file imports only torch. Triton is imported when `supports` is first called.
"""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 256


def supports(*, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """The reason why the kernels cannot run on tensors of this type and size, or None."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device == "cpu" and not triton.knobs.runtime.interpret:
        return "on the CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    if device not in ("cpu", "cuda"):
        return f"device must be cuda, got {device}"
    if device == "cuda" and torch.cuda.is_available():
        if torch.version.hip:
            return "its tiles are for NVIDIA GPUs, and this is an AMD GPU"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name()} has less"
    if dtype not in DTYPES:
        return f"dtype must be one of {', '.join(str(d)[6:] for d in DTYPES)}, got {str(dtype)[6:]}"
    if max(head_dim, value_dim) > WIDEST_HEAD:
        return f"head dim must be at most {WIDEST_HEAD}, got {max(head_dim, value_dim)}"
    return None
