"""`python -m benchmarks.attention`: the op on the CPU, compared with dense SDPA (and FlexAttention).

Every case is first checked against float64 attention on sampled queries. Dense is the best SDPA backend in the same
run at the same number of threads; efficiency = speedup x density, which is 1 if sparse work runs at the dense rate.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import machine, write_json
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import oracles
from sparsify_compiler.testing.strategies import qkv
from sparsify_compiler.timing import interleaved_medians

DTYPES = ["float32", "bfloat16", "float16"]
DENSE_SCORES_LIMIT = 2**30
"""Largest size of the scores, in bytes, for which SDPA's math backend is tried: it writes all scores to memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A table and its tensors."""

    name: str
    table: BlockTable
    dtype: torch.dtype
    tokens: int
    heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the benchmark."""

    name: str
    dtype: str
    batch: int
    heads: int
    tokens: int
    head_dim: int
    density: float
    dense_ms: float
    flex_ms: float | None
    ours_ms: float
    speedup: float
    efficiency: float

    def __str__(self) -> str:
        flex = "" if self.flex_ms is None else f"flex {self.flex_ms:8.1f} ms  "
        return (
            f"{self.name:<22} {self.dtype:<8} H={self.heads} S={self.tokens:<5} D={self.head_dim:<3} "
            f"density {self.density:.3f}  dense {self.dense_ms:8.1f} ms  {flex}ours {self.ours_ms:7.1f} ms  "
            f"speedup {self.speedup:5.1f}x  efficiency {self.efficiency:.2f}"
        )


def tile_table(frames: int, tokens_per_frame: int, reference_frames: int) -> BlockTable:
    """Blocks are frames; a pair is kept on the diagonal and where either frame is a reference."""
    reference = [math.ceil(i * frames / reference_frames) for i in range(reference_frames)]
    blocks = torch.eye(frames, dtype=torch.bool)
    blocks[reference], blocks[:, reference] = True, True
    sizes = torch.full((1, 1, frames), tokens_per_frame)
    return BlockTable.from_block_mask(blocks[None, None], sizes, sizes)


def random_table(tokens: int, q_size: int, kv_size: int, density: float) -> BlockTable:
    """Each query block reads a share of the key blocks, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = tokens // q_size, tokens // kv_size
    kept = torch.rand(1, 1, rows, columns, generator=generator).argsort(-1) < round(density * columns)
    return BlockTable.from_block_mask(kept, *(torch.full((1, 1, n), tokens // n) for n in (rows, columns)))


def cases(quick: bool, dtypes: list[str]) -> Iterator[Case]:
    """Tables x dtypes x head dims."""
    tables = {"tile 2:9 of 1000": tile_table(9, 1000, 2), "random 64x64": random_table(8192, 64, 64, 0.1)}
    if not quick:
        tables = {
            "tile 1:30 of 1000": tile_table(30, 1000, 1),
            "tile 1:12 of 1000": tile_table(12, 1000, 1),
            "tile 1:8 of 1024": tile_table(8, 1024, 1),
            "tile 2:9 of 1000": tile_table(9, 1000, 2),
            **{f"random 64x64 {d}": random_table(8192, 64, 64, d) for d in (0.1, 0.25, 0.5)},
            "random 64x1 0.1": random_table(8192, 64, 1, 0.1),
            "all": tile_table(8, 1024, 8),
        }
    for dtype in (getattr(torch, name) for name in dtypes):
        for head_dim in (64, 128):
            for name, table in tables.items():
                tokens = int(table.q_bounds[0, 0, -1])
                heads = 2 if tokens < 10_000 else 1
                yield Case(name=name, table=table, dtype=dtype, tokens=tokens, heads=heads, head_dim=head_dim)


def verify(case: Case, query: Tensor, key: Tensor, value: Tensor, provider: str) -> None:
    """Raise unless the op equals float64 attention on 32 sampled queries."""
    out, lse = block_sparse_attention(query, key, value, case.table, provider=provider)
    rows = torch.randint(case.tokens, (32,), generator=torch.Generator().manual_seed(0))
    q_block, kv_block = (
        torch.searchsorted(bounds[0, 0, 1:], tokens.int(), right=True)
        for bounds, tokens in ((case.table.q_bounds, rows), (case.table.kv_bounds, torch.arange(case.tokens)))
    )
    mask = case.table.block_mask()[:, :, q_block][..., kv_block]
    oracles.assert_close_to_float64(out[:, :, rows], lse[:, :, rows], query[:, :, rows], key, value, mask)


def dense_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """SDPA under its fastest backend for these tensors."""

    def under(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value)

        return run

    candidates = {"flash": under(SDPBackend.FLASH_ATTENTION)}
    if query[..., 0].numel() * key.shape[-2] * 4 <= DENSE_SCORES_LIMIT:
        candidates["math"] = under(SDPBackend.MATH)
    seconds = interleaved_medians(candidates, repeats=1)
    return candidates[min(seconds, key=lambda name: seconds[name])]


def compiled_flex(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """FlexAttention under the same mask. Its blocks have another size, so some of them are cut."""
    q_block, kv_block = (
        torch.searchsorted(
            bounds[0, 0, 1:].contiguous(), torch.arange(case.tokens, dtype=torch.int32), right=True
        )
        for bounds in (case.table.q_bounds, case.table.kv_bounds)
    )
    kept = case.table.block_mask()[0, 0]
    mask = create_block_mask(
        lambda b, h, i, j: kept[q_block[i], kv_block[j]], None, None, case.tokens, case.tokens, device="cpu"
    )
    compiled = torch.compile(flex_attention)
    return lambda: compiled(query, key, value, block_mask=mask)


@torch.inference_mode()
def measure(case: Case, repeats: int, flex: bool, provider: str) -> Result:
    """Check a case, then time in turns."""
    query, key, value = qkv(
        1, case.heads, case.heads, case.tokens, case.tokens, case.head_dim, case.head_dim, case.dtype
    )
    verify(case, query, key, value, provider)
    functions: dict[str, Callable[[], Any]] = {
        "dense": dense_sdpa(query, key, value),
        "ours": lambda: block_sparse_attention(query, key, value, case.table, provider=provider),
    }
    if flex:
        functions["flex"] = compiled_flex(case, query, key, value)
    milliseconds = {name: 1e3 * s for name, s in interleaved_medians(functions, repeats).items()}
    speedup, density = milliseconds["dense"] / milliseconds["ours"], case.table.density()
    return Result(
        name=case.name,
        dtype=str(case.dtype)[6:],
        batch=1,
        heads=case.heads,
        tokens=case.tokens,
        head_dim=case.head_dim,
        density=density,
        dense_ms=milliseconds["dense"],
        flex_ms=milliseconds.get("flex"),
        ours_ms=milliseconds["ours"],
        speedup=speedup,
        efficiency=speedup * density,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--quick", action="store_true", help="two tables instead of nine")
    parser.add_argument(
        "--flex", action="store_true", help="time FlexAttention too (it compiles for minutes)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    results = []
    for case in cases(options.quick, options.dtypes):
        result = measure(case, options.repeats, options.flex, options.provider)
        print(result, flush=True)
        results.append(asdict(result))
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
