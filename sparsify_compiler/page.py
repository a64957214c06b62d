"""A run on one HTML page: times, densities, what was read, and what stayed dense, with the reasons.

The page is one file without scripts, and loads nothing. All its numbers are those of `RunStats` and `Explanation`.
Every picture has its content in words too. Colours follow the reader's setting, light or dark.
"""

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.explanation import COLUMNS, Explanation, fold, grid_text, method_text
from sparsify_compiler.measured import CallTime, Measurement, RunStats, stats_of
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.outputs import check_page
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.call import AppliedModel

MOST_FRAMES = 48
"""The most frames of a video that are drawn."""
MOST_STATIC = 3
"""The most static methods whose choice is drawn."""

MEANINGS: Mapping[str, str] = {
    "density": "share of the query-key pairs that were computed",
    "kept": "attention mass kept, as the method estimates it",
    "recall": "attention mass truly kept, on the queries that the option measure_recall samples",
    "far_field": "share of the heads that used the far field",
    "asked_error": "the largest relative error of the attention's output that the option max_error allows",
    "estimated_error": "this error, by the estimate that chose what was read",
    "measured_error": "this error, on the queries that are computed exactly",
}
"""Fields of `Measurement`, in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRun:
    """The last video of one model."""

    name: str
    options: Mapping[str, object]
    """The options of the backend."""
    stats: RunStats | None
    """None where no call was recorded."""
    explanation: Explanation


def run_of(model: AppliedModel, name: str) -> ModelRun:
    """The last video of a model that `apply` changed. `name`: for the page's headings."""
    try:
        stats = stats_of([model.state])
    except SparsifyError:
        stats = None
    graphs = tuple(graph for graph in model.graphs if len(graph))
    explanation = Explanation(graphs, outside=tuple(model.outside))
    return ModelRun(name=name, options=dict(model.options), stats=stats, explanation=explanation)


def write(path: str | Path, runs: Sequence[ModelRun]) -> Path:
    """Write the page.

    Raises:
        OptionError: the path cannot be written to.
        SparsifyError: no model was called.
    """
    path = check_page(path)
    if not any(run.explanation.plans for run in runs):
        raise SparsifyError(
            "the report shows the last video, and no model was called yet: run the pipeline first"
        )
    path.write_text(document(runs), encoding="utf-8")
    return path


def document(runs: Sequence[ModelRun]) -> str:
    """The page of some models."""
    title = f"Sparse attention: {', '.join(run.name for run in runs)}"
    parts = [part for run in runs for part in _of_model(run)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_text(title)}</h1>\n" + "\n".join([*parts, *_machine()]) + "\n</main>\n</body>\n</html>\n"
    )


def _of_model(run: ModelRun) -> Iterator[str]:
    yield f"<section>\n<h2>{_text(run.name)}</h2>"
    yield _paragraph(*_summary(run))
    stats = run.stats
    if stats is not None and stats.times:
        yield from _times(stats.times)
    if stats is not None and stats.measurements:
        yield from _densities(stats)
        yield from _measured(stats)
    yield from _examples(run)
    yield from _plans(run.explanation)
    given = [(name, repr(value)) for name, value in run.options.items()]
    yield "<h3>Options</h3>"
    yield (
        _table("The options that were given", ["option", "value"], given)
        if given
        else _paragraph("All options have their defaults.")
    )
    yield "</section>"


def _summary(run: ModelRun) -> Iterator[str]:
    plans = run.explanation.plans
    sparse = sum(plan.method != "dense" for plan in plans)
    yield f"{sparse} of {len(plans)} attention calls are sparse in the model's last call."
    if run.stats is None:
        yield "No call was recorded: nothing is sparse, or all calls needed gradients."
        return
    calls = len({one.call for one in run.stats.measurements})
    yield f"The last video has {run.stats.dense_calls} dense and {calls} sparse calls."
    if run.stats.measurements:
        yield f"The mean density of the sparse ones is {run.stats.density:.3f}."
    seconds = {phase: _usual(run.stats.times, phase) for phase in ("dense", "sparse")}
    known = [f"{phase} {second:.3f} s" for phase, second in seconds.items() if second is not None]
    if known:
        yield f"A call takes, as a median without the first of its phase: {', '.join(known)}."


