"""Every shipped configuration of the Triton kernel, compiled for its GPU on a machine that needs none.

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

from sparsify_compiler.kernels import attention  # noqa: E402
from sparsify_compiler.kernels.triton import configs, launcher  # noqa: E402
from sparsify_compiler.kernels.triton.kernel import block_sparse_attention_kernel  # noqa: E402
from sparsify_compiler.table import BlockTable  # noqa: E402

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block of threads may use. The rows of 8.0, which has 163 KB, also serve GPUs with 99 KB."""

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

POINTERS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
"""Triton's names of the types that tensors have."""

HALF = [
    pytest.param(arch, width, config, id=f"sm_{arch}-D{width}-{blocks}")
    for (arch, width), pair in configs.HALF.items()
    for blocks, config in zip(("long", "short"), pair, strict=True)
]
SINGLE = [
    pytest.param(arch, width, config, id=f"sm_{arch}-D{width}")
    for arch in SHARED_MEMORY
    for width, config in configs.SINGLE.items()
]


def compile_launch(
    arch: int,
    head_dim: int,
    config: configs.Config,
    dtype: torch.dtype = torch.bfloat16,
    *,
    ordered: bool = False,
    biased: bool = False,
) -> Any:
    """The compiled kernel of a launch on 2 batches, 32768 tokens, 8 heads."""
    blocks, tokens, heads = 21, 32768, 8

    def index(*shape: int) -> torch.Tensor:
        return torch.empty(1, heads, *shape, dtype=torch.int32, device="meta")

    def tensor() -> torch.Tensor:
        return torch.empty(2, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    table = BlockTable(
        q_bounds=index(blocks + 1),
        kv_bounds=index(blocks + 1),
        kv_num_blocks=index(blocks),
        kv_indices=index(blocks, 16),
        q_order=index(tokens) if ordered else None,
        kv_order=index(tokens) if ordered else None,
    )
    bias = torch.empty(2, 1, tokens, device="meta") if biased else None
    q, k, v = tensor(), tensor(), tensor()
    arguments = launcher.arguments(q, k, v, table, bias, 0.1, *attention.empty_outputs(q, v), config)
    types, constants, hints = {}, {}, {}

    def specialise(path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise((*path, i), item) for i, item in enumerate(value))
        constant = value is None or (isinstance(value, int) and value == 1)
        if constant or block_sparse_attention_kernel.params[path[0]].is_constexpr:
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{POINTERS[value.dtype]}"
        return "fp32" if isinstance(value, float) else "i32"

    for position, name in enumerate(block_sparse_attention_kernel.arg_names):
        types[name] = specialise((position,), arguments[name])
    return triton.compile(
        ASTSource(block_sparse_attention_kernel, types, constants, hints),
        target=GPUTarget("cuda", arch, 32),
        options=launcher.options(table, config),
    )


def assert_fits_and_overlaps(kernel: Any, arch: int, config: configs.Config) -> None:
    """Within shared memory; and copies run ahead of the loop: all stages but one precede it."""
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert kernel.asm["ttgir"].count("async_copy_global_to_local") >= 2 * config.num_stages


def spilled_bytes(kernel: Any, directory: Path) -> int:
    """Local memory of a thread: the kernel has no arrays, so it holds spilled registers."""
    (directory / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", directory / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@pytest.mark.parametrize(
    ("ordered", "biased", "dtype"),
    [
        *((ordered, biased, torch.bfloat16) for ordered in (False, True) for biased in (False, True)),
        (True, True, torch.float16),
    ],
    ids=["plain", "biased", "ordered", "ordered-biased", "ordered-biased-fp16"],
)
@pytest.mark.parametrize(("arch", "width", "config"), HALF)
def test_half_precision(arch, width, config, ordered, biased, dtype, tmp_path):
    kernel = compile_launch(arch, width, config, dtype, ordered=ordered, biased=biased)
    assert_fits_and_overlaps(kernel, arch, config)
    assert TENSOR_CORES[arch] in kernel.asm["ptx"]
    wide = (arch, width) == (100, 256) and ordered and biased
    assert spilled_bytes(kernel, tmp_path) <= (32 if wide else 0)


@pytest.mark.parametrize(("arch", "width", "config"), SINGLE)
def test_single_precision(arch, width, config, tmp_path):
    """No spill; in Triton 3.6, which torch 2.11 brings, a few registers that no tile size saved in both."""
    kernel = compile_launch(arch, width, config, torch.float32)
    assert_fits_and_overlaps(kernel, arch, config)
    assert spilled_bytes(kernel, tmp_path) <= (32 if triton.__version__ < "3.7" else 0)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("head_dim", [48, 72, 80, 96])
def test_head_dims_between_powers_of_two(arch, head_dim):
    config, _ = configs.HALF[arch, 64 if head_dim < 64 else 128]
    kernel = compile_launch(arch, head_dim, config)
    assert_fits_and_overlaps(kernel, arch, config)
    assert TENSOR_CORES[arch] in kernel.asm["ptx"]
