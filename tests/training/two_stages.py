"""A model in two-stage training, and its steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.testing.models import CASES, GRID, Inputs

OPTIONS = {"method": "dsv", "rank": 8, "inner_backend": "eager"}


def made(family: str = "wan", batch: int = 1) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model, inputs = CASES[family].make(GRID, batch)
    return model.train(), inputs


def step(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """The loss of a call, after its backward pass."""
    out = model(**inputs, return_dict=False)[0]
    loss = out.square().mean()
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
