"""The command `sparsify export`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import needs_diffusers, needs_onnx

from sparsify_compiler.testing.models import CASES

pytestmark = needs_diffusers


def sparsify(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsify_compiler.cli", "export", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


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
