"""The fuzzer, shortly, and that it can fail: with a broken rule it finds a fault, shrinks it and saves it.

Long runs are `python -m benchmarks.fuzz`.
"""

import json
import os
import runpy
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from benchmarks import fuzz, mutations
from sparsify_compiler.passes import axes
from sparsify_compiler.passes.axis_rules import RULES
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.testing.fuzzing import (
    KINDS,
    Case,
    Draw,
    Level,
    Scene,
    Verdict,
    judge,
    judging,
    moves,
    random_case,
    save,
    shrink,
    tables,
    writes,
)
from sparsify_compiler.testing.fuzzing.strategies import cases
from sparsify_compiler.testing.fuzzing.tokens import Tokens

pytestmark = pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")


def short(examples: int) -> Callable[..., Callable[..., None]]:
    """The same few examples in every run; the fuzzer shrinks by itself, in less time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.large_base_example,
        ],
    )


def check(case: Case, level: Level) -> None:
    if judge(case, level).is_fault:
        case, verdict = shrink(case, lambda one: judge(one, level))
        pytest.fail(
            f"{verdict.message}\n{case.scene} {case.options} {case.calls}\n{case.source}", pytrace=False
        )


@short(25)
@given(cases("tokens"))
def test_claims_of_tokens_that_move_are_true(case: Case) -> None:
    check(case, "analysis")


@short(25)
@given(cases("writes"))
def test_claims_of_tokens_that_are_written_are_true(case: Case) -> None:
    check(case, "analysis")


@short(6)
@given(cases("tokens"))
def test_tokens_that_move_are_attended_right(case: Case) -> None:
    check(case, "end to end")


@short(6)
@given(cases("writes"))
def test_tokens_that_are_written_are_attended_right(case: Case) -> None:
    check(case, "end to end")


@short(12)
@given(cases("spellings"))
def test_no_spelling_is_mistaken(case: Case) -> None:
    check(case, "end to end")


@short(4)
@given(cases("calls"))
def test_one_model_serves_any_calls(case: Case) -> None:
    check(case, "end to end")


def flipped_in_place(tracker: AxisTracker, output: Tensor, x: Tensor, *_: object) -> list[object]:
    """A broken rule: flipping moves nothing."""
    return tracker.of(x)


FLIP = Case(
    kind="tokens",
    scene=Scene(),
    moves=(
        "x = m.conv3d(video).flatten(2).transpose(1, 2)",
        "x = m.norm(x)",
        "x = torch.cat([text, x], 1)[:, 5:]",
        "x = x.flip(1)",
        "x = x + m.pooled(x)",
        "x = m.attend(x, 0)",
    ),
)


@pytest.mark.parametrize("level", ["analysis", "end to end"])
def test_a_broken_rule_is_found_shrunk_and_saved(
    level: Level, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert judge(FLIP, level) == Verdict("dense")
    with monkeypatch.context() as broken:
        broken.setitem(RULES, "flip", flipped_in_place)
        verdict = judge(FLIP, level)
        assert verdict.outcome == "WRONG"
        assert "its tokens are from frame [2, 2, 2, 2, 2, 2, 1" in verdict.message
        small, found = shrink(FLIP, lambda case: judge(case, level))
        assert small.moves == (FLIP.moves[0], "x = x.flip(1)", "x = m.attend(x, 0)")
        script = save(small, level, found, tmp_path, "fault")
        with pytest.raises(SystemExit) as stands:
            runpy.run_path(str(script), run_name="__main__")
        assert stands.value.code == 1
        assert fuzz.replay(script.with_suffix(".json")) == found
    with pytest.raises(SystemExit) as gone:
        runpy.run_path(str(script), run_name="__main__")
    assert gone.value.code == 0
    assert Case.from_json(json.loads(script.with_suffix(".json").read_text())["case"]) == small


def test_random_programs_find_the_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "flip", flipped_in_place)
    programs = [random_case("tokens", 0, number) for number in range(600)]
    flips = [case for case in programs if ".flip(1)" in case.source][:40]
    assert any("flip" in case.source and judge(case, "analysis").outcome == "WRONG" for case in flips)


def test_a_wrong_output_is_found() -> None:
    """An attention whose mask is not the model's: the plan is right, and the output is wrong."""
    case = Case(
        kind="tokens", scene=Scene(), moves=("x = m.conv3d(video).flatten(2).mT", "x = m.attend(x, 0)")
    )
    assert judge(case).outcome == "sparse"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judging.OPTIONS, "reference_frames", 2)
        assert "differs from dense attention under the true mask" in judge(case).message


