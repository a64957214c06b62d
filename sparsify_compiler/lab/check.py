"""`python -m sparsify_compiler.lab.check`: the quality of the dense model, as numbers and as a picture."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsify_compiler import pictures
from sparsify_compiler.errors import OptionError, run_command
from sparsify_compiler.lab import classifier, files, report, require, world
from sparsify_compiler.lab.machine import fast_products, origin
from sparsify_compiler.lab.model import (
    WEIGHTS,
    check_frames,
    digest,
    encode,
    load,
    to_model,
    trained_steps,
)
from sparsify_compiler.lab.pictures import strip
from sparsify_compiler.lab.sampling import GUIDANCE, STEPS, Velocity, noise, sample
from sparsify_compiler.lab.sparsity import critical_shares
from sparsify_compiler.lab.train import compiled
from sparsify_compiler.lab.training import LEVELS, loss, mixed, validation
from sparsify_compiler.outputs import make_folder
from sparsify_compiler.progress import bars
from sparsify_compiler.timing import timed

BATCH = 4
"""Samples in one batch."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a JSON object, and write it and the first samples into `--out`."""
    options = parser().parse_args(arguments)
    require()
    for name in ("samples", "steps"):
        if getattr(options, name) < 1:
            raise OptionError(f"{name} must be at least 1, got {getattr(options, name)}")
    make_folder(options.out, "check.json", "samples.png")
    model, trained = load(options.weights), trained_steps(options.weights)
    scenes = [world.scene(world.HELD_OUT, number) for number in range(options.samples)]
    judge = classifier.train()
    prompts = [scene.prompt for scene in scenes]
    make = partial(samples, compiled(model, world.FRAMES), prompts, options.steps, options.guidance)
    seconds, videos = timed(make)
    record = {
        "step": trained,
        "validation": validation(model, world.FRAMES),
        "samples": {"count": len(scenes), "steps": options.steps, "guidance": options.guidance},
        "found_in_samples": classifier.found(judge, videos, scenes),
        "found_in_held_out_videos": classifier.found(judge, world.videos(scenes), scenes),
        "seconds_a_sample": seconds / len(scenes),
        "critical_share": {level: shares(model, level).tolist() for level in LEVELS},
    }
    strip(videos[:8]).save(options.out / "samples.png")
    files.write_json(options.out / "check.json", record)
    print(json.dumps(record, indent=1))


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument("--out", type=Path, required=True, help="folder for check.json and samples.png")
    result.add_argument("--weights", type=Path, default=WEIGHTS)
    result.add_argument(
        "--samples", type=int, default=200, help="samples, with the prompts of the first held-out videos"
    )
    result.add_argument("--steps", type=int, default=STEPS)
    result.add_argument("--guidance", type=float, default=GUIDANCE)
    return result


def samples(model: Velocity, prompts: Sequence[str], steps: int, guidance: float) -> Tensor:
    """Videos [prompts, 3, frames, height, width], RGB from 0 to 1; the i-th from noise of seed i."""
    with fast_products(), bars() as bar:
        made = [
            sample(
                model,
                prompts[first : first + BATCH],
                noise(range(first, min(first + BATCH, len(prompts)))),
                steps=steps,
                guidance=guidance,
            )
            for first in bar.track(range(0, len(prompts), BATCH), description=f"samples, {BATCH} at once")
        ]
    return torch.cat(made)


def shares(model: nn.Module, level: float, count: int = 2, frames: int = world.FRAMES) -> Tensor:
    """Critical share of each self-attention at a noise level, mean over validation videos: [layers, heads]."""
    scenes = [world.scene(world.VALIDATION, number) for number in range(count)]
    videos, text = to_model(world.videos(scenes, frames)), encode([scene.prompt for scene in scenes])
    batch = mixed(videos, noise(range(count), frames), torch.full((count,), level), text)
    return critical_shares(lambda: loss(model, batch))


def sparsity(weights: Path, out: Path, *, videos: int = 8, frames: int = world.FRAMES) -> Tensor:
    """Critical share (90 % of the attention) of every layer and head, mean over `LEVELS` and validation videos.

    Writes `sparsity.json` and `sparsity.png` into the folder `out`.

    Returns:
        float32 [layers, heads].

    Raises:
        SparsifyError: a number is below 1, the weights cannot be read, or `out` is no folder.
    """
    if videos < 1:
        raise OptionError(f"videos must be at least 1, got {videos}")
    check_frames(frames)
    model, trained = load(weights), trained_steps(weights)
    make_folder(out, "sparsity.json")
    pictures.check(out / "sparsity.png")
    levels: dict[float, Tensor] = {}
    with bars() as bar:
        for level in bar.track(LEVELS, description="critical shares"):
            levels[level] = shares(model, level, videos, frames)
    mean = torch.stack(list(levels.values())).mean(0)
    record = {
        "format": "sparsify-sparsity-1",
        **origin(),
        "settings": {
            "weights": digest(model),
            "trained_steps": trained,
            "videos": videos,
            "frames": frames,
            "theta": 0.9,
        },
        "critical_share": mean.tolist(),
        "of_levels": {f"{level:g}": of_level.tolist() for level, of_level in levels.items()},
    }
    files.write_json(out / "sparsity.json", record)
    report.draw_sparsity(mean, out / "sparsity.png")
    return mean


if __name__ == "__main__":
    run_command(main)
