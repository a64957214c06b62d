"""Everything is called as often as it is timed, by turns."""

from sparsify_compiler.timing import interleaved_medians, timed


def test_all_take_turns_after_a_round_that_does_not_count() -> None:
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = interleaved_medians(functions, 3, after_round=lambda: calls.append("-"))
    assert "".join(calls) == "ab" + 3 * "ab-"
    assert seconds.keys() == functions.keys()
    assert all(value > 0 for value in seconds.values())


def test_a_timed_call_gives_back_its_result() -> None:
    seconds, result = timed(lambda: 5)
    assert result == 5
    assert seconds > 0
