"""The files of an export, checked before there is a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify_compiler.config import SparsifyConfig, integer
from sparsify_compiler.errors import OptionError, unknown_choice
from sparsify_compiler.exporting import onnx, report, tensorrt
from sparsify_compiler.exporting.files import check_compiler, check_path, scratch
from sparsify_compiler.exporting.standard import check_config
from sparsify_compiler.options import configure

FORMATS = ("torch", "aoti", "onnx", "tensorrt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The files of an export."""

    path: Path
    format: str
    opset: int
    """The version of ONNX's standard operators."""
    config: SparsifyConfig

    def check_ahead(self, *, runs: bool) -> None:
        """Find what would stop the export of any model with attention.

        Args:
            runs: whether the files run here after the export.

        Raises:
            OptionError: no attention has a form in the format.
            SparsifyError: a library or a compiler is missing, or the files do not run here.
        """
        if self.format in ("onnx", "tensorrt"):
            check_config(self.config)
            onnx.library()
        if self.format == "tensorrt":
            tensorrt.library()
        if self.format == "aoti":
            check_compiler()
        if runs:
            report.check_runs(self.format)


def target_of(
    path: str | Path, *, format: str, options: Mapping[str, Any] | None, opset: int | None
) -> Target:
    """The files that these arguments of `export` describe.

    Raises:
        OptionError: format, options, opset or path are wrong, or the path is not writable.
    """
    if format not in FORMATS:
        raise unknown_choice("format", format, FORMATS)
    if opset is not None and format != "onnx":
        raise OptionError(
            f"opset is for format='onnx', got opset={opset!r} with format={format!r}: leave it out"
        )
    if opset is not None and (integer(opset) not in onnx.OPSETS):
        raise OptionError(f"opset must be {' or '.join(map(str, onnx.OPSETS))}, got {opset!r}")
    file = check_path(path)
    if format == "onnx" and file.suffix != ".onnx":
        raise OptionError(f"path must end in .onnx with format='onnx', got {file.name!r}")
    config = configure(options)
    if config.parallel is not None:
        raise OptionError("a file is for one process, got the option parallel: leave it out")
    with scratch(file):
        pass  # the folder can be written to
    return Target(path=file, format=format, opset=opset or onnx.OPSETS[0], config=config)
