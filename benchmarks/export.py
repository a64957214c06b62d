"""Exports: their errors by family and method, and the speed of ONNX in ONNX Runtime.

    python -m benchmarks.export --out benchmarks/results/export-onnx.json

Errors are those of `Exported.check`: the files next to PyTorch's sparse model, on random inputs, in fp32;
`benchmarks.export_loops` has generations of the formats that PyTorch runs. Speed is
CPU time, interleaved: of one attention, 2 heads of 64, next to the fastest dense form, the contributed operator
MultiHeadAttention; and of a whole Wan of 2 layers next to its dense file. A file is checked before it is timed. The
whole matrix takes an hour. Each result is written at once, and results in the file that a run does not repeat stay;
`--missing` runs the cases that the file lacks.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import write_json
from benchmarks.model import Case
from sparsify_compiler import SparsifyError, export, onnx_custom_ops
from sparsify_compiler.testing.models import CASES, Grid

FAMILIES = ("wan", "hunyuan_video", "cogvideox", "ltx", "allegro", "easyanimate")
FORMATS = ("torch", "aoti", "onnx")
BUDGET: dict[str, Any] = {"kv_budget": 0.3, "dense_steps": 0, "dense_layers": 0}
CUBES = {"method": "cubes", "cube": (2, 2, 4), "query_cube": (2, 4, 4), **BUDGET}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "tile": {"method": "tile", "reference_frames": 1},
    "sta": {"method": "sta", "tile": (1, 2, 2), "window": (3, 1, 1)},
    "cubes, drop": {**CUBES, "far_field": "drop"},
    "cubes, mean": {**CUBES, "far_field": "mean"},
    "cubes, linear": {**CUBES, "far_field": "linear"},
    "svg2": {"method": "svg2", "q_clusters": 5, "kv_clusters": 9, "dense_layers": 0},
    "keys": {"method": "keys", "q_clusters": 6, "dense_layers": 0},
}
SMALL: Grid = (4, 4, 5)

HEADS, HEAD_DIM = 2, 64
LARGE: Grid = (16, 16, 32)
CUBES_FIFTH = {"method": "cubes", **BUDGET, "kv_budget": 0.2}
SPEED: dict[str, dict[str, Any]] = {
    "tile": {"method": "tile", "reference_frames": 2},
    "cubes, drop": {**CUBES_FIFTH, "far_field": "drop"},
    "cubes, mean": {**CUBES_FIFTH, "far_field": "mean"},
    "cubes, linear": {**CUBES_FIFTH, "far_field": "linear"},
}
WHOLE = Case(
    family="wan",
    grid=(12, 24, 32),
    heads=4,
    head_dim=64,
    layers=2,
    dtype=torch.float32,
    reference_frames=2,
)
"""9,216 tokens."""


def error(family: str, method: str, format: str) -> dict[str, Any]:
    """The error of one export, its size and the CPU time to make it; or why it is refused."""
    case = {"family": family, "method": method, "format": format}
    torch._dynamo.reset()
    model, inputs = CASES[family].build(SMALL, batch=1)
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx" if format == "onnx" else "out")
        start = time.process_time()
        try:
            exported = export(model, inputs, path, format=format, options=METHODS[method])
        except SparsifyError as refusal:
            return {**case, "refused": str(refusal)}
        seconds = time.process_time() - start
        errors = exported.check(calls=2).errors
        return {
            **case,
            "sparse": len(exported.plan.sparse),
            "attentions": len(exported.plan),
            "seconds": round(seconds, 1),
            "megabytes": round(exported.size / 1e6, 2),
            "errors": {phase: float(f"{one.relative:.2g}") for phase, one in errors.items()},
        }


class Attention(nn.Module):
    """Attention over a video, with the inputs and the output of MultiHeadAttention: [B, S, heads * head dim]."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (one.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2) for one in (query, key, value))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def speed(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of CPU time of each form, the median of the rounds, with its density and error."""
    draw, tokens = torch.Generator().manual_seed(0), math.prod(LARGE)
    names = ("query", "key", "value")
    inputs = {name: torch.randn(2, tokens, HEADS * HEAD_DIM, generator=draw) for name in names}
    given = {name: tensor[:1].numpy() for name, tensor in inputs.items()}
    forms: dict[str, Callable[[], Any]] = {"dense, MultiHeadAttention": _dense(given)}
    facts: dict[str, dict[str, Any]] = {name: {"density": 1.0} for name in forms}
    model = Attention().eval()
    with TemporaryDirectory() as folder:
        for opset in (20, 23):
            path = Path(folder, f"dense{opset}.onnx")
            export(model, inputs, path, format="onnx", options={"method": "dense"}, opset=opset)
            name = f"dense, standard operators of opset {opset}"
            forms[name], facts[name] = _run(path, given, kernel=False), {"density": 1.0}
        for method, options in SPEED.items():
            path = Path(folder, f"{method.replace(', ', '_')}.onnx")
            facts[method] = _checked(model, inputs, path, {**options, "grid": LARGE})
            for kernel in (False, True):
                name = f"{method}, {'our kernel' if kernel else 'standard operators'}"
                forms[name], facts[name] = _run(path, given, kernel=kernel), facts[method]
        return _rows(_race(forms, rounds), facts)


