"""`python -m benchmarks.guard`: the choices of the guard against long timings, on the CPU.

Three kinds of cases, each in a process of its own, so that threads and caches are fresh:

sites    Random grids, heads, types, thread counts and methods. A model of one attention, and little else, makes a
         video with `guard="measured"`, from an empty file of times. Then the same model without the guard and the
         model itself are timed in turns, over many rounds. The regret is the time of the guard's choice divided by
         the smaller time.
video    A video of 20 steps by a model of four blocks: dense, without the guard, and with it, from an empty file of
         times, in turns. The regret is the time with the guard divided by the smaller of the other two.
cost     One call at 9,216 tokens: the time that a decided guard adds to every call, and the time that the runs of
         the one timed call take, both divided by the time of a sparse call.

Times are the smaller of wall time and CPU time of the process for each run, as the guard's own, and the least of
many rounds; a first round does not count. Cases that are in the JSON already are not repeated. Where a method can
leave no attention sparse, there is no choice and no regret.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import write_json
from sparsify_compiler import generation
from sparsify_compiler.runtime import guard
from sparsify_compiler.runtime.program import PlannedGraph, Variant

METHODS: dict[str, dict[str, Any]] = {
    "tile": {"reference_frames": 1},
    "sta": {"tile": (2, 4, 4)},
    "svg2": {},
    "cubes": {},
    "keys": {},
}
DTYPES = ("float32", "bfloat16", "float16")
LARGE = 6
"""Cases above 16,384 tokens."""
ROUNDS, LEAST_SECONDS = 5, 1.0
"""The fewest rounds of a long timing, and the seconds that it takes at least. Three rounds where one is long."""
LONG = 10.0


@dataclass(frozen=True, kw_only=True)
class Site:
    """A model of some attentions, and a method for them."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    dtype: str
    threads: int
    method: str
    options: dict[str, Any]
    sharpness: float
    """Factor on queries: sharp attention lets dynamic methods read less."""
    layers: int = 1

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def name(self) -> str:
        shape = f"{'x'.join(map(str, self.grid))} {self.heads}x{self.head_dim} {self.dtype}"
        return f"{self.method} {shape} {self.threads} threads, sharpness {self.sharpness:g}"


class Attends(nn.Module):
    """Queries, keys and values by a 3-D convolution of one token, then attention without anything else."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, width = site, site.heads * site.head_dim
        torch.manual_seed(0)
        self.patch = nn.Conv3d(4, 3 * width, 1)
        self.to(getattr(torch, site.dtype)).eval()

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """hidden_states [1, 4, f, h, w], timestep [1] -> [1, heads, S, head_dim]."""
        x = self.patch(hidden_states).flatten(2).transpose(1, 2) + timestep.to(hidden_states.dtype) / 1000
        q, k, v = x.unflatten(-1, (3, self.site.heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.site.sharpness * q
        for _ in range(self.site.layers):
            q = q + 0.1 * F.scaled_dot_product_attention(q, k, v)
        return q


def latents(site: Site) -> Tensor:
    """A smooth video, so that neighbouring tokens are alike, with some noise."""
    draw = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, 4, *(max(2, size // 4) for size in site.grid), generator=draw)
    smooth = F.interpolate(coarse, size=site.grid, mode="trilinear")
    noise = torch.randn(smooth.shape, generator=draw)
    return (smooth + 0.2 * noise).to(getattr(torch, site.dtype))


def sites(count: int, seed: int = 0) -> list[Site]:
    """Random sites: six above 16,384 tokens, one of them of 32,760; the others from 64 on, evenly by logarithm."""
    draw, found = random.Random(seed), list[Site]()
    cores = os.cpu_count() or 1
    for number in range(count):
        large = number < LARGE
        if number == 0:
            grid = (21, 30, 52)
        else:
            wanted = math.exp(
                draw.uniform(math.log(16_900 if large else 64), math.log(32_760 if large else 9_216))
            )
            least = 2 if number % len(METHODS) == 0 else 1  # a tile of all frames reads everything
            frames = draw.choice([f for f in (1, 2, 4, 6, 8, 13, 16, 21) if f >= least and wanted / f >= 16])
            height = max(4, round(math.sqrt(wanted / frames / draw.uniform(1, 2))))
            grid = (frames, height, max(4, round(wanted / frames / height)))
        method = list(METHODS)[number % len(METHODS)]
        dtype = draw.choice(DTYPES[:2] if large else DTYPES)
        found.append(
            Site(
                grid=grid,
                heads=draw.choice((1, 2) if large else (1, 2, 4, 8)),
                head_dim=draw.choice((32, 64, 128)),
                dtype=dtype,
                threads=draw.randint(1, cores),
                method=method,
                options=METHODS[method],
                sharpness=draw.choice((1.0, 3.0, 10.0)),
            )
        )
    return found


def compiled(site: Site, option: str, model: nn.Module) -> Callable[..., Tensor]:
    options = {
        "method": site.method,
        **site.options,
        "dense_steps": 0,
        "dense_layers": 0,
        "inner_backend": "eager",
        "guard": option,
    }
    result: Callable[..., Tensor] = torch.compile(
        model, backend="sparsify", options=options, dynamic=False, fullgraph=True
    )
    return result


@contextlib.contextmanager
def planned() -> Any:
    """The planned graphs that run inside, in order of their first run."""
    found, run = list[PlannedGraph](), PlannedGraph.run

    def spy(self: PlannedGraph, *args: Any) -> Any:
        if self not in found:
            found.append(self)
        return run(self, *args)

    PlannedGraph.run = spy  # type: ignore[method-assign]
    try:
        yield found
    finally:
        PlannedGraph.run = run  # type: ignore[method-assign]


def run_time(function: Callable[[], object]) -> float:
    """Seconds of one run, as in `runtime/guard.py`."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return min(time.perf_counter() - wall, time.process_time() - cpu)


