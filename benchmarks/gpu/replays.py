"""Whole models under CUDA graphs, as `torch.compile` makes them with `mode="reduce-overhead"`."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config

from benchmarks.gpu.device import Device
from benchmarks.gpu.runner import Case
from benchmarks.gpu.sites import SAME, difference
from sparsify_compiler import generation
from sparsify_compiler.backend import sparsify
from sparsify_compiler.testing.videos import Video, latents

DENSE, VIDEOS = 2, 3
"""Dense steps of a video, and videos."""
OPTIONS: dict[str, dict[str, Any]] = {
    "tile": {"reference_frames": 1},
    "cubes": {"cube": (2, 2, 2), "query_cube": (2, 2, 4)},
    "svg2": {"q_clusters": 8, "kv_clusters": 16, "kmeans_iters": (4, 2)},
    "svg2, target": {"q_clusters": 8, "kv_clusters": 16, "kmeans_iters": (4, 2), "max_error": 0.1},
    "keys": {"kv_budget": 0.2, "q_clusters": 8, "kmeans_iters": (4, 2)},
}


def cases(device: Device) -> Iterable[Case]:
    """A case for each method."""
    for name in device.size(tuple(OPTIONS), ("svg2",)):
        yield f"{name} in graphs", partial(check, device, name)


def check(device: Device, name: str) -> dict[str, Any]:
    """Check that graphs give the outputs of the same programs without graphs, and that later videos replay them."""
    plain, _ = videos(device, name, None)
    outputs, recorded = videos(device, name, "reduce-overhead")
    skipped = counters["inductor"]["cudagraph_skips"]
    assert not skipped, f"PyTorch made no graph of {skipped} programs"
    assert recorded[1] == recorded[2], f"a later video is recorded anew: {recorded}"
    assert device.size(recorded[0] > 0, True), "nothing was recorded"
    worst = max(map(difference, outputs, plain))
    assert worst <= SAME[torch.float32], f"{worst:.1e} from the same programs without graphs"
    return {"off": worst, "recorded": recorded}


def videos(device: Device, name: str, mode: str | None) -> tuple[list[Tensor], list[int]]:
    """(outputs, inputs of recorded graphs that a replay copies, after each video)."""
    torch._dynamo.reset()
    counters.clear()
    grid: tuple[int, int, int] = device.size((8, 16, 16), (2, 4, 4))
    layers, width = device.size((4, 128), (1, 32))
    steps = device.size(5, 3)
    model = Video(layers, width).eval().to(device.name)
    options: dict[str, Any] = {
        "method": name.split(",")[0],
        **OPTIONS[name],
        "dense_layers": 0,
        "guard": "off",
    }
    options |= {"provider": "triton", "dense_steps": DENSE, "inner_backend": device.size("inductor", "eager")}
    backend: Any = partial(sparsify, mode=mode, options=options)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    outputs, recorded = [], []
    with config.patch({"triton.cudagraph_or_error": device.size(True, False)}):
        for video in range(VIDEOS):
            with generation(steps, 1):
                for step in range(steps):
                    torch.compiler.cudagraph_mark_step_begin()
                    given = latents(grid, seed=10 * video + step), torch.tensor([900.0 - 100 * step])
                    outputs.append(compiled(*(one.to(device.name) for one in given)).clone())
            recorded.append(counters["inductor"]["cudagraph_recorded_non_static_inputs"])
    return outputs, recorded
