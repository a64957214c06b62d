"""Four processes with gloo groups, for all tests of this folder."""

from collections.abc import Iterator

import pytest

from sparsify_compiler.testing.ranks import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool(4) as made:
        yield made
