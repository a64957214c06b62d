"""Exports that PyTorch runs, next to torch.compile: a generation of ten steps, in a fresh process.

    python -m benchmarks.export_loops --out benchmarks/results/export-loops.json

A model of every family is exported with every method. A new process loads the folders and runs a generation with
guidance in two calls a step. This process runs the same calls of the model under torch.compile with
inner_backend='eager', which computes what programs of torch.export compute; results of AOTInductor differ by
rounding. Results are written after each family; with a file that exists, only the cases that it lacks run.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import write_json
from sparsify_compiler import export
from sparsify_compiler.testing.models import CASES, Grid, Inputs, output_of

FAMILIES = ("wan", "hunyuan_video", "cogvideox", "ltx", "allegro", "easyanimate")
FORMATS = ("torch", "aoti")
METHODS: dict[str, dict[str, Any]] = {
    "tile": {"method": "tile", "reference_frames": 1, "dense_steps": 2},
    "cubes": {
        "method": "cubes",
        "cube": (2, 2, 4),
        "query_cube": (2, 4, 4),
        "dense_layers": 0,
        "dense_steps": 2,
    },
    "svg2": {"method": "svg2", "q_clusters": 5, "kv_clusters": 9, "dense_layers": 0, "dense_steps": 2},
    "keys": {"method": "keys", "q_clusters": 6, "dense_layers": 0, "dense_steps": 2},
}
GRID: Grid = (4, 4, 5)
STEPS = 10

LOADER = """
import sys, torch, sparsify_compiler
from sparsify_compiler.testing.models import output_of
torch.set_num_threads(1)
calls = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = sparsify_compiler.load(folder)
    with torch.no_grad():
        torch.save([output_of(model(**call)) for call in calls], folder + ".pt")
"""


def generation(inputs: Inputs) -> Iterator[Inputs]:
    """The calls of a generation: in every step one with the text and one without."""
    draw = torch.Generator().manual_seed(1)
    text = inputs["encoder_hidden_states"]
    for step in range(STEPS):
        latents = torch.randn(inputs["hidden_states"].shape, generator=draw).to(inputs["hidden_states"])
        time = torch.full_like(inputs["timestep"], 950 - 900 * step // STEPS)
        for prompt in (text, torch.zeros_like(text)):
            yield {**inputs, "hidden_states": latents, "timestep": time, "encoder_hidden_states": prompt}


@torch.no_grad()
def compiled_outputs(model: nn.Module, calls: list[Inputs], method: str) -> list[Tensor]:
    """The outputs of the calls under torch.compile."""
    torch._dynamo.reset()
    options = {**METHODS[method], "inner_backend": "eager"}
    fast = torch.compile(model, backend="sparsify", options=options, fullgraph=True)
    return [output_of(fast(**call)) for call in calls]


def family_cases(family: str, wanted: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """The results of one family, for each (method, format)."""
    model, inputs = CASES[family].build(GRID, batch=1)
    calls = list(generation(inputs))
    found: list[dict[str, Any]] = []
    expected: dict[str, list[Tensor]] = {}
    with TemporaryDirectory() as scratch:
        for method, format in wanted:
            torch._dynamo.reset()
            start = time.process_time()
            exported = export(
                model, inputs, Path(scratch, f"{method}-{format}"), format=format, options=METHODS[method]
            )
            seconds = round(time.process_time() - start, 1)
            sparse = len(exported.plan.sparse)
            found.append(
                {"family": family, "method": method, "format": format, "sparse": sparse, "seconds": seconds}
            )
            if method not in expected:
                expected[method] = compiled_outputs(model, calls, method)
        torch.save(calls, Path(scratch, "calls.pt"))
        folders = [str(Path(scratch, f"{method}-{format}")) for method, format in wanted]
        subprocess.run([sys.executable, "-c", LOADER, str(Path(scratch, "calls.pt")), *folders], check=True)
        for case, folder in zip(found, folders, strict=True):
            got, own = torch.stack(torch.load(f"{folder}.pt")), torch.stack(expected[case["method"]])
            apart = (got.double() - own.double()).square().mean().sqrt() / own.double().square().mean().sqrt()
            case |= {
                "calls": len(calls),
                "same bits": torch.equal(got, own),
                "relative RMS error": float(f"{float(apart):.2g}"),
                "largest error": float(f"{float((got - own).abs().max()):.2g}"),
            }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    parser.add_argument("--again", action="store_true", help="run the cases that the file has, too")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    place = itemgetter("family", "method", "format")
    earlier = json.loads(chosen.out.read_text())["cases"] if chosen.out.exists() else []
    known = {place(case): case for case in earlier}
    for family in chosen.families:
        wanted = [
            (method, format)
            for method, format in itertools.product(chosen.methods, chosen.formats)
            if chosen.again or (family, method, format) not in known
        ]
        if not wanted:
            continue
        for case in family_cases(family, wanted):
            known[place(case)] = case
            print(case, flush=True)
        cases = [known[one] for one in itertools.product(FAMILIES, METHODS, FORMATS) if one in known]
        write_json(chosen.out, cases, lines=True, steps=STEPS, grid=GRID)


if __name__ == "__main__":
    main()
