"""`python -m sparsify_compiler.evaluation.check`: what the dense model can do, as numbers and as a picture."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsify_compiler.evaluation import classifier, world
from sparsify_compiler.evaluation.model import WEIGHTS, encode, load, to_model, trained_steps
from sparsify_compiler.evaluation.pictures import strip
from sparsify_compiler.evaluation.sampling import GUIDANCE, STEPS, Velocity, noise, sample
from sparsify_compiler.evaluation.sparsity import critical_shares
from sparsify_compiler.evaluation.training import LEVELS, loss, mixed, validation

BATCH = 4
"""Samples that are made at once."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a JSON object, and writes it and the first samples into `--out`."""
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model = load(options.weights)
    scenes = [world.scene(world.HELD_OUT, number) for number in range(options.samples)]
    judge = classifier.train()
    begin = time.perf_counter()
    videos = samples(
        torch.compile(model), [scene.prompt for scene in scenes], options.steps, options.guidance
    )
    seconds = (time.perf_counter() - begin) / len(scenes)
    report = {
        "step": trained_steps(options.weights),
        "validation": validation(model, world.FRAMES),
        "samples": {"count": len(scenes), "steps": options.steps, "guidance": options.guidance},
        "found_in_samples": classifier.found(judge, videos, scenes),
        "found_in_held_out_videos": classifier.found(judge, world.videos(scenes), scenes),
        "seconds_a_sample": seconds,
        "critical_share": {level: shares(model, level).tolist() for level in LEVELS},
    }
    strip(videos[:8]).save(options.out / "samples.png")
    text = json.dumps(report, indent=1)
    (options.out / "check.json").write_text(text + "\n")
    print(text)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--out", type=Path, required=True, help="folder for check.json and samples.png")
    result.add_argument("--weights", type=Path, default=WEIGHTS)
    result.add_argument(
        "--samples", type=int, default=200, help="prompts, those of the first held-out videos"
    )
    result.add_argument("--steps", type=int, default=STEPS)
    result.add_argument("--guidance", type=float, default=GUIDANCE)
    return result


def samples(model: Velocity, prompts: Sequence[str], steps: int, guidance: float) -> Tensor:
    """Videos [prompts, 3, frames, height, width] of the prompts, the i-th from noise of seed i, RGB from 0 to 1."""
    with torch.autocast("cpu", torch.bfloat16):
        made = [
            sample(
                model,
                prompts[first : first + BATCH],
                noise(range(first, min(first + BATCH, len(prompts)))),
                steps=steps,
                guidance=guidance,
            )
            for first in range(0, len(prompts), BATCH)
        ]
    return torch.cat(made)


def shares(model: nn.Module, level: float, count: int = 2, frames: int = world.FRAMES) -> Tensor:
    """The critical share of each self-attention at a noise level, mean over held-out videos: [layers, heads]."""
    scenes = [world.scene(world.VALIDATION, number) for number in range(count)]
    videos, text = to_model(world.videos(scenes, frames)), encode([scene.prompt for scene in scenes])
    batch = mixed(videos, noise(range(count), frames), torch.full((count,), level), text)
    return critical_shares(lambda: loss(model, batch))


if __name__ == "__main__":
    main()
