"""The fuzzer: random programs, compared with facts known by construction or with eager PyTorch.

    case = random_case(kind, seed, 7)       a program as source code, drawn choice by choice
    verdict = judge(case, level)            the result
    case, verdict = shrink(case, judge)     the part of it that still fails
    save(case, level, verdict, folder, …)   a script that exits with 1 as long as the fault exists

| kind | question | files |
| --- | --- | --- |
| `tokens` | do the tokens of a layout lie where it says? | `programs.py`, `moves.py`, `tables.py`, `judging.py` |
| `writes` | do they still, after writes and through aliases? | `writes.py` and the same |
| `spellings` | is attention what was taken for attention? | `spellings.py` |
| `calls` | does one compiled model serve any sizes, types and modes? | `calls.py` |

`python -m benchmarks.fuzz` runs many cases; tests run a few, which hypothesis draws (`strategies.cases`).
"""

import sys
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from sparsify_compiler.testing.fuzzing.calls import draw_calls, judge_calls
from sparsify_compiler.testing.fuzzing.cases import Case, Draw, Level, Scene, Verdict, save, shrink
from sparsify_compiler.testing.fuzzing.judging import judge_tokens
from sparsify_compiler.testing.fuzzing.machines import Program
from sparsify_compiler.testing.fuzzing.programs import draw_program
from sparsify_compiler.testing.fuzzing.spellings import draw_spelling, judge_spelling

__all__ = [
    "KINDS",
    "Case",
    "Draw",
    "Scene",
    "Verdict",
    "check_script",
    "draw_case",
    "judge",
    "random_case",
    "save",
    "shrink",
]


class Kind(NamedTuple):
    """A kind of programs."""

    draw: Callable[[Draw], Case]
    judge: Callable[[Case, Level, Program], Verdict]


KINDS: dict[str, Kind] = {
    "tokens": Kind(lambda draw: draw_program("tokens", draw), judge_tokens),
    "writes": Kind(lambda draw: draw_program("writes", draw), judge_tokens),
    "spellings": Kind(draw_spelling, judge_spelling),
    "calls": Kind(draw_calls, judge_calls),
}


def draw_case(kind: str, draw: Draw) -> Case:
    """A case of a kind."""
    return KINDS[kind].draw(draw)


def random_case(kind: str, seed: int, number: int) -> Case:
    """Case `number` of a seed: always the same, independent of earlier draws."""
    return draw_case(kind, Draw(Random(f"{kind}/{seed}/{number}").randint))


def judge(case: Case, level: Level = "end to end", program: Program | None = None) -> Verdict:
    """The verdict on a case.

    Args:
        program: a program to use instead of the case's own, which is compiled from source.
    """
    return KINDS[case.kind].judge(case, level, program or case.program())


def check_script(program: Program, *, level: Level, **fields: Any) -> None:
    """Judge the program of a script; print the verdict and exit with 1 if it is a fault."""
    verdict = judge(Case(moves=(), **fields), level, program)
    print(verdict.outcome, verdict.message)
    sys.exit(verdict.is_fault)
