"""The attention kernels, forward and backward, in every type, with all tiles in `configs` for the device."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import (
    cluster_table,
    error_of_rows,
    flat_table,
    hiding_bias,
    mask_of_rows,
    named,
    qkv,
    randn,
    some_rows,
)
from benchmarks.gpu.runner import Case
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.attention.triton import forward
from sparsify_compiler.kernels.attention.triton_backward import backward
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import BackwardConfig, Config
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import oracles

SCALE = 0.11
ODD_WIDTHS = ((48, 48), (72, 40), (80, 80), (96, 96))
"""(head dim, value dim) of models that are no powers of two."""

KINDS = ("plain", "full")
"""Kinds of problems; `full` has orders, a bias that hides keys, and several query heads for each key head."""


def shipped(device: Device, dtype: torch.dtype) -> Iterator[tuple[int, Config]]:
    """(head dim, tiles) of the forward pass."""
    for width in (64, 128, 256):
        if dtype == torch.float32:
            yield width, configs.SINGLE[width]
        else:
            for config in configs.HALF[device.architecture(), width]:
                yield width, config


def backward_ways(device: Device, dtype: torch.dtype) -> Iterator[tuple[int, str, BackwardConfig]]:
    """(head dim, name, tiles) of every method of the backward pass."""
    for width in (64, 128, 256):
        if dtype == torch.float32:
            queries = keys = (configs.BACKWARD_SINGLE[width],) * 2
        else:
            queries, keys = configs.BACKWARD_HALF[device.architecture(), width]
        yield width, "by block", BackwardConfig(queries[0], keys[0])
        yield width, "grouped", BackwardConfig(queries[1], keys[1], configs.WORD)
        yield width, "by atomics", BackwardConfig(queries[1], None)


Problem = tuple[Tensor, Tensor, Tensor, BlockTable, Tensor | None]
"""Query, key, value, table and bias of the keys."""


def problem(device: Device, head_dim: int, value_dim: int, dtype: torch.dtype, kind: str) -> Problem:
    """A problem of one of the `KINDS`."""
    batch, heads, tokens, kv_tokens = device.size((2, 4, 1000, 1500), (1, 2, 40, 50))
    blocks = device.size((9, 70), (3, 5))
    full = kind == "full"
    tensors = qkv(
        device,
        *(batch, heads, heads // 2 if full else heads, tokens, head_dim, dtype),
        kv_tokens=kv_tokens,
        value_dim=value_dim,
    )
    table = cluster_table(device, batch, heads, tokens, *blocks, 0.4, kv_tokens=kv_tokens, ordered=full)
    return *tensors, table, hiding_bias(device, batch, 1, kv_tokens) if full else None


def forward_cases(dtype: torch.dtype, device: Device) -> Iterable[Case]:
    """The forward pass in one type."""
    tiles = list(shipped(device, dtype))
    for kind in device.size(KINDS, KINDS[1:]):
        for width, config in device.size(tiles, tiles[::5]):
            name = f"{named(dtype)} D {width} {kind} {short(config)}"
            yield name, partial(check_forward, device, width, width, dtype, kind, config)
        for head_dim, value_dim in device.size(ODD_WIDTHS, ODD_WIDTHS[1:2]):
            name = f"{named(dtype)} D {head_dim}, {value_dim} {kind}"
            yield name, partial(check_forward, device, head_dim, value_dim, dtype, kind, None)
    yield f"{named(dtype)} tables at random", partial(check_random_tables, device, dtype)
    yield f"{named(dtype)} rows without keys", partial(check_blind_rows, device, dtype)
    yield f"{named(dtype)} a key that is not finite", partial(check_not_finite, device, dtype)
    if dtype == torch.float16:
        yield "rows 2**31 elements apart", partial(check_far_apart, device)
    yield f"{named(dtype)} in a graph", partial(check_graph, device, dtype)


def short(config: Config) -> str:
    """Tiles as one word: queries, keys, chunk, warps, stages."""
    return "/".join(
        map(str, (config.block_m, config.block_n, config.chunk, config.num_warps, config.num_stages))
    )


def run(tensors: Problem, config: Config | None) -> tuple[Tensor, Tensor]:
    """(out, lse) with these tiles, or of the op with the tiles that it chooses."""
    *qkv_, table, bias = tensors
    if config is None:
        return block_sparse_attention(*qkv_, table, key_bias=bias, scale=SCALE, provider="triton")
    return forward(*qkv_, table, bias, SCALE, config)


def check_forward(
    device: Device, head_dim: int, value_dim: int, dtype: torch.dtype, kind: str, config: Config | None
) -> dict[str, Any]:
    tensors = problem(device, head_dim, value_dim, dtype, kind)
    q, k, v, table, bias = tensors
    out, lse = run(tensors, config)
    assert out.transpose(1, 2).is_contiguous()
    return {"off": error_of_rows(out, lse, q, k, v, table.mask(), key_bias=bias, scale=SCALE)}


def check_random_tables(device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """Check tables that batches and heads share or not, with few or many blocks, that read little, half or all."""
    worst, tables = 0.0, device.size(40, 2)
    batch, heads, tokens, kv_tokens = device.size((2, 4, 333, 1000), (1, 2, 33, 50))
    for seed in range(tables):
        lead = (1, batch)[seed % 2], (1, heads)[seed // 2 % 2]
        blocks = ((3, 3), (5, 40), (20, 7))[seed % 3]
        density = (0.1, 0.5, 1.0)[seed // 3 % 3]
        tensors = qkv(device, batch, heads, heads // 2, tokens, 64, dtype, kv_tokens=kv_tokens, seed=seed)
        table = cluster_table(
            device, *lead, tokens, *blocks, density, kv_tokens=kv_tokens, ordered=seed % 4 > 0, seed=seed
        )
        out, lse = run((*tensors, table, None), None)
        worst = max(worst, error_of_rows(out, lse, *tensors, table.mask(), scale=SCALE))
    return {"off": worst, "tables": tables}


def check_blind_rows(device: Device, dtype: torch.dtype) -> None:
    """Check that rows that read no block, or only hidden keys, give 0 and -inf."""
    q, k, v = qkv(device, 1, 2, 2, 96, 64, dtype, kv_tokens=64)
    bias = torch.zeros(1, 1, 64, device=device.name)
    bias[..., :32] = -torch.inf
    blocks = torch.tensor([[0, 0], [1, 0], [1, 1]], dtype=torch.bool, device=device.name)
    sizes = (torch.full((1, 1, n), 32, dtype=torch.long, device=device.name) for n in (3, 2))
    table = BlockTable.from_block_mask(blocks[None, None], *sizes)
    out, lse = run((q, k, v, table, bias), None)
    error_of_rows(out, lse, q, k, v, table.mask(), key_bias=bias, scale=SCALE)
    assert not out[:, :, :64].any()
    assert (lse[:, :, :64] == -torch.inf).all()


def check_not_finite(device: Device, dtype: torch.dtype) -> None:
    """Check that NaN in a key reaches the rows that read it, and no others."""
    q, k, v = qkv(device, 1, 2, 2, 60, 64, dtype)
    k[:, :, 29] = torch.nan
    table = cluster_table(device, 1, 2, 60, 4, 6, 0.5)
    out, _ = run((q, k, v, table, None), None)
    reads = table.mask()[..., 29]
    assert reads.any()
    assert not reads.all()
    assert torch.equal(out.isnan().all(-1), reads)
    assert out[~reads].isfinite().all()


def check_far_apart(device: Device) -> None:
    q, k, v = qkv(device, 1, 1, 1, 3, 64, torch.float16)
    far = torch.empty_strided(k.shape, (0, 0, 2**30, 1), dtype=k.dtype, device=device.name).copy_(k)
    table = flat_table(device, 1, 3, 3, 3, 1.0)
    out, lse = run((q, far, v, table, None), None)
    error_of_rows(out, lse, q, k, v, table.mask(), scale=SCALE)


def check_graph(device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """Check a graph that is captured once and replayed with other queries and another table of the same shapes."""
    q, k, v, table, _ = problem(device, 64, 64, dtype, "plain")
    other = replaced(device, table, q, k)
    (out, lse), replay = device.captured(lambda: run((q, k, v, table, None), None))
    q.copy_(randn(device, *q.shape, seed=9))
    overwrite(table, other)
    replay()
    return {"off": error_of_rows(out, lse, q, k, v, table.mask(), scale=SCALE)}


def replaced(device: Device, table: BlockTable, query: Tensor, key: Tensor) -> BlockTable:
    """Another table of the same shapes."""
    heads, tokens, kv_tokens = query.shape[1], query.shape[2], key.shape[2]
    counts = table.q_bounds.shape[-1] - 1, table.kv_bounds.shape[-1] - 1
    ordered = table.q_order is not None
    return cluster_table(
        device, query.shape[0], heads, tokens, *counts, 0.4, kv_tokens=kv_tokens, ordered=ordered, seed=5
    )


def overwrite(table: BlockTable, other: BlockTable) -> None:
    """Copy the content of one table into another."""
    for old, new in zip(table.tensors().values(), other.tensors().values(), strict=True):
        if old is not None:
            old.copy_(new)


def backward_cases(dtype: torch.dtype, device: Device) -> Iterable[Case]:
    """The backward pass in one type."""
    ways = list(backward_ways(device, dtype))
    for kind in device.size(KINDS, KINDS[1:]):
        for width, way, config in device.size(ways, ways[::4]):  # each width, and each method
            name = f"{named(dtype)} D {width} {kind} {way}"
            yield name, partial(check_backward, device, width, dtype, kind, config)
    for deterministic in (False, True):
        name = f"{named(dtype)} by autograd, {'without' if deterministic else 'with'} atomics"
        yield name, partial(check_autograd, device, dtype, deterministic)
    yield f"{named(dtype)} in a graph", partial(check_backward_graph, device, dtype)


def check_backward(
    device: Device, width: int, dtype: torch.dtype, kind: str, config: BackwardConfig
) -> dict[str, Any]:
    """Check against float64; without atomics on floats, every run must give the same bits."""
    tensors = problem(device, width, width, dtype, kind)
    q, k, v, table, bias = tensors
    out, lse = run(tensors, None)
    given = randn(device, *out.shape, dtype=dtype, seed=7), randn(device, *lse.shape, seed=8)
    found = backward(*given, out, lse, q, k, v, table, bias, SCALE, config)
    error = error_of_gradients(found, *given, q, k, v, table.mask(), key_bias=bias)
    if config.keys is not None:
        again = backward(*given, out, lse, q, k, v, table, bias, SCALE, config)
        assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True)), "other bits"
    return {"off": error}


@torch.enable_grad()
def error_of_gradients(
    found: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    key_bias: Tensor | None = None,
) -> float:
    """Check gradients against float64 and return the largest |d - exact| / |exact| of the three."""
    inputs = query, key, value, mask
    oracles.assert_gradients_close_to_float64(
        found, grad_out, grad_lse, *inputs, key_bias=key_bias, scale=SCALE
    )
    wide = [t.detach().double().requires_grad_() for t in (query, key, value)]
    outputs = oracles.masked_attention(*wide, mask, key_bias=key_bias, scale=SCALE)
    exact = torch.autograd.grad(outputs, wide, [grad_out.double(), grad_lse.double()])
    return max(float((d.double() - e).norm() / e.norm()) for d, e in zip(found, exact, strict=True))


def check_autograd(device: Device, dtype: torch.dtype, deterministic: bool) -> dict[str, Any]:
    """Check gradients through the op, as a model calls it, with key blocks of one token."""
    tokens, keys = device.size((200, 300), (30, 40))
    q, k, v = qkv(device, 1, 2, 2, tokens, 64, dtype, kv_tokens=keys)
    table = flat_keys(device, 2, tokens, keys)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        with torch.enable_grad():
            leaves = [t.requires_grad_() for t in (q, k, v)]
            out, lse = block_sparse_attention(*leaves, table, scale=SCALE, provider="triton")
            given = randn(device, *out.shape, dtype=dtype, seed=7), randn(device, *lse.shape, seed=8)
            found = torch.autograd.grad((out, lse), leaves, given)
    finally:
        torch.use_deterministic_algorithms(False)
    q, k, v = (t.detach() for t in leaves)
    return {"off": error_of_gradients(found, *given, q, k, v, table.mask())}


def flat_keys(device: Device, heads: int, tokens: int, keys: int) -> BlockTable:
    """A table with ten queries in a block and one key in a block; a third of the keys is read."""
    kept = randn(device, 1, heads, tokens // 10, keys) > 0.4
    sizes = (
        torch.full((1, 1, tokens // 10), 10, device=device.name),
        torch.ones(1, 1, keys, dtype=torch.long, device=device.name),
    )
    return BlockTable.from_block_mask(kept, *sizes)


def check_backward_graph(device: Device, dtype: torch.dtype) -> dict[str, Any]:
    """Check a graph that is captured once and replayed with other tensors and another table of the same shapes."""
    worst = 0.0
    ways = [(width, config) for width, _, config in backward_ways(device, dtype) if width == 64]
    for width, config in device.size(ways, ways[1:2]):
        q, k, v, table, _ = problem(device, width, width, dtype, "plain")
        out, lse = run((q, k, v, table, None), None)
        given = randn(device, *out.shape, dtype=dtype, seed=7), randn(device, *lse.shape, seed=8)
        whole = *given, out, lse, q, k, v, table, None, SCALE, config
        other = replaced(device, table, q, k)
        found, replay = device.captured(lambda whole=whole: backward(*whole))
        q.copy_(randn(device, *q.shape, seed=9))
        overwrite(table, other)
        for old, new in zip((out, lse), run((q, k, v, table, None), None), strict=True):
            old.copy_(new)
        replay()
        worst = max(worst, error_of_gradients(found, *given, q, k, v, table.mask()))
    return {"off": worst}


def candidates(device: Device) -> dict[str, Config]:
    """Tiles to try at video size in bfloat16 with a head dim of 128: those in `configs`, and others."""
    long, short_ = configs.HALF[device.architecture(), 128]
    tried = (
        long,
        Config(128, 128, 32, 8, 2),
        Config(128, 128, 64, 8, 2),
        Config(128, 64, 32, 8, 3),
        Config(128, 64, 32, 8, 2),
        Config(128, 64, 64, 8, 2),
        Config(64, 128, 32, 4, 2),
        Config(64, 64, 32, 4, 3),
        short_,
    )
    return {short(config): config for config in tried}


def video_problem(device: Device, heads: int, density: float) -> Problem:
    """75,600 tokens, like Wan at 720p, with 300 clusters of queries and 1,000 of keys, different for every head."""
    tokens, blocks = device.size((75_600, (300, 1000)), (96, (4, 9)))
    tensors = qkv(device, 1, heads, heads, tokens, 128, torch.bfloat16)
    return *tensors, cluster_table(device, 1, heads, tokens, *blocks, density), None


ROWS = 12
"""Number of rows at video size that are computed in float64."""


def check_rows(tensors: Problem, call: Callable[[], Any]) -> float:
    """Check a few rows of the result of a call, out or (out, lse), against float64, and return their error."""
    q, k, v, table, bias = tensors
    rows = some_rows(q.shape[2], ROWS, q)
    found = call()
    out, lse = (found, None) if isinstance(found, Tensor) else found
    assert out.isfinite().all(), "not all of the output is finite"
    logs = None if lse is None else lse[:, :, rows]
    of_rows = out[:, :, rows], logs, q[:, :, rows], k, v, mask_of_rows(table, rows)
    return error_of_rows(*of_rows, key_bias=bias, scale=SCALE)


def candidate_cases(device: Device) -> Iterable[Case]:
    """Check all tiles that are timed later, on eight heads; 40 heads run the same compiled kernels."""
    tensors = video_problem(device, device.size(8, 2), 0.2)
    for name, config in candidates(device).items():
        call = partial(run, tensors, config)
        yield f"tiles {name}", lambda call=call: {"off": check_rows(tensors, call)}
