"""The clock against loops whose steps, streams and videos are known."""

import contextvars
import gc
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_compiler import OptionError
from sparsify_compiler.errors import SparsifyWarning, warn_once
from sparsify_compiler.runtime.clock import (
    MOST_STREAMS,
    USUAL_STEPS,
    Generation,
    StepClock,
    Tick,
    Times,
    generation,
    opened,
)
from sparsify_compiler.runtime.state import ModelState

Numbers = tuple[float, ...]


def prints(*values: Numbers) -> dict[str, Numbers]:
    return {f"input{i}": value for i, value in enumerate(values)}


@dataclass(frozen=True)
class Call:
    """One call of the model in a sampling loop, and what the clock must say of it."""

    time: float
    prints: dict[str, Numbers]
    step: int
    stream: int
    first: bool
    """Whether it is the first call of a later video than the first."""


@st.composite
def videos(draw: st.DrawFn) -> list[Call]:
    """Loops over several videos: falling or rising schedules, guidance in several calls, solvers that repeat."""
    rising = draw(st.booleans())
    streams = draw(st.integers(1, 3))
    second_order = draw(st.booleans())
    late_guidance = streams > 1 and draw(st.booleans())
    calls: list[Call] = []
    latents = 0.0
    for video in range(draw(st.integers(1, 3))):
        steps = draw(st.integers(2, 6))
        times = sorted(draw(st.sets(st.integers(1, 999), min_size=steps, max_size=steps)), reverse=not rising)
        # A first time step beyond all earlier ones, as in a new schedule.
        times[0] = 0 if rising else 1000
        for step, time in enumerate(times):
            # Heun and the like ask once at the first time step and twice at every later one.
            for _ in range(2 if second_order and step else 1):
                latents += 1.0
                present = 1 if late_guidance and step == 0 else streams
                for stream in range(present):
                    # latents, a conditioning and another one, and what never changes
                    inputs = prints((latents, 1.0), (video, stream), (10.0 + stream, 2.0), (3.0, 3.0))
                    calls.append(Call(time, inputs, step, stream, bool(video and step == stream == 0)))
    return calls


@given(videos())
def test_steps_streams_and_videos_are_recognised(calls: list[Call]) -> None:
    clock = StepClock()
    for number, call in enumerate(calls):
        tick = clock.tick(call.time, call.prints)
        assert (tick.step, tick.stream) == (call.step, call.stream), (number, call)
        assert tick.new_video == call.first


def test_the_last_video_tells_the_steps() -> None:
    clock = StepClock()
    for time in (9, 7, 5):
        assert clock.tick(time, prints((time,))).steps == USUAL_STEPS
    assert clock.tick(9, prints((1.0,))) == Tick(0, 3, 0, True)


def test_direction_is_learnt_anew_in_each_video() -> None:
    clock = StepClock()
    ticks = [clock.tick(time, {}) for time in (9, 7, 5, 6, 7, 8, 9)]
    assert [tick.step for tick in ticks] == [0, 1, 2, 0, 1, 2, 3]
    assert [tick.new_video for tick in ticks] == [False, False, False, True, False, False, False]


def test_an_input_that_changes_with_the_steps_is_no_stream() -> None:
    """A guidance strength that is lowered, say: two streams, whatever the step."""
    clock = StepClock()
    for step, time in enumerate((9, 8, 7, 6)):
        for stream in range(2):
            inputs = prints((float(step),), (5.0 - step,), (float(stream),))
            assert clock.tick(time, inputs) == Tick(step, USUAL_STEPS, stream)


def test_streams_may_have_different_inputs() -> None:
    """An unconditional call without the image that the conditional one has; the image may change too."""
    clock = StepClock()
    for step, time in enumerate((9, 8, 7, 6)):
        latents, text = (float(step),), (1.0,)
        for stream, image in enumerate(
            [{"image": (2.0 * step,)}, {}, {"image": (2.0 * step,), "mask": (3.0,)}]
        ):
            inputs = {"latents": latents, **image, "text": text}
            assert clock.tick(time, inputs) == Tick(step, USUAL_STEPS, stream)


