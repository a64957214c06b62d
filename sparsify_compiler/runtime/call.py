"""The call of an applied model: what all graphs that run in it share.

Dynamo may split a model into many graphs, or a caller may compile its blocks one by one. A graph then shows neither
the time step, nor the grid of the video, nor which layer of which model it is. All of this belongs to the call of
the model. `Hook` wraps the call. It opens a `ModelCall`, which holds the clock's tick, the state of the model, and
an analysis of the whole model. Programs ask `open_call` for it.
"""

import inspect
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsify_compiler import _torch
from sparsify_compiler._torch_lock import compile_lock
from sparsify_compiler.methods import TrainedMethod
from sparsify_compiler.names import COMPILED_CALL, TIME_STEP
from sparsify_compiler.plan import Analysis, AttentionPlan, GraphPlan, Part, Parts, TokenLayout
from sparsify_compiler.runtime.clock import PerGeneration, Prints, StepClock, Tick, Times
from sparsify_compiler.runtime.positions import meshes_of
from sparsify_compiler.runtime.recomputing import Log, new_log
from sparsify_compiler.runtime.state import Example, ModelState, Record, state_of
from sparsify_compiler.table import BlockTable

log = logging.getLogger("sparsify_compiler")

_UNLIKE = "the analysis of the whole model has another attention in this place"
_UNKNOWN_LAYER = "it has no weights near it, and calls skip attentions, so its layer is not known"
_ANALYSES = 32
"""The most analyses of a model for one set of shapes."""
_SKIPPED = "the call skipped it, or ran it outside every graph"


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs) of a call."""


@dataclass(slots=True, eq=False)
class AppliedModel:
    """A model that `apply` changed."""

    module: "weakref.ref[nn.Module]"
    name: str
    """Name of the component of a pipeline; empty for a model alone."""
    clocks: PerGeneration[StepClock]
    """The clocks of all models that make one video together, such as the two experts of a pipeline."""
    analyse: Callable[[nn.Module, Arguments], Analysis]
    """Analyses the whole model for the shapes of a call."""
    compile_apart: Callable[[nn.Module], None]
    """Compiles a module of the model by itself from now on."""
    prepare: Callable[[], None]
    """Makes attention readable before every call, since scripts change it between calls."""
    video: "Callable[[ModelCall], AbstractContextManager[Any]]" = lambda _: nullcontext()
    """Opens the generation that a call belongs to, where its caller's scheduler says the number of steps."""
    parts_only: bool = False
    """Whether only parts of the model are compiled, so that every graph needs the analysis."""
    captures_sizes: bool = False
    """Whether Dynamo captures operators whose results have sizes that depend on values."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the backend."""
    checks_grid: bool = False
    """Whether a grid was given. The analysis raises an error if it fits no attention."""
    replays: bool = False
    """Whether CUDA graphs replay its calls. Then no tensor that a call makes may outlive it."""
    state: ModelState = field(init=False)
    graphs: tuple[GraphPlan, ...] = ()
    """The plans that the last finished call ran, in order."""
    analysis: Analysis | None = None
    """The analysis that the last call needed; None if each graph showed all."""
    told: bool = False
    """Whether the log has said how many attentions are sparse."""
    by_order: bool = True
    """Whether attentions without a Parameter may be known by their order: each call runs all attentions."""
    _analyses: dict[Hashable, list[Analysis]] = field(default_factory=dict)
    _compiled: set[str] = field(default_factory=set)
    """The names of all attentions that ever ran in a graph."""
    _paths: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = state_of(self.module())
        self.state.clocks = self.clocks

    def path_of(self, parameter: object) -> str | None:
        """The path of a Parameter or buffer in the model; None if it has another owner."""
        module = self.module()
        assert module is not None, "the call holds the model"
        for _ in range(2):
            path = self._paths.get(id(parameter))
            if path is not None and _tensor_at(module, path) is parameter:
                return path
            # Offloading replaces Parameters between calls, and even within a call.
            named = [*module.named_parameters(), *module.named_buffers()]
            self._paths = {id(tensor): name for name, tensor in named}
        return None

    def analysed(self, call: "ModelCall") -> Analysis:
        """The analysis for the shapes of a call."""
        self.analysis = next(self.analyses(call))
        self.captures_sizes |= self.analysis.captures_sizes
        return self.analysis

    def analyses(self, call: "ModelCall") -> Iterator[Analysis]:
        """The analyses for the shapes of a call, the last used first.

        There is one, unless the model asks for values of its arguments, such as the length of a prompt. Then the
        last one is new, from the values of this call.
        """
        known = self._analyses.setdefault(call.shapes, [])
        yield from tuple(known)
        if not known or (known[0].by_values and not call.analysed_again):
            call.analysed_again = bool(known)
            found = self.analyse(call.module, (call.args, call.kwargs))
            known.insert(0, found)
            del known[_ANALYSES:]
            if found.failure:
                log.warning(
                    "sparsify cannot analyse %s as a whole (%s): parts of it are sparse only where their own "
                    "graph shows the video; give options={'grid': (frames, height, width)}",
                    type(call.module).__name__,
                    found.failure,
                )
            yield found

    def use(self, call: "ModelCall", analysis: Analysis) -> None:
        """Try an analysis first from now on."""
        known = self._analyses[call.shapes]
        known.sort(key=lambda one: one is not analysis)
        self.analysis = analysis

    @property
    def plans(self) -> list[AttentionPlan]:
        """The plans of all attentions that ran in graphs in the last call."""
        return [plan for graph in self.graphs for plan in graph]

    @property
    def outside(self) -> list[AttentionPlan]:
        """The plans of the attentions that ran in no graph in the last call, or that the call skipped."""
        if self.analysis is None:
            return []
        ran = {plan.site.name for plan in self.plans}
        skipped = [
            part.as_dense(_SKIPPED + self._hooks_around(part.name))
            for part in self.analysis.parts
            if part.name not in ran
        ]
        return [*skipped, *self.analysis.outside]

    def compile_rest(self) -> bool:
        """Compile modules by themselves whose attention no graph holds, since a hook keeps Dynamo from it.

        Returns whether there are new ones, so that the next call may be another.
        """
        ran = {plan.site.name for plan in self.plans}
        self._compiled |= ran
        found = False
        for part in self.analysis.parts if self.analysis is not None else ():
            path, module = part.name.partition("#")[0], self.module()
            if part.entry is None or part.name in self._compiled or module is None:
                continue
            owner = _module_at(module, path)
            if owner is not None and owner is not module and COMPILED_CALL not in owner.__dict__:
                self.compile_apart(owner)
                found = True
        return found

    def _hooks_around(self, name: str) -> str:
        """The hooks of diffusers and accelerate around an attention, for messages."""
        path, kinds = name.partition("#")[0].split("."), []
        for length in range(len(path) + 1):
            one = _module_at(self.module(), ".".join(path[:length]))
            kinds += [type(hook).__name__ for hook in _hooks_of(one)]
        return f" (hooks around it: {', '.join(dict.fromkeys(kinds))})" if kinds else ""


