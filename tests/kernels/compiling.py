"""Example launches compiled for GPUs on a machine that needs none, and held to `benchmarks/results/static.json`.

The table has a line for every example of every GPU. Compiled here are those that take the most registers: of all
with one kernel, head dim, type and tiles the one with the most tensors. They are in bfloat16; on 9.0 also in fp32,
and the attention kernel in fp16.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is no part of the package

from benchmarks import static  # noqa: E402
from benchmarks.launches import FLOAT16, FLOAT32, Example  # noqa: E402

MODULES = (
    "attention.triton_kernels",
    "attention.triton_backward_kernels",
    "clustering.triton_kernels",
    "far_field.triton_kernels",
    "prediction.triton_kernels",
    "statistics.triton_kernels",
)
"""Each has a test file that compiles its kernels."""

FEW = 32
"""Bytes of a thread that Triton 3.6, which torch 2.11 brings, may spill more than 3.7."""


@functools.cache
def table() -> dict[str, Any]:
    """What is committed."""
    return json.loads(static.RESULTS.read_text())


def line_of(arch: int, example: Example) -> dict[str, Any]:
    """What the table says of an example."""
    asked = static.case(arch, example)
    line = next((line for line in table()["cases"] if asked.items() <= line.items()), None)
    assert line is not None, f"static.json does not have {asked}: run python -m benchmarks.static"
    return line


def hardest(module: str) -> list[Any]:
    """Parameters of a test, (arch, number of the example): what is compiled here of a file's kernels."""
    chosen: dict[tuple[Any, ...], tuple[int, int]] = {}
    for arch in (80, 90, 100):
        for number, example in enumerate(static.of_gpu(arch)):
            if not example.launch.kernel.__module__.endswith(f".{module}") or not is_tried(arch, example):
                continue
            key = arch, example.kernel, example.head_dim, example.dtype, static.tiles(example.launch)
            if key not in chosen or tensors(example) >= tensors(static.of_gpu(arch)[chosen[key][1]]):
                chosen[key] = arch, number
    return [
        pytest.param(arch, number, id=f"sm_{arch}, {static.of_gpu(arch)[number].name}")
        for arch, number in chosen.values()
    ]


def is_tried(arch: int, example: Example) -> bool:
    """Whether a type is compiled here."""
    if example.dtype == FLOAT16:
        return arch == 90 and example.kernel == "block_sparse_attention_kernel"
    if example.dtype == FLOAT32 or (example.dtype is None and example.head_dim is not None):
        return arch == 90
    return True


def tensors(example: Example) -> int:
    """How many an example launch has."""
    return sum(value is not None for value in example.launch.arguments.values())


def assert_as_in_the_table(arch: int, number: int) -> None:
    """It spills no more than the table says, fits shared memory, and multiplies, copies, loads and adds alike."""
    example = static.of_gpu(arch)[number]
    found, line = static.facts(static.compiled(example.launch, arch), arch), line_of(arch, example)
    assert found["spilled"] <= line["spilled"] + (FEW if triton.__version__ < "3.7" else 0)
    assert found["shared"] <= found["shared_limit"]
    assert found["products"] == line["products"]
    assert found["async_copies"] >= line["async_copies"]
    assert found["float_atomics"] == line["float_atomics"]
    assert found["wide_loads"] >= line["wide_loads"]
