"""A model in two-stage training, and its steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler import DSVTrainer
from sparsify_compiler.testing.models import CASES, GRID, Inputs

OPTIONS = {"method": "dsv", "rank": 8, "inner_backend": "eager"}


def made(family: str = "wan", batch: int = 1) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model, inputs = CASES[family].make(GRID, batch)
    return model.train(), inputs


def in_stage_2(
    model: nn.Module, inputs: Inputs, *, steps: int, every: int, **options: Any
) -> tuple[Callable[..., Any], DSVTrainer]:
    """The compiled model in stage 2, and its trainer, after `steps` steps with profiles `every` so many steps."""
    fast = torch.compile(model, backend="sparsify", options=OPTIONS | options)
    dsv = DSVTrainer(fast, threshold=10.0, profile_every=(every, every), break_even=1.0)
    for _ in range(steps):
        step(fast, inputs)
        dsv.step()
    assert dsv.stage == 2
    return fast, dsv


def step(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """The loss of a call, after its backward pass."""
    out = model(**inputs, return_dict=False)[0]
    loss = out.square().mean()
    loss.backward()
    return loss.detach()
