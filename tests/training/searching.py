"""The menu, the calls and the oracle with which searches and policies are tested."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sparsify_compiler import Policy
from sparsify_compiler.policy import DENSE
from sparsify_compiler.testing.models import GRID, Inputs
from sparsify_compiler.testing.oracles import masked_attention
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


class Masked(TorchFunctionMode):
    """Eager self-attentions over the video under one mask each, in order; dense where there is none."""

    def __init__(self, masks: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.masks: Iterator[Tensor | None] = iter(masks)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (given[name] for name in ("query", "key", "value"))
            if query.shape[-2] == key.shape[-2] == TOKENS and (mask := next(self.masks)) is not None:
                return masked_attention(query, key, value, mask, dtype=torch.float32)[0]
        return func(*args, **kwargs)


def answer(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out[0] if isinstance(out, tuple) else out.sample


def loss(got: Tensor, exact: Tensor) -> float:
    return float(((got - exact).double().norm() / exact.double().norm()) ** 2)


# what a policy does


def mixed(found: Policy, *choices: str) -> Policy:
    """The policy with other choices."""
    layers = zip(found.layers, choices, strict=True)
    return replace(found, layers=tuple(replace(layer, choice=choice) for layer, choice in layers))
