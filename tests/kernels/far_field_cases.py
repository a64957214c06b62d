"""Cases of the far field: their providers (Triton alone where it is interpreted), tables and problems."""

import os

import torch
from cpu_problems import uniform_table
from hypothesis import strategies as st

from sparsify_compiler import BlockTable
from sparsify_compiler.testing.strategies import qkv, tables

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROVIDERS = ["triton"] if INTERPRETED else ["reference", "cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXAMPLES = 5 if INTERPRETED else 25
FEW = (1, 2, 1) if INTERPRETED else (2, 4, 2)
"""Batch, heads and key heads where a test is not about them: the interpreter takes time for each program."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""For outputs near 1; half precision rounds the virtual keys as it rounds keys."""


def some_table(seed: int = 0) -> BlockTable:
    """40 permuted queries in 4 blocks, 40 permuted keys in 8, half of the pairs kept."""
    g = torch.Generator().manual_seed(seed)
    orders = {f"{s}_order": torch.randperm(40, generator=g).int()[None, None] for s in ("q", "kv")}
    return uniform_table(torch.rand(4, 8, generator=g) < 0.5, 10, 5, **orders)


@st.composite
def problems(draw: st.DrawFn):
    """(query, key, value, table, bias): any shapes, any table, keys hidden or not."""
    batch = draw(st.integers(1, 2))
    heads, kv_heads = draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    q_tokens, kv_tokens = draw(st.sampled_from([(17, 17), (20, 9), (1, 30), (13, 1)]))
    head_dim, value_dim = draw(st.sampled_from([(16, 16), (6, 5), (1, 20)]))
    dtype = draw(st.sampled_from(DTYPES))
    table = draw(tables(batch=batch, heads=heads, q_tokens=q_tokens, kv_tokens=kv_tokens))
    tensors = qkv(batch, heads, kv_heads, q_tokens, kv_tokens, head_dim, value_dim, dtype)
    bias = None
    if draw(st.booleans()):
        lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
        bias = torch.randn(*lead, kv_tokens, generator=torch.Generator().manual_seed(1))
        bias = bias.masked_fill(bias > draw(st.sampled_from([-9.0, 0.7])), -torch.inf)
    return *tensors, table, bias
