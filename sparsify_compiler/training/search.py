"""Layer-wise search, after Efficient-vDiT (arXiv 2502.06155).

For every attention of a model, the search chooses full attention or an entry of a menu with a loss of at most r on
calibration inputs; r is one number for the model. It takes the cheapest choices with a sum of losses of at most
`total`. Without a total it follows the paper's rule: the cheapest entry at each attention.

    policy = search(model, inputs, menu=[{"method": "tile"}, {"method": "svg2", "min_gain": 0.02}], total=0.02)
    policy.save("policy.json")
    fast = torch.compile(model, backend="sparsify", options={"policy": "policy.json"})

The paper's loss is not normalised, so its r depends on the model. Here it is the relative squared error of the
model's output when only one attention is sparse,

    loss = mean over calibration inputs of ||v - v_dense||^2 / ||v_dense||^2

It is measured at the output and not at the attention, since the share of an error that reaches the output differs
between layers. It is normalised per input, so that all noise levels have the same weight. Squared errors of
layers roughly add up if they are independent, so the total is about the loss of all choices together. This loss
is measured at the end too. With only r, it may be up to r times the number of layers: an attention that would
gain much for little more than r stays dense, while others lose almost r for a small gain.

Costs are measured times of an attention call, including selection, on the queries, keys and values of the
calibration inputs: the mean over inputs of the median for each input. K-means starts warm, as in the middle of a
video. Dense attention, and methods that need only the layout, are timed once per input for all sites of one
shape. Dense attention is always SDPA, whatever the model calls.

The model is traced once. Every call of it then tries one entry at one site, as in the first call of a video. The
number of calls is sites x entries x inputs.
"""

import json
import math
import platform
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify_compiler import _torch
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import OptionError, SparsifyError, unknown_choice
from sparsify_compiler.explanation import Explanation, explain
from sparsify_compiler.methods import StaticMethod, TrainedMethod
from sparsify_compiler.options import WITH_A_POLICY, configure
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.capture import attention, attention_nodes
from sparsify_compiler.passes.fx import tensor_of
from sparsify_compiler.passes.lowering import lower
from sparsify_compiler.passes.planning import make_plan, refusal
from sparsify_compiler.plan import AttentionPlan, AttentionSite, TokenLayout
from sparsify_compiler.policy import DENSE, Entry, Policy, PolicySite, Trial, entry_of, mark
from sparsify_compiler.progress import advance, bars
from sparsify_compiler.runtime.site_inputs import GraphInputs
from sparsify_compiler.timing import timed

GAINS = (0.001, 0.005, 0.02, 0.1)
MASSES = (0.3, 0.5, 0.7)
BUDGETS = (0.05, 0.1, 0.2)
_CUBES = {"method": "cubes", "cube": (4, 2, 2), "query_cube": (4, 2, 4)}
MENU: tuple[Mapping[str, Any], ...] = (
    *({"method": "tile", "reference_frames": frames} for frames in (0.5, 0.25, 0.125, 1)),
    *({"method": "svg2", "min_gain": gain} for gain in GAINS),
    *({**_CUBES, "min_gain": gain} for gain in GAINS),
    *({**_CUBES, "far_field": "drop", "top_p": mass} for mass in MASSES),
    *({"method": "keys", "kv_budget": budget} for budget in BUDGETS),
)
"""Entries for a video of any size. With few tokens a far field costs more than it saves: some entries have none."""
PARTS = 1000
"""Number of parts of a total."""
REPEATS = 3
"""Number of timed calls of an attention; their median counts."""

Inputs = Mapping[str, Any]
"""Keyword arguments of a call of the model."""
Pair = tuple[AttentionSite, TokenLayout]


