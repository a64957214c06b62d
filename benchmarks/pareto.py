"""`python -m benchmarks.pareto`: PSNR against time of methods with their options, on the trained evaluation model.

quality  makes videos of held-out prompts, dense and with every candidate, from the same noise: PSNR to the dense
         video, and density of the sparse steps. Load on the machine does not change these numbers.
time     times one call of the whole model, with guidance, in the middle of a generation: dense twice (an A/A pair,
         whose difference is noise) and sparse, in turns. Both run without Inductor, so that nothing is compiled
         again for each candidate. A row `under Inductor` is the same with Inductor on both sides.
site     times one attention on a planted video, next to dense SDPA twice, with the selection. No trained model has
         that many tokens.

Times are CPU seconds of the process and wall seconds, the smallest and the median of some rounds. CPU seconds are
those of all threads together. Finished rows are in the file, and the same command adds the rows that are missing.
`--anew` measures those of this command again.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import write_json
from benchmarks.methods import Site, planted_video
from sparsify_compiler.lab import world
from sparsify_compiler.lab.benchmark import Switch
from sparsify_compiler.lab.calibration import calibration_inputs
from sparsify_compiler.lab.configurations import TUNED
from sparsify_compiler.lab.model import load, unconditional
from sparsify_compiler.lab.pictures import strip
from sparsify_compiler.lab.quality import psnr
from sparsify_compiler.lab.sampling import noise, sample
from sparsify_compiler.measured import stats
from sparsify_compiler.methods.svg2 import clusters_for
from sparsify_compiler.options import configure
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.runtime.clock import generation

RESULTS = Path(__file__).parent / "results" / "pareto-cpu.json"
CUBES = {"method": "cubes", **TUNED["cubes"]}


def candidates(tokens: int) -> dict[str, dict[str, Any]]:
    """Name -> options of torch.compile, for a video of this number of tokens."""
    usual, _ = clusters_for(tokens)
    found: dict[str, dict[str, Any]] = {
        "default": {},
        "old default": {"method": "svg2", "far_field": "linear", "min_gain": 0.02},
        "svg2 drop, top_p 0.9": {"preset": "svg2"},
    }
    for name, options in (("svg2", {"method": "svg2"}), ("cubes", CUBES)):
        for gain in (0.1, 0.02, 0.003):
            found[f"{name} linear, gain {gain}"] = {**options, "far_field": "linear", "min_gain": gain}
        for most in (0.05, 0.1, 0.2):
            found[f"{name}, max_error {most}"] = {**options, "max_error": most}
    for times in (1, 2, 4):
        for budget in (0.1, 0.15, 0.2):
            found[f"keys mean, {times}x clusters, budget {budget}"] = {
                "method": "keys",
                "q_clusters": times * usual,
                "kv_budget": budget,
            }
    for far_field in ("drop", "linear"):
        found[f"keys {far_field}, 1x clusters, budget 0.2"] = {
            "method": "keys",
            "q_clusters": usual,
            "kv_budget": 0.2,
            "far_field": far_field,
        }
    return found


GRIDS = {9216: (12, 24, 32), 32760: (21, 30, 52)}
"""Tokens -> grid of a site that is timed alone."""
FIRST_SCENE, FIRST_SEED = 3000, 7000
"""Held-out videos from here on were used for nothing else."""
STEPS = 16


class Bench:
    """The model and the rows so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.model = load()
        self.switch = Switch()
        self.rows: list[dict[str, Any]] = []
        if asked.out.exists():
            self.rows = json.loads(asked.out.read_text())["cases"]

    def add(self, kind: str, name: str, tokens: int, make: Callable[[], dict[str, Any]]) -> None:
        """Measure a row and write the file, unless it has the row."""
        key = {"kind": kind, "tokens": tokens, "name": name}
        known = [row for row in self.rows if row.items() >= key.items()]
        if known and not self.asked.anew:
            return
        row = {**key, "threads": torch.get_num_threads(), **make()}
        self.rows = [one for one in self.rows if one not in known] + [row]
        write_json(self.asked.out, self.rows, lines=True)
        print(row, flush=True)

    def sparse(self, options: Mapping[str, Any]) -> Callable[..., Any]:
        """The model under options of torch.compile; Dynamo traces it once for a number of frames."""
        self.switch.options = {"inner_backend": "eager", **options}
        return self.traced

    def trace(self) -> None:
        """Forget the shapes of earlier videos."""
        torch.compiler.reset()
        self.traced = torch.compile(self.model, backend=self.switch, dynamic=False)

    def video(self, model: Callable[..., Any], number: int, frames: int) -> Tensor:
        """The video of a held-out prompt."""
        scene, start = world.scene(world.HELD_OUT, FIRST_SCENE + number), noise([FIRST_SEED + number], frames)
        with generation(STEPS, streams=1):
            return sample(model, [scene.prompt], start, steps=STEPS)

    def chosen(self, tokens: int) -> dict[str, dict[str, Any]]:
        """The candidates of this command."""
        words = self.asked.only
        found = candidates(tokens)
        return found if words is None else {name: found[name] for name in words}

    def quality(self, frames: int) -> None:
        """Add the rows of `quality`."""
        self.trace()
        dense: list[Tensor] = []

        def row(options: Mapping[str, Any]) -> dict[str, Any]:
            if not dense:
                dense.extend(self.video(self.model, number, frames) for number in range(self.asked.videos))
                if self.asked.pictures:
                    strip(torch.cat(dense)).save(self.asked.pictures / f"dense-{frames}.png")
            found, densities = [], []
            model = self.sparse(options)
            for number, exact in enumerate(dense):
                made = self.video(model, number, frames)
                found.append(round(float(psnr(made, exact)[0]), 2))
                densities.append(stats(self.model).density)
            return {
                "psnr": round(fmean(found), 2),
                "each": found,
                "density": round(fmean(densities), 4),
                "options": {**options},
            }

        for name, options in self.chosen(tokens_of(frames)).items():
            self.add("quality", name, tokens_of(frames), lambda options=options: row(options))

    def time(self, frames: int) -> None:
        """Add the rows of `time`."""
        self.trace()
        (call, *_) = calibration_inputs(frames)[1:]
        inputs = {
            "hidden_states": call["hidden_states"].repeat(2, 1, 1, 1, 1),
            "timestep": call["timestep"].repeat(2),
            "encoder_hidden_states": torch.cat([call["encoder_hidden_states"], unconditional(1)]),
            "return_dict": False,
        }

        def row(dense: Callable[..., Any], sparse: Callable[..., Any]) -> dict[str, Any]:
            calls = {"dense": dense, "dense again": dense, "sparse": sparse}
            rounds = self.asked.rounds
            with torch.no_grad(), generation(rounds + 2, streams=1):
                sparse(**inputs)  # k-means starts here
                seconds = in_turns({name: lambda f=f: f(**inputs) for name, f in calls.items()}, rounds)
            return {"density": round(stats(self.model).density, 4), **ratios(seconds)}

        for name, options in self.chosen(tokens_of(frames)).items():
            options = {**options, "dense_steps": 0}
            self.add(
                "time",
                name,
                tokens_of(frames),
                lambda options=options: row(self.model, self.sparse(options)),
            )
        if self.asked.inductor:
            torch.compiler.reset()
            plain = torch.compile(self.model, dynamic=False)
            for name in self.asked.inductor:
                options = {**candidates(tokens_of(frames))[name], "dense_steps": 0, "guard": "off"}
                self.add(
                    "time",
                    f"{name}, under Inductor",
                    tokens_of(frames),
                    lambda options=options: row(
                        plain,
                        torch.compile(self.model, backend="sparsify", options=options, dynamic=False),
                    ),
                )

    def site(self, tokens: int) -> None:
        """Add the rows of `site`."""
        grid = GRIDS[tokens]
        layout = TokenLayout(tokens=prod(grid), grid=grid)
        query, key, value = planted_video(grid, 1, 64)

        def row(options: Mapping[str, Any]) -> dict[str, Any]:
            config = configure(options)
            assert config.method is not None
            far_field = config.far_field or config.method.far_field
            site = Site(config.method, far_field, layout, query, key, value).call()
            exact = scaled_dot_product_attention(query, key, value)
            for _ in range(3):  # `max_error` learns from the calls before
                out = site()
            error = float((out - exact).norm() / exact.norm())

            def dense() -> Tensor:
                return scaled_dot_product_attention(query, key, value)

            seconds = in_turns({"dense": dense, "dense again": dense, "sparse": site}, self.asked.rounds)
            return {"error": round(error, 4), **ratios(seconds)}

        with torch.no_grad():
            for name, options in self.chosen(tokens).items():
                self.add("site", name, tokens, lambda options=options: row(options))


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds of the process, wall seconds) of each call in each round; a first round does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            before = time.process_time(), time.perf_counter()
            call()
            after = time.process_time(), time.perf_counter()
            if turn:
                seconds[name].append((after[0] - before[0], after[1] - before[1]))
    return seconds


