"""The custom operator for ONNX Runtime against the reference of the op."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import needs_onnx
from torch import Tensor

from sparsify_compiler import BlockTable, SparsifyError, onnx_custom_ops
from sparsify_compiler.exporting.standard import INPUTS
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.cpu import library

needs_library = pytest.mark.skipif(library.build_info().library is None, reason="needs a C++ compiler")
pytestmark = [needs_onnx, needs_library]


def run(
    inputs: dict[str, Tensor | None], scale: float, outputs: tuple[str, ...] = ("out", "lse")
) -> list[Tensor]:
    """The outputs of a model that is one node, without a body."""
    import onnxruntime
    from onnx import TensorProto, helper

    types = {
        torch.float32: TensorProto.FLOAT,
        torch.float16: TensorProto.FLOAT16,
        torch.int32: TensorProto.INT32,
    }
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    names = [name if name in given else "" for name in INPUTS]
    node = helper.make_node("BlockSparseAttention", names, outputs, domain="sparsify", scale=scale)
    query = given["query"]
    kinds = {"out": types[query.dtype], "lse": TensorProto.FLOAT}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, types[t.dtype], t.shape) for name, t in given.items()],
        [helper.make_tensor_value_info(name, kinds[name], None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparsify", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(onnx_custom_ops()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    return [torch.from_numpy(one) for one in found]


def problem(dtype: torch.dtype, *, orders: bool, bias: bool) -> dict[str, Tensor | None]:
    """Attention of 4 heads to 2, with blocks of uneven sizes, a table for each head and values of another width."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 50, 16, generator=draw).to(dtype)
    key, value = (torch.randn(2, 2, 70, width, generator=draw).to(dtype) for width in (16, 24))
    sizes = torch.tensor([20, 1, 29]), torch.tensor([30, 0, 7, 33])
    kept = torch.rand(1, 4, 3, 4, generator=draw) < 0.5
    order = (
        [torch.randperm(n, generator=draw).int()[None, None] for n in (50, 70)] if orders else [None, None]
    )
    table = BlockTable.from_block_mask(
        kept, *(one[None, None] for one in sizes), q_order=order[0], kv_order=order[1]
    )
    hidden = torch.zeros(2, 1, 70)
    hidden[1, :, ::3] = -torch.inf
    key_bias = hidden if bias else None
    return {"query": query, "key": key, "value": value, **table.tensors(), "key_bias": key_bias}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("orders", "bias"), [(False, False), (True, False), (False, True), (True, True)])
def test_it_is_the_op(dtype: torch.dtype, tolerance: float, orders: bool, bias: bool) -> None:
    inputs: dict[str, Any] = problem(dtype, orders=orders, bias=bias)
    table = BlockTable.of(*(inputs[name] for name in BlockTable.__slots__))
    wide = (inputs[name].double() for name in ("query", "key", "value"))
    exact = block_sparse_attention(*wide, table, key_bias=inputs["key_bias"], scale=0.3, provider="reference")
    for got, wanted in zip(run(inputs, 0.3), exact, strict=True):
        assert torch.equal(got.isinf(), wanted.isinf())
        both = got.masked_fill(got.isinf(), 0).double(), wanted.masked_fill(wanted.isinf(), 0)
        assert float((both[0] - both[1]).norm() / both[1].norm()) < tolerance
    (alone,) = run(inputs, 0.3, ("out",))
    assert torch.equal(alone, run(inputs, 0.3)[0])