def _usual(times: Sequence[CallTime], phase: str) -> float | None:
    """The median time of the calls of a phase without the first, which compiles; None where it is alone."""
    own = [one.wall for one in times if one.phase == phase]
    return median(own[1:]) if len(own) > 1 else None


# times


def _times(times: Sequence[CallTime]) -> Iterator[str]:
    yield "<h3>Time of each call</h3>"
    yield _paragraph(
        "Wall time is on the clock of the host, from the call of the model to its return. CPU time is that of all "
        "threads of the process in between. Nothing waits for a GPU: there, a call ends when its work is queued, "
        "so these times are those of the host. The first call of a phase contains its compilation, if it is "
        "compiled in this video."
    )
    firsts = {one.phase: one.call for one in reversed(times)}
    usual = [one.wall for one in times if firsts[one.phase] != one.call] or [one.wall for one in times]
    top, width = max(usual) * 1.1, 14
    bars = []
    for place, one in enumerate(times):
        height = 100 * min(one.wall / top, 1) if top else 0
        bars.append(
            f'<rect class="{one.phase}" x="{place * width + 2}" y="{104 - height:.1f}" width="{width - 4}" '
            f'height="{height:.1f}"><title>{_text(_step_text(one))}: {one.phase}, {one.wall:.3f} s</title></rect>'
        )
        if one.wall > top:
            bars.append(
                f'<path class="cut" d="M{place * width + 2} 4l{width / 2 - 2} -4l{width / 2 - 2} 4z"/>'
            )
    said = f"Bars: wall time of each of {len(times)} calls. The same numbers are in the table below."
    drawn = (
        f'<svg class="bars" viewBox="0 0 {len(times) * width} 106" preserveAspectRatio="none" role="img" '
        f'aria-label="{_text(said)}">{"".join(bars)}</svg>'
    )
    cut = " Bars with a tip are longer: they are cut." if any(one.wall > top for one in times) else ""
    yield _figure(
        drawn,
        '<span class="key dense"></span> dense, <span class="key sparse"></span> sparse. '
        f"The height of the picture is {top:.3f} s.{cut}",
    )
    rows = [
        (_step_text(one), str(one.stream), one.phase, f"{one.wall:.4f}", f"{one.cpu:.4f}") for one in times
    ]
    yield _details(
        "Times as a table",
        _table(
            "Time of each call",
            ["step", "stream", "phase", "wall time in s", "CPU time in s"],
            rows,
            "numbers",
        ),
    )


def _step_text(one: CallTime | Measurement) -> str:
    return f"call {one.call}" if one.step is None else f"{one.step}"


# densities


