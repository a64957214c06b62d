"""The step clock: which step of a generation a call of the model is, and which stream it belongs to.

Nothing here touches a tensor. A clock gets the time steps and a few numbers for each of the other inputs, and
counts. It finds:

- *step*: the number of changes of a time step, up or down, since the video began. A solver of second order calls
  twice at one time step; the step stays the same. Where time steps were rounded to one number, each call is one.
- *steps*: those of the whole video, estimated from its first time steps (`schedules.py`).
- *new video*: the time steps went against the direction of the schedule. It is found again in each video.
- *videos in turn*: calls of several videos may alternate. Their time steps, or another input, set them apart.
- *stream*: calls at one time step whose other inputs differ are streams (conditional, unconditional). An input
  that changed for every stream when the time step did (the latents) does not distinguish streams.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

from sparsify_compiler.config import integer
from sparsify_compiler.errors import OptionError, warn_once
from sparsify_compiler.runtime.schedules import LOOKED_AT, estimated_steps, resolution

USUAL_STEPS = 50
"""Steps of a generation, as long as nothing is known about it."""

MOST_STREAMS = 4
"""Streams of one video; a further one means that a new video began without a change of the time step."""

MOST_VIDEOS = 4
"""Videos in turn that a clock distinguishes."""

Print = tuple[float, ...]
Prints = Mapping[str, Print]
"""Name of an input, except the time step -> numbers that are equal if the input is equal. Calls of one model may
have different inputs."""


class Times(NamedTuple):
    """The time steps of one call: one, or one for each video, frame or token."""

    mean: float
    largest: float
    squares: float
    """The mean of their squares: with the others, equal if all time steps are equal."""

    def way_from(self, other: "Times") -> int:
        """1 if they rose from the others, -1 if they fell, 0 if they are equal."""
        if self == other:
            return 0
        return (
            1 if (self.mean, self.squares, self.largest) > (other.mean, other.squares, other.largest) else -1
        )


@dataclass(frozen=True, slots=True)
class Tick:
    """The place of one call in a generation."""

    step: int | None
    """Number of the step, from 0. None if unknown: no time step among the inputs and no open `generation`."""
    steps: int
    """Steps of the whole generation: those given to `generation`, else those of the last video with these time
    steps, else an estimate from the time steps so far, else 50."""
    stream: int = 0
    """Number of the stream, from 0, in the order of the calls in the video's first step."""
    new_video: bool = False
    """Whether the state from earlier calls belongs to another video."""
    mixed: bool = False
    """Whether the call may belong to another video than the last call of its stream."""

    @property
    def remembers(self) -> bool:
        """Whether the call may read the state that the last call of its stream wrote."""
        return self.step is not None and not self.mixed


