"""Tensors and tables, made on the device, and the comparison of a few rows of large outputs with float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from sparsify_compiler.plan import AttentionSite
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import oracles

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def named(dtype: torch.dtype) -> str:
    """`bfloat16`, not `torch.bfloat16`."""
    return str(dtype)[6:]


def generator(device: Device, seed: int) -> torch.Generator:
    return torch.Generator(device.name).manual_seed(seed)


def randn(device: Device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(device, seed), device=device.name, dtype=dtype)


def qkv(
    device: Device,
    batch: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    kv_tokens: int | None = None,
    value_dim: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as models pass them: [B, S, H, D] in memory, seen as [B, H, S, D]."""
    kv_tokens, value_dim = kv_tokens or tokens, value_dim or head_dim
    shapes = (tokens, heads, head_dim), (kv_tokens, kv_heads, head_dim), (kv_tokens, kv_heads, value_dim)
    q, k, v = (
        randn(device, batch, *shape, dtype=dtype, seed=3 * seed + i).transpose(1, 2)
        for i, shape in enumerate(shapes)
    )
    return q, k, v


def clusters(
    device: Device,
    batch: int,
    heads: int,
    tokens: int,
    count: int,
    *,
    ordered: bool,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """(sizes [B, H, count], order [B, H, S] int32 or None): blocks with sizes like those of k-means, different
    for every head; one is empty and one has one token. The order is that of sorting by label."""
    weight = torch.rand(batch, heads, 4, count, generator=generator(device, seed), device=device.name)
    weight = -weight.log().sum(2)  # gamma distributed: sizes vary by half of their mean
    weight[..., 1:2] = 0.0
    weight = weight.flatten(0, 1)
    label = torch.multinomial(weight, tokens, replacement=True, generator=generator(device, seed + 1))
    label[:, :1] = 1
    label = label.unflatten(0, (batch, heads))
    if count > 2:
        label = torch.where(label == 2, 0, label)
    sizes = torch.zeros_like(weight, dtype=torch.long).unflatten(0, (batch, heads))
    sizes.scatter_add_(-1, label, torch.ones_like(label))
    return sizes, label.argsort(dim=-1, stable=True).int() if ordered else None


def cluster_table(
    device: Device,
    batch: int,
    heads: int,
    tokens: int,
    q_count: int,
    kv_count: int,
    density: float,
    *,
    kv_tokens: int | None = None,
    ordered: bool = True,
    seed: int = 0,
) -> BlockTable:
    """A table of uneven clusters, different for every head. Every head reads a random share `density` of them."""
    q_sizes, q_order = clusters(device, batch, heads, tokens, q_count, ordered=ordered, seed=4 * seed)
    kv_sizes, kv_order = clusters(
        device, batch, heads, kv_tokens or tokens, kv_count, ordered=ordered, seed=4 * seed + 2
    )
    drawn = torch.rand(batch, heads, q_count, kv_count, generator=generator(device, seed), device=device.name)
    kept = drawn.argsort(-1) < max(1, round(density * kv_count))
    return BlockTable.from_block_mask(kept, q_sizes, kv_sizes, q_order=q_order, kv_order=kv_order)


def flat_table(
    device: Device, heads: int, tokens: int, q_size: int, kv_size: int, density: float
) -> BlockTable:
    """A table of blocks of one size. Every head reads different blocks, the same share of them."""
    rows, columns = tokens // q_size, tokens // kv_size
    drawn = torch.rand(1, heads, rows, columns, generator=generator(device, 0), device=device.name)
    sizes = (
        torch.full((1, 1, n), tokens // n, dtype=torch.long, device=device.name) for n in (rows, columns)
    )
    return BlockTable.from_block_mask(drawn.argsort(-1) < round(density * columns), *sizes)


def single_key_table(device: Device, heads: int, tokens: int, group: int, density: float) -> BlockTable:
    """A table of single keys. Every group of queries reads a share of the keys, drawn separately for each head."""
    rows, count = tokens // group, round(density * tokens)
    drawn = [
        torch.rand(rows, tokens, generator=generator(device, head), device=device.name)
        .topk(count)
        .indices.sort()
        .values.int()
        for head in range(heads)
    ]
    indices = torch.zeros(
        1, heads, rows, 1 << (count - 1).bit_length(), dtype=torch.int32, device=device.name
    )
    indices[..., :count] = torch.stack(drawn)
    edges = torch.arange(tokens + 1, dtype=torch.int32, device=device.name)
    return BlockTable(
        q_bounds=edges[::group].contiguous()[None, None],
        kv_bounds=edges[None, None],
        kv_num_blocks=torch.full((1, heads, rows), count, dtype=torch.int32, device=device.name),
        kv_indices=indices,
    )


def hiding_bias(device: Device, batch: int, heads: int, tokens: int, seed: int = 0) -> Tensor:
    """[B, H, S] fp32, which hides a sixth of the keys."""
    bias = randn(device, batch, heads, tokens, seed=seed)
    return bias.masked_fill(bias > 1, -torch.inf)


def site_of(query: Tensor, key: Tensor) -> AttentionSite:
    """The site of a self-attention with these inputs."""
    batch, heads, tokens, width = query.shape
    return AttentionSite(
        name="site",
        index=0,
        batch=batch,
        heads=heads,
        kv_heads=key.shape[1],
        q_tokens=tokens,
        kv_tokens=tokens,
        head_dim=width,
        value_dim=width,
        dtype=named(query.dtype),
        device=query.device.type,
        scale=width**-0.5,
    )


def block_of_token(bounds: Tensor, order: Tensor | None) -> Tensor:
    """[B|1, H|1, S] int64: the block of each token."""
    places = torch.arange(int(bounds[0, 0, -1]), dtype=torch.int32, device=bounds.device)
    block = torch.searchsorted(
        bounds[..., 1:].contiguous(), places.expand(*bounds.shape[:2], -1).contiguous(), right=True
    )
    if order is None:
        return block
    lead = torch.broadcast_shapes(block.shape[:2], order.shape[:2])
    order, block = order.long().expand(*lead, -1), block.expand(*lead, -1)
    return torch.empty_like(order).scatter_(-1, order, block)


def mask_of_rows(table: BlockTable, rows: Tensor) -> Tensor:
    """[B|1, H|1, R, Sk] bool: the rows of the mask for a few queries, [R] int64."""
    q_block = block_of_token(table.q_bounds, table.q_order)[..., rows]
    kv_block = block_of_token(table.kv_bounds, table.kv_order)
    blocks = table.block_mask()
    lead = torch.broadcast_shapes(blocks.shape[:2], q_block.shape[:2], kv_block.shape[:2])
    blocks = blocks.expand(*lead, -1, -1)
    listed = blocks.gather(2, q_block.expand(*lead, -1)[..., None].expand(-1, -1, -1, blocks.shape[-1]))
    return listed.gather(3, kv_block.expand(*lead, -1)[:, :, None].expand(-1, -1, len(rows), -1))


def some_rows(tokens: int, count: int, like: Tensor) -> Tensor:
    """[count] int64: different queries, on the device of a tensor."""
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:count]
    return drawn.sort().values.to(like.device)


HEADS_AT_ONCE = 8
"""Number of heads at video size whose keys and scores fit memory in float64."""


def by_heads(heads: int, kv_heads: int) -> Iterator[tuple[slice, slice]]:
    """(query heads, the key heads that they read), a few at a time."""
    group = heads // kv_heads
    step = max(1, HEADS_AT_ONCE // group)
    for first in range(0, kv_heads, step):
        last = min(kv_heads, first + step)
        yield slice(first * group, last * group), slice(first, last)


def of_heads(tensor: Tensor | None, heads: slice) -> Tensor | None:
    """[B|1, H|1, ...] for some of the heads."""
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]


def error_of_rows(
    out: Tensor,
    lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> float:
    """Check rows of attention against float64 and return |out - exact| / |exact|.

    Args:
        query, mask: those of the rows of `out` and `lse`.
    """
    off = size = 0.0
    for some, of_keys in by_heads(query.shape[1], key.shape[1]):
        bias, seen = of_heads(key_bias, some), of_heads(mask, some)
        assert seen is not None
        inputs = query[:, some], key[:, of_keys], value[:, of_keys], seen
        logs = None if lse is None else lse[:, some]
        oracles.assert_close_to_float64(out[:, some], logs, *inputs, key_bias=bias, scale=scale)
        exact, _ = oracles.masked_attention(*inputs, key_bias=bias, scale=scale)
        off += float((out[:, some].double() - exact).square().sum())
        size += float(exact.square().sum())
    return (off / max(size, 1e-300)) ** 0.5
