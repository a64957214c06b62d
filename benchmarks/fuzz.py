"""`python -m benchmarks.fuzz --cases 1000 --seed 0 1 2`: many random programs, and every fault that they find.

Case 7 of a seed is always the same program (`sparsify_compiler.testing.fuzzing`). Cases run in chunks, each in
its own process, so that a case that kills its process affects no other chunk. Every chunk is appended to
`progress.jsonl` in the folder of `--save`, and `--resume` continues from there. Every fault is shrunk, and one of
each sort is saved there as a script that exits with 1 as long as the fault exists. The command exits with 1 if
there is a fault.
"""

import argparse
import json
import logging
import multiprocessing
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.harness import write_json
from sparsify_compiler.testing.fuzzing import (
    KINDS,
    Case,
    Level,
    Verdict,
    judge,
    random_case,
    save,
    shrink,
)
from sparsify_compiler.testing.fuzzing.cases import Outcome

SHARES: dict[tuple[str, Level], float] = {
    ("tokens", "analysis"): 0.55,
    ("writes", "analysis"): 0.37,
    ("tokens", "end to end"): 0.03,
    ("writes", "end to end"): 0.02,
    ("spellings", "end to end"): 0.025,
    ("calls", "end to end"): 0.005,
}
"""Share of each kind among all cases: the larger, the less time a case takes."""

CHUNK = {"analysis": 1000, "end to end": 200}
"""Number of cases that share a process."""

SHRUNK = 10
"""Largest number of faults of a chunk that are shrunk."""

PATIENCE = 300.0
"""Seconds without a message after which a process is killed."""


@dataclass(frozen=True)
class Chunk:
    """Some consecutive cases."""

    kind: str
    level: Level
    seed: int
    first: int
    count: int


@dataclass(frozen=True)
class Fault:
    """A case with a fault, shrunk unless its chunk has many faults."""

    number: int
    verdict: Verdict
    case: Case


@dataclass
class Result:
    """The result of a chunk."""

    chunk: Chunk
    outcomes: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    cpu_seconds: float = 0.0

    def count(self, verdict: Verdict) -> None:
        """Count a case with this outcome."""
        self.outcomes[verdict.outcome] = self.outcomes.get(verdict.outcome, 0) + 1


def chunks(cases: int, seeds: list[int], kinds: list[str], levels: list[str]) -> Iterator[Chunk]:
    """`cases` of each seed, divided among kinds."""
    chosen = {key: share for key, share in SHARES.items() if key[0] in kinds and key[1] in levels}
    for seed in seeds:
        for (kind, level), share in chosen.items():
            count = max(1, round(cases * share / sum(chosen.values())))
            for first in range(0, count, CHUNK[level]):
                yield Chunk(kind, level, seed, first, min(CHUNK[level], count - first))


def work(chunk: Chunk, first: int, connection: Connection) -> None:
    """Judge the cases of a chunk from number `first` on, and report when each begins, is judged and is shrunk."""
    quiet()
    shrunk = 0
    for number in range(first, chunk.first + chunk.count):
        connection.send(("begins", number))
        case = random_case(chunk.kind, chunk.seed, number)
        verdict = judge(case, chunk.level)
        connection.send(("judged", number, verdict, case, time.process_time()))
        if verdict.is_fault and shrunk < SHRUNK:
            shrunk += 1
            small, found = shrink(case, lambda one: judge(one, chunk.level))
            connection.send(("shrunk", number, found, small, time.process_time()))


