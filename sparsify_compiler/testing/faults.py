"""A rank that fails while ranks run a model: the errors of the other ranks, and the time until they are raised.

    with Rehearsal(layers=12, size=3, timeout=5) as rehearsal:
        assert not rehearsal.run(Case("kill", culprit=1, place=7)).wrong()

One process traces a model and makes the graph of each rank. It starts the ranks of a case by
fork, so a case needs no import and no compilation. Like torchrun, it holds the store of the process group, and ends
a rank that is still there when the others have failed.
"""

import json
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import fx

from sparsify_compiler.backend import configure
from sparsify_compiler.parallel import ops
from sparsify_compiler.parallel.group import compared
from sparsify_compiler.passes import pipeline
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime.program import Variant
from sparsify_compiler.testing.parallel import graphs_of
from sparsify_compiler.testing.ranks import PRELOAD
from sparsify_compiler.testing.videos import Video, latents

AT_A_PLACE = ("kill", "raise", "hang", "skip", "other")
"""Faults in one exchange: SIGKILL, an exception, a hang, no exchange at all, another collective."""
AT_THE_START = ("options", "weights")
"""Differences of the rank from the start."""
_OPTIONS = {
    "method": "tile",
    "reference_frames": 1,
    "dense_steps": 0,
    "dense_layers": 0,
    "provider": "reference",
}


@dataclass(frozen=True)
class Case:
    """A fault of one rank."""

    fault: str
    culprit: int
    place: int = 0
    """The number of the exchange in a call: to the heads and back for each attention, then the result's tokens."""


@dataclass(frozen=True)
class Outcome:
    """The end of all ranks in a case."""

    case: Case
    timeout: float
    what: str
    """The exchange in which the rank failed; empty for what differs from the start."""
    seconds: list[float | None]
    """From the fault to the error, for each rank; None where a rank raised nothing."""
    errors: list[str]
    exits: list[int | None]
    """Exit codes; negative for a signal."""
    left: int
    """The number of ranks that did not end within twice the timeout."""

    def wrong(self) -> list[str]:
        """Everything that must not be."""
        found = [f"{self.left} ranks did not end"] if self.left else []
        named = (
            self.what or f"ranks must have the same {'options' if self.case.fault == 'options' else 'input'}"
        )
        for rank, (seconds, error, code) in enumerate(
            zip(self.seconds, self.errors, self.exits, strict=True)
        ):
            if code == 0:
                found.append(f"rank {rank} ended with exit code 0")
            if rank == self.case.culprit:
                continue
            if code != 1:
                found.append(f"rank {rank} ended with exit code {code}")
            if not error.startswith("RankError: ") or "\n" in error:
                found.append(f"rank {rank} raised {error!r}")
            if named not in error or f"rank {self.case.culprit}" not in error:
                found.append(f"the error of rank {rank} does not name the rank and the exchange")
            if seconds is None or seconds > self.timeout:
                found.append(f"rank {rank} needed {seconds} seconds")
        return found

    def as_json(self) -> dict[str, Any]:
        """The outcome, with `wrong`."""
        seconds = [None if one is None else round(one, 2) for one in self.seconds]
        return {
            **asdict(self.case),
            "what": self.what,
            "seconds": seconds,
            "exits": self.exits,
            "wrong": self.wrong(),
        }


class Rehearsal:
    """A model on several ranks, one of which fails."""

    def __init__(self, *, layers: int, size: int, timeout: float) -> None:
        """Args:
        layers: number of attentions of the model.
        size: number of ranks.
        timeout: the option of `parallel`, in seconds.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, layers, size, timeout))
        self._process.start()
        there.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def run(self, case: Case) -> Outcome:
        """The outcome of a case."""
        self._pipe.send(case)
        outcome: Outcome = self._pipe.recv()
        return outcome


def _work(pipe: Connection, layers: int, size: int, timeout: float) -> None:
    """Trace the model, and run the cases that arrive until the pipe closes."""
    torch.set_num_threads(1)
    config, inputs = (
        configure(_OPTIONS),
        {"hidden_states": latents((2, 2, 3)), "timestep": torch.tensor([500.0])},
    )
    ((traced, args),) = graphs_of(Video(layers), inputs)
    with torch.no_grad():
        analysed = pipeline.analyse(traced, config)
        shared = [pipeline.share(analysed, config, Ranks(rank, size, "0", timeout)) for rank in range(size)]
        graphs = [pipeline.rewrite(graph, config, Variant()) for graph in shared]
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(case, graphs, args, timeout))


def _outcome(case: Case, graphs: list[fx.GraphModule], args: tuple[Any, ...], timeout: float) -> Outcome:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context, size = multiprocessing.get_context("fork"), len(graphs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_rank, args=(graph, args, rank, size, case, timeout, store.port, folder))
            for rank, graph in enumerate(graphs)
        ]
        for process in processes:
            process.start()
        others = [one for rank, one in enumerate(processes) if rank != case.culprit]
        end = time.monotonic() + 2 * timeout + 10  # with the time to start
        for process in others:
            process.join(max(end - time.monotonic(), 0))
        left = sum(process.is_alive() for process in others)
        processes[case.culprit].join(0 if case.fault == "hang" else timeout)
        for process in processes:
            process.terminate()
            process.join(timeout)
            left += process.is_alive()
            process.kill()
            process.join()
        said = [_read(folder / str(rank)) for rank in range(size)]
        fault = _read(folder / "fault")
    return Outcome(
        case=case,
        timeout=timeout,
        what=fault.get("what", ""),
        seconds=[one["time"] - fault["time"] if one else None for one in said],
        errors=[one.get("error", "") for one in said],
        exits=[process.exitcode for process in processes],
        left=left,
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _rank(
    graph: fx.GraphModule,
    args: tuple[Any, ...],
    rank: int,
    size: int,
    case: Case,
    timeout: float,
    port: int,
    folder: Path,
) -> None:
    """Call a rank's graph twice; the first call has the fault."""
    import torch.distributed as dist

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the traceback is in the error
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=2 * timeout)
    )
    transfer, done, options = ops.transfer, 0, dict(_OPTIONS)

    def note(**what: str) -> None:
        (folder / "fault").write_text(json.dumps({"time": time.monotonic(), **what}))

    def faulty(transfers: Any, ranks: Ranks, what: str) -> None:
        nonlocal done
        done += 1
        if rank == case.culprit and case.fault in AT_A_PLACE and done == case.place + 1:
            note(what=what)
            if case.fault == "skip":
                return
            _fail(case.fault)
        transfer(transfers, ranks, what)

    dist.barrier()
    if rank == case.culprit and case.fault in AT_THE_START:
        note()
        if case.fault == "options":
            options["reference_frames"] = 2
        else:
            next(one for one in args if one.dim() == 2 and one.requires_grad).data[0, 0] += 1e-3
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    run = compared(graph, Ranks(rank, size, "0", timeout), {"options": options}, names)
    try:
        with patch.object(ops, "transfer", faulty), torch.no_grad():
            for _ in range(2):
                run(*args, *graph.meta["extra"].blank())
    except Exception as error:
        about = {"time": time.monotonic(), "error": f"{type(error).__name__}: {error}"}
        (folder / str(rank)).write_text(json.dumps(about))
        raise


def _fail(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise ZeroDivisionError("a kernel failed")
    if fault == "hang":
        time.sleep(1000)
    torch.distributed.all_reduce(torch.ones(5))