@dataclass(slots=True)
class _Video:
    """The calls of one video so far."""

    first_stream: int
    """Number of its first stream."""
    changes: list[Times]
    """Its time steps, without those that repeat."""
    in_turn: bool = False
    """Whether its calls were seen to alternate with those of another video."""
    opening: list[tuple[Times, Prints]] = field(default_factory=list)
    """Its calls at the first two time steps."""
    repeats: list[int] = field(default_factory=list)
    """For each time step but the last, the most calls of one stream."""
    calls: Counter[int] = field(default_factory=Counter)
    """Stream -> calls at the last time step."""
    direction: int = 0
    """Direction of its time steps: 1 rising, -1 falling, 0 not known yet."""
    rounded: bool = False
    """Whether several steps have one time step, since time steps were rounded."""
    mixed: bool = False
    """Whether its calls may be those of several videos."""
    streams: list[Prints] = field(default_factory=list)
    """The last prints of each stream."""
    varied: set[str] = field(default_factory=set)
    """Inputs that this video showed to change with the steps."""
    estimates: list[tuple[int, int]] = field(default_factory=list)
    """(step, number of steps of the whole video as it was estimated there)."""

    @property
    def time(self) -> Times:
        """The time steps of its last call, or those before a rise within the schedule."""
        return self.changes[-1]

    @property
    def step(self) -> int:
        if self.rounded:
            return sum(self.repeats) + max(self.calls.values(), default=1) - 1
        return len(self.changes) - 1

    def step_times(self) -> list[float]:
        """A time step for each step so far: the largest one, or the mean where the largest stands still."""
        stands = len(self.changes) > 1 and self.changes[0].largest == self.changes[1].largest
        times = [time.mean if stands else time.largest for time in self.changes]
        if not self.rounded:
            return times
        repeats = [*self.repeats, max(self.calls.values(), default=1)]
        return [time for time, count in zip(times, repeats, strict=True) for _ in range(count)]

    def is_complete(self) -> bool:
        """Whether it ended near the end of its schedule, as far as its time steps show that."""
        found = estimated_steps(self.step_times()) if len(self.changes) > 2 else None
        return found is None or found <= 1.25 * (self.step + 1) + 1

    def continues(self, time: Times) -> bool:
        """Whether a call with this time step may follow, by the direction of the schedule."""
        return time.way_from(self.time) in (0, self.direction) or self.direction == 0

    def rises_a_little(self, time: Times) -> bool:
        """Whether the time step goes back to one between the last two, as in a schedule with churn."""
        if len(self.changes) < 2 or self.continues(time):
            return False
        return self.direction * (time.mean - self.changes[-2].mean) >= 0

    def surprise(self, time: Times, known: "_Video | None" = None) -> float:
        """The distance of a time step from the expected one, in steps."""
        if time == self.time:
            return 0.0
        changes = self.changes
        if len(changes) > 1:
            expected = 2 * changes[-1].mean - changes[-2].mean
        elif known is not None and self.time in known.changes[:-1]:
            expected = known.changes[known.changes.index(self.time) + 1].mean
        else:
            return 1.0
        return abs(time.mean - expected) / abs(self.time.mean - expected or 1.0)


