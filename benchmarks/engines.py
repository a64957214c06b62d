"""Engines of TensorRT, built on a machine without a GPU by TensorRT-RTX: their sizes, and the time to build them.

    pip install --no-deps tensorrt-rtx-cu12-bindings tensorrt-rtx-cu12-libs
    python -m benchmarks.engines --out benchmarks/results/engines.json

Models have 2 layers of 2 heads and 768 tokens of video. Seconds are CPU time: of the export to ONNX, and of the
build from this file. No engine runs. Each result is written at once; `--missing` builds those that the file lacks.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import write_json
from benchmarks.model import Case
from sparsify_compiler import SparsifyError, export
from sparsify_compiler.exporting import tensorrt

FAMILIES = ("wan", "hunyuan")
HEAD_DIMS = (64, 128)
TYPES = {"fp32": torch.float32, "fp16": torch.float16}
BUDGET: dict[str, Any] = {"method": "cubes", "kv_budget": 0.3, "cube": (2, 2, 4), "query_cube": (2, 4, 4)}
METHODS: dict[str, dict[str, Any]] = {
    "tile": {"method": "tile", "reference_frames": 1},
    "cubes, linear": {**BUDGET, "far_field": "linear"},
    "cubes, mean": {**BUDGET, "far_field": "mean"},
}


def built(family: str, method: str, head_dim: int, dtype: str) -> dict[str, Any]:
    """The engine of the sparse phase of a model, or the reason why it cannot be built."""
    asked = {"family": family, "method": method, "head dim": head_dim, "dtype": dtype}
    case = Case(
        family=family,
        grid=(6, 8, 16),
        heads=2,
        head_dim=head_dim,
        layers=2,
        dtype=TYPES[dtype],
        reference_frames=1,
    )
    torch._dynamo.reset()
    model, inputs = case.build()
    options = {**METHODS[method], "dense_steps": 0} | ({} if method == "tile" else {"dense_layers": 0})
    library = tensorrt.library()
    with TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        start = time.process_time()
        exported = export(model, inputs, file, format="onnx", options=options)
        middle = time.process_time()
        try:
            engine = tensorrt.engine(library, file, 2)
        except SparsifyError as refusal:
            return {**asked, "refused": str(refusal)}
        seconds = time.process_time() - middle
        return {
            **asked,
            "sparse": len(exported.plan.sparse),
            "onnx megabytes": round(file.stat().st_size / 1e6, 2),
            "engine megabytes": round(len(engine) / 1e6, 2),
            "export seconds": round(middle - start, 1),
            "build seconds": round(seconds, 1),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the engines and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--missing", action="store_true", help="build only the engines that the file lacks")
    parser.add_argument("--most", type=int, help="end after this number of engines")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    library = tensorrt.library()
    place = itemgetter("family", "method", "head dim", "dtype")
    earlier = json.loads(chosen.out.read_text())["cases"] if chosen.out.exists() else []
    found = {place(case): case for case in earlier}
    everything = [*itertools.product(FAMILIES, METHODS, HEAD_DIMS, TYPES)]
    asked = [one for one in everything if not (chosen.missing and one in found)]
    for one in asked[: chosen.most]:
        found[one] = built(*one)
        print(found[one], flush=True)
        cases = [found[case] for case in everything if case in found]
        write_json(chosen.out, cases, lines=True, library=f"{library.__name__} {library.__version__}")


if __name__ == "__main__":
    main()
