"""Videos by the trained model, dense and with the default method, for the same prompts and noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler.lab import world
from sparsify_compiler.lab.demo.size import Size
from sparsify_compiler.lab.model import CONFIG, load, trained_steps
from sparsify_compiler.lab.pictures import save_gif, side_by_side
from sparsify_compiler.lab.quality import motion, psnr
from sparsify_compiler.lab.sampling import GUIDANCE, Velocity, noise, sample
from sparsify_compiler.lab.sparsity import Listen
from sparsify_compiler.measured import RunStats, stats
from sparsify_compiler.options import DEFAULT_METHODS
from sparsify_compiler.progress import advance, bars, phase
from sparsify_compiler.runtime.clock import generation
from sparsify_compiler.timing import timed

METHOD = DEFAULT_METHODS[0]
MOST_ERROR = 0.1
TARGET = f"max_error {MOST_ERROR}"
"""The videos for which `MOST_ERROR` is the target of each attention's error."""
WARM_UP = 3
"""Steps of a short generation before the measured one. The first is dense by default, so both phases compile. The
third is the second sparse one, in which the guard times attention."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Result:
    """Videos and measurements."""

    prompts: tuple[str, ...]
    videos: Mapping[str, Tensor]
    """`dense`, `METHOD` and `TARGET`: float32 [prompts, 3, frames, height, width] on the CPU, RGB from 0 to 1."""
    warm_up: Mapping[str, float]
    """Seconds of the `WARM_UP` steps, in which graphs are captured and rewritten."""
    seconds: Mapping[str, float]
    """Seconds of the whole generation after the warm-up, for all prompts together."""
    attention_share: float
    """Part of the dense generation spent in self-attention."""
    stats: RunStats
    """Statistics of the generation by `METHOD`."""
    errors: RunStats
    """Statistics of the generation by `TARGET`."""
    gif: Path
    """Videos in the order of `videos`, dense on the left, a row for each prompt."""
    picture: Path | None
    """Density by attention and step; None where the guard runs all attention dense."""

    def psnr(self, name: str) -> list[float]:
        """PSNR of each video of `METHOD` or `TARGET` to the dense one, in dB."""
        values: list[float] = psnr(self.videos[name], self.videos["dense"]).tolist()
        return values

    def speedup(self, name: str) -> float:
        """Dense generation over that of `METHOD` or `TARGET`."""
        return self.seconds["dense"] / self.seconds[name]

    def motion(self, name: str) -> list[float]:
        """Motion of each video of one of `videos`."""
        values: list[float] = motion(self.videos[name]).tolist()
        return values


def run(size: Size, device: str, out: Path, console: Console) -> Result:
    """Generate, compare, and write `out/videos.gif` and `out/density.png`; prints as it goes.

    Raises:
        SparsifyError: matplotlib or the model's weights are missing, or `out` cannot be written to.
    """
    prompts = tuple(world.scene(world.HELD_OUT, number).prompt for number in range(size.prompts))
    console.print(
        f"The trained model of this package, {CONFIG['num_layers']} layers, {trained_steps():,} steps of training; "
        f"{len(prompts)} held-out prompts, {size.frames} frames, {size.steps} steps with guidance {GUIDANCE:g}."
    )
    torch.compiler.reset()  # otherwise the shapes of an earlier model make those of this one dynamic
    model = load().to(device)
    # Neither uses Inductor: it would compile for longer than these few videos take.
    options: tuple[dict[str, Any], ...] = ({"method": METHOD}, {"method": "svg2", "max_error": MOST_ERROR})
    by_method, by_target = (
        torch.compile(model, backend="sparsify", options={"inner_backend": "eager", **own}) for own in options
    )
    programs: dict[str, Velocity] = {"dense": model, METHOD: by_method, TARGET: by_target}
    warm_up, seconds, videos, measured = {}, {}, {}, {}
    make = partial(generate, prompts=prompts, size=size, device=device)
    with bars(console) as progress:
        for name, program in programs.items():
            with phase(progress, f"first steps of {name}"):
                warm_up[name], _ = timed(partial(make, program, steps=WARM_UP), device)
            watched = _watched(program, advance(progress, f"generate {name}", size.steps))
            seconds[name], videos[name] = timed(partial(make, watched, steps=size.steps), device)
            if program is not model:
                measured[name] = stats(model)
        with phase(progress, "time the attention of a dense step"):
            attention = attention_seconds(partial(make, model, steps=1), device)
        for one in measured.values():
            progress.console.print(one)
    result = Result(
        prompts=prompts,
        videos=videos,
        warm_up=warm_up,
        seconds=seconds,
        attention_share=attention * size.steps / seconds["dense"],
        stats=measured[METHOD],
        errors=measured[TARGET],
        gif=save_gif(side_by_side(*videos.values()), out / "videos.gif"),
        picture=measured[METHOD].save_picture(out / "density.png") if measured[METHOD].measurements else None,
    )
    console.print(_summary(result, size))
    return result


def generate(program: Velocity, prompts: Sequence[str], size: Size, device: str, *, steps: int) -> Tensor:
    """Videos of the prompts, the i-th from noise of seed i; in the form of `Result.videos`."""
    start = noise(range(len(prompts)), size.frames).to(device)
    lower = torch.autocast(device, size.dtype, enabled=size.dtype != torch.float32)
    with generation(steps, streams=1), lower:  # guidance goes in one batch
        return sample(program, prompts, start, steps=steps, guidance=GUIDANCE).cpu()


def attention_seconds(call: Callable[[], object], device: str) -> float:
    """Seconds of all self-attention of an uncompiled dense call. Each attention runs once more, to time it."""
    seconds: list[float] = []

    def again(query: Tensor, key: Tensor, value: Tensor) -> None:
        seconds.append(timed(lambda: scaled_dot_product_attention(query, key, value), device)[0])

    with Listen(again):
        call()
    return median(seconds) * len(seconds)


def _watched(program: Velocity, advance: Callable[[], None]) -> Velocity:
    """The program, with a bar that moves at every call."""

    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        result = program(*args, **kwargs)
        advance()
        return result

    return call


def _summary(result: Result, size: Size) -> Group:
    title = f"{len(result.prompts)} videos in {size.steps} steps"
    table = Table("", *result.videos, title=title, title_justify="left")
    for row, seconds in (
        ("time of the whole generation", result.seconds),
        (f"{WARM_UP} steps before it, rewriting the graph", result.warm_up),
    ):
        table.add_row(row, *(f"{seconds[name]:.1f} s" for name in result.videos))
    sparse = (METHOD, TARGET)
    table.add_row("times as fast as dense", "1", *(f"{result.speedup(name):.2f}" for name in sparse))
    densities = (f"{one.density:.1%}" if one.measurements else "-" for one in (result.stats, result.errors))
    table.add_row("query-key pairs of self-attention, sparse steps", "100%", *densities)
    measured = [float(one.measured_error.mean()) for one in result.errors.measurements]
    error = f"at most {MOST_ERROR:g}, {fmean(measured):.3f}" if measured else "dense"
    table.add_row("error of attention, asked and measured", "", "", error)
    table.add_row("share of self-attention in the generation", f"{result.attention_share:.0%}", "", "")
    each = Table("", *result.prompts)
    for name in sparse:
        each.add_row(f"PSNR to dense, {name}", *(f"{close:.1f} dB" for close in result.psnr(name)))
    for name in result.videos:
        each.add_row(f"motion, {name}", *(f"{moved:.4f}" for moved in result.motion(name)))
    drawn = (
        f"the density of every attention and step is drawn in {result.picture}"
        if result.picture
        else ("the guard ran all attention dense, which takes less time here")
    )
    sentence = (
        f"The generation is {result.speedup(METHOD):.2f} times as fast by {METHOD}, the default. The guard runs "
        f"attention dense where that takes less time. The videos are in {result.gif}, a row for each prompt: "
        f"{', '.join(result.videos)}; {drawn}."
    )
    return Group(table, each, sentence)
