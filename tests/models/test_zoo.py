"""The models that the compiler is tested on are what they claim to be: each call, its tokens, its effect."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from marks import needs_diffusers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsify_compiler.testing.dits import ORDERS, Recipe, recipes
from sparsify_compiler.testing.models import CASES, GRID, Expected, Grid, Inputs

SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax)
"""Stands for the whole call where a model spells attention out."""


class Attention(TorchFunctionMode):
    """Notes the tokens of every call; the one numbered `blur` gives all keys the same weight."""

    def __init__(self, blur: int | None = None) -> None:
        super().__init__()
        self.blur = blur
        self.sizes: list[tuple[int, int]] = []
        """(query tokens, key tokens)"""
        self.inputs: list[tuple[Tensor, Tensor]] = []
        """(query, key), of calls that are not spelled out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        blur = len(self.sizes) == self.blur
        if func is F.scaled_dot_product_attention:
            named = dict(zip(["query", "key", "value"], args, strict=False)) | (kwargs or {})
            self.inputs.append((named["query"], named["key"]))
            self.sizes.append((named["query"].shape[-2], named["key"].shape[-2]))
            if blur:
                mean = named["value"].mean(-2, keepdim=True)
                return mean.repeat_interleave(out.shape[1] // mean.shape[1], 1).expand_as(out)
        elif func in SOFTMAX:
            self.sizes.append((out.shape[-2], out.shape[-1]))
            if blur:
                return torch.full_like(out, 1 / out.shape[-1])
        return out


def run(model: nn.Module, inputs: Inputs, blur: int | None = None) -> tuple[Tensor, Attention]:
    with Attention(blur) as seen:
        out = model(**inputs)
    return (out if isinstance(out, Tensor) else out[0]), seen


@torch.no_grad()
def check(model: nn.Module, inputs: Inputs, expected: list[Expected]) -> None:
    """One call for each expectation, of its size; and where the video's tokens look matters to the output."""
    out, seen = run(model, inputs)
    assert out.isfinite().all()
    assert len(seen.sizes) == len(expected)
    for index, (size, site) in enumerate(zip(seen.sizes, expected, strict=True)):
        if site.grid is not None:
            assert size == (site.tokens, site.tokens)
            blurred, _ = run(model, inputs, blur=index)
            assert (blurred - out).abs().max() > 1e-3 * out.abs().max()


def patch_of(video: Tensor, grid: Grid, axes: list[int]) -> Tensor:
    """For each number of the video, packed or with these axes for a grid: which token shows it, row-major."""
    if video.dim() == 3:
        return torch.arange(video.shape[1])[:, None].expand_as(video)
    patch = torch.zeros_like(video, dtype=torch.long)
    for axis, tokens in zip(axes, grid, strict=True):
        at = torch.arange(video.shape[axis]) * tokens // video.shape[axis]
        patch = patch * tokens + at.view(-1, *[1] * (video.dim() - axis - 1))
    return patch


def lies_in_order(
    model: nn.Module, inputs: Inputs, name: str, axes: list[int], index: int, site: Expected
) -> bool:
    """Whether tokens of a call's query and key are made of the patch that is expected there, and of no other.

    To be asked of a model's first call over the video alone: later every token has seen all the others.
    """
    assert site.grid is not None
    video = inputs[name].clone().requires_grad_()
    patch = patch_of(video, site.grid, axes)
    _, seen = run(model, inputs | {name: video})
    last = math.prod(site.grid) - 1
    for tokens in seen.inputs[index]:
        for token in [0, 1, last // 2, last]:
            (grad,) = torch.autograd.grad(
                tokens[..., site.before + token, :].sum(), video, retain_graph=True, allow_unused=True
            )
            if grad is None or patch[grad != 0].unique().tolist() != [token]:
                return False
    return True


@needs_diffusers
@pytest.mark.parametrize(("grid", "batch"), [(GRID, 2), ((4, 6, 3), 1)])
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, grid: Grid, batch: int) -> None:
    model, inputs = CASES[name].build(grid, batch)
    check(model, inputs, CASES[name].expect(grid, batch))


@needs_diffusers
@pytest.mark.parametrize("name", CASES)
def test_case_is_seeded(name: str) -> None:
    with torch.no_grad():
        first, same, other = (run(*CASES[name].build(seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@needs_diffusers
@pytest.mark.parametrize("name", CASES)
def test_tokens_of_case(name: str) -> None:
    sites = CASES[name].expect(batch=1)
    index = next((at for at, site in enumerate(sites) if site.grid is not None), None)
    if index is None:
        pytest.skip("no attention over the whole video")
    model, inputs = CASES[name].build(batch=1)
    shape = inputs["hidden_states"].shape
    axes = [at for tokens in GRID for at in range(1, len(shape)) if shape[at] in (tokens, 2 * tokens)]
    assert lies_in_order(model, inputs, "hidden_states", axes, index, sites[index])


@given(recipes())
@settings(max_examples=80)
def test_recipe(recipe: Recipe) -> None:
    model, inputs = recipe.build()
    check(model, inputs, recipe.expect())


@given(recipes())
@settings(max_examples=50)
def test_tokens_of_recipe(recipe: Recipe) -> None:
    """Tokens lie as expected, or, where the trap is their order, not so."""
    recipe = dataclasses.replace(recipe, spelling="keywords")
    model, inputs = recipe.build()
    site = recipe.expect()[0]
    axes = [1, 3, 4] if recipe.frames_first else [2, 3, 4]
    if site.grid is not None:
        assert lies_in_order(model, inputs, "x", axes, 0, site)
    elif recipe.trap in ORDERS or recipe.trap_of(0) == "rolled keys":
        claim = Expected(grid=recipe.grid, before=recipe.parts[0])
        assert not lies_in_order(model, inputs, "x", axes, 0, claim)
