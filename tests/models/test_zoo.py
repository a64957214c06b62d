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
    """Notes the shapes of every attention call; the one numbered `blur` gives all keys the same weight."""

    def __init__(self, blur: int | None = None) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Size, torch.Size]] = []
        self.blur = blur

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            given = dict(zip(["query", "key", "value"], args, strict=False)) | (kwargs or {})
            if len(self.calls) == self.blur:
                mean = given["value"].mean(-2, keepdim=True)
                out = mean.repeat_interleave(out.shape[1] // mean.shape[1], 1).expand_as(out)
            self.calls.append((given["query"].shape, given["key"].shape))
        return out


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any], blur: int | None = None) -> tuple[Tensor, Attention]:
    with Attention(blur) as seen:
        out = model(**inputs)
    return (out if isinstance(out, Tensor) else out[0]), seen


def check(model: nn.Module, inputs: dict[str, Any], expected: list[Expected]) -> None:
    """One call for each expectation, of its size; and where the video's tokens look matters to the output."""
    out, seen = run(model, inputs)
    assert out.isfinite().all()
    assert len(seen.calls) == len(expected)
    for (query, key), site in zip(seen.calls, expected, strict=True):
        if site.grid is not None:
            assert query[-2] == key[-2] == site.tokens
            assert len(query) == 4
    for index, site in enumerate(expected):
        if site.grid is not None:
            blurred, _ = run(model, inputs, blur=index)
            assert (blurred - out).abs().max() > 1e-3 * out.abs().max()


@pytest.mark.parametrize(("grid", "batch"), [((5, 7, 9), 2), ((4, 6, 3), 1)])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, grid: tuple[int, int, int], batch: int) -> None:
    model, inputs = CASES[name].build(grid, batch)
    check(model, inputs, CASES[name].expect(grid, batch))


@pytest.mark.parametrize("name", CASES)
def test_build_is_seeded(name: str) -> None:
    first, second = (run(*CASES[name].build(seed=3))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, run(*CASES[name].build(seed=4))[0])
