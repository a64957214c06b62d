"""The low-rank predictor of DSV (arXiv 2502.07590): it predicts scores from r numbers of each query and key.

For each head, with W_q, W_k of shape [D, r], it predicts the scores q kᵀ as (q W_q) (k W_k)ᵀ. The paper projects
the input of the block. Here the query and key of each head are projected, after their norm and RoPE: this takes
fewer numbers and does not change the model, and with r = D and identities the prediction is exact.

Learning looks at detached tensors only and computes its gradients in closed form, so the model's own gradients are
the same bits with it and without it.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods.grid import Cube, cube_of_token, middle_of_token
from sparsify_compiler.names import align
from sparsify_compiler.plan import AttentionSite, TokenLayout

COSINE, NORM = 0.95, 0.05
"""The weights of the two parts of the loss."""
SHARES = tuple(2.0 ** (-i / 2) for i in reversed(range(20)))
"""Shares of the video's keys, rising to 1. A profile measures the attention mass that each would keep."""
ROWS = 128
"""The most queries of each head that a profile looks at; it sorts a row of scores for each."""
FORMAT = "sparsify-dsv-2"


def initial_weights(heads: int, head_dim: int, rank: int) -> Tensor:
    """[heads, D, r] fp32: one projection for all, which keeps products on average; the identity at r = D."""
    if rank == head_dim:
        return torch.eye(head_dim, dtype=torch.float32).repeat(heads, 1, 1)
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(head_dim, rank, generator=generator, dtype=torch.float64))
    return (basis * math.sqrt(head_dim / rank)).float().repeat(heads, 1, 1)


def loss_and_gradients(query: Tensor, key: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of predicted rows of scores from the true ones, and its gradients.

    For a row t of true scores and its prediction p: 0.95 (1 - cos(p, t)) + 0.05 (|p| / |t| - 1)².

    Args:
        query: [B, H, R, D] fp32, sampled queries.
        key: [B, Hkv, S, D] fp32.
        weights: [H + Hkv, D, r] fp32, W_q of every query head, then W_k of every key head.

    Returns:
        loss: [H], the mean over batches and rows.
        gradients: the gradients of the sum of `loss`, with the shape of `weights`.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    w_query, w_key = weights.split([heads, kv_heads])
    low_query, low_key = query @ w_query, key @ w_key
    wide_key, wide_low_key = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, low_key))
    true, predicted = query @ wide_key.mT, low_query @ wide_low_key.mT
    tiny = torch.finfo(true.dtype).tiny
    true_norm, norm = (t.norm(dim=-1, keepdim=True).clamp(min=tiny) for t in (true, predicted))
    cosine = (true * predicted).sum(-1, keepdim=True) / (true_norm * norm)
    excess = norm / true_norm - 1
    rows = query.shape[0] * query.shape[2]
    loss = (COSINE * (1 - cosine) + NORM * excess.square()).sum((0, 2, 3)) / rows
    d_predicted = COSINE * (cosine * predicted / norm - true / true_norm) / norm
    d_predicted = (d_predicted + 2 * NORM * excess * predicted / (norm * true_norm)) / rows
    d_low_key = (d_predicted.mT @ low_query).unflatten(1, (kv_heads, -1)).sum(2)
    gradients = query.mT @ (d_predicted @ wide_low_key), key.mT @ d_low_key
    return loss, torch.cat([gradient.sum(0) for gradient in gradients])


class Profile(NamedTuple):
    """Measurements on sampled queries, fp32: for each head [H], and for each candidate group [groups, H]."""

    critical: Tensor
    """The mean share of the keys that hold `mass` of a query's attention, the paper's 1 - sparsity."""
    missed: Tensor
    """The mean square of the attention mass that queries would miss with each of `SHARES` of the keys, chosen by
    prediction: [groups, SHARES, H]."""
    overlap: Tensor
    """The mean share of the critical keys of a group's middle that are critical for a member of the group."""
    kept: Tensor
    """The mean attention mass that groups keep with the shares in use."""


