"""The progress of long work: bars on a terminal, lines in a file or a pipe. Imports rich."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY = 10.0
"""Seconds between two lines of one task."""


def bars(console: Console | None = None, *, transient: bool = False) -> Progress:
    """A display without tasks; text printed to its `console` appears above the bars.

    Args:
        console: stderr if None.
        transient: whether bars disappear at the end.
    """
    console = console or Console(stderr=True)
    if not console.is_jupyter and (not console.is_terminal or console.is_dumb_terminal):
        return _Lines(console)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=transient)


@contextmanager
def phase(progress: Progress, name: str) -> Iterator[None]:
    """A task without a count that ends with the block."""
    task = progress.add_task(name, total=None)
    yield
    progress.update(task, total=1, completed=1)


def advance(progress: Progress, name: str, total: int) -> Callable[[], None]:
    """Add a task of `total` steps; return a function that counts one step."""
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task)


class _Lines(Progress):
    """Prints a line when a task begins, at most every `EVERY` seconds while it runs, and when it ends."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            console=console,
            auto_refresh=False,
            disable=True,
            get_time=time.monotonic,
            speed_estimate_period=60 * EVERY,
        )
        self._printed: dict[TaskID, float] = {}
        """Time of a task's last line; infinity after the line for its end."""

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        task = super().add_task(*args, **kwargs)
        self._print(task)
        return task

    def update(self, task_id: TaskID, *args: Any, **kwargs: Any) -> None:
        super().update(task_id, *args, **kwargs)
        self._print_where_due(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print_where_due(task_id)

    def _print_where_due(self, task_id: TaskID) -> None:
        finished = self._tasks[task_id].finished
        if self.get_time() >= self._printed[task_id] + EVERY or (
            finished and self._printed[task_id] < float("inf")
        ):
            self._print(task_id)

    def _print(self, task_id: TaskID) -> None:
        task = self._tasks[task_id]
        parts = [
            task.description
            if task.total is None
            else f"{task.description}: {task.completed:g} of {task.total:g}"
        ]
        if elapsed := int(task.elapsed or 0):
            parts.append(str(timedelta(seconds=elapsed)))
        if not task.finished and task.time_remaining is not None:
            parts.append(f"{timedelta(seconds=int(task.time_remaining))} left")
        self.console.print(", ".join(parts), markup=False, highlight=False, soft_wrap=True)
        self._printed[task_id] = float("inf") if task.finished else self.get_time()
