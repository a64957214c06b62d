"""The clock against loops whose steps, streams and videos are known."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify_compiler import OptionError
from sparsify_compiler.runtime.clock import MOST_STREAMS, USUAL_STEPS, StepClock, Tick, generation

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
