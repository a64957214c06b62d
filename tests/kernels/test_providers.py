"""Every provider of a family of ops has the functions of the family's `Provider`, with the same parameters."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from sparsify_compiler import kernels
from sparsify_compiler.kernels import attention, clustering, far_field, prediction, providers, statistics

FAMILIES: dict[str, Any] = {
    "attention": attention.Provider,
    "clustering": clustering.Provider,
    "far_field": far_field.Provider,
    "prediction": prediction.Provider,
    "statistics": statistics.Provider,
}


def test_no_family_is_missing():
    assert {path.parent.name for path in Path(kernels.__file__).parent.glob("*/reference.py")} == set(
        FAMILIES
    )


@pytest.mark.parametrize("provider", providers.PROVIDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_functions_of_a_provider(family, provider):
    if provider == "triton":
        pytest.importorskip("triton")
    module = providers.load(provider, family)
    functions = inspect.getmembers(FAMILIES[family], inspect.isfunction)
    names = [name for name, _ in functions if not name.startswith("_")]
    assert names
    for name in names:
        wanted = inspect.signature(getattr(FAMILIES[family], name))
        _, *parameters = wanted.parameters.values()
        found = inspect.signature(getattr(module, name))
        taken = list(found.parameters.values())
        taken, more = taken[: len(parameters)], taken[len(parameters) :]
        assert [(p.name, p.annotation) for p in taken] == [(p.name, p.annotation) for p in parameters], name
        assert all(p.default is not inspect.Parameter.empty for p in more), name
        assert found.return_annotation == wanted.return_annotation, name