@dataclass(slots=True)
class StepClock:
    """The clock of one model. Every forward calls `tick`."""

    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    """Held by the thread that calls `tick`, where several threads share the clock."""
    begun: int = 0
    """Number of videos that began after the first one."""
    _steps: int = USUAL_STEPS
    _generation: "weakref.ref[Generation] | None" = None
    _before: int = 0
    """Steps that other models of the generation had done before the first call of this one."""
    _calls: int = 0
    """Calls since the generation or the process began."""
    _videos: list[_Video] = field(default_factory=list)
    """Videos whose calls may still come; the one of the last call is the last."""
    _ended: _Video | None = None
    """The last video that ended before another one began."""
    _ended_complete: bool = False
    _varying: set[str] = field(default_factory=set)
    """Inputs that change with the steps."""

    def reads(self) -> bool:
        """Whether the next `tick` needs the inputs' values."""
        generation = opened()
        return generation is None or generation.streams is None

    def tick(self, time: Times | float | None, prints: Prints) -> Tick:
        """Count a call.

        Args:
            time: the time steps; None if the call has none, or if `reads` returned False.
            prints: the other inputs; empty if time is None.
        """
        tick = self._counted(time, prints)
        self.begun += tick.new_video
        return tick

    def _counted(self, time: Times | float | None, prints: Prints) -> Tick:
        generation = opened()
        new_video = generation is not (None if self._generation is None else self._generation())
        new_video |= generation is None and self._generation is not None
        if new_video:
            self._begin(generation)
        self._calls += 1
        if time is not None:
            time = time if isinstance(time, Times) else Times(float(time), float(time), float(time) ** 2)
            return self._place(time, prints, generation, new_video)
        if generation is None:
            return Tick(None, self._steps, 0, new_video)
        step, stream = divmod(self._calls - 1, generation.streams or 1)
        return Tick(self._before + step, self._steps, stream, new_video)

    @property
    def _step(self) -> int:
        """The step of the last call in an open generation."""
        generation = None if self._generation is None else self._generation()
        if self._videos:
            return self._videos[-1].step
        return max(self._calls - 1, 0) // (generation.streams or 1 if generation is not None else 1)

    def _begin(self, generation: "Generation | None") -> None:
        """Start a video, since a `generation` was opened or closed."""
        self._generation = None if generation is None else weakref.ref(generation)
        self._before, self._calls = 0, 0
        self._videos.clear()
        self._ended = None
        if generation is not None:
            self._steps = generation.steps
            done = max((clock._before + clock._step + 1 for clock in generation.clocks), default=0)
            self._before = done if done > 1 else 0
            generation.clocks.append(self)

    def _place(self, time: Times, prints: Prints, generation: "Generation | None", new_video: bool) -> Tick:
        """Find the video, the step and the stream of a call."""
        video = self._find(time, prints)
        if video is None:
            new_video |= bool(self._videos)
            video = self._open(time)
        self._videos.remove(video)
        self._videos.append(video)
        moved = self._move(video, time, prints)
        stream = self._recognise(video, prints, moved=moved)
        video.streams[stream : stream + 1] = [prints]
        video.calls[stream] += 1
        if len(video.changes) <= 2:
            video.opening.append((time, prints))
        if video.mixed and len(video.repeats) > 1:
            warn_once(
                "calls of one model may be those of several videos in turn: nothing but inputs that change with "
                "the steps sets them apart. Each call starts without the state of earlier calls. Put each video "
                "into `with sparsify_compiler.generation(steps):`, one handle for each video"
            )
        steps = self._steps if generation is not None else self._expected(video)
        return Tick(self._before + video.step, steps, video.first_stream + stream, new_video, video.mixed)

    def _find(self, time: Times, prints: Prints) -> _Video | None:
        """The video that a call belongs to; None if it is the first of a new one."""
        if not self._videos:
            return None
        last = self._videos[-1]
        if self._alternates(last, time, prints):
            return self._split(last)
        if time == last.time and len(last.streams) == MOST_STREAMS and self._is_foreign(last, prints):
            return None
        own = last.continues(time) and not (len(self._videos) > 1 and self._is_foreign(last, prints))
        if own and (len(self._videos) == 1 or last.surprise(time, self._videos[-2]) < 0.5):
            return last
        # Another video may have waited for this call.
        found = [
            video
            for video in self._videos[:-1]
            if video.continues(time) and self._waited(video, time, prints)
        ]
        found += [last] if last.continues(time) else []
        if found:
            video = min(found, key=lambda one: (self._is_foreign(one, prints), one.surprise(time)))
            if video is not last and not video.in_turn:
                video.in_turn = last.in_turn = True
                video.first_stream = self._free_stream()
            return video
        return last if self._churns(last, time, prints) else None

    def _waited(self, video: _Video, time: Times, prints: Prints) -> bool:
        """Whether a call continues a video after the first calls of a later one."""
        if video.in_turn:
            return True
        last = self._videos[-1]
        if len(last.changes) > 2 or time in (last.time, video.time):
            return False
        distinct = self._is_foreign(last, prints) and not self._is_foreign(video, prints)
        return distinct or (len(video.changes) > 1 and video.surprise(time) < 0.1)

    def _alternates(self, video: _Video, time: Times, prints: Prints) -> bool:
        """Whether the first two time steps of a video turn out to be those of two videos."""
        if len(video.changes) != 2 or time in video.changes:
            return False
        first, second = video.changes
        before = [one for at, one in video.opening if at == first]
        lately = [one for at, one in video.opening if at == second]
        for name, value in prints.items():
            seen = {one[name] for one in before if name in one}
            if value in seen and lately and all(name in one and one[name] not in seen for one in lately):
                return True
        return video.direction == 1 and time.mean < first.mean

    def _split(self, video: _Video) -> _Video:
        """Make two videos of the calls at the first two time steps of one. Return the earlier one."""
        self._varying -= video.varied
        self._videos.remove(video)
        for time in reversed(video.changes):
            one = _Video(self._free_stream(), [time], in_turn=True)
            for at, prints in video.opening:
                if at == time and self._is_foreign(one, prints):
                    one.streams.append(prints)
                    one.opening.append((at, prints))
            one.calls.update(range(len(one.streams)))
            self._videos.append(one)
        return self._videos[-1]

    def _churns(self, video: _Video, time: Times, prints: Prints) -> bool:
        """Whether a time step against the direction belongs to a schedule that adds noise now and then."""
        if not video.rises_a_little(time) or video.direction * (time.mean - video.changes[0].mean) <= 0:
            return False
        same = bool(prints.keys() - self._varying) and not self._is_foreign(video, prints)
        return video.mixed or len(video.changes) == 2 or same

    def _open(self, time: Times) -> _Video:
        """Begin a video. Its first streams have the numbers from 0."""
        for video in self._videos:
            if video.first_stream == 0:
                video.first_stream = self._free_stream()
        if self._videos:
            self._ended = self._videos[-1]
            self._ended_complete = self._ended.is_complete()
            if self._generation is None:
                self._steps = max(self._ended.step + 1, 1) if self._ended.step else self._steps
        del self._videos[: -(MOST_VIDEOS - 1)]
        video = _Video(0, [time])
        self._videos.append(video)
        return video

    def _free_stream(self) -> int:
        return MOST_STREAMS + max((video.first_stream for video in self._videos), default=0)

    def _move(self, video: _Video, time: Times, prints: Prints) -> bool:
        """Bring a video to the time step of a call. Return whether it changed."""
        if time == video.time:
            return False
        way = time.way_from(video.time)
        if video.direction == -way and len(video.changes) > 1:  # a schedule with churn: no further step
            video.mixed = True
            video.changes[-1] = time
            video.calls.clear()
            return True
        video.direction = way
        self._update(video, prints)
        video.repeats.append(self._most_calls(video))
        close = _distance(video.time, time) <= 1.001 * resolution(
            [one.largest for one in (*video.changes, time)]
        )
        if len(video.repeats) == 1:
            video.mixed = video.mixed or (video.repeats[0] > 1 and not close)
        elif len(video.repeats) == 2 and video.repeats[0] > 1 and video.repeats[1] == 1:
            video.mixed = False
        second_order = video.repeats[0] == 1 and set(video.repeats[1:]) == {2}
        video.rounded = video.rounded or (close and max(video.repeats) > 1 and not second_order)
        video.changes.append(time)
        video.calls.clear()
        return True

    def _most_calls(self, video: _Video) -> int:
        """The most calls of one stream at the time step that ends."""
        if len(video.changes) > 1:
            return max(video.calls.values(), default=1)
        distinct = {frozenset(prints.items()): self._conditioning(prints) for _, prints in video.opening}
        return max(Counter(distinct.values()).values(), default=1)

    def _expected(self, video: _Video) -> int:
        """The number of steps of the whole video, as far as its time steps so far show it."""
        step, times = video.step, video.step_times()
        ended = self._ended
        if ended is not None and ended.step and len(ended.changes) > 1:
            known = len(video.changes) == 1 or video.changes == ended.changes[: len(video.changes)]
            if known and video.changes[0] == ended.changes[0] and self._ended_complete:
                return max(self._steps, step + 1)
        if step == 0 and not video.rounded and len(video.changes) == 1:
            return self._steps
        if video.estimates and video.estimates[-1][0] == step:
            return video.estimates[-1][1]
        found = estimated_steps(times) if step < LOOKED_AT else None
        latest = video.estimates[-1][1] if video.estimates else self._steps
        steps = max(found or latest, step + 1)
        # A step that follows a sparse one is sparse, whatever share of the steps is dense.
        for before, estimate in video.estimates:
            steps = min(steps, max(step + 1, int(estimate * (step + 0.5) / (before + 0.5))))
        video.estimates.append((step, steps))
        return steps

    def _update(self, video: _Video, prints: Prints) -> None:
        """Note the inputs that changed for every stream with the time step: they do not distinguish streams."""
        for name, value in prints.items():
            before = [stream[name] for stream in video.streams if name in stream]
            if before and value not in before and name not in self._varying:
                self._varying.add(name)
                video.varied.add(name)
        apart: dict[frozenset[tuple[str, Print]], Prints] = {}
        for stream in video.streams:
            apart.setdefault(self._conditioning(stream), stream)
        video.streams = list(apart.values())

    def _conditioning(self, prints: Prints) -> frozenset[tuple[str, Print]]:
        return frozenset((name, () if name in self._varying else value) for name, value in prints.items())

    def _is_foreign(self, video: _Video, prints: Prints) -> bool:
        """Whether a call belongs to none of the streams of a video known so far."""
        return all(self._conditioning(stream) != self._conditioning(prints) for stream in video.streams)

    def _recognise(self, video: _Video, prints: Prints, *, moved: bool) -> int:
        """The stream of a call. `moved`: the time step has just changed, so no stream begins."""
        if not self._is_foreign(video, prints):
            own = self._conditioning(prints)
            return next(i for i, stream in enumerate(video.streams) if self._conditioning(stream) == own)
        if not moved or not video.streams:
            return len(video.streams)
        # An input that distinguishes streams changed with the step: take the most similar stream.
        alike = [len(prints.items() & stream.items()) for stream in video.streams]
        return alike.index(max(alike))


