"""Every Triton kernel of clustering, compiled for GPUs on a machine that needs none. None may spill a register."""

import pytest
import torch
from compiling import SHARED_MEMORY, TENSOR_CORES, compiled, spilled_bytes

from sparsify_compiler.kernels import clustering as ops
from sparsify_compiler.kernels.triton import clustering
from sparsify_compiler.kernels.triton.launcher import Launch


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(head_dim: int, dtype: torch.dtype) -> dict[str, Launch]:
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


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_kernels_that_read_points(arch, head_dim, dtype, tmp_path):
    for name in ("nearest", "means"):
        kernel = compiled(launches(head_dim, dtype)[name], arch)
        assert kernel.metadata.shared <= SHARED_MEMORY[arch]
        assert spilled_bytes(kernel, tmp_path) == 0
        if name == "nearest" and dtype == torch.bfloat16:
            assert TENSOR_CORES[arch] in kernel.asm["ptx"]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("name", "head_dim"), [("rank", 64), ("place", 64), ("scores", 64), ("scores", 128), ("select", 64)]
)
def test_kernels_that_read_labels_and_centroids(arch, name, head_dim, tmp_path):
    kernel = compiled(launches(head_dim, torch.bfloat16)[name], arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert spilled_bytes(kernel, tmp_path) == 0
