"""`python -m benchmarks.static`: facts of every Triton kernel, compiled for GPUs on a machine without a GPU.

Each launch of `benchmarks.launches` is compiled for compute capabilities 8.0, 8.9, 9.0 and 10.0. A line gives the
registers of a thread, the bytes of a thread that are spilled, the shared memory of a program and its limit, the
programs that a multiprocessor holds, and the instructions that multiply matrices. Then it gives the numbers of
instructions, barriers and exponentials that one warp runs in the main loop for 128 keys. Numbers after a + belong
to code that some passes of the loop skip: a tile in which no block of keys ends skips it.

With `--sites`, the launches and the memory of a whole site of every method (`benchmarks.site_counts`), in
`benchmarks/results/sites.json`.

Nothing is timed. The lines are kept in `benchmarks/results/static.json`, and the tests compare the package with
them.
"""

import argparse
import json
import math
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import sass, site_counts
from benchmarks.harness import write_json
from benchmarks.kernels import kernels
from benchmarks.launches import Example, examples
from sparsify_compiler.kernels.clustering import kmeans
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import Config
from sparsify_compiler.kernels.triton.launcher import Launch

RESULTS = Path(__file__).parent / "results" / "static.json"
PROCESSES = 2
KEYS = 128
"""Number of keys for which instructions of a loop are counted."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Limits of a compute capability, from the CUDA programming guide."""

    program_memory: int
    """Bytes of shared memory that one program may have."""
    memory: int
    """Bytes of shared memory of a multiprocessor; every program takes 1 KB of it for the system."""
    warps: int
    programs: int


GPUS = {
    80: Gpu(163 * 1024, 164 * 1024, 64, 32),
    89: Gpu(99 * 1024, 100 * 1024, 48, 24),
    90: Gpu(227 * 1024, 228 * 1024, 64, 32),
    100: Gpu(227 * 1024, 228 * 1024, 64, 32),
}
REGISTERS = 65536
"""Registers of a multiprocessor, allocated to warps in units of 256."""
TENSOR_COLUMNS = 512
"""Columns of a multiprocessor's tensor memory, on 10.0."""

PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
"""Instructions of tensor cores: their name here and in PTX."""

STEPS = {
    "add_up_kernel": "BLOCK_M",
    "block_means_kernel": "BLOCK",
    "block_sparse_attention_kernel": "BLOCK_N",
    "block_statistics_kernel": "BLOCK",
    "compare_kernel": "BLOCK_N",
    "keys_kernel": "BLOCK_M",
    "list_kernel": "BLOCK_N",
    "means_kernel": "BLOCK",
    "nearest_kernel": "BLOCK_N",
    "queries_kernel": "BLOCK_N",
    "rows_kernel": "BLOCK_N",
    "softmax_kernel": "BLOCK_N",
    "start_kernel": "BLOCK",
    "top_k_kernel": "BLOCK_N",
}
"""Kernel -> argument with the number of keys (tokens, queries, centroids) that its main loop takes at a time."""

TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
}
"""Triton's names of the types that tensors have."""


