"""Several ranks on one machine: processes with one gloo group for each number of ranks, which run functions.

with Pool(4) as pool:
    first, second = pool.run(2, function, *arguments)      function(ranks, *arguments) on ranks 0 and 1
"""

import multiprocessing
import os
import socket
import struct
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from sparsify_compiler.plan import Ranks

PRELOAD = ["torch", "torch._dynamo", "sparsify_compiler.parallel.ops", "sparsify_compiler.testing.models"]
"""Modules that all ranks have from the start: they are imported once."""


class RankFailedError(AssertionError):
    """A function raised on a rank, or its process ended; the message has the traceback."""

    def __init__(self, results: list[tuple[bool, Any]]) -> None:
        self.results = results
        """(whether the function returned, its result or the traceback) of each rank."""
        texts = (f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(results) if not good)
        super().__init__("\n".join(texts))


class Pool:
    """`size` processes that stay between runs. Every run uses the first ranks of them."""

    def __init__(self, size: int, timeout: float = 30) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name) / "store"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_work, args=(there, rank, size, str(store), timeout), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The result of `function(Ranks, *arguments)` on each of the first `ranks` processes.

        Raises:
            RankFailedError: the function raised on a rank.
        """
        for pipe in self._pipes[:ranks]:
            pipe.send((ranks, function, arguments))
        results = [_received(pipe) for pipe in self._pipes[:ranks]]
        if not all(good for good, _ in results):
            raise RankFailedError(results)
        return [result for _, result in results]


def received_bytes() -> int:
    """Bytes that the TCP sockets of this process have received, as Linux counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
        except FileNotFoundError:  # it listed the folder
            continue
        with socket.socket(fileno=os.dup(int(name))) as one:
            if one.type == socket.SOCK_STREAM and one.family in (socket.AF_INET, socket.AF_INET6):
                about = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                total += struct.unpack_from("Q", about, 128)[0]  # tcpi_bytes_received
    return total


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        found: tuple[bool, Any] = pipe.recv()
    except (EOFError, ConnectionResetError):
        return False, "the process ended"
    return found


def _work(pipe: Connection, rank: int, size: int, store: str, timeout: float) -> None:
    """Run what arrives, until the pipe closes."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    groups = {number: dist.new_group(range(number)) for number in range(1, size + 1)}
    while True:
        try:
            number, function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            result = True, function(Ranks(rank, number, groups[number].group_name, timeout), *arguments)
        except Exception:
            result = False, traceback.format_exc()[-6000:]
        pipe.send(result)
    dist.destroy_process_group()
