"""The laboratory needs packages that the compiler does not: the extra `demo` has them, and commands say so."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsify_compiler import SparsifyError, cli, lab
from sparsify_compiler.lab import quality

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def packages(requirements: list[str]) -> set[str]:
    """Names of required packages, those of this project's own extras included."""
    found = set()
    for one in requirements:
        inner = re.fullmatch(rf"{PROJECT['name']}\[(\w+)\]", one)
        found |= packages(EXTRAS[inner[1]]) if inner else {re.split(r"[<>=; ]", one)[0]}
    return found


def test_the_extra_has_the_packages_of_the_laboratory() -> None:
    assert packages(EXTRAS["demo"]) == set(lab.PACKAGES.values())


def test_every_import_is_of_a_package_that_is_required() -> None:
    base = packages(PROJECT["dependencies"]) | set(sys.stdlib_module_names) | {"sparsify_compiler"}
    found = set()
    for path in Path(lab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
    own = found - base
    assert own <= set(lab.PACKAGES)
    assert set(lab.PACKAGES) - own <= {"matplotlib"}, "only sparsify_compiler/pictures.py imports matplotlib"


@pytest.mark.parametrize(
    "words",
    [["demo"], ["search"], ["distill", "--out", "."], ["bench", "quality"], ["bench", "sparsity"]],
    ids=" ".join,
)
@pytest.mark.parametrize(("module", "package"), lab.PACKAGES.items())
def test_a_command_names_the_extra_where_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], module: str, package: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    error = CliRunner().invoke(cli.app, words).exception
    assert isinstance(error, SparsifyError), repr(error)
    assert f"; {package} not found: try pip install 'sparsify-compiler[demo]'" in str(error)
    assert list(tmp_path.iterdir()) == [], "refused before any work"


def test_ssim_names_the_extra_where_a_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SparsifyError, match=r"scikit-image not found: .*\[demo\]"):
        quality.ssim(None, None)  # type: ignore[arg-type]
