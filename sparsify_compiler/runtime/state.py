"""State from call to call: a clock for each model and generation, and the tensors of its sites for each stream.

State belongs to the model and not to a compiled program: two models of one class share their programs, and one
model has several programs. The call of an applied model names the model. In other calls a Parameter among the
inputs of the program identifies it. The state is freed with its owner.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import _torch
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.parallel.shares import Owners
from sparsify_compiler.plan import AttentionPlan, GraphPlan, TokenLayout
from sparsify_compiler.runtime.clock import PerGeneration, Prints, StepClock, Tick, Times

REMEMBERED = 1000
"""Number of calls whose reports are kept."""
LOADS = 8
"""Number of calls whose loads of heads count, the last ones."""
LEAST_LOADS = 2
"""Calls of which loads must be known before heads move."""

Spec = tuple[str, tuple[int, ...], torch.device]
"""Name, shape and device of an fp32 tensor."""


def blank(specs: Iterable[Spec]) -> list[Tensor]:
    """The tensors that `specs` describe, all zeros."""
    return [torch.zeros(shape, dtype=torch.float32, device=device) for _, shape, device in specs]


def _writable(specs: Iterable[Spec]) -> list[Tensor]:
    """`blank` tensors. Those made in inference mode could not be written outside of it."""
    with torch.inference_mode(False):
        return blank(specs)


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A tensor that a site reads and a trainer writes."""

    name: str
    initial: Tensor
    """Its values before training."""
    device: torch.device


@dataclass(slots=True, eq=False)
class Learning:
    """The progress of a model's training."""

    sparse: bool = False
    """Whether its sites run sparse; otherwise they run dense and are observed."""
    choices: dict[str, Hashable] = field(default_factory=dict)
    """Site -> argument of its method's `settle`."""


@dataclass(slots=True, eq=False)
class Loads:
    """The loads of heads in the last sparse calls of a stream; kept from video to video.

    Copies to the host begin at once and nothing waits for them. Numbers are read at a later call.
    """

    copies: deque[tuple[Tensor, Any]] = field(default_factory=lambda: deque(maxlen=LOADS + 1))
    """(a load for each head, on the CPU; the event after which they are there), for each call."""

    def note(self, loads: Tensor) -> None:
        """Keep the loads of a call, on the device."""
        self.copies.append(_torch.copy_to_host(loads))

    def mean(self) -> Tensor | None:
        """The mean load of each head, fp64, without the last call; None until enough calls are known."""
        known = list(self.copies)[:-1]
        if len(known) < LEAST_LOADS:
            return None
        for _, arrived in known:
            _torch.wait_for_copy(arrived)
        return torch.stack([loads.double() for loads, _ in known]).mean(0)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Stream:
    """The state of one stream of a model in one program, in one video."""

    tensors: list[Tensor]
    calls: int = 0
    """Calls since the video began; at 0 the tensors hold nothing yet."""
    owners: Sequence[Owners] = ()
    """The owners of heads by which `tensors` are arranged, for each site whose heads move (`runtime/moving.py`)."""
    owner_tensors: list[Tensor] = field(default_factory=list)
    """The same, as programs get them."""
    planned: Sequence[Owners] | None = None
    """Those of sparse calls, once they are planned."""
    sparse_calls: int = 0
    """Sparse calls since the video began."""
    loads: Loads = field(default_factory=Loads)
    """The loads of the heads of these sites, one site after the other."""


