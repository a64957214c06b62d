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
from sparsify_compiler.testing.models import Grid, Inputs, output_of
from sparsify_compiler.training.search import read_menu

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "tile": {"method": "tile", "reference_frames": 1},
    "sta": {"method": "sta", "tile": (1, 2, 2), "window": (3, 1, 1)},
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


class Joint(nn.Module):
    """A video transformer of one layer, small enough to be exported in seconds: video and masked text in one
    sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(16, 32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 16)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> tuple[Tensor]:
        patches = self.patches(hidden_states)
        video = patches.flatten(2).transpose(1, 2)
        x = torch.cat([video, self.text(encoder_hidden_states)], 1) + (timestep / 1000)[:, None, None]
        q, k, v = (3 * self.qkv(x)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.pad(encoder_attention_mask.bool(), (video.shape[1], 0), value=True)
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        x = self.out(x.transpose(1, 2).flatten(2)[:, : video.shape[1]])
        return (x.transpose(1, 2).unflatten(2, patches.shape[2:]),)


def joint(grid: Grid, batch: int, seed: int = 0) -> tuple[Joint, Inputs]:
    """The model, always the same, and inputs of one forward."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Joint().eval()
        torch.manual_seed(seed)
        frames, height, width = grid
        return model, {
            "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width),
            "timestep": torch.full((batch,), 500.0),
            "encoder_hidden_states": torch.randn(batch, 6, 16),
            "encoder_attention_mask": torch.arange(6) < 5 - torch.arange(batch)[:, None],
        }


def generation(inputs: Inputs, steps: int) -> Iterator[Inputs]:
    """The calls of a generation with guidance in two calls. Nothing but the inputs distinguishes them."""
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
