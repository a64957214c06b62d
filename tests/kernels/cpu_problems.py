"""What the attention kernels of provider `cpu` are asked to compute, and a build of them for a lesser CPU."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.strategies import key_biases, qkv, tables

DTYPES = library.DTYPES
HEAD_DIMS = (16, 48, 64, 72, 80, 96, 128, 256)
CPUINFO = Path("/proc/cpuinfo")


def symbol_without_amx(name: str, *structures: type[ctypes.Structure]) -> Callable[..., None]:
    """`library.symbol`, of the library as built for a CPU that lacks AMX."""
    if not CPUINFO.exists() or "amx_bf16" not in CPUINFO.read_text():
        pytest.skip("every build is without AMX on this CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_FLAGS", [*library._FLAGS, "-mno-amx-tile"])
        built, _ = library._build(library.build_info().compiler)
    assert built != library.build_info().library
    function = getattr(ctypes.CDLL(str(built)), name)
    function.argtypes, function.restype = [ctypes.POINTER(one) for one in structures], None
    return function


def uniform_table(blocks: Tensor, q_size: int, kv_size: int, **orders: Tensor) -> BlockTable:
    """A shared table from a boolean mask [Nq, Nk] of equal blocks."""
    rows, columns = blocks.shape
    sizes = torch.full((1, 1, rows), q_size), torch.full((1, 1, columns), kv_size)
    return BlockTable.from_block_mask(blocks[None, None], *sizes, **orders)


def full_table(q_tokens: int, kv_tokens: int) -> BlockTable:
    return uniform_table(torch.ones(1, 1, dtype=torch.bool), q_tokens, kv_tokens)


@st.composite
def problems(draw: st.DrawFn):
    """(query, key, value, table, bias) of any dtype, shapes that divide by nothing, any table."""
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_tokens, kv_tokens = (draw(st.sampled_from([1, 7, 63, 100, 300])) for _ in range(2))
    head_dim, value_dim = (draw(st.sampled_from([1, 5, *HEAD_DIMS])) for _ in range(2))
    heads, dtype, seed = kv_heads * group, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    tensors = qkv(batch, heads, kv_heads, q_tokens, kv_tokens, head_dim, value_dim, dtype, seed=seed)
    table = draw(tables(batch=batch, heads=heads, q_tokens=q_tokens, kv_tokens=kv_tokens))
    bias = draw(key_biases(batch=batch, heads=heads, tokens=kv_tokens, seed=seed))
    return *tensors, table, bias
