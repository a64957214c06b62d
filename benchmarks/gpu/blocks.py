"""Statistics of blocks, and the merge of near and far field, against float64 from their definitions."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import (
    DTYPES,
    block_of_token,
    cluster_table,
    hiding_bias,
    named,
    qkv,
    randn,
)
from benchmarks.gpu.runner import Case
from sparsify_compiler.kernels.far_field import FAR_FIELDS, attention_with_far_field
from sparsify_compiler.kernels.far_field.near_and_far import merge_far_field
from sparsify_compiler.kernels.statistics import block_means, block_statistics
from sparsify_compiler.testing import oracles

SUMS = 3e-5
"""Tolerance of fp32 sums of numbers near 1."""

PRODUCTS = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
"""Tolerance of products. Those of half precision run in TF32, with eleven bits."""

OUTPUTS = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Tolerance of outputs near 1; virtual keys and the first order are rounded too."""


def cases(device: Device) -> Iterable[Case]:
    """Both kernels of statistics and the merge."""
    for dtype in DTYPES:
        for head_dim, value_dim in device.size(((64, 64), (128, 128), (72, 40)), ((72, 40),)):
            for kind in ("plain", "full"):
                name = f"{named(dtype)} D {head_dim}, {value_dim} {kind}"
                yield (
                    f"statistics {name}",
                    partial(check_statistics, device, head_dim, value_dim, dtype, kind == "full"),
                )
                yield (
                    f"merge {name}",
                    partial(check_merge, device, head_dim, value_dim, dtype, kind == "full"),
                )
        for far_field in FAR_FIELDS:
            yield f"near and far {named(dtype)} {far_field}", partial(check_whole, device, dtype, far_field)


def membership(bounds: Tensor, order: Tensor | None) -> Tensor:
    """[B|1, H|1, N, S] float64: 1 where a token lies in a block."""
    block = block_of_token(bounds, order)
    every = torch.arange(bounds.shape[-1] - 1, device=bounds.device)
    return (block[:, :, None] == every[:, None]).double()


def off(found: Tensor, exact: Tensor, allowed: float, what: str) -> float:
    """The largest |found - exact| / (1 + |exact|), which must be at most `allowed`. Infinities must be the same."""
    assert found.shape == exact.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite), f"{what}: finite where it must not be, or the reverse"
    wide, size = found.double()[finite], exact[finite]
    assert torch.equal(found.double()[~finite], exact[~finite]), f"{what}: other infinities"
    error = float(((wide - size).abs() / (1 + size.abs())).max()) if len(size) else 0.0
    assert error <= allowed, f"{what}: error {error:.2e} above {allowed:.0e}"
    return error


