"""`max_error` over whole generations: its state, its report, and the options that do not go with it."""

import math
from typing import Any

import pytest
import torch
from marks import fresh_dynamo, needs_diffusers, no_warnings
from torch import Tensor

import sparsify_compiler
from sparsify_compiler import OptionError
from sparsify_compiler.methods.base import max_error_of
from sparsify_compiler.options import configure
from sparsify_compiler.policy import entry_of
from sparsify_compiler.runtime.state import states_of
from sparsify_compiler.testing.models import CASES, GRID, output_of
from sparsify_compiler.training.search import read_menu

pytestmark = [fresh_dynamo, no_warnings, needs_diffusers]

OPTIONS = {
    "method": "cubes", "cube": (2, 3, 2), "query_cube": (3, 4, 4), "max_error": 0.05, "inner_backend": "eager",
    "dense_steps": 1, "dense_layers": 0,
}  # fmt: skip


def errors_in(model: torch.nn.Module) -> list[Tensor]:
    """The controller's state of every site and stream, in order."""
    (state,) = states_of(model.parameters())
    return [
        tensor.clone()
        for (specs, *_), stream in state._timelines.current.streams.items()
        for (name, *_), tensor in zip(specs, stream.tensors, strict=True)
        if name.endswith(".errors")
    ]


def test_nothing_is_carried_over_to_another_video_or_stream() -> None:
    """A video gives the same after one of another prompt, after one with NaN, and next to another stream."""
    model, inputs = CASES["wan"].build(GRID, batch=1)
    compiled: Any = torch.compile(model, backend="sparsify", options=OPTIONS)
    text = next(name for name in inputs if name.startswith("encoder_hidden_states"))

    def video(scale: float, *, streams: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        outputs = []
        for step in range(4):
            for stream in range(streams):
                now = inputs | {
                    "timestep": torch.full_like(inputs["timestep"], 900 - 250 * step),
                    "hidden_states": inputs["hidden_states"] + 0.1 * step,
                    text: (scale if stream == 0 else 3.0) * inputs[text],
                }
                with torch.no_grad():
                    out = output_of(compiled(**now))
                outputs += [out] if stream == 0 else []
        return outputs, errors_in(model)

    outputs, errors = video(1.0)
    assert len(errors) == len(model.blocks)
    for tensor in errors:  # three sparse calls
        assert torch.equal(tensor[..., 0], torch.full_like(tensor[..., 0], 3))
        assert (tensor[..., 1:].sum(1) > 0).all()
    one = sparsify_compiler.stats(compiled).measurements[-1]
    assert one.asked_error == 0.05
    assert 0 < float(one.estimated_error.mean()) < 0.05
    assert 0 < float(one.measured_error.mean()) < 0.2
    for between in (0.3, math.nan):
        _, others = video(between)
        assert all(tensor.isfinite().all() for tensor in others)
        again, same = video(1.0)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(errors, same, strict=True))
    again, both = video(1.0, streams=2)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
    assert len(both) == 2 * len(errors)
    assert all(any(torch.equal(a, b) for b in both) for a in errors)


def test_without_it_the_report_has_no_errors() -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    others = {name: value for name, value in OPTIONS.items() if name != "max_error"} | {"dense_steps": 0}
    compiled = torch.compile(model, backend="sparsify", options=others)
    with torch.no_grad(), sparsify_compiler.generation(steps=1, streams=1):
        compiled(**inputs)
    stats = sparsify_compiler.stats(compiled)
    assert math.isnan(stats.measurements[0].asked_error)
    assert stats.measurements[0].measured_error.isnan().all()
    assert "asked" not in str(stats)


@pytest.mark.parametrize("method", ["svg2", "cubes"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(
            ({"max_error": bad}, "max_error must be a number above 0 and below 1, or None, got")
            for bad in (0, 1, -0.1, 1.5, math.nan, math.inf, "0.1", True)
        ),
        ({"max_error": 0.1, "top_p": 0.9}, "max_error takes the place of top_p"),
        ({"max_error": 0.1, "min_gain": 0.02}, "max_error takes the place of min_gain"),
        (
            {"max_error": 0.1, "far_field": "drop"},
            "max_error needs the linear far field, got far_field='drop'",
        ),
        (
            {"max_error": 0.1, "far_field": "mean"},
            "max_error needs the linear far field, got far_field='mean'",
        ),
    ],
)
def test_bad_targets_say_what_they_must_be(method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        entry_of({"method": method, **options})


def test_a_budget_and_other_methods_do_not_go_with_it() -> None:
    with pytest.raises(OptionError, match="max_error takes the place of kv_budget"):
        entry_of({"method": "cubes", "max_error": 0.1, "kv_budget": 0.2})
    for method in ("tile", "sta", "keys", "dsv", "dense"):
        with pytest.raises(OptionError, match="'max_error' belongs to method 'svg2' and 'cubes'"):
            entry_of({"method": method, "max_error": 0.1})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "svg2", "max_error": 0.1}, "max_error needs the linear far field, got far_field='drop'"),
        (
            {"preset": "svg2", "far_field": "linear", "max_error": 0.1},
            "max_error takes the place of top_p: leave out one of them",
        ),
        ({"preset": "svg2", "max_error": math.nan}, "max_error needs the linear far field"),
        ({"policy": "none.json", "max_error": 0.1}, "a policy sets option 'max_error' for every site"),
        ({"max_error": math.nan}, "max_error must be a number above 0 and below 1, or None, got nan"),
        ({"method": "tile", "max_error": 0.1}, "'max_error' belongs to method 'svg2' and 'cubes'"),
    ],
)
def test_options_of_a_compilation_say_what_is_wrong(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        configure(options)


def test_a_menu_takes_it_and_says_what_is_wrong() -> None:
    menu = read_menu([{"method": "svg2", "max_error": 0.1}, {"method": "cubes", "max_error": 0.05}])
    assert {max_error_of(entry.method) for entry in menu.values()} == {None, 0.1, 0.05}
    for bad in (0, 1, math.nan):
        with pytest.raises(OptionError, match="max_error must be a number above 0 and below 1"):
            read_menu([{"method": "svg2", "max_error": bad}])
    with pytest.raises(OptionError, match="max_error takes the place of kv_budget"):
        read_menu([{"method": "cubes", "max_error": 0.1, "kv_budget": 0.2}])


def test_a_policy_keeps_it() -> None:
    entry = entry_of({"method": "svg2", "max_error": 0.1})
    assert entry.method.max_error == 0.1  # type: ignore[attr-defined]
    assert entry.method.min_gain is None  # type: ignore[attr-defined]
    assert entry_of({"method": "svg2", "max_error": None}).method.min_gain == 0.02  # type: ignore[attr-defined]
