"""How much of the keys every head reads, and by which cubes of queries it chooses them.

A query that misses a share l of its attention errs by about l, and errors of queries and heads add up by their
squares. So of all that heads could read, what is read has the least

    sum over heads of (mean of l² + price * cost)

where cost is a head's time in units of a dense one's, measured; a dense head costs 1 and misses nothing. One price
is for all heads of a model: the highest at which they keep `mass` of the attention on average. So heads with few
critical keys, where certainty is cheap, keep nearly all, and diffuse heads less than `mass`; and a head turns
dense, or a site chooses by smaller cubes, where that buys more than it costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.methods.predictor import SHARES
from sparsify_compiler.training.cost import Cost

LOWER = 0.9
"""Of the sum with the cube in use, what that with another must be below: a change of cube is a new program."""
STEPS = 8
"""Shares that are looked at between two measured ones."""
PRICES = -60.0, 10.0
"""Powers of two between which the price is sought."""
HALVINGS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What the heads of a site could do: fp32, of each candidate cube the last of which costs most a key."""

    held: Tensor
    """Mean attention mass kept with each of `SHARES`: [groups, H, SHARES]."""
    lost: Tensor
    """Mean square of the mass missed, as `held`."""
    costs: Sequence[Cost]
    """Of the cubes."""
    now: int | None
    """The cube in use, if any."""


class Allotment(NamedTuple):
    """What the heads of a site do."""

    group: int
    shares: Tensor
    """[H] fp32, of the keys; 1: dense."""


def allot(offers: Sequence[Offer], mass: float) -> list[Allotment]:
    """What all heads of a model read, so that they keep `mass` on average.

    Args:
        offers: one for each site.
        mass: in (0, 1]; with 1 all heads are dense.
    """
    curves = [_Curves(offer) for offer in offers]
    low, high = PRICES
    chosen = [site.at(2.0**low) for site in curves]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = [site.at(2.0**middle) for site in curves]
        kept = torch.cat([kept for _, kept in found]).mean()
        if kept >= mass:
            low, chosen = middle, found
        else:
            high = middle
    return [allotment for allotment, _ in chosen]


class _Curves:
    """An offer at finely spaced shares, being dense the last of them."""

    def __init__(self, offer: Offer) -> None:
        self.now = offer.now
        measured = torch.tensor(SHARES, device=offer.held.device)
        steps = torch.arange((len(SHARES) - 1) * STEPS, device=measured.device) / STEPS
        below, part = steps.long(), steps.frac()
        first, last = measured[below], measured[below + 1]
        shares = first * (last / first) ** part
        along = (shares - first) / (last - first)
        # What is held bends downwards and what is missed upwards, so lines promise no more than there is.
        held = torch.lerp(offer.held[..., below], offer.held[..., below + 1], along)
        missed = offer.lost.clamp(min=0).sqrt()
        lost = torch.lerp(missed[..., below], missed[..., below + 1], along).square()
        self.shares = torch.nn.functional.pad(shares, (0, 1), value=1.0)
        self.lost = torch.nn.functional.pad(lost, (0, 1), value=0.0)
        self.held = torch.nn.functional.pad(held, (0, 1), value=1.0)
        costs = torch.stack([cost.of(shares) for cost in offer.costs])
        self.costs = torch.nn.functional.pad(costs, (0, 1), value=1.0)[:, None]

    def at(self, price: float) -> tuple[Allotment, Tensor]:
        """What the heads choose at a price, and the mass that each keeps."""
        sums, places = (self.lost + price * self.costs).min(-1)
        totals = sums.sum(-1)
        group = int(totals.argmin())
        if self.now is not None and totals[group] > LOWER * totals[self.now]:
            group = self.now
        place = places[group]
        kept = self.held[group].gather(-1, place[:, None])[:, 0]
        return Allotment(group, self.shares[place]), kept