class Placed(Protocol):
    """The place of an attention in a model, as far as a graph shows it; see `runtime/program.py`."""

    @property
    def name(self) -> str:
        """Its name in its graph."""

    @property
    def like(self) -> tuple[Any, ...]:
        """Heads, tokens and sizes."""

    @property
    def parameter(self) -> int | None:
        """Place of the input that is the nearest Parameter."""

    def name_in(self, path: str | None) -> str:
        """The name of the attention in the whole model."""


class ModelCall:
    """One call of an applied model."""

    def __init__(self, model: AppliedModel, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.model, self.module, self.args, self.kwargs = model, module, args, kwargs
        self.graphs: list[GraphPlan] = []
        self.analysed_again = False
        """Whether the model was analysed for the values of this call."""
        self.as_one_graph = False
        """Whether the model is compiled as one graph now, and by its parts if that fails."""
        self._attentions = 0
        self._by_order = False
        self._counts: Counter[str] = Counter()
        self._tick: Tick | None = None
        self._record: Record | None = None
        self._example: Example | None = None
        self._full_names: dict[str, str] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self.trains = torch.is_grad_enabled() and any(one.requires_grad for one in module.parameters())
        """Whether gradients are needed. If so, nothing is kept from call to call."""
        self.log: Log | None = new_log(self) if self.trains else None

    @cached_property
    def named(self) -> dict[str, Any]:
        """Name -> argument, by the signature of the model."""
        try:
            bound = inspect.signature(self.module.forward).bind(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):
            bound = {f"{place}": value for place, value in enumerate(self.args)} | self.kwargs
        rest = bound.pop("kwargs", {})
        return {**bound, **rest} if isinstance(rest, dict) else bound

    @cached_property
    def time_name(self) -> str | None:
        """The name of the argument that is the time step."""
        return time_argument(self.named)

    @cached_property
    def shapes(self) -> Hashable:
        """All that an analysis depends on: the arguments without the time step, and of the values of tensors only
        the grids of positions."""
        rest = {name: value for name, value in self.named.items() if name != self.time_name}
        leaves = tree_leaves(rest)
        return tuple(
            (tuple(leaf.shape), leaf.dtype, meshes_of(leaf)) if isinstance(leaf, Tensor) else _plain(leaf)
            for leaf in leaves
        )

    @cached_property
    def _given(self) -> set[int]:
        return {id(leaf) for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)}

    def begin(self) -> None:
        """Prepare what the call needs before the model runs."""
        model = self.model
        model.prepare()
        first = model.analysis is None and not model.graphs
        hidden = first and any(
            _torch.never_compiles(getattr(hook, "new_forward", None))
            for one in self.module.modules()
            for hook in _hooks_of(one)
        )
        if model.parts_only or model.checks_grid or hidden:
            model.analysed(self)
        if hidden:
            model.compile_rest()

    def was_given(self, tensor: object) -> bool:
        """Whether a tensor is an argument of the call."""
        return id(tensor) in self._given

    @cached_property
    def numbers(self) -> tuple[Times | None, Prints]:
        """The time steps and `Prints` of the call, for the clock; none where it only counts calls."""
        if self.time_name is None or not self.model.state.clock.reads():
            return None, {}
        if any(isinstance(one, Tensor) and one.is_meta for one in tree_leaves(self.named)):
            return None, {}
        return read_arguments(self.named, self.time_name)

    def tick(self) -> Tick:
        """The place of this call in a generation. The clock counts it once."""
        if self._tick is None:
            self._tick = self.model.state.tick(*self.numbers)
        return self._tick

    def names(self, places: Sequence[Placed], args: Sequence[Any]) -> tuple[str, ...]:
        """The names in the whole model of the attentions of a graph, which is about to run on `args`."""
        found = []
        for place in places:
            path = None if place.parameter is None else self.model.path_of(args[place.parameter])
            name = place.name_in(path)
            self._counts[name] += 1
            found.append(name if self._counts[name] == 1 else f"{name}#{self._counts[name]}")
        self._full_names = {place.name: name for place, name in zip(places, found, strict=True)}
        return tuple(found)

    def parts(self, places: Sequence[Placed], names: Sequence[str]) -> tuple[tuple[str, ...], Parts | None]:
        """(names, parts) of the attentions of a graph; no parts if the model could not be analysed.

        An attention is known by its name, or else by its order in the call.
        """
        for analysis in self.model.analyses(self):
            if analysis.failure:
                self.model.analysis = analysis
                return tuple(names), None
            found = self._found_in(analysis, places, names)
            if all(isinstance(one, Part) for one in found):
                self.model.use(self, analysis)
                break
        sites = tuple(
            one if isinstance(one, Part) else _unlike(place, name, one)
            for one, place, name in zip(found, places, names, strict=True)
        )
        unnamed = tuple(part if _learns(part) else replace(part, name="") for part in sites)
        return tuple(part.name for part in sites), Parts(unnamed, analysis.dense_steps)

    def _found_in(
        self, analysis: Analysis, places: Sequence[Placed], names: Sequence[str]
    ) -> list[Part | str]:
        """The parts that the attentions of a graph are, each with the reason in its place if it is none."""
        by_name = {part.name: part for part in analysis.parts}
        found: list[Part | str] = []
        for order, (place, name) in enumerate(zip(places, names, strict=True), self._attentions):
            part, why = by_name.get(name), _UNLIKE
            if place.parameter is None or part is None:
                self._by_order = True
                part = analysis.parts[order] if order < len(analysis.parts) else None
                if not self.model.by_order:
                    part, why = None, _UNKNOWN_LAYER
            found.append(why if part is None or part.like != place.like else part)
        return found

    def count(self, plan: GraphPlan) -> None:
        """Note that a graph runs under a plan."""
        self.graphs.append(plan)
        self._attentions += len(plan)

    def record(
        self, options: Mapping[str, Any], plan: GraphPlan, phase: str, reports: Mapping[str, Tensor]
    ) -> None:
        """Keep the reports on a graph that ran. All graphs of a call have one record."""
        if self._record is None:
            self._record = self.model.state.record(options, plan, self.tick(), phase, reports)
        else:
            self._record.add(plan, phase, reports)

    @cached_property
    def _looks(self) -> bool:
        return not self.model.replays and self.model.state.last_example is None

    def looks(self, layout: TokenLayout) -> bool:
        """Whether `look` keeps an example: no call of this video has one yet."""
        return self._example is None and self._looks and layout.grid is not None

    def look(self, site: str, layout: TokenLayout, table: BlockTable, before: int) -> None:
        """Keep the keys that the token in the middle of the video reads, as an example of a dynamic site.

        Args:
            site: the name of the attention in its graph.
            table: the blocks that were read.
            before: the number of tokens before the first query of the table.
        """
        if not self.looks(layout):
            return
        assert layout.grid is not None
        frames, height, width = layout.grid
        middle = (frames // 2 * height + height // 2) * width + width // 2
        queries, keys = table.row_of(layout.before + middle - before)
        whole = torch.zeros_like(keys)
        whole[before : before + len(queries)] = queries
        self._example = Example(
            site=self._full_names.get(site, site), layout=layout, queries=whole, keys=keys
        )

    def finish(self) -> None:
        """Keep what the call has shown about the model, and say once how much of it is sparse."""
        model = self.model
        if self._record is not None:
            self._record.wall = time.perf_counter() - self._wall
            self._record.cpu = time.process_time() - self._cpu
            self._record.example = self._example
        model.graphs = tuple(self.graphs)
        found = any(plan.method != "dense" or plan.guarded for graph in self.graphs for plan in graph)
        if not model.told and not found:
            model.analysed(self)
        changes = model.compile_rest()
        if self._by_order and model.analysis and self._attentions != len(model.analysis.parts):
            model.by_order = False
            model.state.new_video()
        if not model.told and not changes and (self._record is None or self._record.phase == "sparse"):
            model.told = True
            _tell(model, type(self.module).__name__)


_open: ContextVar[ModelCall | None] = ContextVar("model_call", default=None)


def open_call() -> ModelCall | None:
    """The call of an applied model that runs now, in this thread or task."""
    return _open.get()


class Hook:
    """The call of an applied module: opens a `ModelCall`, runs the module, and closes it again.

    PyTorch calls it in place of the module's own call. Dynamo never compiles it. Where Dynamo compiles a caller
    of the module, it traces the module itself, and no call is open.
    """

    def __init__(self, model: AppliedModel, run: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]):
        self.model, self.run = model, run
        self._outside = _torch.outside_dynamo(self._call)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self._outside(args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.model.module()
        assert module is not None, "the module calls its own hook"
        before = _open.get()
        if torch.compiler.is_exporting():
            return module._call_impl(*args, **kwargs)
        if before is not None and before.model is self.model:
            return self.run(module, args, kwargs)
        call = ModelCall(self.model, module, args, kwargs)
        token = _open.set(call)
        try:
            with compile_lock().call(), nullcontext() if call.trains else self.model.video(call):
                if not call.trains:
                    call.tick()
                call.begin()
                with _torch.many_programs(), _torch.run_time_sizes(self.model.captures_sizes):
                    result = self.run(module, args, kwargs)
                call.finish()
        finally:
            _open.reset(token)
        return result


def time_argument(named: Mapping[str, Any]) -> str | None:
    """The name of the argument of a call that is the time step."""
    numbers = {name: value for name, value in named.items() if _is_number(value)}
    times = [name for name in numbers if TIME_STEP.fullmatch(name.lower())]
    if times:
        return times[0]
    short = [name for name, value in numbers.items() if isinstance(value, Tensor) and value.dim() <= 1]
    return short[0] if len(short) == 1 else None


def read_arguments(named: Mapping[str, Any], time_name: str) -> tuple[Times, Prints]:
    """`read` of the arguments of a call."""
    others = {
        f"{name}.{place}": leaf
        for name, value in named.items()
        if name != time_name
        for place, leaf in enumerate(tree_leaves(value))
        if isinstance(leaf, Tensor)
    }
    return read(named[time_name], others)


def read(time: Tensor | float, others: Mapping[str, Tensor]) -> tuple[Times, Prints]:
    """(the time steps; two numbers for every other input).

    All numbers on one device are read together: one synchronisation.

    Args:
        time: a tensor of one time step or of many, or a number of Python.
    """
    numbers = [*times_of(time), *(n for tensor in others.values() for n in _print(tensor))]
    by_device: dict[torch.device, list[int]] = {}
    for place, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(place)
    values = [0.0] * len(numbers)
    for places in by_device.values():
        found = torch.stack([numbers[place] for place in places]).nan_to_num().tolist()
        for place, value in zip(places, found, strict=True):
            values[place] = value
    prints = zip(values[3::2], values[4::2], strict=True)
    return Times(*values[:3]), dict(zip(others, prints, strict=True))


def times_of(time: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of `Times` for time steps of any shape, as fp64 scalars on their device."""
    numbers = (
        time if isinstance(time, Tensor) else torch.tensor(float(time), dtype=torch.float64, device="cpu")
    )
    flat = numbers.detach().double().flatten()
    largest = flat.amax()
    squares = flat.square()
    # Equal time steps give the same numbers, however many there are.
    return largest + (flat - largest).mean(), largest, squares.amax() + (squares - squares.amax()).mean()


def _print(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares: equal for equal tensors, and almost never for others."""
    flat = tensor.detach().flatten()
    flat = flat.float() if not flat.is_complex() else torch.view_as_real(flat).flatten().float()
    return flat.sum(dtype=torch.float64), flat.square().sum(dtype=torch.float64)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex() and value.dtype != torch.bool and value.numel() > 0
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    plain = isinstance(value, (str, int, float, bool, type(None)))
    return repr(value) if plain else type(value).__qualname__


def _unlike(place: Placed, name: str, why: str) -> Part:
    """An attention that the analysis does not have."""
    layout = TokenLayout(tokens=place.like[2], reason=why)
    return Part(name=name, like=place.like, kind="unknown", layout=layout, entry=None, reason=why)


def _learns(part: Part) -> bool:
    return part.entry is not None and isinstance(part.entry.method, TrainedMethod)


def _hooks_of(module: Any) -> list[Any]:
    """The hooks that diffusers and accelerate put around a module."""
    hooks = [*getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()]
    return hooks + ([module._hf_hook] if hasattr(module, "_hf_hook") else [])


def _module_at(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)
    return module


def _tensor_at(module: nn.Module, path: str) -> Tensor | None:
    owner, _, name = path.rpartition(".")
    found = _module_at(module, owner)
    if found is None:
        return None
    tensor = found._parameters.get(name)
    return found._buffers.get(name) if tensor is None else tensor


def _over_videos(plans: Sequence[AttentionPlan]) -> list[AttentionPlan]:
    """The plans of attention over a whole video, or over as many tokens that could not be followed.

    An attention whose sizes are not known may be over a video too. Where no grid is known, an attention over most
    tokens may be.
    """
    grids = [plan.layout.tokens for plan in plans if plan.layout.grid is not None]
    alike = [
        plan for plan in plans if plan.site.kind != "cross" and plan.site.q_tokens == plan.site.kv_tokens
    ]
    least = min(grids) if grids else max((plan.site.q_tokens for plan in alike), default=0)
    large = {id(plan) for plan in alike if plan.site.q_tokens == 0 or plan.site.q_tokens >= least}
    return [plan for plan in plans if plan.layout.grid is not None or id(plan) in large]


def _tell(model: AppliedModel, kind: str) -> None:
    """One line in the log: the number of video attentions that are sparse, and why others are dense."""
    plans = _over_videos([*model.plans, *model.outside])
    reasons = Counter(plan.reason for plan in plans if plan.method == "dense")
    dense = reasons.total()
    causes = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    log.log(
        logging.WARNING if dense or not plans else logging.INFO,
        "%s: %d of %d video attentions sparse%s",
        f"{model.name} ({kind})" if model.name else kind,
        len(plans) - dense,
        len(plans),
        f", {dense} dense: {causes}" if dense else "",
    )
