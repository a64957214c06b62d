"""Models, methods and loops with which exports are tested."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler import Policy
from sparsify_compiler.methods import predictor
from sparsify_compiler.policy import DENSE, PolicySite, Trial, mark
from sparsify_compiler.testing.models import Inputs, output_of
from sparsify_compiler.training.search import read_menu

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "tile": {"method": "tile", "reference_frames": 1},
    "sta": {"method": "sta", "tile": (2, 4, 4), "window": (1, 1, 3)},
    "svg2": {"method": "svg2", "q_clusters": 5, "kv_clusters": 9, "dense_layers": 0, "dense_steps": 2},
    "cubes": {
        "method": "cubes",
        "cube": (2, 2, 4),
        "query_cube": (2, 4, 4),
        "dense_layers": 0,
        "dense_steps": 2,
    },
    "keys": {"method": "keys", "q_clusters": 6, "dense_layers": 0, "dense_steps": 2},
}


def generation(inputs: Inputs, steps: int) -> Iterator[Inputs]:
    """The calls of a generation with guidance in two calls. Nothing tells the model which call is which."""
    draw = torch.Generator().manual_seed(1)
    for step in range(steps):
        latents = torch.randn(inputs["hidden_states"].shape, generator=draw).to(inputs["hidden_states"])
        time = torch.full_like(inputs["timestep"], 950 - 900 * step // steps)
        for prompt in (inputs["encoder_hidden_states"], torch.zeros_like(inputs["encoder_hidden_states"])):
            yield {**inputs, "hidden_states": latents, "timestep": time, "encoder_hidden_states": prompt}


@torch.no_grad()
def outputs(model: Any, inputs: Inputs, steps: int) -> list[Tensor]:
    return [output_of(model(**call)) for call in generation(inputs, steps)]


def compiled(model: nn.Module, options: dict[str, Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        model, backend="sparsify", options={**options, "inner_backend": "eager"}, fullgraph=True
    )


def policy(model: nn.Module, inputs: Inputs, *choices: dict[str, Any]) -> Policy:
    """A policy that gives the video attentions of a model these entries, in order."""
    menu = read_menu(list(choices))
    labels = [label for label in menu if label != DENSE]
    plans = sparsify_compiler.explain(model, **inputs, options={"method": "tile"}).graph_plans[0].sparse
    trials = {label: Trial(0.0, 1.0) for label in menu}
    layers = [
        PolicySite(mark=mark(plan.site, plan.layout), graph=0, choice=label, trials=trials)
        for plan, label in zip(plans, labels, strict=True)
    ]
    return Policy(
        model=type(model).__name__, r=math.inf, total=math.inf, menu=menu, layers=tuple(layers), together=0.0,
        inputs=1, machine="none",
    )  # fmt: skip


def predictor_file(path: Path, model: nn.Module, inputs: Inputs) -> Path:
    """A file of random predictors for the video attentions of a model; one head of each stays dense."""
    draw = torch.Generator().manual_seed(2)
    sites = {}
    for plan in sparsify_compiler.explain(model, **inputs, options={"method": "tile"}).graph_plans[0].sparse:
        site = plan.site
        shape = site.heads + site.kv_heads, site.head_dim, 4
        sites[site.name] = predictor.Trained(
            weights=torch.randn(shape, generator=draw),
            shares=torch.linspace(0.2, 1.0, site.heads),
            group=(1, 4, 4),
            chosen_by="middle",
        )
    predictor.save_predictor(path, sites)
    return path
