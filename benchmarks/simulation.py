"""Predicted cost of models on several ranks: `python -m benchmarks.simulation --out FILE`.

The file has three kinds of cases.

`measured`: a small Wan on 1 to 4 ranks of this machine (gloo, one thread each), next to the prediction from rates
that the ranks measure on other tensors. The ranks share few cores with each other and with whatever else runs, so
seconds are those of CPU time, of the rank that takes most, and so are all rates. Each case has a pair of medians of
the same calls in turns: a difference below that of the pair is noise. Wall time has its own pair. Its prediction
takes the cores for idle otherwise: with more ranks than cores, the rates of a rank fall by ranks / cores.

`h100`: Wan 2.1 14B on 1 to 1,024 H100s, all from assumed rates (`H100`).

`dsv`: a Wan of 2.7 billion parameters on 32 and 128 H100s, dense and at a density of 0.1, next to the speed-ups
that the paper of DSV (arXiv 2502.07590) measured on up to 128 GPUs.
"""

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.harness import write_json
from sparsify_compiler import explain
from sparsify_compiler._torch import process_group
from sparsify_compiler.clusters.counting import count
from sparsify_compiler.clusters.files import cluster_of
from sparsify_compiler.clusters.planning import FORMS, with_densities
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime.cost import Cluster, Mesh, Prediction, choose_form, predict
from sparsify_compiler.runtime.rates import measured_cluster
from sparsify_compiler.testing.ranks import Pool

SMALL = {
    "num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4, "text_dim": 32,
    "freq_dim": 64, "ffn_dim": 1024, "num_layers": 2,
}  # fmt: skip
GRID = (9, 16, 16)
"""2,304 tokens."""
H100 = {
    "hosts": 128, "gpus": 8, "memory": 80, "tflops": 600, "attention_tflops": 600, "sparse_tflops": 400,
    "memory_bandwidth": 3000, "inside": 400, "between": 45, "latency": 30,
}  # fmt: skip
"""Assumed, in the units of `sparsify plan-parallel`: what kernels and NCCL reach, not what the maker states."""
REMOTE = 0.33
"""Share of the remote keys that a rank reads: of method `cubes` on the evaluation model, with 4 ranks."""
GRIDS = {75_600: (21, 45, 80), 520_000: (65, 80, 100)}
DENSITIES = (1.0, 0.2, 0.1)


def wan(grid: Sequence[int], *, dtype: torch.dtype = torch.bfloat16, text: int = 512, **config: Any) -> Any:
    """(model, inputs of a call); on the device that is the default."""
    from diffusers import WanTransformer3DModel

    frames, height, width = grid
    model = nn.Module.to(WanTransformer3DModel(**config), dtype).eval()
    inputs = {
        "hidden_states": torch.randn(1, model.config.in_channels, frames, 2 * height, 2 * width, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, text, model.config.text_dim, dtype=dtype),
        "return_dict": False,
    }
    return model, inputs


def small() -> Any:
    """The small Wan of the measured cases."""
    torch.manual_seed(0)
    return wan(GRID, dtype=torch.float32, text=64, **SMALL)


def measure(ranks: Ranks, method: str, calls: int) -> tuple[Cluster, list[float], list[float]]:
    """(the measured rates, CPU seconds of each call, wall seconds of each call) of this rank."""
    from torch.distributed.device_mesh import DeviceMesh

    rates = measured_cluster(ranks, "float32", clock=time.process_time)
    model, inputs = small()
    options: dict[str, Any] = {
        "method": method, "inner_backend": "eager", "dense_steps": 0, "dense_layers": 0,
    }  # fmt: skip
    if ranks.size > 1:
        mesh = DeviceMesh.from_group(process_group(ranks.group), "cpu")
        options["parallel"] = {"form": "hcp", "mesh": mesh}
    compiled = torch.compile(model, backend="sparsify", options=options, dynamic=False)
    cpu, wall = list[float](), list[float]()
    with torch.no_grad():
        for call in range(calls + 2):
            begin = time.process_time(), time.perf_counter()
            compiled(**inputs)
            if call >= 2:
                cpu.append(time.process_time() - begin[0])
                wall.append(time.perf_counter() - begin[1])
    torch._dynamo.reset()
    return rates, cpu, wall


