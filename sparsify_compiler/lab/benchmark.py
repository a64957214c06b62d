"""`sparsify bench quality`: what sparse attention does to the videos of the evaluation model.

The same held-out prompts and noises are generated dense and with every configuration: what differs is the
attention alone. `configurations.py` says which there are. Densities are of the steps that run sparse; the
first ones, `dense_steps`, are dense for all.

A run is a folder: `quality.json`, to which a row is added as soon as it is finished, so that the same command goes
on where it was killed; `videos.png` and `pareto.png`; and `run-...`, what it goes on from.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.backend import sparsify
from sparsify_compiler.errors import OptionError
from sparsify_compiler.lab import files, report, world
from sparsify_compiler.lab.calibration import FIRST, calibration_inputs
from sparsify_compiler.lab.configurations import (
    TUNED,
    Configuration,
    Settings,
    configurations,
    find_reading,
    reading,
)
from sparsify_compiler.lab.machine import bfloat16_products, machine, origin
from sparsify_compiler.lab.model import digest, load, trained_steps, unconditional
from sparsify_compiler.lab.quality import motion, psnr, ssim
from sparsify_compiler.lab.sampling import GUIDANCE, Velocity, noise, sample
from sparsify_compiler.lab.sparsity import Listen
from sparsify_compiler.lab.training import validation
from sparsify_compiler.measured import Measurement, stats
from sparsify_compiler.methods import METHODS
from sparsify_compiler.methods.dense import Dense
from sparsify_compiler.methods.tile import Tile, frame_mask
from sparsify_compiler.policy import load_policy
from sparsify_compiler.runtime.clock import generation
from sparsify_compiler.runtime.program import Program
from sparsify_compiler.runtime.state import states_of
from sparsify_compiler.timing import interleaved_medians

FORMAT = "sparsify-quality-1"
CALIBRATION_STEPS = 6
"""Of a generation that a density is looked for with."""
BATCH = 8
"""Videos that are made at once; guidance doubles them."""
RECALL_SHARE = 0.01
"""Of the queries: those on which the attention mass kept is measured."""
ROUNDS = 5
"""In which a dense and a sparse call are timed once each."""
PSNR_LEVELS = (30.0, 35.0)
"""dB: what the least density is looked for."""

Learn = Callable[[nn.Module, Path, int], object]
"""Writes the predictor of `dsv` for a model and a number of frames into a file; the model stays as it is."""


def quality(weights: Path, out: Path, settings: Settings, learn: Learn) -> dict[str, Any]:
    """Everything, or what is left of it to do in the folder `out`; the content of `quality.json`. Shows progress.

    Args:
        weights: of the evaluation model.
        learn: makes the predictor of `dsv` where none is given.

    Raises:
        SparsifyError: the folder is of other weights or settings; a file is missing or damaged.
    """
    bench = Bench(load(weights), out, settings)
    record = bench.open(trained_steps(weights))
    predictor = settings.predictor or bench.folder / "predictor.safetensors"
    with files.progress() as bar:
        task = bar.add_task("predictor of dsv", total=None)
        if "dsv" in settings.methods and not predictor.exists():
            learn(bench.model, predictor, settings.frames)
        todo = configurations(settings, predictor)
        bar.update(task, description="dense", total=len(todo))
        if "dense" not in record:
            record["dense"] = {"motion": _number(motion(bench.dense).mean()), "loss": bench.dense_loss}
        for one in todo:
            bar.update(task, description=one.name)
            known = any((row["name"], row["file"]) == (one.name, one.file) for row in record["rows"])
            if not known or not bench.video_of(one.name).exists():
                row = bench.row(one)
                record["rows"] = [old for old in record["rows"] if old["name"] != one.name] + [row]
                bench.save()
            bar.advance(task)
    names = [one.name for one in todo]
    record["rows"].sort(key=lambda row: names.index(row["name"]) if row["name"] in names else len(names))
    record["least_density"] = report.least_densities(record["rows"], PSNR_LEVELS)
    bench.save()
    kept = {
        row["name"]: files.read_tensors(path) / 255
        for row in record["rows"]
        if (path := bench.video_of(row["name"])).exists()
    }
    report.draw_videos({"dense": bench.dense[0], **kept}, out / "videos.png")
    report.draw_pareto(record["rows"], out / "pareto.png")
    return record


@dataclass(eq=False)
class Switch:
    """A backend of torch.compile: one graph of Dynamo serves all options of ours, of which the last are kept."""

    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """What runs the graph with the options of the time."""
        last: list[tuple[Mapping[str, Any], Program]] = []

        def run(*args: Any) -> Any:
            if not last or last[0][0] is not self.options:
                last[:] = [(self.options, sparsify(gm, example_inputs, options=self.options))]
            return last[0][1](*args)

        return run


@dataclass(eq=False)
class Bench:
    """A run: the model, and what was made of it so far."""

    model: nn.Module
    out: Path
    settings: Settings
    record: dict[str, Any] = field(default_factory=dict)
    """What `quality.json` holds."""

    @property
    def folder(self) -> Path:
        """Of the files that the run goes on from, by the settings that they depend on."""
        key = json.dumps(self.record["settings"], sort_keys=True).encode()
        return self.out / f"run-{hashlib.sha256(key).hexdigest()[:12]}"

    def open(self, trained: int) -> dict[str, Any]:
        """Begin a run, or go on.

        Raises:
            SparsifyError: there is one of other weights, settings or of another machine.
        """
        settings, here = self.settings, machine()
        mine = {
            "weights": digest(self.model),
            "trained_steps": trained,
            "seeds": settings.seeds,
            "steps": settings.steps,
            "dense_steps": settings.dense_steps,
            "frames": settings.frames,
            "guidance": GUIDANCE,
            **{name: here[name] for name in ("cpu", "threads", "torch")},
        }
        files.make_folder(self.out)
        path = self.out / "quality.json"
        if path.exists():
            self.record = files.read_json(path)
            if self.record.get("format") != FORMAT or not self.record.keys() >= {
                "settings",
                "calibrated",
                "rows",
            }:
                raise OptionError(f"{path} is no result of `sparsify bench quality`: give another folder")
            files.refuse_others(self.out, self.record["settings"], mine)
        else:
            self.record = {
                "format": FORMAT,
                **origin(),
                "settings": mine,
                "calibrated": {},
                "rows": [],
            }
        self.folder.mkdir(exist_ok=True)
        return self.record

    def save(self) -> None:
        """Write `quality.json`."""
        files.write_json(self.out / "quality.json", self.record)

    @cached_property
    def dense(self) -> Tensor:
        """The videos that all others are held to: float32 [seeds, 3, frames, height, width]."""
        return files.kept(self.folder / "dense.pt", lambda: self.videos(self.model)[0])

    @cached_property
    def dense_loss(self) -> float:
        """Validation loss of the model itself."""
        return self.loss(self.model)

    def videos(self, run: Velocity, *, autocast: bool = False) -> tuple[Tensor, list[Measurement]]:
        """Of every seed, and what was measured meanwhile, where the model is compiled."""
        made: list[Tensor] = []
        found: list[Measurement] = []
        for first in range(0, self.settings.seeds, BATCH):
            numbers = range(first, min(first + BATCH, self.settings.seeds))
            made.append(self.generate(run, numbers, self.settings.steps, autocast))
            if run is not self.model:
                found += stats(self.model).measurements
        return torch.cat(made), found

    def generate(self, run: Velocity, numbers: Sequence[int], steps: int, autocast: bool = False) -> Tensor:
        """Videos of the held-out prompts of these numbers, from noise of the same numbers."""
        prompts = [world.scene(world.VALIDATION, number).prompt for number in numbers]
        start = noise(numbers, self.settings.frames)
        with _rounded(autocast), generation(steps, streams=1):
            return sample(run, prompts, start, steps=steps, guidance=GUIDANCE)

    def compiled(self, options: Mapping[str, Any], **others: Any) -> Velocity:
        """The model with options of torch.compile. It is traced anew for another batch or data type alone."""
        usual: dict[str, Any] = {"inner_backend": "eager", "dense_steps": self.settings.dense_steps}
        if "policy" not in options:
            usual["dense_layers"] = 0
        chosen = {**usual, **options, **others}
        for state in states_of(self.model.parameters()):
            state.learned.clear()  # `dsv` with another budget reads other shares

        def run(*args: Any, **named: Any) -> tuple[Tensor, ...]:
            self.switch.options = chosen
            return self.traced(*args, **named)

        return run

    @cached_property
    def switch(self) -> "Switch":
        """What says with which options `traced` runs."""
        return Switch()

    @cached_property
    def traced(self) -> Velocity:
        """The model as Dynamo sees it, which takes longer than all that is done with the graph."""
        torch.compiler.reset()
        return torch.compile(self.model, backend=self.switch, dynamic=False)

    def row(self, one: Configuration) -> dict[str, Any]:
        """What a configuration does."""
        options = one.options and self.tuned(one)
        run = self.model if options is None else self.compiled(options, measure_recall=RECALL_SHARE)
        made, found = self.videos(run, autocast=one.autocast)
        density, recall = (1.0, 1.0) if options is None else self.attention(one, options, found)
        files.write(self.video_of(one.name), lambda path: torch.save(_pixels(made[0]), path))
        always = self.model if options is None else self.compiled(options, dense_steps=0)
        seconds = self.seconds(always, autocast=one.autocast)
        loss = self.dense_loss if options is None else self.loss(_each_anew(always))
        ratio, likeness = psnr(made, self.dense), ssim(made, self.dense)
        return {
            "name": one.name,
            "line": one.line,
            "target": one.target,
            "options": options,
            "file": one.file,
            "density": _number(density),
            "recall": _number(recall),
            "psnr": _number(ratio.mean()),
            "psnr_spread": _spread(ratio),
            "ssim": _number(likeness.mean()),
            "ssim_spread": _spread(likeness),
            "motion": _number(motion(made).mean()),
            "dense_motion": _number(motion(self.dense).mean()),
            "loss": loss,
            "dense_loss": self.dense_loss,
            "seconds": _number(seconds["sparse"]),
            "dense_seconds": _number(seconds["dense"]),
        }

    def tuned(self, one: Configuration) -> dict[str, Any]:
        """The options, with how much is to be read where that is to be found."""
        options = dict(one.options or {})
        if options.get("method") in TUNED and one.target is not None:
            method, far_field = options["method"], options["far_field"]
            by = f"{method} by {next(iter(reading(far_field, 0.5)))}"
            known = dict(self.record["calibrated"].get(by, []))
            much = find_reading(partial(self.density_at, method, far_field), one.target, known)
            options |= reading(far_field, much)
            self.record["calibrated"][by] = sorted(known.items())
        return options

    def density_at(self, method: str, far_field: str, much: float) -> float:
        """Of a short generation of a prompt that no row has."""
        steps = min(CALIBRATION_STEPS, self.settings.steps)
        dense = min(steps - 1, round(steps * self.settings.dense_steps / self.settings.steps))
        options = {"method": method, **TUNED[method], **reading(far_field, much), "far_field": far_field}
        run = self.compiled(options, dense_steps=dense)
        self.generate(run, [FIRST], steps)
        return stats(self.model).density

    def attention(
        self, one: Configuration, options: Mapping[str, Any], found: Sequence[Measurement]
    ) -> tuple[float, float]:
        """Density and attention mass kept, means over all attentions. A dense one has 1 and keeps 1.

        Tiles do not measure what they keep: it is taken from dense calls at all `LEVELS`.
        """
        densities, kept = [], []
        for place, (site, method) in enumerate(_methods(one, options, found)):
            own = [measured for measured in found if measured.site == site]
            if isinstance(method, Dense):
                densities.append(1.0)
                kept.append(1.0)
            elif isinstance(method, Tile):
                frames = self.settings.frames
                mask = frame_mask(frames, method.count(frames))
                densities.append(mask.float().mean().item())
                kept.append((self.frame_mass[place] * mask).sum(-1).mean().item())
            else:
                densities.append(torch.cat([measured.density.mean(1) for measured in own]).mean().item())
                kept.append(torch.cat([measured.recall.mean(1) for measured in own]).nanmean().item())
        return fmean(densities), fmean(kept)

    @cached_property
    def frame_mass(self) -> Tensor:
        """Attention that queries of a frame give to keys of another, dense: [attentions, frames, frames].

        Mean over heads, levels, and the queries of a frame.
        """
        frames = self.settings.frames
        found: list[Tensor] = []

        def hear(query: Tensor, key: Tensor, _: Tensor) -> None:
            tokens = query.shape[-2] // frames
            rows = query.unflatten(-2, (frames, tokens))[..., :: max(1, tokens // 8), :].flatten(-3, -2)
            weights = (rows @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            pairs = weights.unflatten(-1, (frames, tokens)).sum(-1).unflatten(-2, (frames, -1))
            found.append(pairs.mean(dim=(0, 1, 3)))

        calls = calibration_inputs(frames)
        with torch.no_grad(), Listen(hear):
            for call in calls:
                self.model(**call)
        return torch.stack(found).unflatten(0, (len(calls), -1)).mean(0)

    def loss(self, run: Velocity) -> float:
        """Validation loss, mean over `LEVELS` and as many videos as there are seeds, `BATCH` at most."""
        count = min(BATCH, self.settings.seeds)
        return _number(fmean(validation(run, self.settings.frames, count).values()), 6)

    def seconds(self, run: Velocity, *, autocast: bool) -> dict[str, float]:
        """Of a dense and a sparse call of one video with guidance, at `LEVELS` in turn."""
        calls = [
            {
                "hidden_states": call["hidden_states"].repeat(2, 1, 1, 1, 1),
                "timestep": call["timestep"].repeat(2),
                "encoder_hidden_states": torch.cat([call["encoder_hidden_states"], unconditional(1)]),
                "return_dict": False,
            }
            for call in reversed(calibration_inputs(self.settings.frames))
        ]

        def caller(model: Velocity) -> Callable[[], object]:
            turn = cycle(calls)
            return lambda: model(**next(turn))

        dense, sparse = caller(self.model), caller(run)

        def lowered() -> object:
            with _rounded(autocast):
                return sparse()

        with torch.no_grad(), generation(ROUNDS + 1, streams=1):
            return interleaved_medians({"dense": dense, "sparse": lowered}, ROUNDS)

    def video_of(self, name: str) -> Path:
        """File of a row's first video."""
        return self.folder / f"{re.sub(r'[ /]', '-', name).replace(':', '_')}.pt"


