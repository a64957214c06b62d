"""The clock's estimate of a number of steps against diffusers' schedulers: `python -m benchmarks.steps --out FILE`.

Each schedule runs as the first video of a clock, and nothing states its number of steps. Time steps come as the
scheduler gives them, and rounded to bfloat16. No model runs.

Rounded time steps do not always show the number of steps in time. So each result has a bound: the most cases that
any estimator can get right within one dense step, where all time steps of all schedules are known to it. One bound
is for the schedules of this benchmark; the other is for as likely schedules of all numbers of steps from 4 to 100.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch

from sparsify_compiler.plan import GraphPlan
from sparsify_compiler.runtime.clock import StepClock

STEPS = (4, 6, 8, 10, 16, 20, 30, 40, 50, 75, 100)
SHIFTS = (1.0, 2.7, 3.0, 5.0, 7.0, 8.0, 12.0)
DENSE_STEPS = 0.2


@dataclass(frozen=True, slots=True)
class Schedule:
    """The time steps of the calls of one video."""

    scheduler: str
    steps: int
    shift: float
    times: tuple[float, ...]

    def rounded(self) -> "Schedule":
        """The same in bfloat16."""
        times = torch.tensor(self.times, dtype=torch.float32).bfloat16().tolist()
        return Schedule(self.scheduler, self.steps, self.shift, tuple(times))


@dataclass(frozen=True, slots=True)
class Outcome:
    """A video by the clock."""

    estimate: int
    """Number of steps that the clock gives at the first sparse call, from the third call on."""
    dense_calls: int
    right_calls: int
    """Calls in the first steps that are dense where the number of steps is known."""
    calls: int
    calls_of_step: int
    """Calls of each step but the first one."""

    @property
    def off(self) -> int:
        """Dense steps too many or too few."""
        return -(-abs(self.dense_calls - self.right_calls) // self.calls_of_step)


def schedules(steps: Sequence[int] = STEPS, shifts: Sequence[float] = SHIFTS) -> Iterator[Schedule]:
    """The schedules of diffusers' flow and discrete schedulers."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for number in steps:
        for shift in shifts:
            made = {
                "FlowMatchEuler": FlowMatchEulerDiscreteScheduler(shift=shift),
                "FlowMatchHeun": FlowMatchHeunDiscreteScheduler(shift=shift),
                "UniPC": UniPCMultistepScheduler(flow_shift=shift, **flow),
                "DPM++": DPMSolverMultistepScheduler(flow_shift=shift, **flow),
            }
            for name, scheduler in made.items():
                yield _schedule(name, scheduler, number, shift)
            sigmas = torch.linspace(1, 1 / number, number, dtype=torch.float32).tolist()
            yield _schedule("FlowMatchEuler, sigmas", made["FlowMatchEuler"], number, shift, sigmas=sigmas)
        for spacing in ("leading", "trailing", "linspace"):
            yield _schedule(f"DDIM, {spacing}", DDIMScheduler(timestep_spacing=spacing), number, 1.0)
            dpm = DPMSolverMultistepScheduler(timestep_spacing=spacing)
            yield _schedule(f"DPM++, {spacing}", dpm, number, 1.0)


def _schedule(name: str, scheduler: Any, steps: int, shift: float, **given: Any) -> Schedule:
    scheduler.set_timesteps(**(given or {"num_inference_steps": steps}))
    return Schedule(name, steps, shift, tuple(float(time) for time in scheduler.timesteps))


def run(schedule: Schedule) -> Outcome:
    """Call a clock at every time step, with other latents and the same text."""
    clock, plan = StepClock(), GraphPlan(dense_steps=DENSE_STEPS)
    estimate, dense = 0, 0
    for number, time in enumerate(schedule.times):
        tick = clock.tick(time, {"latents": (float(number), 1.0), "text": (1.0, 1.0)})
        runs_dense = plan.runs_dense(tick.step, tick.steps)
        dense += runs_dense
        if number <= 2 or not (estimate or runs_dense):
            estimate = 0 if runs_dense or number < 2 else tick.steps
    return Outcome(
        estimate or tick.steps, dense, right_calls(schedule), len(schedule.times), calls_of_step(schedule)
    )


