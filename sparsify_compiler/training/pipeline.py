"""Efficient-vDiT whole (arXiv 2502.06155), on the evaluation model, and what each of its stages is worth.

    report = distill(load(), Path("out"), Settings(frames=8))

Most of what the paper gains comes from fewer steps, so the report keeps that apart from what sparsity adds: seconds
a video of the model at its own number of guided steps, of the dense student and of the sparse one, timed in turn.
After each stage it says how far the videos of held-out prompts are from those that the model makes of the same
noise in many guided steps, how much moves in them, and how far one step taken from that way itself lands from where
the way goes: errors of early steps grow on the way to a video, those of single steps do not. And it counts what a
classifier finds of what prompts ask for. The folder holds what `students` describes, what was compared, and
`report.json` and `report.md`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from sparsify_compiler.evaluation import classifier, files, world
from sparsify_compiler.evaluation.classifier import Classifier
from sparsify_compiler.evaluation.files import DamagedError
from sparsify_compiler.evaluation.model import encode, to_pixels
from sparsify_compiler.evaluation.quality import motion, mse, psnr
from sparsify_compiler.evaluation.sampling import GUIDANCE, STEPS, guided, noise, sample, times, trajectory
from sparsify_compiler.evaluation.world import Scene
from sparsify_compiler.measured import stats
from sparsify_compiler.policy import DENSE, Policy
from sparsify_compiler.runtime.clock import generation
from sparsify_compiler.timing import timed
from sparsify_compiler.training.students import (
    Settings,
    Students,
    dense_model,
    sparse_model,
    students,
)

EXACT_STEPS = 100
"""Of the model with guidance, which all else is held to."""
VIDEOS, ASKED, BATCH = 8, 64, 4
"""Held-out videos to compare, those to look for attributes in, and how many are made at once."""
ROUNDS = 3
"""In which every model is timed once."""

Model = Callable[..., Any]
Maker = Callable[[Sequence[Scene], Tensor], Tensor]
"""Videos of what scenes' prompts say, from noise; or something else of each video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Of videos of held-out prompts, means; PSNR in dB, errors of RGB from 0 to 1."""

    videos: str
    calls: int
    """Of the model, for one video."""
    psnr: float
    """To those of the model in `EXACT_STEPS` guided steps."""
    mse: float
    motion: float
    step_error: float | None = None
    """Where one step leads from each state on their way, up to where the next step would begin: squared error
    relative to the square of what lies between. None for more steps than the students take."""
    found: float | None = None
    """Share of what `ASKED` prompts say that is found in their videos. None for videos of another length than the
    classifier knows, and for more steps than the students take."""
    psnr_to_dense: float | None = None
    """To those of the dense student; of sparse ones alone."""
    mse_to_dense: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a run came to."""

    settings: Mapping[str, Any]
    machine: str
    seconds: Mapping[str, float]
    """Of one video by `base`, `dense` and `sparse`: medians of `ROUNDS`, timed in turn."""
    choices: Mapping[str, str]
    """Site -> what the policy chose for it."""
    density: float
    """Share of the query-key pairs of all these attentions that the sparse student computes."""
    exact_motion: float
    quality: tuple[Quality, ...]

    @property
    def fewer_steps(self) -> float:
        """How many times as fast the dense student is."""
        return self.seconds["base"] / self.seconds["dense"]

    @property
    def sparsity(self) -> float:
        """How many times as fast as the dense student the sparse one is."""
        return self.seconds["dense"] / self.seconds["sparse"]

    def save(self, out: Path) -> None:
        """Writes `report.md`, then `report.json`."""
        speed = {"fewer steps": self.fewer_steps, "sparsity": self.sparsity}
        content = json.dumps({**asdict(self), "speed-up": speed}, indent=1) + "\n"
        files.write(out / "report.md", lambda path: path.write_text(self.markdown(), "utf-8"))
        files.write(out / "report.json", lambda path: path.write_text(content, "utf-8"))

    def markdown(self) -> str:
        """The report as text."""
        segments, frames = self.settings["segments"], self.settings["frames"]
        return "\n".join(
            [
                f"# Few steps and sparse attention: {frames} frames",
                "",
                f"On {self.machine}, median of {ROUNDS}, timed in turn.",
                "",
                *_table(
                    ("model", "steps", "seconds a video", "speed-up by this"),
                    ("base, guided", str(STEPS), f"{self.seconds['base']:.3g}", ""),
                    (
                        "dense student",
                        str(segments),
                        f"{self.seconds['dense']:.3g}",
                        _times(self.fewer_steps),
                    ),
                    ("sparse student", str(segments), f"{self.seconds['sparse']:.3g}", _times(self.sparsity)),
                ),
                "",
                f"Together {_times(self.fewer_steps * self.sparsity)}. The sparse student computes "
                f"{self.density:.1%} of the query-key pairs of its video attentions:",
                "",
                *_table(("attention", "does"), *self.choices.items()),
                "",
                f"{VIDEOS} held-out prompts, against the base model's videos in {EXACT_STEPS} guided steps from "
                f"the same noise, in which neighbouring frames differ by {self.exact_motion:.4f} (motion).",
                "",
                *_table(
                    (
                        "videos",
                        "calls",
                        "PSNR, dB",
                        "squared error",
                        "motion",
                        "error of a step",
                        "asked for and found",
                        "PSNR to dense",
                        "error to dense",
                    ),
                    *map(_row, self.quality),
                ),
                "",
            ]
        )


def distill(model: nn.Module, out: Path, settings: Settings) -> Report:
    """All stages and the report, or what is left of them to do in the folder `out`. Shows progress on stderr.

    Args:
        model: as `evaluation.model.load` gives it. It stays as it is.

    Raises:
        SparsifyError: the folder is of another model or other settings, or something in it is damaged.
    """
    made = students(model, out, settings)
    if not (out / "report.json").exists():
        _judge(model, made, out, settings).save(out)
    return load_report(out / "report.json")


def load_report(path: Path) -> Report:
    """What `Report.save` wrote.

    Raises:
        DamagedError: it is no report.
    """
    content = files.read_json(path)
    content.pop("speed-up", None)
    try:
        quality = tuple(Quality(**one) for one in content.pop("quality"))
        return Report(**content, quality=quality)
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} is no report ({error}): remove it, and it is made again") from error


def _judge(model: nn.Module, made: Students, out: Path, settings: Settings) -> Report:
    exact, quality = _compare(model, made, out / "videos", settings)
    torch.compiler.reset()
    sparse = sparse_model(made.sparse, made.policy)
    seconds = _seconds(
        {
            "base": partial(_made, dense_model(model), STEPS, GUIDANCE),
            "dense": partial(_made, dense_model(made.dense), settings.segments, 1),
            "sparse": partial(_made, sparse, settings.segments, 1),
        },
        settings.frames,
    )
    return Report(
        settings=asdict(settings),
        machine=made.policy.machine,
        seconds=seconds,
        choices={layer.mark.site: layer.choice for layer in made.policy.layers},
        density=_density(sparse, made.policy),
        exact_motion=_mean(motion(exact)),
        quality=quality,
    )


def _compare(
    model: nn.Module, made: Students, folder: Path, settings: Settings
) -> tuple[Tensor, tuple[Quality, ...]]:
    """The videos that all are held to, and how far those after each stage are from them."""
    folder.mkdir(exist_ok=True)
    few, frames = settings.segments, settings.frames
    noises = [noise(numbers, frames) for numbers in _batches(VIDEOS)]
    judge = cache(classifier.train)
    with files.progress() as bar:
        keep = partial(_kept, folder, bar)
        way = keep("exact", partial(_way, dense_model(model), few), noises)
        ways = way.split(BATCH)
        exact = to_pixels(way[:, -1])

        def quality(
            name: str, words: str, model: Model, steps: int, guidance: float, dense: Tensor | None = None
        ) -> tuple[Tensor, Quality]:
            torch.compiler.reset()
            videos = keep(name, partial(_made, model, steps, guidance), noises)
            error = found = None
            if steps == few:
                error = _mean(keep(f"{name}-steps", partial(_step_errors, model, guidance), ways))
            if steps == few and frames == world.FRAMES:
                hits = partial(_hits, judge, partial(_made, model, steps, guidance))
                starts = [noise(numbers, frames) for numbers in _batches(ASKED)]
                found = _mean(keep(f"{name}-found", hits, starts).float())
            return videos, Quality(
                videos=words,
                calls=steps * (1 if guidance == 1 else 2),
                psnr=_mean(psnr(videos, exact)),
                mse=_mean(mse(videos, exact)),
                motion=_mean(motion(videos)),
                step_error=error,
                found=found,
                psnr_to_dense=None if dense is None else _mean(psnr(videos, dense)),
                mse_to_dense=None if dense is None else _mean(mse(videos, dense)),
            )

        base, one = dense_model(model), dense_model(made.dense)
        searched, sparse = (sparse_model(student, made.policy) for student in (made.dense, made.sparse))
        dense, of_dense = quality("dense", "stage 1: dense student", one, few, 1)
        return exact, (
            quality("base", f"base, {STEPS} guided steps", base, STEPS, GUIDANCE)[1],
            quality("base-few", f"base, {few} guided steps", base, few, GUIDANCE)[1],
            of_dense,
            quality("searched", "stage 2: sparse by the policy", searched, few, 1, dense)[1],
            quality("sparse", "stage 3: sparse student", sparse, few, 1, dense)[1],
        )


def _mean(of_videos: Tensor) -> float:
    return of_videos.mean().item()


def _batches(count: int) -> list[range]:
    """Numbers of held-out videos."""
    return [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]


def _kept(folder: Path, bar: Progress, name: str, make: Maker, starts: Sequence[Tensor]) -> Tensor:
    """What is made of the held-out prompts and the start of each batch: made where no file keeps it."""
    count, found = sum(map(len, starts)), []
    task = bar.add_task(name, total=count)
    for numbers, start in zip(_batches(count), starts, strict=True):
        scenes = [world.scene(world.HELD_OUT, number) for number in numbers]
        found.append(files.kept(folder / f"{name}-{numbers[0]}.pt", partial(make, scenes, start)))
        bar.advance(task, len(numbers))
    return torch.cat(found)


def _made(model: Model, steps: int, guidance: float, scenes: Sequence[Scene], start: Tensor) -> Tensor:
    """Videos, by guided steps of the model or by those of a student."""
    with torch.autocast("cpu", torch.bfloat16), generation(steps, streams=1):
        return sample(model, _prompts(scenes), start, steps=steps, guidance=guidance)


def _way(model: Model, segments: int, scenes: Sequence[Scene], start: Tensor) -> Tensor:
    """The states at the times of a student on the exact way: [B, segments + 1, 3, frames, HEIGHT, WIDTH]."""
    with torch.autocast("cpu", torch.bfloat16):
        states = trajectory(model, _prompts(scenes), start, steps=EXACT_STEPS, guidance=GUIDANCE)
        return torch.stack(list(islice(states, 0, None, EXACT_STEPS // segments)), dim=1)


@torch.no_grad()
def _step_errors(model: Model, guidance: float, scenes: Sequence[Scene], way: Tensor) -> Tensor:
    """Of each step from the way's own states: [B, segments]."""
    states, segments = way.unbind(1), way.shape[1] - 1
    text, errors = encode(_prompts(scenes)), []
    with torch.autocast("cpu", torch.bfloat16), generation(segments, streams=1):
        for (now, after), begin, end in zip(
            pairwise(times(segments).tolist()), states, states[1:], strict=False
        ):
            landed = begin + (after - now) * guided(model, begin, now, text, guidance)
            errors.append(mse(landed, end) / mse(begin, end))
    return torch.stack(errors, dim=1)


