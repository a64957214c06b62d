"""The compiled form of one graph."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError, warn_once
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.clock import Prints, Times
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

    @property
    def has_time(self) -> bool:
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


@dataclass(slots=True, eq=False, weakref_slot=True)
class Program:
    """The compiled variants of a graph and their plan. Dynamo calls it instead of the model's code."""

    options: Mapping[str, Any]
    """The options that torch.compile got."""
    plan: GraphPlan
    inputs: Inputs
    sizes: Mapping[int, Sizes]
    """Place -> fixed part of an input; empty where nothing is sparse, since a dense plan depends on no size."""
    extra: GraphInputs
    """The extra inputs that its graphs get after the model's."""
    functions: Collection[SiteFunction]
    """The functions that its graphs call by name. They live as long as the program."""
    compile: Callable[[Variant, Sequence[Any]], Run]
    """Compiles a variant for given inputs."""
    trains: bool
    """Whether gradients are needed. If so, nothing is kept from call to call."""
    learning_sites: tuple[AttentionPlan, ...] = ()
    """The plans of sites that have no predictor yet and learn one in training."""
    _compiled: dict[tuple[Variant, Numbers], Run] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Run on the inputs of Dynamo's graph. A variant is compiled when it is first needed.

        Raises:
            OperandError: the inputs have sizes that the plan does not fit, although Dynamo's guards passed.
        """
        self._check_sizes(args)
        if not self._remembers and not self.extra.trained:
            return self._run(Variant(trains=self.trains), args)
        state = state_of(self if self.inputs.owner is None else args[self.inputs.owner])
        if self.learning_sites:
            state.enter(self.learning_sites, 0 if self.inputs.owner is None else id(args[self.inputs.owner]))
        variant = self._chosen(state)
        trained = state.trained_tensors(self.extra.trained)
        if not self._remembers:
            return self._run(variant, [*args, *self.extra.bind(trained, (), initialised=False)])
        reads = self._clocked and self.inputs.has_time and state.clock.reads()
        tick = state.clock.tick(*(read_inputs(self.inputs, args) if reads else (None, {})))
        if tick.step is None and self._clocked:
            warn_once(_NO_STEP)
        if tick.new_video:
            state.new_video()
        if self.plan.runs_dense(tick.step, tick.steps):
            variant = replace(variant, phase="dense")
        stream = state.stream(self.extra.state, tick.stream)
        extra = self.extra.bind(trained, stream.tensors, initialised=stream.calls > 0 and tick.remembers)
        result = self._run(variant, [*args, *extra])
        stream.calls += 1
        reports = self.extra.reports_in(stream.tensors) if variant.phase == "sparse" else {}
        state.record(self.options, self.plan, tick, variant.phase, reports)
        return result

    def _check_sizes(self, args: Sequence[Any]) -> None:
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
        phases: tuple[Phase, ...] = (
            ("sparse", "dense") if self._remembers and self.plan.dense_steps else ("sparse",)
        )
        if self.learning_sites:  # the sparse variant depends on the choices of training
            phases = ("dense",)
        for phase in phases:
            variant = Variant(phase, self.trains)
            self._compiled[variant, ()] = self.compile(variant, inputs)

    @property
    def _remembers(self) -> bool:
        """Whether anything is kept from call to call."""
        return bool(self.plan.sparse) and not self.trains

    @property
    def _clocked(self) -> bool:
        """Whether anything depends on the step or the stream of a call."""
        return bool(self.extra.state) or self.plan.dense_steps > 0

    def _chosen(self, state: ModelState) -> Variant:
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

    def _run(self, variant: Variant, inputs: Sequence[Any]) -> Any:
        run = self._compiled.get((variant, ()))
        if run is None:
            # Free sizes are symbols only while Dynamo compiles. A later graph is for the sizes of its call.
            numbers = tuple(value for value in inputs if isinstance(value, int))
            run = self._compiled.get((variant, numbers))
            if run is None:
                run = self._compiled[variant, numbers] = self.compile(variant, inputs)
        return run(*inputs)


def read_inputs(inputs: Inputs, args: Sequence[Any]) -> tuple[Times, Prints]:
    """(the time steps; two numbers for every other input).

    All numbers on one device are read together: one synchronisation.
    """
    time = inputs.constant_time if inputs.time is None else args[inputs.time]
    assert time is not None
    numbers = [*times_of(time), *(n for i in inputs.others.values() for n in _print(args[i]))]
    by_device: dict[torch.device, list[int]] = {}
    for place, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(place)
    values = [0.0] * len(numbers)
    for places in by_device.values():
        read = torch.stack([numbers[place] for place in places]).nan_to_num().tolist()
        for place, value in zip(places, read, strict=True):
            values[place] = value
    prints = zip(values[3::2], values[4::2], strict=True)
    return Times(*values[:3]), dict(zip(inputs.others, prints, strict=True))


def times_of(time: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of `Times` for time steps of any shape, as fp64 scalars on their device."""
    flat = torch.as_tensor(time).detach().double().flatten()
    largest = flat.amax()
    return largest + (flat - largest).mean(), largest, flat.square().sum()


def _print(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares: equal for equal tensors, and almost never for others."""
    flat = tensor.detach().flatten()
    flat = flat.float() if not flat.is_complex() else torch.view_as_real(flat).flatten().float()
    return flat.sum(dtype=torch.float64), flat.square().sum(dtype=torch.float64)
