"""The Triton kernel of prediction, compiled for GPUs on a machine that needs none. It may not spill a register."""

import pytest
import torch
from compiling import SHARED_MEMORY, TENSOR_CORES, compiled, spilled_bytes

from sparsify_compiler.kernels.prediction import empty_top_k
from sparsify_compiler.kernels.triton import prediction
from sparsify_compiler.kernels.triton.launcher import Launch


def launch(rank: int, dtype: torch.dtype, hides: bool) -> Launch:
    """2 batches, 40 heads, 2048 groups, 32768 keys."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key = tensor(2, 40, 2048, rank), tensor(2, 40, 32768, rank)
    bias = tensor(2, 1, 32768) if hides else None
    budget = tensor(1, 40, dtype=torch.int32)
    return prediction.choose(query, key, budget, bias, 0.25, *empty_top_k(query, 4096))


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("rank", "dtype", "hides"),
    [(16, torch.bfloat16, True), (128, torch.bfloat16, False), (64, torch.float32, True)],
    ids=str,
)
def test_nothing_is_spilled(arch, rank, dtype, hides, tmp_path):
    kernel = compiled(launch(rank, dtype, hides), arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert spilled_bytes(kernel, tmp_path) == 0
    if dtype == torch.bfloat16:
        assert TENSOR_CORES[arch] in kernel.asm["ptx"]
