"""Fixtures for the tests of searches and policies: a model, and the policy found for it."""

import math
from typing import Any

import pytest
import torch
from searching import SECONDS, SPARSE, calls

from sparsify_compiler import Policy
from sparsify_compiler.testing.models import CASES, Made
from sparsify_compiler.training import search
from sparsify_compiler.training.search import _Attention, read_menu


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attentions take the times of `SECONDS`, whatever the machine does."""

    def seconds(attention: _Attention, *tensors: Any) -> float:
        settings = attention.plan.settings
        for label, entry in read_menu(SPARSE).items():
            if settings is None or entry.method.fit(attention.plan.site, attention.plan.layout) == settings:
                return SECONDS[label]
        raise AssertionError(settings)

    monkeypatch.setattr(_Attention, "seconds", seconds)


@pytest.fixture(scope="session")
def wan() -> Made:
    return CASES["wan"].build(batch=1)


@pytest.fixture(scope="session")
def found(wan: Made) -> Policy:
    """A policy searched with real times."""
    torch._dynamo.reset()
    return search(wan[0], calls(wan[1]), menu=SPARSE, r=math.inf, total=math.inf)
