"""Progress without a terminal: lines that say how far the work is, few of them; bars on a terminal."""

import io

import pytest
from rich.console import Console

from sparsify_compiler import progress
from sparsify_compiler.progress import advance, bars, phase


class Work:
    """A display on a file, and a clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.file = io.StringIO()
        self.bar = bars(Console(file=self.file, width=40))
        self.bar.get_time = lambda: self.now

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


@pytest.mark.parametrize("seconds", [0.01, 3.0, 25.0])
def test_a_line_at_the_begin_and_the_end_and_not_too_often_between(seconds: float) -> None:
    work, total = Work(), 100
    with work.bar:
        step = advance(work.bar, "searching", total)
        assert work.lines == ["searching: 0 of 100"]
        for number in range(1, total + 1):
            work.now += seconds
            before = len(work.lines)
            step()
            assert len(work.lines) <= before + 1
            if len(work.lines) > before:
                assert work.lines[-1].startswith(f"searching: {number} of 100")
    assert work.lines[-1].startswith("searching: 100 of 100")
    apart = max(1, -(-progress.EVERY // seconds))
    assert len(work.lines) == 1 + total // apart + (total % apart > 0)


def test_lines_tell_the_time_gone_and_left() -> None:
    work = Work()
    with work.bar:
        step = advance(work.bar, "searching", 10)
        for _ in range(5):
            work.now += 60
            step()
    assert work.lines[-1] == "searching: 5 of 10, 0:05:00, 0:05:00 left"


def test_a_description_that_changes_waits_for_its_line() -> None:
    work = Work()
    with work.bar:
        task = work.bar.add_task("stage 1", total=3)
        for loss in (3.0, 2.0):
            work.now += 6
            work.bar.update(task, advance=1, description=f"stage 1: loss {loss}")
    assert work.lines == ["stage 1: 0 of 3", "stage 1: loss 2.0: 2 of 3, 0:00:12, 0:00:06 left"]


def test_a_phase_has_a_line_before_and_after() -> None:
    work = Work()
    with work.bar:
        with phase(work.bar, "compile [dense]"):
            assert work.lines == ["compile [dense]"]
            work.now += 61
        assert work.lines[1:] == ["compile [dense]: 1 of 1, 0:01:01"]
        work.bar.console.print("a result")
    assert work.lines[-1] == "a result"


def test_tracking_prints_lines_too() -> None:
    work = Work()
    with work.bar:
        for _ in work.bar.track(range(3), description="levels"):
            work.now += 20
    assert [line.split(",")[0] for line in work.lines] == [f"levels: {n} of 3" for n in (0, 1, 2, 3)]


def test_long_lines_are_not_broken() -> None:
    work = Work()
    with work.bar:
        advance(work.bar, "word " * 40, 2)
    assert len(work.lines) == 1


def test_a_terminal_has_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    with bars(Console(file=file, force_terminal=True, width=80)) as bar:
        step = advance(bar, "searching", 2)
        step()
        step()
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in file.getvalue()
    assert "2/2" in file.getvalue()
