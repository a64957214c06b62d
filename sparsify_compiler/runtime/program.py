"""The compiled form of one graph."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from sparsify_compiler import _torch
from sparsify_compiler._torch_lock import compile_lock
from sparsify_compiler.errors import OperandError, warn_once
from sparsify_compiler.names import ROOT
from sparsify_compiler.plan import AttentionPlan, GraphPlan, Parts
from sparsify_compiler.runtime.call import ModelCall, open_call, read
from sparsify_compiler.runtime.clock import Prints, Tick, Times
from sparsify_compiler.runtime.guard import Guard
from sparsify_compiler.runtime.moving import note_loads, place_heads
from sparsify_compiler.runtime.recomputing import Mark, Ran, find
from sparsify_compiler.runtime.site import SiteFunction
from sparsify_compiler.runtime.site_inputs import GraphInputs
from sparsify_compiler.runtime.state import ModelState, state_of

Phase = Literal["dense", "sparse"]
Choices = tuple[tuple[str, Hashable], ...]
"""(site, argument of its method's `settle`), for sites whose method learns."""
Run = Callable[..., Any]
_NO_STEP = (
    "calls of a graph show no time step, so no step of them is dense and nothing is kept from call to call. "
    "Compile the whole model, or put each video into `with sparsify_compiler.generation(steps, streams):`"
)
Numbers = tuple[int, ...]
"""Values, in one call, of the sizes that are free in Dynamo's graph; empty for a graph that fits all values."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the graphs that a plan is lowered to."""

    phase: Phase = "sparse"
    """In `dense`, every call is the model's own, and its site observes it."""
    trains: bool = False
    """Whether it runs in training: there sites keep no state, and methods that learn observe."""
    choices: Choices = ()
    guarded: tuple[str, ...] = ()
    """The names of the sites that the guard runs dense. They observe nothing."""
    warm: bool | None = None
    """Whether the state holds the results of earlier calls, in a graph for one of the two. None: the graph gets
    this as an input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The places of the inputs of a graph that distinguish calls."""

    owner: int | None
    """Place of a Parameter of the model. The model's state belongs to it."""
    time: int | None
    """Place of the time step: a tensor of one or many, or a number."""
    others: dict[str, int]
    """Name -> place of every other tensor that is not the model's own: latents, conditioning."""
    constant_time: float | None = None
    """The time step of every call of the graph, where it is a number that Dynamo's guards fix."""

    numbers: frozenset[int] = frozenset()
    """The places of tensors that Dynamo makes of numbers of Python."""

    @property
    def given(self) -> tuple[int, ...]:
        """The places of the time step and of all tensors of the caller, but not of the model."""
        places = (*([] if self.time is None else [self.time]), *self.others.values())
        return tuple(place for place in places if place not in self.numbers)

    @property
    def has_time(self) -> bool:
        """Whether the time step of a call is known."""
        return self.time is not None or self.constant_time is not None


class Sizes(NamedTuple):
    """The fixed part of an input: the sizes of a tensor, with None for free sizes, or a number."""

    name: str
    fixed: tuple[int | None, ...] | int

    def fit(self, value: Any) -> bool:
        """Whether an input has these sizes."""
        if isinstance(self.fixed, int):
            return bool(value == self.fixed)
        shape = value.shape
        return shape == self.fixed or (
            len(shape) == len(self.fixed)
            and all(size in (None, got) for size, got in zip(self.fixed, shape, strict=True))
        )

    def __str__(self) -> str:
        if isinstance(self.fixed, int):
            return f"{self.name} = {self.fixed}"
        return (
            f"{self.name} of shape [{', '.join('any' if size is None else str(size) for size in self.fixed)}]"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """The place of an attention in a model, as far as its graph shows it."""

    name: str
    """Its name in the graph: the path of its module, relative to the module that Dynamo compiled."""
    like: tuple[Any, ...]
    """Heads, tokens and sizes, which an attention of the model must have to be this one."""
    parameter: int | None = None
    """Place of the input that is the nearest Parameter of the model; None if the graph has none."""
    path: str = ""
    """Path of this Parameter, as the graph reads it; it and the path in the model end alike."""
    may_be_video: bool = True
    """Whether its keys may be the tokens of its queries."""

    def name_in(self, path: str | None) -> str:
        """The name of the attention in the whole model. `path`: the full path of the Parameter, if known."""
        if path is None:
            return self.name
        full, own = path.split("."), self.path.split(".")
        alike = 0
        while alike < min(len(full), len(own)) and full[-1 - alike] == own[-1 - alike]:
            alike += 1
        root, read_through = full[: len(full) - alike], own[: len(own) - alike]
        names = [] if self.name == ROOT else self.name.split(".")
        if (
            names[: len(read_through)] == read_through
        ):  # such as the attributes of a hook that calls the module
            names = names[len(read_through) :]
        return ".".join([*root, *names]) or ROOT


@dataclass(slots=True, eq=False)
class PlannedGraph:
    """A graph under one plan, and its compiled variants."""

    plan: GraphPlan
    sizes: Mapping[int, Sizes]
    """Place -> fixed part of an input; empty where nothing is sparse, since a dense plan depends on no size."""
    extra: GraphInputs
    """The extra inputs that its graphs get after the model's."""
    functions: Collection[SiteFunction]
    """The functions that its graphs call by name. They live as long as the plan."""
    compile: Callable[[Variant, Sequence[Any]], Run]
    """Compiles a variant for given inputs."""
    guard: Guard
    """Decides which sites run dense."""
    trains: bool
    """Whether gradients are needed. If so, nothing is kept from call to call."""
    replays: bool = False
    """Whether CUDA graphs replay its programs. Then a first call of a video and later calls have programs of their
    own, as a replay repeats every decision that Python made."""
    learning_sites: tuple[AttentionPlan, ...] = ()
    """The plans of sites that have no predictor yet and learn one in training."""
    compiled: dict[tuple[Variant, Numbers], Run] = field(default_factory=dict)

    @property
    def remembers(self) -> bool:
        """Whether anything is kept from call to call."""
        return bool(self.plan.sparse) and not self.trains

    @property
    def clocked(self) -> bool:
        """Whether anything depends on the step or the stream of a call."""
        return bool(self.extra.state) or self.plan.dense_steps > 0

    def check_sizes(self, args: Sequence[Any]) -> None:
        """Raise OperandError if the inputs have sizes that the plan does not fit."""
        for place, sizes in self.sizes.items():
            if not sizes.fit(args[place]):
                sites = ", ".join(plan.site.name for plan in self.plan.sparse)
                got = getattr(args[place], "shape", args[place])
                raise OperandError(
                    f"the plan of attention {sites} needs an input {sizes}, got {got}: other sizes need their "
                    "own program, which torch.compile makes unless its guards are skipped"
                )

    def prepare(self, inputs: Sequence[Any]) -> None:
        """Compile every variant that may be needed."""
        has_dense = self.remembers and bool(self.plan.dense_steps)
        phases: tuple[Phase, ...] = ("sparse", "dense") if has_dense else ("sparse",)
        if self.learning_sites:  # the sparse variant depends on the choices of training
            phases = ("dense",)
        later = [self.of_call(Variant(phase, self.trains), warm=True) for phase in phases]
        first = self.of_call(Variant(phases[-1], self.trains), warm=False)
        for variant in dict.fromkeys([*later, first]):
            self.compiled[variant, ()] = self.compile(variant, inputs)

    def of_call(self, variant: Variant, *, warm: bool) -> Variant:
        """The variant for the guard's decisions, and for a first or a later call of a video."""
        variant = self.guarded(variant)
        if not self.replays or not self.extra.keeps:
            return variant
        return replace(variant, warm=warm or self.guard.all_dense)

    def chosen(self, state: ModelState) -> Variant:
        """The variant that the training so far allows."""
        dense = Variant("dense", self.trains)
        if not self.learning_sites:
            return Variant(trains=self.trains)
        if state.learning is None:
            warn_once(
                "method='dsv' runs dense until its predictor is trained: train it with "
                "sparsify_compiler.DSVTrainer, or pass options={'predictor': a file that the trainer wrote}"
            )
            return dense
        if not state.learning.sparse:
            return dense
        choices = state.learning.choices
        names = (plan.site.name for plan in self.learning_sites)
        return replace(
            dense, phase="sparse", choices=tuple((name, choices[name]) for name in names if name in choices)
        )

    def guarded(self, variant: Variant) -> Variant:
        """A variant with the sites that the guard runs dense."""
        dense = self.guard.dense
        if not dense or variant.guarded:
            return variant
        if self.guard.all_dense:  # then the phases differ in nothing
            variant = replace(variant, phase="sparse")
        return replace(variant, guarded=dense)

    def ready(self, variant: Variant, inputs: Sequence[Any]) -> bool:
        """Whether a variant is compiled for these inputs."""
        numbers = tuple(value for value in inputs if isinstance(value, int))
        return (variant, ()) in self.compiled or (variant, numbers) in self.compiled

    def run(self, variant: Variant, inputs: Sequence[Any]) -> Any:
        """Run a variant on all its inputs. It is compiled when it is first needed."""
        run = self.compiled.get((variant, ()))
        if run is None:
            # Free sizes are symbols only while Dynamo compiles. A later graph is for the sizes of its call.
            numbers = tuple(value for value in inputs if isinstance(value, int))
            run = self.compiled.get((variant, numbers))
            if run is None:
                with compile_lock():
                    run = self.compiled.get((variant, numbers)) or self.compile(variant, inputs)
                    self.compiled[variant, numbers] = run
        return run(*inputs)


class Handover(Protocol):
    """Labels that a graph receives from other graphs, and those that it leaves; see `passes/handover.py`."""

    receives: bool

    def receive(self, args: Sequence[Any]) -> Any:
        """The graph with its plan under the labels of these inputs."""

    def leave(self, graph: Any, args: Sequence[Any], outputs: Any) -> None:
        """Give the outputs of a call the labels that they have in this graph."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Program:
    """A graph and its plans. Dynamo calls it instead of the model's code.

    Alone, a graph has one plan: that of the graph's own analysis. In the call of an applied model, a graph that is
    a part of the model has a plan for each place in the model: one program may serve all blocks.
    """

    options: Mapping[str, Any]
    """The options that torch.compile got."""
    inputs: Inputs
    own: PlannedGraph
    """The graph under the plan of its own analysis."""
    ends_early: bool
    """Whether a graph break ended the graph."""
    places: tuple[Place, ...]
    """The place of each attention, in order."""
    plan_as: Callable[[Parts | None, bool], PlannedGraph]
    """Plans the graph as parts of a model, or as its own analysis says, and says whether it trains."""
    handover: Handover | None = None
    """Labels from and to other graphs, outside of any applied model."""
    planned_as: Callable[[Any, bool], PlannedGraph] | None = None
    """Compiles a graph that `handover` returned; the flag says whether it trains."""
    tell: Callable[[GraphPlan], None] | None = None
    """Warns about dense attention, at the first call of a graph that may receive labels."""
    _planned: dict[Hashable, PlannedGraph] = field(default_factory=dict)
    _renamed: dict[tuple[PlannedGraph, tuple[str, ...], tuple[str, ...]], GraphPlan] = field(
        default_factory=dict
    )

    @property
    def plan(self) -> GraphPlan:
        """The plan of the graph's own analysis."""
        return self.own.plan

    def __call__(self, *args: Any) -> Any:
        """Run on the inputs of Dynamo's graph.

        Raises:
            OperandError: the inputs have sizes that the plan does not fit, although Dynamo's guards passed.
        """
        call = open_call()
        if call is None and self.own.trains and (ran := find(self._mark(args))) is not None:
            return self._run(self._planned_as(ran.parts, True), args, None, ran.names, ran.state)
        if call is None:
            return self._alone(args)
        parts, names = None, call.names(self.places, args)
        if any(one.may_be_video for one in self.places) and not self._is_whole(call, args):
            names, parts = call.parts(self.places, names)
        if call.log is not None:
            made = [one for one in self._activations(args) if not call.was_given(one)]
            call.log.add(Ran(self._mark(args), call.model.state, names, parts), made)
        planned = self._planned_as(parts, call.trains or self.own.trains)
        return self._run(planned, args, call, names, call.model.state)

    def _alone(self, args: Sequence[Any]) -> Any:
        """Run outside of any applied model, under the labels that other graphs handed over."""
        if self.handover is None:
            return self._run(self.own, args, None, (), None)
        graph = self.handover.receive(args)
        planned = self._under(graph)
        if self.tell is not None:
            self.tell(planned.plan)
            self.tell = None
        result = self._run(planned, args, None, (), None)
        self.handover.leave(graph, args, result)
        return result

    def _planned_as(self, parts: Parts | None, trains: bool) -> PlannedGraph:
        if parts is None and trains == self.own.trains:
            return self.own
        if (parts, trains) not in self._planned:
            self._planned[parts, trains] = self.plan_as(parts, trains)
        return self._planned[parts, trains]

    def _activations(self, args: Sequence[Any]) -> list[Tensor]:
        return [args[place] for place in self.inputs.given if isinstance(args[place], Tensor)]

    def _mark(self, args: Sequence[Any]) -> Mark:
        """The signs by which a later run of this graph is known to repeat this one."""
        memory = map(_torch.storage_of, self._activations(args))
        near = (self.inputs.owner, *(one.parameter for one in self.places))
        return Mark(
            memory=frozenset(one for one in memory if one is not None),
            parameters=tuple(None if place is None else id(args[place]) for place in near),
            likes=tuple(one.like for one in self.places),
        )

    def _under(self, graph: Any) -> PlannedGraph:
        """The plan of a graph that `handover` returned."""
        plan: GraphPlan = graph.meta["plan"]
        if plan == self.own.plan or self.planned_as is None:
            return self.own
        if plan not in self._planned:
            self._planned[plan] = self.planned_as(graph, self.own.trains)
        planned = self._planned[plan]
        # Without a Parameter, the layers that share the program would share a clock and a state.
        return self.own if planned.clocked and self.inputs.owner is None else planned

    def _is_whole(self, call: ModelCall, args: Sequence[Any]) -> bool:
        """Whether the graph is the whole model: it gets no tensor from other parts, and no graph comes after it."""
        return not self.ends_early and all(
            call.was_given(args[place]) for place in self.inputs.given if isinstance(args[place], Tensor)
        )

    def _run(
        self,
        planned: PlannedGraph,
        args: Sequence[Any],
        call: ModelCall | None,
        names: tuple[str, ...],
        state: ModelState | None,
    ) -> Any:
        """Run on the inputs of Dynamo's graph.

        Args:
            call: the open call.
            names: the names of the attentions in the whole model, if it was applied.
            state: the state of the applied model; without a call, the graph runs again in backward.
        """
        planned.check_sizes(args)
        planned.guard.update()
        shown = self._as_named(planned, names)
        if call is not None:
            call.count(shown)
        if not planned.remembers and not planned.extra.trained:
            return planned.run(planned.guarded(Variant(trains=planned.trains)), args)
        owner: object = call and call.model
        if owner is None:
            owner = self if self.inputs.owner is None else args[self.inputs.owner]
        repeats = call is None and state is not None
        state = state_of(owner) if state is None else state
        if planned.learning_sites and not repeats:
            state.enter(planned.learning_sites, 0 if owner is self else id(owner))
        variant = planned.guarded(planned.chosen(state))
        trained = state.trained_tensors(planned.extra.trained)
        if repeats:  # observed once, in forward
            trained = [one.clone() for one in trained]
        if not planned.remembers:
            return planned.run(variant, [*args, *planned.extra.bind(trained, (), initialised=False)])
        tick = self._tick(planned, state, args) if call is None else call.tick()
        phase: Phase = "dense" if planned.plan.runs_dense(tick.step, tick.steps) else variant.phase
        if not planned.guard.all_dense:
            variant = replace(variant, phase=phase)
        stream = state.stream(planned.extra.state, tick.stream, names, stays=planned.replays)
        initialised = stream.calls > 0 and tick.remembers
        variant = planned.of_call(variant, warm=initialised)
        moving, sparse = planned.extra.moving, phase == "sparse" and not planned.guard.all_dense
        owners = place_heads(moving, stream, sparse=sparse, initialised=initialised) if moving else ()
        extra = planned.extra.bind(trained, stream.tensors, initialised=initialised, owners=owners)
        inputs = [*args, *extra]
        if sparse:
            warm = planned.ready(variant, inputs) and (initialised or not tick.remembers)
            with planned.guard.watching(warm=warm):
                result = planned.run(variant, inputs)
        else:
            result = planned.run(variant, inputs)
        stream.calls += 1
        if moving and sparse:
            note_loads(moving, stream)
        reports = planned.extra.reports_in(stream.tensors) if sparse else {}
        reports = {site: report for site, report in reports.items() if site not in variant.guarded}
        if call is None:
            state.record(self.options, shown, tick, phase, reports)
        else:
            own = (one.site.name for one in planned.plan)
            named = {name: reports[site] for name, site in zip(names, own, strict=True) if site in reports}
            call.record(self.options, shown, phase, named)
        return result

    def _tick(self, planned: PlannedGraph, state: ModelState, args: Sequence[Any]) -> Tick:
        """Count a call outside of any applied model, from the inputs of the graph."""
        if planned.clocked and self.inputs.has_time and state.clock.reads():
            tick = state.tick(*read_inputs(self.inputs, args))
        else:
            tick = state.tick(None, {})
        if tick.step is None and planned.clocked:
            warn_once(_NO_STEP)
        return tick

    def _as_named(self, planned: PlannedGraph, names: tuple[str, ...]) -> GraphPlan:
        """The plan that runs, with the names of the attentions in the whole model, if they are given."""
        key = planned, names, tuple(planned.guard.times)
        if key not in self._renamed:
            plan = planned.guard.shown()
            named = zip(plan, names or [one.site.name for one in plan], strict=True)
            self._renamed[key] = replace(
                plan,
                plans=tuple(replace(one, site=replace(one.site, name=name)) for one, name in named),
            )
        return self._renamed[key]


def read_inputs(inputs: Inputs, args: Sequence[Any]) -> tuple[Times, Prints]:
    """`read` of the inputs of a graph with a time step."""
    time = inputs.constant_time if inputs.time is None else args[inputs.time]
    assert time is not None
    return read(time, {name: args[place] for name, place in inputs.others.items()})
