"""Hypothesis strategies: block tables of every shape, and tensors to run them on."""

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.plan import AttentionSite
from sparsify_compiler.table import BlockTable


@st.composite
def sizes(draw: st.DrawFn, tokens: int, most_blocks: int = 6) -> list[int]:
    """Block sizes that add up to `tokens`, including empty blocks, one-token blocks and one big block."""
    cuts = draw(st.lists(st.integers(0, tokens), max_size=most_blocks - 1))
    bounds = [0, *sorted(cuts), tokens]
    return [b - a for a, b in itertools.pairwise(bounds)]


@st.composite
def tables(draw: st.DrawFn, *, batch: int, heads: int, q_tokens: int, kv_tokens: int) -> BlockTable:
    """A table for these shapes: shared or per batch and head, with or without orders, rows of any length."""
    lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    q_count = len(draw(sizes(q_tokens)))
    kv_count = len(draw(sizes(kv_tokens)))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)

    def block_sizes(count: int, tokens: int) -> Tensor:
        cuts = torch.randint(0, tokens + 1, (*lead, count - 1), generator=generator).sort(-1).values
        edges = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=tokens)
        return edges.diff(dim=-1)

    def order(tokens: int) -> Tensor:
        return torch.rand(*lead, tokens, generator=generator).argsort(-1).to(torch.int32)

    keep = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    blocks = torch.rand(*lead, q_count, kv_count, generator=generator) < keep
    if draw(st.booleans()):
        blocks[..., 0] = True  # no empty row
    table = BlockTable.from_block_mask(
        blocks,
        block_sizes(q_count, q_tokens),
        block_sizes(kv_count, kv_tokens),
        q_order=order(q_tokens) if draw(st.booleans()) else None,
        kv_order=order(kv_tokens) if draw(st.booleans()) else None,
    )
    # Entries beyond a row's count must not matter, nor the order of the blocks within a row.
    columns = torch.arange(table.kv_indices.shape[-1])
    beyond = columns >= table.kv_num_blocks[..., None]
    table.kv_indices[beyond] = kv_count - 1
    if draw(st.booleans()):
        key = torch.rand(table.kv_indices.shape, generator=generator) + beyond * 2.0
        table.kv_indices.copy_(table.kv_indices.gather(-1, key.argsort(-1)))
    return table


@st.composite
def key_biases(draw: st.DrawFn, *, batch: int, heads: int, tokens: int, seed: int) -> Tensor | None:
    """A bias [B or 1, H or 1, tokens] that hides no, some or all keys; or None."""
    if not draw(st.booleans()):
        return None
    generator = torch.Generator().manual_seed(seed)
    lead = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    bias = torch.randn(*lead, tokens, generator=generator)
    hidden = torch.rand(bias.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return bias.masked_fill(hidden, -torch.inf)


def qkv(
    batch: int,
    heads: int,
    kv_heads: int,
    q_tokens: int,
    kv_tokens: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Seeded query, key, value as models pass them: [B, S, H, D] in memory, seen as [B, H, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(q_tokens, heads, head_dim), (kv_tokens, kv_heads, head_dim), (kv_tokens, kv_heads, value_dim)]
    q, k, v = (
        torch.randn(batch, *shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes
    )
    return q, k, v


def site_of(query: Tensor, key: Tensor | None = None, name: str = "here") -> AttentionSite:
    """The site of a self-attention with these inputs. Without a key, it has as many key heads as query heads."""
    batch, heads, tokens, width = query.shape
    return AttentionSite(
        name=name,
        index=0,
        batch=batch,
        heads=heads,
        kv_heads=heads if key is None else key.shape[1],
        q_tokens=tokens,
        kv_tokens=tokens,
        head_dim=width,
        value_dim=width,
        dtype=str(query.dtype)[6:],
        device=query.device.type,
        scale=width**-0.5,
    )