def profile(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    weights: Tensor,
    shares: Tensor,
    layout: TokenLayout,
    groups: tuple[Cube, ...],
    *,
    chosen_by: str,
    mass: float,
    scale: float,
    turn: int,
) -> Profile:
    """Compare predicted with true attention, for some whole groups of queries.

    Args:
        query, key: [H, S, D] and [Hkv, S, D] fp32, of one batch.
        key_bias: [H|1, S] fp32, added to the scaled scores, or None.
        weights: as in `loss_and_gradients`.
        shares: [H] fp32, the share of the video's keys that every group reads now.
        groups: cubes of queries, each of which divides the first.
        chosen_by: the queries of a group that choose its keys, as in the method's option.
        turn: a number that decides which groups are sampled.
    """
    heads, video = query.shape[0], slice(layout.before, layout.tokens - layout.after)
    tokens = sampled_tokens(layout, groups[0], turn)
    assert layout.grid is not None
    places = []
    for group in groups:  # on the CPU, where `unique` waits for nothing
        middles, group_of_row = middle_of_token(layout.grid, group)[tokens].unique(return_inverse=True)
        middle_rows = torch.searchsorted(tokens, middles)
        places.append((middle_rows.to(query.device), group_of_row.to(query.device)))
    tokens = tokens.to(query.device)
    found = []
    for head in range(heads):
        kv_head = head * key.shape[0] // heads
        rows = query[head, video][tokens]
        scores = scale * (rows @ key[kv_head].T)
        predicted = scale * (rows @ weights[head]) @ (key[kv_head, video] @ weights[heads + kv_head]).T
        if key_bias is not None:
            bias = key_bias[head % key_bias.shape[0]]
            scores, predicted = scores + bias, predicted + bias[video]
        found.append(_profile_head(scores, predicted, places, video, shares[head], chosen_by, mass))
    return Profile(*(torch.stack(parts, -1) for parts in zip(*found, strict=True)))


def _profile_head(
    scores: Tensor,
    predicted: Tensor,
    places: list[tuple[Tensor, Tensor]],
    video: slice,
    share: Tensor,
    chosen_by: str,
    mass: float,
) -> tuple[Tensor, ...]:
    """(critical, missed [groups, SHARES], overlap and kept [groups]) of one head.

    Args:
        scores, predicted: [R, S] true and [R, V] predicted rows of scores.
        places: for each candidate, the rows of its groups' middles, and the group of each row, [R].
    """
    weights = scores.softmax(-1)
    falling = weights.sort(-1, descending=True).values.cumsum(-1)
    critical = ((falling < mass).sum(-1) + 1).clamp(max=scores.shape[-1]).float().mean() / scores.shape[-1]
    of_video = weights[:, video]
    other_mass = 1 - of_video.sum(-1, keepdim=True)
    count = of_video.shape[-1]
    top = (critical * count).ceil().long().clamp(1, count)
    is_critical = of_video.argsort(dim=-1, descending=True, stable=True).argsort(-1) < top
    measured = key_counts(torch.tensor(SHARES, dtype=torch.float32, device=scores.device), count) - 1
    chances = predicted.softmax(-1) if chosen_by == "all" else predicted
    missed, overlap, kept = [], [], []
    for middles, group in places:
        votes = chances[middles]
        if chosen_by == "all":
            belongs = group == torch.arange(len(middles), device=group.device)[:, None]
            votes = belongs.to(chances.dtype) @ chances
        order = votes.argsort(dim=-1, descending=True, stable=True)
        curve = other_mass + of_video.gather(-1, order[group]).cumsum(-1)
        missed.append((1 - curve[:, measured]).square().mean(0))
        overlap.append((is_critical & is_critical[middles[group]]).sum(-1).float().mean() / top)
        kept.append(curve.mean(0)[key_counts(share, count) - 1])
    return critical, *(torch.stack(parts) for parts in (missed, overlap, kept))


def key_counts(shares: Tensor, video: int) -> Tensor:
    """Shares of `video` keys as numbers of keys, int64, at least one."""
    return (shares * video).round().long().clamp(1, video)


