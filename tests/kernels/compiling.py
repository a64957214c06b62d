"""Launches compiled for a GPU on a machine that needs none: what the tests of Triton kernels share.

Compiled is what a launch would compile: its arguments on meta tensors, specialised as Triton does (an integer
of 1 becomes a constant, pointers and multiples of 16 are known to be such).
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparsify_compiler.kernels.triton.launcher import Launch  # noqa: E402

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block of threads may use. What is compiled for 8.0, which has 163 KB, also serves GPUs with 99 KB."""

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "int64": "i64"}
"""Triton's names of the types that tensors have."""


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel as the launch would compile it."""
    types, constants, hints = {}, {}, {}

    def specialise(path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise((*path, i), item) for i, item in enumerate(value))
        constant = value is None or (isinstance(value, int) and value == 1)
        if constant or launch.kernel.params[path[0]].is_constexpr:
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{TYPES[str(value.dtype)[6:]]}"
        return "fp32" if isinstance(value, float) else "i32"

    for position, name in enumerate(launch.kernel.arg_names):
        types[name] = specialise((position,), launch.arguments[name])
    return triton.compile(
        ASTSource(launch.kernel, types, constants, hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def spilled_bytes(kernel: Any, directory: Path) -> int:
    """Local memory of a thread: our kernels have no arrays, so it holds spilled registers."""
    (directory / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", directory / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])
