"""The command `sparsify export`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import needs_diffusers, needs_onnx, needs_tensorrt
from typer.testing import CliRunner

from sparsify_compiler.cli import app
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.testing.models import CASES


def sparsify(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsify_compiler.cli", "export", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


TILE = ("--option", "method=tile")
REFUSED = [
    ("torhc", TILE, "unknown format 'torhc'"),
    ("torch", ("--option", "method=tyle"), "unknown method 'tyle'"),
    ("torch", ("--option", "tile"), "--option must be written name=value"),
    ("torch", (*TILE, "--option", "parallel=auto"), "a file is for one process"),
    ("torch", (*TILE, "--opset", 20), "opset is for format='onnx'"),
    ("aoti", (*TILE, "--device", "cpuu"), "device must be one of this machine"),
    ("aoti", (*TILE, "--out", "/proc/none"), "path must be writable"),
    ("aoti", (*TILE, "--out", "x" * 300), "path must be the name of a file or folder"),
    ("onnx", TILE, "path must end in .onnx"),
    ("onnx", (*TILE, "--opset", 19), "opset must be 20 or 23, got 19"),
    ("onnx", ("--out", "o.onnx"), "the options have method 'keys', which ONNX does not have"),
    ("onnx", ("--out", "o.onnx", "--option", "method=cubes"), "method 'cubes' without a fixed number"),
    (
        "tensorrt",
        (*TILE, "--option", "far_field=mean"),
        "the options have far_field='mean' with method 'tile'",
    ),
    pytest.param(
        "tensorrt",
        (*TILE, "--check", 1),
        "engines run on a GPU, in TensorRT",
        marks=[needs_onnx, needs_tensorrt],
    ),
]


@pytest.mark.parametrize(("format", "args", "says"), REFUSED)
def test_wrong_options_are_refused_before_a_checkpoint_is_read(
    format: str, args: tuple[object, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("export", "no checkpoint", "--inputs", "none", "--out", "o", "--format", format, *args)
    error = CliRunner().invoke(app, [*map(str, given)]).exception
    assert isinstance(error, SparsifyError)
    assert str(error).startswith(says) or f" {says}" in str(error)
    assert "\n" not in str(error)
    assert not [*tmp_path.iterdir()]


@needs_diffusers
@pytest.mark.nightly
@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=needs_onnx)])
def test_a_checkpoint_is_exported_checked_and_measured(format: str, tmp_path: Path) -> None:
    model, inputs = CASES["cogvideox"].build((4, 4, 5), batch=1)
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save([inputs], tmp_path / "calls.pt")
    out = tmp_path / ("model.onnx" if format == "onnx" else "out")
    where = tmp_path / "checkpoint", "--inputs", tmp_path / "calls.pt", "--out", out, "--format", format
    options = "--option", "method=tile", "--option", "reference_frames=1", "--check", 2, "--benchmark", 1
    ran = sparsify(*where, *options)
    assert ran.returncode == 0, ran.stderr
    first, check, *times = ran.stdout.splitlines()
    assert first.startswith(f"{out}: {format}, sparse, 2 of 2 attentions sparse")
    assert check.startswith("sparse, 2 calls: relative RMS error")
    assert [line.partition(":")[0] for line in times] == ["PyTorch, dense", "file, sparse"]
    ran = sparsify(*where[:3], "--out", tmp_path / "other.onnx", "--device", "cpuu")
    assert ran.stderr.startswith("sparsify: device must be one of this machine")
    assert len(ran.stderr.splitlines()) == 1
    ran = sparsify(*where)
    assert ran.returncode == 2
    assert ran.stderr.startswith("sparsify: path must be new")
    assert len(ran.stderr.splitlines()) == 1
