"""What heads read, against every way of sharing out that a small grid of shares has."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.methods.predictor import SHARES
from sparsify_compiler.training.allocation import Allotment, Offer, allot
from sparsify_compiler.training.cost import Cost


def power_law(*needed: float) -> tuple[Tensor, Tensor]:
    """(held, lost) of heads that keep half of their mass with the share needed."""
    shares = torch.tensor(SHARES)
    held = torch.stack([shares / (shares + need) * (1 + need) for need in needed])
    return held, (1 - held).square()


def an_offer(*cubes: tuple[float, ...], costs: tuple[Cost, ...] | None = None, **more: Any) -> Offer:
    """Of cubes with what each head needs by them."""
    held, lost = (torch.stack(parts) for parts in zip(*(power_law(*cube) for cube in cubes), strict=True))
    costs = costs or (Cost(0.0, 1.0),) * len(cubes)
    return Offer(held=held, lost=lost, costs=costs, **{"now": None} | more)


def done(offer: Offer, allotment: Allotment) -> tuple[float, float, float]:
    """(mean mass kept, sum of squares missed, sum of costs) of heads that keep half with the share needed."""
    held, lost, costs = [], [], []
    for h, share in enumerate(allotment.shares.tolist()):
        # The curve is that of `power_law`, so what is needed follows from any of its points.
        first, begin = SHARES[0], float(offer.held[allotment.group, h, 0])
        need = first * (1 - begin) / (begin - first)
        held.append(share / (share + need) * (1 + need))
        lost.append((1 - held[-1]) ** 2)
        costs.append(1.0 if share >= 1 else float(offer.costs[allotment.group].of(torch.tensor(share))))
    return sum(held) / len(held), sum(lost), sum(costs)


needs = st.floats(1e-4, 0.5)


@given(st.lists(st.tuples(needs, needs), min_size=1, max_size=3), st.floats(0.3, 0.99))
def test_the_mass_is_kept_and_hardly_more(sites: list[tuple[float, float]], mass: float) -> None:
    offers = [an_offer(site) for site in sites]
    found = [done(offer, allotment) for offer, allotment in zip(offers, allot(offers, mass), strict=True)]
    kept = sum(held for held, _, _ in found) / len(found)
    assert mass - 1e-5 <= kept
    least = sum(done(offer, Allotment(0, torch.full((2,), SHARES[0])))[0] for offer in offers) / len(offers)
    assert kept <= max(mass, least) + 0.13  # a step of shares, or a head that turns dense


@given(needs, needs, st.floats(0.5, 0.97))
def test_no_other_shares_miss_less_for_the_same_time(first: float, second: float, mass: float) -> None:
    """Of all pairs of shares on the measured grid, dense included."""
    offer = an_offer((first, second))
    (allotment,) = allot([offer], mass)
    _, missed, cost = done(offer, allotment)
    for shares in itertools.product(SHARES, repeat=2):
        _, other, price = done(offer, Allotment(0, torch.tensor(shares)))
        assert other > 0.97 * missed - 1e-9 or price > 0.97 * cost


def test_sharp_heads_keep_more_than_diffuse_ones():
    (allotment,) = allot([an_offer((0.001, 0.2))], 0.8)
    sharp, diffuse = (done(an_offer((need,)), Allotment(0, share[None]))[0] for need, share in zip(
        (0.001, 0.2), allotment.shares, strict=True
    ))  # fmt: skip
    assert sharp > 0.9 > 0.8 > diffuse
    assert allotment.shares[0] < 0.1 < allotment.shares[1]


def test_one_price_is_for_all_sites():
    apart = allot([an_offer((0.001, 0.05)), an_offer((0.2, 0.01))], 0.85)
    together = allot([an_offer((0.001, 0.05, 0.2, 0.01))], 0.85)
    torch.testing.assert_close(torch.cat([site.shares for site in apart]), together[0].shares)


def test_a_head_is_dense_where_reading_key_by_key_costs_more():
    cheap, dear = Cost(0.0, 1.0), Cost(0.5, 4.0)
    shares = [allot([an_offer((0.05, 0.05), costs=(cost,))], 0.9)[0].shares for cost in (cheap, dear)]
    assert (shares[0] < 0.5).all()
    assert (shares[1] == 1).all()
    never = allot([an_offer((0.05,), costs=(Cost(0.0, float("inf")),))], 0.5)
    assert never[0].shares.tolist() == [1.0]
    assert allot([an_offer((0.05,))], 1.0)[0].shares.tolist() == [1.0]


def test_the_cube_is_the_one_that_costs_least_and_does_not_change_for_little():
    """The second needs a quarter of the keys, which cost 1.5 or 8 times as much each."""
    for dearer, expected in ((1.5, 1), (8.0, 0)):
        costs = (Cost(0.0, 1.0), Cost(0.0, dearer))
        assert allot([an_offer((0.2,), (0.05,), costs=costs)], 0.8)[0].group == expected
    costs = (Cost(0.0, 1.0), Cost(0.0, 1.0))
    little = an_offer((0.05,), (0.049,), costs=costs)
    assert allot([little], 0.8)[0].group == 1
    assert allot([an_offer((0.05,), (0.049,), costs=costs, now=0)], 0.8)[0].group == 0
    assert allot([an_offer((0.2,), (0.05,), costs=costs, now=0)], 0.8)[0].group == 1


def test_heads_that_keep_the_mass_with_the_least_share_read_that():
    (allotment,) = allot([an_offer((1e-6, 1e-6))], 0.9)
    assert allotment.shares.tolist() == pytest.approx([SHARES[0]] * 2)
