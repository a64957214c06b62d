"""Outputs that cannot be written are refused before any work, by every command that has one."""

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsify_compiler import SparsifyError, cli, diffusers_model
from sparsify_compiler.lab import benchmark, calibration, check, classifier, model, predictor, students, train
from sparsify_compiler.lab.demo import step
from sparsify_compiler.outputs import check_file

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

FOLDERS = {
    ("demo",): ("masks.png", "density.png", "videos.gif"),
    ("distill",): (
        "settings.json",
        "consistency.pt",
        "policy.json",
        "sparse.safetensors",
        "report.md",
        "report.json",
    ),
    ("bench", "quality"): ("quality.json", "videos.png", "pareto.png"),
    ("bench", "sparsity"): ("sparsity.json", "sparsity.png"),
}
"""Commands that write into a folder, and files in it."""
READ_ONLY = Path("/proc/self")
"""A folder that nobody can write to, whoever runs this."""
needs_proc = pytest.mark.skipif(not READ_ONLY.is_dir(), reason="needs /proc")


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """All that takes long is not reached."""

    def work(*_, **__):
        raise AssertionError("work began")

    for place, name in (
        (step, "run"),
        (diffusers_model, "build"),
        (diffusers_model, "load"),
        (model, "build"),
        (classifier, "train"),
        (check, "shares"),
        (train, "run"),
        (calibration, "calibration_inputs"),
        (students, "_few_steps"),
        (predictor, "learn_predictor"),
    ):
        monkeypatch.setattr(place, name, work)
    untrained = torch.nn.Linear(2, 2)
    monkeypatch.setattr(model, "load", lambda *_: untrained)
    for place in (benchmark, check, train):
        monkeypatch.setattr(place, "load", lambda *_: untrained)


def refused(*words: str) -> str:
    error = CliRunner().invoke(cli.app, list(words)).exception
    assert isinstance(error, SparsifyError), repr(error)
    return str(error)


@pytest.mark.parametrize("command", FOLDERS, ids=" ".join)
def test_a_folder_that_cannot_be_made(command):
    for place in (__file__, f"{__file__}/out"):
        assert f"out must be a folder that can be written to, got {place!r}" in refused(
            *command, "--out", place
        )


@needs_proc
@pytest.mark.parametrize("place", [READ_ONLY, READ_ONLY / "new"], ids=str)
@pytest.mark.parametrize("command", FOLDERS, ids=" ".join)
def test_a_folder_that_cannot_be_written_to(command, place):
    assert f"out must be a folder that can be written to, got {str(place)!r}" in refused(
        *command, "--out", str(place)
    )


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, names in FOLDERS.items() for name in names], ids=str
)
def test_a_folder_in_the_place_of_a_file(command, name, tmp_path):
    (tmp_path / name).mkdir()
    says = refused(*command, "--out", str(tmp_path))
    assert str(tmp_path / name) in says
    assert "folder" in says
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("command", FOLDERS, ids=" ".join)
def test_work_begins_in_a_folder_that_is_fine(command, tmp_path):
    error = CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path / "new" / "folder")]).exception
    assert str(error) == "work began", repr(error)


@needs_proc
def test_a_policy_that_cannot_be_written():
    for place in (
        READ_ONLY / "policy.json",
        READ_ONLY,
        Path(__file__) / "policy.json",
        Path("nowhere/policy.json"),
    ):
        assert f"out must be a file in a folder that exists, got {str(place)!r}" in refused(
            "search", "--out", str(place)
        )


@needs_proc
def test_a_picture_that_cannot_be_written(tmp_path):
    wan = ["explain", "WanTransformer3DModel", "--picture"]
    for place in (READ_ONLY / "masks.png", Path(__file__) / "masks.png", tmp_path, tmp_path / "masks.what"):
        assert f"cannot save the picture as {place}" in refused(*wan, str(place))


@needs_proc
@pytest.mark.parametrize("program", [train, check], ids=lambda module: module.__name__)
def test_programs_beside_the_command(program, tmp_path):
    for place in (READ_ONLY, Path(__file__)):
        with pytest.raises(SparsifyError, match="out must be a folder that can be written to"):
            program.main(["--out", str(place)])
    name = "check.json" if program is check else "log.jsonl"
    (tmp_path / name).mkdir()
    with pytest.raises(SparsifyError, match=f"{name} must be a file, got a folder"):
        program.main(["--out", str(tmp_path)])


def test_a_check_leaves_no_trace(tmp_path):
    new, old, link = (tmp_path / name for name in ("new", "old", "link"))
    old.write_text("as it was")
    link.symlink_to(tmp_path / "target")
    times = old.stat().st_mtime_ns
    for path in (new, old, link):
        check_file(path)
    assert not new.exists()
    assert (old.read_text(), old.stat().st_mtime_ns) == ("as it was", times)
    assert link.is_symlink()


def test_matplotlib_is_missed_before_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for command in (("demo",), ("bench", "quality"), ("bench", "sparsity")):
        assert "needs matplotlib" in refused(*command, "--out", str(tmp_path))