def measured(calls: int, done: Collection[tuple[str, int]], seconds: float) -> Iterator[dict[str, Any]]:
    """The cases of this machine, without those of (method, ranks) that are done.

    No case but the first begins after a number of seconds.
    """
    from benchmarks import simulation  # ranks find functions by the name of their module, not in `__main__`

    with torch.device("meta"):
        model, inputs = small()
    counted = count(model, inputs, fuses=False)
    cores, end = len(os.sched_getaffinity(0)), math.inf
    with Pool(4, timeout=300) as pool:
        for method in ("dense", "tile"):
            options = {"method": method, "dense_layers": 0}
            sites = explain(model, options=options, device="cpu", **inputs).plans
            found_densities = {one.site.name: [one.density or 1.0] for one in sites}
            work = with_densities(counted, {name: found_densities[name] for name in counted.names})
            for size in range(1, 5):
                if (method, size) in done or time.monotonic() > end:
                    continue
                end = min(end, time.monotonic() + seconds)
                found = pool.run(size, simulation.measure, method, calls)
                rates = found[0][0]
                predicted = predict(work, Mesh(size, 1), rates)
                slowest = max(found, key=lambda one: median(one[1]))
                cpu, wall = slowest[1], [max(each) for each in zip(*(one[2] for one in found), strict=True)]
                yield {
                    "what": "measured", "method": method, "ranks": size, "density": work.attentions[0].densities[0],
                    "predicted_seconds": round(predicted.seconds, 4),
                    "cpu_seconds": round(median(cpu), 4),
                    "ratio": round(predicted.seconds / median(cpu), 3),
                    "cpu_pair": [round(median(cpu[i::2]), 4) for i in (0, 1)],
                    "wall_seconds": round(median(wall), 4),
                    "wall_predicted": round(predicted.seconds * max(1.0, size / cores), 4),
                    "wall_pair": [round(median(wall[i::2]), 4) for i in (0, 1)],
                    "parts": {name: round(value, 4) for name, value in predicted.parts.items()},
                    "balance": round(predicted.balance, 3),
                    "gflops_products": round(rates.products / 1e9, 1),
                    "gflops_attention": round(rates.attention / 1e9, 1),
                    "gflops_sparse": round(rates.sparse / 1e9, 1),
                    "gbytes_link": round(rates.inside / 1e9, 2) if size > 1 else None,
                }  # fmt: skip


def h100() -> Iterator[dict[str, Any]]:
    """The cases of Wan 14B."""
    cluster = cluster_of(H100)
    for tokens, grid in GRIDS.items():
        with torch.device("meta"):
            model, inputs = wan(grid)
        counted = count(model, inputs)
        assert counted.work.tokens == tokens
        for density in DENSITIES:
            work = with_densities(counted, density, 1.0 if density == 1 else REMOTE)
            alone = predict(work, Mesh(1, 1), cluster)
            for power in range(11):
                size = 1 << power
                best = choose_form(work, cluster, size, FORMS).predictions if power else (alone,)
                for one in best:
                    yield {"what": "h100", "tokens": tokens, "density": density, **as_json(one, alone)}


def dsv() -> Iterator[dict[str, Any]]:
    """The cases of a model of DSV's size."""
    cluster = cluster_of(H100)
    for size, grid in ((32, (26, 50, 100)), (128, (65, 80, 100))):
        with torch.device("meta"):
            model, inputs = wan(grid, num_attention_heads=20, ffn_dim=10240, num_layers=25)
        counted = count(model, inputs)
        seconds = {}
        for density in (1.0, 0.1):
            work = with_densities(counted, density, 1.0 if density == 1 else REMOTE)
            best = choose_form(work, cluster, size, FORMS).predictions[0]
            seconds[density] = best.seconds, best.mesh
        yield {
            "what": "dsv",
            "parameters": sum(one.numel() for one in model.parameters()),
            "tokens": counted.work.tokens,
            "ranks": size,
            "dense_seconds": round(seconds[1.0][0], 4),
            "dense_mesh": str(seconds[1.0][1]),
            "sparse_seconds": round(seconds[0.1][0], 4),
            "sparse_mesh": str(seconds[0.1][1]),
            "speedup_predicted_forward": round(seconds[1.0][0] / seconds[0.1][0], 2),
            "speedup_of_paper_training": [2.1, 3.02],
            "speedup_of_paper_inference": [2.0, 3.5],
        }


def as_json(one: Prediction, alone: Prediction) -> dict[str, Any]:
    """A prediction, next to one process."""
    return {
        "ranks": one.mesh.size,
        "form": one.mesh.form,
        "mesh": str(one.mesh),
        "seconds": round(one.seconds, 4),
        "speedup": round(alone.seconds / one.seconds, 2),
        "sent_gbytes": round(one.sent / 1e9, 3),
        "memory_gbytes": round(one.memory / 1e9, 1),
        "fits": one.fits,
        "balance": round(one.balance, 2),
        "bound": one.bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=["measured", "h100", "dsv"], default=["measured", "h100", "dsv"]
    )
    parser.add_argument("--calls", type=int, default=6, help="calls of each measured case")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="no measured case but the first begins after this time",
    )
    parser.add_argument("--out", type=Path, help="JSON file; cases that it has are left out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = json.loads(options.out.read_text())["cases"] if options.out and options.out.exists() else []
    done = {(one["method"], one["ranks"]) for one in cases if one["what"] == "measured"}
    kinds = {"measured": lambda: measured(options.calls, done, options.seconds), "h100": h100, "dsv": dsv}
    whole = {one["what"] for one in cases} - {"measured"}
    for kind in options.only:
        for case in kinds[kind]() if kind not in whole else ():
            cases.append(case)
            print(case, flush=True)
            if options.out:
                write_json(options.out, cases, lines=True, h100=H100, remote=REMOTE, model="Wan 2.1 14B")


if __name__ == "__main__":
    main()
