"""The models that the compiler is tested on are what they claim to be: each call, its tokens, its effect."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsify_compiler.testing.models import CASES, Expected

pytest.importorskip("diffusers")


class Attention(TorchFunctionMode):
    """Notes every attention call's shapes; with `numb`, that call returns zeros instead."""

    def __init__(self, numb: int | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Size, torch.Size]] = []
        self.numb = numb

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            named = dict(zip(["query", "key"], args, strict=False)) | (kwargs or {})
            if len(self.calls) == self.numb:
                out = torch.zeros_like(out)
            self.calls.append((named["query"].shape, named["key"].shape))
        return out


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any], numb: int | None = None) -> tuple[Tensor, Attention]:
    with Attention(numb) as seen:
        out = model(**inputs)
    return (out if isinstance(out, Tensor) else out[0]), seen


def check(model: nn.Module, inputs: dict[str, Any], expected: list[Expected]) -> None:
    """One call for each expectation, of its size; and every call over video tokens matters to the output."""
    out, seen = run(model, inputs)
    assert out.isfinite().all()
    assert len(seen.calls) == len(expected)
    for (query, key), site in zip(seen.calls, expected, strict=True):
        if site.grid is not None:
            assert query[-2] == key[-2] == site.tokens
            assert len(query) == 4
    for index, site in enumerate(expected):
        if site.grid is not None:
            numbed, _ = run(model, inputs, numb=index)
            assert (numbed - out).abs().max() > 1e-3 * out.abs().max()


@pytest.mark.parametrize(("grid", "batch"), [((5, 7, 9), 2), ((4, 6, 3), 1)])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, grid: tuple[int, int, int], batch: int) -> None:
    model, inputs = CASES[name].build(grid, batch)
    check(model, inputs, CASES[name].expect(grid))


@pytest.mark.parametrize("name", CASES)
def test_build_is_seeded(name: str) -> None:
    first, second = (run(*CASES[name].build(seed=3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, run(*CASES[name].build(seed=4))[0])
