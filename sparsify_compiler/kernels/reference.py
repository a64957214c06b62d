"""Provider `reference`: the definition of every op in plain torch. Any device, differentiable, slow."""

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def supports(*, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """The reason for a dtype that is no float type, else None: it runs on every device."""
    if dtype not in DTYPES:
        return f"dtype must be one of {', '.join(str(d)[6:] for d in DTYPES)}, got {str(dtype)[6:]}"
    return None
