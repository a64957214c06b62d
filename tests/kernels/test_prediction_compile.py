"""The Triton kernels of prediction, compiled for GPUs on a machine that needs none. They may spill no register."""

import pytest
import torch
from compiling import SHARED_MEMORY, TENSOR_CORES, compiled, spilled_bytes

from sparsify_compiler.kernels.prediction import empty_top_k
from sparsify_compiler.kernels.triton import prediction
from sparsify_compiler.kernels.triton.launcher import Launch


def tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(rank: int, dtype: torch.dtype, hides: bool) -> dict[str, Launch]:
    """2 batches, 40 heads, 2048 groups, 32768 keys."""
    query, key = (tensor(2, 40, count, rank, dtype=dtype) for count in (2048, 32768))
    bias = tensor(2, 1, 32768, dtype=dtype) if hides else None
    inputs = prediction.scored(query, key, tensor(1, 40, dtype=torch.int32), bias, 0.25)
    highest, part = (tensor(2, 40, 2048, dtype=torch.float32) for _ in range(2))
    bounds = tensor(129, dtype=torch.int32)
    scores = prediction.empty_scores(query, key, 128)
    return {
        "choose": prediction.choose(inputs, *empty_top_k(query, None, 4096)),
        "softmax": prediction.softmax(inputs, highest, part),
        "add_up": prediction.add_up(inputs, highest, part, bounds, scores),
        "choose_stored": prediction.choose_stored(scores, inputs, *empty_top_k(query, bounds, 4096)),
    }


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(
    ("rank", "dtype", "hides"),
    [
        (16, torch.bfloat16, True),
        (128, torch.bfloat16, False),
        (64, torch.float32, True),
        (128, torch.float32, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["choose", "softmax", "add_up"])
def test_nothing_is_spilled(arch, rank, dtype, hides, name, tmp_path):
    kernel = compiled(launches(rank, dtype, hides)[name], arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert spilled_bytes(kernel, tmp_path) == 0
    if dtype == torch.bfloat16:
        assert TENSOR_CORES[arch] in kernel.asm["ptx"]


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_nothing_is_spilled_where_scores_are_stored(arch, tmp_path):
    kernel = compiled(launches(16, torch.bfloat16, hides=True)["choose_stored"], arch)
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert spilled_bytes(kernel, tmp_path) == 0
    assert "ld.global.v4" in kernel.asm["ptx"]
