"""Measurements of a run: densities, mass kept, and use of the far field, by site, head and step."""

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_compiler import _torch, pictures
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.methods.base import max_error_of
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.runtime.site_inputs import REPORT
from sparsify_compiler.runtime.state import Example, ModelState, Record, states_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measurement:
    """One attention call that ran sparse. Tensors are [B, H] fp32 on the CPU."""

    site: str
    method: str
    call: int
    """Number of the model's call since the video began, from 0."""
    step: int | None
    """Step of the generation, from 0; None if unknown."""
    stream: int
    """0, or the number of the conditional or unconditional stream."""
    density: Tensor
    """Share of the query-key pairs computed."""
    kept: Tensor
    """Attention mass kept, as the method estimates it, mean over query blocks; NaN for a static method."""
    recall: Tensor
    """Attention mass truly kept, mean over sampled queries; NaN if none was sampled."""
    far_field: Tensor
    """1 where the far field was on, 0 where it was dropped."""
    asked_error: float
    """`max_error` of the site; NaN without."""
    estimated_error: Tensor
    """With `max_error`, the relative error of the output of all heads, by the estimate that chose the blocks;
    otherwise NaN. Equal for all heads."""
    measured_error: Tensor
    """The same error, measured on sampled queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTime:
    """The time of one call of a model that `apply` changed. Nothing waits for a GPU."""

    call: int
    """As in `Measurement`."""
    step: int | None
    stream: int
    phase: str
    """`sparse`, or `dense` for a call as in `RunStats.dense_calls`."""
    wall: float
    """Seconds on the clock of the host. On a GPU, the call ends when its work is queued."""
    cpu: float
    """Seconds of all threads of the process in the meantime."""


@dataclass(frozen=True, slots=True, eq=False)
class RunStats:
    """Measurements of a model's attention since the last video began."""

    measurements: tuple[Measurement, ...]
    dense_calls: int
    """Calls of the model that ran in the dense phase, or in which the guard ran everything dense."""
    guarded: tuple[tuple[str, str], ...] = ()
    """(site, times) of each site that the guard ran dense, by the times of its last call."""
    times: tuple[CallTime, ...] = ()
    """The times of all calls, in order, model by model; empty unless `apply` changed the models."""
    example: Example | None = None
    """An example of what a dynamic site read; None unless `apply` changed its model."""

    @property
    def density(self) -> float:
        """Mean density of the calls that ran sparse; NaN if there are none."""
        return self.mean("density")

    @property
    def recall(self) -> float:
        """Mean attention mass truly kept, over sampled queries; NaN if none was sampled."""
        return self.mean("recall")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `Measurement` with numbers; those of errors only where a site has a `max_error`."""
        asked = any(not math.isnan(one.asked_error) for one in self.measurements)
        return (*REPORT[:4], "asked_error", *REPORT[4:]) if asked else REPORT[:4]

    def of(self, method: str) -> "RunStats":
        """The measurements of one method, if programs of several methods ran."""
        return replace(self, measurements=tuple(one for one in self.measurements if one.method == method))

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """A row for each site, with means over calls, batches and heads; a long name stands above its row."""
        from sparsify_compiler.tables import fitting

        fields = self.fields
        others = (name.replace("_", " ") for name in fields[1:])
        headings = ("method", "calls", "density", "lowest head", "highest head", *others)
        names, rows = list(self.by_site()), []
        for some in self.by_site().values():
            heads = torch.stack([one.density.mean(0) for one in some]).mean(0)
            means = [RunStats(tuple(some), 0).mean(field) for field in fields]
            cells = (_text(x) for x in (means[0], float(heads.min()), float(heads.max()), *means[1:]))
            rows.append((some[0].method, str(len(some)), *cells))
        if rows or not self.guarded:
            yield from fitting(console, options, names, headings, rows)
        times: dict[str, list[str]] = {}
        for site, text in self.guarded:
            times.setdefault(text, []).append(site)
        for text, sites in times.items():
            yield f"The guard ran {', '.join(sites)} dense. {text.capitalize()}."
        calls = len({one.call for one in self.measurements})
        density = _text(self.density)
        yield f"{self.dense_calls} dense and {calls} sparse calls; mean density of the sparse ones {density}."

    def save_picture(self, path: str | Path) -> Path:
        """Draw the density of every site at every sparse call, as a heat map.

        Raises:
            SparsifyError: nothing ran sparse; matplotlib is missing; the path cannot be written to.
        """
        sites = self.by_site()
        if not sites:
            raise SparsifyError("there is nothing to draw: nothing ran sparse since the last video began")
        calls = sorted({one.call for one in self.measurements})
        image = torch.full((len(sites), len(calls)), math.nan, dtype=torch.float32)
        for row, some in enumerate(sites.values()):
            for one in some:
                image[row, calls.index(one.call)] = one.density.mean()
        figure = pictures.figure(min(16.0, 3 + 0.3 * len(calls)), min(16.0, 1.6 + 0.28 * len(sites)))
        axes = figure.subplots()
        drawn = axes.imshow(image.numpy(), vmin=0, aspect="auto", interpolation="nearest")
        labels = {one.call: f"{one.step if one.step is not None else one.call}" for one in self.measurements}
        every = -(-len(calls) // 25)
        axes.set_xticks(range(0, len(calls), every), [labels[call] for call in calls[::every]])
        axes.set_yticks(range(len(sites)), list(sites), fontsize=7)
        axes.set(xlabel="step", title="share of the query-key pairs computed")
        figure.colorbar(drawn, ax=axes)
        return pictures.save(figure, path)

    def by_site(self) -> dict[str, list[Measurement]]:
        """Site -> its measurements; a site that several methods ran has one entry for each."""
        methods: dict[str, set[str]] = {}
        for one in self.measurements:
            methods.setdefault(one.site, set()).add(one.method)
        sites: dict[str, list[Measurement]] = {}
        for one in self.measurements:
            name = f"{one.site} ({one.method})" if len(methods[one.site]) > 1 else one.site
            sites.setdefault(name, []).append(one)
        return sites

    def mean(self, field: str) -> float:
        """The mean of a field of `Measurement` over calls, batches and heads, without NaN; NaN if there is none."""
        values = [torch.as_tensor(getattr(one, field)).mean() for one in self.measurements]
        return float(torch.stack(values).nanmean()) if values else math.nan


def stats(model: Callable[..., Any]) -> RunStats:
    """The calls of a model since the last video began.

    Args:
        model: the result of torch.compile: the calls of its own programs, in their last video. Or a module: all
            calls in its last video, of any program (`RunStats.of` selects those of one method); parts of it may
            have been compiled separately.

    Raises:
        SparsifyError: the model is not a module, or no call of it was recorded.
    """
    module, options = _torch.uncompiled(model), _torch.options_of(model)
    if not isinstance(module, nn.Module):
        raise SparsifyError(
            f"stats needs a module whose parameters it can look up, got {type(module).__name__}"
        )
    return stats_of(states_of([*module.modules(), *module.parameters()]), options)


def stats_of(states: Iterable[ModelState], options: Mapping[str, Any] | None = None) -> RunStats:
    """The calls that states recorded since their last video began, by programs with these options or by all.

    Raises:
        SparsifyError: no call was recorded.
    """
    states = tuple(states)
    records = [record for state in states for record in _last_video(state, options)]
    if not records:
        of_others = any(state.history for state in states)
        what = (
            "no call of this model was recorded: run it first, compiled with backend='sparsify', without gradients"
            if not of_others
            else "no call of this model's last video was recorded"
            if options is None
            else "no call of this model was recorded: only programs with other options called its module"
        )
        raise SparsifyError(
            f"{what}. Programs in which no attention is sparse record nothing: "
            "sparsify_compiler.explain(model, ...) shows them"
        )
    sparse = (
        measurement for record in records if record.ran == "sparse" for measurement in _measurements(record)
    )
    dense = {record.call for record in records if record.ran == "dense"}
    guarded = {one.site.name: one.guarded for record in records for one in record.plan if one.guarded}
    times = (
        CallTime(
            call=record.call,
            step=record.tick.step,
            stream=record.tick.stream,
            phase=record.ran,
            wall=record.wall,
            cpu=record.cpu,
        )
        for record in records
        if not math.isnan(record.wall)
    )
    example = next((record.example for record in records if record.example is not None), None)
    return RunStats(tuple(sparse), len(dense), tuple(guarded.items()), tuple(times), example)


def _last_video(state: ModelState, options: Mapping[str, Any] | None) -> list[Record]:
    """The calls of its last video, by programs with these options, or by all programs if `options` is None."""
    own = [record for record in state.history if options is None or record.options == options]
    video = state.video if options is None or not own else own[-1].video
    return [record for record in own if record.video == video]


def _measurements(record: Record) -> list[Measurement]:
    """The measurements of a call, for every site that its plan makes sparse."""
    found = []
    for plan in record.plan.sparse:
        shape = (plan.site.batch, plan.site.heads)
        if plan.site.name in record.reports:
            rows = record.reports[plan.site.name].cpu()
        elif isinstance(plan.settings, StaticMethod):
            rows = torch.full((len(REPORT), *shape), math.nan, dtype=torch.float32)
            rows[0] = _densities(plan.settings, plan.layout)
        else:  # the body of a higher-order operator reports nothing
            continue
        reported = dict(zip(REPORT, rows, strict=True))
        found.append(
            Measurement(
                site=plan.site.name,
                method=plan.method,
                call=record.call,
                step=record.tick.step,
                stream=record.tick.stream,
                asked_error=math.nan if (most := max_error_of(plan.settings)) is None else most,
                **reported,
            )
        )
    return found


@functools.lru_cache(maxsize=64)
def _densities(method: StaticMethod, layout: TokenLayout) -> Tensor:
    """[1, H|1] fp32: the density of each head, by the table of a method that has one before it runs."""
    return method.table(layout).densities().float()


def _text(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"
