"""The compiled form of one graph."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError, warn_once
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.clock import Prints
from sparsify_compiler.runtime.site import Work
from sparsify_compiler.runtime.state import Learned, ModelState, Spec, blank, state_of

Phase = Literal["dense", "sparse"]
Choices = tuple[tuple[str, Hashable], ...]
"""(site, what its method's `settle` takes), for sites whose method learns."""
Run = Callable[..., Any]
Numbers = tuple[int, ...]
"""The sizes that are free in Dynamo's graph, in one call; none for a phase that was compiled for all of them."""

_COLD, _WARM = (torch.tensor(warm, dtype=torch.bool, device="cpu") for warm in (False, True))


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """The extra inputs of a graph, through which its sites remember."""

    specs: tuple[Spec, ...] = ()
    reports: dict[str, int] = field(default_factory=dict)
    """Site -> place of its report among the tensors."""
    warm: bool = False
    """Whether the first extra input after those learned is the flag that says if the tensors hold anything."""
    learned: tuple[Learned, ...] = ()
    """Tensors that a trainer writes: the first extra inputs."""

    def blank(self) -> list[Tensor]:
        """Extra inputs of a first call."""
        learned = [one.initial.to(one.device) for one in self.learned]
        warm = [_COLD] if self.warm else []
        return [*learned, *warm, *blank(self.specs)]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Program:
    """What Dynamo calls instead of the model's code: the compiled phases of a graph, and the plan they follow."""

    options: Mapping[str, Any]
    """Those that torch.compile was given."""
    plan: GraphPlan
    inputs: Inputs
    sizes: Mapping[int, Sizes]
    """Place -> what is fixed of an input; empty where nothing is sparse, so that nothing rests on it."""
    held: Held
    works: Collection[Work]
    """What its phases call by name, which lives as long as the program."""
    compile: Callable[[Phase, Choices, Sequence[Any]], Run]
    """Compiles a phase for inputs like these."""
    remembers: bool
    """Whether anything is kept from call to call; not where gradients are needed."""
    learning_sites: tuple[AttentionPlan, ...] = ()
    """The plans of sites that are still to learn what they read."""
    _phases: dict[tuple[Phase, Choices, Numbers], Run] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        """Run on the inputs of Dynamo's graph. A phase is compiled when it is first needed.

        Raises:
            OperandError: sizes that the program is not for, which Dynamo's guards let through.
        """
        self._check_sizes(args)
        if not self.remembers and not self.held.learned:
            return self._run("sparse", (), args)
        state = state_of(self if self.inputs.owner is None else args[self.inputs.owner])
        if self.learning_sites:
            state.enter(self.learning_sites, 0 if self.inputs.owner is None else id(args[self.inputs.owner]))
        phase, choices = self._learnt(state)
        learned = state.learned_tensors(self.held.learned)
        if not self.remembers:
            return self._run(phase, choices, [*args, *learned])
        reads = self._clocked and self.inputs.time is not None and state.clock.reads()
        tick = state.clock.tick(*(read_inputs(self.inputs, args) if reads else (None, {})))
        if tick.new_video:
            state.new_video()
        if self.plan.runs_dense(tick.step, tick.steps):
            phase = "dense"
        stream = state.stream(self.held.specs, tick.stream)
        warm = [_WARM if stream.calls else _COLD] if self.held.warm else []
        result = self._run(phase, choices, [*args, *learned, *warm, *stream.tensors])
        stream.calls += 1
        reports = {site: stream.tensors[place] for site, place in self.held.reports.items()}
        state.record(self.options, self.plan, tick, phase, reports if phase == "sparse" else {})
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
        """Compile every phase that may be needed."""
        phases: tuple[Phase, ...] = (
            ("sparse", "dense") if self.remembers and self.plan.dense_steps else ("sparse",)
        )
        if self.learning_sites:  # what is sparse depends on what will be learnt
            phases = ("dense",)
        for phase in phases:
            self._phases[phase, (), ()] = self.compile(phase, (), inputs)

    @property
    def _clocked(self) -> bool:
        """Whether anything depends on what call this is."""
        return bool(self.held.specs) or self.plan.dense_steps > 0

    def _learnt(self, state: ModelState) -> tuple[Phase, Choices]:
        """Which phase what was learnt so far allows, and the choices made for it."""
        if not self.learning_sites:
            return "sparse", ()
        if state.learning is None:
            warn_once(
                "method='dsv' runs dense until it has learnt what to read: train with "
                "sparsify_compiler.DSVTrainer, or give options={'predictor': a file that it wrote}"
            )
            return "dense", ()
        if not state.learning.sparse:
            return "dense", ()
        choices = state.learning.choices
        names = (plan.site.name for plan in self.learning_sites)
        return "sparse", tuple((name, choices[name]) for name in names if name in choices)

    def _run(self, phase: Phase, choices: Choices, inputs: Sequence[Any]) -> Any:
        run = self._phases.get((phase, choices, ()))
        if run is None:
            # Free sizes are symbols only while Dynamo compiles: later, a phase is for the sizes of the call.
            numbers = tuple(value for value in inputs if isinstance(value, int))
            run = self._phases.get((phase, choices, numbers))
            if run is None:
                run = self._phases[phase, choices, numbers] = self.compile(phase, choices, inputs)
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