def check_statistics(
    device: Device, head_dim: int, value_dim: int, dtype: torch.dtype, full: bool
) -> dict[str, Any]:
    batch, heads, tokens, kv_tokens = device.size((2, 4, 500, 1500), (1, 2, 40, 70))
    kv_heads = heads // 2 if full else heads
    query, key, value = qkv(
        device, batch, heads, kv_heads, tokens, head_dim, dtype, kv_tokens=kv_tokens, value_dim=value_dim
    )
    blocks = device.size((9, 70), (3, 5))
    table = cluster_table(device, batch, heads, tokens, *blocks, 0.4, kv_tokens=kv_tokens, ordered=full)
    bias = hiding_bias(device, batch, heads, kv_tokens) if full else None
    worst = 0.0

    mean, mean_square = block_means(query, table.q_bounds, table.q_order, provider="triton")
    weight = membership(table.q_bounds, table.q_order)
    share = weight / weight.sum(-1, keepdim=True).clamp(min=1)
    worst = max(worst, off(mean, share @ query.double(), SUMS, "mean"))
    worst = max(worst, off(mean_square, share @ query.double().square(), SUMS, "mean of squares"))

    k, v = (t.double().repeat_interleave(heads // kv_heads, 1) for t in (key, value))
    weight = membership(table.kv_bounds, table.kv_order).expand(batch, heads, -1, -1)
    if bias is not None:
        weight = weight * bias.double().exp()[:, :, None]
    total = weight.sum(-1, keepdim=True)
    share = weight / total.masked_fill(total == 0, 1.0)
    key_mean, value_mean = share @ k, share @ v
    cross = torch.einsum("bhns,bhsd,bhse->bhnde", share, k, v)
    exact = {
        "log weight": total[..., 0].log(),
        "key mean": key_mean,
        "value mean": value_mean,
        "key variance": share @ k.square() - key_mean.square(),
        "value variance": share @ v.square() - value_mean.square(),
        "covariance": cross - key_mean[..., :, None] * value_mean[..., None, :],
    }
    for covariance in (True, False):
        found = block_statistics(
            key, value, table.kv_bounds, table.kv_order, bias, covariance=covariance, provider="triton"
        )
        for (name, one), got in zip(exact.items(), found, strict=True):
            if name in ("key variance", "value variance", "covariance") and not covariance:
                assert not got.numel()
                continue
            allowed = SUMS
            if name == "covariance":  # rounded to its dtype
                allowed = PRODUCTS[dtype] + torch.finfo(got.dtype).eps / 2
            worst = max(worst, off(got, one, allowed, name))
    return {"off": worst}


def check_merge(
    device: Device, head_dim: int, value_dim: int, dtype: torch.dtype, full: bool
) -> dict[str, Any]:
    batch, heads, tokens = device.size((2, 4, 500), (1, 2, 40))
    blocks = device.size(9, 4)
    query, _, _ = qkv(device, batch, heads, heads, tokens, head_dim, dtype)
    near, far = (
        randn(device, batch, tokens, heads, value_dim, dtype=dtype, seed=s).transpose(1, 2) for s in (11, 12)
    )
    near_lse, far_lse = (randn(device, batch, heads, tokens, seed=s) for s in (13, 14))
    far_lse[..., ::5] = -torch.inf
    far[:, :, ::5] = torch.nan
    near_lse[..., 3::7] = -torch.inf
    table = cluster_table(device, batch, heads, tokens, blocks, 3, 0.5, ordered=full)
    matrices = limits = None
    term = torch.zeros((), dtype=torch.float64, device=device.name)
    if full:
        matrices = randn(device, batch, heads, blocks, head_dim, value_dim, seed=15)
        limits = randn(device, batch, heads, blocks, value_dim, seed=16).abs()
        block = block_of_token(table.q_bounds, table.q_order)
        of_block = (SCALE * query.double()[:, :, None] @ matrices.double()).clamp(
            -limits.double()[:, :, :, None], limits.double()[:, :, :, None]
        )
        term = of_block.gather(2, block[:, :, None, :, None].expand(-1, -1, 1, -1, value_dim))[:, :, 0]
    out, lse = merge_far_field(
        *(query, near, near_lse, far, far_lse, matrices, limits, table.q_bounds, table.q_order),
        scale=SCALE,
        provider="triton",
    )
    alone = far_lse == -torch.inf
    assert torch.equal(out[alone], near[alone]), "a row without a far field is not the near row bit for bit"
    exact_lse = torch.logaddexp(near_lse.double(), far_lse.double())
    weights = [(t.double() - exact_lse.nan_to_num(neginf=0.0))[..., None].exp() for t in (near_lse, far_lse)]
    exact = weights[0] * near.double() + weights[1] * (far.double() + term).nan_to_num()
    exact = torch.where(alone[..., None], near.double(), exact)
    worst = off(lse, exact_lse, SUMS, "lse")
    return {"off": max(worst, off(out, exact, OUTPUTS[dtype], "out"))}


SCALE = 0.11


def check_whole(device: Device, dtype: torch.dtype, far_field: str) -> dict[str, Any]:
    """Near and far field together, against the formulas row by row in float64 on the CPU, which is slow."""
    heads, tokens = device.size((4, 60), (2, 16))
    q, k, v = qkv(device, 1, heads, heads // 2, tokens, 64, dtype)
    table = cluster_table(device, 1, heads, tokens, 4, 9, 0.3)
    bias = hiding_bias(device, 1, heads, tokens)
    out, lse, _ = attention_with_far_field(
        q, k, v, table, far_field=far_field, key_bias=bias, provider="triton", sampled_rows=0
    )
    exact, exact_lse = oracles.far_field_attention(
        *(t.cpu() for t in (q, k, v)), table.to("cpu"), far_field, key_bias=bias.cpu()
    )
    worst = off(lse.cpu(), exact_lse, OUTPUTS[dtype], "lse")
    return {"off": max(worst, off(out.cpu(), exact, OUTPUTS[dtype], "out"))}
