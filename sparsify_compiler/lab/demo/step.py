"""One step of a seeded model with random weights, dense and sparse, timed and checked against an oracle."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler.explanation import Explanation, explain
from sparsify_compiler.lab import require
from sparsify_compiler.lab.demo.size import Size
from sparsify_compiler.measured import stats
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.progress import advance, bars, phase
from sparsify_compiler.testing.oracles import TileAttention
from sparsify_compiler.timing import interleaved_medians

Step = Callable[[], Tensor]
"""One denoising step of the model: [1, C, F, H, W]."""

BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest |sparse - oracle| / |oracle| that passes: some ten times the rounding error of a few layers."""

SHARPNESS = 4.0
"""Factor on the queries. Random weights attend to all keys alike; trained ones do not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Measurements of the step."""

    explanation: Explanation
    """Explanation of `tile`, whose masks are known before a call."""
    seconds: Mapping[str, float]
    """Median seconds of a step by `dense`, `svg2` and `tile`."""
    attention_share: float
    """Part of the dense step spent in attention that the plans make sparse."""
    density: Mapping[str, float]
    """Method -> share of the query-key pairs of that attention that it computes."""
    recall: float
    """Share of the true attention mass that svg2 keeps, on sampled queries."""
    error: float
    """Relative distance of `tile` to the oracle, the same model with dense attention under the mask."""
    bound: float
    distance: Mapping[str, float]
    """Method -> relative distance to the dense model, with these random weights."""
    picture: Path

    @property
    def passed(self) -> bool:
        """The model computes what its plan says."""
        return self.error <= self.bound

    def speedup(self, method: str) -> float:
        """Dense step over sparse step."""
        return self.seconds["dense"] / self.seconds[method]


def run(size: Size, device: str, out: Path, console: Console) -> Result:
    """Explain, compile, check, time and draw `out/masks.png`; prints as it goes.

    Raises:
        SparsifyError: a package of the laboratory is missing, or `out` cannot be written to.
    """
    tile: dict[str, Any] = {
        "method": "tile",
        "reference_frames": size.reference_frames,
        "inner_backend": size.backend,
    }
    # `min_gain` would read nearly all keys, since attention of random weights has no structure.
    svg2: dict[str, Any] = {
        "method": "svg2",
        "top_p": 0.5,
        "min_gain": None,
        "dense_steps": 0,
        "measure_recall": 0.01,
        "inner_backend": size.backend,
    }
    tokens = math.prod(size.grid)
    console.print(
        f"A Wan transformer of {size.layers} layers, {size.heads} heads of {size.head_dim}, random weights, "
        f"{_name(size.dtype)} on {device}; a video of {'x'.join(map(str, size.grid))} = {tokens:,} tokens."
    )
    model, inputs = wan(size, device)
    with torch.no_grad(), bars(console) as progress:
        if device == "cpu":
            from sparsify_compiler.kernels.cpu import library

            with phase(progress, "build the C++ attention kernel"):
                build = library.build_info()
            progress.console.print(f"CPU kernel: {build.reason} in {build.seconds:.1f} s.")
        with phase(progress, "explain"):
            with torch.device("meta"):  # takes no time
                twin, twin_inputs = wan(size, "meta")
            explanation = explain(twin, **twin_inputs, options=tile, device=device)
        progress.console.print(explanation)
        picture = explanation.save_picture(out / "masks.png")

        def step_of(program: Callable[..., Any]) -> Step:
            return lambda: program(**inputs)[0]

        by_svg2, by_tile = (
            torch.compile(model, backend="sparsify", options={**options, "guard": "off"})
            for options in (svg2, tile)
        )
        steps = {
            "dense": step_of(torch.compile(model, backend=size.backend)),
            "svg2": step_of(by_svg2),
            "tile": step_of(by_tile),
        }
        outputs = {}
        for name, step in steps.items():
            with phase(progress, f"compile {name} and run a first step"):
                outputs[name] = step().float().cpu()
        with phase(progress, "check against the dense-masked oracle"), _tile_attention(size):
            oracle = model(**inputs)[0].float().cpu()
        plan = _sparse(explanation)[0]
        assert plan.density is not None, "the density of tile must be known before a call"
        seconds = interleaved_medians(
            {**steps, "attention": dense_attention(plan, device)},
            size.rounds,
            device=device,
            after_round=advance(
                progress, f"time {size.rounds} rounds of dense and sparse steps", size.rounds
            ),
        )
        measured = stats(model)
        progress.console.print(measured)
    result = Result(
        explanation=explanation,
        seconds=seconds,
        attention_share=seconds["attention"] * len(_sparse(explanation)) / seconds["dense"],
        density={"svg2": measured.of("svg2").density, "tile": plan.density},
        recall=measured.recall,
        error=_relative(outputs["tile"], oracle),
        bound=BOUND[size.dtype],
        distance={name: _relative(outputs[name], outputs["dense"]) for name in ("svg2", "tile")},
        picture=picture,
    )
    console.print(_summary(result))
    return result


def wan(size: Size, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """A seeded model of the Wan architecture in eval mode, and the inputs of one step.

    Raises:
        SparsifyError: a package of the laboratory is missing.
    """
    require()
    from diffusers import WanTransformer3DModel

    width = size.heads * size.head_dim
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = WanTransformer3DModel(
            num_attention_heads=size.heads,
            attention_head_dim=size.head_dim,
            ffn_dim=4 * width,
            num_layers=size.layers,
            text_dim=width,
        )
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(SHARPNESS)
        frames, height, width_ = size.grid
        latents = torch.randn(1, 16, frames, 2 * height, 2 * width_)
        text = torch.randn(1, 64, width)
    inputs = {
        "hidden_states": latents.to(device, size.dtype),
        "encoder_hidden_states": text.to(device, size.dtype),
        "timestep": torch.full((1,), 500, device=device),
        "return_dict": False,
    }
    # Not the `to` of diffusers, which warns of modules that its checkpoints keep in fp32.
    return nn.Module.to(model.eval(), device, size.dtype), inputs


def dense_attention(plan: AttentionPlan, device: str, mask: Tensor | None = None) -> Step:
    """A call of SDPA alone, on tensors with the shapes and strides of a site."""
    site = plan.site
    query, key, value = (
        torch.randn(
            site.batch, tokens, heads, width, device=device, dtype=getattr(torch, site.dtype)
        ).transpose(1, 2)
        for tokens, heads, width in (
            (site.q_tokens, site.heads, site.head_dim),
            (site.kv_tokens, site.kv_heads, site.head_dim),
            (site.kv_tokens, site.kv_heads, site.value_dim),
        )
    )
    gqa = site.heads != site.kv_heads
    return lambda: scaled_dot_product_attention(query, key, value, mask, scale=site.scale, enable_gqa=gqa)


def _tile_attention(size: Size) -> TileAttention:
    frames, height, width = size.grid
    return TileAttention(frames, size.reference_frames, height * width)


def _sparse(explanation: Explanation) -> list[AttentionPlan]:
    plans = [plan for graph in explanation.graph_plans for plan in graph.sparse]
    assert plans, "the video self-attention of the demo's model must be found"
    return plans


def _relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|. It is NaN, and so within no bound, where either has a NaN."""
    return float((got - expected).norm() / expected.norm())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summary(result: Result) -> Group:
    methods = ("svg2", "tile")
    table = Table("", "dense", *methods, title="One denoising step", title_justify="left")
    times = (f"{result.seconds[name] * 1e3:,.0f} ms" for name in ("dense", *methods))
    table.add_row("time of a step", *times)
    table.add_row(
        "query-key pairs of video attention", "100%", *(f"{result.density[name]:.1%}" for name in methods)
    )
    table.add_row("attention mass kept", "100%", f"{result.recall:.1%}", "")
    table.add_row("share of that attention in a dense step", f"{result.attention_share:.0%}", "", "")
    verdict = "within" if result.passed else "ABOVE"
    table.add_row(
        "error to the dense-masked oracle", "", "", f"{result.error:.1e}, {verdict} {result.bound:.0e}"
    )
    distances = (f"{result.distance[name]:.1e}" for name in methods)
    table.add_row("distance to dense (random weights)", "", *distances)
    sentence = (
        f"A step is {result.speedup('svg2'):.2f} times as fast by svg2, which by its estimate reads half of the "
        f"attention, and {result.speedup('tile'):.2f} times by tile, which computes exactly its masks. "
        f"{result.picture} shows the masks."
        if result.passed
        else "The sparse model does NOT compute its masks: please report this."
    )
    return Group(table, sentence)
