"""The machine in words, for every measured figure; and bfloat16 products that are fast on every CPU."""

import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sparsify_compiler._torch import multiplies_bfloat16
from sparsify_compiler.runtime.rates import cpu_model


def machine() -> dict[str, Any]:
    """The machine and software of a measurement."""
    described = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # mean of one minute: other work on the machine
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fast_products": "bfloat16" if multiplies_bfloat16() else "float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def fast_products() -> torch.autocast:
    """Inside, products of matrices are in bfloat16; in float32 on CPUs without instructions for bfloat16."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16())


def bfloat16_products() -> AbstractContextManager[object]:
    """Inside, uncompiled products of bfloat16 matrices take a reasonable time on every CPU."""
    return nullcontext() if multiplies_bfloat16() else Widened()


class Widened(TorchDispatchMode):
    """Mode that computes uncompiled products and attention of bfloat16 tensors in float32, and rounds."""

    PRODUCTS = (
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten.baddbmm,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in self.PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        result = func(*wide_args, **wide_kwargs)
        if isinstance(result, Tensor):
            return result.bfloat16()
        return result[0].bfloat16(), *result[1:]  # attention's second result, the lse, is float32 already


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def origin() -> dict[str, Any]:
    """Command, date and machine of a result of the command line."""
    return {
        "command": " ".join(["sparsify", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }
