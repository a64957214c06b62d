"""The custom operator for ONNX Runtime against the reference of the op."""

from typing import Any

import pytest
import torch
from marks import needs_onnx
from torch import Tensor

from sparsify_compiler import BlockTable, SparsifyError, onnx_custom_ops
from sparsify_compiler.exporting.onnx import INPUTS
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
