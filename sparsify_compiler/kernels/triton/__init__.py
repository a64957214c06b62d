"""Provider `triton`: the fast kernel on NVIDIA GPUs from Ampere on, also in Triton's interpreter on the CPU.

This file imports torch alone; Triton is imported when it is first asked for.
"""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_HEAD = 256


def supports(*, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """The reason the kernel cannot run on tensors like these, or None. The CPU has it interpreted only."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device == "cpu" and not triton.knobs.runtime.interpret:
        return "on the CPU it runs in Triton's interpreter alone: set TRITON_INTERPRET=1 before Python starts"
    if device not in ("cpu", "cuda"):
        return f"device must be cuda, got {device}"
    if device == "cuda" and torch.cuda.is_available():
        if torch.version.hip:
            return "its tiles are chosen for NVIDIA GPUs, this one is AMD's"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"needs compute capability 8.0, {torch.cuda.get_device_name()} has less"
    if dtype not in DTYPES:
        return f"dtype must be one of {', '.join(str(d)[6:] for d in DTYPES)}, got {str(dtype)[6:]}"
    if max(head_dim, value_dim) > WIDEST_HEAD:
        return f"head dim must be at most {WIDEST_HEAD}, got {max(head_dim, value_dim)}"
    return None
