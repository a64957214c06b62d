"""`python -m benchmarks.model`: whole models, `backend="sparsify"` and plain torch.compile, on the CPU.

Every case is first compared with the same model with dense attention under the mask. Then both are timed in
turns. With a the share of a dense step in the attention that becomes sparse (that attention timed alone) and d
its density, Amdahl allows a speed-up of 1 / (1 - a + a d). `reached` is the speed-up divided by this bound; it is
above 1 if the sparse kernel does more pairs per second than SDPA. Efficiency is for the attention alone at the
model's shapes: dense time over sparse time, times d. Compile times are from fresh processes with empty caches.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness import machine, write_json
from sparsify_compiler import AttentionPlan, explain
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.lab.demo import dense_attention
from sparsify_compiler.testing.oracles import TileAttention
from sparsify_compiler.timing import interleaved_medians, timed

RESULTS = Path(__file__).parent / "results" / "model-cpu.json"

BOUND = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest relative distance to the oracle: about ten times the rounding error of a few layers."""

TEXT = 64
"""Number of tokens of the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model family at a size."""

    family: str
    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    layers: int
    dtype: torch.dtype
    reference_frames: int

    @property
    def name(self) -> str:
        """Family, head dim and type, which are different for all cases."""
        return f"{self.family}-{self.head_dim}-{str(self.dtype)[6:]}"

    @property
    def options(self) -> dict[str, Any]:
        """For torch.compile."""
        return {"method": "tile", "reference_frames": self.reference_frames}

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The seeded model and the inputs of one step."""
        torch.manual_seed(0)
        model, inputs = {"wan": wan, "hunyuan": hunyuan}[self.family](self)
        inputs = {
            name: t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            for name, t in inputs.items()
        }
        return nn.Module.to(model.eval(), self.dtype), inputs | {"return_dict": False}

    def oracle(self) -> TileAttention:
        """The mode in which the eager model is the oracle."""
        frames, height, width = self.grid
        after = TEXT if self.family == "hunyuan" else 0
        return TileAttention(frames, self.reference_frames, height * width, after=after)


def wan(case: Case) -> tuple[Any, dict[str, Any]]:
    """Self-attention over the video, text by cross-attention."""
    from diffusers import WanTransformer3DModel

    width = case.heads * case.head_dim
    model = WanTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        ffn_dim=4 * width,
        num_layers=case.layers,
        text_dim=width,
    )
    return model, {**latents(case), "encoder_hidden_states": torch.randn(1, TEXT, width)}


def hunyuan(case: Case) -> tuple[Any, dict[str, Any]]:
    """Joint attention over video and padded text, in double- and single-stream layers."""
    from diffusers import HunyuanVideoTransformer3DModel

    width = case.heads * case.head_dim
    model = HunyuanVideoTransformer3DModel(
        num_attention_heads=case.heads,
        attention_head_dim=case.head_dim,
        num_layers=case.layers // 2,
        num_single_layers=case.layers - case.layers // 2,
        num_refiner_layers=1,
        text_embed_dim=width,
        pooled_projection_dim=width,
        rope_axes_dim=(case.head_dim // 8, case.head_dim * 7 // 16, case.head_dim * 7 // 16),
    )
    return model, {
        **latents(case),
        "encoder_hidden_states": torch.randn(1, TEXT, width),
        "encoder_attention_mask": (torch.arange(TEXT) < TEXT - 20)[None].long(),
        "pooled_projections": torch.randn(1, width),
        "guidance": torch.tensor([6000.0]),
    }


def latents(case: Case) -> dict[str, Tensor]:
    """The inputs of every family: noise whose 1 x 2 x 2 patches form the grid, and a time step."""
    frames, height, width = case.grid
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.tensor([500]),
    }


CASES = [
    Case(
        family=family,
        grid=(12, 24, 32),
        heads=heads,
        head_dim=head_dim,
        layers=2,
        dtype=dtype,
        reference_frames=k,
    )
    for dtype in (torch.float32, torch.bfloat16)
    for family, heads, head_dim, k in (("wan", 4, 64, 2), ("wan", 2, 128, 1), ("hunyuan", 4, 64, 1))
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the benchmark."""

    name: str
    tokens: int
    layers: int
    density: float
    error: float
    dense_s: float
    sparse_s: float
    attention_s: float
    """Time of all attention that becomes sparse, dense and alone."""
    sparse_attention_s: float
    """Time of the same attention by the attention op."""
    speedup: float
    attention_share: float
    allowed: float
    reached: float
    efficiency: float
    compile_dense_s: float | None
    compile_sparse_s: float | None
    compile_ratio: float | None

    def __str__(self) -> str:
        compiling = ""
        if self.compile_ratio is not None:
            times = f"{self.compile_dense_s:.1f} -> {self.compile_sparse_s:.1f} s"
            compiling = f"  compile {times} = {self.compile_ratio:.2f}x"
        return (
            f"{self.name:<20} S={self.tokens} L={self.layers} density {self.density:.3f} "
            f"error {self.error:.0e}  dense {self.dense_s:.2f} s  sparse {self.sparse_s:.2f} s  "
            f"speedup {self.speedup:.2f}x of {self.allowed:.2f}x = {self.reached:.0%}  "
            f"attention {self.attention_share:.0%}  efficiency {self.efficiency:.2f}{compiling}"
        )