def _distance(time: Times, other: Times) -> float:
    return abs(time.largest - other.largest)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Generation:
    """The user's statement about the next calls: a handle, to enter by `with`, again and again."""

    steps: int
    streams: int | None
    clocks: list[StepClock] = field(default_factory=list)

    def __enter__(self) -> "Generation":
        _open.set((*_open.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A generator may leave its block after the caller entered another one, or in another context.
        held = list(_open.get())
        if self in held:
            del held[-1 - held[::-1].index(self)]
            _open.set(tuple(held))


_open: ContextVar[tuple[Generation, ...]] = ContextVar("generations", default=())
"""The open generations of this thread or task; the inner one is the last."""


def opened() -> Generation | None:
    """The generation that is open."""
    return next(reversed(_open.get()), None)


def generation(steps: int, streams: int | None = None) -> Generation:
    """State that the calls in a `with` block make one video, so that no step has to be guessed.

    Args:
        steps: number of denoising steps. `dense_steps` may be a share of it.
        streams: calls of the model in each step, always in the same order: 1, or 2 for guidance in two calls.
            If given, nothing is read from the device and calls are counted: a solver of second order makes two.
            If None, time steps and streams are read from the inputs: one synchronisation per forward on a GPU.

    Returns:
        A handle. A `with` block that enters it again continues its video, so videos in turn, or in several threads,
        have a handle each. Their state is apart, and goes with the handle.

    Where models take turns within a generation (experts for high and low noise), each continues the count of the
    one before.

    Raises:
        OptionError: a number is below 1.
    """
    for name, value in (("steps", steps), ("streams", streams)):
        if (value is not None or name == "steps") and (integer(value) or 0) < 1:
            raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")
    return Generation(steps, streams)


Value = TypeVar("Value")


class PerGeneration(Generic[Value]):
    """One value for each open generation, and one for calls outside of any. Threads may share it."""

    def __init__(self, make: Callable[[], Value]) -> None:
        """`make`: makes a value, when it is first needed."""
        self._make = make
        self._outside = make()
        self._inside: weakref.WeakKeyDictionary[Generation, Value] = weakref.WeakKeyDictionary()
        """Each value goes with the handle of its generation."""
        self._lock = threading.Lock()

    @property
    def current(self) -> Value:
        """The value of the open generation, or the one of calls outside of any."""
        generation = opened()
        if generation is None:
            return self._outside
        with self._lock:
            if generation not in self._inside:
                self._inside[generation] = self._make()
            return self._inside[generation]

    @property
    def inside(self) -> list[Value]:
        """The values of all generations whose handles still exist."""
        with self._lock:
            return list(self._inside.values())
