"""Compare exported files with PyTorch's sparse model, and measure them."""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.exporting.capture import Captured, copies, first_line
from sparsify_compiler.exporting.state import functional

Run = Callable[[Sequence[Tensor], Mapping[str, Any]], tuple[list[Tensor], Sequence[Tensor]]]
"""(outputs, state) = run(state, inputs)"""


@dataclass(frozen=True, slots=True)
class Error:
    """The difference between a file and PyTorch's sparse model, over all outputs of all calls."""

    largest: float
    """The largest absolute difference."""
    relative: float
    """The root mean square of the difference, divided by that of PyTorch's outputs."""

    def __str__(self) -> str:
        return f"relative RMS error {self.relative:.2g}, largest {self.largest:.2g}"


@dataclass(frozen=True, slots=True)
class Report:
    """The errors of the files of an export."""

    errors: Mapping[str, Error]
    """Phase -> its error."""
    calls: int
    """The number of calls on random inputs, of each phase."""

    def __str__(self) -> str:
        return "\n".join(f"{phase}, {self.calls} calls: {error}" for phase, error in self.errors.items())


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of CPU time of one call, the median of several, taken in turns."""

    model: float
    """The model itself, dense, in PyTorch without a compiler."""
    files: Mapping[str, float]
    """Phase -> the file of that phase."""

    def __str__(self) -> str:
        rows = {"PyTorch, dense": self.model, **{f"file, {phase}": one for phase, one in self.files.items()}}
        return "\n".join(f"{name}: {seconds * 1e3:.1f} ms" for name, seconds in rows.items())


def check(captured: Captured, runs: Mapping[str, Run], calls: int, seed: int) -> Report:
    """Run the files and PyTorch's sparse model on the same random inputs, with their state."""
    errors = {}
    for phase, run in runs.items():
        module = functional(captured, phase)  # type: ignore[arg-type]
        state = own = module.first()
        largest = difference = size = 0.0
        for inputs in _random(captured, calls, seed):
            got, state = run(state, copies(inputs))  # type: ignore[assignment]
            with torch.no_grad():
                output, own = module(own, **inputs)
            wanted = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            for one, other in zip(got, wanted, strict=True):
                apart = (one.double() - other.double()).abs()
                largest = max(largest, float(apart.max()))
                difference += float(apart.square().sum())
                size += float(other.double().square().sum())
        errors[phase] = Error(largest, (difference / size) ** 0.5 if size else difference)
    return Report(errors, calls)


def benchmark(captured: Captured, runs: Mapping[str, Run], calls: int) -> Times:
    """Measure the CPU time of a call of the model and of each file, in turns, after one call of each."""
    states = {phase: functional(captured, phase).first() for phase in runs}  # type: ignore[arg-type]

    @torch.no_grad()
    def model() -> None:
        captured.model(**captured.kwargs)

    def file(phase: str) -> Callable[[], Any]:
        return lambda: runs[phase](states[phase], captured.tensors)

    timed: dict[str, Callable[[], Any]] = {"": model, **{phase: file(phase) for phase in runs}}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(calls + 1):
        for name, one in timed.items():
            start = time.process_time()
            one()
            if turn:
                seconds[name].append(time.process_time() - start)
    medians = {name: median(found) for name, found in seconds.items()}
    return Times(medians.pop(""), medians)


def check_runs(format: str) -> None:
    """Raise SparsifyError unless files of a format run in this process."""
    if format == "tensorrt":
        raise SparsifyError("engines run on a GPU, in TensorRT: check the file of format='onnx' instead")
    if format == "onnx":
        try:
            importlib.import_module("onnxruntime")
        except ImportError as error:
            raise SparsifyError(
                "ONNX Runtime is needed to run this file: pip install 'sparsify-compiler[onnx]'"
            ) from error


def onnx_run(file: Path) -> Run:
    """Run a file by ONNX Runtime on the CPU, with as many threads as PyTorch has.

    Raises:
        SparsifyError: ONNX Runtime lacks an operator in the data type of the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes of errors
        raise SparsifyError(f"ONNX Runtime cannot run {file.name} on the CPU: {first_line(error)}") from error
    names = [one.name for one in session.get_inputs()]

    def run(state: Sequence[Tensor], inputs: Mapping[str, Any]) -> tuple[list[Tensor], Sequence[Tensor]]:
        tensors = [leaf for leaf in tree_leaves(dict(inputs)) if isinstance(leaf, Tensor)]
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(one) for one in session.run(None, given)], state

    return run


def program_run(program: Callable[..., Any]) -> Run:
    """Run a program of `load`."""

    def run(state: Sequence[Tensor], inputs: Mapping[str, Any]) -> tuple[list[Tensor], Sequence[Tensor]]:
        with torch.no_grad():
            output, state = program(tuple(state), **inputs)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], state

    return run


def _random(captured: Captured, calls: int, seed: int) -> Iterator[dict[str, Any]]:
    """Inputs like those of the captured call. Float tensors of two or more dimensions are drawn with their mean and
    deviation; time steps, masks and lengths stay."""
    draw = torch.Generator().manual_seed(seed)

    def like(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 2:
            return leaf
        noise = torch.randn(leaf.shape, generator=draw)
        return (noise * leaf.float().std(correction=0).cpu() + leaf.float().mean().cpu()).to(leaf)

    for _ in range(calls):
        yield tree_map(like, captured.tensors)
