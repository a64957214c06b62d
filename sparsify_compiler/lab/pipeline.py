"""All of Efficient-vDiT (arXiv 2502.06155) on the evaluation model, and the gain of each of its stages.

    report = distill(load(), Path("out"), Settings(frames=8))

Most of the paper's gain comes from fewer steps. So the report has this gain and that of sparsity apart: the seconds
of a video by the model in its own number of guided steps, by the dense student and by the sparse student, timed in
turn. It has the quality of the videos after each stage, measured by `comparison`. The folder has the files of
`students`, the compared videos, `report.json` and `report.md`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.lab import files, world
from sparsify_compiler.lab.comparison import EXACT_STEPS, VIDEOS, Comparison, Quality, generate
from sparsify_compiler.lab.files import DamagedError
from sparsify_compiler.lab.model import digest
from sparsify_compiler.lab.quality import motion
from sparsify_compiler.lab.sampling import GUIDANCE, STEPS, noise
from sparsify_compiler.lab.students import (
    Settings,
    Students,
    dense_model,
    sparse_model,
    students,
)
from sparsify_compiler.lab.world import Scene
from sparsify_compiler.measured import stats
from sparsify_compiler.policy import DENSE, Policy
from sparsify_compiler.progress import bars
from sparsify_compiler.timing import timed

ROUNDS = 3
"""Rounds of timing: each times every model once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Results of a run."""

    settings: Mapping[str, Any]
    made: Mapping[str, str]
    """Digests of `dense`, `policy` and `sparse`, which the report compares."""
    machine: str
    seconds: Mapping[str, float]
    """Seconds of one video by `base`, `dense` and `sparse`: medians of `ROUNDS`, timed in turn."""
    choices: Mapping[str, str]
    """Site -> the policy's choice."""
    density: float
    """Share of the query-key pairs of these attentions that the sparse student computes."""
    exact_motion: float
    quality: tuple[Quality, ...]

    @property
    def fewer_steps(self) -> float:
        """Speed-up by fewer steps: base over dense student."""
        return self.seconds["base"] / self.seconds["dense"]

    @property
    def sparsity(self) -> float:
        """Speed-up by sparsity: dense student over sparse student."""
        return self.seconds["dense"] / self.seconds["sparse"]

    def save(self, out: Path) -> None:
        """Write `report.md`, then `report.json`."""
        speed = {"fewer steps": self.fewer_steps, "sparsity": self.sparsity}
        files.write(out / "report.md", lambda path: path.write_text(self.markdown(), "utf-8"))
        files.write_json(out / "report.json", {**asdict(self), "speed-up": speed})

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
                        "attributes found",
                        "PSNR to dense",
                        "error to dense",
                    ),
                    *map(_row, self.quality),
                ),
                "",
            ]
        )


def distill(model: nn.Module, out: Path, settings: Settings) -> Report:
    """Run all stages and write the report, or continue the run in the folder `out`. Shows progress on stderr.

    Args:
        model: a model that `lab.model.load` returned. It stays as it is.

    Raises:
        SparsifyError: the folder is of another model or other settings, or a file in it is damaged.
    """
    made, path = students(model, out, settings), out / "report.json"
    digests = _digests(made, out)
    if not path.exists() or load_report(path).made != digests:
        _judge(model, made, digests, out, settings).save(out)
    return load_report(path)


def load_report(path: Path) -> Report:
    """Read the file that `Report.save` wrote.

    Raises:
        DamagedError: it is no report.
    """
    content = files.read_json(path)
    content.pop("speed-up", None)
    try:
        quality = tuple(Quality(**one) for one in content.pop("quality"))
        return Report(**content, quality=quality)
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} is no report ({error}): {files.REMOVE}") from error


def _digests(made: Students, out: Path) -> dict[str, str]:
    return {
        "dense": digest(made.dense),
        "policy": files.digest(out / "policy.json"),
        "sparse": digest(made.sparse),
    }