def quiet() -> None:
    """Set one thread, and turn off logs and warnings: most programs are wrong on purpose."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def run(chunk: Chunk, work: Callable[[Chunk, int, Connection], None] = work, start: str = "spawn") -> Result:
    """Judge a chunk. A case that ends its process is a crash; a new process continues with the next case."""
    result, first = Result(chunk), chunk.first
    while first < chunk.first + chunk.count:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context(start).Process(target=work, args=(chunk, first, sender))
        process.start()
        sender.close()
        begun, judged, cpu = first - 1, first - 1, 0.0
        try:
            while receiver.poll(PATIENCE):
                what, number, *rest = receiver.recv()
                if what == "begins":
                    begun = number
                    continue
                verdict, case, cpu = rest
                if what == "judged":
                    judged = number
                    result.count(verdict)
                elif verdict.is_fault:
                    result.faults.pop()
                if verdict.is_fault:
                    result.faults.append(Fault(number, verdict, case))
        except EOFError:
            pass
        process.join(5.0)
        ended = f"ended with {exit_name(process.exitcode)}" if process.exitcode else "went silent"
        process.kill()
        if begun < first:
            raise RuntimeError(f"no case of {chunk} began: the process {ended}")
        result.cpu_seconds += cpu
        first = begun + 1
        if begun > judged:
            case = random_case(chunk.kind, chunk.seed, begun)
            result.count(verdict := Verdict("CRASH", f"the process {ended}"))
            result.faults.append(Fault(begun, verdict, case))
    return result


def exit_name(code: int) -> str:
    """The end of a process in words: `SIGSEGV`, or `exit code 1`."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def keep(result: Result, folder: Path, seen: set[str]) -> None:
    """Append a chunk to the progress, and save those of its faults that are of a new sort."""
    chunk = result.chunk
    for found in result.faults:
        signature = re.sub(r"\d+", "N", f"{chunk.kind} {found.verdict.outcome} {found.case.moves}")
        if signature in seen:
            continue
        seen.add(signature)
        name = f"{chunk.kind}-{chunk.level.replace(' ', '-')}-{chunk.seed}-{found.number}"
        script = save(found.case, chunk.level, found.verdict, folder, name)
        print(f"{found.verdict.outcome} {script}: {found.verdict.message}", flush=True)
    with (folder / "progress.jsonl").open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def done(folder: Path) -> dict[Chunk, Result]:
    """The results that `keep` appended."""
    path = folder / "progress.jsonl"
    results = [from_json(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return {result.chunk: result for result in results}


def from_json(row: dict[str, Any]) -> Result:
    """The result from its `asdict`, after JSON."""
    faults = [
        Fault(one["number"], Verdict(**one["verdict"]), Case.from_json(one["case"])) for one in row["faults"]
    ]
    return Result(**row | {"chunk": Chunk(**row["chunk"]), "faults": faults})


def table(results: list[Result]) -> list[dict[str, Any]]:
    """Counts by kind and level, then the faults."""
    rows = []
    for kind, level in SHARES:
        same = [one for one in results if (one.chunk.kind, one.chunk.level) == (kind, level)]
        if same:
            outcomes = sum((Counter(one.outcomes) for one in same), Counter())
            rows.append(
                {
                    "kind": kind,
                    "level": level,
                    "seeds": sorted({one.chunk.seed for one in same}),
                    "cases": outcomes.total(),
                    **{outcome: outcomes[outcome] for outcome in get_args(Outcome)},
                    "cpu_seconds": round(sum(one.cpu_seconds for one in same), 1),
                }
            )
    faults = [
        {
            "fault": f"{one.chunk.kind}/{one.chunk.seed}/{found.number}",
            **asdict(found.verdict),
            "program": found.case.moves,
        }
        for one in results
        for found in one.faults
    ]
    return rows + faults


def replay(path: Path) -> Verdict:
    """Judge a saved case again."""
    saved = json.loads(path.read_text())
    case = Case.from_json(saved["case"])
    print(case.source)
    return judge(case, saved["level"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=1000, help="number of cases of each seed, divided among the kinds"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--levels", nargs="+", choices=list(CHUNK), default=list(CHUNK))
    parser.add_argument(
        "--jobs", type=int, default=2, help="number of processes at a time, with one thread each"
    )
    parser.add_argument("--out", type=Path, help="JSON file for counts by kind and outcome, and all faults")
    parser.add_argument("--save", type=Path, default=Path(tempfile.gettempdir()) / "sparsify-fuzz")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder of --save")
    parser.add_argument("--replay", type=Path, help="judge only the case of a saved JSON file")
    args = parser.parse_args()
    if args.replay:
        quiet()
        verdict = replay(args.replay)
        print(verdict.outcome, verdict.message)
        sys.exit(verdict.is_fault)
    args.save.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        (args.save / "progress.jsonl").unlink(missing_ok=True)
    finished, seen = done(args.save), set[str]()
    wanted = list(chunks(args.cases, args.seed, args.kinds, args.levels))
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(run, chunk) for chunk in wanted if chunk not in finished]):
            result = future.result()
            keep(result, args.save, seen)
            finished[result.chunk] = result
    rows = table([finished[chunk] for chunk in wanted])
    for row in rows:
        if "kind" in row:
            print(json.dumps(row))
    if args.out:
        write_json(args.out, rows)
    sys.exit(any("fault" in row for row in rows))


if __name__ == "__main__":
    main()
