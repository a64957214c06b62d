"""Faults of ranks: `python -m benchmarks.faults --out FILE`.

Three gloo ranks run a model with twelve attentions. In each case one rank fails: it is killed, raises, hangs,
leaves out an exchange or runs another collective, each at ten random exchanges, or it has other options or weights.
The other ranks must name the rank and the exchange within the timeout, and end with exit code 1; no rank may stay.
The file has the seconds from the fault to the error, and the exit codes.
"""

import argparse
import json
import random
import time
from pathlib import Path

from benchmarks.harness import write_json
from sparsify_compiler.testing.faults import AT_A_PLACE, AT_THE_START, Case, Rehearsal

LAYERS, SIZE = 12, 3
TIMEOUT = 5.0
PLACES = sorted(random.Random(0).sample(range(2 * LAYERS + 1), 10))
CASES = [
    *(Case(fault, rank) for fault in AT_THE_START for rank in range(SIZE)),
    *(Case(fault, rank, place) for place in PLACES for fault in AT_A_PLACE for rank in range(SIZE)),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case begins after this time")
    parser.add_argument("--out", type=Path, help="JSON file; cases that it has are left out")
    given = parser.parse_args()
    found = json.loads(given.out.read_text())["cases"] if given.out and given.out.exists() else []
    end, done = (
        time.monotonic() + given.seconds,
        {(one["fault"], one["culprit"], one["place"]) for one in found},
    )
    with Rehearsal(layers=LAYERS, size=SIZE, timeout=TIMEOUT) as rehearsal:
        for case in CASES:
            if (case.fault, case.culprit, case.place) in done or time.monotonic() > end:
                continue
            outcome = rehearsal.run(case)
            found.append(outcome.as_json())
            print(found[-1], *outcome.errors[: bool(outcome.wrong()) * SIZE], sep="\n", flush=True)
            if given.out:
                write_json(given.out, found, lines=True, ranks=SIZE, layers=LAYERS, timeout=TIMEOUT)
    wrong = [one for one in found if one["wrong"]]
    print(f"{len(found)} of {len(CASES)} cases, {len(wrong)} wrong: {wrong}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