@torch.no_grad()
def search(
    model: Callable[..., Any],
    inputs: Sequence[Inputs],
    *,
    menu: Sequence[Mapping[str, Any]] = MENU,
    r: float = 0.01,
    total: float = 0.02,
    options: Mapping[str, Any] | None = None,
) -> Policy:
    """Search a policy for a model; the module's docstring describes the rule. It shows its progress on stderr.

    Args:
        model: a module in eval mode, compiled or not. It runs uncompiled.
        inputs: keyword arguments of calibration calls, all of one grid: several noise levels, videos and prompts.
        menu: options of torch.compile for each entry: `method`, its own options, `far_field`. `dense` is on every
            menu.
        r: largest loss of a site; 0 means full attention.
        total: largest sum of the losses of all sites. If r and total are infinite, the fastest entries win.
        options: options of torch.compile that may be given with a policy, such as `grid` and `provider`.

    Raises:
        OptionError: r, total, the menu, an entry or an option is wrong, or does not fit the model's video.
        SparsifyError: the model has no attention to choose for, is in training mode, or returns no tensor, or one
            that is zero or not finite; or the inputs have several grids.
    """
    check_limits(r, total)
    entries = read_menu(menu)
    config = _config(options)
    if (
        not isinstance(inputs, Sequence)
        or not inputs
        or not all(isinstance(one, Mapping) and one for one in inputs)
    ):
        raise OptionError(
            "inputs must be a list of the keyword arguments of at least one call, such as [{'hidden_states': ..., "
            f"'timestep': ...}}], got {reprlib.repr(inputs)}"
        )
    module = _torch.uncompiled(model)
    if getattr(module, "training", False):
        raise SparsifyError("the model must be in eval mode, got one in training mode: try model.eval()")
    graphs = _graphs(explain(module, **inputs[0], options={**(options or {}), "method": DENSE}))
    plans = {
        site.name: {label: _plan(entry, config, site, layout) for label, entry in entries.items()}
        for graph in graphs
        for site, layout in graph
    }
    calls = len(inputs) * (2 + len(plans) * (len(entries) - 1))
    with bars(transient=True) as bar, _bench(module, inputs, plans, config) as bench:
        count = advance(bar, "searching", calls)
        trials = bench.trials(count)
        choices = choose(trials, r, total)
        together = [bench.loss(number, choices, count) for number in range(len(inputs))]
    return Policy(
        model=type(module).__name__,
        r=float(r),
        total=float(total),
        menu=entries,
        layers=tuple(
            PolicySite(
                mark=mark(*pair), graph=number, choice=choices[pair[0].name], trials=trials[pair[0].name]
            )
            for number, graph in enumerate(graphs)
            for pair in graph
        ),
        together=fmean(together),
        inputs=len(inputs),
        machine=_machine(graphs[0][0][0].device),
    )


def check_limits(r: float, total: float) -> None:
    """Raises:
    OptionError: r or total is not a number of at least 0.
    """
    for name, value in (("r", r), ("total", total)):
        if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
            raise OptionError(f"{name} must be a number of at least 0, got {value!r}")


def choose(trials: Mapping[str, Mapping[str, Trial]], r: float, total: float) -> dict[str, str]:
    """Site -> label: the cheapest choices with a loss of at most r each and `total` in sum; at equal cost, least
    loss.

    A knapsack. Losses are rounded up to whole parts of the total, of which there are `PARTS`. So the total is never
    exceeded, and the unused rest is less than one part per site.
    """
    best, picked = [(0.0, 0.0)] * (PARTS + 1), []
    for entries in trials.values():
        allowed = [
            (_parts(trial.loss, total), trial, label) for label, trial in entries.items() if trial.loss <= r
        ]
        rows = [
            min(
                (best[room - need][0] + trial.milliseconds, best[room - need][1] + trial.loss, number)
                for number, (need, trial, _) in enumerate(allowed)
                if need <= room
            )
            for room in range(PARTS + 1)
        ]
        best = [(milliseconds, loss) for milliseconds, loss, _ in rows]
        picked.append([allowed[number] for *_, number in rows])
    room, labels = PARTS, []
    for of_rooms in reversed(picked):
        need, _, label = of_rooms[room]
        room -= need
        labels.append(label)
    return dict(zip(trials, reversed(labels), strict=True))


