"""ONNX files: equal to PyTorch's sparse model in ONNX Runtime, valid, of standard operators; refusals."""

import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import METHODS as OF_TORCH
from loops import compiled, generation, joint, outputs, policy
from marks import fresh_dynamo, needs_diffusers, needs_onnx, no_warnings
from test_standard import METHODS as STANDARD
from test_standard import plan_of
from test_torch import CALL, Small
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsify_compiler import OptionError, SparsifyError, export, onnx_custom_ops
from sparsify_compiler.exporting.standard import check
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.testing.models import CASES, Inputs

pytestmark = [fresh_dynamo, no_warnings]

GRID = (4, 4, 5)
CUBES = {
    "method": "cubes",
    "cube": (2, 2, 4),
    "query_cube": (2, 4, 4),
    "kv_budget": 0.3,
    "dense_layers": 0,
    "dense_steps": 0,
}
METHODS: dict[str, dict[str, Any]] = {
    **{name: OF_TORCH[name] for name in ("dense", "tile", "sta")},
    "cubes, drop": {**CUBES, "far_field": "drop"},
    "cubes, mean": {**CUBES, "far_field": "mean"},
    "cubes, linear": {**CUBES, "far_field": "linear"},
}
FAMILIES = ("wan", "hunyuan_video", "cogvideox", "ltx", "allegro", "easyanimate")

OF_TENSORRT = """
Abs Add And Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos Div Einsum Equal Erf Exp Expand Flatten
Floor Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual GroupNormalization Identity
InstanceNormalization IsInf IsNaN LayerNormalization Less LessOrEqual Log LogSoftmax MatMul Max MaxPool Mean Min Mod
Mul Neg Not Or Pad Pow Range Reciprocal ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
ReduceSum ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign Sin Slice Softmax
Softplus Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
"""Operators that TensorRT's parser of ONNX reads; `test_tensorrt.py` asks the parser for each."""


def run(file: Path, inputs: Inputs, *, kernel: bool = False) -> list[Tensor]:
    """The outputs of ONNX Runtime. `kernel`: with our kernel in place of the nodes' bodies."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    optimised = file.with_suffix(".optimised")
    options.optimized_model_filepath = str(optimised)
    options.log_severity_level = 3
    if kernel:
        options.register_custom_ops_library(str(onnx_custom_ops()))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    left = any(node.domain == "sparsify" for node in onnx.load(optimised).graph.node)
    assert left == kernel, "without a kernel a body is inlined"
    tensors = named(inputs)
    given = {one.name: tensors[one.name].numpy() for one in session.get_inputs()}
    return [torch.from_numpy(one) for one in session.run(None, given)]


def named(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a call, by the names of the file's inputs."""
    found = {}
    for name, value in inputs.items():
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        found |= {name if len(tensors) == 1 else f"{name}_{place}": one for place, one in enumerate(tensors)}
    return found


def operators(nodes: Iterable[Any]) -> set[str]:
    return {node.op_type for node in nodes if not node.domain}


def build(family: str, batch: int, seed: int = 0) -> tuple[Any, Inputs]:
    return (
        joint(GRID, batch, seed) if family == "joint" else CASES[family].build(GRID, batch=batch, seed=seed)
    )


CASES_OF_ONNX = [
    ("joint", "cubes, linear", 20),
    *(
        pytest.param(*case, marks=[pytest.mark.nightly, needs_diffusers])
        for case in itertools.product(FAMILIES, METHODS, (20, 23))
    ),
]