def ratios(seconds: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Times of every call, speed-ups by both clocks, and the same ratio of the A/A pair."""
    found: dict[str, Any] = {}
    for place, clock in enumerate(("cpu", "wall")):
        each = {name: [pair[place] for pair in pairs] for name, pairs in seconds.items()}
        for how, of in (("least", min), ("median", median)):
            times = {name: of(values) for name, values in each.items()}
            found[f"{clock}, {how}"] = {name: round(value, 4) for name, value in times.items()}
            found[f"speed-up by {clock}, {how}"] = round(times["dense"] / times["sparse"], 3)
            found[f"A/A by {clock}, {how}"] = round(times["dense"] / times["dense again"], 3)
    return found


def tokens_of(frames: int) -> int:
    """Tokens of a video of the evaluation model: patches of 4 x 4 pixels."""
    return frames * (world.HEIGHT // 4) * (world.WIDTH // 4)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple(candidates(world.FRAMES))
    parser.add_argument("kind", choices=("quality", "time", "site"))
    parser.add_argument("--frames", type=int, default=world.FRAMES, help="of the model's videos")
    parser.add_argument("--tokens", type=int, choices=GRIDS, default=9216, help="of a site")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these candidates")
    parser.add_argument(
        "--inductor", nargs="*", default=[], choices=names, metavar="NAME", help="also under Inductor"
    )
    parser.add_argument("--videos", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=Path, help="a folder for pictures of the dense videos")
    parser.add_argument("--anew", action="store_true", help="measure rows that are in the file again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    bench = Bench(asked)
    if asked.kind == "site":
        bench.site(asked.tokens)
    elif asked.kind == "time":
        bench.time(asked.frames)
    else:
        bench.quality(asked.frames)


if __name__ == "__main__":
    main()