def in_turns(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least seconds of each over rounds in turns, since all disturbances add time. The first does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    rounds, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < LEAST_SECONDS or rounds < (3 if spent > LONG else ROUNDS):
        rounds += 1
        for name, function in functions.items():
            seconds[name].append(run_time(function))
    return {name: min(all) for name, all in seconds.items()}


def chosen(site: Site) -> dict[str, Any]:
    """The guard's choice, and long timings of both."""
    model, video = Attends(site), latents(site)

    def calls(program: Callable[..., Tensor], count: int) -> None:
        with generation(8, 1), torch.no_grad():
            for step in range(count):
                program(video, torch.tensor([900.0 - 100 * step]))

    with planned() as graphs:
        calls(compiled(site, "measured", model), 2)
    (found,) = graphs
    if not found.plan.sparse:
        return {"tokens": site.tokens, "choice": "none"}
    (times,) = found.guard.times.values()
    torch.compiler.reset()
    off, dense = compiled(site, "off", model), torch.compile(model, backend="eager", dynamic=False)
    with generation(10_000, 1), torch.no_grad():
        time_steps = iter(range(10_000))

        def step(program: Callable[..., Tensor]) -> Callable[[], object]:
            return lambda: program(video, torch.tensor([9000.0 - next(time_steps) / 10]))

        for _ in range(2):
            step(off)()
        seconds = in_turns({"dense": step(dense), "sparse": step(off)})
    choice = "dense" if found.guard.dense else "sparse"
    return {
        "tokens": site.tokens,
        "choice": choice,
        "guard": times._asdict(),
        **seconds,
        "regret": seconds[choice] / min(seconds.values()),
    }


VIDEO = Site(
    grid=(6, 16, 24), heads=4, head_dim=64, dtype="float32", threads=2, method="svg2", options={}, sharpness=3.0,
    layers=4,
)  # fmt: skip
COST = Site(
    grid=(9, 32, 32),
    heads=4,
    head_dim=64,
    dtype="float32",
    threads=2,
    method="svg2",
    options={},
    sharpness=3.0,
)


def whole_video(site: Site, steps: int = 20) -> dict[str, Any]:
    """A video of 20 steps: dense, without and with the guard. Programs are compiled before, with other steps."""
    model, video = Attends(site), latents(site)
    names = {"unguarded": "off", "guarded": "measured"}
    programs = {name: compiled(site, option, model) for name, option in names.items()}
    programs["dense"] = torch.compile(model, backend="eager", dynamic=False)

    def make(name: str) -> Callable[[], object]:
        def run() -> None:
            with generation(steps, 1), torch.no_grad():
                for step in range(steps):
                    programs[name](video, torch.tensor([1000.0 - 40 * step]))

        return run

    seconds = in_turns({name: make(name) for name in programs})
    return {
        "tokens": site.tokens,
        "steps": steps,
        **seconds,
        "regret": seconds["guarded"] / min(seconds["dense"], seconds["unguarded"]),
    }


def cost(site: Site) -> dict[str, Any]:
    """The cost of the guard at a size where it stays sparse."""
    model, video = Attends(site), latents(site)
    spent = list[float]()
    timing = guard.Stopwatch._run

    def counted(self: guard.Stopwatch, *args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return timing(self, *args, **options)
        finally:
            spent.append(time.perf_counter() - begin)

    guard.Stopwatch._run = counted  # type: ignore[method-assign, assignment]
    programs = {option: compiled(site, option, model) for option in ("off", "measured")}
    with planned() as graphs, generation(10_000, 1), torch.no_grad():
        time_steps = iter(range(10_000))

        def step(program: Callable[..., Tensor]) -> Callable[[], object]:
            return lambda: program(video, torch.tensor([9000.0 - next(time_steps) / 10]))

        for _ in range(3):
            step(programs["measured"])()
        (found,) = graphs
        seconds = in_turns({name: step(one) for name, one in programs.items()})
        # The guard's own work in a decided call, without the noise of attention.
        count = 10_000
        begin = time.process_time()
        for _ in range(count):
            found.guard.update()
            found.guarded(Variant())
            with found.guard.watching(warm=True):
                pass
        own = (time.process_time() - begin) / count
    extra = sum(spent) - (spent[0] if spent else 0.0)  # the first run is the call itself
    return {
        "tokens": site.tokens,
        "runs": len(spent),
        "dense_sites": len(found.guard.dense),
        **seconds,
        "each_call": own / seconds["off"],
        "timed_call": extra / seconds["off"],
    }


KINDS: dict[str, Callable[[Site], dict[str, Any]]] = {"sites": chosen, "video": whole_video, "cost": cost}


def worker(kind: str, given: dict[str, Any]) -> None:
    """Measure one case in this process, and print it as JSON."""
    site = Site(**{**given, "grid": tuple(given["grid"])})
    logging.disable()
    torch.set_num_threads(site.threads)
    with tempfile.TemporaryDirectory() as folder:
        guard.cache_folder = lambda: Path(folder)  # type: ignore[assignment]
        print(json.dumps(KINDS[kind](site)))


def measured(kind: str, site: Site) -> dict[str, Any]:
    """A case, measured in a new process."""
    command = [sys.executable, "-m", "benchmarks.guard", "--worker", kind, json.dumps(asdict(site))]
    environment = os.environ | {"OMP_NUM_THREADS": str(site.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{site.name}: {done.stderr.strip().splitlines()[-1]}")
    return {"kind": kind, "name": site.name, **json.loads(done.stdout.splitlines()[-1])}


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures over all cases."""
    regrets = [one["regret"] for one in cases if one["kind"] == "sites" and "regret" in one]
    if not regrets:
        return {}
    return {
        "sites": len(regrets),
        "dense": sum(one["kind"] == "sites" and one["choice"] == "dense" for one in cases),
        "geometric_mean_of_the_regret": geometric_mean(regrets),
        "worst_regret": max(regrets),
    }


def line(case: dict[str, Any]) -> str:
    """A case in words."""
    numbers = {
        name: f"{1e3 * value:.3g} ms" if name in ("dense", "sparse", "off", "measured") else f"{value:.3g}"
        for name, value in case.items()
        if isinstance(value, float)
    }
    choice = f" chose {case['choice']}" if "choice" in case else ""
    return f"{case['kind']} {case['name']}:{choice} " + ", ".join(f"{k} {v}" for k, v in numbers.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "SITE"), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=60, help="random sites, the large ones first")
    parser.add_argument("--least", type=int, default=0, help="number of the first site to measure")
    parser.add_argument("--most", type=int, default=60, help="the most cases of this run")
    parser.add_argument("--json", type=Path, help="results are added to this file, and read from it")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], json.loads(options.worker[1]))
        return
    cases = json.loads(options.json.read_text())["cases"] if options.json and options.json.exists() else []
    done = {(one["kind"], one["name"]) for one in cases}
    todo = {"sites": sites(options.count)[options.least :], "video": [VIDEO], "cost": [COST]}
    left = options.most
    for kind in options.only:
        for site in todo[kind]:
            if (kind, site.name) in done or left == 0:
                continue
            left -= 1
            cases.append(measured(kind, site))
            print(line(cases[-1]), flush=True)
            if options.json:
                write_json(options.json, cases, lines=True, **summary(cases))
    print(json.dumps(summary(cases), indent=1))


if __name__ == "__main__":
    main()
