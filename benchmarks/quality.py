"""`python -m benchmarks.quality`: what sparse attention does to the videos of the trained evaluation model.

The same prompts and noises are generated dense and with every method; what differs is the attention alone. Given
are, over the seeds, the PSNR against the dense generation (mean and spread), the share of the query-key pairs that
the sparse steps computed, and the motion of the videos, mean |difference| of neighbouring frames, beside that of
the dense ones: a video that stands still would pass for a good one. The noise floor is dense against dense by
another kernel (our own, everything read).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsify_compiler
from benchmarks.harness import machine, write_json
from sparsify_compiler.evaluation import model as trained
from sparsify_compiler.evaluation.quality import motion, psnr
from sparsify_compiler.evaluation.sampling import GUIDANCE, noise, sample
from sparsify_compiler.evaluation.world import VALIDATION, scene

DENSE_STEPS = 2
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "noise floor": {"method": "svg2", "top_p": 1.0, "far_field": "drop"},
    "tile, half the frames": {"method": "tile"},
    "tile, a quarter": {"method": "tile", "reference_frames": 6},
    **{
        f"svg2, top_p {p}, {far}": {"method": "svg2", "top_p": p, "far_field": far}
        for p, far in (
            (0.9, "drop"),
            (0.5, "drop"),
            (0.5, "mean"),
            (0.5, "linear"),
            (0.2, "linear"),
            (0.8, "linear"),
        )
    },
    **{
        f"cubes 4x2x2, top_p 0.5, {far}": {
            "method": "cubes",
            "cube": (4, 2, 2),
            "query_cube": (4, 2, 4),
            "top_p": 0.5,
            "far_field": far,
        }
        for far in ("drop", "linear")
    },
}


def generate(
    model: nn.Module, prompt: str, seed: int, steps: int, options: Mapping[str, Any] | None
) -> Tensor:
    """One video, dense if there are no options."""
    run: Any = model
    if options is not None:
        usual: dict[str, Any] = {"inner_backend": "eager", "dense_steps": DENSE_STEPS, "dense_layers": 0}
        run = torch.compile(model, backend="sparsify", options={**usual, **options})
    with sparsify_compiler.generation(steps, streams=1):  # guidance goes in one batch
        return sample(run, [prompt], noise([seed]), steps=steps, guidance=GUIDANCE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--weights", type=Path, default=trained.WEIGHTS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/quality-cpu.json"))
    arguments = parser.parse_args()
    print(machine())
    model = trained.load(arguments.weights).eval()
    prompts = [scene(VALIDATION, number).prompt for number in range(arguments.seeds)]

    def videos(options: Mapping[str, Any] | None) -> tuple[Tensor, list[float]]:
        torch._dynamo.reset()
        made, densities = [], []
        for seed, prompt in enumerate(prompts):
            made.append(generate(model, prompt, seed, arguments.steps, options))
            if options is not None:
                densities.append(sparsify_compiler.stats(model).density)
        return torch.cat(made), densities

    dense, _ = videos(None)
    cases = []
    for name, options in CONFIGURATIONS.items():
        made, densities = videos(options)
        ratio = psnr(made, dense)
        cases.append(
            {
                "name": name,
                "options": options,
                "steps": arguments.steps,
                "seeds": arguments.seeds,
                "trained_steps": trained.trained_steps(arguments.weights),
                "density": round(sum(densities) / len(densities), 4),
                "psnr": round(float(ratio.mean()), 2),
                "psnr_spread": round(float(ratio.std()), 2),
                "motion": round(float(motion(made).mean()), 5),
                "dense_motion": round(float(motion(dense).mean()), 5),
            }
        )
        print(cases[-1], flush=True)
    write_json(arguments.json, cases)


if __name__ == "__main__":
    main()
