"""The folder of an exported model.

    plan.json     the plan, the step rule, the arguments, the state, versions
    weights.pt    the tensors of all programs, by their names in the model; torch.load and torch::pickle_load
                  read it
    state.pt      the state before the first call; it takes no memory, and a program takes a contiguous copy of it
    dense.pt2     the program of the dense phase, where steps of a generation stay dense
    sparse.pt2    the program of the sparse phase

A folder is written under another name and then renamed, so no folder of this name is ever half written. What a
killed process leaves under the other name is removed by the next export to the same path.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsify_compiler import __version__, _torch_export
from sparsify_compiler.config import integer
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.exporting import report
from sparsify_compiler.exporting.arguments import described
from sparsify_compiler.exporting.capture import Captured, first_line
from sparsify_compiler.exporting.report import Report, Run, Times
from sparsify_compiler.exporting.state import Functional, functional, name_in_model, phases
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.call import time_argument

FORMAT = "sparsify-compiler export 3"
PLAN, WEIGHTS, STATE = "plan.json", "weights.pt", "state.pt"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Exported:
    """Files that `export` wrote."""

    path: Path
    format: str
    plan: GraphPlan
    """The plan of every attention."""
    phases: tuple[str, ...]
    """The phases that have a program."""
    size: int
    """The size of all files, in bytes."""
    captured: Captured
    """The call that was exported."""

    def check(self, calls: int = 3, seed: int = 0) -> Report:
        """Run the files and PyTorch's sparse model on the same random inputs, and compare.

        Raises:
            OptionError: a number is wrong.
            SparsifyError: ONNX Runtime is missing, or the files are engines, which run on a GPU alone.
        """
        if (integer(calls) or 0) < 1 or (integer(seed) or 0) < 0:
            raise OptionError(f"calls must be at least 1 and seed at least 0, got {calls!r} and {seed!r}")
        return report.check(self.captured, self._runs(), calls, seed)

    def benchmark(self, calls: int = 5) -> Times:
        """Measure the CPU time of a call of each file, and of the model itself in PyTorch, dense.

        Raises:
            OptionError: a number is wrong.
            SparsifyError: ONNX Runtime is missing.
        """
        if (integer(calls) or 0) < 1:
            raise OptionError(f"calls must be at least 1, got {calls!r}")
        return report.benchmark(self.captured, self._runs(), calls)

    def _runs(self) -> dict[str, Run]:
        """Phase -> a function that runs its file."""
        report.check_runs(self.format)
        if self.format == "onnx":
            return {phase: report.onnx_run(self.file(phase)) for phase in self.phases}
        from sparsify_compiler.exporting.loaded import load

        return {phase: report.program_run(one) for phase, one in load(self.path).programs.items()}

    def file(self, phase: str) -> Path:
        """The file of a phase."""
        if self.format == "onnx":
            return onnx_path(self.path, phase, self.phases)
        return self.path / f"{phase}.{'engine' if self.format == 'tensorrt' else 'pt2'}"

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.format}, {' and '.join(self.phases)}, {len(self.plan.sparse)} of {len(self.plan)} "
            f"attentions sparse, {self.size / 1e6:.1f} MB"
        )


def torch_programs(captured: Captured, path: Path) -> Exported:
    """Write programs of torch.export."""

    def write(program: torch.export.ExportedProgram, file: Path, _: str) -> dict[str, Tensor]:
        weights = dict(program.state_dict)
        program.state_dict.update({name: _without_memory(tensor) for name, tensor in weights.items()})
        _torch_export.save_program(program, file)
        return {name_in_model(name): tensor for name, tensor in weights.items()}

    return _write_folder(captured, path, "torch", write)


def aoti(captured: Captured, path: Path) -> Exported:
    """Write packages of AOTInductor. Constants that are no tensors of the model have the phase in front."""

    def write(program: torch.export.ExportedProgram, file: Path, phase: str) -> dict[str, Tensor]:
        try:
            used = _torch_export.compile_ahead(program, file)
        except Exception as error:  # whatever Inductor or the compiler raises
            if _torch_export.lacks_compiler(error):
                raise _without_compiler(error) from error
            raise
        weights = {name_in_model(name): tensor for name, tensor in program.state_dict.items()}
        others = {name: tensor for name, tensor in program.constants.items() if name in used}
        return weights | {f"{phase}/{name_in_model(name)}": tensor for name, tensor in others.items()}

    return _write_folder(captured, path, "aoti", write)


def check_compiler() -> None:
    """Raise SparsifyError if format `aoti` lacks a C++ compiler."""
    try:
        _torch_export.find_compiler()
    except Exception as error:  # of Inductor, or of the compiler's process
        raise _without_compiler(error) from error


def _without_compiler(error: Exception) -> SparsifyError:
    return SparsifyError(
        f"format 'aoti' needs a C++ compiler, which is missing: {first_line(error)} Install g++, or export with "
        "format='torch'"
    )


Write = Callable[[torch.export.ExportedProgram, Path, str], Mapping[str, Tensor]]
"""Writes the program of a phase to a file, and returns the tensors that belong into `weights.pt`."""


def _write_folder(captured: Captured, path: Path, format: str, write: Write) -> Exported:
    weights: dict[str, Tensor] = {}
    with writing(path) as folder:
        for phase in phases(captured):
            module = functional(captured, phase)
            weights |= write(_program(module, captured), folder / f"{phase}.pt2", phase)
        torch.save({name: tensor.detach() for name, tensor in weights.items()}, folder / WEIGHTS)
        torch.save([_without_memory(tensor) for tensor in module.first()], folder / STATE)
        content = plan_of(captured, format, module) | {"weights": sizes_of(weights)}
        (folder / PLAN).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return folder_of(captured, path, format)


def sizes_of(weights: Mapping[str, Tensor]) -> str:
    """A digest of the names, sizes and types of tensors. A program reads memory by these."""
    said = sorted(f"{name} {tuple(one.shape)} {one.dtype}" for name, one in weights.items())
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def folder_of(captured: Captured, path: Path, format: str) -> Exported:
    """The folder that was written."""
    return Exported(
        path=path,
        format=format,
        plan=captured.plan,
        phases=phases(captured),
        size=sum(file.stat().st_size for file in path.iterdir()),
        captured=captured,
    )


def onnx_path(path: Path, phase: str, phases: Sequence[str]) -> Path:
    """The file of a phase with format `onnx`: the last phase has the path itself."""
    return path if phase == phases[-1] else path.with_suffix(f".{phase}.onnx")


def _program(module: Functional, captured: Captured) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (module.first(),), captured.tensors, strict=False)


def _without_memory(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type whose elements are one number: a file holds this number alone."""
    small = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
    return nn.Parameter(small, requires_grad=False) if isinstance(tensor, nn.Parameter) else small