@torch.no_grad()
def measure(case: Case, repeats: int, compile_rounds: int) -> Result:
    """Check a case, then time in turns."""
    model, inputs = case.build()
    explained = explain(model, **inputs, options=case.options)
    plans = [plan for graph in explained.graph_plans for plan in graph.sparse]
    assert len(plans) == case.layers, f"all video attentions must be found:\n{explained}"
    with case.oracle():
        expected = model(**inputs)[0].float()
    programs = {"dense": torch.compile(model), "sparse": compiled(model, "sparsify", case)}
    got = programs["sparse"](**inputs)[0].float()
    error = float((got - expected).norm() / expected.norm())
    assert error <= BOUND[case.dtype], (
        f"{case.name}: {error:.1e} from the oracle, bound {BOUND[case.dtype]:.0e}"
    )
    mask = padding_mask(case, inputs)
    alone = {
        "dense attention": dense_attention(plans[0], "cpu", mask),
        "sparse attention": sparse_attention(plans[0], mask),
    }
    steps = {name: lambda program=program: program(**inputs) for name, program in programs.items()}
    seconds = interleaved_medians({**steps, **alone}, repeats)
    attention_s, sparse_attention_s = (len(plans) * seconds[name] for name in alone)
    share, density = attention_s / seconds["dense"], plans[0].density
    speedup, allowed = seconds["dense"] / seconds["sparse"], 1 / (1 - share + share * density)
    times = compile_seconds(case, compile_rounds) if compile_rounds and case.dtype == torch.float32 else {}
    dense_compile, sparse_compile = times.get("inductor"), times.get("sparsify")
    return Result(
        name=case.name,
        tokens=math.prod(case.grid),
        layers=case.layers,
        density=density,
        error=error,
        dense_s=seconds["dense"],
        sparse_s=seconds["sparse"],
        attention_s=attention_s,
        sparse_attention_s=sparse_attention_s,
        speedup=speedup,
        attention_share=share,
        allowed=allowed,
        reached=speedup / allowed,
        efficiency=attention_s / sparse_attention_s * density,
        compile_dense_s=dense_compile,
        compile_sparse_s=sparse_compile,
        compile_ratio=sparse_compile / dense_compile if dense_compile and sparse_compile else None,
    )


def padding_mask(case: Case, inputs: dict[str, Any]) -> Tensor | None:
    """[1, 1, 1, S] bool: the key mask of a joint model's attention."""
    if case.family != "hunyuan":
        return None
    text = inputs["encoder_attention_mask"].bool()[:, None, None]
    return nn.functional.pad(text, (math.prod(case.grid), 0), value=True)


def sparse_attention(plan: AttentionPlan, mask: Tensor | None) -> Callable[[], Any]:
    """The op alone on tensors of the shapes and strides of a site."""
    site, settings = plan.site, cast(Any, plan.settings)
    shape = (3, site.batch, site.q_tokens, site.heads, site.head_dim)
    query, key, value = torch.randn(shape, dtype=getattr(torch, site.dtype)).transpose(2, 3)
    bias = None if mask is None else torch.where(mask[:, 0], 0.0, -torch.inf)
    table = settings.table(plan.layout)
    return lambda: block_sparse_attention(
        query, key, value, table, key_bias=bias, scale=site.scale, provider=plan.provider
    )


def compiled(model: nn.Module, backend: str, case: Case) -> Callable[..., Any]:
    """The model compiled by plain Inductor, or by this package."""
    return torch.compile(model, backend=backend, options=case.options if backend == "sparsify" else None)


def compile_seconds(case: Case, rounds: int) -> dict[str, float]:
    """Compile time of each backend: the least over fresh processes with empty caches, in turns."""
    seconds: dict[str, list[float]] = {"inductor": [], "sparsify": []}
    for _ in range(rounds):
        for backend, values in seconds.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.model",
                "--compile-only",
                backend,
                "--case",
                case.name,
            ]
            with tempfile.TemporaryDirectory() as cache:
                env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
                output = subprocess.run(
                    command, env=env, stdout=subprocess.PIPE, check=True, text=True
                ).stdout
            values.append(float(json.loads(output)))
    return {backend: min(values) for backend, values in seconds.items()}


@torch.no_grad()
def time_compilation(case: Case, backend: str) -> float:
    """Time of the first call minus the second, for `compile_seconds` in its process. The kernel is built before."""
    from sparsify_compiler.kernels.cpu import library

    library.build_info()
    model, inputs = case.build()
    program = compiled(model, backend, case)
    first, second = (timed(partial(program, **inputs))[0] for _ in range(2))
    return first - second


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the results there")
    parser.add_argument("--case", help="run only cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile-rounds",
        type=int,
        default=2,
        help="fresh processes of each backend to time compilation (fp32)",
    )
    parser.add_argument("--compile-only", choices=("inductor", "sparsify"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [case for case in CASES if (options.case or "") in case.name]
    if options.compile_only:
        print(time_compilation(chosen[0], options.compile_only))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    results = []
    for case in chosen:
        result = measure(case, options.repeats, options.compile_rounds)
        print(result, flush=True)
        results.append(asdict(result))
        torch.compiler.reset()
    write_json(options.json, results)


if __name__ == "__main__":
    main()
