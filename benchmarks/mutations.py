"""`python -m benchmarks.mutations`: break layout inference in many ways, one at a time, and check that it is
noticed.

A mutant is a broken copy of a rule (`passes/axis_rules.py`), of the tracker that calls rules
(`passes/axis_tracker.py`), of the algebra of labels (`passes/axes.py`), of labels that meet
(`passes/meeting.py`), of the effect of writes on labels (`passes/axis_writes.py`), of the run on fake tensors
(`passes/following.py`) or of the conditions of a layout (`passes/layout.py`). It is caught if a case of the
fuzzer becomes wrong, crashes or loses its grid, or if a test fails. The names of mutants that survive are printed.
"""

import argparse
import ast
import inspect
import itertools
import multiprocessing
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.fuzz import quiet
from benchmarks.harness import write_json
from sparsify_compiler.passes import axes, axis_rules, axis_tracker, axis_writes, following, layout, meeting
from sparsify_compiler.passes.axes import Label, fresh, length
from sparsify_compiler.passes.axis_rules import RULES, Rule
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.testing.fuzzing import Verdict, judge, random_case

CaseId = tuple[str, int]
"""(kind, number) of a case of seed 0."""

TESTS = tuple(
    f"tests/passes/test_{name}.py"
    for name in (
        "rules",
        "axes",
        "videos",
        "layout",
        "given_grids",
        "bodies",
        "capture",
        "unfused",
        "strides",
    )
)
"""Tests in the order in which they run, up to the first that fails."""
MODULES: tuple[ModuleType, ...] = (axes, meeting, axis_rules, axis_tracker, axis_writes, following, layout)
SECONDS = 20
"""Seconds after which a case counts as hanging."""


@dataclass(frozen=True)
class Mutant:
    """A way to break a function."""

    name: str
    target: str
    """The broken function, e.g. `axes.cut`, which a case must call to notice the mutant."""
    install: Callable[[], Callable[[], None]]
    """Breaks the function, and returns a function that restores it."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Break the function inside the block."""
        mend = self.install()
        try:
            yield
        finally:
            mend()


# Broken copies of rules: instead of its own result, a rule returns one of these.


