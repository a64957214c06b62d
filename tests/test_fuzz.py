"""The fuzzer, shortly, and that it can fail: with a broken rule it finds a fault, shrinks it and saves it.

Long runs are `python -m benchmarks.fuzz`.
"""

import json
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from benchmarks import fuzz
from sparsify_compiler.passes.axis_rules import RULES, AxisTracker
from sparsify_compiler.testing.fuzzing import Case, Level, Scene, Verdict, judge, random_case, save, shrink
from sparsify_compiler.testing.fuzzing.strategies import cases

pytestmark = pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")


def short(examples: int) -> Callable[..., Callable[..., None]]:
    """The same few examples in every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=examples, derandomize=True, suppress_health_check=checks)


def check(case: Case, level: Level) -> None:
    verdict = judge(case, level)
    assert not verdict.is_fault, f"{verdict.message}\n{case.scene} {case.options} {case.calls}\n{case.source}"


@short(60)
@given(cases("tokens"))
def test_claims_of_tokens_that_move_are_true(case: Case) -> None:
    check(case, "analysis")


@short(60)
@given(cases("writes"))
def test_claims_of_tokens_that_are_written_are_true(case: Case) -> None:
    check(case, "analysis")


@short(10)
@given(cases("tokens"))
def test_tokens_that_move_are_attended_right(case: Case) -> None:
    check(case, "end to end")


@short(10)
@given(cases("writes"))
def test_tokens_that_are_written_are_attended_right(case: Case) -> None:
    check(case, "end to end")


@short(25)
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
        assert "its tokens are of frame [2, 2, 2, 2, 2, 2, 1" in verdict.message
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
    assert Case.from_json(json.dumps(json.loads(script.with_suffix(".json").read_text())["case"])) == small


def test_random_programs_find_the_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "flip", flipped_in_place)
    programs = [random_case("tokens", 0, number) for number in range(600)]
    flips = [case for case in programs if ".flip(1)" in case.source][:40]
    assert any("flip" in case.source and judge(case, "analysis").outcome == "WRONG" for case in flips)


def test_a_wrong_output_is_found() -> None:
    """An attention whose mask is not the model's: the plan is right, and what is computed is not."""
    from sparsify_compiler.testing.fuzzing import judging

    case = Case(
        kind="tokens", scene=Scene(), moves=("x = m.conv3d(video).flatten(2).mT", "x = m.attend(x, 0)")
    )
    assert judge(case).outcome == "sparse"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judging.OPTIONS, "reference_frames", 2)
        assert "off dense attention under the true mask" in judge(case).message


def test_the_same_case_is_drawn_again_and_most_kinds_are_sparse_at_times() -> None:
    for kind in ("tokens", "writes", "spellings", "calls"):
        assert random_case(kind, 3, 7) == random_case(kind, 3, 7) != random_case(kind, 3, 8)
    for kind, least in (("tokens", 12), ("writes", 4)):
        outcomes = Counter(judge(random_case(kind, 1, number), "analysis").outcome for number in range(40))
        assert outcomes["sparse"] >= least, outcomes


def test_a_run_counts_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pass
