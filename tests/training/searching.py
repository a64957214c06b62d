"""The menu, the calls and the oracle with which searches and policies are tested."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import Policy
from sparsify_compiler.policy import DENSE
from sparsify_compiler.testing.models import GRID, Inputs, output_of
from sparsify_compiler.training.search import read_menu

SVG2 = {
    "method": "svg2",
    "q_clusters": 6,
    "kv_clusters": 12,
    "kmeans_iters": (4, 2),
    "far_field": "drop",
    "top_p": 0.5,
}
CUBES = {"method": "cubes", "cube": (2, 3, 4), "query_cube": (3, 4, 4)}
SPARSE = [{"method": "tile", "reference_frames": 2}, {"method": "tile", "reference_frames": 1}, SVG2]
TILE2, TILE1, CLUSTERS = list(read_menu(SPARSE))[1:]
SECONDS = {DENSE: 8e-3, TILE2: 4e-3, TILE1: 2e-3, CLUSTERS: 6e-3}
TOKENS = math.prod(GRID)


def calls(inputs: Inputs) -> list[Inputs]:
    """Two of different latents and time steps."""
    other = {"hidden_states": inputs["hidden_states"].flip(2), "timestep": inputs["timestep"] // 2}
    return [inputs, {**inputs, **other}]


def answer(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return output_of(model(**inputs))


def loss(got: Tensor, exact: Tensor) -> float:
    return float(((got - exact).double().norm() / exact.double().norm()) ** 2)


def mixed(found: Policy, *choices: str) -> Policy:
    """The policy with other choices."""
    layers = zip(found.layers, choices, strict=True)
    return replace(found, layers=tuple(replace(layer, choice=choice) for layer, choice in layers))
