"""Every Triton kernel of clustering, compiled for GPUs on a machine that needs none. None may spill a register."""

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

from sparsify_compiler.kernels import clustering as ops  # noqa: E402
from sparsify_compiler.kernels.triton import clustering  # noqa: E402

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block of threads may use. What is compiled for 8.0, which has 163 KB, also serves GPUs with 99 KB."""

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32"}


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(head_dim: int, dtype: torch.dtype) -> dict[str, clustering.Launch]:
    """What a step on 2 batches, 32768 tokens, 40 heads launches."""
    batch, heads, tokens, q_clusters, clusters = 2, 40, 32768, 300, 1000
    integers = torch.int32
    points = tensor(batch, tokens, heads, head_dim, dtype=dtype).transpose(1, 2)
    centroids, labels = ops.empty_kmeans(points, tensor(batch, heads, clusters, head_dim))
    order, bounds = ops.empty_sort(labels, clusters)
    counts = tensor(batch, heads, clusters, tokens // clustering.TILE, dtype=integers)
    q_centroids = tensor(batch, heads, q_clusters, head_dim)
    selected = ops.empty_top_p(q_centroids, centroids)
    products = tensor(*selected[1].shape)
    sizes = tensor(1, 1, clusters, dtype=integers).expand(batch, heads, -1)
    return {
        "nearest": clustering.nearest(points, centroids.to(dtype), tensor(batch, heads, clusters), labels),
        "rank": clustering.rank(labels, labels, counts),
        "place": clustering.place(labels, labels, counts, bounds, order),
        "means": clustering.move_to_means(points, order, bounds, centroids),
        "scores": clustering.scores(q_centroids, centroids, products),
        "select": clustering.select(products, sizes, *selected, 0.1, 0.9, 1),
    }


def compiled(launch: clustering.Launch, arch: int) -> Any:
    """What the launch would compile: an integer of 1 is a constant, multiples of 16 are known to be such."""
    types, constants, hints = {}, {}, {}

    def specialise(path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise((*path, i), item) for i, item in enumerate(value))
        if (isinstance(value, int) and value == 1) or launch.kernel.params[path[0]].is_constexpr:
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[str(value.dtype)[6:]]
        return "fp32" if isinstance(value, float) else "i32"

    for position, name in enumerate(launch.kernel.arg_names):
        types[name] = specialise((position,), launch.arguments[name])
    return triton.compile(
        ASTSource(launch.kernel, types, constants, hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def resources(kernel: Any, directory: Path) -> dict[str, int]:
    """Registers of a thread (REG), and its local memory (STACK), which holds what was spilled."""
    (directory / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", directory / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", usage)}


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_that_read_points(arch, head_dim, dtype, tmp_path):
    for name in ("nearest", "means"):
        kernel = compiled(launches(head_dim, dtype)[name], arch)
        assert kernel.metadata.shared <= SHARED_MEMORY[arch]
        assert resources(kernel, tmp_path)["STACK"] == 0
        if name == "nearest" and dtype == torch.bfloat16:
            assert TENSOR_CORES[arch] in kernel.asm["ptx"]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("name", "head_dim"), [("rank", 64), ("place", 64), ("scores", 64), ("scores", 128), ("select", 64)]
)
def test_kernels_that_read_labels_and_centroids(arch, name, head_dim, tmp_path):
    kernel = compiled(launches(head_dim, torch.bfloat16)[name], arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert resources(kernel, tmp_path)["STACK"] == 0
