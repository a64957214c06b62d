"""Every model family on 1 to 4 ranks against one process: `python -m benchmarks.parallel --out FILE`.

Dynamo traces each family once for inference and once for training. Each graph is then shared by threads that
exchange real tensors (`testing/parallel.py`), for every method, in turn on 2, 3 and 4 ranks; the form `hybrid` has
two hosts of two ranks. The file has the largest difference of the outputs and of the gradients, relative to the
largest element, in float32. With the family's two heads, ranks 3 and 4 have none.
"""

import argparse
import json
import time
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import write_json
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.testing.models import CASES
from sparsify_compiler.testing.parallel import Outcome, compare_graph, graphs_of

METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "hcp": {name: {} for name in ("dense", "tile", "cubes", "svg2", "keys")},
    "scp": {
        "dense": {},
        "tile": {},
        "cubes": {"far_field": "drop", "cube": (1, 2, 2), "query_cube": (1, 2, 2)},
        "svg2": {"far_field": "drop"},
    },
}
"""Form -> method -> its options. A far field needs all keys, so ranks would share heads for it."""
METHODS["hybrid"] = METHODS["scp"]
TRAINED = {"hcp": tuple(METHODS["hcp"]), "scp": ("dense", "tile"), "hybrid": ("dense", "tile")}
"""Form -> methods whose gradients are compared. In the others, dynamic methods share heads in training."""
BOUND = 1e-5
"""Rounding of float32: a product of fewer rows may add in another order."""
BOUNDS = {"kandinsky5": 1e-3}
"""Bounds of other families: the rotary embedding of Kandinsky 5 returns bfloat16, so parts of gradients are rounded
to it before they add up."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=[*CASES], default=[*CASES])
    parser.add_argument("--forms", nargs="+", metavar="FORM", choices=[*METHODS], default=[*METHODS])
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="no family begins after this time"
    )
    parser.add_argument("--out", type=Path, help="JSON file; families that it has are left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = json.loads(options.out.read_text())["cases"] if options.out and options.out.exists() else []
    begin, done = time.monotonic(), {(case["form"], case["family"]) for case in cases}
    for form, family in product(options.forms, options.only):
        if (form, family) in done or time.monotonic() - begin > options.seconds:
            continue
        cases += of_family(family, form, len(cases))
        if options.out:
            write_json(options.out, cases, lines=True, bound=BOUND, bounds=BOUNDS)
    wrong = [case for case in cases if case.get("error") or not _holds(case)]
    shared = {case["family"] for case in cases if case["heads"]}
    print(f"{len(cases)} graphs of {len(shared)} families that ranks share; {len(wrong)} differ: {wrong}")
    raise SystemExit(bool(wrong))


def _holds(case: dict[str, Any]) -> bool:
    """Whether a case is equal to one process, within rounding."""
    return max(case["output"], case["gradient"]) <= BOUNDS.get(case["family"], BOUND)


def of_family(family: str, form: str, turn: int) -> list[dict[str, Any]]:
    """The cases of one family in one form."""
    cases: list[dict[str, Any]] = []
    for trains in (False, True):
        model, inputs = CASES[family].build()
        graphs = graphs_of(model, inputs, trains=trains)
        for number, graph in enumerate(graphs):
            for method in TRAINED[form] if trains else METHODS[form]:
                ranks = 4 if form == "hybrid" else 2 + (turn + len(cases)) % 3
                case = {"family": family, "form": form, "graph": number, "method": method, "ranks": ranks}
                case["trains"] = trains
                try:
                    options = {"method": method, "provider": "reference", **METHODS[form][method]}
                    found = compare_graph(graph, options, ranks, trains=trains, form=form)
                    case |= _as_json(found)
                except SparsifyError as error:
                    case |= {"output": 0.0, "gradient": 0.0, "heads": 0, "refused": str(error)}
                except Exception as error:  # a fault of this family must not hide those of the others
                    case |= {"output": 0.0, "gradient": 0.0, "heads": 0, "error": repr(error)[:500]}
                cases.append(case)
                print(case, flush=True)
                if not case["heads"]:
                    break  # whole on every rank, whatever the method
    return cases


def _as_json(found: Outcome) -> dict[str, Any]:
    sharding = found.sharding
    return {
        "output": found.output,
        "gradient": found.gradient,
        "tokens": sharding.tokens,
        "heads": len(sharding.sites),
        "gathered": [list(one) for one in sharding.gathered],
        **({"by_heads": dict(sharding.by_heads)} if sharding.by_heads else {}),
        **({"reason": sharding.reason} if sharding.reason else {}),
    }


if __name__ == "__main__":
    main()
