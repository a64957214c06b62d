"""Every model family through `apply`: `python -m benchmarks.families --out FILE`.

The options select every key, so that a sparse model gives the numbers of its twin, which runs later and uncompiled.
A row is right if

- the sparse attentions are those over the whole video that the twin ran, by name, and as many as the model's source
  has (`testing/models`);
- outputs are the twin's within rounding: for one video, for another one, and for two at once at another resolution.

Families that the file has already are kept.
"""

import argparse
import copy
import json
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import sparsify_compiler
from benchmarks.attentions import EXACT, Attentions
from benchmarks.harness import write_json
from sparsify_compiler.testing.models import CASES, GRID, Grid, output_of

OTHER: Grid = (5, 6, 4)
CALLS = (("first", GRID, 1), ("second", GRID, 1), ("two at another resolution", OTHER, 2))
"""(name of a call, its grid, its batch)"""
ROUNDING = 2e-5
"""The largest relative error of an output in float32."""
DENSE = {"motif_video": "several video grids"}
"""Families in which attention stays dense -> a part of the reason. A decoder attends over the same video twice."""


@dataclass(kw_only=True, slots=True)
class Row:
    """A result."""

    family: str
    model: str = ""
    """The class in diffusers."""
    video_attentions: int = 0
    """Modules that attend over the whole video, of those that the twin ran in the first call."""
    sparse: int = 0
    graphs: int = 0
    """Dynamo graphs of the first call."""
    compiled_again: int = 0
    """Graphs that Dynamo compiled in the second call."""
    errors: dict[str, float] = field(default_factory=dict)
    """Name of a call -> relative error of its output."""
    seconds: float = 0.0
    fault: str = ""


def measure(family: str, inner: str) -> Row:
    """One row."""
    torch._dynamo.reset()
    row, start = Row(family=family), time.perf_counter()
    try:
        with torch.no_grad():
            _measure(row, inner)
    except Exception as error:  # a fault of this family must not hide those of the others
        row.fault = f"{type(error).__name__}: {str(error).strip()[:300]}"
        traceback.print_exc()
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _measure(row: Row, inner: str) -> None:
    case, counters = CASES[row.family], torch._dynamo.utils.counters["stats"]
    model, _ = case.build()
    twin = copy.deepcopy(model)
    row.model = type(model).__name__
    inputs = [case.build(grid, batch, seed)[1] for seed, (_, grid, batch) in enumerate(CALLS)]
    changed = sparsify_compiler.apply(model, **EXACT, inner_backend=inner)
    outputs = []
    for (name, *_), given in zip(CALLS, inputs, strict=True):
        before = counters["unique_graphs"]
        outputs.append(output_of(model(**given)).clone())
        if name == "first":
            plans = [plan for one in changed.models for plan in (*one.plans, *one.outside)]
            row.graphs = sum(len(one.graphs) for one in changed.models)
        if name == "second":
            row.compiled_again = counters["unique_graphs"] - before
    tokens = {site.tokens for site in case.expect(GRID, 1) if site.tokens is not None}
    found: set[str] = set()
    for (name, *_), given, output in zip(CALLS, inputs, outputs, strict=True):
        with Attentions(twin, tokens) as ran:
            expected = output_of(twin(**given))
        row.errors[name] = float((output - expected).norm() / expected.norm())
        if name == "first":
            found = ran.found
    sparse = {plan.site.name.partition("#")[0] for plan in plans if plan.method != "dense"}
    dense = {plan.site.name for plan in plans if DENSE.get(row.family, "?") in plan.reason}
    row.video_attentions, row.sparse = len(found), len(sparse & found)
    expects = sum(site.grid is not None for site in case.expect(GRID, 1))
    if sparse != found - dense or len(found) != expects:
        reasons = {plan.site.name: plan.reason for plan in plans if plan.site.name in found - sparse}
        row.fault = f"expects {expects}, ran {sorted(found)}, sparse {sorted(sparse)}: {reasons}"
    if not max(row.errors.values()) <= ROUNDING:
        row.fault = f"errors {row.errors}; {row.fault}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows that are missing. Returns 1 if a row is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=[*CASES], default=[*CASES])
    parser.add_argument("--out", type=Path, help="JSON file for the result; rows in it are kept")
    parser.add_argument("--again", action="store_true", help="repeat rows of the file that are wrong")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="no family begins after this time"
    )
    parser.add_argument("--inner-backend", default="eager")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    done: dict[str, Row] = {}
    if args.out is not None and args.out.exists():
        rows = (Row(**case) for case in json.loads(args.out.read_text())["cases"])
        done = {row.family: row for row in rows if not (args.again and row.fault)}
    begin = time.monotonic()
    for family in args.only:
        if family in done or time.monotonic() - begin > args.seconds:
            continue
        done[family] = row = measure(family, args.inner_backend)
        print(asdict(row), flush=True)
        if args.out is not None:
            write_json(args.out, [asdict(one) for one in done.values()], lines=True, grids=[GRID, OTHER])
    wrong = [row.family for row in done.values() if row.fault]
    whole = sum(0 < row.video_attentions == row.sparse for row in done.values())
    print(f"{len(done)} families, {whole} of them sparse in all attention over the video; wrong: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
