"""The search on the evaluation model, and the calls that it calibrates on."""

from pathlib import Path

import pytest
import torch
from marks import needs_diffusers, no_warnings
from typer.testing import CliRunner

from sparsify_compiler import cli
from sparsify_compiler.lab import calibration
from sparsify_compiler.lab import model as evaluated
from sparsify_compiler.policy import Policy
from sparsify_compiler.testing.models import CASES
from sparsify_compiler.training.search import MENU, read_menu

pytestmark = [no_warnings, needs_diffusers]


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_command_searches_the_evaluation_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = CASES["wan"].build(batch=1)
    monkeypatch.setattr(evaluated, "load", lambda: model)
    monkeypatch.setattr(calibration, "calibration_inputs", lambda: [inputs])
    out = tmp_path / "policy.json"
    result = CliRunner().invoke(cli.app, ["search", "--out", str(out)])
    assert result.exit_code == 0, result.exception
    assert list(Policy.load(out).menu) == list(read_menu(MENU))


def test_the_evaluation_model_is_calibrated_at_every_noise_level() -> None:
    first, *others = calibration.calibration_inputs()
    assert [round(float(one["timestep"])) for one in (first, *others)] == [200, 400, 600, 800, 950]
    for one in others:
        assert one["hidden_states"].shape == first["hidden_states"].shape
        assert not torch.equal(one["encoder_hidden_states"], first["encoder_hidden_states"])
