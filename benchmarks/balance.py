"""The balance of heads over ranks, and its cost: `python -m benchmarks.balance --out FILE`.

Loads of heads are the densities that sites of the evaluation model reported, pooled as one layer; densities of
DSV's range (arXiv 2502.07590: 0.30 to 0.98 of the keys of a head are not needed); and random ones. For 2 to 64
ranks: the largest load of a rank over the mean, where heads stay in order, where whole heads move, and balanced.

The cost is CPU time of a thread, for each step: of the evaluation model's sites next to a step of that model, and
of sites as many as Wan 14B has. It has the moves of state too, with ranks as threads of one process.
"""

import argparse
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsify_compiler
from benchmarks.harness import write_json
from sparsify_compiler.lab import model as evaluation
from sparsify_compiler.lab.sampling import noise, trajectory
from sparsify_compiler.methods.svg2 import clusters_for
from sparsify_compiler.parallel.balance import balanced, capacity, lpt, spread
from sparsify_compiler.parallel.shares import even_owners, heads_of, whole_owners
from sparsify_compiler.plan import Ranks, SharedHeads
from sparsify_compiler.runtime.moving import note_loads, place_heads
from sparsify_compiler.runtime.site_inputs import REPORT, MovingSite
from sparsify_compiler.runtime.state import Loads, Stream, blank
from sparsify_compiler.testing.parallel import all_ranks

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GOAL = 1.05
STEPS = 10
PROMPT = "a large red circle moves right"
DRAWS = 8
METHODS: dict[str, dict[str, Any]] = {
    "svg2": {"method": "svg2"},
    "cubes": {"method": "cubes"},
    "svg2 drop": {"method": "svg2", "far_field": "drop"},
}


