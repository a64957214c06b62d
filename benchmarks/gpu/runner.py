"""Runs a list of steps in worker processes, and keeps the result of each.

A worker performs one step after another. A worker that failed, hung or crashed is replaced, so that a broken step
does not affect others; its finished cases are kept. Steps of the groups before `SPEED` run in parallel, since
most of their time is compilation; steps of `SPEED` run alone. No step begins after the deadline.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch

from benchmarks.gpu.device import Device
from benchmarks.gpu.observe import launched
from sparsify_compiler.testing.poison import poisoned_memory

CORRECT, SITES, SPEED = "correct", "sites", "speed"
"""Groups of steps, in the order in which they run."""

OK, FAILED, CRASHED, TIMED_OUT, NOT_RUN = "ok", "failed", "crashed", "timed out", "not run: out of time"
"""Statuses of a step."""

RESULTS, LOG = "results.jsonl", "log.txt"
"""Files in addition to the report: a line for each step, and everything that steps print."""

KEPT_LINES = 15
"""Number of the worker's last lines in the record of a step that crashed."""

Case = tuple[str, Callable[[], dict[str, Any] | None]]
"""(name, function that raises if something is wrong, or returns its results)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A part of the run."""

    name: str
    function: Callable[[Device], Iterable[Case]]
    """The cases of the step, which run one after another."""
    seconds: float
    """Time after which it is killed."""
    group: str


Record = dict[str, Any]
"""The result of a step: step, group, status, seconds, cases, and error if something is wrong.
The result of a case: case, ok, seconds, launched, and its own results or its error."""


def perform(step: Step, device: Device, records: Path) -> bool:
    """Run a step in this process, and return whether all cases were right. Every case adds a line to `records`.

    After a case that raises, the others still run, unless the device is lost.
    """
    verdicts = []
    memory = contextlib.nullcontext() if step.group == SPEED else poisoned_memory()
    with records.open("a") as file, launched() as kernels, memory, torch.no_grad():
        cases = iter(step.function(device))
        while (found := _next_case(cases, device)) is not None:
            verdicts.append(found["ok"])
            file.write(json.dumps(found | {"launched": kernels}) + "\n")
            file.flush()
            if found.get("lost"):
                break
            kernels.clear()
            device.release()
    return bool(verdicts) and all(verdicts)


def _next_case(cases: Iterator[Case], device: Device) -> Record | None:
    """The result of the next case; None after the last."""
    begin, name = time.monotonic(), "(preparing)"
    found: Record = {"ok": True}
    try:
        case = next(cases, None)
        if case is None:
            return None
        name, function = case
        found |= function() or {}
        device.synchronise()
    except Exception as error:
        found = {"ok": False, "error": _in_short(error)}
        try:
            device.synchronise()
        except Exception:
            found["lost"] = True
    return {"case": name, "seconds": round(time.monotonic() - begin, 2)} | found


def _in_short(error: Exception) -> str:
    """The error, and the place in this project's code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[:1500] + where


def serve(steps: Mapping[str, Step], device: Device) -> None:
    """Be a worker: perform the step in each line of stdin, given with its file of cases, and write ok or failed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # steps print to stderr, so that stdout has only results
    for line in sys.stdin:
        name, records = json.loads(line)
        all_right = perform(steps[name], device, Path(records))
        print(OK if all_right else FAILED, file=answers, flush=True)


