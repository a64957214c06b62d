"""Importing the package is cheap, and its modules import each other in one direction only."""

import ast
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import sparsify_compiler
from sparsify_compiler.config import GENERAL, option_names
from sparsify_compiler.methods import METHODS

ROOT = Path(sparsify_compiler.__file__).parent
LAYERS = (
    {"cli"},
    {"lab"},
    {"__init__", "hosts", "run", "spawned"}
    | {"doctor", "diffusers_model", "explanation", "training", "exporting", "clusters", "page"},
    {"backend", "measured"},
    {"passes", "uncompiled"},
    {"runtime", "policy", "options"},
    {"methods"},
    {"kernels", "parallel"},
    {"table"},
    {
        "plan",
        "config",
        "errors",
        "names",
        "_torch",
        "_torch_export",
        "_torch_lock",
        "outputs",
        "pictures",
        "progress",
        "tables",
    },
)
"""From those that may import all below to those that may import their own layer alone."""

FRESH = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import sparsify_compiler
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""

PRODUCT = """
import json, sys
import sparsify_compiler
import sparsify_compiler.cli, sparsify_compiler.diffusers_model, sparsify_compiler.doctor
for name in sparsify_compiler.__all__:
    getattr(sparsify_compiler, name)
print(json.dumps(sorted(sys.modules)))
"""


def test_import_needs_torch_alone_and_takes_no_time():
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", FRESH])) for _ in range(3)]
    foreign = (
        {name.split(".")[0] for name in runs[0][1]} - {"sparsify_compiler"} - set(sys.stdlib_module_names)
    )
    assert not foreign, "must come with torch's own import or later"
    assert median(seconds for seconds, _ in runs) <= 0.3


def test_dir_has_every_public_name_before_it_is_used():
    listed = "import json, sparsify_compiler; print(json.dumps(dir(sparsify_compiler)))"
    names = json.loads(subprocess.check_output([sys.executable, "-c", listed]))
    assert {*sparsify_compiler.__all__, "__version__"} <= set(names)
    assert all(hasattr(sparsify_compiler, name) for name in names)


def test_help_lists_every_public_name_and_every_option():
    text = pydoc.plaintext.document(sparsify_compiler)
    for name in sparsify_compiler.__all__:
        assert re.search(rf"^    (class )?{name}\(", text, re.MULTILINE), name
    general, own = text[text.index("Options of every method:") :].split("Options of one method:", 1)
    assert re.findall(r"^ {8}(\w+)  ", general, re.MULTILINE) == [
        "method",
        "preset",
        *(name for name in GENERAL if name not in ("method", "preset")),
    ]
    listed = {
        method: set(options.split(", "))
        for method, options in re.findall(r"^ {8}(\w+) +([a-z_, ]+)$", own, re.MULTILINE)
    }
    assert listed == {name: set(option_names(kind)) for name, kind in METHODS.items() if option_names(kind)}


def test_the_package_is_marked_as_typed():
    """Type checkers read the annotations of an installed package where this file is."""
    assert (ROOT / "py.typed").read_bytes() == b""


def test_imports_point_one_way():
    layer = {name: depth for depth, names in enumerate(LAYERS) for name in names}
    for path in ROOT.rglob("*.py"):
        if room(path) == "testing":
            continue  # may import anything
        for imported in imports(path):
            if imported in layer:
                assert layer[room(path)] <= layer[imported], (
                    f"{path.relative_to(ROOT)} must not import {imported}"
                )


def test_nothing_but_the_command_line_imports_the_laboratory() -> None:
    tests = Path(__file__).parent
    files = [*ROOT.rglob("*.py"), *tests.rglob("*.py")]
    inside = [path for path in files if "lab" in imports(path)]
    assert {room(path) for path in inside if path.is_relative_to(ROOT)} == {"cli", "lab"}
    assert {path.parent for path in inside if not path.is_relative_to(ROOT)} == {tests / "lab"}


@pytest.mark.parametrize(
    ("place", "line", "rooms"),
    [
        ("doctor.py", "from sparsify_compiler.lab.model import load", {"lab"}),
        ("doctor.py", "from sparsify_compiler import lab, plan", {"lab", "plan"}),
        ("doctor.py", "def run():\n    import sparsify_compiler.lab.demo as demo", {"lab"}),
        ("doctor.py", "from .lab import demo", {"lab"}),
        ("training/dsv.py", "from .. import lab", {"lab"}),
        ("training/__init__.py", "from ..lab.model import load", {"lab"}),
        ("training/__init__.py", "from .lab import model", {"training"}),
        ("doctor.py", "from laboratory import lab\nimport lab", set()),
    ],
)
def test_imports_are_found(tmp_path: Path, place: str, line: str, rooms: set[str]) -> None:
    path = tmp_path / ROOT.name / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    assert imports(path, tmp_path) == rooms


def test_the_product_runs_without_the_laboratory() -> None:
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", PRODUCT]))
    assert {"sparsify_compiler.cli", "sparsify_compiler.training.search"} <= set(loaded)
    assert [name for name in loaded if name.startswith("sparsify_compiler.lab")] == []


def room(path: Path) -> str:
    """The room of this package that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path, above: Path = ROOT.parent) -> set[str]:
    """The rooms of this package that a file imports.

    Args:
        above: the folder that the package lies in.
    """
    dotted = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = path.relative_to(above).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            dotted += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in dotted if name.startswith("sparsify_compiler.")}