@needs_onnx
@pytest.mark.parametrize(("family", "method", "opset"), CASES_OF_ONNX)
def test_onnx_runtime_gives_what_pytorch_gives(family: str, method: str, opset: int, tmp_path: Path) -> None:
    import onnx

    batch = 2 if family == "allegro" else 1  # its positions have a first size of 1 in every batch
    model, inputs = build(family, batch)
    file = tmp_path / "model.onnx"
    exported = export(model, inputs, file, format="onnx", options=METHODS[method], opset=opset)
    assert [*tmp_path.iterdir()] == [file]

    content = onnx.load(file)
    onnx.checker.check_model(content, full_check=True)
    own = [node for node in content.graph.node if node.domain == "sparsify"]
    assert len(own) == len(exported.plan.sparse)
    assert {node.op_type for node in own} <= {"BlockSparseAttention"}
    if opset == 20:
        assert operators(content.graph.node) <= {*OF_TENSORRT.split()}
        assert all(operators(function.node) <= {*OF_TENSORRT.split()} for function in content.functions)
    tensors = named(inputs)
    assert [one.name for one in content.graph.input] == [*tensors]
    for one in content.graph.input:
        is_of_batch = one.type.tensor_type.shape.dim[0].dim_param == "batch"
        assert is_of_batch == (len(tensors[one.name]) == batch)
    plan = json.loads({one.key: one.value for one in content.metadata_props}["sparsify-compiler"])
    assert [site["method"] for site in plan["sites"]] == [one.method for one in exported.plan]

    fast = compiled(model, METHODS[method])
    for batch in (1, 3):
        _, others = build(family, batch, batch)
        with torch.no_grad():
            expected, dense = (one(**others)[0] for one in (fast, model))
        (got,) = run(file, others)
        error = (got - expected).norm() / expected.norm()
        assert error < 1e-4
        if exported.plan.sparse and library.build_info().library is not None:
            (fast_got,) = run(file, others, kernel=True)
            assert (fast_got - expected).norm() / expected.norm() < 1e-4
        assert method == "dense" or error < 0.01 * (expected - dense).norm() / dense.norm()


@needs_diffusers
@needs_onnx
@pytest.mark.nightly
def test_a_dense_phase_has_a_file_of_its_own_and_files_are_checked(tmp_path: Path) -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    inputs["return_dict"] = True
    options = METHODS["tile"] | {"dense_steps": 2}
    exported = export(model, inputs, tmp_path / "model.onnx", format="onnx", options=options)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.dense.onnx"}
    report = exported.check(calls=2)
    assert report.errors.keys() == {"dense", "sparse"}
    assert all(0 < one.relative < 1e-5 for one in report.errors.values())
    assert "2 calls: relative RMS error" in str(report)
    times = exported.benchmark(calls=1)
    assert times.model > 0
    assert times.files.keys() == {"dense", "sparse"}
    (dense,), (sparse,) = (run(exported.file(phase), inputs) for phase in ("dense", "sparse"))
    (expected,) = outputs(model, inputs, 1)[:1]
    assert dense.shape == sparse.shape == expected.shape
    import onnx

    assert [one.name for one in onnx.load(exported.path).graph.output] == ["sample"]


@needs_diffusers
@needs_onnx
@pytest.mark.nightly
def test_bodies_of_different_sites_are_overloads(tmp_path: Path) -> None:
    import onnx

    model, inputs = CASES["wan"].build(GRID, batch=1)
    cubes = {key: value for key, value in METHODS["cubes, drop"].items() if not key.startswith("dense_")}
    options = {"policy": policy(model, inputs, METHODS["tile"], cubes), "dense_steps": 0}
    exported = export(model, inputs, tmp_path / "model.onnx", format="onnx", options=options)
    content = onnx.load(exported.path)
    assert [one.overload for one in content.functions] == ["", "1"]
    assert [one.overload for one in content.graph.node if one.domain == "sparsify"] == ["", "1"]
    expected = outputs(compiled(model, options), inputs, 1)[0]
    call = next(generation(inputs, 1))
    for kernel in (False, library.build_info().library is not None):
        (got,) = run(exported.path, call, kernel=kernel)
        assert (got - expected).norm() / expected.norm() < 1e-4


@needs_onnx
def test_many_weights_lie_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_compiler.exporting import onnx as module

    monkeypatch.setattr(module, "LARGEST", 50)
    model = Small().eval()
    exported = export(model, CALL, tmp_path / "model.onnx", format="onnx", options={"method": "tile"})
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    exported.path.rename(tmp_path / "other.onnx")
    with pytest.raises(OptionError, match=r"path must be new, got .*model\.onnx\.data', which exists"):
        export(model, CALL, exported.path, format="onnx", options={"method": "tile"})
    (tmp_path / "other.onnx").rename(exported.path)
    assert exported.check().errors["dense"].relative < 1e-6