def _parts(loss: float, total: float) -> int:
    """The number of parts of the total that a loss takes; more than `PARTS` if it does not fit."""
    if loss == 0 or total == math.inf:
        return 0
    return PARTS + 1 if loss > total else math.ceil(loss / total * PARTS)


def read_menu(menu: Sequence[Mapping[str, Any]]) -> dict[str, Entry]:
    """Label -> entry, `dense` first.

    Raises:
        OptionError: the menu is empty, or an entry is unknown, comes twice, or has no trained predictor.
    """
    if isinstance(menu, (str, Mapping)) or not isinstance(menu, Sequence) or not menu:
        raise OptionError(
            "the menu must be a list of at least one entry such as "
            f"{{'method': 'svg2', 'min_gain': 0.02}}, got {menu!r}"
        )
    entries = {DENSE: entry_of({"method": DENSE})}
    for options in menu:
        if not isinstance(options, Mapping):
            raise OptionError(f"an entry of the menu must be a dict of options, got {options!r}")
        entry = entry_of(options)
        if isinstance(entry.method, TrainedMethod) and entry.method.learns:
            raise OptionError(
                f"an entry of the menu must be trained: {dict(options)} needs a 'predictor', written by DSVTrainer"
            )
        label = label_of(options)
        if entry in [other for name, other in entries.items() if name != DENSE]:
            raise OptionError(f"the menu must have every entry only once, got {label!r} again")
        entries[label] = entry
    return entries


def read_menu_file(path: Path) -> Any:
    """The content of a JSON file, for `read_menu`, which checks it.

    Raises:
        OptionError: the file cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither text nor JSON
        raise OptionError(
            f'the menu must be a JSON file with a list such as [{{"method": "svg2", "min_gain": 0.02}}], got '
            f"{str(path)!r}: {error}"
        ) from error


def label_of(options: Mapping[str, Any]) -> str:
    """The label of an entry, such as `svg2 min_gain=0.02`: its method and the other options."""

    def text(value: Any) -> str:
        return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)

    others = (f"{name}={text(value)}" for name, value in options.items() if name != "method")
    return " ".join([str(options["method"]), *others])


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact||^2 / ||exact||^2."""
    return float((got.double() - exact.double()).square().sum() / exact.double().square().sum())


def _config(options: Mapping[str, Any] | None) -> SparsifyConfig:
    for name in options or {}:
        if name not in WITH_A_POLICY:
            raise unknown_choice("option of a search", name, WITH_A_POLICY)
    return configure({**(options or {}), "method": DENSE})


def _machine(device: str) -> str:
    threads = torch.get_num_threads()
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    words = "1 thread" if threads == 1 else f"{threads} threads"
    return f"{platform.processor() or platform.machine()}, {words}, torch {torch.__version__}"


