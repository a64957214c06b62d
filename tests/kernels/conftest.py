"""Fixtures for all tests of kernels."""

from collections.abc import Iterator

import pytest
from any_provider import PROVIDERS

from sparsify_compiler.testing.poison import poisoned_memory


@pytest.fixture(scope="module")
def poisoned_outputs() -> Iterator[None]:
    """Outputs hold poison until a kernel writes them."""
    with poisoned_memory():
        yield


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    return request.param
