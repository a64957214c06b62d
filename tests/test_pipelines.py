"""The number of steps comes from the scheduler of the pipeline, or of the loop, that calls the model."""

import gc
import weakref
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsify_compiler
from sparsify_compiler.hosts import pipelines
from sparsify_compiler.testing.videos import Video, latents

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]

TILE: dict[str, Any] = {
    "method": "tile",
    "reference_frames": 2,
    "dense_steps": 0.25,
    "inner_backend": "eager",
}
GRID = (5, 2, 2)


class Pipeline(diffusers.DiffusionPipeline):
    """Two experts, guidance in two calls, and a start within the schedule, as pipelines of diffusers have them."""

    def __init__(self, transformer: Video, transformer_2: Video | None, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        steps: int,
        *,
        first: int = 0,
        scaled: bool = False,
        dtype: torch.dtype = torch.float32,
        seen: Any = None,
    ) -> Tensor:
        scheduler, video = self.scheduler, latents(GRID)
        scheduler.set_timesteps(steps, device="cpu")
        times = scheduler.timesteps[first * scheduler.order :]
        if first and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first * scheduler.order)
        for place, time in enumerate(self.progress_bar(times)):
            low = self.transformer_2 is not None and 2 * place >= len(times)
            model = self.transformer_2 if low else self.transformer
            time_of_model = (1 - time / 1000 if scaled else time).expand(1).to(dtype)
            for sign in (1, -1):
                model(sign * video, time_of_model)
            noise = torch.zeros_like(video)
            video = scheduler.step(noise, time, video, return_dict=False)[0]
        return video


def made(scheduler: Any, *, experts: int = 1) -> Pipeline:
    return Pipeline(Video(1), Video(1, seed=1) if experts == 2 else None, scheduler)


def seen(changed: sparsify_compiler.Applied) -> tuple[int, set[int], int, int]:
    """(dense calls, numbers of steps, first step, last step) of the last video of all models."""
    records = [
        one for model in changed.models for one in model.state.history if one.video == model.state.video
    ]
    numbers = [one.tick.step for one in records if one.tick.step is not None]
    dense = sum(one.phase == "dense" for one in records)
    return dense, {one.tick.steps for one in records}, min(numbers), max(numbers)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 12.0}


@pytest.mark.parametrize(
    ("name", "options", "calls_of_dense_steps"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}, 2 * 4),
        ("UniPCMultistepScheduler", FLOW, 2 * 4),
        ("DPMSolverMultistepScheduler", FLOW, 2 * 4),
        ("DDIMScheduler", {}, 2 * 4),
        ("HeunDiscreteScheduler", {}, 2 * 7),
        ("FlowMatchHeunDiscreteScheduler", {}, 2 * 7),
    ],
)
def test_two_experts_count_the_steps_of_the_scheduler(
    name: str, options: dict[str, Any], calls_of_dense_steps: int
) -> None:
    pipe = made(getattr(diffusers, name)(**options), experts=2)
    changed = sparsify_compiler.apply(pipe, **TILE)
    for _ in range(2):
        pipe(16)
        assert seen(changed) == (calls_of_dense_steps, {16}, 0, 15)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DDIMScheduler"])
def test_a_late_start_has_fewer_steps(name: str) -> None:
    pipe = made(getattr(diffusers, name)())
    changed = sparsify_compiler.apply(pipe, **TILE)
    pipe(20, first=12)
    assert seen(changed) == (4, {8}, 0, 7)


@pytest.mark.parametrize(("how", "steps"), [({"scaled": True}, 12), ({"dtype": torch.bfloat16}, 40)])
def test_time_steps_may_be_scaled_or_rounded(how: dict[str, Any], steps: int) -> None:
    pipe = made(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0))
    changed = sparsify_compiler.apply(pipe, **TILE)
    pipe(steps, **how)
    dense, counts, first, _ = seen(changed)
    assert (counts, first) == ({steps}, 0)
    assert dense == 2 * steps // 4


def test_a_scheduler_may_be_replaced_and_an_open_generation_wins() -> None:
    pipe = made(diffusers.FlowMatchEulerDiscreteScheduler())
    changed = sparsify_compiler.apply(pipe, **TILE)
    pipe(8)
    pipe.scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    pipe(12)
    assert seen(changed) == (2 * 3, {12}, 0, 11)
    with sparsify_compiler.generation(40):
        pipe(12)
    assert seen(changed) == (2 * 10, {40}, 0, 11)


def loop(pipe: Any, times: Iterable[float]) -> None:
    with torch.no_grad():
        for time in times:
            pipe.transformer(latents(GRID), torch.tensor([float(time)]))


def test_a_loop_over_the_time_steps_of_a_scheduler_is_recognised() -> None:
    pipe = SimpleNamespace(transformer=Video(1), scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    changed = sparsify_compiler.apply(pipe.transformer, **TILE)
    pipe.scheduler.set_timesteps(24)
    loop(pipe, pipe.scheduler.timesteps)
    assert seen(changed) == (6, {24}, 0, 23)


def test_a_stale_scheduler_says_nothing() -> None:
    pipe = made(diffusers.FlowMatchEulerDiscreteScheduler())
    changed = sparsify_compiler.apply(pipe, **TILE)
    pipe(4)
    own = [1000 * (1 - step / 64) for step in range(64)]  # 4 of these are times of the scheduler
    loop(pipe, own)
    assert 4 not in seen(changed)[1]
    pipe.scheduler.set_timesteps(4)  # set, but not used
    loop(pipe, own[1:])
    assert 4 not in seen(changed)[1]


def test_nothing_outlives_the_pipeline() -> None:
    pipe = made(diffusers.FlowMatchEulerDiscreteScheduler())
    changed = sparsify_compiler.apply(pipe, **TILE)
    for _ in range(3):
        pipe(4)
    assert len(pipelines._videos) == 1
    model = weakref.ref(pipe.transformer)
    changed.restore()
    del pipe, changed
    gc.collect()
    assert model() is None
    assert not pipelines._videos