def calls_of_step(schedule: Schedule) -> int:
    """Calls of each step but the first one."""
    return 2 if "Heun" in schedule.scheduler else 1


def right_calls(schedule: Schedule) -> int:
    """Calls in the first steps that are dense where the number of steps is known."""
    count = calls_of_step(schedule)
    return max(count * (round(DENSE_STEPS * schedule.steps) - 1) + 1, 0)


def bound(cases: Sequence[Schedule]) -> float:
    """The largest share of the cases that any estimator can get right within one dense step.

    At each call it knows the time steps so far and all cases. It ends the dense phase or continues it.
    """

    def right(case: Schedule, calls: int) -> bool:
        return abs(calls - right_calls(case)) <= calls_of_step(case)

    def best(group: Sequence[Schedule], call: int) -> int:
        """The most of these cases, which have the same time steps before this call and are dense so far."""
        alike: dict[float | None, list[Schedule]] = {}
        for case in group:
            alike.setdefault(case.times[call] if call < len(case.times) else None, []).append(case)
        total = 0
        for time, some in alike.items():
            ends = sum(right(case, call) for case in some)
            done = time is None or ends == len(some) or all(right_calls(case) < call - 1 for case in some)
            total += ends if done else max(ends, best(some, call + 1))
        return total

    return round(best(cases, 0) / len(cases), 4)


def summary(cases: Sequence[tuple[Schedule, Outcome]]) -> dict[str, Any]:
    """Shares of the cases that are right, and the worst ones."""

    def error(case: tuple[Schedule, Outcome]) -> float:
        return abs(case[1].estimate - case[0].steps) / case[0].steps

    worst, farthest = max(cases, key=error), max(cases, key=lambda case: case[1].off)
    few = [case for case in cases if case[0].steps < 10]
    return {
        "cases": len(cases),
        "estimate_within_25_percent": round(sum(error(case) <= 0.25 for case in cases) / len(cases), 4),
        "worst_estimate": {"steps": worst[0].steps, "shift": worst[0].shift, "estimate": worst[1].estimate},
        "dense_steps_within_1": round(sum(one.off <= 1 for _, one in cases) / len(cases), 4),
        "dense_steps_within_2": round(sum(one.off <= 2 for _, one in cases) / len(cases), 4),
        "worst_dense_calls": {
            "steps": farthest[0].steps,
            "shift": farthest[0].shift,
            "dense": farthest[1].dense_calls,
            "right": farthest[1].right_calls,
        },
        "under_10_steps_at_least_half_sparse": round(
            sum(2 * one.dense_calls <= one.calls for _, one in few) / max(len(few), 1), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    out = parser.parse_args().out
    found: dict[tuple[str, str], list[tuple[Schedule, Outcome]]] = {}
    began, calls = process_time(), 0
    for schedule in schedules():
        for kind, one in (("exact", schedule), ("bfloat16", schedule.rounded())):
            found.setdefault((one.scheduler, kind), []).append((one, run(one)))
            calls += len(one.times)
    milliseconds = 1e3 * (process_time() - began) / calls
    every = list(schedules(range(4, 101)))
    result = {}
    for kind in ("exact", "bfloat16"):
        groups = {name: cases for (name, of), cases in found.items() if of == kind}
        cases = [case for group in groups.values() for case in group]
        known = [schedule for schedule, _ in cases]
        others = every if kind == "exact" else [one.rounded() for one in every]
        bounds = {"bound": bound(known), "bound_for_all_numbers_of_steps": bound(others)}
        result[kind] = {"all": summary(cases) | bounds} | {n: summary(group) for n, group in groups.items()}
    for kind, schedulers in result.items():
        for name, numbers in schedulers.items():
            print(kind, name, numbers)
    if out is not None:
        cost = {"cpu_milliseconds_of_a_call": round(milliseconds, 2)}
        out.write_text(json.dumps({"dense_steps": DENSE_STEPS, **cost, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