def _graphs(explained: Explanation) -> list[list[Pair]]:
    """The attentions with a choice, for every graph that has such attentions."""
    graphs = [
        [(plan.site, plan.layout) for plan in graph if _has_choice(plan.site, plan.layout)]
        for graph in explained.graph_plans
    ]
    names = [site.name for graph in graphs for site, _ in graph]
    if not names:
        raise SparsifyError(
            "the model has no attention to choose for; print(sparsify_compiler.explain(model, ...)) shows why"
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SparsifyError(
            f"two attentions of this model are called {twice!r}, since it breaks into graphs; "
            "torch.compile(model, fullgraph=True) shows where"
        )
    return [graph for graph in graphs if graph]


def _has_choice(site: AttentionSite, layout: TokenLayout) -> bool:
    return not refusal(site, layout) and layout.grid is not None


def _plan(entry: Entry, config: SparsifyConfig, site: AttentionSite, layout: TokenLayout) -> AttentionPlan:
    """The plan of a single site."""
    config = replace(config, method=entry.method, far_field=entry.far_field, dense_layers=0)
    (plan,) = make_plan([(site, layout)], config)
    return plan


@contextmanager
def _bench(
    model: Callable[..., Any],
    inputs: Sequence[Inputs],
    plans: Mapping[str, Mapping[str, AttentionPlan]],
    config: SparsifyConfig,
) -> Iterator["_Bench"]:
    """Yield a bench on which the model runs with probes instead of attentions. `plans`: site -> label -> plan."""
    bench = _Bench(model, plans, inputs)

    def compile_with_probes(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        analysed = pipeline.analyse(gm, config)
        for node in attention_nodes(analysed):
            if _has_choice(node.meta["site"], node.meta["layout"]):
                _place_probe(analysed, node, bench)
        return pipeline.rewrite(analysed, config).forward

    with _torch.tracing(compile_with_probes, _call) as bench.call:
        yield bench


def _call(model: Callable[..., Any], inputs: Inputs) -> Any:
    return model(**inputs)


def _place_probe(gm: fx.GraphModule, node: fx.Node, bench: "_Bench") -> None:
    site, original = node.meta["site"], node.meta["original"]
    name = f"sparsify_probe{site.index}"
    gm.add_submodule(name, _Probe(node, bench))
    with gm.graph.inserting_before(node):
        out = gm.graph.call_module(name, node.args[:4])
    node.replace_all_uses_with(out)
    gm.graph.erase_node(node)
    if site.spelling == "sdpa":
        gm.graph.erase_node(original)


class _Bench:
    """A model whose attentions follow `choices` and are timed."""

    call: Callable[..., Any]

    def __init__(
        self,
        model: Callable[..., Any],
        plans: Mapping[str, Mapping[str, AttentionPlan]],
        inputs: Sequence[Inputs],
    ) -> None:
        self.model, self.plans, self.inputs = model, plans, inputs
        self.choices: Mapping[str, str] = {}
        """Site -> label of its entry in this call; dense if it has none."""
        self.timed: dict[AttentionPlan, float] | None = None
        """Seconds of each plan in this call; None in a call without timing."""
        self.reached: set[str] = set()
        """Sites that this call has reached."""
        self._exact: list[Tensor] = []

    def trials(self, advance: Callable[[], object]) -> dict[str, dict[str, Trial]]:
        """Site -> label -> measurements; `advance` is called after each call of the model."""
        times, losses = [], []
        for number in range(len(self.inputs)):
            times.append(self._time(number))
            advance()
            losses.append(
                {
                    (site, label): 0.0 if label == DENSE else self.loss(number, {site: label}, advance)
                    for site, plans in self.plans.items()
                    for label in plans
                }
            )
        return {
            site: {
                label: Trial(
                    fmean(one[site, label] for one in losses), 1e3 * fmean(one[_alike(plan)] for one in times)
                )
                for label, plan in plans.items()
            }
            for site, plans in self.plans.items()
        }

    def loss(self, number: int, choices: Mapping[str, str], advance: Callable[[], object]) -> float:
        """The loss on an input with these choices."""
        self.choices = choices
        lost = relative_error(self._output(number), self._exact[number])
        advance()
        return lost

    def _output(self, number: int) -> Tensor:
        return _first_tensor(self.call(self.model, self.inputs[number]))

    def _time(self, number: int) -> dict[AttentionPlan, float]:
        """Seconds of each plan in a dense call. The call's output is kept."""
        self.choices, self.reached = {}, set()
        timed: dict[AttentionPlan, float] = {}
        self.timed = timed
        out, self.timed = self._output(number), None
        if beyond := sorted(self.plans.keys() - self.reached):
            raise SparsifyError(
                f"{', '.join(beyond)} cannot be searched: not called for every input, or inside an operator such "
                "as activation checkpointing; try to turn that off"
            )
        if not (out.isfinite().all() and out.any()):
            raise SparsifyError(
                "the model's output must be finite and non-zero, since errors are relative to it: are its weights "
                "loaded?"
            )
        self._exact.append(out)
        return timed


def _alike(plan: AttentionPlan) -> AttentionPlan:
    """A key shared by plans that take the same time. Plans of dynamic methods are distinct: they look at tokens."""
    if plan.method != DENSE and not isinstance(plan.settings, StaticMethod):
        return plan
    return replace(plan, reason="", site=replace(plan.site, name="", index=0))


class _Probe(nn.Module):
    """A module that replaces an attention. It runs the entry that the bench chooses, and times entries for it."""

    def __init__(self, node: fx.Node, bench: _Bench) -> None:
        super().__init__()
        self.bench, self.site, self.layout = bench, node.meta["site"], node.meta["layout"]
        self.examples = [tensor_of(one) for one in node.args[:4]]
        self.calls: dict[str, _Attention] = {}

    def forward(self, *tensors: Tensor | None) -> Tensor:
        """[B, H, Sq, Dv] from query, key, value and mask."""
        bench, name = self.bench, self.site.name
        plans = bench.plans.get(name)
        if plans is None or mark(plans[DENSE].site, plans[DENSE].layout) != mark(self.site, self.layout):
            raise SparsifyError(
                f"all inputs must give the same attentions and grid, got {name} of grid {self.layout.grid} in one "
                "of them; search each grid separately"
            )
        bench.reached.add(name)
        for label, plan in plans.items():
            if label not in self.calls:  # lowered for the batch and the prompt length of this call
                here = replace(plan, site=replace(self.site, spelling="sdpa"), layout=self.layout)
                self.calls[label] = _Attention(here, self.examples)
            if bench.timed is not None and _alike(plan) not in bench.timed:
                bench.timed[_alike(plan)] = self.calls[label].seconds(*tensors)
        return self.calls[bench.choices.get(name, DENSE)](*tensors)


class _Attention:
    """One attention with a plan, lowered as in a model, with its own state."""

    def __init__(self, plan: AttentionPlan, examples: Sequence[Tensor | None]) -> None:
        """Args:
        examples: fake query, key, value and mask.
        """
        self.plan = plan
        graph = fx.Graph()
        operands = [
            None if one is None else graph.placeholder(name)
            for name, one in zip(("query", "key", "value", "mask"), examples, strict=True)
        ]
        for node, example in zip(operands, examples, strict=True):
            if node is not None:
                node.meta["example_value"] = example
        args = (*operands, plan.site.scale)
        dense, node = graph.call_function(_dense, args), graph.call_function(attention, args)
        node.meta = {"site": plan.site, "plan": plan, "original": dense, "result": node, "inserted": True}
        graph.output(node)
        self._graph = lower(fx.GraphModule(nn.Module(), graph))
        self._graph.recompile()
        self._extra: GraphInputs = self._graph.meta["extra"]

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """Run it as in the first call of a video."""
        return self._run(tensors, self._extra.blank())

    def seconds(self, *tensors: Tensor | None) -> float:
        """Seconds of a later call, the median of `REPEATS`."""
        query = tensors[0]
        assert query is not None
        first = self._extra.blank()
        self._run(tensors, first)
        call = partial(self._run, tensors, self._extra.later(first))
        return median(timed(call, str(query.device))[0] for _ in range(REPEATS))

    def _run(self, tensors: Iterable[Tensor | None], extra: Iterable[Tensor]) -> Tensor:
        return self._graph(*(t for t in tensors if t is not None), *extra)


def _dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """SDPA with the arguments of `attention`."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _first_tensor(result: Any) -> Tensor:
    """The first tensor of a model's result: a tensor, a tuple, or an output of diffusers."""
    if isinstance(result, Mapping):
        result = tuple(result.values())
    while isinstance(result, (tuple, list)) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise SparsifyError(
            f"the model must return a tensor, or a tuple that begins with one, got {type(result)}"
        )
    return result
