"""A fixture for all tests of kernels."""

from collections.abc import Iterator

import pytest

from sparsify_compiler.testing.poison import poisoned_memory


@pytest.fixture(scope="module")
def poisoned_outputs() -> Iterator[None]:
    """Outputs hold poison until a kernel writes them."""
    with poisoned_memory():
        yield