def test_the_same_case_is_drawn_again() -> None:
    for kind in KINDS:
        case = random_case(kind, 3, 7)
        assert case == random_case(kind, 3, 7) != random_case(kind, 3, 8)
        assert case == Case.from_json(json.loads(json.dumps(asdict(case))))


def test_enough_cases_are_sparse() -> None:
    outcomes = Counter(judge(random_case("tokens", 1, number), "analysis").outcome for number in range(20))
    assert outcomes["sparse"] >= 5, outcomes


def runs(line: str, seed: int, **more: object) -> bool:
    """Whether a line of a table runs on tokens of some video."""
    scenes = [Scene(grid=(3, 3, 3), batch=3), Scene(grid=(4, 2, 2), batch=1, patch=(1, 1, 1)), Scene()]
    draw = Draw(Random(seed).randint)
    tokens = Tokens(scenes[seed % 3])
    tokens.add("x = m.conv3d(video).flatten(2).mT; y = x.clone()")
    return tokens.add(tables.filled(line, tokens, draw, **more))


def test_no_line_of_a_table_is_dead() -> None:
    everything = [*vars(moves).values(), *vars(writes).values(), *moves.RETURNING]
    lines = {line for table in everything if isinstance(table, tables.Table) for line in table.lines}
    assert len(lines) > 300
    assert [line for line in lines if not any(runs(line, seed, y="x", dim=1) for seed in range(12))] == []


def dies(chunk: fuzz.Chunk, first: int, connection: Connection) -> None:
    """As `fuzz.work`, but the second case takes the process with it."""
    for number in range(first, chunk.first + chunk.count):
        connection.send(("begins", number))
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send(("judged", number, Verdict("dense"), FLIP, 0.5))


def test_a_run_survives_its_cases_and_is_taken_up_again(tmp_path: Path) -> None:
    chunk = fuzz.Chunk("tokens", "analysis", 0, 0, 4)
    result = fuzz.run(chunk, work=dies, start="fork")
    assert result.outcomes == {"dense": 3, "CRASH": 1}
    assert [(found.number, found.verdict.message) for found in result.faults] == [
        (1, "the process ended with SIGKILL")
    ]
    fuzz.keep(result, tmp_path, set())
    assert fuzz.done(tmp_path) == {chunk: result}
    assert (tmp_path / "tokens-analysis-0-1.py").exists()
    counts, fault = fuzz.table([result])
    assert (counts["cases"], counts["CRASH"], fault["fault"]) == (4, 1, "tokens/0/1")


def test_the_shares_of_a_long_run_add_up() -> None:
    chunks = list(fuzz.chunks(34_000, [0, 1, 2], list(KINDS), list(fuzz.CHUNK)))
    assert len(set(chunks)) == len(chunks)
    assert sum(chunk.count for chunk in chunks) == pytest.approx(102_000, abs=10)
    assert sum(chunk.count for chunk in chunks if chunk.level == "end to end") >= 5_000


def test_a_mutant_is_caught_and_mended() -> None:
    name = next(
        name for name in mutations.mutants() if name.startswith("rule of permute") and "by_size" in name
    )
    before = dict(RULES)
    cases = [(("tokens", number), Verdict("dense")) for number in range(60)]
    assert "WRONG" in mutations.caught(name, cases)
    assert before == RULES
    source = next(name for name in mutations.mutants() if name.startswith("axes.cut") and "never" in name)
    code = axes.cut.__code__
    with mutations.mutants()[source].installed():
        assert axes.cut.__code__ is not code
    assert axes.cut.__code__ is code