def _hits(judge: Callable[[], Classifier], make: Maker, scenes: Sequence[Scene], start: Tensor) -> Tensor:
    """Whether each attribute asked for is found in what is made: bool [attributes of all scenes]."""
    return torch.cat(list(classifier.hits(judge(), make(scenes, start), scenes).values()))


def _prompts(scenes: Sequence[Scene]) -> list[str]:
    return [scene.prompt for scene in scenes]


def _seconds(makers: Mapping[str, Maker], frames: int) -> dict[str, float]:
    """Of one video each; the first of each compiles, and does not count."""
    found: dict[str, list[float]] = {name: [] for name in makers}
    for number in range(ROUNDS + 1):
        scene, start = world.scene(world.HELD_OUT, number), noise([number], frames)
        for name, make in makers.items():
            found[name].append(timed(partial(make, [scene], start))[0])
    return {name: median(seconds[1:]) for name, seconds in found.items()}


def _density(sparse: Callable[..., Any], policy: Policy) -> float:
    """Of the last video, mean over all attentions that there is a choice for; dense ones count 1."""
    found: dict[str, list[float]] = {
        layer.mark.site: [1.0] for layer in policy.layers if layer.choice == DENSE
    }
    if len(found) < len(policy.layers):
        for one in stats(sparse).measurements:
            found.setdefault(one.site, []).append(float(one.density.mean()))
    return fmean(map(fmean, found.values()))


def _table(*rows: Sequence[str]) -> list[str]:
    """In Markdown; the first row is the head."""
    head, *others = [f"| {' | '.join(cells)} |" for cells in rows]
    return [head, "|" + " --- |" * len(rows[0]), *others]


def _row(one: Quality) -> tuple[str, ...]:
    error = "" if one.step_error is None else f"{one.step_error:.4f}"
    found = "" if one.found is None else f"{one.found:.1%}"
    beside = ("", "")
    if one.psnr_to_dense is not None and one.mse_to_dense is not None:
        beside = (f"{one.psnr_to_dense:.2f}", f"{one.mse_to_dense:.5f}")
    quality = (f"{one.psnr:.2f}", f"{one.mse:.5f}", f"{one.motion:.4f}")
    return one.videos, str(one.calls), *quality, error, found, *beside


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"