class Worker:
    """A process that performs steps."""

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        """Args:
        command: starts a process that calls `serve`.
        folder: for its printed output.
        """
        handle, path = tempfile.mkstemp(dir=folder)
        self._printed = Path(path)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=handle,
            env=dict(environment),
            text=True,
            start_new_session=True,
        )
        os.close(handle)

    def perform(self, step: Step, cases: Path, seconds: float) -> tuple[str, str]:
        """(status, printed output)."""
        begin = self._printed.stat().st_size
        status = self._ask(json.dumps([step.name, str(cases)]), seconds)
        with self._printed.open(errors="replace") as file:
            file.seek(begin)
            return status, file.read()

    def _ask(self, question: str, seconds: float) -> str:
        given, answers = self._process.stdin, self._process.stdout
        assert given is not None
        assert answers is not None
        try:
            given.write(question + "\n")
            given.flush()
        except BrokenPipeError:
            return CRASHED
        if not select.select([answers], [], [], seconds)[0]:
            return TIMED_OUT
        return answers.readline().strip() or CRASHED

    def end(self) -> str:
        """Kill the process and its own children, such as an assembler; return how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # a crashed process may still be ending
        code = self._process.poll()
        if code is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            print(f"process {self._process.pid} cannot be killed", file=sys.stderr)
        if code is None:
            return "killed"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Run:
    """A run of some steps: `Run(...).all()` returns the result of each."""

    def __init__(
        self,
        steps: Iterable[Step],
        command: list[str],
        out: Path,
        *,
        seconds: float,
        workers: int,
        environment: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        """Args:
        command: starts a worker.
        out: folder of `RESULTS` and `LOG`.
        seconds: after this time no step begins, and running steps are killed.
        workers: number of steps that run in parallel, where they may.
        tell: gets a line about the result of each step.
        """
        self._steps, self._command, self._out, self._workers = tuple(steps), command, out, workers
        self._seconds, self._tell = seconds, tell
        self._environment = os.environ | dict(environment or {})
        self._lock = Lock()
        self._records: list[Record] = []

    def all(self) -> list[Record]:
        """Run all steps, group by group; the first groups share their workers."""
        self._out.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, LOG):
            (self._out / name).write_text("")
        self._begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for groups, workers in (((CORRECT, SITES), self._workers), ((SPEED,), 1)):
                waiting: queue.SimpleQueue[Step] = queue.SimpleQueue()
                for step in self._steps:
                    if step.group in groups:
                        waiting.put(step)
                threads = [Thread(target=self._work, args=(waiting, Path(folder))) for _ in range(workers)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        return self._records

    def _work(self, waiting: "queue.SimpleQueue[Step]", folder: Path) -> None:
        """Perform steps until none waits, with one worker after another."""
        worker = None
        while True:
            try:
                step = waiting.get_nowait()
            except queue.Empty:
                break
            record: Record = {"step": step.name, "group": step.group, "status": NOT_RUN}
            record |= {"seconds": 0.0, "cases": []}
            printed, begin = "", time.monotonic()
            left = self._begin + self._seconds - begin
            if left > 0:
                worker = worker or Worker(self._command, self._environment, folder)
                cases = Path(tempfile.mkdtemp(dir=folder)) / "cases.jsonl"
                limit = min(step.seconds, left)
                record["status"], printed = worker.perform(step, cases, limit)
                record |= {"seconds": round(time.monotonic() - begin, 1), "cases": _read(cases)}
                if record["status"] != OK:
                    how = worker.end()
                    worker = None
                    if record["status"] == TIMED_OUT:
                        record["error"] = f"killed after {limit:.0f} s and {len(record['cases'])} cases"
                    if record["status"] == CRASHED:
                        last = "\n".join(printed.splitlines()[-KEPT_LINES:])
                        record["error"] = f"{how}, after {len(record['cases'])} cases: {last}"
            with self._lock:
                self._keep(record, printed)
        if worker is not None:
            worker.end()

    def _keep(self, record: Record, printed: str) -> None:
        self._records.append(record)
        with (self._out / RESULTS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        with (self._out / LOG).open("a") as file:
            file.write(f"===== {record['step']}: {record['status']}\n{printed}\n")
        wrong = [f"  {c['case']}: {c['error']}" for c in record["cases"] if not c["ok"]]
        if error := record.get("error"):
            wrong.append(f"  {error}")
        passed = f"{sum(c['ok'] for c in record['cases'])} of {len(record['cases'])} cases"
        now = time.monotonic() - self._begin
        line = f"{now:4.0f} s  {record['step']}: {record['status']}, {passed}, {record['seconds']:.0f} s"
        self._tell("\n".join([line, *wrong[:4]]))


def _read(lines: Path) -> list[Record]:
    """The cases that were written completely."""
    found = []
    for line in lines.read_text().splitlines() if lines.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def unchecked(kernels: Iterable[str], records: Iterable[Record]) -> list[str]:
    """The kernels that no case of the first groups launched."""
    cases = [case for record in records if record["group"] != SPEED for case in record["cases"]]
    return sorted(set(kernels) - {name for case in cases if case["ok"] for name in case["launched"]})
