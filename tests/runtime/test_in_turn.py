"""Several videos by one model, in turn, in threads and in tasks: each is the video made alone, bit for bit."""

import asyncio
import contextvars
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import islice, zip_longest
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._subclasses import FakeTensor

import sparsify_compiler
from sparsify_compiler import generation
from sparsify_compiler.runtime.clock import Generation, opened
from sparsify_compiler.runtime.program import Program
from sparsify_compiler.testing.videos import Video, latents

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]

GRID = (3, 4, 5)
STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "tile": {"reference_frames": 1},
    "svg2": {"q_clusters": 3, "kv_clusters": 6, "kmeans_iters": (3, 1)},
}
OPTIONS: dict[str, Any] = {"dense_layers": 0, "dense_steps": 1, "inner_backend": "eager"}
HOSTS = "bare", "whole", "regional"


def prepared(host: str, method: str = "svg2", layers: int = 2, **others: Any) -> Callable[..., Tensor]:
    """A small model that is compiled by itself, or applied whole or by blocks."""
    model = Video(layers, dim=16)
    options = {"method": method} | METHODS[method] | OPTIONS | others
    if host == "bare":
        return torch.compile(model, backend="sparsify", options=options)
    sparsify_compiler.apply(model, regional=host == "regional", **options)
    return model


def loop(model: Callable[..., Tensor], seed: int, handle: Generation) -> Iterator[Tensor]:
    """The steps of one video, on latents that depend on all steps before."""
    video = latents(GRID, seed=seed)
    for step in range(STEPS):
        with handle, torch.no_grad():
            out = model(video, torch.tensor([900.0 - 100 * step]))
        yield out
        video = video + 0.3 * out.mean() + 0.1 * torch.sin(video * (1 + step))


@cache
def alone(host: str, method: str, seed: int) -> list[Tensor]:
    """The same video by a model that makes no other."""
    return list(loop(prepared(host, method), seed, generation(STEPS)))


def same(got: list[list[Tensor]], host: str, method: str = "svg2") -> bool:
    """Whether the videos of the seeds 0, 1, ... are those made alone, bit for bit."""
    expected = [alone(host, method, seed) for seed in range(len(got))]
    return all(
        len(one) == len(other) and all(map(torch.equal, one, other))
        for one, other in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_in_turn(host: str, method: str) -> None:
    model = prepared(host, method)
    loops = [loop(model, seed, generation(STEPS)) for seed in range(3)]
    ahead = next(loops[2])
    turns = zip_longest(*loops)
    got = [[out for out in one if out is not None] for one in zip(*turns, strict=True)]
    got[2].insert(0, ahead)
    assert same(got, host, method)


def test_a_mixed_state_would_show() -> None:
    """The centroids of the step before change the bits, so equal bits prove a state of its own."""
    kept = alone("whole", "svg2", 0)
    model, video, cold = prepared("whole"), latents(GRID, seed=0), []
    for out in kept:
        with generation(STEPS), torch.no_grad():
            cold.append(model(video, torch.tensor([900.0 - 100 * len(cold)])))
        video = video + 0.3 * out.mean() + 0.1 * torch.sin(video * len(cold))
    assert torch.equal(cold[0], kept[0])
    assert not any(map(torch.equal, cold[2:], kept[2:]))


@pytest.mark.parametrize(
    ("host", "inner"), [(host, "eager") for host in HOSTS] + [(host, "aot_eager") for host in HOSTS[1:]]
)
def test_in_two_threads(host: str, inner: str) -> None:
    """The first calls of both compile at the same time. With AOTAutograd, PyTorch replaces the calls of modules."""
    model, together = prepared(host, inner_backend=inner), threading.Barrier(2)

    def one(seed: int) -> list[Tensor]:
        out = []
        for step in loop(model, seed, generation(STEPS)):
            out.append(step)
            together.wait(60)
        return out

    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(one, range(2)))
    assert same(got, host)


def test_in_tasks() -> None:
    """A handle stays open while its task waits."""
    model = prepared("whole")

    async def one(seed: int) -> list[Tensor]:
        out = []
        with generation(STEPS) as handle:
            for step in loop(model, seed, handle):
                out.append(step)
                await asyncio.sleep(0)
        return out

    async def both() -> list[list[Tensor]]:
        return await asyncio.gather(one(0), one(1))

    assert same(asyncio.run(both()), "whole")


def test_each_step_in_another_thread() -> None:
    model, handle, got = prepared("regional"), generation(STEPS), []
    steps = loop(model, 0, handle)
    for _ in range(STEPS):
        thread = threading.Thread(target=lambda: got.append(next(steps)))
        thread.start()
        thread.join()
    assert same([got], "regional")


def test_an_error_ends_a_block_and_not_the_video() -> None:
    model, handle, got = prepared("whole"), generation(STEPS), []
    steps = loop(model, 0, handle)

    def interrupted() -> None:
        with handle:
            got.append(next(steps))
            raise KeyboardInterrupt

    for _ in range(STEPS):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert opened() is None
    assert same([got], "whole")


def test_nested_and_long_after() -> None:
    """A video within the block of another one; the other goes on after many more, with handles and without."""
    model, outer = prepared("whole"), generation(STEPS)
    steps = loop(model, 0, outer)
    got = [next(steps)]
    with outer:
        within = list(loop(model, 1, generation(STEPS)))
        got.append(next(steps))
    for seed in range(2, 5):
        for _ in loop(model, seed, generation(STEPS)):
            model(latents(GRID, seed=9), torch.tensor([500.0]))
    assert same([[*got, *steps], within], "whole")


def all_programs() -> list[Program]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is Program]


def held(codes: list[CodeType], earlier: list[Program]) -> dict[str, int]:
    """The amounts of what may grow from video to video. `earlier`: programs of other tests."""
    programs = [one for one in all_programs() if not any(one is other for other in earlier)]
    objects = gc.get_objects()
    tensors = [one for one in objects if issubclass(type(one), Tensor) and type(one) is not FakeTensor]
    return {
        "objects": len(objects),
        "tensor bytes": sum(one.untyped_storage().nbytes() for one in tensors),
        "context variables": len(contextvars.copy_context()),
        "entries of Dynamo": sum(len(_debug_get_cache_entry_list(code)) for code in codes),
        "variants": sum(len(plan.compiled) for one in programs for plan in (one.own, *one._planned.values())),
    }


@pytest.mark.alone
@pytest.mark.parametrize("host", ["regional", pytest.param("bare", marks=pytest.mark.nightly)])
def test_nothing_grows_with_the_number_of_videos(host: str) -> None:
    codes: list[CodeType] = []
    earlier = all_programs()
    hook = register_bytecode_hook(lambda code, _: codes.append(code))
    model, after = prepared(host, layers=1), {}
    for number in range(1, 201):
        for _ in islice(loop(model, number, generation(STEPS)), 2):
            pass
        if number in (20, 200):
            after[number] = held(codes, earlier)
    hook.remove()
    assert after[20]["entries of Dynamo"]
    assert after[20]["variants"] == 2
    grown = {name: after[200][name] - after[20][name] for name in after[20]}
    assert grown.pop("objects") < 180, "less than one object for each video"
    assert all(more <= 0 for more in grown.values()), after