def compiled(launch: Launch, arch: int) -> Any:
    """The kernel as the launch would compile it, with Triton's specialisation of arguments (an integer 1 becomes a
    constant, pointers and multiples of 16 are marked as such)."""
    types, constants, hints = {}, {}, {}

    def specialise(path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(specialise((*path, i), item) for i, item in enumerate(value))
        constant = value is None or (isinstance(value, int) and value == 1)
        if constant or launch.kernel.params[path[0]].is_constexpr:
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return f"*{TYPES[str(value.dtype)[6:]]}"
        return "fp32" if isinstance(value, float) else "i32"

    for position, name in enumerate(launch.kernel.arg_names):
        types[name] = specialise((position,), launch.arguments[name])
    return triton.compile(
        ASTSource(launch.kernel, types, constants, hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def facts(kernel: Any, arch: int) -> dict[str, Any]:
    """The facts of a compiled kernel."""
    gpu, meta = GPUS[arch], kernel.metadata
    usage = printed(kernel, "-res-usage")
    registers, spilled = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    bounds = [
        REGISTERS // (-(-registers * 32 // 256) * 256 * meta.num_warps),
        gpu.memory // (meta.shared + 1024),
        gpu.warps // meta.num_warps,
        gpu.programs,
    ]
    if meta.tmem_size:
        bounds.append(TENSOR_COLUMNS // meta.tmem_size)
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "spilled": spilled,  # these kernels have no arrays: everything in local memory is a spilled register
        "shared": meta.shared,
        "shared_limit": gpu.program_memory,
        "programs": min(bounds),
        "products": next((name for name, text in PRODUCTS.items() if text in ptx), "none"),
        "async_copies": kernel.asm["ttgir"].count("async_copy_global_to_local"),
        "float_atomics": len(re.findall(r"\b(?:red|atom)\.global\S*\.f32", ptx)),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4", ptx)),
    }


def loop_facts(kernel: Any, step: int) -> dict[str, Any]:
    """The facts of a compiled kernel's main loop, if it has one. The listing that they need takes half a second.

    `step`: number of keys that the loop takes at a time.
    """
    loop = sass.main_loop(sass.instructions(printed(kernel, "-sass")))
    if loop is None:
        return {}
    return {
        name: {
            "instructions": _for_keys(len(body), step),
            "barriers": _for_keys(_count(body, "BAR."), step),
            "exponentials": _for_keys(_count(body, "MUFU.EX2"), step),
        }
        for name, body in (("loop", loop.always), ("skipped", loop.skipped))
    }


def _for_keys(count: int, step: int) -> float:
    return round(count * KEYS / step, 1)


def _count(body: tuple[sass.Instruction, ...], name: str) -> int:
    return sum(instruction.name.startswith(name) for instruction in body)


def printed(kernel: Any, option: str) -> str:
    """The output of cuobjdump for a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cluster_sizes(tokens: int, clusters: int) -> Tensor:
    """Sizes of k-means clusters of simulated video tokens: a smooth field, and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 64, 7, 8, 8, generator=generator)
    frame = math.isqrt(tokens // 21)
    fine = torch.nn.functional.interpolate(coarse, size=(21, frame, frame), mode="trilinear")
    points = 2 * fine.flatten(2).mT[None] + torch.randn(1, 1, 21 * frame**2, 64, generator=generator)
    start = torch.arange(clusters) * points.shape[2] // clusters
    blank, cold = torch.empty(1, 1, clusters, 64), torch.tensor(False)
    _, labels = kmeans(points, blank, start, cold, first=10, later=1)
    return labels.flatten().bincount(minlength=clusters)


def row_fill(sizes: Tensor, config: Config) -> float:
    """The share of the rows of all tiles that hold a query, for query blocks of these sizes."""
    tails = sizes % config.block_m
    rows = sizes - tails
    last = torch.zeros_like(sizes)
    for tiles in (config, *config.tails):
        last = torch.where((tails > 0) & (tails <= tiles.block_m), tiles.block_m, last)
    return float(sizes.sum() / (rows + last).sum())


def tiles(launch: Launch) -> str:
    """The tiles of a launch, in words."""
    sizes = [
        f"{name}={launch.arguments[name]}"
        for name, parameter in zip(launch.kernel.arg_names, launch.kernel.params, strict=True)
        if parameter.is_constexpr
    ]
    return ", ".join([*sizes, f"{launch.num_warps} warps", f"{launch.num_stages} stages"])


def case(arch: int, example: Example) -> dict[str, Any]:
    """A line of the table without the facts: a description of the launch, which needs no compilation."""
    return {
        "gpu": f"sm_{arch}",
        "kernel": example.kernel,
        "case": example.case,
        "head_dim": example.head_dim,
        "dtype": example.dtype and str(example.dtype)[6:],
        "tiles": tiles(example.launch),
    }


@cache
def of_gpu(arch: int) -> tuple[Example, ...]:
    """The examples, by number."""
    return tuple(examples(arch))


def measured(place: tuple[int, int]) -> dict[str, Any]:
    """The line for example `number` of a GPU."""
    arch, number = place
    example = of_gpu(arch)[number]
    step = STEPS.get(example.kernel)
    kernel = compiled(example.launch, arch)
    loop = {} if step is None else loop_facts(kernel, example.launch.arguments[step])
    return case(arch, example) | facts(kernel, arch) | loop


def line(found: dict[str, Any]) -> tuple[str, ...]:
    """A case as printed."""
    loop, skipped = found.get("loop", {}), found.get("skipped", {})
    return (
        found["gpu"],
        found["kernel"].removesuffix("_kernel"),
        found["case"],
        str(found["head_dim"] or ""),
        found["dtype"] or "",
        str(found["registers"]),
        str(found["spilled"]),
        f"{found['shared'] / 1024:.0f}/{found['shared_limit'] // 1024}",
        str(found["programs"]),
        found["products"],
        *(
            f"{loop[name]:g}" + (f" + {skipped[name]:g}" if skipped[name] else "") if loop else ""
            for name in ("instructions", "barriers", "exponentials")
        ),
    )


HEADER = (
    *("gpu", "kernel", "case", "D", "dtype", "registers", "spilled", "shared KB", "programs", "products"),
    *("instructions", "barriers", "exponentials"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="KERNEL",
        choices=list(kernels()),
        help="print these kernels, write no file",
    )
    parser.add_argument(
        "--again",
        nargs="+",
        metavar="KERNEL",
        choices=list(kernels()),
        help="compile these kernels, and keep the lines of all others in the file",
    )
    parser.add_argument("--sites", action="store_true", help="count the launches and memory of whole sites")
    parser.add_argument("--site", metavar="NAME", help="print these sites, write no file")
    options = parser.parse_args()
    if options.sites or options.site is not None:
        site_counts.main(None if options.site is not None else site_counts.RESULTS, options.site or "")
        return
    chosen = options.only or options.again
    every = [(arch, number) for arch in GPUS for number in range(len(of_gpu(arch)))]
    places = [(a, n) for a, n in every if chosen is None or of_gpu(a)[n].kernel in chosen]
    made = {}
    print(" | ".join(HEADER))
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        for place, found in zip(places, pool.map(measured, places, chunksize=8), strict=True):
            made[place] = found
            print(" | ".join(line(found)), flush=True)
    if options.only is not None:
        return
    kept = []
    if options.again is not None:
        kept = [one for one in json.loads(options.json.read_text())["cases"] if one["kernel"] not in chosen]
    others = iter(kept)
    cases = [made[place] if place in made else next(others) for place in every]
    sizes = cluster_sizes(18_900, 75)
    tails, _ = configs.HALF[90, 128]
    fill = {
        "mean_size": round(float(sizes.float().mean()), 1),
        "alone": round(row_fill(sizes, replace(tails, tails=())), 3),
        "with_tails": round(row_fill(sizes, tails), 3),
    }
    print(f"rows of tiles of {tails.block_m} queries that hold one: {fill}")
    write_json(options.json, cases, lines=True, triton=triton.__version__, row_fill=fill)


if __name__ == "__main__":
    main()
