"""`python -m benchmarks.training`: a forward and a backward pass of the op on the CPU, compared with dense SDPA.

Tables have blocks, or single keys for groups of queries. Before anything is timed, the gradients are checked
against float64, with only 32 queries that have a gradient. Dense is the faster of SDPA's flash and math backends
in the same run at the same number of threads; efficiency = speedup x density. The break-even density of a kind of
table is where a line through its times reaches dense. Memory is the amount that the passes add to the peak of a
separate process (Linux), and the same for a training step of the evaluation model.
"""

import argparse
import ctypes
import math
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention import random_table
from benchmarks.harness import machine, write_json
from sparsify_compiler import DSVTrainer
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.lab.model import encode, load
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import oracles
from sparsify_compiler.testing.strategies import qkv
from sparsify_compiler.timing import interleaved_medians

DTYPES = ["float32", "bfloat16", "float16"]
DENSITIES = (0.1, 0.25, 0.5)
KINDS = {
    "blocks 64 x 64": (64, 64),
    "blocks 256 x 128": (256, 128),
    "keys of 64": (64, 1),
    "keys of 16": (16, 1),
}
"""Numbers of queries and keys of a block."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}

STEP_GRID = (16, 16, 32)
"""Frames of the video for a step of the evaluation model: 8,192 tokens."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the benchmark; times are of a forward and a backward pass."""

    kind: str
    dtype: str
    tokens: int
    heads: int
    head_dim: int
    density: float
    flash_ms: float
    math_ms: float
    ours_forward_ms: float
    ours_ms: float
    speedup: float
    efficiency: float
    break_even: float

    def __str__(self) -> str:
        return (
            f"{self.kind:<16} {self.dtype:<8} H={self.heads} S={self.tokens} D={self.head_dim} "
            f"density {self.density:.3f}  flash {self.flash_ms:7.1f} ms  math {self.math_ms:7.1f} ms  "
            f"ours {self.ours_ms:6.1f} ms ({self.ours_forward_ms:5.1f} forward)  speedup {self.speedup:4.1f}x  "
            f"efficiency {self.efficiency:.2f}  breaks even at {self.break_even:.2f}"
        )


def sparse(table: BlockTable, provider: str) -> Attention:
    return lambda q, k, v: block_sparse_attention(q, k, v, table, provider=provider)[0]


def dense(backend: str) -> Attention:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return scaled_dot_product_attention(query, key, value)

    return attend


def both_passes(attend: Attention, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Gradients, with `out` as the gradient of `out`."""
    out = attend(query, key, value)
    return torch.autograd.grad(out, (query, key, value), out.detach())


def verify(table: BlockTable, query: Tensor, key: Tensor, value: Tensor, provider: str) -> None:
    """Raise unless gradients equal float64's. Only 32 queries have a gradient, so the oracle needs only these."""
    tokens = query.shape[2]
    rows = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:32]
    q_block, kv_block = (
        torch.searchsorted(bounds[0, 0, 1:], at.int(), right=True)
        for bounds, at in ((table.q_bounds, rows), (table.kv_bounds, torch.arange(tokens)))
    )
    mask = table.block_mask()[:, :, q_block][..., kv_block]
    outputs = block_sparse_attention(query, key, value, table, provider=provider)
    # Large, so that gradients of keys are not small next to the tolerance, although a row reads many keys.
    given = [torch.randn_like(t[:, :, rows]) * (tokens / 8) for t in outputs]
    whole = [torch.zeros_like(t).index_copy(2, rows, g) for t, g in zip(outputs, given, strict=True)]
    d_query, d_key, d_value = torch.autograd.grad(outputs, (query, key, value), whole)
    found = d_query[:, :, rows], d_key, d_value
    oracles.assert_gradients_close_to_float64(found, *given, query[:, :, rows], key, value, mask)


def measure(
    kind: str, dtype: torch.dtype, heads: int, tokens: int, head_dim: int, repeats: int, provider: str
) -> list[Result]:
    """Check every density, then time all in turns."""
    inputs = [t.requires_grad_() for t in qkv(1, heads, heads, *[tokens] * 2, *[head_dim] * 2, dtype)]
    tables = [random_table(tokens, *KINDS[kind], density) for density in DENSITIES]
    runs: dict[str, Callable[[], object]] = {
        name: partial(both_passes, dense(name), *inputs) for name in BACKENDS
    }
    for i, table in enumerate(tables):
        verify(table, *inputs, provider)
        runs[f"forward {i}"] = partial(sparse(table, provider), *inputs)
        runs[f"both {i}"] = partial(both_passes, sparse(table, provider), *inputs)
    ms = {name: 1e3 * seconds for name, seconds in interleaved_medians(runs, repeats).items()}
    baseline = min(ms[name] for name in BACKENDS)
    densities = torch.tensor([table.density() for table in tables])
    slope, intercept = torch.linalg.lstsq(
        torch.stack((densities, torch.ones_like(densities)), -1),
        torch.tensor([ms[f"both {i}"] for i in range(len(tables))])[:, None],
    ).solution.flatten()
    return [
        Result(
            **{"kind": kind, "dtype": str(dtype)[6:], "tokens": tokens, "heads": heads, "head_dim": head_dim},
            density=density,
            flash_ms=ms["flash"],
            math_ms=ms["math"],
            ours_forward_ms=ms[f"forward {i}"],
            ours_ms=ms[f"both {i}"],
            speedup=baseline / ms[f"both {i}"],
            efficiency=baseline / ms[f"both {i}"] * density,
            break_even=min(1.0, ((baseline - intercept) / slope).item()),
        )
        for i, density in enumerate(densities.tolist())
    ]


def peak_memory(
    name: str, dtype: torch.dtype, heads: int, tokens: int, head_dim: int, provider: str
) -> float:
    """MiB that a forward and a backward pass, with their table, add to the peak of this process."""
    inputs = [t.requires_grad_() for t in qkv(1, heads, heads, *[tokens] * 2, *[head_dim] * 2, dtype)]
    small = [t[:, :, :64].detach().requires_grad_() for t in inputs]
    both_passes(sparse(random_table(64, 64, 64, 1.0), provider), *small)  # loads the libraries
    if name in BACKENDS:
        attend, table_mib = dense(name), 0.0
    else:
        table = random_table(tokens, *KINDS[name], 0.25)
        attend = sparse(table, provider)
        table_mib = sum(t.nbytes for t in table.tensors().values() if t is not None) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory returns to the system
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_mib()
    both_passes(attend, *inputs)
    return table_mib + peak_mib() - before


def peak_of_step(name: str) -> float:
    """MiB that a step of the evaluation model, fp32, adds to the peak of this process: with SDPA's backends, or
    in stage 2 of method `dsv`, where every head reads a tenth of the keys for groups of (2, 4, 4). The math
    backend runs uncompiled, since torch.compile always takes flash on a CPU."""
    model = load()
    video = torch.randn(1, 3, STEP_GRID[0], *(4 * edge for edge in STEP_GRID[1:]))
    time, text = torch.tensor([500.0]), encode(["small red plain disc still; grey grid still"])
    with ExitStack() as stack:
        trainer = None
        if name in BACKENDS:
            stack.enter_context(sdpa_kernel(BACKENDS[name]))
            compiled = model if name == "math" else torch.compile(model, dynamic=False)
        else:
            options = {"method": "dsv", "kv_budget": 0.1, "query_group": (2, 4, 4)}
            compiled = torch.compile(model, backend="sparsify", dynamic=False, options=options)
            trainer = DSVTrainer(compiled, threshold=1e9, profile_every=(2, 10**6), early_steps=3)

        def step() -> None:
            (velocity,) = compiled(video, time, text, return_dict=False)
            velocity.square().mean().backward()
            model.zero_grad()
            if trainer is not None:
                trainer.step()

        for _ in range(5):  # dense, profiled, and then sparse
            step()
        assert trainer is None or trainer.stage == 2
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_mib()
        step()
        return peak_mib() - before


def peak_mib() -> float:
    """The peak memory of this process."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(heads: int, tokens: int, head_dim: int, provider: str) -> Iterator[dict[str, object]]:
    """One record for each of `BACKENDS` and `KINDS`, in fp32."""
    for name in (*BACKENDS, *KINDS):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            mib = pool.apply(peak_memory, (name, torch.float32, heads, tokens, head_dim, provider))
        yield {
            "memory": name,
            "heads": heads,
            "tokens": tokens,
            "head_dim": head_dim,
            "peak_mib": round(mib, 1),
        }


def step_memory() -> Iterator[dict[str, object]]:
    """One record for each of `BACKENDS` and for stage 2 of method `dsv`."""
    for name in (*BACKENDS, "dsv"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            mib = pool.apply(peak_of_step, (name,))
        yield {"memory_of_step": name, "tokens": math.prod(STEP_GRID), "peak_mib": round(mib, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    shape = options.heads, options.tokens, options.head_dim
    records: list[dict[str, object]] = []
    for dtype in options.dtypes:
        for kind in options.kinds:
            for result in measure(kind, getattr(torch, dtype), *shape, options.repeats, options.provider):
                print(result, flush=True)
                records.append(asdict(result))
    for record in (*memory(*shape, options.provider), *step_memory()):
        print(record, flush=True)
        records.append(record)
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    main()
