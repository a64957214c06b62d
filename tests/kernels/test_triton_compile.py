"""Every shipped configuration of the Triton kernel, compiled for its GPU on a machine that needs none."""

from typing import Any

import pytest
import torch
from compiling import SHARED_MEMORY, TENSOR_CORES, compiled, spilled_bytes, triton

from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.attention import forward_launch
from sparsify_compiler.table import BlockTable

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
    return compiled(forward_launch(q, k, v, table, bias, 0.1, *attention.empty_outputs(q, v), config), arch)


def assert_fits_and_overlaps(kernel: Any, arch: int, config: configs.Config) -> None:
    """Within shared memory; and copies run ahead of the loop: all stages but one precede it."""
    assert kernel.metadata.shared <= SHARED_MEMORY[arch]
    assert kernel.asm["ttgir"].count("async_copy_global_to_local") >= 2 * config.num_stages


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
