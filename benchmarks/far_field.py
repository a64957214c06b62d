"""`python -m benchmarks.far_field`: the cost of a far field relative to dense SDPA, and its error.

Errors: attention dropped and approximated, with the guard and without, on the generators of
`sparsify_compiler.testing.far_fields`, and `linear` expanded at the queries instead of by key. Costs: time added
to the near field as a share of dense SDPA's, for key blocks (groups) and query blocks of several sizes.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import dense_sdpa
from benchmarks.harness import machine, write_json
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.far_field import FAR_FIELDS, attention_with_far_field, exact_rows
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import far_fields, oracles
from sparsify_compiler.testing.strategies import qkv
from sparsify_compiler.timing import interleaved_medians

HEADS, HEAD_DIM = 8, 64
GROUPS = (128, 64, 32, 16)
DENSITY = 0.15


def errors(density: float, name: str, q_size: int, kv_size: int) -> dict[str, Any]:
    """Relative errors on one generator, 1,024 tokens, 4 heads."""
    query, key, value = far_fields.GENERATORS[name](1024, 4, HEAD_DIM)
    table = far_fields.nearest_blocks(query, key, q_size, kv_size, density)
    exact, _ = oracles.masked_attention(query, key, value, torch.ones(1024, 1024, dtype=torch.bool))

    def error(far_field: str, rows: int) -> float:
        out, _, _ = attention_with_far_field(query, key, value, table, far_field=far_field, sampled_rows=rows)
        return far_fields.relative_error(out, exact)

    near_out, near_lse = block_sparse_attention(query, key, value, table)
    far_out, far_lse = far_fields.query_side(query, key, value, table)
    share = (far_lse - torch.logaddexp(near_lse, far_lse)).exp()[..., None]
    return {
        "case": f"{name}, query blocks of {q_size}, key blocks of {kv_size}",
        "density": density,
        "recall": float(
            attention_with_far_field(query, key, value, table, far_field="drop")[2].recall.mean()
        ),
        **{far_field: error(far_field, 16) for far_field in FAR_FIELDS},
        "mean, no guard": error("mean", 0),
        "linear, no guard": error("linear", 0),
        "query side, no guard": far_fields.relative_error(near_out + share * (far_out - near_out), exact),
    }


def random_table(tokens: int, q_size: int, kv_size: int) -> BlockTable:
    """Each query block reads a share of the key blocks, drawn at random."""
    rows, columns = tokens // q_size, tokens // kv_size
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(1, 1, rows, columns, generator=generator).argsort(-1) < round(DENSITY * columns)
    return BlockTable.from_block_mask(kept, *(torch.full((1, 1, n), tokens // n) for n in (rows, columns)))


def verify(query: Tensor, key: Tensor, value: Tensor, table: BlockTable, far_field: str) -> None:
    """Raise unless the sampled rows equal dense attention, and the far field equals the reference on a part."""
    rows = torch.arange(7, query.shape[2], query.shape[2] // 8)[None, None]
    out, lse = exact_rows(query, key, value, rows, None, HEAD_DIM**-0.5)
    everything = torch.ones(1, key.shape[2], dtype=torch.bool)
    oracles.assert_close_to_float64(out, lse, query[:, :, rows[0, 0]], key, value, everything)
    part = [t[:, :2] for t in (query, key, value)]
    (got, got_lse, _), (like, like_lse, _) = (
        attention_with_far_field(*part, table, far_field=far_field, provider=provider)
        for provider in ("cpu", "reference")
    )
    tolerance = 2e-4 if query.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, like, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got_lse, like_lse, rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def costs(tokens: int, dtype: torch.dtype, q_size: int, repeats: int) -> list[dict[str, Any]]:
    """Time added by `mean` and `linear` at every group size."""
    query, key, value = qkv(1, HEADS, HEADS, tokens, tokens, HEAD_DIM, HEAD_DIM, dtype)
    functions: dict[str, Any] = {"dense": dense_sdpa(query, key, value)}
    for group in GROUPS:
        table = random_table(tokens, q_size, group)
        if tokens == 8192:
            verify(query, key, value, table, "linear")
        functions[f"near {group}"] = lambda table=table: block_sparse_attention(query, key, value, table)
        for far_field in ("mean", "linear"):
            functions[f"{far_field} {group}"] = lambda table=table, far_field=far_field: (
                attention_with_far_field(query, key, value, table, far_field=far_field)
            )
    seconds = interleaved_medians(functions, repeats)
    return [
        {
            "case": "cost",
            "tokens": tokens,
            "dtype": str(dtype)[6:],
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "density": DENSITY,
            "query_block": q_size,
            "group": group,
            "dense_ms": 1e3 * seconds["dense"],
            "near_ms": 1e3 * seconds[f"near {group}"],
            **{
                f"{far_field} added, % of dense": 100
                * (seconds[f"{far_field} {group}"] - seconds[f"near {group}"])
                / seconds["dense"]
                for far_field in ("mean", "linear")
            },
        }
        for group in GROUPS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.far_field", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--query-blocks", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    results = []

    def show(case: dict[str, Any]) -> None:
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in case.items()),
            flush=True,
        )
        results.append(case)

    for name in far_fields.GENERATORS:
        for sizes in ((32, 16), (64, 32)):
            for density in (0.05, 0.1, 0.2, 0.3):
                show(errors(density, name, *sizes))
    for tokens in options.tokens:
        for dtype in options.dtypes:
            for q_size in options.query_blocks:
                for case in costs(tokens, getattr(torch, dtype), q_size, options.repeats):
                    show(case)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
