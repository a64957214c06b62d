"""The step clock: which step of a generation a call of the model is, and which stream it belongs to.

Nothing here touches a tensor. A clock gets the time step and a few numbers for each of the other inputs, and
counts. It finds:

- *step*: the number of changes of the time step, up or down, since the video began. A solver of second order calls
  twice at one time step; the step stays the same.
- *new video*: the time step went against the direction of the schedule. The direction is found again in each video.
- *stream*: calls at one time step whose other inputs differ are streams (conditional, unconditional). An input
  that changed for every stream when the time step did (the latents) does not distinguish streams.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from sparsify_compiler.config import integer
from sparsify_compiler.errors import OptionError

USUAL_STEPS = 50
"""Steps of a generation, as long as nothing is known about it."""

MOST_STREAMS = 4
"""Streams of one model; a further one means that a new video began without a change of the time step."""

Print = tuple[float, ...]
Prints = Mapping[str, Print]
"""Name of an input, except the time step -> numbers that are equal if the input is equal. Calls of one model may
have different inputs."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The place of one call in a generation."""

    step: int | None
    """Number of the step, from 0. None if unknown: no time step among the inputs and no open `generation`."""
    steps: int
    """Steps of the whole generation: those given to `generation`, else those of the last video, else 50."""
    stream: int = 0
    """Number of the stream, from 0, in the order of the calls in the video's first step."""
    new_video: bool = False
    """Whether the state from earlier calls belongs to another video."""


@dataclass(slots=True)
class StepClock:
    """The clock of one model. Every forward calls `tick`."""

    _steps: int = USUAL_STEPS
    _generation: "Generation | None" = None
    _before: int = 0
    """Steps that other models of the generation had done before the first call of this one."""
    _calls: int = 0
    """Calls since the generation or the process began."""
    _step: int = 0
    _time: float | None = None
    _direction: int = 0
    """Direction of this video's time steps: 1 rising, -1 falling, 0 not known yet."""
    _streams: list[Prints] = field(default_factory=list)
    """The last prints of each stream."""
    _varying: set[str] = field(default_factory=set)
    """Inputs that change with the steps."""

    def reads(self) -> bool:
        """Whether the next `tick` needs the inputs' values."""
        generation = _open.get()
        return generation is None or generation.streams is None

    def tick(self, time: float | None, prints: Prints) -> Tick:
        """Count a call.

        Args:
            time: the time step; None if the graph has none, or if `reads` returned False.
            prints: the other inputs; empty if time is None.
        """
        generation = _open.get()
        new_video = generation is not self._generation
        if new_video:
            self._begin(generation)
        self._calls += 1
        if time is not None:
            new_video = self._advance(time, prints) or new_video
            stream = self._recognise(prints, moved=time != self._time)
            self._time = time
            self._streams[stream : stream + 1] = [prints]
        elif generation is not None:
            self._step, stream = divmod(self._calls - 1, generation.streams or 1)
        else:
            return Tick(None, self._steps, 0, new_video)
        return Tick(self._before + self._step, self._steps, stream, new_video)

    def _begin(self, generation: "Generation | None") -> None:
        """Start a video, since a `generation` was opened or closed."""
        self._generation, self._before, self._calls = generation, 0, 0
        self._start_video()
        if generation is not None:
            self._steps = generation.steps
            done = max((clock._before + clock._step + 1 for clock in generation.clocks), default=0)
            self._before = done if done > 1 else 0
            generation.clocks.append(self)

    def _start_video(self) -> None:
        self._step, self._time, self._direction = 0, None, 0
        self._streams.clear()

    def _advance(self, time: float, prints: Prints) -> bool:
        """Move to the step of this time step. Return whether a new video begins with it."""
        if self._time is None:
            return False
        if time == self._time:
            ended = len(self._streams) == MOST_STREAMS and self._is_foreign(prints)
        else:
            direction = 1 if time > self._time else -1
            ended = self._direction == -direction
            if not ended:
                self._direction = direction
                self._step += 1
                self._update(prints)
        if ended:
            if self._generation is None and self._step > 0:
                self._steps = self._step + 1
            self._start_video()
        return ended

    def _update(self, prints: Prints) -> None:
        """Note the inputs that changed for every stream with the time step: they do not distinguish streams."""
        for name, value in prints.items():
            before = [stream[name] for stream in self._streams if name in stream]
            if before and value not in before:
                self._varying.add(name)
        apart: dict[frozenset[tuple[str, Print]], Prints] = {}
        for stream in self._streams:
            apart.setdefault(self._conditioning(stream), stream)
        self._streams = list(apart.values())

    def _conditioning(self, prints: Prints) -> frozenset[tuple[str, Print]]:
        return frozenset((name, () if name in self._varying else value) for name, value in prints.items())

    def _is_foreign(self, prints: Prints) -> bool:
        """Whether a call belongs to none of the streams known so far."""
        return all(self._conditioning(stream) != self._conditioning(prints) for stream in self._streams)

    def _recognise(self, prints: Prints, *, moved: bool) -> int:
        """The stream of a call. `moved`: the time step has just changed, so no stream begins."""
        if not self._is_foreign(prints):
            own = self._conditioning(prints)
            return next(i for i, stream in enumerate(self._streams) if self._conditioning(stream) == own)
        if not moved or not self._streams:
            return len(self._streams)
        # An input that distinguishes streams changed with the step: take the most similar stream.
        alike = [len(prints.items() & stream.items()) for stream in self._streams]
        return alike.index(max(alike))


@dataclass(slots=True, eq=False)
class Generation:
    """The user's statement about the next calls."""

    steps: int
    streams: int | None
    clocks: list[StepClock] = field(default_factory=list)


_open: ContextVar[Generation | None] = ContextVar("generation", default=None)


@contextmanager
def generation(steps: int, streams: int | None = None) -> Iterator[None]:
    """State that the block generates one video, so that no step has to be guessed.

    Args:
        steps: number of denoising steps. `dense_steps` may be a share of it.
        streams: calls of the model in each step, always in the same order: 1, or 2 for guidance in two calls.
            If given, nothing is read from the device and calls are counted: a solver of second order makes two.
            If None, time steps and streams are read from the inputs: one synchronisation per forward on a GPU.

    Where models take turns within a generation (experts for high and low noise), each continues the count of the
    one before.

    Raises:
        OptionError: a number is below 1.
    """
    for name, value in (("steps", steps), ("streams", streams)):
        if (value is not None or name == "steps") and (integer(value) or 0) < 1:
            raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")
    token = _open.set(Generation(steps, streams))
    try:
        yield
    finally:
        _open.reset(token)
