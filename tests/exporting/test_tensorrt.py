"""Engines of TensorRT are built, without a GPU; nothing runs them here."""

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from loops import METHODS as OF_TORCH
from marks import fresh_dynamo, needs_diffusers, needs_onnx, needs_tensorrt, no_warnings
from test_onnx import METHODS, OF_TENSORRT, build
from test_torch import CALL, Small
from torch import Tensor

from sparsify_compiler import OptionError, SparsifyError, export, load
from sparsify_compiler.exporting import tensorrt
from sparsify_compiler.testing.models import Inputs

pytestmark = [fresh_dynamo, no_warnings, needs_onnx]

BUILT = ("tile", "cubes, drop", "cubes, mean", "cubes, linear")
CASES_OF_TENSORRT = [
    pytest.param("joint", "tile", torch.float32),
    pytest.param("joint", "cubes, linear", torch.float16),
    *(
        pytest.param(*case, marks=[pytest.mark.nightly, needs_diffusers])
        for case in itertools.product(("wan", "hunyuan_video"), BUILT, (torch.float32, torch.float16))
    ),
]


def in_type(model: Any, inputs: Inputs, dtype: torch.dtype) -> tuple[Any, Inputs]:
    def cast(one: Any) -> Any:
        return one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one

    return model.to(dtype), {name: cast(one) for name, one in inputs.items()}


@needs_tensorrt
@pytest.mark.parametrize(("family", "method", "dtype"), CASES_OF_TENSORRT)
def test_engines_are_built(family: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = in_type(*build(family, 1), dtype)
    exported = export(model, inputs, tmp_path / "out", format="tensorrt", options=METHODS[method])
    assert {file.name for file in exported.path.iterdir()} == {"sparse.engine", "plan.json"}
    assert exported.file("sparse").stat().st_size > 100_000
    assert len(exported.plan.sparse) > 0
    plan = json.loads((exported.path / "plan.json").read_text())
    assert plan["files"] == "tensorrt"
    assert plan["built by"].startswith("tensorrt")
    with pytest.raises(SparsifyError, match="engines run on a GPU"):
        exported.check()
    with pytest.raises(OptionError, match="holds engines, which TensorRT loads"):
        load(exported.path)


@needs_tensorrt
def test_the_list_of_operators_is_the_parsers() -> None:
    """`OF_TENSORRT`, to which all files are held, has no operator that the parser does not read."""
    trt = tensorrt.library()
    logger, _ = tensorrt._logger(trt)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert [one for one in OF_TENSORRT.split() if not parser.supports_operator(one)] == []
    assert not parser.supports_operator("BlockSparseAttention")


@needs_tensorrt
def test_the_parsers_error_names_the_node(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    node = helper.make_node("NoSuchOperator", ["x"], ["y"], name="here", domain="nowhere")
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    save(
        helper.make_model(
            helper.make_graph([node], "g", infos[:1], infos[1:]), opset_imports=opsets, ir_version=10
        ),
        tmp_path / "wrong.onnx",
    )
    says = r"TensorRT's parser refuses the node 'here' \(NoSuchOperator\): "
    with pytest.raises(SparsifyError, match=says) as caught:
        tensorrt.engine(tensorrt.library(), tmp_path / "wrong.onnx", None)
    assert "\n" not in str(caught.value)


@needs_tensorrt
def test_the_code_of_the_documentation_switches_the_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With objects that have the attributes of TensorRT's, since engines run on a GPU alone."""
    trt = tensorrt.library()
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    (code,) = re.findall(r"## TensorRT.*?```python\n(.*?)```", page, re.DOTALL)
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "plan.json").write_text('{"dense steps": 2}')
    contexts = {}
    for phase in ("dense", "sparse"):
        (folder / f"{phase}.engine").write_bytes(phase.encode())
        contexts[phase] = Mock(spec=trt.IExecutionContext)

    def deserialize(content: bytes) -> Mock:
        found = Mock(spec=trt.ICudaEngine)
        found.create_execution_context.return_value = contexts[content.decode()]
        return found

    module = Mock(spec=trt)
    module.Runtime.return_value = Mock(spec=trt.Runtime)
    module.Runtime.return_value.deserialize_cuda_engine.side_effect = deserialize
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Mock(cuda_stream=7))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"Path": Path, "torch": torch}
    exec(compile(code, "TensorRT", "exec"), names)
    for number in range(5):
        names["step"](number, {"hidden_states": torch.zeros(1, 3)}, torch.zeros(1))
    runs = {phase: one.execute_async_v3.call_count for phase, one in contexts.items()}
    assert runs == {"dense": 2, "sparse": 3}
    contexts["sparse"].set_input_shape.assert_called_with("hidden_states", (1, 3))
    contexts["sparse"].execute_async_v3.assert_called_with(7)


def test_overloads_are_inlined(tmp_path: Path) -> None:
    """TensorRT's parser takes the first body for all overloads."""
    import numpy as np
    from onnx import TensorProto, helper, load, save
    from onnx.reference import ReferenceEvaluator

    opset, own = helper.make_opsetid("", 20), helper.make_opsetid("sparsify", 1)
    functions, nodes = [], []
    for number, (overload, factor) in enumerate({"": 2.0, "1": 5.0}.items()):
        constant = helper.make_node("Constant", [], ["c"], value_float=factor)
        body = [constant, helper.make_node("Mul", ["x", "c"], ["y"])]
        functions.append(helper.make_function("sparsify", "Times", ["x"], ["y"], body, [opset]))
        nodes.append(helper.make_node("Times", [f"v{number}"], [f"v{number + 1}"], domain="sparsify"))
        functions[-1].overload = nodes[-1].overload = overload
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("v0", "v2")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:])
    file = tmp_path / "model.onnx"
    save(helper.make_model(graph, opset_imports=[opset, own], ir_version=10, functions=functions), file)
    tensorrt._inline(file)
    inlined = load(file)
    assert not inlined.functions
    (got,) = ReferenceEvaluator(inlined).run(None, {"v0": np.ones(2, np.float32)})
    assert got.tolist() == [10.0, 10.0]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "LIBRARIES", ("no_such_library",))
    with pytest.raises(SparsifyError, match="format 'tensorrt' needs TensorRT or TensorRT-RTX: pip install"):
        export(Small().eval(), CALL, tmp_path / "out", format="tensorrt")
    with pytest.raises(OptionError, match="method 'svg2', which ONNX does not have"):
        export(*build("joint", 1), tmp_path / "out", format="tensorrt", options=OF_TORCH["svg2"])
    assert not [*tmp_path.iterdir()]
