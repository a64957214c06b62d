"""What lasts from call to call: a clock for each model, and for each of its streams the tensors of its sites.

State belongs to the model and not to a compiled program: two models of one class share their programs, and one
model has several. It is found by a Parameter that the program is called with, and goes when that goes.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.plan import GraphPlan
from sparsify_compiler.runtime.clock import StepClock, Tick

REMEMBERED = 1000
"""Calls of which reports are kept."""

Spec = tuple[str, tuple[int, ...], torch.device]
"""Name, shape and device of an fp32 tensor."""


@dataclass(slots=True, eq=False)
class Stream:
    """The state of one stream of a model in one program."""

    tensors: list[Tensor]
    calls: int = 0
    """Calls since the video began; 0: the tensors hold nothing yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One call of a program."""

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
    """Of the last calls since the video began."""
    _streams: dict[tuple[tuple[Spec, ...], int], Stream] = field(default_factory=dict)

    def stream(self, specs: Sequence[Spec], number: int) -> Stream:
        """The tensors that `specs` describe, of a stream; zeros at its first call."""
        key = tuple(specs), number
        if key not in self._streams:
            with torch.inference_mode(False):  # a tensor made in it could not be written to out of it
                self._streams[key] = Stream([torch.zeros(shape, device=device) for _, shape, device in specs])
        return self._streams[key]

    def new_video(self) -> None:
        """Forget what was learnt from another video."""
        self._streams.clear()
        self.history.clear()

    def record(self, plan: GraphPlan, tick: Tick, phase: str, reports: Mapping[str, Tensor]) -> None:
        """Keep what the sites report of a call."""
        self.history.append(
            Record(plan, tick, phase, {site: report.clone() for site, report in reports.items()})
        )


_models: dict[int, tuple[weakref.ref[object], ModelState]] = {}
"""id of the object -> (reference that removes the entry, state). Tensors compare by value: no WeakKeyDictionary."""


def states_of(owners: Iterable[object]) -> list[ModelState]:
    """The states that exist of these owners; makes none."""
    return [_models[id(owner)][1] for owner in owners if id(owner) in _models]


def state_of(owner: object) -> ModelState:
    """The state that belongs to `owner`, a Parameter of the model, for as long as that lives."""
    key = id(owner)
    if key not in _models:
        _models[key] = weakref.ref(owner, lambda _: _models.pop(key, None)), ModelState()
    return _models[key][1]