def plan_of(captured: Captured, format: str, module: Functional) -> dict[str, Any]:
    """All that a file says about itself, as JSON."""
    kwargs = captured.kwargs
    return {
        "format": FORMAT,
        "files": format,
        "package": __version__,
        "torch": torch.__version__,
        "model": type(captured.model).__name__,
        "device": next(leaf.device.type for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)),
        "phases": phases(captured),
        "dense steps": captured.plan.dense_steps,
        "time step": time_argument(kwargs),
        "arguments": described(captured.model, kwargs),
        "outputs": sorted(_torch_export.classes_in(captured.out_spec)),
        "initialised": module.extra.initialised,
        "state": [[name, shape, str(device)] for name, shape, device in module.specs],
        "sites": [_site(plan) for plan in captured.plan],
    }


def _site(plan: AttentionPlan) -> dict[str, Any]:
    settings = plan.settings
    numbers = (
        {} if settings is None else {f.name: _plain(getattr(settings, f.name)) for f in fields(settings)}
    )
    return {
        "name": plan.site.name,
        "kind": plan.site.kind,
        "heads": plan.site.heads,
        "head dim": plan.site.head_dim,
        "tokens": plan.site.q_tokens,
        "grid": plan.layout.grid,
        "before": plan.layout.before,
        "after": plan.layout.after,
        "method": plan.method,
        "settings": numbers,
        "far field": plan.far_field,
        "density": plan.density,
        "provider": plan.provider,
        "reason": plan.reason,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def path_of(path: str | Path) -> Path:
    """A path that a caller gave, where `~` is the caller's home.

    Raises:
        OptionError: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise OptionError(f"path must be a string or a Path, got {path!r}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"path must begin with a folder that exists, got {str(path)!r}: {error}") from error


def check_path(path: str | Path) -> Path:
    """The path of a new file or folder, in a folder that exists.

    Raises:
        OptionError: it exists, or its folder does not.
    """
    target = path_of(path).absolute()
    try:
        target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # the name is too long, or has a null byte
        raise OptionError(f"path must be the name of a file or folder, got {str(path)!r}: {error}") from error
    else:
        raise OptionError(
            f"path must be new, got {str(path)!r}, which exists: remove it, or give another path"
        )
    if not target.parent.is_dir():
        raise OptionError(
            f"path must lie in a folder that exists, got {str(path)!r}: make {target.parent} first"
        )
    return target


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a new folder that gets the name `path` at the end. After an error nothing is left.

    Raises:
        OptionError: the folder cannot be written to, or the path exists by now.
    """
    with scratch(path) as folder:
        yield folder
        folder.chmod(0o755)  # a temporary folder is private
        check_path(path)
        folder.rename(path)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield a new hidden folder next to `path`. At the end it is removed, if it has its name still.

    Raises:
        OptionError: the folder cannot be written to.
    """
    try:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    except OSError as error:
        raise OptionError(f"path must be writable, got {str(path)!r}: {error.strerror}") from error
    own = _hold(folder)
    try:
        _remove_abandoned(path, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(own)


def _remove_abandoned(path: Path, folder: Path) -> None:
    """Remove the folders that killed processes began for `path`. Nobody holds them; `folder` is our own."""
    for other in map(Path, glob.glob(f"{glob.escape(f'{path.parent}/.{path.name}-')}*")):
        if other == folder or not other.is_dir():
            continue
        descriptor = os.open(other, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
        except OSError:  # another process writes it, or the file system has no locks
            pass
        finally:
            os.close(descriptor)


def _hold(folder: Path) -> int:
    """A descriptor of a folder that shows other processes, until it is closed, that this one writes it."""
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor
