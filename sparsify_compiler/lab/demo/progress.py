"""Progress bars of the demo."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def bars(console: Console) -> Progress:
    """A display without bars yet. Lines printed to its `console` appear above the bars."""
    columns = (TextColumn("{task.description:<45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


@contextmanager
def phase(progress: Progress, name: str) -> Iterator[None]:
    """A bar that pulses until the block is done."""
    task = progress.add_task(name, total=None)
    yield
    progress.update(task, total=1, completed=1)


def advance(progress: Progress, name: str, total: int) -> Callable[[], None]:
    """A bar of `total` steps, and the function that moves it by one."""
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task)