def by_size(rule: Rule) -> Rule:
    """Trust sizes: every dimension gets the label of the first input's first dimension of that size."""

    def broken(tracker: AxisTracker, output: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
        tensors = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
        labels = list(tracker.of(tensors[0])) if tensors else []
        found = []
        for size in output.shape:
            at = next((i for i, label in enumerate(labels) if length(label) == size), None)
            found.append(fresh(size) if at is None else labels.pop(at))
        return found

    return broken


def disordered(rule: Rule) -> Rule:
    """Reverse the factors of every label, or exchange the labels of two dimensions of the same size."""

    def broken(tracker: AxisTracker, output: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
        labels = list(rule(tracker, output, *args, **kwargs))
        if any(len(label) > 1 for label in labels):
            return [label[::-1] for label in labels]
        for i, j in itertools.combinations(range(len(labels)), 2):
            if length(labels[i]) == length(labels[j]) > 1:
                labels[i], labels[j] = labels[j], labels[i]
                break
        return labels

    return broken


def forgetful(rule: Rule) -> Rule:
    """Know nothing, not even that the tokens were a video's."""
    return lambda tracker, output, *args, **kwargs: [fresh(size) for size in output.shape]


BROKEN_RULES = (by_size, disordered, forgetful)

EQUAL = {
    "rule of arange disordered": "one dimension has one order",
    "rule of empty, zeros, ones, ... disordered": "labels of which nothing is known are all alike",
    "rule of view_as_real, view_as_complex by_size": "dimensions that keep order and size get their own labels",
}
"""Mutant -> reason why it is equal to the original: no case and no test can distinguish them."""


def rule_mutants() -> Iterator[Mutant]:
    """Every rule, broken in every way of `BROKEN_RULES`."""
    names: dict[Rule, list[str]] = {}
    for name, rule in RULES.items():
        names.setdefault(rule, []).append(name)
    for rule, operators in names.items():
        for way in BROKEN_RULES:
            name = f"rule of {', '.join(operators[:3])}{', ...' if len(operators) > 3 else ''} {way.__name__}"
            yield Mutant(name, full_name(rule), lambda rule=rule, way=way: replace_rule(rule, way(rule)))


def replace_rule(rule: Rule, broken: Rule) -> Callable[[], None]:
    """Replace `rule` by `broken`; return a function that restores it."""
    before = dict(RULES)
    RULES.update({name: broken for name, one in before.items() if one is rule})
    return lambda: RULES.update(before)


# Broken source: a check left out, an operand dropped, a bound moved by one.


class Edit(ast.NodeTransformer):
    """Makes edit number `wanted` of all possible edits of a function, and describes it."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.seen, self.said = wanted, -1, ""

    def turn(self, node: ast.AST, into: Callable[[], ast.AST], said: str) -> ast.AST:
        self.seen += 1
        if self.seen != self.wanted:
            return node
        self.said = f"line {node.lineno}: {said}"
        return ast.copy_location(into(), node)

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        never = lambda: ast.If(ast.Constant(False), node.body, node.orelse)  # noqa: E731
        return self.turn(node, never, f"never {ast.unparse(node.test)}")

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        result: ast.AST = node
        for dropped in node.values:
            if "isinstance" in ast.unparse(dropped):
                continue  # without it, other types fail: no other claim
            rest = [one for one in node.values if one is not dropped]
            less = lambda rest=rest: rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)  # noqa: E731
            result = self.turn(result, less, f"without {ast.unparse(dropped)}") if result is node else result
        return result

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        other = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
        swap = other.get(type(node.ops[0]))
        if swap is None:
            return node
        return self.turn(
            node,
            lambda: ast.Compare(node.left, [swap(), *node.ops[1:]], node.comparators),
            f"off: {ast.unparse(node)}",
        )

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = {ast.Add: ast.Sub, ast.Sub: ast.Add}
        swap = other.get(type(node.op))
        if swap is None or any(isinstance(one, (ast.List, ast.JoinedStr)) for one in ast.walk(node)):
            return node
        return self.turn(node, lambda: ast.BinOp(node.left, swap(), node.right), f"sign: {ast.unparse(node)}")

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in ("any", "all"):
            value = node.func.id == "all"
            return self.turn(node, lambda: ast.Constant(value), f"{value}: {ast.unparse(node)}")
        return node


def edited(function: FunctionType, number: int) -> tuple[str, CodeType] | None:
    """(description of edit `number` of a function, its code); None after the last edit."""
    edit = Edit(number)
    code = compiled(function, edit.visit(parsed(function)))
    return (edit.said, code) if edit.said else None


def parsed(function: FunctionType) -> ast.FunctionDef:
    """The definition of a function."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    return definition


def compiled(function: FunctionType, definition: ast.FunctionDef) -> CodeType:
    """The code of another definition of a function."""
    definition.decorator_list = []
    module = ast.fix_missing_locations(ast.Module([definition], []))
    names: dict[str, Any] = {}
    exec(compile(module, function.__code__.co_filename, "exec"), function.__globals__, names)
    return names[function.__name__].__code__


def functions() -> Iterator[tuple[str, FunctionType]]:
    """(`axes.Atom.rank`, function) of all that the modules define, methods and properties too."""
    for module in MODULES:
        classes = [one for one in vars(module).values() if getattr(one, "__module__", "") == module.__name__]
        for holder in (module, *(one for one in classes if isinstance(one, type))):
            for value in vars(holder).values():
                function = inspect.unwrap(value.fget if isinstance(value, property) else value)
                if not isinstance(function, FunctionType) or function.__module__ != module.__name__:
                    continue
                if function.__code__.co_filename == module.__file__ and not function.__code__.co_freevars:
                    yield full_name(function), function


def full_name(function: Callable[..., Any]) -> str:
    """`axes.cut`."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


def source_mutants() -> Iterator[Mutant]:
    """Every edit of every function. An edit replaces its code, so every reference to it calls the broken one."""
    for name, function in functions():
        number = 0
        while (made := edited(function, number)) is not None:
            said, code = made
            number += 1
            yield Mutant(f"{name}, {said}", name, lambda f=function, code=code: replace_code(f, code))


def replace_code(function: FunctionType, code: CodeType) -> Callable[[], None]:
    """Give a function other code; return a function that restores its own."""
    before = function.__code__
    function.__code__ = code

    def mend() -> None:
        function.__code__ = before

    return mend


@cache
def mutants() -> dict[str, Mutant]:
    """Name -> mutant, for all mutants except those of `EQUAL`."""
    made = {mutant.name: mutant for mutant in (*rule_mutants(), *source_mutants())}
    assert made.keys() >= EQUAL.keys(), EQUAL.keys() - made.keys()
    return {name: mutant for name, mutant in made.items() if name not in EQUAL}


# Running them.


class Hangs(BaseException):
    """A case takes too long."""


def outcome(case_id: CaseId) -> Verdict:
    """The verdict on a case by analysis."""

    def hang(*_: object) -> None:
        raise Hangs

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        kind, number = case_id
        return judge(random_case(kind, 0, number), "analysis")
    except Hangs:
        return Verdict("CRASH", "hangs")
    finally:
        signal.alarm(0)


@contextmanager
def watched() -> Iterator[set[str]]:
    """Yield the set of names of the functions called inside; it grows during the block."""
    called: set[str] = set()
    mends = []
    for name, function in list(functions()):
        definition = parsed(function)
        definition.body[:0] = ast.parse(f"_CALLED.add({name!r})").body
        function.__globals__["_CALLED"] = called
        mends.append(replace_code(function, compiled(function, definition)))
    try:
        yield called
    finally:
        for mend in mends:
            mend()


Seen = tuple[CaseId, Verdict, set[str]]
"""(case, its verdict without mutants, the functions that it calls)."""


def baseline(ids: Sequence[CaseId]) -> list[Seen]:
    """Judge some cases without mutants."""
    quiet()
    seen = []
    with watched() as called:
        for case_id in ids:
            called.clear()
            seen.append((case_id, outcome(case_id), set(called)))
    return seen


def caught(name: str, cases: Sequence[tuple[CaseId, Verdict]]) -> str:
    """The fault of the first case that notices a mutant, or the grid that it loses; or ""."""
    quiet()
    with mutants()[name].installed():
        for case_id, before in cases:
            now = outcome(case_id)
            if now.is_fault:
                return f"{case_id[0]}/0/{case_id[1]} {now.outcome}: {now.message}"
            if before.outcome == "sparse" and now.outcome != "sparse":
                return f"{case_id[0]}/0/{case_id[1]} is no longer sparse"
    return ""


def failing_test(name: str) -> str:
    """The first test that fails with a mutant, or "". It runs in a separate process."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, sys.stdout.fileno())
        os.dup2(write, sys.stderr.fileno())
        os._exit(run_tests(name))
    os.close(write)
    with os.fdopen(read, errors="replace") as lines:
        failed = [line.strip() for line in lines if line.startswith(("FAILED", "ERROR"))]
    _, status = os.waitpid(child, 0)
    return (failed or ["the tests end with an error"])[0][:160] if status else ""


def run_tests(name: str) -> int:
    """Run the tests with a mutant; pytest's exit code."""
    import pytest

    with mutants()[name].installed():
        code = int(pytest.main([*TESTS, "-x", "-q", "-rf", "-p", "no:cacheprovider", "--tb=no"]))
    sys.stdout.flush()
    return code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        type=int,
        default=3000,
        help="number of fuzzer cases, of which those with faults or grids are used",
    )
    parser.add_argument(
        "--most", type=int, default=400, help="cases to try on a mutant before it survives the fuzzer"
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="run only mutants whose names begin with this"
    )
    parser.add_argument(
        "--no-tests", action="store_true", help="do not run the tests on mutants that survive the fuzzer"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    ids: list[CaseId] = [(kind, number) for number in range(args.cases // 2) for kind in ("tokens", "writes")]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        batches = pool.map(baseline, [ids[at : at + 50] for at in range(0, len(ids), 50)])
        before = [one for batch in batches for one in batch if not one[1].is_fault]
        chosen = [mutant for mutant in mutants().values() if mutant.name.startswith(tuple(args.only))]
        seeing = [
            [(case_id, verdict) for case_id, verdict, called in before if mutant.target in called][
                : args.most
            ]
            for mutant in chosen
        ]
        names = [mutant.name for mutant in chosen]
        for name, cases, how in zip(names, seeing, pool.map(caught, names, seeing), strict=True):
            how = how or ("" if args.no_tests else failing_test(name))
            rows.append({"mutant": name, "caught_by": how, "cases": len(cases)})
            print(
                f"{'caught  ' if how else 'SURVIVES'} {name}: {how or f'of {len(cases)} cases'}", flush=True
            )
    survivors = [row["mutant"] for row in rows if not row["caught_by"]]
    caught_now = len(rows) - len(survivors)
    print(f"caught {caught_now} of {len(rows)}", *survivors, sep="\n")
    if args.out:
        summary = {"mutants": len(rows), "caught": caught_now, "survivors": survivors, "equal": EQUAL}
        write_json(args.out, [summary, *rows])


if __name__ == "__main__":
    main()
