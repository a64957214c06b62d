"""Exports: their errors by family, method and format, and the speed of ONNX attention in ONNX Runtime.

    python -m benchmarks.export --out benchmarks/results/export.json

Errors are those of `Exported.check`: the files next to PyTorch's sparse model, on random inputs, in fp32. Speed is
CPU time of one attention, 2 heads of 64, interleaved, next to the fastest dense form: the contributed operator
MultiHeadAttention. A file is checked before it is timed. The whole
matrix takes an hour; results in the file that a run does not repeat stay, so it may run in parts.
"""

import argparse
import itertools
import json
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
from sparsify_compiler import SparsifyError, export, onnx_custom_ops
from sparsify_compiler.testing.models import CASES, Grid

FAMILIES = ("wan", "hunyuan_video", "cogvideox", "ltx", "allegro", "easyanimate")
FORMATS = ("torch", "aoti", "onnx")
FIXED = {"top_p": None, "min_gain": None, "min_kv_ratio": 0.3, "dense_steps": 0, "dense_layers": 0}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "tile": {"method": "tile", "reference_frames": 1},
    "sta": {"method": "sta", "tile": (1, 2, 2), "window": (3, 1, 1)},
    "cubes, drop": {
        "method": "cubes",
        "cube": (2, 2, 4),
        "query_cube": (2, 4, 4),
        "far_field": "drop",
        **FIXED,
    },
    "cubes, mean": {
        "method": "cubes",
        "cube": (2, 2, 4),
        "query_cube": (2, 4, 4),
        "far_field": "mean",
        **FIXED,
    },
    "svg2": {"method": "svg2", "q_clusters": 5, "kv_clusters": 9, "dense_layers": 0},
    "keys": {"method": "keys", "q_clusters": 6, "dense_layers": 0},
}
SMALL: Grid = (4, 4, 5)

HEADS, HEAD_DIM = 2, 64
LARGE: Grid = (16, 16, 32)
SPEED: dict[str, dict[str, Any]] = {
    "tile": {"method": "tile", "reference_frames": 2},
    "cubes, drop": {"method": "cubes", **FIXED, "min_kv_ratio": 0.2, "far_field": "drop"},
    "cubes, mean": {"method": "cubes", **FIXED, "min_kv_ratio": 0.2, "far_field": "mean"},
}


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
    """Attention over a video. Its input holds queries, keys and values."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = hidden_states.flatten(2).unflatten(1, (3, HEADS, HEAD_DIM)).permute(1, 0, 2, 4, 3)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def speed(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of CPU time of each form, the median of the rounds, with its density and error."""
    torch.manual_seed(0)
    model = Attention().eval()
    inputs = {"hidden_states": torch.randn(2, 3 * HEADS * HEAD_DIM, *LARGE)}
    given = {"hidden_states": inputs["hidden_states"][:1].numpy()}
    forms: dict[str, Callable[[], Any]] = {"dense, MultiHeadAttention": _dense()}
    facts: dict[str, dict[str, Any]] = {name: {"density": 1.0} for name in forms}
    with TemporaryDirectory() as folder:
        for opset in (20, 23):
            path = Path(folder, f"dense{opset}.onnx")
            export(model, inputs, path, format="onnx", options={"method": "dense"}, opset=opset)
            name = f"dense, standard operators of opset {opset}"
            forms[name], facts[name] = _run(path, given, kernel=False), {"density": 1.0}
        for method, options in SPEED.items():
            path = Path(folder, f"{method.replace(', ', '_')}.onnx")
            exported = export(model, inputs, path, format="onnx", options={**options, "grid": LARGE})
            assert exported.plan.sparse
            (found,) = exported.check(calls=1).errors.values()
            assert found.relative < 1e-4, (method, found)
            ratio = options.get("min_kv_ratio")
            for kernel in (False, True):
                name = f"{method}, {'our kernel' if kernel else 'standard operators'}"
                forms[name] = _run(path, given, kernel=kernel)
                facts[name] = {"density": ratio or exported.plan.sparse[0].density, "error": found.relative}
        seconds = _race(forms, rounds)
    dense = seconds["dense, MultiHeadAttention"]
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
    """Seconds of CPU time, the median of rounds in which all run in turns, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, run in forms.items():
            start = time.process_time()
            run()
            if number:
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


def _dense() -> Callable[[], Any]:
    """Dense attention as ONNX Runtime's own fused operator."""
    from onnx import TensorProto, helper

    tokens = LARGE[0] * LARGE[1] * LARGE[2]
    shape = [1, tokens, HEADS * HEAD_DIM]
    names = ("query", "key", "value")
    node = helper.make_node("MultiHeadAttention", names, ["out"], domain="com.microsoft", num_heads=HEADS)
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in (*names, "out")]
    graph = helper.make_graph([node], "dense", infos[:3], infos[3:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = _session(model.SerializeToString())
    draw = np.random.default_rng(0)
    given = {name: draw.standard_normal(shape, dtype=np.float32) for name in names}
    return lambda: session.run(None, given)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--formats", nargs="*", default=FORMATS, choices=FORMATS)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds of the measurement of speed; 0 for none"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    earlier = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"cases": [], "speed": []}
    cases: list[dict[str, Any]] = []
    for family in chosen.families:
        for method in chosen.methods:
            for format in chosen.formats:
                cases.append(error(family, method, format))
                print(cases[-1], flush=True)
    rows = speed(chosen.rounds) if chosen.rounds else earlier["speed"]
    for row in rows:
        print(row, flush=True)
    place = itemgetter("family", "method", "format")
    merged = {place(case): case for case in (*earlier["cases"], *cases)}
    everything = itertools.product(FAMILIES, METHODS, FORMATS)
    cases = [merged[one] for one in everything if one in merged]
    about = {"grid of the speed": LARGE, "heads": HEADS, "head dim": HEAD_DIM}
    write_json(chosen.out, cases, lines=True, speed=rows, **about)


if __name__ == "__main__":
    main()
