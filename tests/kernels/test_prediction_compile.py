"""The Triton kernel of prediction, compiled for GPUs on a machine that needs none. It may not spill a register."""

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

from sparsify_compiler.kernels.prediction import empty_top_k  # noqa: E402
from sparsify_compiler.kernels.triton import prediction  # noqa: E402
from sparsify_compiler.kernels.triton.statistics import Launch  # noqa: E402

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block of threads may use. What is compiled for 8.0, which has 163 KB, also serves GPUs with 99 KB."""

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TYPES = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32"}


def launch(rank: int, dtype: torch.dtype, hides: bool) -> Launch:
    """2 batches, 40 heads, 2048 groups, 32768 keys."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key = tensor(2, 40, 2048, rank), tensor(2, 40, 32768, rank)
    bias = tensor(2, 1, 32768) if hides else None
    budget = tensor(1, 40, dtype=torch.int32)
    return prediction.choose(query, key, budget, bias, 0.25, *empty_top_k(query, 4096))


def compiled(launch: Launch, arch: int) -> Any:
    """As Triton would compile it: 1 is a constant, pointers and multiples of 16 are known to be such."""
    kernel, types, constants, hints = launch.kernel, {}, {}, {}

    def specialise(path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise((*path, i), item) for i, item in enumerate(value))
        constant = value is None or (isinstance(value, int) and value == 1)
        if constant or kernel.params[path[0]].is_constexpr:
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[str(value.dtype)[6:]]
        return "fp32" if isinstance(value, float) else "i32"

    for position, name in enumerate(kernel.arg_names):
        types[name] = specialise((position,), launch.arguments[name])
    return triton.compile(
        ASTSource(kernel, types, constants, hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("rank", "dtype", "hides"),
    [(16, torch.bfloat16, True), (128, torch.bfloat16, False), (16, torch.float32, True)],
    ids=str,
)
def test_nothing_is_spilled(arch, rank, dtype, hides, tmp_path: Path):
    kernel = compiled(launch(rank, dtype, hides), arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(re.findall(r"REG:\d+|STACK:\d+", usage), kernel.metadata.shared)
    assert re.findall(r"STACK:(\d+)", usage) == ["0"]
    if dtype == torch.bfloat16:
        assert TENSOR_CORES[arch] in kernel.asm["ptx"]