class Squeezes(Small):
    """A model that squeezes sizes that are 1 and others, all at once and one by one."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = hidden_states.unsqueeze(1).squeeze().squeeze(0).squeeze(-1).squeeze((0, 1))
        return hidden_states.unsqueeze(2).squeeze((1, 2)) + timestep


@needs_onnx
def test_a_squeeze_leaves_sizes_that_are_not_one(tmp_path: Path) -> None:
    model, call = Squeezes().eval(), {"hidden_states": torch.randn(2, 4), "timestep": torch.zeros(1)}
    export(model, call, tmp_path / "model.onnx", format="onnx", options={"method": "dense"})
    for batch in (1, 3):
        call["hidden_states"] = torch.randn(batch, 4)
        (got,) = run(tmp_path / "model.onnx", call)
        assert torch.equal(got, call["hidden_states"])


class Names(Small):
    """A model for one video, whose arguments have the names of operators and of its output."""

    def forward(self, add: Tensor, linear: Tensor, unread: Any = None) -> dict[str, Any]:
        assert add.shape[0] == 1
        return {"add": self.linear(add) + linear, "mul": add * linear + linear, "none": None, "three": 3}


@needs_onnx
def test_names_of_arguments_and_outputs_are_free(tmp_path: Path) -> None:
    import onnx

    call = {"add": torch.randn(1, 4), "linear": torch.randn(1, 1), "unread": torch.zeros(1)}
    exported = export(Names().eval(), call, tmp_path / "model.onnx", format="onnx")
    graph = onnx.load(exported.path).graph
    assert [one.name for one in graph.input] == [*call]
    assert [one.name for one in graph.output] == ["add_out", "mul"]
    assert exported.check().errors["dense"].relative < 1e-6


@needs_onnx
def test_a_type_that_onnx_runtime_lacks_is_named(tmp_path: Path) -> None:
    call = {"add": torch.randn(1, 4).bfloat16(), "linear": torch.randn(1, 4).bfloat16()}
    exported = export(Names().eval().bfloat16(), call, tmp_path / "model.onnx", format="onnx")
    with pytest.raises(SparsifyError, match=r"ONNX Runtime cannot run model\.onnx on the CPU: ") as caught:
        exported.check()
    assert "\n" not in str(caught.value)


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"method": "svg2"},
            "method 'svg2', which ONNX does not have: its k-means takes longer .* Take 'tile'",
        ),
        (
            {"method": "keys"},
            "method 'keys', which ONNX does not have: its clusters of queries have no constant",
        ),
        ({"method": "dsv", "rank": 2}, "method 'dsv', which ONNX does not have: its choice of single keys"),
        (
            {"method": "cubes"},
            r"method 'cubes' without a fixed number of blocks.*give options=.*'kv_budget': share",
        ),
        ({**STANDARD["tile"], "far_field": "mean"}, "far_field='mean' with method 'tile', .*: take 'drop'"),
    ],
)
def test_methods_without_constant_sizes_are_refused(options: dict[str, Any], says: str) -> None:
    own = {name: value for name, value in options.items() if not name.startswith("dense_")}
    plan = plan_of(own, torch.empty(1, 2, 80, 8), 2, 0, GRID)
    with pytest.raises(OptionError, match=f"attention here has {says}") as caught:
        check(plan)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_of_what_is_refused(tmp_path: Path) -> None:
    model, inputs = joint(GRID, 1)
    with pytest.raises(OptionError, match="attention has method 'svg2', which ONNX"):
        export(
            model, inputs, tmp_path / "out.onnx", format="onnx", options={"method": "svg2", "dense_layers": 0}
        )
    assert not [*tmp_path.iterdir()]


def test_wrong_paths_and_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small().eval()
    with pytest.raises(OptionError, match=r"path must end in \.onnx with format='onnx', got 'out'"):
        export(model, CALL, tmp_path / "out", format="onnx")
    with pytest.raises(OptionError, match="opset must be 20 or 23, got 19"):
        export(model, CALL, tmp_path / "out.onnx", format="onnx", opset=19)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SparsifyError, match=r"format 'onnx' needs the package onnx: pip install"):
        export(model, CALL, tmp_path / "out.onnx", format="onnx")
    assert not [*tmp_path.iterdir()]


class WithoutForm(Small):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return torch.special.bessel_j0(hidden_states) + timestep


@needs_onnx
def test_an_operator_without_a_form_is_refused_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(SparsifyError, match="PyTorch's exporter cannot write this model") as caught:
        export(WithoutForm().eval(), CALL, tmp_path / "out.onnx", format="onnx")
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


@needs_onnx
def test_a_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", fails)
    with pytest.raises(KeyboardInterrupt):
        export(Small().eval(), CALL, tmp_path / "out.onnx", format="onnx")
    assert not [*tmp_path.iterdir()]
