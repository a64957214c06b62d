"""Load the folder of an exported model: a callable with the model's own arguments and outputs.

The clock, the streams and their state are those of compiled models (`runtime/state.py`): `generation` works alike.
"""

import importlib
import json
import pkgutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler import __version__, _torch_export
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.exporting.arguments import bind
from sparsify_compiler.exporting.capture import first_line, has_tensor
from sparsify_compiler.exporting.files import FORMAT, PLAN, WEIGHTS, path_of, sizes_of
from sparsify_compiler.exporting.state import name_in_model
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.plan import GraphPlan
from sparsify_compiler.runtime.call import read_arguments
from sparsify_compiler.runtime.clock import Tick
from sparsify_compiler.runtime.state import ModelState, Spec

KERNELS = ("attention", "clustering", "far_field", "prediction", "statistics")
"""The packages whose ops a program may call."""

NEEDED = (
    *(
        "files",
        "package",
        "torch",
        "model",
        "device",
        "phases",
        "dense steps",
        "time step",
        "arguments",
        "outputs",
    ),
    *("initialised", "state", "weights"),
)
"""The entries of `plan.json` that a call needs."""

Program = Callable[..., Any]
"""(output, state) = program(state, **inputs)"""


class Loaded:
    """An exported model. It is called as the model is."""

    def __init__(self, content: Mapping[str, Any], programs: Mapping[str, Program]) -> None:
        self.plan = content
        """The content of `plan.json`."""
        self.programs = programs
        """Phase -> its program."""
        self.state = ModelState()
        self._steps = GraphPlan(dense_steps=content["dense steps"])
        self._specs: list[Spec] = [
            (name, tuple(shape), torch.device(device)) for name, shape, device in content["state"]
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            OperandError: the arguments have other sizes, types or values than those of the exported call.
        """
        named = bind(self.plan["arguments"], args, kwargs)
        tick = self._tick(named)
        phase = "dense" if self._steps.runs_dense(tick.step, tick.steps) else "sparse"
        stream = self.state.stream(self._specs, tick.stream)
        begun = torch.tensor(stream.calls > 0 and tick.remembers, device="cpu")
        state = (*([begun] if self.plan["initialised"] else []), *stream.tensors)
        inputs = {name: value for name, value in named.items() if has_tensor(value)}
        with torch.no_grad():
            output, state = self.programs.get(phase, self.programs[self.plan["phases"][0]])(state, **inputs)
        stream.tensors = [*state][self.plan["initialised"] :]
        stream.calls += 1
        return output

    def _tick(self, named: Mapping[str, Any]) -> Tick:
        """Count a call. Its inputs are read only where something depends on its step or stream."""
        time = self.plan["time step"]
        clocked = self._specs or self.plan["dense steps"] > 0
        if clocked and time is not None and self.state.clock.reads():
            return self.state.tick(*read_arguments(named, time))
        return self.state.tick(None, {})


def load(path: str | Path) -> Loaded:
    """Load a model that `export` wrote with format `torch` or `aoti`.

    Raises:
        OptionError: the folder holds no such model, or one of another version or device.
    """
    folder = path_of(path)
    content = _content(folder)
    for name in KERNELS:
        importlib.import_module(f"sparsify_compiler.kernels.{name}")  # the ops of the programs
    try:
        for name in content["outputs"]:
            _torch_export.register_class(_class(name, content["model"]))
        read = {"torch": _torch_program, "aoti": _package}[content["files"]]
        weights = torch.load(folder / WEIGHTS, weights_only=True, mmap=True)
        if sizes_of(weights) != content["weights"]:
            raise _damaged(path, f"{WEIGHTS} has other tensors than those of its programs.")
        programs = {phase: read(folder / f"{phase}.pt2", phase, weights) for phase in content["phases"]}
        return Loaded(content, programs)
    except SparsifyError:
        raise
    except Exception as error:  # whatever PyTorch's readers raise
        raise _damaged(path, first_line(error)) from error


def _damaged(path: str | Path, why: str) -> OptionError:
    return OptionError(f"{str(path)!r} is damaged: {why} Export the model again")


def _class(name: str, model: str) -> type:
    """A class of outputs by its full name."""
    try:
        found: type = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        module, _, kind = name.rpartition(".")
        raise SparsifyError(
            f"the output of {model} is a {kind} of {module}, which cannot be imported: {error}. "
            "Install it, or export a call that returns a tuple (return_dict=False)"
        ) from error
    return found


def torch_custom_ops() -> Path:
    """The library of the ops that exported programs call on the CPU, for programs without Python.

        dlopen(path, RTLD_NOW)    // before a package is loaded

    It needs the library of the kernels, `attention-*.so` in the same folder: copy both. It is built at its first
    use, for this CPU and this version of PyTorch. In a process with Python's ops, those run.

    Raises:
        SparsifyError: it cannot be built here.
    """
    try:
        return library.torch_ops()
    except (OSError, subprocess.SubprocessError) as error:
        raise SparsifyError(
            f"the library needs a C++ compiler: {first_line(OSError(library.words(error)))} Install g++"
        ) from error


def _torch_program(file: Path, phase: str, weights: Mapping[str, Tensor]) -> Program:
    program = _torch_export.load_program(file)
    for name, small in program.state_dict.items():
        tensor = weights[name_in_model(name)]
        is_parameter = isinstance(small, nn.Parameter)
        program.state_dict[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    return program.module()


def _package(file: Path, phase: str, weights: Mapping[str, Tensor]) -> Program:
    def constant(name: str) -> Tensor:
        own = name_in_model(name)
        return weights[f"{phase}/{own}" if f"{phase}/{own}" in weights else own]

    return _torch_export.load_ahead(file, constant)


def _content(folder: Path) -> dict[str, Any]:
    """The content of the file of the plan.

    Raises:
        OptionError: it cannot be read here.
    """
    what = "path must be a folder that sparsify_compiler.export wrote"
    if folder.suffix == ".onnx":
        raise OptionError(f"{what}, got {str(folder)!r}: onnxruntime.InferenceSession loads files of ONNX")
    try:
        content = json.loads((folder / PLAN).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"{what}, got {str(folder)!r}: {first_line(error)}") from error
    kind = content.get("format") if isinstance(content, dict) else None
    if kind != FORMAT:
        raise OptionError(f"{what}, in the format {FORMAT!r}, got {kind!r}: export the model again")
    if content.get("files") == "tensorrt":
        raise OptionError(
            f"{str(folder)!r} holds engines, which TensorRT loads: load a folder of another format"
        )
    for name, here in (("package", __version__), ("torch", torch.__version__)):
        given = content.get(name)
        fits = given == here or (name == "torch" and content.get("files") == "torch")
        if not fits:
            called = "sparsify-compiler" if name == "package" else name
            raise OptionError(
                f"{str(folder)!r} was exported by {called} {given}, and this is {here}: install that "
                "version, or export the model again"
            )
    if missing := [name for name in NEEDED if name not in content]:
        raise _damaged(folder, f"{PLAN} lacks {missing[0]!r}.")
    if content["device"] == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"{str(folder)!r} was exported on a GPU and needs one: export the model on the CPU")
    return content
