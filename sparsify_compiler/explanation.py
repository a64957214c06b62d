"""The plan of the compiler for a model, with reasons: as objects, as a table and as a picture."""

import io
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sparsify_compiler import _torch, pictures
from sparsify_compiler.backend import FOLLOWS, configure, reads_more_or_less
from sparsify_compiler.config import SparsifyConfig, split_options
from sparsify_compiler.errors import OptionError, SparsifyError, unknown_choice
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.names import COMPILED_CALL
from sparsify_compiler.parallel.group import ranks_of
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.handover import Handover, may_leave, may_receive
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.passes.reports import PassReport
from sparsify_compiler.passes.run_time_sizes import NotKnownBefore
from sparsify_compiler.passes.sharding import Sharding
from sparsify_compiler.plan import AttentionPlan, GraphPlan, Ranks, TokenLayout
from sparsify_compiler.runtime.call import Hook
from sparsify_compiler.runtime.cost import OF_ONE_GROUP, Mesh, form_text, needs_all_queries, work_of
from sparsify_compiler.runtime.guard import known_plan
from sparsify_compiler.runtime.rates import in_best_form, known_cluster
from sparsify_compiler.table import BlockTable
from sparsify_compiler.uncompiled import Uncompiled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console, ConsoleOptions, RenderResult

WIDTH = 150
"""Width of the table as text, in columns."""

DEVICES = ("cpu", "cuda")
"""Device types that can be planned for, on any machine."""