@dataclass(slots=True, eq=False)
class Memory:
    """The tensors of a stream. They serve the same stream of later videos, as CUDA graphs know their addresses."""

    tensors: list[Tensor]
    user: "Callable[[], Stream | None]"
    """Returns the stream that has them, as long as it exists."""
    video: int
    """The number of the last video that they served."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """The keys that one block of queries read in a call, in the first batch element and head."""

    site: str
    layout: TokenLayout
    queries: Tensor
    """[S] bool: the tokens of the block."""
    keys: Tensor
    """[S] bool: the tokens that they read."""


@dataclass(slots=True, eq=False)
class Record:
    """One call of a program, or of an applied model with all its programs."""

    options: Mapping[str, Any]
    """The options that torch.compile got: they distinguish the programs of one model."""
    video: int
    """Number of the video of this model, from 0."""
    call: int
    """Number of the call of this model in the video, from 0."""
    plan: GraphPlan
    tick: Tick
    phase: str
    reports: dict[str, Tensor]
    """Dynamic site -> [len(REPORT), B, H], see `runtime/site_inputs.py`; empty in the dense phase."""
    wall: float = math.nan
    """Seconds of the call on the clock of the host; NaN where no applied model was called."""
    cpu: float = math.nan
    """Seconds of all threads of the process in the meantime."""
    example: Example | None = None
    """An example of the choice of a dynamic site, in the first such call of a video."""

    @property
    def ran(self) -> str:
        """`sparse`, or `dense`: the dense phase, or a call in which the guard ran every site dense."""
        return self.phase if self.plan.sparse else "dense"

    def add(self, plan: GraphPlan, phase: str, reports: Mapping[str, Tensor]) -> None:
        """Add another program that ran in the same call."""
        self.plan = replace(self.plan, plans=(*self.plan, *plan))
        self.phase = "sparse" if "sparse" in (phase, self.phase) else phase
        self.reports |= {site: report.clone() for site, report in reports.items()}


StreamKey = tuple[tuple[Spec, ...], int, tuple[str, ...]]
"""(specs, number of the stream, names of the sites in the whole model)."""


@dataclass(slots=True, eq=False)
class Timeline:
    """The calls of a model in one generation, or outside of any."""

    begun: int = -1
    """The number of videos that the clock had begun at the last call; -1 before the first call."""
    video: int = 0
    """The number of its video among those of the model."""
    calls: int = 0
    """Number of calls recorded since that video began."""
    streams: dict[StreamKey, Stream] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class ModelState:
    """The whole state of a model."""

    history: deque["Record"] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Records of the last calls of each program, in its last video."""
    video: int = -1
    """The number of the video that began last, from 0."""
    learning: Learning | None = None
    """Progress of training; None if no trainer has the model."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """Name -> tensor. Kept from video to video, and shared by streams and programs."""
    loads: dict[StreamKey, Loads] = field(default_factory=dict)
    """The loads of heads of each stream, by which heads move between ranks. Kept from video to video."""
    sites: dict[str, tuple[AttentionPlan, int]] = field(default_factory=dict)
    """Name of a site that learns -> (plan of the last program that called it, id of that program's owner)."""
    clocks: PerGeneration[StepClock] = field(default_factory=lambda: PerGeneration(StepClock))
    """Models that make one video together share them."""
    _timelines: PerGeneration[Timeline] = field(default_factory=lambda: PerGeneration(Timeline))
    _memories: dict[StreamKey, list[Memory]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a thread changes `history`, `video` or `_memories`, or goes through `history` in a call."""

    @property
    def clock(self) -> StepClock:
        """The clock of the generation that is open."""
        return self.clocks.current

    def trained_tensors(self, specs: Sequence[Trained]) -> list[Tensor]:
        """The tensors that `specs` describe. Tensors that do not exist yet are made.

        Raises:
            SparsifyError: a tensor that was loaded belongs to another model.
        """
        for spec in specs:
            if spec.name not in self.trained:
                with torch.inference_mode(False):
                    self.trained[spec.name] = spec.initial.to(spec.device, copy=True)
            held = self.trained[spec.name]
            if held.shape != spec.initial.shape or held.device != spec.device:
                raise SparsifyError(
                    f"the trained tensors belong to another model or to other options: {spec.name} must be "
                    f"{tuple(spec.initial.shape)} on {spec.device}, got {tuple(held.shape)} on {held.device}. "
                    "Compile with the options of the training, such as the rank, or train a new instance "
                    "of the model"
                )
        return [self.trained[spec.name] for spec in specs]

    def enter(self, plans: Iterable[AttentionPlan], owner: int) -> None:
        """Register sites that learn. `owner`: id of the Parameter that the state of the program belongs to.

        Raises:
            SparsifyError: two parts of a model were compiled separately and have sites of the same name.
        """
        for plan in plans:
            name = plan.site.name
            if name in self.sites and self.sites[name][1] != owner:
                raise SparsifyError(
                    f"two attentions of this model are called {name!r}, since its parts were compiled "
                    "separately: compile the whole model to train it"
                )
            self.sites[name] = plan, owner

    def tick(self, time: Times | float | None, prints: Prints) -> Tick:
        """Count a call of the model, as `StepClock.tick` does. A new video drops the state of the last one."""
        clock, timeline = self.clock, self._timelines.current
        with clock.lock:
            tick = clock.tick(time, prints)
            if timeline.begun != clock.begun:
                self.new_video()
                timeline.begun = clock.begun
        return tick

    def stream(
        self, specs: Sequence[Spec], number: int, names: tuple[str, ...] = (), *, stays: bool = False
    ) -> Stream:
        """The tensors of a stream that `specs` describe; zeros at its first call.

        Args:
            names: the names of the sites in the whole model, if one program serves several of its parts.
            stays: whether later videos get the same memory. Otherwise it goes with the video or its generation.
        """
        key, streams = (tuple(specs), number, names), self._timelines.current.streams
        if key not in streams:
            loads = self.loads.setdefault(key, Loads())
            if stays:
                streams[key] = self._in_memory(key, loads)
            else:
                streams[key] = Stream(_writable(specs), loads=loads)
        return streams[key]

    def _in_memory(self, key: StreamKey, loads: Loads) -> Stream:
        """A stream in memory that no video has, and that is new only where there is none."""
        with self._lock:
            memories = self._memories.setdefault(key, [])
            memory = next((one for one in memories if one.user() is None), None)
            if memory is None:
                memory = Memory(_writable(key[0]), lambda: None, self.video)
                memories.append(memory)
            else:
                for tensor in memory.tensors:
                    tensor.zero_()
            stream = Stream(memory.tensors, loads=loads)
            memory.user, memory.video = weakref.ref(stream), self._timelines.current.video
        return stream

    def new_video(self) -> None:
        """Drop the state of the last video of this generation, and memory that the last video did not need."""
        timeline = self._timelines.current
        timeline.streams.clear()
        with self._lock:
            for key, memories in [*self._memories.items()]:
                kept = [one for one in memories if one.user() is not None or one.video >= self.video]
                if kept:
                    self._memories[key] = kept
                else:
                    del self._memories[key]
            self.video += 1
            timeline.video, timeline.calls = self.video, 0

    @property
    def last_example(self) -> Example | None:
        """The example of a dynamic site in this generation's last video, if a call has kept one."""
        video = self._timelines.current.video
        with self._lock:
            return next((one.example for one in self.history if one.video == video and one.example), None)

    def record(
        self,
        options: Mapping[str, Any],
        plan: GraphPlan,
        tick: Tick,
        phase: str,
        reports: Mapping[str, Tensor],
    ) -> Record:
        """Keep the reports on a call, and drop those of programs with these options on videos that ended."""
        copies = {site: report.clone() for site, report in reports.items()}
        timeline = self._timelines.current
        with self._lock:
            videos = {timeline.video, *(one.video for one in self._timelines.inside)}
            if self.history and self.history[0].video not in videos:
                kept = [one for one in self.history if one.video in videos or one.options != options]
                self.history = deque(kept, maxlen=REMEMBERED)
            record = Record(options, timeline.video, timeline.calls, plan, tick, phase, copies)
            self.history.append(record)
        timeline.calls += 1
        return record


_making = threading.Lock()
"""Held while the state of an owner is looked up and made, so that all threads get the same one."""

_models: dict[int, tuple[weakref.ref[object], ModelState]] = {}
"""id of the object -> (reference that removes the entry, state). Tensors compare by value: no WeakKeyDictionary."""


def states_of(owners: Iterable[object]) -> list[ModelState]:
    """The distinct states that these owners have already. No state is made."""
    return list(dict.fromkeys(_models[id(owner)][1] for owner in owners if id(owner) in _models))


def share_state(owners: Iterable[object]) -> ModelState:
    """Give all these owners one state, and return it.

    Raises:
        SparsifyError: the owners have several states already.
    """
    owners = list(owners)
    with _making:
        states = states_of(owners)
        if len(states) > 1:
            raise SparsifyError(
                f"{len(states)} parts of this model were compiled separately and have run: compile the whole "
                "model to train it"
            )
        state = states[0] if states else ModelState()
        for owner in owners:
            _keep(owner, state)
    return state


def state_of(owner: object) -> ModelState:
    """The state that belongs to `owner`, a Parameter of the model, for the life of `owner`."""
    with _making:
        if id(owner) not in _models:
            _keep(owner, ModelState())
        return _models[id(owner)][1]


def _keep(owner: object, state: ModelState) -> None:
    key = id(owner)
    _models[key] = weakref.ref(owner, lambda _: _models.pop(key, None)), state
