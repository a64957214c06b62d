"""The selection of single keys by predicted scores, against float64."""

import itertools
import math
from collections.abc import Iterable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import DTYPES, hiding_bias, named, randn
from benchmarks.gpu.runner import Case
from sparsify_compiler.kernels.prediction import top_k_keys
from sparsify_compiler.kernels.prediction import triton as launcher

UNIT = 2.0**-24
"""Largest relative error of one operation in fp32."""


def cases(device: Device) -> Iterable[Case]:
    """Queries that select alone and in groups."""
    for dtype in DTYPES:
        for rank in device.size((16, 64, 128), (24,)):
            for hides in device.size((False, True), (True,)):
                name = f"{named(dtype)} rank {rank}{', hidden keys' if hides else ''}"
                yield name, partial(check_alone, device, rank, dtype, hides)
        yield f"{named(dtype)} integers with ties", partial(check_ties, device, dtype)
        for hides in device.size((False, True), (True,)):
            name = f"{named(dtype)} groups{', hidden keys' if hides else ''}"
            yield name, partial(check_groups, device, dtype, hides)
    yield "groups, several launches", partial(check_several_launches, device)


def problem(device: Device, rank: int, dtype: torch.dtype, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, budget of each head: 0, 1, a tenth of the keys, more than all keys)."""
    batch, keys = device.size((2, 3000), (1, 40))
    query = randn(device, batch, queries, 4, rank, seed=1).to(dtype).transpose(1, 2)
    key = randn(device, batch, keys, 2, rank, seed=2).to(dtype).transpose(1, 2)
    budget = torch.tensor([[0, 1, keys // 10, keys + 9]], dtype=torch.int32, device=device.name)
    return query, key, budget


def scores_of(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[B, H, Q, S] float64."""
    scores = scale * query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    return scores if bias is None else scores + bias.double()[:, :, None]


def check_choice(
    found: tuple[Tensor, Tensor], scores: Tensor, budget: Tensor, slack: Tensor | float
) -> dict[str, Any]:
    """Check that every row has the right number of keys, those with the highest scores within rounding, in rising
    order."""
    counts, indices = found
    width, tokens = indices.shape[-1], scores.shape[-1]
    visible = (scores > -math.inf).sum(-1)
    wanted = torch.minimum(budget.clamp(0, min(width, tokens))[:, :, None], visible)
    assert torch.equal(counts.long(), wanted), "a row holds more or fewer than it may"
    used = torch.arange(width, device=indices.device) < counts[..., None]
    assert not indices[~used].any(), "what lies beyond a row is not 0"
    assert ((indices.diff(dim=-1) > 0) | ~used[..., 1:]).all(), "indices do not rise"
    assert ((indices >= 0) & (indices < tokens)).all(), "an index out of range"
    chosen = torch.zeros_like(scores, dtype=torch.int32)
    chosen.scatter_add_(-1, indices.long(), used.int())
    lowest = scores.masked_fill(chosen == 0, math.inf).amin(-1)
    assert (lowest > -math.inf).all(), "a hidden key is chosen"
    missed = scores.masked_fill(chosen > 0, -math.inf).amax(-1)
    is_full = (counts < visible) & (counts > 0)
    short = torch.where(is_full, (missed - lowest) / slack, -1.0)
    assert (short <= 1).all(), (
        f"a better key is left, by {float(short.max()):.1f} times what rounding may hide"
    )
    return {"off": max(0.0, float(short.max()))}


def check_alone(device: Device, rank: int, dtype: torch.dtype, hides: bool) -> dict[str, Any]:
    query, key, budget = problem(device, rank, dtype, device.size(200, 5))
    bias = hiding_bias(device, key.shape[0], 4, key.shape[2]) if hides else None
    found = top_k_keys(query, key, budget, width=4096, scale=0.3, key_bias=bias, provider="triton")
    sizes = scores_of(query.abs(), key.abs(), None, 0.3).amax(-1) + 3
    return check_choice(found, scores_of(query, key, bias, 0.3), budget, 2 * (rank + 2) * UNIT * sizes)


def check_ties(device: Device, dtype: torch.dtype) -> None:
    """Check that the selection is exact for small integers, whose sums are exact: the first of equal scores."""
    query, key, budget = problem(device, 16, dtype, device.size(200, 5))
    query, key = query.round(), key.round()
    counts, indices = top_k_keys(query, key, budget, width=4096, provider="triton")
    scores = scores_of(query, key, None, 1.0)
    ranked = scores.argsort(dim=-1, descending=True, stable=True)
    for h, wanted in enumerate(budget[0].clamp(max=key.shape[2]).tolist()):
        assert (counts[:, h] == wanted).all()
        best = ranked[:, h, :, :wanted].sort(-1).values
        assert torch.equal(indices[:, h].long(), pad(best, (0, 4096 - wanted)))


def group_scores(query: Tensor, key: Tensor, bounds: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[B, H, G, S] float64: the attention of all queries of a group together."""
    attention = scores_of(query, key, bias, scale).softmax(-1)
    edges = bounds.tolist()
    together = [attention[:, :, a:b].sum(2) for a, b in itertools.pairwise(edges)]
    scores = torch.stack(together, 2)
    scores[:, :, [a == b for a, b in itertools.pairwise(edges)]] = -math.inf
    if bias is not None:
        scores = scores.masked_fill(bias[:, :, None] == -math.inf, -math.inf)
    return scores


def check_groups(device: Device, dtype: torch.dtype, hides: bool) -> dict[str, Any]:
    """Groups of many queries, of one, of none."""
    query, key, budget = problem(device, 16, dtype, device.size(200, 20))
    edges = [0, 1, 1, query.shape[2] // 2, query.shape[2] - 3, query.shape[2]]
    bounds = torch.tensor(edges, dtype=torch.int32, device=device.name)
    bias = hiding_bias(device, key.shape[0], 4, key.shape[2]) if hides else None
    found = top_k_keys(
        query, key, budget, width=4096, q_bounds=bounds, scale=0.3, key_bias=bias, provider="triton"
    )
    scores = group_scores(query, key, bounds, bias, 0.3)
    return check_choice(found, scores, budget, 1e-4 * scores.amax(-1).clamp(min=1e-9))


def check_several_launches(device: Device) -> dict[str, Any]:
    """More groups than programs."""
    query, key, budget = problem(device, 16, torch.float32, device.size(200, 20))
    bounds = torch.arange(0, query.shape[2] + 1, 5, dtype=torch.int32, device=device.name)
    with mock.patch.object(launcher, "SCORES_AT_ONCE", 1):
        found = top_k_keys(query, key, budget, width=4096, q_bounds=bounds, scale=0.3, provider="triton")
    scores = group_scores(query, key, bounds, None, 0.3)
    return check_choice(found, scores, budget, 1e-4 * scores.amax(-1))
