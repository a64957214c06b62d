"""Packages of AOTInductor and their ops without our Python: a C++ program, and the library of the ops."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import METHODS, generation, joint
from marks import fresh_dynamo, no_warnings
from torch import Tensor
from torch._inductor import config
from torch.utils._python_dispatch import TorchDispatchMode

import sparsify_compiler
from sparsify_compiler import SparsifyError, export, load, torch_custom_ops
from sparsify_compiler.exporting.loaded import KERNELS
from sparsify_compiler.kernels.cpu import library

needs_compiler = pytest.mark.skipif(library.build_info().library is None, reason="needs a C++ compiler")
pytestmark = [fresh_dynamo, no_warnings, needs_compiler]

GRID = (4, 4, 5)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


# A C++ program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of the documentation, built by its commands."""
    folder = tmp_path_factory.mktemp("program")
    section = PAGE.read_text().split("### Without Python\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```cpp\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    _, find_torch, compile_, _ = commands.splitlines()
    (folder / "run.cpp").write_text(code)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = f"{find_torch}\n{compile_}"
    subprocess.run(["bash", "-ec", script], check=True, cwd=folder, env={**os.environ, "PATH": path})
    return folder / "run"


@pytest.mark.parametrize(
    "method",
    ["tile", *(pytest.param(method, marks=pytest.mark.nightly) for method in ("svg2", "cubes", "keys"))],
)
def test_a_program_without_python_runs_the_packages(program: Path, method: str, tmp_path: Path) -> None:
    """Dense and sparse steps, with the state from call to call, equal those of `load`."""
    model, inputs = joint(GRID, 1)
    options = METHODS[method] | ({} if method == "tile" else {"dense_steps": 1})
    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # compiles sooner
        exported = export(model, inputs, tmp_path / "package", format="aoti", options=options)
    assert [plan.method for plan in exported.plan.sparse] == [method]
    steps = list(generation(inputs, 3))[::2]  # one call a step
    loaded = load(tmp_path / "package")
    with torch.no_grad():
        expected = torch.stack([loaded(**call)[0] for call in steps])
    torch.save([list(call.values()) for call in steps], tmp_path / "calls.pt")
    given = tmp_path / "package", torch_custom_ops(), tmp_path / "calls.pt", tmp_path / "outputs.pt"
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: threads add up in another order
    subprocess.run([program, *given, str(loaded.plan["dense steps"])], check=True, env=one_thread)
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), expected)
    torch.save([[one[..., :1] for one in call] for call in torch.load(tmp_path / "calls.pt")], given[2])
    checked = {**one_thread, "AOTI_RUNTIME_CHECK_INPUTS": "1"}
    refused = subprocess.run([program, *given, "0"], env=checked, capture_output=True, text=True)
    assert refused.returncode
    assert "expected:" in refused.stderr
    with torch.no_grad():
        dense = torch.stack([model(**call)[0] for call in steps])
    assert not torch.allclose(expected, dense, atol=1e-4), "the check must be able to fail"


# The ops


class Recorder(TorchDispatchMode):
    """The calls of our ops: (name, arguments, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "sparsify":
            found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            self.calls.append((func._schema.name.partition("::")[2], list(args), found))
        return outputs


def calls_of_programs(folder: Path) -> list[tuple[str, list[Any], list[Tensor]]]:
    """The calls of the ops in a program of `svg2`, whose state is cold and then warm, and of those that only other
    programs call."""
    model, inputs = joint(GRID, 1)
    export(model, inputs, folder / "out", options=METHODS["svg2"] | {"dense_steps": 0})
    loaded = load(folder / "out")
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 4, 20, 8, generator=draw)
    budget = torch.tensor([[3, 5, 0, 9]], dtype=torch.int32)
    groups = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    with torch.no_grad(), sparsify_compiler.generation(2, streams=1), Recorder() as recorder:
        for _ in range(2):
            loaded(**inputs)
        for bounds in (None, groups):
            torch.ops.sparsify.top_k_keys(query, key[:, ::2], budget, bounds, key[:, :1, :, 0], 8, 0.5, "cpu")
        torch.ops.sparsify.lay_out(torch.arange(24.0).view(2, 3, 4), [1, 2, 6])
    return recorder.calls


LOADS = """
import importlib, sys, torch
torch.ops.load_library(sys.argv[1])
calls, wrong, kernels = torch.load(sys.argv[2], weights_only=False)

def run(calls):
    results = [getattr(torch.ops.sparsify, name)(*arguments) for name, arguments, _ in calls]
    return [[one] if isinstance(one, torch.Tensor) else list(one) for one in results]

first, schemas, refusals = run(calls), {}, []
for name, _, _ in calls:
    schemas[name] = str(getattr(torch.ops.sparsify, name).default._schema)
for name, arguments in wrong:
    try:
        getattr(torch.ops.sparsify, name)(*arguments)
    except (IndexError, RuntimeError) as error:
        refusals.append(str(error).partition(chr(10))[0])
    else:
        refusals.append(f"{name} takes wrong arguments")
