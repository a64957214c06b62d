"""The compiled form of one graph."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError, warn_once
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.clock import Prints
from sparsify_compiler.runtime.site import SiteFunction
from sparsify_compiler.runtime.site_inputs import GraphInputs
from sparsify_compiler.runtime.state import ModelState, state_of

Phase = Literal["dense", "sparse"]
Choices = tuple[tuple[str, Hashable], ...]
"""(site, what its method's `settle` takes), for sites whose method learns."""
Run = Callable[..., Any]
Numbers = tuple[int, ...]
"""The sizes that are free in Dynamo's graph, in one call; none for a graph that was compiled for all of them."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the graphs that a plan is lowered to."""

    phase: Phase = "sparse"
    """`dense`: every call is the model's own, and is observed."""
    trains: bool = False
    """Whether it runs in training: sites keep no state, and methods that learn do so."""
    choices: Choices = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Which inputs of a graph tell what call this is, by their places."""

    owner: int | None
    """A Parameter of the model, to which its state belongs."""
    time: int | None
    """The time step."""
    others: dict[str, int]
    """All other tensors that are not the model's own, by name: latents, conditioning."""


class Sizes(NamedTuple):
    """What is fixed of an input: the sizes of a tensor, None for those that are free, or a number."""

    name: str
    fixed: tuple[int | None, ...] | int

    def fit(self, value: Any) -> bool:
        """Whether an input is so."""
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
    """What Dynamo calls instead of the model's code: the compiled variants of a graph, and the plan they follow."""

    options: Mapping[str, Any]
    """Those that torch.compile was given."""
    plan: GraphPlan
    inputs: Inputs
    sizes: Mapping[int, Sizes]
    """Place -> what is fixed of an input; empty where nothing is sparse, so that nothing rests on it."""
    extra: GraphInputs
    """What its graphs get after these inputs."""
    functions: Collection[SiteFunction]
    """What its graphs call by name, which lives as long as the program."""
    compile: Callable[[Variant, Sequence[Any]], Run]
    """Compiles a variant for inputs like these."""
    trains: bool
    """Whether gradients are needed: then nothing is kept from call to call."""
    learning_sites: tuple[AttentionPlan, ...] = ()
    """The plans of sites that are still to learn what they read."""
    _compiled: dict[tuple[Variant, Numbers], Run] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Run on the inputs of Dynamo's graph. A variant is compiled when it is first needed.

        Raises:
            OperandError: sizes that the program is not for, which Dynamo's guards let through.
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
        reads = self._clocked and self.inputs.time is not None and state.clock.reads()
        tick = state.clock.tick(*(read_inputs(self.inputs, args) if reads else (None, {})))
        if tick.new_video:
            state.new_video()
        if self.plan.runs_dense(tick.step, tick.steps):
            variant = replace(variant, phase="dense")
        stream = state.stream(self.extra.state, tick.stream)
        extra = self.extra.bind(trained, stream.tensors, initialised=stream.calls > 0)
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
                    f"the plan of attention {sites} rests on an input {sizes}, got {got}: other sizes need a "
                    "program of their own, which torch.compile makes unless its guards are skipped"
                )

    def prepare(self, inputs: Sequence[Any]) -> None:
        """Compile every variant that may be needed."""
        phases: tuple[Phase, ...] = (
            ("sparse", "dense") if self._remembers and self.plan.dense_steps else ("sparse",)
        )
        if self.learning_sites:  # what is sparse depends on what training chooses
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
        """Whether anything depends on what call this is."""
        return bool(self.extra.state) or self.plan.dense_steps > 0

    def _chosen(self, state: ModelState) -> Variant:
        """The variant that the training so far allows."""
        dense = Variant("dense", self.trains)
        if not self.learning_sites:
            return Variant(trains=self.trains)
        if state.learning is None:
            warn_once(
                "method='dsv' runs dense until it has learnt what to read: train with "
                "sparsify_compiler.DSVTrainer, or give options={'predictor': a file that it wrote}"
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
            # Free sizes are symbols only while Dynamo compiles: later, a graph is for the sizes of the call.
            numbers = tuple(value for value in inputs if isinstance(value, int))
            run = self._compiled.get((variant, numbers))
            if run is None:
                run = self._compiled[variant, numbers] = self.compile(variant, inputs)
        return run(*inputs)


def read_inputs(inputs: Inputs, args: Sequence[Any]) -> tuple[float, Prints]:
    """The time step, the largest where there are several, and two numbers for every other input.

    All are read from a device at once: one synchronisation.
    """
    assert inputs.time is not None
    numbers = [
        args[inputs.time].detach().double().amax(),
        *(n for i in inputs.others.values() for n in _print(args[i])),
    ]
    by_device: dict[torch.device, list[int]] = {}
    for place, number in enumerate(numbers):
        by_device.setdefault(number.device, []).append(place)
    values = [0.0] * len(numbers)
    for places in by_device.values():
        read = torch.stack([numbers[place] for place in places]).nan_to_num().tolist()
        for place, value in zip(places, read, strict=True):
            values[place] = value
    return values[0], dict(zip(inputs.others, zip(values[1::2], values[2::2], strict=True), strict=True))


def _print(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares: equal for equal tensors, hardly ever else."""
    flat = tensor.detach().flatten()
    flat = flat.float() if not flat.is_complex() else torch.view_as_real(flat).flatten().float()
    return flat.sum(dtype=torch.float64), flat.square().sum(dtype=torch.float64)
