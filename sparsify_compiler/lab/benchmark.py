"""`sparsify bench quality`: the effect of sparse attention on the videos of the evaluation model.

The model generates videos of the same held-out prompts from the same noise, dense and with every
configuration of `configurations.py`. Only the attention differs. A density is that of the sparse steps; the
first `dense_steps` steps are dense in every row.

A run is a folder. `quality.json` gets each row as soon as the row is finished, so the same command continues
a run that was killed. `run-...` has the files that it continues from. `videos.png` and `pareto.png` are the
pictures.
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

from sparsify_compiler import pictures
from sparsify_compiler.backend import sparsify
from sparsify_compiler.errors import OptionError
from sparsify_compiler.lab import files, predictor, report, world
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
from sparsify_compiler.outputs import make_folder
from sparsify_compiler.policy import Policy
from sparsify_compiler.progress import bars
from sparsify_compiler.runtime.clock import generation
from sparsify_compiler.runtime.state import states_of
from sparsify_compiler.timing import interleaved_medians

FORMAT = "sparsify-quality-1"
CALIBRATION_STEPS = 6
"""Steps of the short generations that search for a density."""
BATCH = 8
"""Videos in one batch; guidance doubles it."""
RECALL_SHARE = 0.01
"""Share of the queries on which the kept attention mass is measured."""
ROUNDS = 5
"""Rounds of timing: each times one dense and one sparse call."""
PSNR_LEVELS = (30.0, 35.0)
"""PSNR in dB at which the report gives the least density."""


def quality(weights: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Run the bench, or continue the run in the folder `out`. Shows progress.

    Args:
        weights: the weights of the evaluation model.

    Returns:
        The content of `quality.json`.

    Raises:
        SparsifyError: the folder is of other weights or settings; a file is missing or damaged.
    """
    bench = Bench(load(weights), out, settings)
    record = bench.open(trained_steps(weights))
    trained = settings.predictor or bench.folder / "predictor.safetensors"
    with bars() as bar:
        task = bar.add_task("predictor of dsv", total=None)
        if "dsv" in settings.methods and not trained.exists():
            predictor.learn_predictor(bench.model, trained, settings.frames)
        todo = configurations(settings, trained)
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
    """A backend of torch.compile that recompiles one graph of Dynamo whenever the options change."""

    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return a function that runs the graph with the current options."""
        last: list[tuple[Mapping[str, Any], Callable[..., Any]]] = []

        def run(*args: Any) -> Any:
            if not last or last[0][0] is not self.options:
                options = {**self.options, "guard": "off"}  # a row shows its method, however long it takes
                last[:] = [(self.options, sparsify(gm, example_inputs, options=options))]
            return last[0][1](*args)

        return run


@dataclass(eq=False)
class Bench:
    """A run: the model and the results so far."""

    model: nn.Module
    out: Path
    settings: Settings
    record: dict[str, Any] = field(default_factory=dict)
    """The content of `quality.json`."""

    @property
    def folder(self) -> Path:
        """The folder of the files that the run continues from. Its name depends on the settings."""
        key = json.dumps(self.record["settings"], sort_keys=True).encode()
        return self.out / f"run-{hashlib.sha256(key).hexdigest()[:12]}"

    def open(self, trained: int) -> dict[str, Any]:
        """Begin a run, or continue it.

        Raises:
            SparsifyError: the folder has a run of other weights or settings, or of another machine.
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
        make_folder(self.out, "quality.json")
        for name in ("videos.png", "pareto.png"):
            pictures.check(self.out / name)
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
        """The dense videos, which all others are compared with: float32 [seeds, 3, frames, height, width]."""
        return files.kept(self.folder / "dense.pt", lambda: self.videos(self.model)[0])

    @cached_property
    def dense_loss(self) -> float:
        """Validation loss of the dense model."""
        return self.loss(self.model)

    def videos(self, run: Velocity, *, autocast: bool = False) -> tuple[Tensor, list[Measurement]]:
        """Videos of every seed, and the measurements of their calls; none where the model is not compiled."""
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
        """The model with options of torch.compile. Only another batch or data type makes Dynamo trace again."""
        usual: dict[str, Any] = {"inner_backend": "eager", "dense_steps": self.settings.dense_steps}
        if "policy" not in options:
            usual["dense_layers"] = 0
        chosen = {**usual, **options, **others}
        for state in states_of(self.model.parameters()):
            state.trained.clear()  # `dsv` with another budget reads other shares

        def run(*args: Any, **named: Any) -> tuple[Tensor, ...]:
            self.switch.options = chosen
            return self.traced(*args, **named)

        return run

    @cached_property
    def switch(self) -> "Switch":
        """The backend of `traced`; its `options` are those of the next call."""
        return Switch()

    @cached_property
    def traced(self) -> Velocity:
        """The model as traced by Dynamo. Tracing takes longer than all later work on the graph."""
        torch.compiler.reset()
        return torch.compile(self.model, backend=self.switch, dynamic=False)

    def row(self, one: Configuration) -> dict[str, Any]:
        """Measure a configuration."""
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
        """The options of a configuration; a method of `TUNED` gets the reading that matches the density."""
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
        """The density of a short generation of a prompt that no row has."""
        steps = min(CALIBRATION_STEPS, self.settings.steps)
        dense = min(steps - 1, round(steps * self.settings.dense_steps / self.settings.steps))
        options = {"method": method, **TUNED[method], **reading(far_field, much), "far_field": far_field}
        run = self.compiled(options, dense_steps=dense)
        self.generate(run, [FIRST], steps)
        return stats(self.model).density

    def attention(
        self, one: Configuration, options: Mapping[str, Any], found: Sequence[Measurement]
    ) -> tuple[float, float]:
        """Density and kept attention mass, means over all attentions. Both are 1 for a dense attention.

        Tiles do not measure the mass that they keep. Dense calls at all `LEVELS` give it.
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
        """Dense attention from the queries of a frame to the keys of a frame: [attentions, frames, frames].

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
        """Validation loss, mean over `LEVELS` and over one video for each seed, at most `BATCH`."""
        count = min(BATCH, self.settings.seeds)
        return _number(fmean(validation(run, self.settings.frames, count).values()), 6)

    def seconds(self, run: Velocity, *, autocast: bool) -> dict[str, float]:
        """Seconds of a dense and of a sparse call on one video with guidance, at `LEVELS` in turn."""
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
    """(attention, method) in the order of the calls."""
    if one.policy is not None:
        policy = Policy.load(one.policy)
        return [(layer.mark.site, policy.menu[layer.choice].method) for layer in policy.layers]
    kind = METHODS[options["method"]]
    method = kind(reference_frames=options["reference_frames"]) if kind is Tile else None
    return [(site, method) for site in dict.fromkeys(measured.site for measured in found)]


@contextmanager
def _rounded(products: bool) -> Iterator[None]:
    """Inside, products of matrices are in bfloat16 if `products` is true."""
    if products:
        with bfloat16_products(), torch.autocast("cpu", torch.bfloat16):
            yield
    else:
        yield


def _each_anew(model: Velocity) -> Velocity:
    """The model with every call as a generation of its own: calls at different levels make no video."""

    def call(*args: Any, **others: Any) -> tuple[Tensor, ...]:
        with generation(1, streams=1):
            return model(*args, **others)

    return call


def _pixels(video: Tensor) -> Tensor:
    """RGB from 0 to 1 as bytes."""
    return (video * 255).round().to(torch.uint8)


def _number(value: float | Tensor, digits: int = 5) -> float:
    """A number rounded for JSON."""
    return round(float(value), digits)


def _spread(values: Tensor) -> float | None:
    """Standard deviation; None for a single video."""
    return _number(values.std()) if len(values) > 1 else None