assert "sparsify_compiler" not in sys.modules
handles = [getattr(torch.ops.sparsify, name).default for name, _, _ in calls]
for name in kernels:
    importlib.import_module(f"sparsify_compiler.{name}")
python = run(calls)
through = [handle(*arguments) for handle, (_, arguments, _) in zip(handles, calls)]
through = [[one] if isinstance(one, torch.Tensor) else list(one) for one in through]
own = {name: "custom_ops.py" in torch._C._dispatch_dump(f"sparsify::{name}") for name in schemas}
torch.save([first, python, through, schemas, refusals, own], sys.argv[3])
"""


def wrong_calls(calls: list[tuple[str, list[Any], list[Tensor]]]) -> dict[str, tuple[str, list[Any]]]:
    """Part of the refusal -> a call."""
    one = {name: arguments for name, arguments, _ in reversed(calls)}

    def changed(name: str, place: int, value: Any) -> tuple[str, list[Any]]:
        return name, [value if number == place else old for number, old in enumerate(one[name])]

    attention = one["block_sparse_attention"]
    return {
        "the provider 'cpu' alone": changed("block_sparse_attention", 11, "reference"),
        "key must be Float": changed("block_sparse_attention", 1, attention[1].half()),
        "value must be": changed("block_sparse_attention", 2, attention[2][:, :, 1:]),
        "q_bounds must be Int": changed("block_sparse_attention", 3, attention[3].long()),
        "an index of a table": changed("block_sparse_attention", 6, attention[6] + 10_000),
        "key_bias must be": changed("block_sparse_attention", 9, torch.zeros(1, 1, 3)),
        "limits must be given together": changed("near_and_far", 14, None),
        "far_bias must be": changed("near_and_far", 12, one["near_and_far"][12][..., 1:]),
        "near_lse must be": changed("merge_far_field", 2, one["merge_far_field"][2][..., 1:]),
        "bounds must be": changed("block_means", 1, one["block_means"][1][0]),
        "start must be Long": changed("kmeans", 2, one["kmeans"][2].int()),
        "index out of range": changed("kmeans", 2, one["kmeans"][2] + 10_000),
        "labels must have 3 dimensions": changed("sort_by_label", 0, one["sort_by_label"][0][0]),
        "outside the tensor": changed("sort_by_label", 1, 1),
        "kv_sizes must be": changed("top_p_blocks", 2, one["top_p_blocks"][2].float()),
        "width must be at least 1": changed("top_k_keys", 5, 0),
        "budget must be": changed("top_k_keys", 2, one["top_k_keys"][2].long()),
        "must be Float, Half or BFloat16": changed("kmeans", 0, one["kmeans"][0].double()),
    }


def test_the_library_has_the_ops_of_exported_programs_and_gives_way_to_python(tmp_path: Path) -> None:
    """The same bits from the library alone, and from Python that comes later, also by what was found before."""
    calls = calls_of_programs(tmp_path)
    source = (Path(library.__file__).parent / "csrc" / "torch_op.cpp").read_text()
    named = {name for name, _, _ in calls}
    assert named == set(re.findall(r'^    add\("(\w+)"', source, re.MULTILINE))
    wrong = wrong_calls(calls)
    modules = *(f"kernels.{name}" for name in KERNELS), "runtime.site"
    torch.save((calls, [*wrong.values()], modules), tmp_path / "calls.pt")
    script = [sys.executable, "-c", LOADS, torch_custom_ops(), tmp_path / "calls.pt", tmp_path / "found.pt"]
    subprocess.run(script, check=True)
    *results, schemas, refusals, own = torch.load(tmp_path / "found.pt")
    for found in results:
        for (name, _, expected), got in zip(calls, found, strict=True):
            assert len(got) == len(expected), name
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num()), name
                assert one.stride() == other.stride(), name
    assert schemas == {name: str(getattr(torch.ops.sparsify, name).default._schema) for name in named}
    for says, refusal in zip(wrong, refusals, strict=True):
        assert says in refusal
    assert all(own.values()), "Python's ops run once they are there"


def test_ops_of_python_stay_where_they_were_first() -> None:
    before = torch._C._dispatch_dump("sparsify::block_sparse_attention")
    torch.ops.load_library(str(torch_custom_ops()))
    torch.ops.load_library(str(torch_custom_ops()))
    assert torch._C._dispatch_dump("sparsify::block_sparse_attention") == before


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    info: Mapping[str, Any] = {"compiler": None, "library": None, "cached": False, "seconds": 0.0}
    none = library.BuildInfo(**info, reason="no C++ compiler found")
    monkeypatch.setattr(library, "build_info", lambda: none)
    with pytest.raises(SparsifyError, match=r"needs a C\+\+ compiler: no C\+\+ compiler found\. Install g"):
        torch_custom_ops()
