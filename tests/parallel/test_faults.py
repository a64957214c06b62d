"""A rank that fails: the others end within the timeout, with the rank, the op and the attention named.

`benchmarks/faults.py` has the whole matrix, by night.
"""

import random
from collections.abc import Iterator

import pytest

from sparsify_compiler.testing.faults import AT_A_PLACE, AT_THE_START, Case, Rehearsal

LAYERS, SIZE = 2, 3


@pytest.fixture(scope="module")
def rehearsal() -> Iterator[Rehearsal]:
    with Rehearsal(layers=LAYERS, size=SIZE, timeout=5) as made:
        yield made


@pytest.mark.parametrize(("number", "fault"), enumerate((*AT_A_PLACE, *AT_THE_START)))
def test_the_others_end_and_name_the_rank(rehearsal: Rehearsal, number: int, fault: str) -> None:
    place = random.Random(fault).randrange(2 * LAYERS + 1)
    outcome = rehearsal.run(Case(fault, culprit=number % SIZE, place=place))
    assert not outcome.wrong(), outcome