def test_a_solver_that_repeats_its_first_time_step_ends_as_one_stream() -> None:
    clock = StepClock()
    times = (9, 9, 8, 8, 7, 7)
    ticks = [clock.tick(time, prints((float(i),), (1.0,))) for i, time in enumerate(times)]
    assert [tick.step for tick in ticks] == [0, 0, 1, 1, 2, 2]
    assert [tick.stream for tick in ticks][2:] == [0, 0, 0, 0]


def test_one_step_models_do_not_collect_streams() -> None:
    clock = StepClock()
    ticks = [clock.tick(9, prints((float(i),), (float(-i),))) for i in range(20)]
    assert max(tick.stream for tick in ticks) < MOST_STREAMS
    assert any(tick.new_video for tick in ticks)


def test_without_a_time_step_the_step_is_not_known() -> None:
    clock = StepClock()
    assert [clock.tick(None, {}) for _ in range(3)] == [Tick(None, USUAL_STEPS)] * 3


@given(steps=st.integers(1, 8), streams=st.integers(1, 3))
def test_generation_counts_without_reading(steps: int, streams: int) -> None:
    clock = StepClock()
    for _ in range(2):
        with generation(steps, streams=streams):
            assert not clock.reads()
            for call in range(steps * streams):
                assert clock.tick(None, {}) == Tick(call // streams, steps, call % streams, call == 0)
    assert clock.reads()


def test_generation_without_streams_reads_but_knows_the_steps() -> None:
    clock = StepClock()
    with generation(7):
        assert clock.reads()
        assert clock.tick(5, prints((1.0,))) == Tick(0, 7, 0, True)
        assert clock.tick(4, prints((2.0,))) == Tick(1, 7, 0)


def test_experts_go_on_counting_and_models_side_by_side_do_not() -> None:
    first, second = StepClock(), StepClock()
    with generation(6, streams=2):
        steps = [first.tick(None, {}).step for _ in range(8)] + [second.tick(None, {}).step for _ in range(4)]
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    with generation(3, streams=1):
        assert [clock.tick(None, {}).step for _ in range(3) for clock in (first, second)] == [
            0,
            0,
            1,
            1,
            2,
            2,
        ]


@pytest.mark.parametrize("numbers", [(0,), (-1,), (2.5,), (True,), ("3",), (None,), (3, 0), (3, 1.5)])
def test_generation_refuses_what_is_no_count(numbers: tuple) -> None:
    with pytest.raises(OptionError, match="must be an integer of at least 1, got"), generation(*numbers):
        pass


def run(times: Sequence[float], clock: StepClock | None = None) -> list[Tick]:
    """One video with new latents at every call, and always the same text."""
    clock = clock or StepClock()
    return [clock.tick(time, prints((float(i), 1.0), (1.0, 1.0))) for i, time in enumerate(times)]


def flow(steps: int, shift: float, scale: float = 1000.0) -> list[float]:
    """A shifted flow schedule from pure noise."""
    return [scale * shift * u / (1 + (shift - 1) * u) for u in (1 - k / steps for k in range(steps))]


def bfloat16(times: Sequence[float]) -> list[float]:
    return torch.tensor(times, dtype=torch.float32).bfloat16().tolist()


def dense(ticks: Sequence[Tick], share: float = 0.2) -> int:
    return sum(tick.step < round(share * tick.steps) for tick in ticks if tick.step is not None)


@settings(max_examples=30)
@given(
    steps=st.integers(4, 100),
    shift=st.floats(1, 12),
    scale=st.sampled_from([1.0, 1000.0]),
    rising=st.booleans(),
)
def test_steps_of_a_flow_schedule_are_estimated(steps: int, shift: float, scale: float, rising: bool) -> None:
    times = flow(steps, shift, scale)
    ticks = run([scale - time for time in times] if rising else times)
    assert [tick.step for tick in ticks] == list(range(steps))
    assert abs(ticks[3].steps - steps) <= 0.25 * steps
    assert abs(dense(ticks) - round(0.2 * steps)) <= 1
    assert steps >= 10 or 2 * dense(ticks) <= steps


@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
@pytest.mark.parametrize("kind", ["exact", "bfloat16"])
def test_steps_of_diffusers_schedulers_are_estimated(kind: str) -> None:
    from benchmarks import steps

    for schedule in steps.schedules((4, 8, 20, 30), (1.0, 3.0, 5.0)):
        outcome = steps.run(schedule if kind == "exact" else schedule.rounded())
        assert schedule.steps >= 10 or 2 * outcome.dense_calls <= outcome.calls
        off = abs(outcome.dense_calls - outcome.right_calls)
        if "Heun" in schedule.scheduler:  # two calls are one step
            off //= 2
        elif kind == "exact":
            assert abs(outcome.estimate - schedule.steps) <= max(1, 0.25 * schedule.steps), (
                schedule,
                outcome,
            )
        assert off <= (1 if kind == "exact" else max(2, 0.1 * schedule.steps)), (schedule, outcome)


@pytest.mark.parametrize(("steps", "shift"), [(50, 7.0), (100, 12.0), (50, 12.0)])
def test_steps_that_share_a_rounded_time_step_are_counted(steps: int, shift: float) -> None:
    times = bfloat16(flow(steps, shift))
    assert len(set(times)) < steps
    ticks = run(times)
    assert ticks[steps // 5].step == steps // 5
    assert {tick.stream for tick in ticks[steps // 10 :]} == {0}


def test_no_step_after_a_sparse_one_becomes_dense() -> None:
    for steps in (6, 13, 27, 50):
        for times in (bfloat16(flow(steps, 5.0)), [float(int(time)) for time in flow(steps, 3.0)]):
            ticks = run(times)
            for share in (0.1, 0.2, 0.35, 0.5):
                phases = [tick.step < round(share * tick.steps) for tick in ticks]
                assert phases == sorted(phases, reverse=True)


def test_another_schedule_than_the_last_is_estimated_and_the_same_one_known() -> None:
    clock = StepClock()
    run(flow(8, 5.0), clock)
    assert [tick.steps for tick in run(flow(8, 5.0), clock)] == [8] * 8
    assert abs(run(flow(40, 5.0), clock)[8].steps - 40) <= 1
    run(flow(50, 3.0)[:5], clock)  # ends early
    assert run(flow(50, 3.0), clock)[5].steps == 50


def test_a_schedule_with_churn_is_one_video() -> None:
    """Noise is added before each step, and a solver of second order calls at both ends of it."""
    clock, ticks = StepClock(), []
    for step, time in enumerate(range(1000, 0, -100)):
        for part, at in enumerate((time if step == 0 else time + 30, time - 100 + 1)):
            ticks.append(clock.tick(at, prints((float(step), float(part)), (1.0, 1.0))))
    assert not any(tick.new_video for tick in ticks)
    assert ticks[-1].step == 10


def test_time_steps_staggered_by_frame_count_as_steps() -> None:
    """The largest time step stands still while the first frames begin."""
    clock = StepClock()
    for call in range(22):
        frames = [1000.0 - 100 * min(max(call - 3 * frame, 0), 10) for frame in range(5)]
        time = Times(sum(frames) / 5, max(frames), sum(one * one for one in frames) / 5)
        tick = clock.tick(time, prints((float(call), 1.0), (1.0, 1.0)))
        assert (tick.step, tick.stream, tick.new_video) == (call, 0, False)


def alternate(first: Sequence[Call], second: Sequence[Call], lag: int = 0) -> list[tuple[int, Call]]:
    """(number of the video, call), in turn; the second video begins `lag` calls later."""
    order = [(place, 0, call) for place, call in enumerate(first)]
    order += [(place + lag, 1, call) for place, call in enumerate(second)]
    return [(video, call) for _, video, call in sorted(order, key=lambda one: one[:2])]


def video(start: float, text: float, latents: float, steps: int = 8) -> list[Call]:
    return [
        Call(start - 50 * step, prints((latents, float(step)), (text, 1.0)), step, 0, False)
        for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("first", "second", "lag"),
    [
        (video(900, 1.0, 1.0), video(930, 1.0, 2.0), 0),
        (video(900, 1.0, 1.0), video(930, 2.0, 2.0), 0),
        (video(930, 1.0, 1.0), video(900, 2.0, 2.0), 0),
        (video(900, 1.0, 1.0), video(900, 2.0, 2.0), 2),
        (video(900, 1.0, 1.0), video(900, 1.0, 2.0), 2),
        (video(900, 1.0, 1.0), video(930, 1.0, 2.0), 1),
    ],
    ids=["times", "both", "text", "later, text", "later, times", "later, both"],
)
def test_two_videos_in_turn_are_distinguished(first: list[Call], second: list[Call], lag: int) -> None:
    clock, streams = StepClock(), {0: set(), 1: set()}
    for place, (number, call) in enumerate(alternate(first, second, lag)):
        tick = clock.tick(call.time, call.prints)
        if place > 2 * lag + 4:
            assert tick.step == call.step
            assert not tick.new_video
            streams[number].add(tick.stream)
    assert not streams[0] & streams[1]
    assert len(streams[0]) == len(streams[1]) == 1


def test_videos_that_nothing_distinguishes_keep_no_state() -> None:
    clock = StepClock()
    warn_once.cache_clear()
    with pytest.warns(SparsifyWarning, match="several videos in turn"):
        ticks = [
            clock.tick(call.time, call.prints)
            for _, call in alternate(video(900, 1.0, 1.0), video(900, 1.0, 2.0))
        ]
    assert not any(tick.remembers for tick in ticks[2:])
    assert run(flow(20, 3.0))[5].remembers


def test_a_generation_is_a_handle_that_continues() -> None:
    state = ModelState()
    handles = [generation(6, streams=1), generation(6, streams=1)]
    for step in range(3):
        for handle in handles:
            with handle:
                tick = state.clock.tick(None, {})
                assert (tick.step, tick.new_video) == (step, step == 0)
    with handles[0], generation(2):
        assert state.clock.tick(5, prints((1.0,))) == Tick(0, 2, 0, True)
    with handles[0]:
        assert state.clock.tick(None, {}).step == 3


def test_state_is_apart_by_generation_and_goes_with_the_handle() -> None:
    state, specs = ModelState(), [("centroids", (2,), torch.device("cpu"))]
    handles = [generation(6, streams=1), generation(6, streams=1)]

    def own(number: int) -> torch.Tensor:
        with handles[number]:
            return state.stream(specs, 0).tensors[0]

    own(0).fill_(1.0)
    own(1).fill_(2.0)
    assert own(0).tolist() == [1.0, 1.0]
    with ThreadPoolExecutor(2) as pool:
        assert [one.tolist() for one in pool.map(own, (0, 1))] == [[1.0, 1.0], [2.0, 2.0]]
    kept = weakref.ref(own(1))
    del handles[:]
    gc.collect()
    assert kept() is None
    assert not state._timelines.inside


def test_generations_may_be_left_in_another_order_or_context() -> None:
    def loop(handle: Generation) -> Iterator[None]:
        with handle:
            yield

    first, second = generation(6), generation(7)
    loops = [loop(first), loop(second)]
    for one in loops:
        next(one)
    next(loops[0], None)
    assert opened() is second
    contextvars.Context().run(loops[1].close)
    assert opened() is second
    second.__exit__(None, None, None)
    assert opened() is None