def shares_to_keep(mass: float, missed: Tensor) -> Tensor:
    """[...]: the least share of the keys with which queries keep `mass`, on a straight line between `SHARES`.

    The error of a query is about proportional to the mass that it misses, and errors add up by their squares. So a
    kept mass of 0.9 means a missed mass of 0.1 in root mean square. A mean of 0.1 could leave a few queries with
    nothing, at ten times the error.

    Args:
        missed: [..., SHARES], mean squares, falling.
    """
    held = 1 - missed.sqrt()
    shares = torch.tensor(SHARES, dtype=held.dtype, device=held.device)
    above = (held < mass).sum(-1, keepdim=True).clamp(max=len(SHARES) - 1)
    below = (above - 1).clamp(min=0)
    low, high = held.gather(-1, below), held.gather(-1, above)
    part = ((mass - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return torch.lerp(shares[below], shares[above], part).squeeze(-1)


def sampled_tokens(layout: TokenLayout, group: Cube, turn: int) -> Tensor:
    """[R] int64, rising: the video tokens of evenly spread cubes: 1/16 of all, at most `ROWS`; at least a cube."""
    assert layout.grid is not None
    number = cube_of_token(layout.grid, group)
    cubes = int(number.max()) + 1
    wanted = min(ROWS, layout.video_tokens // 16) // math.prod(group)
    step = cubes / max(1, wanted)
    chosen = ((torch.arange(max(1, wanted), dtype=torch.float32) * step).long() + turn) % cubes
    return torch.isin(number, chosen).nonzero()[:, 0]


# ---- The file of a trained predictor ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The part of a file for one site."""

    weights: Tensor
    """[H + Hkv, D, r] fp32"""
    shares: Tensor
    """[H] fp32, the share of the video's keys that each head reads; a head with 1 or more is dense."""
    group: Cube
    chosen_by: str
    """The queries of a group that choose, as in the method's option."""


def save_predictor(path: Path, sites: Mapping[str, Trained]) -> None:
    """Write safetensors; the metadata has the groups and the queries that choose."""
    from safetensors.torch import save_file

    tensors = {}
    for name, trained in sites.items():
        tensors[f"{name}.weights"] = trained.weights.detach().cpu().contiguous()
        tensors[f"{name}.shares"] = trained.shares.detach().cpu().contiguous()
    groups = {name: trained.group for name, trained in sites.items()}
    chosen_by = {name: trained.chosen_by for name, trained in sites.items()}
    words = {"groups": json.dumps(groups), "chosen_by": json.dumps(chosen_by)}
    save_file(tensors, path, metadata={"format": FORMAT, **words})


def names_in(path: Path, names: Sequence[str]) -> Mapping[str, str]:
    """Site -> its name in a file, for sites of one graph. Either name may have the path of a wrapper in front.

    Raises:
        OptionError: no such file, not a predictor, or one of another model.
    """
    with _opened(path) as (_, metadata):
        groups = json.loads(metadata["groups"])
    if (found := align(names, groups)) is None:
        unknown = next((name for name in names if name not in groups), names[0])
        raise OptionError(
            f"predictor {path} knows no attention {unknown!r} but {', '.join(groups)}: it is of another "
            "model, or of one that was compiled as a whole"
        )
    return found.names


def load_predictor(path: Path, site: AttentionSite) -> Trained:
    """The part of a file for a site.

    Raises:
        OptionError: no such file, not a predictor, or one of another model.
    """
    name = site.known_as or names_in(path, [site.name])[site.name]
    with _opened(path) as (file, metadata):
        groups, chosen_by = (json.loads(metadata[words]) for words in ("groups", "chosen_by"))
        weights, shares = (file.get_tensor(f"{name}.{part}") for part in ("weights", "shares"))
    if weights.shape[:2] != (site.heads + site.kv_heads, site.head_dim) or shares.shape != (site.heads,):
        raise OptionError(
            f"predictor {path} is of another model: for {site.name} it has weights {list(weights.shape)}, must "
            f"have [{site.heads} + {site.kv_heads} heads, {site.head_dim}, rank]"
        )
    first, second, third = groups[name]
    return Trained(weights=weights, shares=shares, group=(first, second, third), chosen_by=chosen_by[name])


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """(a predictor's file, its metadata)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise OptionError(
                    f"predictor must be a file that DSVTrainer.save_predictor wrote, got {path}"
                )
            yield file, metadata
    except (OSError, SafetensorError) as error:
        raise OptionError(f"predictor must be a safetensors file, got {path}: {error}") from None