def _judge(
    model: nn.Module, made: Students, digests: Mapping[str, str], out: Path, settings: Settings
) -> Report:
    exact_motion, quality = _compare(model, made, digests, out / "videos", settings)
    torch.compiler.reset()
    sparse = sparse_model(made.sparse, made.policy)
    seconds = _seconds(
        {
            "base": partial(generate, dense_model(model), STEPS, GUIDANCE),
            "dense": partial(generate, dense_model(made.dense), settings.segments, 1),
            "sparse": partial(generate, sparse, settings.segments, 1),
        },
        settings.frames,
    )
    return Report(
        settings=settings.record,
        made=digests,
        machine=made.policy.machine,
        seconds=seconds,
        choices={layer.mark.site: layer.choice for layer in made.policy.layers},
        density=_density(sparse, made.policy),
        exact_motion=exact_motion,
        quality=quality,
    )


def _compare(
    model: nn.Module, made: Students, digests: Mapping[str, str], folder: Path, settings: Settings
) -> tuple[float, tuple[Quality, ...]]:
    """Motion of the exact videos, and quality of the videos after each stage. Files are named by their inputs."""
    few, policy = settings.segments, digests["policy"]
    names = {
        "dense": f"dense-{digests['dense']}",
        "searched": f"searched-{digests['dense']}-{policy}",
        "sparse": f"sparse-{digests['sparse']}-{policy}",
    }
    base, student = dense_model(model), dense_model(made.dense)
    searched, sparse = (sparse_model(one, made.policy) for one in (made.dense, made.sparse))
    with bars() as bar:
        to = Comparison(base, folder, settings, bar)
        dense = to.videos(names["dense"], student, few, 1)
        return motion(to.exact).mean().item(), (
            to.quality("base", f"base, {STEPS} guided steps", base, STEPS, GUIDANCE),
            to.quality("base-few", f"base, {few} guided steps", base, few, GUIDANCE),
            to.quality(names["dense"], "stage 1: dense student", student, few, 1),
            to.quality(names["searched"], "stage 2: sparse by the policy", searched, few, 1, dense),
            to.quality(names["sparse"], "stage 3: sparse student", sparse, few, 1, dense),
        )


def _seconds(
    makers: Mapping[str, Callable[[Sequence[Scene], Tensor], Tensor]], frames: int
) -> dict[str, float]:
    """Median seconds of one video. The first video of each model compiles, and does not count."""
    found: dict[str, list[float]] = {name: [] for name in makers}
    with bars() as bar:
        for number in bar.track(range(ROUNDS + 1), description="rounds of a video by each model"):
            scene, start = world.scene(world.HELD_OUT, number), noise([number], frames)
            for name, make in makers.items():
                found[name].append(timed(partial(make, [scene], start))[0])
    return {name: median(seconds[1:]) for name, seconds in found.items()}


def _density(sparse: Callable[..., Any], policy: Policy) -> float:
    """Density of the last video, mean over all attentions of the policy. A dense attention has 1."""
    found: dict[str, list[float]] = {
        layer.mark.site: [1.0] for layer in policy.layers if layer.choice == DENSE
    }
    if len(found) < len(policy.layers):
        for one in stats(sparse).measurements:
            found.setdefault(one.site, []).append(float(one.density.mean()))
    return fmean(map(fmean, found.values()))


def _table(*rows: Sequence[str]) -> list[str]:
    """Lines of a table in Markdown. The first row is the head."""
    head, *others = [f"| {' | '.join(cells)} |" for cells in rows]
    return [head, "|" + " --- |" * len(rows[0]), *others]


def _row(one: Quality) -> tuple[str, ...]:
    error = "" if one.step_error is None else f"{one.step_error:.4f}"
    found = "" if one.found is None else f"{one.found:.1%}"
    to_dense = ("", "")
    if one.psnr_to_dense is not None and one.mse_to_dense is not None:
        to_dense = (f"{one.psnr_to_dense:.2f}", f"{one.mse_to_dense:.5f}")
    quality = (f"{one.psnr:.2f}", f"{one.mse:.5f}", f"{one.motion:.4f}")
    return one.videos, str(one.calls), *quality, error, found, *to_dense


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"
