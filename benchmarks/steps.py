"""The clock's estimate of a number of steps against diffusers' schedulers: `python -m benchmarks.steps --out FILE`.

Each schedule runs as the first video of a clock, and nothing states its number of steps. Time steps come as the
scheduler gives them, and rounded to bfloat16. No model runs.
"""

import argparse
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
    right = round(DENSE_STEPS * schedule.steps)
    second_order = "Heun" in schedule.scheduler
    right_calls = max(2 * right - 1, 0) if second_order else right
    return Outcome(estimate or tick.steps, dense, right_calls, len(schedule.times))


def summary(cases: Sequence[tuple[Schedule, Outcome]]) -> dict[str, Any]:
    """Shares of the cases that are right, and the worst ones."""

    def error(case: tuple[Schedule, Outcome]) -> float:
        return abs(case[1].estimate - case[0].steps) / case[0].steps

    def off(case: tuple[Schedule, Outcome]) -> int:
        return abs(case[1].dense_calls - case[1].right_calls)

    worst, farthest = max(cases, key=error), max(cases, key=off)
    few = [case for case in cases if case[0].steps < 10]
    return {
        "cases": len(cases),
        "estimate_within_25_percent": round(sum(error(case) <= 0.25 for case in cases) / len(cases), 4),
        "worst_estimate": {"steps": worst[0].steps, "shift": worst[0].shift, "estimate": worst[1].estimate},
        "dense_calls_within_1": round(sum(off(case) <= 1 for case in cases) / len(cases), 4),
        "dense_calls_within_2": round(sum(off(case) <= 2 for case in cases) / len(cases), 4),
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
    for schedule in schedules():
        for kind, one in (("exact", schedule), ("bfloat16", schedule.rounded())):
            found.setdefault((one.scheduler, kind), []).append((one, run(one)))
    result = {
        kind: {name: summary(cases) for (name, of), cases in found.items() if of == kind}
        for kind in ("exact", "bfloat16")
    }
    for kind, schedulers in result.items():
        for name, numbers in schedulers.items():
            print(kind, name, numbers)
    if out is not None:
        out.write_text(json.dumps({"dense_steps": DENSE_STEPS, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