def whole(rounds: int) -> list[dict[str, Any]]:
    """The same of a whole model, next to its dense file."""
    model, inputs = WHOLE.build()
    given = {name: value.numpy() for name, value in inputs.items() if isinstance(value, Tensor)}
    methods = {"tile": WHOLE.options, "cubes, linear": SPEED["cubes, linear"]}
    forms: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        for method, options in {"dense": {"method": "dense"}, **methods}.items():
            path = Path(folder, f"{method.replace(', ', '_')}.onnx")
            own = _checked(model, inputs, path, {**options, "dense_steps": 0, "dense_layers": 0})
            for kernel in (False, True)[: 1 if method == "dense" else 2]:
                how = "" if method == "dense" else f", {'our kernel' if kernel else 'standard operators'}"
                forms[f"Wan, {method}{how}"] = _run(path, given, kernel=kernel)
                facts[f"Wan, {method}{how}"] = own
        return _rows(_race(forms, rounds), facts)


def _checked(
    model: nn.Module, inputs: Mapping[str, Any], path: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Density and error of a new file. The file is wrong if its error is large."""
    exported = export(model, inputs, path, format="onnx", options=options)
    (found,) = exported.check(calls=1).errors.values()
    assert found.relative < 1e-4, (options, found)
    sparse = exported.plan.sparse
    density = options.get("kv_budget") or (sparse[0].density if sparse else 1.0)
    return {"density": density, "error": found.relative}


def _rows(seconds: Mapping[str, float], facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The forms by their times; the first is dense."""
    dense = next(iter(seconds.values()))
    return [
        {
            "form": name,
            "milliseconds": round(1e3 * took, 1),
            "times faster than dense": round(dense / took, 2),
            **{key: float(f"{value:.3g}") for key, value in facts[name].items()},
        }
        for name, took in seconds.items()
    ]


def _race(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of CPU time, the median of rounds in which all run in turns.

    Two rounds more do not count: in its second run ONNX Runtime takes the memory that its first run planned.
    """
    found: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 2):
        for name, run in forms.items():
            start = time.process_time()
            run()
            if number > 1:
                found[name].append(time.process_time() - start)
    return {name: median(took) for name, took in found.items()}


def _session(model: str | bytes, *, kernel: bool = False) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if kernel:
        options.register_custom_ops_library(str(onnx_custom_ops()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(path: Path, given: Mapping[str, np.ndarray], *, kernel: bool) -> Callable[[], Any]:
    session = _session(str(path), kernel=kernel)
    return lambda: session.run(None, dict(given))


def _dense(given: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    """Dense attention as ONNX Runtime's own fused operator."""
    from onnx import TensorProto, helper

    node = helper.make_node("MultiHeadAttention", [*given], ["out"], domain="com.microsoft", num_heads=HEADS)
    shape = next(iter(given.values())).shape
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*given, "out")]
    graph = helper.make_graph([node], "dense", infos[:3], infos[3:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = _session(model.SerializeToString())
    return lambda: session.run(None, dict(given))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--formats", nargs="*", default=["onnx"], choices=FORMATS)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of the measurement of speed; 0 for none"
    )
    parser.add_argument("--missing", action="store_true", help="run only the cases that the file lacks")
    parser.add_argument("--most", type=int, help="end after this number of cases")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = {"grid of the speed": LARGE, "heads": HEADS, "head dim": HEAD_DIM}
    earlier = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"cases": [], "speed": []}
    place = itemgetter("family", "method", "format")
    found, rows = {place(case): case for case in earlier["cases"]}, earlier["speed"]

    def write() -> None:
        everything = itertools.product(FAMILIES, METHODS, FORMATS)
        cases = [found[one] for one in everything if one in found]
        write_json(chosen.out, cases, lines=True, speed=rows, **about)

    asked = [
        one
        for one in itertools.product(chosen.families, chosen.methods, chosen.formats)
        if not (chosen.missing and one in found)
    ]
    for one in asked[: chosen.most]:
        found[one] = error(*one)
        print(found[one], flush=True)
        write()
    if chosen.rounds:
        rows = speed(chosen.rounds) + whole(chosen.rounds)
        for row in rows:
            print(row, flush=True)
        write()


if __name__ == "__main__":
    main()
