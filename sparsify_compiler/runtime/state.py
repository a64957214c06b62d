"""What lasts from call to call: a clock for each model, and for each of its streams the tensors of its sites.

State belongs to the model and not to a compiled program: two models of one class share their programs, and one
model has several. It is found by a Parameter that the program is called with, and goes when that goes.
"""

import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.clock import StepClock, Tick

REMEMBERED = 1000
"""Calls of which reports are kept."""

Spec = tuple[str, tuple[int, ...], torch.device]
"""Name, shape and device of an fp32 tensor."""


def blank(specs: Iterable[Spec]) -> list[Tensor]:
    """The tensors that `specs` describe, all zeros."""
    return [torch.zeros(shape, dtype=torch.float32, device=device) for _, shape, device in specs]


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """A tensor that a site reads and a trainer writes."""

    name: str
    initial: Tensor
    """What it holds until it is learnt."""
    device: torch.device


@dataclass(slots=True, eq=False)
class Learning:
    """How far the learning of a model has come."""

    sparse: bool = False
    """Whether its sites run sparse; else dense, and are looked at."""
    choices: dict[str, Hashable] = field(default_factory=dict)
    """Site -> what its method's `settle` takes."""


@dataclass(slots=True, eq=False)
class Stream:
    """The state of one stream of a model in one program."""

    tensors: list[Tensor]
    calls: int = 0
    """Calls since the video began; 0: the tensors hold nothing yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One call of a program."""

    options: Mapping[str, Any]
    """Those that torch.compile was given: programs of one model differ by them."""
    video: int
    """Number of the video of this model, from 0."""
    call: int
    """Number of the call of this model in the video, from 0."""
    plan: GraphPlan
    tick: Tick
    phase: str
    reports: dict[str, Tensor]
    """Dynamic site -> [4, B, H], see `runtime/site.py`; empty in the dense phase."""


@dataclass(slots=True, eq=False)
class ModelState:
    """Everything that is remembered about a model."""

    clock: StepClock = field(default_factory=StepClock)
    history: deque["Record"] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Records of the last calls of each program, in the last video that it made."""
    video: int = 0
    """The number of the video, from 0."""
    calls: int = 0
    """Calls recorded since it began."""
    learning: Learning | None = None
    """Of a model whose sites learn, once a trainer takes care of it."""
    learned: dict[str, Tensor] = field(default_factory=dict)
    """By name; lasts from video to video, and is shared by streams and programs."""
    sites: dict[str, tuple[AttentionPlan, int]] = field(default_factory=dict)
    """Those that learn: the plan of the last program that called them, and whose parameter it was called with."""
    _streams: dict[tuple[tuple[Spec, ...], int], Stream] = field(default_factory=dict)

    def learned_tensors(self, specs: Sequence[Learned]) -> list[Tensor]:
        """The tensors that `specs` describe, made where they do not exist yet.

        Raises:
            SparsifyError: one that was loaded is of another model.
        """
        for spec in specs:
            if spec.name not in self.learned:
                with torch.inference_mode(False):
                    self.learned[spec.name] = spec.initial.to(spec.device, copy=True)
            held = self.learned[spec.name]
            if held.shape != spec.initial.shape or held.device != spec.device:
                raise SparsifyError(
                    f"what was learnt is of another model, or with other options: {spec.name} must be "
                    f"{tuple(spec.initial.shape)} on {spec.device}, got {tuple(held.shape)} on {held.device}. "
                    "Compile with the options that it learned with, such as the rank, or train a new "
                    "instance of the model"
                )
        return [self.learned[spec.name] for spec in specs]

    def enter(self, plans: Iterable[AttentionPlan], owner: int) -> None:
        """Note sites that learn.

        Raises:
            SparsifyError: two parts of a model, compiled one by one, have a site of one name.
        """
        for plan in plans:
            name = plan.site.name
            if name in self.sites and self.sites[name][1] != owner:
                raise SparsifyError(
                    f"two attentions of this model are called {name!r}, since its parts were compiled one by one: "
                    "to learn, compile it as a whole"
                )
            self.sites[name] = plan, owner

    def stream(self, specs: Sequence[Spec], number: int) -> Stream:
        """The tensors that `specs` describe, of a stream; zeros at its first call."""
        key = tuple(specs), number
        if key not in self._streams:
            with torch.inference_mode(False):  # a tensor made in it could not be written to out of it
                self._streams[key] = Stream(blank(specs))
        return self._streams[key]

    def new_video(self) -> None:
        """Forget what was learnt from another video."""
        self._streams.clear()
        self.video, self.calls = self.video + 1, 0

    def record(
        self,
        options: Mapping[str, Any],
        plan: GraphPlan,
        tick: Tick,
        phase: str,
        reports: Mapping[str, Tensor],
    ) -> None:
        """Keep what the sites report of a call, and forget what programs of these options did in earlier videos."""
        if self.history and self.history[0].video != self.video:
            kept = (one for one in self.history if one.video == self.video or one.options != options)
            self.history = deque(kept, maxlen=REMEMBERED)
        copies = {site: report.clone() for site, report in reports.items()}
        self.history.append(Record(options, self.video, self.calls, plan, tick, phase, copies))
        self.calls += 1


_models: dict[int, tuple[weakref.ref[object], ModelState]] = {}
"""id of the object -> (reference that removes the entry, state). Tensors compare by value: no WeakKeyDictionary."""


def states_of(owners: Iterable[object]) -> list[ModelState]:
    """The different states that exist of these owners; makes none."""
    return list(dict.fromkeys(_models[id(owner)][1] for owner in owners if id(owner) in _models))


def share_state(owners: Iterable[object]) -> ModelState:
    """The one state of all these owners from now on, by whichever of them it is looked up.

    Raises:
        SparsifyError: they have several already.
    """
    owners = list(owners)
    states = states_of(owners)
    if len(states) > 1:
        raise SparsifyError(
            f"{len(states)} parts of this model were compiled one by one and have run: to learn, compile it whole"
        )
    state = states[0] if states else ModelState()
    for owner in owners:
        _keep(owner, state)
    return state


def state_of(owner: object) -> ModelState:
    """The state that belongs to `owner`, a Parameter of the model, for as long as that lives."""
    if id(owner) not in _models:
        _keep(owner, ModelState())
    return _models[id(owner)][1]


def _keep(owner: object, state: ModelState) -> None:
    key = id(owner)
    _models[key] = weakref.ref(owner, lambda _: _models.pop(key, None)), state
