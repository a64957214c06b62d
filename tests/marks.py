"""Marks that many test files use."""

from importlib.util import find_spec

import pytest

fresh_dynamo = pytest.mark.usefixtures("fresh_dynamo")
no_warnings = pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
needs_onnx = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="needs onnx, onnxscript and onnxruntime: pip install 'sparsify-compiler[onnx]'",
)
needs_tensorrt = pytest.mark.skipif(
    not any(map(find_spec, ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"))),
    reason="needs TensorRT: pip install --no-deps tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs",
)