NARROW = 120
"""Width in columns; a narrower table has fewer columns."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """The plans for every graph of a model, in the order in which one call runs them."""

    graph_plans: tuple[GraphPlan, ...]
    hints: tuple[str, ...] = ()
    """Sentences about what to try next."""
    outside: tuple[AttentionPlan, ...] = ()
    """Attention calls that ran outside every graph, in order: they are dense, and have the reason."""
    passes: tuple[tuple[PassReport, ...], ...] = ()
    """The reports of the passes for each graph; empty unless `verbose`."""
    sharing: tuple[Sharding, ...] = ()
    """The way in which ranks share each graph; empty for one process."""
    forms: tuple[str, ...] = ()
    """The form in which ranks share each graph, the reason for it and predicted numbers; empty for one process."""

    @property
    def plans(self) -> list[AttentionPlan]:
        """The plan of every attention call: first those in graphs, then those outside."""
        return [*(plan for graph in self.graph_plans for plan in graph), *self.outside]

    @property
    def graphs(self) -> int:
        """The number of graphs that Dynamo made of the model: 1 without graph breaks."""
        return len(self.graph_plans)

    @property
    def density(self) -> float:
        """Share of the arithmetic of all attention that is computed: densities weighted by each call's operations.

        A call whose density is known only when it runs counts as dense.
        """
        total = sum(map(_operations, self.plans))
        return sum((plan.density or 1.0) * _operations(plan) for plan in self.plans) / total if total else 1.0

    @property
    def summary(self) -> str:
        """The numbers of graphs and of attention calls, and the density, in a sentence."""
        sparse, calls = sum(len(graph.sparse) for graph in self.graph_plans), len(self.plans)
        most = "at most " if any(plan.density is None for plan in self.plans) else ""
        return (
            f"{_count(self.graphs, 'graph')}, {sparse} of {_count(calls, 'attention call')} sparse: "
            f"{most}{self.density:.1%} of the query-key pairs are computed."
        )

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=WIDTH, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """A table; on a narrow console the last columns stand below it, one line for each row."""
        from rich import box
        from rich.table import Table

        rows = fold(self.plans)
        if options.max_width >= NARROW:
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
            for heading in ("site", *COLUMNS):
                table.add_column(heading, no_wrap=heading != "reason")
            for name, plan in rows:
                table.add_row(_broken_path(name), *(cell(plan) for cell in COLUMNS.values()))
            yield table
        else:
            from sparsify_compiler.tables import fitting

            columns = {heading: cell for heading, cell in COLUMNS.items() if heading not in _WIDE_ONLY}
            cells = [[cell(plan) for cell in columns.values()] for _, plan in rows]
            yield from fitting(console, options, [name for name, _ in rows], [*columns], cells)
            for name, plan in rows:
                provider = f"{plan.provider}, " if plan.provider else ""
                yield f"{name}: {provider}{_heads_text(plan)}; {plan.reason}."
            yield ""
        yield self.summary
        for number, one in enumerate(self.sharing):
            yield f"Graph {number}: {one}."
            if not one.reason:
                yield f"Graph {number}, form {self.forms[number]}."
        yield from (f"Hint: {hint}" for hint in self.hints)
        for number, reports in enumerate(self.passes):
            yield from (f"Graph {number}, pass {one}." for one in reports)

    def save_picture(self, path: str | Path) -> Path:
        """Draw the mask of every distinct table, to scale, and save it in the format of the path's suffix.

        Rows are queries, columns are keys. Computed pairs of video tokens are dark, those of other tokens are
        orange.

        Raises:
            SparsifyError: no table is known before it runs, so there is nothing to draw; matplotlib is missing;
                the path cannot be written to, or has no suffix that matplotlib knows.
        """
        tables: dict[tuple[TokenLayout, StaticMethod], AttentionPlan] = {}
        names: dict[tuple[TokenLayout, StaticMethod], list[str]] = {}
        for name, plan in fold(self.plans):
            if isinstance(plan.settings, StaticMethod):
                tables.setdefault((plan.layout, plan.settings), plan)
                names.setdefault((plan.layout, plan.settings), []).append(name)
        if not tables:
            raise SparsifyError(
                "there is no mask to draw: no attention has a table that is known before it runs. str() of "
                "this explanation has the reasons; sparsify_compiler.stats(model) draws the densities of a run."
            )
        columns = min(len(tables), 3)
        rows = -(-len(tables) // columns)
        figure = pictures.figure(5.2 * columns, 5.6 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, (key, plan) in zip(grid, tables.items(), strict=False):
            layout, method = key
            _draw(axes, plan, method.table(layout), names[key])
        for axes in list(grid)[len(tables) :]:
            axes.set_axis_off()
        return pictures.save(figure, path)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Show what `torch.compile(model, backend="sparsify", options=options)` would do in `model(*args, **kwargs)`.

    It runs the model once, eagerly, and so finds all graphs, also after graph breaks. Model and inputs may be on
    the meta device: then nothing is computed and no memory is needed. Programs compiled before do not change.

    Args:
        model: a module or function. It runs without gradients unless it is in training mode.
        options: options of torch.compile; if None, those that `model` was compiled with.
        device: the device to choose providers for, `cpu` or `cuda`; if None, that of the model's tensors.
        verbose: whether to add the report of every pass.

    Raises:
        SparsifyError: options are wrong or do not fit the model.
    """
    if not callable(model):
        raise SparsifyError(f"explain needs a module or function that it can call, got {model!r}")
    options = _options_of(model) if options is None else options
    config = configure(options)
    device = _device_type(device)
    plans: list[GraphPlan] = []
    passes: list[tuple[PassReport, ...]] = []
    errors: list[SparsifyError] = []
    ranks, sharing, forms = ranks_of(config.parallel), dict[int, Sharding](), dict[int, str]()

    model = _torch.uncompiled(model)
    uncompiled = Uncompiled(model)

    def record(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        try:
            sizes = pipeline.sizes_by_values(gm, config)
        except NotKnownBefore:
            sizes = None
        if sizes is None:
            return uncompiled.in_graph()(recorded(gm))
        known: dict[Hashable, Callable[..., Any]] = {}

        def run(*args: Any) -> Any:
            inputs = sizes.all_inputs(args)
            key = sizes.key(inputs)
            if key not in known:
                known[key] = recorded(sizes.specialised(inputs))
            return known[key](*inputs)

        return uncompiled.in_graph()(run)

    def note_sharing(number: int, analysed: fx.GraphModule) -> None:
        if ranks is None or config.parallel is None:
            return
        trains = torch.is_grad_enabled()
        asked, recall = "hcp" if trains else config.parallel.form, config.measure_recall > 0
        plan = graph_plan(analysed)
        placed = in_best_form(plan, ranks, asked, recall=recall, measure=False)
        sharing[number] = pipeline.share(analysed, config, placed, trains=trains).meta["sharding"]
        forms[number] = _form(plan, config.parallel.form, placed, recall=recall, trains=trains)

    def recorded(gm: fx.GraphModule) -> Callable[..., Any]:
        try:
            try:
                leaves = may_leave(gm)
                analysed = pipeline.analyse(gm, config, device=device, ends=leaves)
                handover = Handover(analysed, config, may_receive(analysed), leaves, device)
                number = len(plans)
                plans.append(graph_plan(analysed))
                passes.append(analysed.meta["reports"])
                note_sharing(number, analysed)
            except OSError as error:
                if config.dump is None:
                    raise
                raise OptionError(
                    f"dump must be a folder that can be written to, got {str(config.dump)!r}: {error}"
                ) from error
        except SparsifyError as error:
            errors.append(error)
            raise _torch.unwrapped(error) from None

        def run(*inputs: Any) -> Any:
            try:
                graph = handover.receive(inputs)
            except SparsifyError as error:
                errors.append(error)
                raise
            if graph is not analysed:
                plans[number], passes[number] = graph_plan(graph), graph.meta["reports"]
                note_sharing(number, graph)
            outputs = gm.forward(*inputs)
            handover.leave(graph, inputs, outputs)
            return outputs

        return run

    try:
        gradients = nullcontext() if getattr(model, "training", False) else torch.no_grad()
        with gradients, _torch.tracing(record, _call) as call, uncompiled:
            call(model, args, kwargs)
    except SparsifyError:
        raise errors[0] from None  # without the text that Dynamo appends
    if ranks is None:
        plans = [known_plan(one, config.guard, config.measure_recall, device) for one in plans]
    return Explanation(
        tuple(plans),
        tuple(_hints(plans, config, options or {})),
        tuple(uncompiled.plans),
        tuple(passes) if verbose else (),
        tuple(sharing.values()),
        tuple(forms.values()),
    )


def _form(plan: GraphPlan, asked: str, ranks: Ranks, *, recall: bool, trains: bool) -> str:
    """The form in which ranks share a graph, and the reason.

    Args:
        asked: the form of the option `parallel`.
        recall: whether the recall of dynamic methods is measured.
        trains: whether the model trains.
    """
    if ranks.size == 1:
        return "one 1x1: there is one rank"
    forms: tuple[str, ...] = (ranks.form,)
    why = "the form that the option names"
    if asked == "auto" and ranks.form != "hybrid" and trains:
        why = "in training ranks share heads"
    elif asked == "auto" and ranks.form != "hybrid":
        why = next(filter(None, (needs_all_queries(one, recall=recall) for one in plan)), "")
        why = f"of an attention {why}" if why else ""
        forms = forms if why else OF_ONE_GROUP
    of_sequence = 1 if ranks.sequence is None else ranks.sequence.size
    dtypes = {one.site.dtype for one in plan}
    cluster = known_cluster(ranks, dtypes.pop()) if len(dtypes) == 1 else None
    return form_text(work_of(plan), Mesh(ranks.size // of_sequence, of_sequence), forms, cluster, why)


def _options_of(model: Callable[..., Any]) -> Mapping[str, Any] | None:
    """The options that torch.compile, `Module.compile` or `apply` got for a model; None if none of them did."""
    hook = getattr(model, "__dict__", {}).get(COMPILED_CALL)
    return hook.model.options if isinstance(hook, Hook) else _torch.options_of(hook or model)


def _device_type(device: str | None) -> str | None:
    """The type of a device: `cuda` for `cuda` and for `cuda:0`."""
    kind, colon, index = (device or "cpu").partition(":")
    if kind not in DEVICES or (colon and not index.isdecimal()):
        raise unknown_choice("device", device, DEVICES)
    return device and kind


def _call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _hints(graphs: Sequence[GraphPlan], config: SparsifyConfig, options: Mapping[str, Any]) -> Iterator[str]:
    plans = [plan for graph in graphs for plan in graph]
    if not graphs:
        yield "Dynamo compiled nothing: is the model wrapped in torch.compiler.disable?"
    if len(graphs) > 1:
        yield f"the model breaks into several graphs; torch.compile(..., fullgraph=True) shows where. {FOLLOWS}."
    slow = next((plan for plan in plans if plan.provider == "reference"), None)
    if slow is not None and options.get("provider") != "reference":
        yield f"provider reference is slow; {slow.site.name} uses it because: {slow.reason}"
    shares = {graph.dense_steps for graph in graphs if isinstance(graph.dense_steps, float) and graph.sparse}
    for share in shares - {0.0}:
        yield (
            f"the first {share:.0%} of a generation's steps run dense. The number of steps is that of "
            f"sparsify_compiler.generation(steps=...), else an estimate from the first time steps."
        )
    if any(plan.density is None for plan in plans):
        yield "sites by call select keys when they run; sparsify_compiler.stats(model) shows their density."
    general, own = split_options(options)
    sparse = [plan for graph in graphs for plan in graph.sparse]
    if sparse and not {"method", "policy"} & general.keys() and not own:
        yield f"the method is the default; {reads_more_or_less(sparse[0])}."
    if config.policy is not None and config.policy.advice:
        yield f"{config.policy.advice}."


def fold(plans: Iterable[AttentionPlan]) -> list[tuple[str, AttentionPlan]]:
    """(name, plan), with one row for calls that differ only in numbers of their path: `blocks.{0..39}.attn1`."""
    groups: dict[Any, dict[tuple[Any, ...], AttentionPlan]] = {}
    for plan in plans:
        parts = tuple((int(part),) if part.isdigit() else part for part in plan.site.name.split("."))
        content = replace(plan, site=replace(plan.site, name="", index=0))
        template = tuple("" if isinstance(part, tuple) else part for part in parts)
        groups.setdefault((template, content, plan.layout.reason), {}).setdefault(parts, plan)
    rows = []
    for (template, *_), named in groups.items():
        for place in (i for i, part in reversed([*enumerate(template)]) if not part):
            merged: dict[Any, tuple[tuple[int, ...], AttentionPlan]] = {}
            for parts, plan in named.items():
                others = (*parts[:place], "", *parts[place + 1 :])
                numbers, first = merged.get(others, ((), plan))
                merged[others] = (*numbers, *parts[place]), first
            named = {
                (*others[:place], numbers, *others[place + 1 :]): first
                for others, (numbers, first) in merged.items()
            }
        rows += [(".".join(map(_part_text, parts)), plan) for parts, plan in named.items()]
    return rows


def _part_text(part: str | tuple[int, ...]) -> str:
    """A path component: itself, or its numbers as `3` or `{0..2,5}`."""
    if isinstance(part, str):
        return part
    runs: list[list[int]] = []
    for number in sorted(part):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return text if len(part) == 1 else f"{{{text}}}"


def grid_text(layout: TokenLayout) -> str:
    """`226 + 13x30x45 + 10`: the tokens before, the grid, the tokens after."""
    if layout.grid is None:
        return "-"
    before, after = (
        f"{layout.before} + " if layout.before else "",
        f" + {layout.after}" if layout.after else "",
    )
    return before + "x".join(map(str, layout.grid)) + after


def method_text(plan: AttentionPlan, separator: str = " ") -> str:
    """`tile reference_frames=2`."""
    settings = plan.settings
    numbers = [] if settings is None else [f"{f.name}={getattr(settings, f.name)}" for f in fields(settings)]
    far = [f"far_field={plan.far_field}"] if plan.far_field != "drop" else []
    return separator.join([plan.method, *numbers, *far])


def _broken_path(path: str, width: int = 24) -> str:
    """The path, broken after dots into lines of at most `width` columns where possible."""
    lines = [""]
    for part in re.findall(r"(?:\{.*?\}|[^.])+\.?", path):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def density_text(plan: AttentionPlan) -> str:
    """The density, or `by call` if every call decides it."""
    return "by call" if plan.density is None else f"{plan.density:.3f}"


def _heads_text(plan: AttentionPlan) -> str:
    return f"{plan.site.heads} x {plan.site.head_dim}" if plan.site.heads else "-"


def _tokens_text(plan: AttentionPlan) -> str:
    q_tokens, kv_tokens = plan.site.q_tokens, plan.site.kv_tokens
    if not q_tokens:
        return "-"
    return str(q_tokens) if q_tokens == kv_tokens else f"{q_tokens}\nto {kv_tokens}"


COLUMNS: dict[str, Callable[[AttentionPlan], str]] = {
    "kind": lambda plan: plan.site.kind,
    "tokens": _tokens_text,
    "heads x dim": _heads_text,
    "grid": lambda plan: grid_text(plan.layout),
    "method": lambda plan: method_text(plan, "\n"),
    "provider": lambda plan: plan.provider or "-",
    "density": density_text,
    "reason": lambda plan: plan.reason,
}
"""Heading of a column -> its text for a plan."""
_WIDE_ONLY = ("heads x dim", "provider", "reason")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _operations(plan: AttentionPlan) -> int:
    """Multiply-adds of the call if it were dense."""
    site = plan.site
    return site.batch * site.heads * site.q_tokens * site.kv_tokens * (site.head_dim + site.value_dim)


def _draw(axes: "Axes", plan: AttentionPlan, table: BlockTable, names: list[str]) -> None:
    """Draw the mask of one plan, or of its first head; the bounds of blocks are the edges of its cells."""
    from matplotlib.colors import ListedColormap

    rows, columns = (bounds[0, 0].tolist() for bounds in (table.q_bounds, table.kv_bounds))
    kept = table.block_mask()[0, 0].int()
    video = range(plan.layout.before, plan.layout.tokens - plan.layout.after)
    for cells, bounds in ((kept, rows), (kept.T, columns)):
        cells[[start not in video for start in bounds[:-1]]] *= 2
    colours = ListedColormap(["#eef1f5", "#1f4e79", "#e08a2e"])
    axes.pcolormesh(
        columns, rows, kept.clamp(max=2), cmap=colours, vmin=0, vmax=2, edgecolors="white", linewidth=0.4
    )
    moved = "" if table.kv_order is None else ", block by block"
    axes.set(aspect="equal", xlabel=f"key token{moved}", ylabel=f"query token{moved}")
    axes.invert_yaxis()
    head = ["head 0"] if table.kv_num_blocks.shape[1] > 1 else []
    what = f"{method_text(plan)} on {grid_text(plan.layout)}: density {density_text(plan)}"
    axes.set_title("\n".join([*names, what, *head]), fontsize=9)