def recorded(model: torch.nn.Module, options: dict[str, Any]) -> tuple[list[float], float]:
    """(mean density of each head of all layers in the sparse steps of a video, CPU seconds of such a step)."""
    torch._dynamo.reset()
    options = {"dense_steps": 0, "dense_layers": 0, "inner_backend": "eager", **options}
    compiled = torch.compile(model, backend="sparsify", options=options, dynamic=False)
    times = []
    with sparsify_compiler.generation(STEPS), torch.no_grad():
        start = time.process_time()
        for _ in trajectory(compiled, [PROMPT], noise([0]), steps=STEPS, guidance=1.0):
            times.append(time.process_time() - start)
            start = time.process_time()
    found: dict[str, list[torch.Tensor]] = {}
    for one in sparsify_compiler.stats(model).measurements:
        found.setdefault(one.site, []).append(one.density.mean(0))
    heads = torch.cat([torch.stack(calls).mean(0) for calls in found.values()])
    return heads.tolist(), sorted(times[2:])[len(times[2:]) // 2]


def drawn(rng: random.Random, kind: str, heads: int) -> list[float]:
    """Random loads of heads."""
    draw: dict[str, Callable[[], float]] = {
        "dsv": lambda: math.exp(rng.uniform(math.log(0.02), math.log(0.7))),
        "uniform": lambda: rng.uniform(0.01, 1),
        "lognormal": lambda: min(1.0, rng.lognormvariate(-2, 1)),
        "pareto": lambda: min(1.0, 0.02 * rng.paretovariate(1)),
    }
    return [draw[kind]() for _ in range(heads)]


def loads(recordings: dict[str, list[float]]) -> Iterator[tuple[str, list[list[float]]]]:
    """(name, loads of heads, a list for each draw)."""
    for name, heads in recordings.items():
        yield f"recorded, {name}", [heads]
        yield f"recorded, {name}, the heaviest head dense", [[1.0 if x == max(heads) else x for x in heads]]
    rng = random.Random(0)
    for kind in ("dsv", "uniform", "lognormal", "pareto"):
        for heads in (12, 24, 40):
            yield f"{kind}, {heads} heads", [drawn(rng, kind, heads) for _ in range(DRAWS)]


def case(name: str, draws: Sequence[Sequence[float]], size: int) -> dict[str, Any]:
    """The balance of loads on ranks: the worst of all draws."""
    room = capacity(len(draws[0]), size)
    found = []
    for heads in draws:
        start = time.thread_time()
        owners = balanced(heads, size, room)
        seconds = time.thread_time() - start
        whole = whole_owners(lpt(heads, size, room), size)
        of_rank = [len(heads_of(owners, rank)) for rank in range(size)]
        assert max(of_rank) <= room
        found.append(
            (
                *(spread(heads, one) for one in (even_owners(len(heads), size), whole, owners)),
                sum(of_rank) - len(heads),
                seconds,
            )
        )
    in_order, moved, after, parts, seconds = (max(each) for each in zip(*found, strict=True))
    return {
        "loads": name,
        "heads": len(draws[0]),
        "ranks": size,
        "in_order": round(in_order, 4),
        "whole_heads": round(moved, 4),
        "balanced": round(after, 4),
        "extra_parts_of_heads": parts,
        "room": room,
        "plan_ms": round(1000 * seconds, 3),
    }


def cost(ranks: int, sites: int, heads: int, state: Sequence[tuple[int, ...]], every: int) -> dict[str, Any]:
    """CPU milliseconds of balancing for each of 50 steps, of which 10 are dense, in two videos.

    Args:
        state: shapes of the tensors that a head takes along.
        every: steps after which heads are planned again.
    """
    room, device = capacity(heads, ranks), torch.device("cpu")

    def run(rank: int) -> float:
        rng = random.Random(1)
        sharing = SharedHeads(ranks=Ranks(rank, ranks, "threads"), heads=heads, balance=every)
        width = len(state) + 1
        shapes = [*((1, room, *shape) for shape in state), (len(REPORT), 1, heads)]
        specs = [("", shape, device) for shape in shapes] * sites
        moving = [
            MovingSite(
                name=str(i),
                sharing=sharing,
                state=tuple(range(i * width, (i + 1) * width - 1)),
                report=(i + 1) * width - 1,
            )
            for i in range(sites)
        ]
        kept, seconds = Loads(), 0.0
        for _ in range(2):
            stream = Stream(blank(specs), loads=kept)
            for step in range(50):
                sparse = step >= 10
                for one in moving:
                    stream.tensors[one.report][0] = torch.tensor(drawn(rng, "dsv", heads))
                start = time.thread_time()
                place_heads(moving, stream, sparse=sparse, initialised=step > 0)
                if sparse:
                    note_loads(moving, stream)
                seconds += time.thread_time() - start
        return seconds

    # Without state nothing is sent, and all ranks do the same.
    most = max(all_ranks([partial(run, rank) for rank in range(ranks if state else 1)]))
    return {
        "ranks": ranks,
        "sites": sites,
        "heads": heads,
        "plan_every": every,
        "ms_a_step": round(10 * most, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = evaluation.load().eval()
    measured = {name: recorded(model, options) for name, options in METHODS.items()}
    cases = []
    for name, draws in loads({name: heads for name, (heads, _) in measured.items()}):
        for size in SIZES:
            cases.append(case(name, draws, size))
            print(cases[-1], flush=True)
    config = evaluation.CONFIG
    dim = config["attention_head_dim"]
    centroids = [(clusters, dim) for clusters in clusters_for(2_304)]
    costs = []
    step = 1000 * measured["svg2"][1]
    for size in (2, 4):
        found = cost(size, config["num_layers"], config["num_attention_heads"], centroids, 1000)
        found |= {"model": "evaluation", "step_ms": round(step, 1)}
        found["share_of_a_step"] = round(found["ms_a_step"] / (step / size), 5)
        costs.append(found)
    for size, every in ((8, 1000), (8, 10), (64, 1000)):
        costs.append({**cost(size, 40, 40, [], every), "model": "sites of Wan 14B, without state"})
    for one in costs:
        print(one, flush=True)
    worst = max(one["balanced"] for one in cases)
    print(f"worst of {len(cases)} cases: {worst} (asked: {GOAL})")
    if out:
        facts = {name: [round(x, 4) for x in heads] for name, (heads, _) in measured.items()}
        write_json(out, cases, lines=True, recorded_densities=facts, cost=costs, worst=worst, asked=GOAL)


if __name__ == "__main__":
    main()
