"""The Triton kernels of the far field, compiled for GPUs on a machine that needs none: none spills."""

import pytest
import torch
from compiling import SHARED_MEMORY, compiled, spilled_bytes

from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.statistics import empty_means, empty_statistics
from sparsify_compiler.kernels.triton.far_field import merge_launch
from sparsify_compiler.kernels.triton.launcher import Launch
from sparsify_compiler.kernels.triton.statistics import means_launch, statistics_launch

BATCH, HEADS, TOKENS, BLOCKS = 2, 8, 32768, 21


def index(*shape: int) -> torch.Tensor:
    return torch.empty(1, HEADS, *shape, dtype=torch.int32, device="meta")


def tensor(head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(BATCH, TOKENS, HEADS, head_dim, dtype=dtype, device="meta").transpose(1, 2)


def means(head_dim: int, dtype: torch.dtype, order: torch.Tensor | None) -> Launch:
    tokens = tensor(head_dim, dtype)
    return means_launch(tokens, index(BLOCKS + 1), order, *empty_means(tokens, index(BLOCKS + 1)))


def statistics(head_dim: int, dtype: torch.dtype, order: torch.Tensor | None) -> Launch:
    key = tensor(head_dim, dtype)
    bias = None if order is None else torch.empty(BATCH, 1, TOKENS, device="meta")
    bounds = index(BLOCKS + 1)
    found = empty_statistics(key, key, bounds, order, bias, True)
    return statistics_launch(key, key, bounds, order, bias, found)


def merge(head_dim: int, dtype: torch.dtype, order: torch.Tensor | None) -> Launch:
    query = tensor(head_dim, dtype)
    out, lse = empty_outputs(query, query)
    matrices = torch.empty(BATCH, HEADS, BLOCKS, head_dim, head_dim, device="meta")
    return merge_launch(
        *(query, out, lse, out, lse, matrices, matrices[..., 0], index(BLOCKS + 1), order, 0.1, out, lse)
    )


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("launch_of", [means, statistics, merge])
def test_fits_without_spilling(launch_of, arch, head_dim, dtype, ordered, tmp_path):
    kernel = compiled(launch_of(head_dim, dtype, index(TOKENS) if ordered else None), arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    # With orders, a few are set aside round the loop.
    assert spilled_bytes(kernel, tmp_path) <= (16 if ordered else 0)
