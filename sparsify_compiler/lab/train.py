"""`python -m sparsify_compiler.lab.train --out DIR`: train the evaluation model, or continue its training."""

import argparse
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify_compiler.errors import OptionError, run_command
from sparsify_compiler.lab import require, world
from sparsify_compiler.lab.machine import fast_products
from sparsify_compiler.lab.model import WEIGHTS, build, load, save, spaced, trained_steps
from sparsify_compiler.lab.pictures import strip
from sparsify_compiler.lab.sampling import SHIFT, Velocity, noise, sample
from sparsify_compiler.lab.training import Recipe, Stage, Trainer, validation
from sparsify_compiler.outputs import make_folder

SAMPLES = 4
"""Videos in a sample picture, with the prompts of the first held-out videos."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train until `--minutes` are over, and write checkpoint, log, weights and pictures into `--out`."""
    options = parser().parse_args(arguments)
    require()
    if not options.minutes > 0 or not min(options.save_every, options.look_every) >= 0:
        raise OptionError(
            f"minutes must be above 0, save-every and look-every at least 0, got {options.minutes}, "
            f"{options.save_every} and {options.look_every}"
        )
    recipe = Recipe(stages=stages(options.stages), end=options.end, shift=options.shift)
    make_folder(options.out, "checkpoint.pt", "log.jsonl", "weights.safetensors")
    checkpoint = options.out / "checkpoint.pt"
    if options.shipped and not checkpoint.exists():
        trainer = Trainer(load(), recipe, step=trained_steps())
    else:
        trainer = Trainer(build(), recipe)
    if checkpoint.exists():
        trainer.restore(checkpoint)
        print(f"continues from step {trainer.step} of {checkpoint}", flush=True)
    if recipe.end is not None and recipe.end <= trainer.step:
        raise OptionError(f"end must be after the {trainer.step} steps that are done, got {recipe.end}")
    run(
        trainer,
        options.out,
        minutes=options.minutes,
        save_every=options.save_every,
        look_every=options.look_every,
    )


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    result = argparse.ArgumentParser(description=__doc__)
    result.add_argument(
        "--out", type=Path, required=True, help="folder of the run; a run found there continues"
    )
    result.add_argument(
        "--stages",
        default="4x16x1300,24x4x1",
        help="FRAMES[@SPACING]xBATCHxSTEPS,...; the last one does not end",
    )
    result.add_argument(
        "--shipped", action="store_true", help=f"start from {WEIGHTS.name} with fresh optimizers"
    )
    result.add_argument(
        "--end",
        type=int,
        help="the last step, where rates reach 0; a run that continues needs it again",
    )
    result.add_argument(
        "--shift",
        type=float,
        default=SHIFT,
        help="shift of the noise levels: a higher one draws more levels near pure noise, which decide movement",
    )
    result.add_argument(
        "--minutes", type=float, default=60.0, help="minutes of the clock after which training stops"
    )
    result.add_argument("--save-every", type=float, default=3.0, help="minutes between checkpoints")
    result.add_argument(
        "--look-every", type=float, default=12.0, help="minutes between validations and pictures"
    )
    return result


def stages(text: str) -> tuple[Stage, ...]:
    """Parse stages such as `8@3x16x1500,24x4x1`.

    Raises:
        OptionError: the text has another form, or the model cannot be trained in such stages.
    """
    found = []
    for stage in text.split(","):
        match = re.fullmatch(r"(\d+)(?:@(\d+))?x(\d+)x(\d+)", stage)
        if match is None:
            raise OptionError(f"stages must be FRAMES[@SPACING]xBATCHxSTEPS,..., got {text!r}")
        frames, spacing, batch, steps = (int(number or 1) for number in match.groups())
        found.append(Stage(frames=frames, batch=batch, steps=steps, spacing=spacing))
    return tuple(found)


def run(trainer: Trainer, out: Path, *, minutes: float, save_every: float, look_every: float) -> None:
    """Train for some minutes; save and look at the model at the end and in between."""
    begin = saved = looked = time.monotonic()
    stage = None
    last = math.inf if trainer.recipe.end is None else trainer.recipe.end
    while trainer.step < last and (now := time.monotonic()) < begin + 60 * minutes:
        if stage != (stage := trainer.recipe.stage(trainer.step)):
            trainer.compiled = compiled(spaced(trainer.model, stage.spacing), stage.frames)
        error = trainer.advance()
        record = {
            "step": trainer.step,
            "frames": stage.frames,
            "spacing": stage.spacing,
            "loss": round(error, 5),
            "seconds": round(time.monotonic() - now, 2),
        }
        log(out, record)
        if now > saved + 60 * save_every:
            trainer.save(out / "checkpoint.pt")
            saved = now
        if now > looked + 60 * look_every:
            look(trainer, out)
            looked = time.monotonic()
    trainer.save(out / "checkpoint.pt")
    look(trainer, out)


def compiled(model: nn.Module, frames: int) -> Velocity:
    """Compile the model with full attention by this package's kernels.

    A tile of all frames reads all keys. On a core with AMX, a step on 24 frames takes two thirds of its time with
    SDPA.
    """
    options: dict[str, Any] = {"method": "tile", "reference_frames": frames, "guard": "off"}
    result: Velocity = torch.compile(model, backend="sparsify", dynamic=False, options=options)
    return result


def look(trainer: Trainer, out: Path) -> None:
    """Write averaged weights, their validation loss and a picture of samples, with the current stage's videos.

    The model runs uncompiled: compilation would take longer than it saves.
    """
    stage = trainer.recipe.stage(trainer.step)
    model = spaced(trainer.model, stage.spacing)
    with trainer.averaged():
        save(trainer.model, out / "weights.safetensors", step=trainer.step)
        found = validation(model, stage.frames, spacing=stage.spacing)
        log(
            out, {"step": trainer.step, "frames": stage.frames, "spacing": stage.spacing, "validation": found}
        )
        prompts = [world.scene(world.HELD_OUT, number).prompt for number in range(SAMPLES)]
        with fast_products():
            videos = sample(model, prompts, noise(range(SAMPLES), stage.frames))
    strip(videos).save(out / f"samples_{trainer.step:06d}.png")


def log(out: Path, record: Mapping[str, object]) -> None:
    """Append a line to `log.jsonl`, and print it."""
    line = json.dumps(record)
    with (out / "log.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