def _densities(stats: RunStats) -> Iterator[str]:
    """A table of sites by steps, each cell the mean over streams, batch and heads."""
    yield "<h3>Density by layer and step</h3>"
    yield _paragraph(
        f"Density is the {MEANINGS['density']}: the mean over streams, batch and heads. "
        "A cell of stronger colour reads more. A dash: the site was not sparse in this step."
    )
    columns = list(dict.fromkeys(map(_step_text, stats.measurements)))
    rows = []
    for name, some in stats.by_site().items():
        cells = [f'<th scope="row">{_text(name)}</th>']
        for column in columns:
            here = RunStats(tuple(one for one in some if _step_text(one) == column), 0)
            density = here.density
            cells.append(
                "<td>-</td>"
                if math.isnan(density)
                else f'<td style="background:rgba(59,130,246,{0.6 * density:.3f})">{density:.3f}</td>'
            )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{_text(column)}</th>' for column in columns)
    yield (
        '<div class="wide"><table class="heat numbers"><caption>Density by attention (rows) and step (columns)'
        f'</caption><thead><tr><th scope="col">attention</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _measured(stats: RunStats) -> Iterator[str]:
    """All fields of the measurements, as means for each site."""
    yield "<h3>What was read, and what it kept</h3>"
    used = [name for name in stats.fields if not math.isnan(stats.mean(name))]
    yield _paragraph(
        *(f"{name.replace('_', ' ').capitalize()}: {MEANINGS[name]}." for name in used),
        *(
            ["Recall was not measured: the option measure_recall, a share of the queries, measures it."]
            if "recall" not in used
            else []
        ),
    )
    rows = []
    for name, some in stats.by_site().items():
        means = RunStats(tuple(some), 0)
        heads = torch.stack([one.density.mean(0) for one in some]).mean(0)
        rows.append(
            [
                name,
                some[0].method,
                str(len(some)),
                *(_number(means.mean(field)) for field in used),
                _number(float(heads.min())),
                _number(float(heads.max())),
            ]
        )
    headings = [
        *("attention", "method", "calls", *(name.replace("_", " ") for name in used)),
        *("lowest head", "highest head"),
    ]
    yield _table("Means of each attention over all its sparse calls", headings, rows, "numbers")


# keys that are read


def _examples(run: ModelRun) -> Iterator[str]:
    drawn = [*_static_examples(run.explanation.plans)]
    if run.stats is not None and run.stats.example is not None:
        one = run.stats.example
        drawn.append(
            (f"{one.site}, chosen in the first sparse call", one.layout, one.queries.cpu(), one.keys.cpu())
        )
    if not drawn:
        return
    yield "<h3>What one block of queries reads</h3>"
    yield _paragraph(
        "Each picture is a frame of the video, in latent tokens: rows by columns. The query block is that of the "
        "token in the middle of the video, in the first head. Drawn are the block itself and the keys that it "
        "reads exactly. The other keys are dropped, or approximated by the far field."
    )
    for name, layout, queries, keys in drawn:
        yield from _example(name, layout, queries, keys)


def _static_examples(plans: Iterable[AttentionPlan]) -> Iterator[tuple[str, TokenLayout, Tensor, Tensor]]:
    """(name, layout, queries, keys) of one site for each choice that is known before a call."""
    first: dict[tuple[TokenLayout, StaticMethod], tuple[str, AttentionPlan]] = {}
    for name, plan in fold(plans):
        if isinstance(plan.settings, StaticMethod) and plan.layout.grid is not None:
            first.setdefault((plan.layout, plan.settings), (name, plan))
    for (layout, method), (name, plan) in [*first.items()][:MOST_STATIC]:
        assert layout.grid is not None
        frames, height, width = layout.grid
        middle = layout.before + (frames // 2 * height + height // 2) * width + width // 2
        yield (f"{name}, {method_text(plan)}", layout, *method.table(layout).row_of(middle))


def _example(name: str, layout: TokenLayout, queries: Tensor, keys: Tensor) -> Iterator[str]:
    assert layout.grid is not None
    frames, height, width = layout.grid
    video = slice(layout.before, layout.tokens - layout.after)
    own, read = (one[video].view(frames, height, width) for one in (queries, keys))
    every = -(-frames // MOST_FRAMES)
    pictures = []
    for frame in range(0, frames, every):
        said = f"Frame {frame}: {int(read[frame].sum())} of {height * width} tokens read"
        if own[frame].any():
            said += f", {int(own[frame].sum())} in the query block"
        paths = "".join(
            f'<path class="{kind}" d="{_runs(cells)}"/>'
            for kind, cells in (("read", read[frame]), ("own", own[frame]))
            if cells.any()
        )
        pictures.append(
            f'<figure><svg class="frame" viewBox="0 0 {width} {height}" role="img" aria-label="{_text(said)}">'
            f'<rect class="unread" width="{width}" height="{height}"/>{paths}</svg>'
            f"<figcaption>{frame}: {int(read[frame].sum())}</figcaption></figure>"
        )
    others = layout.before + layout.after
    of_others = int(keys.sum()) - int(read.sum())
    said = (
        f"{int(queries.sum())} queries read {int(keys.sum())} of {layout.tokens} keys"
        + (f", {of_others} of them among the {others} other tokens" if others else "")
        + f". Grid {grid_text(layout)}. Below each frame: its number, and the number of its tokens that are read."
        + (f" Every {every}th frame is drawn." if every > 1 else "")
    )
    yield f'<h4>{_text(name)}</h4><div class="frames">{"".join(pictures)}</div>'
    yield (
        '<p><span class="key own"></span> query block, <span class="key read"></span> read, '
        f'<span class="key unread"></span> not read. {_text(said)}</p>'
    )


def _runs(cells: Tensor) -> str:
    """A path over the true cells of [height, width], one rectangle for each run of neighbours in a row."""
    parts = []
    for y, row in enumerate(cells.tolist()):
        x = 0
        for value, group in groupby(row):
            length = len(list(group))
            if value:
                parts.append(f"M{x} {y}h{length}v1h-{length}z")
            x += length
    return "".join(parts)


# plans, machine


def _plans(explanation: Explanation) -> Iterator[str]:
    rows = fold(explanation.plans)
    dense = [(name, plan) for name, plan in rows if plan.method == "dense"]
    yield "<h3>What stayed dense, and why</h3>"
    if dense:
        cells = [(name, plan.site.kind, COLUMNS["tokens"](plan), plan.reason) for name, plan in dense]
        yield _table(
            "Attention that stayed the model's own call", ["attention", "kind", "tokens", "reason"], cells
        )
    else:
        yield _paragraph("Every attention is sparse.")
    yield "<h3>All plans</h3>"
    yield _paragraph(explanation.summary)
    table = _table(
        "The plan of every attention in the last call",
        ["attention", *COLUMNS],
        [(name, *(cell(plan) for cell in COLUMNS.values())) for name, plan in rows],
    )
    yield _details("Plans as a table", table)


def _machine() -> Iterator[str]:
    from sparsify_compiler.doctor import devices, versions

    yield "<section>\n<h2>Machine and versions</h2>"
    yield _table("Machine", ["device", "description"], devices())
    yield _table("Versions", ["package", "version"], versions())
    yield "</section>"


# HTML


def _text(text: str) -> str:
    return html.escape(text)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _paragraph(*sentences: str) -> str:
    return f"<p>{_text(' '.join(sentences))}</p>"


def _figure(drawn: str, caption: str) -> str:
    """A picture. `caption`: HTML."""
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _table(caption: str, headings: Iterable[str], rows: Iterable[Iterable[str]], style: str = "words") -> str:
    """A table whose first column names the rows."""
    head = "".join(f'<th scope="col">{_text(one)}</th>' for one in headings)
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td>{_text(one)}</td>" for one in rest)
        body.append(f'<tr><th scope="row">{_text(first)}</th>{cells}</tr>')
    return (
        f'<div class="wide"><table class="{style}"><caption>{_text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1a1d21;--quiet:#5a6270;--line:#cfd5dd;--none:#e6eaef;
--read:#2563eb;--own:#d9480f;--dense:#8a94a3}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e8eaed;--quiet:#a5adba;--line:#3a414b;
--none:#2a3038;--read:#6ea0ff;--own:#ff8a4c;--dense:#7d8796}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:72rem;margin:0 auto;padding:1rem}
p{max-width:48rem}
h1{font-size:1.6rem}h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}h3{margin-top:2rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;margin:.5rem 0;font-size:.875rem}
caption{text-align:left;color:var(--quiet);padding:.25rem 0}
th,td{border:1px solid var(--line);padding:.2rem .5rem;text-align:left;vertical-align:top;white-space:pre-line}
thead th,tbody th{font-weight:600}
.numbers td{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:.5rem 0}figcaption{color:var(--quiet);font-size:.875rem}
.bars{width:100%;height:10rem;border-bottom:1px solid var(--line)}
.bars .dense{fill:var(--dense)}.bars .sparse{fill:var(--read)}.bars .cut{fill:var(--ink)}
.frames{display:flex;flex-wrap:wrap;gap:.5rem}
.frames figure{margin:0;break-inside:avoid}
.frame{width:8rem;display:block;border:1px solid var(--line)}
.unread{fill:var(--none);background:var(--none)}.read{fill:var(--read);background:var(--read)}
.own{fill:var(--own);background:var(--own)}
.key{display:inline-block;width:.8em;height:.8em;border:1px solid var(--line)}
.key.dense{background:var(--dense)}.key.sparse{background:var(--read)}
summary{cursor:pointer}
@media print{.wide{overflow:visible}main{max-width:none}h3{break-after:avoid}
details::details-content{content-visibility:visible;block-size:auto}}
"""
