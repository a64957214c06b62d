"""Every pair of two choices of model, method and ranks, in few cases: each against one process, in threads."""

import itertools
import random
from typing import Any

import pytest

from sparsify_compiler.testing.dits import Recipe
from sparsify_compiler.testing.parallel import in_threads

AXES: dict[str, tuple[Any, ...]] = {
    "method": ("dense", "tile", "cubes", "svg2", "keys"),
    "size": (1, 2, 3, 4),
    "trains": (False, True),
    "heads": ((3, 3), (4, 2), (1, 1)),
    "text": ("none", "first", "last", "cross"),
    "mask": ("none", "bool", "additive", "per head"),
    "batch": (1, 3),
    "grid": ((3, 4, 5), (3, 3, 5)),
    "patch": ("conv3d", "packed"),
    "position": ("added", "rope halves", "rope complex"),
}
"""Name of a choice -> its values. The first grid has tokens for 4 ranks, the other not."""
BOUND = 1e-5
"""Rounding in float32: matrix products of fewer rows may add in another order."""

Case = tuple[Any, ...]


def pairs(case: Case) -> set[Any]:
    """All pairs of two choices in a case."""
    return set(itertools.combinations(enumerate(case), 2))


def cases() -> list[Case]:
    """Cases in which every pair occurs, drawn one by one: each has more new pairs than 60 others."""
    rng, values = random.Random(0), list(AXES.values())
    left = {
        pair
        for (i, some), (j, others) in itertools.combinations(enumerate(values), 2)
        for pair in itertools.product(((i, one) for one in some), ((j, one) for one in others))
    }
    found = []
    while left:
        wanted = dict(min(left, key=repr))  # at least this pair, so that there is an end
        drawn = [tuple(wanted.get(i, rng.choice(some)) for i, some in enumerate(values)) for _ in range(60)]
        found.append(max(drawn, key=lambda case: len(pairs(case) & left)))
        left -= pairs(found[-1])
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("case", cases(), ids=str)
def test_ranks_compute_what_one_process_computes(case: Case) -> None:
    method, size, trains, (heads, kv_heads), text, mask, batch, grid, patch, position = case
    recipe = Recipe(
        grid=grid, batch=batch, patch=patch, frames_first=False, position=position, text=text, text_tokens=5,
        extra_tokens=0, streams=text in ("first", "last"), mask=mask, heads=heads, kv_heads=kv_heads, head_dim=8,
        split="linears", view="view", norm=True, spelling="gqa" if kv_heads < heads else "keywords", scale=None,
        trap="", trapped=0,
    )  # fmt: skip
    model, inputs = recipe.build()
    options = {"method": method, "provider": "reference"}
    (found,) = in_threads(model, inputs, options, size, trains=trains)
    assert found.output <= BOUND
    assert found.gradient <= BOUND
    assert len(found.sharding.sites) == 2, found.sharding