def _methods(
    one: Configuration, options: Mapping[str, Any], found: Sequence[Measurement]
) -> list[tuple[str, object]]:
    """Every attention and what it does, in the order of the calls."""
    if one.policy is not None:
        policy = load_policy(one.policy)
        return [(layer.mark.site, policy.menu[layer.choice].method) for layer in policy.layers]
    kind = METHODS[options["method"]]
    method = kind(reference_frames=options["reference_frames"]) if kind is Tile else None
    return [(site, method) for site in dict.fromkeys(measured.site for measured in found)]


@contextmanager
def _rounded(products: bool) -> Iterator[None]:
    """Inside, products of matrices are in bfloat16, where asked for."""
    if products:
        with bfloat16_products(), torch.autocast("cpu", torch.bfloat16):
            yield
    else:
        yield


def _each_anew(model: Velocity) -> Velocity:
    """Every call is a generation of its own: levels in turn are no video."""

    def call(*args: Any, **others: Any) -> tuple[Tensor, ...]:
        with generation(1, streams=1):
            return model(*args, **others)

    return call


def _pixels(video: Tensor) -> Tensor:
    """RGB from 0 to 1 as bytes."""
    return (video * 255).round().to(torch.uint8)


def _number(value: float | Tensor, digits: int = 5) -> float:
    """As JSON has it."""
    return round(float(value), digits)


def _spread(values: Tensor) -> float | None:
    """Standard deviation; none of a single video."""
    return _number(values.std()) if len(values) > 1 else None
