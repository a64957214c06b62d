"""A case of the fuzzer: a random program as source code, its inputs, and the verdict on it."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F

T = TypeVar("T")
Level = Literal["analysis", "end to end"]
"""The way from a program to a graph: a recorded run that only the passes get, or the whole of torch.compile."""

Outcome = Literal["sparse", "dense", "refused", "WRONG", "CRASH", "invalid"]
"""`sparse`: some attention is sparse, and right. `dense`: none is sparse. `refused`: a SparsifyError. `WRONG`: a
claim or a number is wrong. `CRASH`: an exception that eager does not raise. `invalid`: eager raises too, or
tokens move in more than one graph."""

FAULTS: tuple[Outcome, ...] = ("WRONG", "CRASH")


Source = Literal["channels first", "frames first", "packed"]
"""Layouts of the video input."""


class Draw:
    """Random choices from any source: `Draw(Random(7).randint)`, or hypothesis (see `cases` in `strategies.py`)."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.integer = integer
        """Draws an integer from the first number to the second, both included."""

    def of(self, *choices: T) -> T:
        """One of the choices; the first is the simplest."""
        return choices[self.integer(0, len(choices) - 1)]

    def chance(self, percent: int) -> bool:
        """True with this probability."""
        return self.integer(0, 99) >= 100 - percent

    def permutation(self, count: int) -> list[int]:
        """The numbers below `count` in any order."""
        rest = list(range(count))
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in range(count)]

    def divisor(self, number: int) -> int:
        """A divisor of a number, including 1 and the number; 1 for 0."""
        return self.of(*(n for n in range(1, max(number, 1) + 1) if number % n == 0))


def lines(text: str) -> tuple[str, ...]:
    """The lines of a text without indentation: a table of moves."""
    return tuple(line.strip() for line in text.strip().splitlines())


class Draft:
    """A program while it is drawn. Every statement runs at once, so that the next one knows the variables."""

    def __init__(self, **names: Any) -> None:
        self.names = {"torch": torch, "F": F, **names}
        """Name -> value of the variables."""
        self.moves: list[str] = []

    def add(self, move: str) -> bool:
        """Append statements if they run, and return whether they do. `; ` begins a new line."""
        move = move.replace("; ", "\n")
        names = dict(self.names)
        try:
            with torch.no_grad():
                exec(move, names)
        except Exception:
            return False
        self.names = names
        self.moves.append(move)
        return True


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The inputs of a program: a video, a text, and the layout of the video."""

    grid: tuple[int, int, int] = (3, 2, 3)
    """(frames, rows, columns) of the video's tokens."""
    batch: int = 2
    text: int = 5
    """Number of tokens of the text."""
    patch: tuple[int, int, int] = (1, 2, 2)
    """Pixels of a token along each axis."""
    source: Source = "channels first"
    """The video as [B, C, F, H, W], as [B, F, C, H, W], or as tokens [B, S, WIDTH]."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the video."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True, kw_only=True)
class Case:
    """A program and its inputs. A case is data: it can be printed, stored, shrunk and run again."""

    kind: str
    """The kind of faults that it searches: a key of `KINDS`."""
    scene: Scene
    moves: tuple[str, ...]
    """Statements in order, each of one or more lines: the body of `program(m, video, text)`, which returns x."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backend."""
    calls: tuple[dict[str, Any], ...] = ()
    """For the kind `calls`: the differences of each call of the compiled program from a usual one."""
    tolerance: float = 1e-3
    """Largest difference of two outputs that is rounding, relative to the largest number."""

    @property
    def parameters(self) -> str:
        """The parameters of the program. Those of the kind `calls` have a time too."""
        return "m, video, text, t" if self.calls else "m, video, text"

    @property
    def source(self) -> str:
        """The program as Python."""
        body = [line for move in self.moves for line in move.splitlines()]
        return "\n    ".join([f"def program({self.parameters}):", *body, "return x"]) + "\n"

    def program(self) -> Callable[..., Any]:
        """The program as a new function, with a code object that Dynamo has not seen."""
        names: dict[str, Any] = {"torch": torch, "F": F}
        exec(compile(self.source, f"<{self.kind}>", "exec"), names)
        return names["program"]

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Case":
        """The case from its `asdict`, after JSON."""
        fields = {name: _tuples(value) for name, value in fields.items()}
        return Case(**fields | {"scene": Scene(**fields["scene"])})


def _tuples(value: Any) -> Any:
    """A value from JSON, with tuples instead of lists."""
    if isinstance(value, dict):
        return {key: _tuples(one) for key, one in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Verdict:
    """The result of a case."""

    outcome: Outcome
    message: str = ""
    """For a fault or refusal: the result found, and the right one."""

    @property
    def is_fault(self) -> bool:
        """Whether the compiler is wrong."""
        return self.outcome in FAULTS

    def like(self, other: "Verdict") -> bool:
        """Whether both are the same kind of fault: a smaller case must not fail for another reason."""
        raised, other_raised = (verdict.message.partition(":")[0] for verdict in (self, other))
        return self.outcome == other.outcome and (self.outcome != "CRASH" or raised == other_raised)


def shrink(case: Case, judge: Callable[[Case], Verdict], most: int = 300) -> tuple[Case, Verdict]:
    """Remove the moves and calls that the fault of a case does not need; return the rest and its verdict.

    Greedy: it removes runs of statements, long ones first, then pairs, as long as the same kind of fault remains.

    Args:
        judge: returns the verdict on a case.
        most: largest number of cases to try.
    """
    verdict, tried = judge(case), 0
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(case):
            if (tried := tried + 1) > most:
                return case, verdict
            found = judge(candidate)
            if found.like(verdict):
                case, verdict, smaller = candidate, found, True
                break
    return case, verdict


def _smaller(case: Case) -> Iterator[Case]:
    for moves in _without_some(case.moves):
        yield replace(case, moves=moves)
    for calls in _without_some(case.calls):
        yield replace(case, calls=calls)
    for at, call in enumerate(case.calls):
        for name in call:
            less = {key: value for key, value in call.items() if key != name}
            yield replace(case, calls=(*case.calls[:at], less, *case.calls[at + 1 :]))


def _without_some(items: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """The items without one run of items, longest runs first; then without any two items."""
    count = len(items)
    for run in range(count - 1, 0, -1):
        for start in range(count - run + 1):
            yield (*items[:start], *items[start + run :])
    for i, j in itertools.combinations(range(count), 2):
        if j > i + 1:
            yield tuple(item for at, item in enumerate(items) if at not in (i, j))


SCRIPT = '''"""{outcome}: {message}

Exits with 1 as long as the fault exists.
"""

import torch
import torch.nn.functional as F

from sparsify_compiler.testing.fuzzing import Scene, check_script


{source}

if __name__ == "__main__":
    check_script(
        program,
        kind={kind!r},
        level={level!r},
        scene={scene!r},
        options={options!r},
        calls={calls!r},
        tolerance={tolerance!r},
    )
'''


def save(case: Case, level: Level, verdict: Verdict, folder: Path, name: str) -> Path:
    """Write a fault to a folder, and return the path of its script.

    `name.py` runs alone and exits with 1 as long as the fault exists; `name.json` is for
    `python -m benchmarks.fuzz --replay`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"level": level, "case": asdict(case)}) + "\n")
    fields = {field: getattr(case, field) for field in ("kind", "scene", "options", "calls", "tolerance")}
    message = verdict.message.replace("\\", "/").replace('"', "'")
    script = folder / f"{name}.py"
    script.write_text(
        SCRIPT.format(outcome=verdict.outcome, message=message, source=case.source, level=level, **fields)
    )
    return script
