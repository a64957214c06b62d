"""Write engines of TensorRT or TensorRT-RTX, from ONNX.

The bodies of the nodes are inlined first: the parser takes one body for all overloads, and no absent inputs. An
engine is built for the GPU of this machine by TensorRT. TensorRT-RTX builds without a GPU, and finishes the engine
where it runs. No engine has run on a GPU yet.
"""

import importlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.exporting.capture import Captured
from sparsify_compiler.exporting.files import PLAN, Exported, folder_of, plan_of, writing
from sparsify_compiler.exporting.onnx import OPSETS, check_methods, write_model
from sparsify_compiler.exporting.state import functional, phases

LIBRARIES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Modules that build engines, in order of preference; the wheels of TensorRT-RTX have the last one."""


def engines(captured: Captured, path: Path) -> Exported:
    """Write a folder with an engine of each phase.

    Raises:
        OptionError: a method has no form with constant sizes.
        SparsifyError: a library is missing, the parser refuses a node, or the build fails.
    """
    check_methods(captured)
    trt = library()
    with writing(path) as folder:
        for phase in phases(captured):
            with TemporaryDirectory() as scratch:
                file = Path(scratch, f"{phase}.onnx")
                write_model(captured, phase, file, OPSETS[0])
                (folder / f"{phase}.engine").write_bytes(engine(trt, file, captured.batch))
        content = plan_of(captured, "tensorrt", functional(captured, phase))
        content["built by"] = f"{trt.__name__} {trt.__version__}"
        (folder / PLAN).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return folder_of(captured, path, "tensorrt")


def library() -> Any:
    """The module of TensorRT. Raises SparsifyError where there is none."""
    for name in LIBRARIES:
        try:
            found: ModuleType = importlib.import_module(name)
        except (ImportError, OSError):  # not installed, or without the driver's libraries
            continue
        return found
    raise SparsifyError(
        "format 'tensorrt' needs TensorRT or TensorRT-RTX: pip install --no-deps tensorrt-rtx-cu12-bindings "
        "tensorrt-rtx-cu12-libs"
    )


def _inline(file: Path) -> None:
    """Replace the nodes of a file that have bodies by these."""
    import onnx
    import onnx.inliner

    model = onnx.load(file, load_external_data=False)
    onnx.save(onnx.inliner.inline_local_functions(model), file)


def engine(trt: Any, file: Path, batch: int | None) -> bytes:
    """The engine of an ONNX file, in the data types of the file. The bodies of its nodes are inlined in the file.

    Args:
        trt: the module of TensorRT.
        batch: the largest batch, and the one to optimise for, where it is free.

    Raises:
        SparsifyError: the parser refuses a node, or the build fails.
    """
    _inline(file)
    logger, errors = _logger(trt)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        one = parser.get_error(0)
        raise SparsifyError(
            f"TensorRT's parser refuses the node {one.node_name()!r} ({one.node_operator()}): {_line(one.desc())}"
        )
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for place in range(network.num_inputs):
        given = network.get_input(place)
        least, most = ([one if size < 0 else size for size in given.shape] for one in (1, batch or 1))
        profile.set_shape(given.name, least, most, most)
    config.add_optimization_profile(profile)
    built = builder.build_serialized_network(network, config)
    if built is None:
        why = _line(errors[-1]) if errors else "it gives no reason"
        raise SparsifyError(f"TensorRT cannot build the engine: {why}")
    return bytes(built)


def _logger(trt: Any) -> tuple[Any, list[str]]:
    """(a logger, the list of the errors that it gets)."""
    errors: list[str] = []
    bad = trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in bad:
                errors.append(message)

    return Logger(), errors


def _line(text: str) -> str:
    return " ".join(text.split())
