"""Two ranks against one process, in real time on a CPU: `python -m benchmarks.ranks --out FILE`.

A Wan with 9,216 tokens and the head dim of the real models runs in one process with one thread, and on two gloo
ranks with one thread each, on a machine with two cores. The calls take turns: one process, the same again, both
ranks; every other round in reverse. The ratio of the two runs of one process is the noise of the machine: where it
is not within 3 %, wall times mean nothing, and the case says so. CPU time is counted for each rank, apart for the
exchanges: packing, sending, receiving and unpacking, with the threads of gloo. The outputs of both ways are
compared first.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import sparsify_compiler
from benchmarks.harness import write_json
from sparsify_compiler import _torch
from sparsify_compiler.parallel import ops
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.ranks import Pool

METHODS: dict[str, dict[str, Any]] = {
    "tile": {"reference_frames": 1},
    "svg2": {"far_field": "drop", "top_p": 0.3},
}
"""Method -> the options with which it reads about a third of all keys, with random weights too."""
HEADS, HEAD_DIM, FFN = 4, 128, 2976
"""A third of Wan 2.1 1.3B, which has 12 heads of 128 and an inner layer of 8,960."""
GRID = (9, 64, 64)
"""Frames, rows and columns of the latents, in patches of 1 x 2 x 2."""
TOKENS = GRID[0] * GRID[1] * GRID[2] // 4
NOISE = 0.03
"""Largest difference of two equal runs with which wall times are quoted."""
ROUNDING = 1e-5
ASKED = 1.7


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--method", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--inner-backend", default="inductor", help="the backend of both ways")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for method in given.method:
        options = {
            "method": method,
            **METHODS[method],
            "dense_steps": 0,
            "dense_layers": 0,
            "inner_backend": given.inner_backend,
        }
        with Pool(2, timeout=1200) as pool:
            cases.append(case(method, pool.run(2, measure, options, given.layers, given.rounds)))
        print(cases[-1], flush=True)
        if given.out:
            model = {
                "tokens": TOKENS,
                "layers": given.layers,
                "heads": HEADS,
                "head_dim": HEAD_DIM,
                "ffn": FFN,
            }
            write_json(given.out, cases, model=model, rounds=given.rounds, noise=NOISE, asked=ASKED)
    raise SystemExit(any(one["difference"] > ROUNDING for one in cases))


def case(method: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of one method, from the measurements of both ranks; seconds of a call."""
    first = ranks[0]
    wall = {way: median(first[way]["wall"]) for way in ("alone", "again", "ranks")}
    noise = abs(wall["alone"] / wall["again"] - 1)
    alone = median(first["alone"]["computing"] + first["again"]["computing"])
    cpu = [{what: median(one["ranks"][what]) for what in ("computing", "communicating")} for one in ranks]
    return {
        "method": method,
        "density": round(first["density"], 3),
        "difference": max(one["difference"] for one in ranks),
        "wall": {way: round(seconds, 3) for way, seconds in wall.items()},
        "noise": round(noise, 3),
        "quoted": noise <= NOISE,
        "speed_up": round((wall["alone"] + wall["again"]) / 2 / wall["ranks"], 3),
        "cpu_alone": round(alone, 3),
        "cpu_of_ranks": [{what: round(seconds, 4) for what, seconds in one.items()} for one in cpu],
        "speed_up_by_cpu_time": round(alone / max(sum(one.values()) for one in cpu), 3),
        "megabytes_sent": [round(one["bytes"] / 1e6, 3) for one in ranks],
    }


def measure(ranks: Ranks, options: dict[str, Any], layers: int, rounds: int) -> dict[str, Any]:
    """Times of this rank: way -> what -> seconds of each round. Rank 0 is the one process too."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=FFN, num_layers=layers
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, *GRID),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "return_dict": False,
    }
    group = _torch.process_group(ranks.group)
    mesh = DeviceMesh.from_group(group, "cpu")
    parallel = {"form": "hcp", "mesh": mesh, "timeout": 600}
    here: dict[str, Callable[[], Any]] = {"ranks": _calls(model, inputs, {**options, "parallel": parallel})}
    exchanged = _Exchanged()
    times: dict[str, dict[str, list[float]]] = {
        way: {"wall": [], "computing": [], "communicating": []} for way in ("alone", "again", "ranks")
    }
    with torch.no_grad(), exchanged.counted():
        wanted = None
        if ranks.rank == 0:
            here["alone"] = here["again"] = alone = _calls(_copy(model), inputs, options)
            wanted = alone()
        dist.barrier(group)
        output = here["ranks"]()
        expected = output.clone() if wanted is None else wanted
        dist.broadcast(expected, group=group, group_src=0)
        exchanged.bytes = 0
        for number in range(rounds):
            order = ("alone", "again", "ranks")
            for way in order if number % 2 else reversed(order):
                dist.barrier(group)
                exchanged.seconds, cpu, wall = 0.0, time.process_time(), time.perf_counter()
                if way in here:
                    here[way]()
                cpu = time.process_time() - cpu
                dist.barrier(group)
                times[way]["wall"].append(time.perf_counter() - wall)
                times[way]["computing"].append(cpu - exchanged.seconds)
                times[way]["communicating"].append(exchanged.seconds)
    density = sparsify_compiler.stats(model).density
    return {
        **times,
        "bytes": exchanged.bytes / rounds,
        "difference": float((output - expected).abs().max() / expected.abs().max()),
        "density": density,
    }


def _copy(model: Any) -> Any:
    """The same model with tensors of its own, so that each way has its own state."""
    other = type(model).from_config(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def _calls(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A function that makes the next call of a generation, one step further with each."""
    compiled = torch.compile(model, backend="sparsify", options=options, dynamic=False)
    steps = iter(range(999, 0, -1))

    def call() -> torch.Tensor:
        output: torch.Tensor = compiled(**inputs, timestep=torch.tensor([next(steps)]))[0]
        return output

    return call


class _Exchanged:
    """The CPU time and the bytes of this rank's exchanges."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, exchanges are counted."""
        transfer, all_to_all = ops.transfer, _torch.all_to_all

        def timed(*args: Any) -> None:
            begin = time.process_time()
            transfer(*args)
            self.seconds += time.process_time() - begin

        def measured(received: torch.Tensor, sent: torch.Tensor, *others: Any) -> None:
            self.bytes += sent.nbytes
            all_to_all(received, sent, *others)

        with patch.object(ops, "transfer", timed), patch.object(_torch, "all_to_all", measured):
            yield


if __name__ == "__main__":
    main()