def in_model(sparse: bool, table: BlockTable, shape: tuple[int, ...]) -> bytes:
    """output = hidden_states * timestep, with attention of the states to themselves in its place where sparse."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [
        numpy_helper.from_array(one.numpy(), name) for name, one in table.tensors().items() if one is not None
    ]
    names = [name if name in {one.name for one in constants} else "" for name in INPUTS[3:]]
    attend = helper.make_node(
        "BlockSparseAttention", ["hidden_states"] * 3 + names, ["attended"], domain="sparsify", scale=0.3
    )
    scaled = helper.make_node("Mul", ["attended" if sparse else "hidden_states", "timestep"], ["output"])
    infos = [
        helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, ["batch", *shape[1:]]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT, None),
    ]
    nodes, held = ([attend, scaled], constants) if sparse else ([scaled], [])
    graph = helper.make_graph(nodes, "model", infos[:2], infos[2:], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("sparsify", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def test_the_program_of_the_documentation_runs_both_phases(tmp_path: Path) -> None:
    """In C++, against ONNX Runtime's library from its wheel; the first of three steps is dense."""
    import onnxruntime

    found = sorted(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not found:
        pytest.skip("this wheel of onnxruntime has no libonnxruntime.so")
    kept = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    sizes = torch.tensor([[[4, 3, 5]]])
    table, shape = BlockTable.from_block_mask(kept, sizes, sizes), (1, 2, 12, 16)
    models = tmp_path / "sparse.onnx", tmp_path / "dense.onnx"
    for file, sparse in zip(models, (True, False), strict=True):
        file.write_bytes(in_model(sparse, table, shape))
    here = Path(__file__).parent
    page = (here.parents[1] / "docs" / "export.md").read_text("utf-8")
    found_code = re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)
    (program,) = [code for code in found_code if "onnxruntime_cxx_api.h" in code]
    (tmp_path / "generate.cpp").write_text(program)
    compiler = library.build_info().compiler
    assert compiler is not None
    built = tmp_path / "generate"
    for name in (
        "libonnxruntime.so",
        "libonnxruntime.so.1",
    ):  # the wheel has the full version in the name only
        (tmp_path / name).symlink_to(found[0])
    runtime = [f"-L{tmp_path}", "-lonnxruntime", f"-Wl,-rpath,{tmp_path}"]
    subprocess.run(
        [compiler, "-std=c++17", f"-I{here}", str(tmp_path / "generate.cpp"), *runtime, "-o", str(built)],
        check=True,
    )
    video = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    times = (900.0, 600.0, 200.0)
    ran = subprocess.run(
        [built, *models, onnx_custom_ops(), "1", *map(str, times)],
        input=video.numpy().tobytes(),
        capture_output=True,
        check=True,
    )
    got = torch.frombuffer(bytearray(ran.stdout), dtype=torch.float32).reshape(shape)
    wanted = video.double()
    for step, (time, after) in enumerate(zip(times, (*times[1:], 0.0), strict=True)):
        out = wanted
        if step:
            out, _ = block_sparse_attention(wanted, wanted, wanted, table, scale=0.3, provider="reference")
        wanted = wanted + (after - time) / 1000 * out * time
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("kv_indices", torch.full((1, 4, 3, 4), 9, dtype=torch.int32)),
        ("kv_num_blocks", torch.full((1, 4, 3), 5, dtype=torch.int32)),
        ("kv_bounds", torch.tensor([[[0, 30, 30, 37, 71]]], dtype=torch.int32)),
        ("q_bounds", torch.tensor([[[0, 20, 21, 50, 50]]], dtype=torch.int32)),
        ("kv_order", torch.zeros(1, 1, 70, dtype=torch.int32)),
        ("kv_order", torch.arange(69, dtype=torch.int32)[None, None]),
        ("key", torch.zeros(2, 3, 70, 16)),
        ("value", torch.zeros(2, 2, 69, 24)),
    ],
)
def test_a_table_that_does_not_fit_gives_nan(name: str, wrong: Tensor) -> None:
    inputs = problem(torch.float32, orders=True, bias=True) | {name: wrong}
    assert run(inputs, 0.3)[0].isnan().all()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    info = library.BuildInfo(
        compiler=None, library=None, cached=False, seconds=0.0, reason="no C++ compiler found"
    )
    monkeypatch.setattr(library, "build_info", lambda: info)
    with pytest.raises(
        SparsifyError, match=r"needs a C\+\+ compiler: no C\+\+ compiler found\. Install g\+\+"
    ):
        onnx_custom_ops()
