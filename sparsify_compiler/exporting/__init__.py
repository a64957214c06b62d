"""Export: a model with sparse attention as files that other programs load.

    exported = sparsify_compiler.export(model, kwargs, "folder", format="torch", options={"method": "tile"})
    model = sparsify_compiler.load("folder")

`target.py` checks the arguments, `capture.py` makes one graph of a call, `state.py` a function of state and
inputs for each phase, `files.py` the folder, and `loaded.py` reads it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify_compiler import _torch
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.exporting.capture import capture, check_device, first_line
from sparsify_compiler.exporting.files import Exported, aoti, torch_programs
from sparsify_compiler.exporting.loaded import Loaded, load
from sparsify_compiler.exporting.onnx import onnx_file
from sparsify_compiler.exporting.target import FORMATS, target_of
from sparsify_compiler.exporting.tensorrt import engines

__all__ = ["FORMATS", "Exported", "Loaded", "export", "load"]


def export(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    path: str | Path,
    *,
    format: str = "torch",
    options: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    opset: int | None = None,
) -> Exported:
    """Write a model with sparse attention to files.

    The files fit calls with the sizes of `kwargs`, and with the values of its arguments that are no tensors. Dynamo
    forgets the programs that it has compiled in this process.

    Args:
        model: a module in evaluation mode, on its device. Dynamo must be able to make it one graph.
        kwargs: the keyword arguments of one call.
        path: a new folder; with `onnx`, a new file that ends in .onnx.
        format: `torch` (programs of torch.export), `aoti` (packages of AOTInductor, which need a C++ compiler here
            and none where they run), `onnx`, or `tensorrt` (engines).
        options: the options of torch.compile; if None, those that `model` was compiled with.
        device: the device on which the files run. The model and `kwargs` must be there, since the plan of the
            attentions, with their kernels, is made for it. If None, their device.
        opset: with `onnx`, the version of the standard operators, 20 or 23; if None, 20.

    Raises:
        OptionError: options, arguments, path, format or device are wrong.
        SparsifyError: the model cannot be captured as one graph, an operator has no form in the format, a
            compiler or a library is missing, or the disk is full.
    """
    options = _torch.options_of(model) if options is None else options
    files = target_of(path, format=format, options=options, opset=opset)
    module: Any = _torch.uncompiled(model)
    check_device(module, kwargs, device)
    captured = capture(module, kwargs, files.config, free_batch=format in ("onnx", "tensorrt"))
    try:
        if format == "onnx":
            return onnx_file(captured, files.path, opset=files.opset)
        if format == "tensorrt":
            return engines(captured, files.path)
        return torch_programs(captured, files.path) if format == "torch" else aoti(captured, files.path)
    except SparsifyError:
        raise
    except Exception as error:  # whatever PyTorch's exporters, the compiler or the disk raise
        raise SparsifyError(
            f"{type(module).__name__} cannot be written with format={format!r}, got {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
