"""Importing the package is cheap, and its modules import each other in one direction only."""

import ast
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import sparsify_compiler
from sparsify_compiler.config import GENERAL, option_names
from sparsify_compiler.methods import METHODS

ROOT = Path(sparsify_compiler.__file__).parent
LAYERS = (
    {
        "__init__",
        "cli",
        "demo",
        "doctor",
        "diffusers_model",
        "explanation",
        "uncompiled",
        "training",
        "export",
    },
    {"evaluation"},
    {"backend", "measured"},
    {"passes"},
    {"runtime", "policy"},
    {"methods"},
    {"kernels"},
    {"table"},
    {"plan", "config", "errors", "names", "_torch", "outputs", "pictures", "progress", "tables"},
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
        room, *_ = path.relative_to(ROOT).with_suffix("").parts
        if room == "testing":
            continue  # may import anything
        for imported in imports(path):
            if imported in layer:
                assert layer[room] <= layer[imported], f"{path.relative_to(ROOT)} must not import {imported}"


def imports(path: Path) -> set[str]:
    """The rooms of this package that a file imports."""
    dotted = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparsify_compiler"):
            dotted += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in dotted if name.startswith("sparsify_compiler.")}
