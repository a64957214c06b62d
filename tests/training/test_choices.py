"""What a site chooses from its profile: sparse heads, the group of queries, shares."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler.methods.dsv import GROUPS, Choice, Dsv
from sparsify_compiler.methods.grid import Cube
from sparsify_compiler.methods.predictor import SHARES
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.cost import HeadCost
from sparsify_compiler.testing.strategies import site_of
from sparsify_compiler.training.dsv import Profile, _Site


def a_site(shares: int = 2, **options: Any) -> _Site:
    site, layout = site_of(torch.empty(1, shares, 400, 16)), TokenLayout(tokens=400, grid=(4, 10, 10))
    method = Dsv(**options).fit(site, layout)
    plan = AttentionPlan(site=site, layout=layout, method="dsv", settings=method, provider="cpu", reason="")
    empty = torch.zeros(0)
    return _Site(plan, empty, torch.ones(shares), empty, empty)


def missed_with(needed: Tensor) -> Tensor:
    """Squares of straight lines that reach 0.1 at the share needed."""
    return (0.1 - 0.1 * (torch.tensor(SHARES) - needed[..., None])).square()


def a_profile(needed: list[float], overlaps: list[float]) -> Profile:
    return Profile(
        torch.tensor(needed),
        missed_with(torch.tensor(needed)).expand(len(overlaps), -1, -1),
        torch.tensor(overlaps)[:, None].expand(-1, len(needed)),
        torch.ones(len(overlaps), len(needed)),
    )


def no_cost(group: Cube) -> HeadCost:
    raise AssertionError("a fixed budget is not weighed")


def test_heads_turn_sparse_below_the_break_even_and_back():
    site = a_site()
    site.profile = a_profile([0.1, 0.5], [0.9, 0.9, 0.9, 1.0])
    site.choose(lambda group: HeadCost(0.0, 1 / 0.4))
    assert site.choice == Choice(GROUPS[0], 0.125, "all")
    torch.testing.assert_close(site.shares, torch.tensor([0.1, 1.0]))
    site.profile = a_profile([0.45, 0.3], [0.9, 0.9, 0.9, 1.0])
    site.choose(lambda group: HeadCost(0.0, 1 / 0.4))
    assert site.choice == Choice(GROUPS[0], 0.5, "all")
    torch.testing.assert_close(site.shares, torch.tensor([1.0, 0.3]))


def test_with_a_budget_groups_shrink_until_they_overlap_and_do_not_grow():
    site = a_site(kv_budget=0.25)
    site.profile = a_profile([0.1, 0.1], [0.5, 0.81, 0.9, 1.0])
    site.choose(no_cost)
    assert site.choice == Choice(GROUPS[1], 0.25, "all")
    assert site.shares.tolist() == [0.25, 0.25]
    site.profile = a_profile([0.1, 0.1], [0.95, 0.7, 0.75, 1.0])
    site.choose(no_cost)
    assert site.choice.group == GROUPS[3]
    site.profile = a_profile([0.1, 0.1], [0.95, 0.95, 0.95, 1.0])
    site.choose(no_cost)
    assert site.choice.group == GROUPS[3]


def test_the_group_is_the_one_that_costs_least_and_does_not_change_for_little():
    """Small groups need fewer keys, which cost more each. A dense head costs 1, whatever the group."""
    site = a_site()
    costs = dict(
        zip(
            GROUPS,
            (HeadCost(0.1, 1.0), HeadCost(0.1, 2.0), HeadCost(0.1, 4.0), HeadCost(0.1, 30.0)),
            strict=True,
        )
    )
    needed = torch.tensor([[0.9, 0.5], [0.9, 0.2], [0.9, 0.11], [0.8, 0.02]])
    site.profile = Profile(torch.zeros(2), missed_with(needed), torch.zeros(4, 2), torch.ones(4, 2))
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[1]  # costs of the second head: 0.6, 0.5, 0.54, 0.7
    assert site.shares.tolist() == [1.0, pytest.approx(0.2)]
    site.profile.missed[2, 1] = missed_with(torch.tensor(0.08))  # 0.42, and 1 of the first: not a tenth less
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[1]
    site.profile.missed[2, 1] = missed_with(torch.tensor(0.05))  # 0.3: a tenth less
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[2]
    site.profile.missed[1, 1] = missed_with(torch.tensor(0.01))  # larger groups are not gone back to
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[2]


def test_a_profile_moves_a_tenth_of_the_way():
    profile = a_profile([0.5], [0.6])
    profile.update(a_profile([0.1], [0.9]))
    assert float(profile.critical) == pytest.approx(0.46)
    assert float(profile.overlap) == pytest.approx(0.63)


def test_a_fixed_budget_is_read_whatever_the_profile_says():
    site = a_site(kv_budget=100)
    site.profile = a_profile([0.9, 0.01], [0.9, 0.9, 0.9, 1.0])
    site.choose(no_cost)
    assert site.shares.tolist() == [0.25, 0.25]
