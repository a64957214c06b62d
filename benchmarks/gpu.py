"""`python -m benchmarks.gpu --out DIR`: the Triton kernels on an NVIDIA GPU, in under 10 minutes.

1. check: every configuration shipped for this GPU, every head dim, and tables drawn at random, against
   float64 attention and its gradients. Nothing is timed if one fails.
2. training: forward and backward on 65,536 tokens, blocks and single keys, with and without atomics.
3. speed: video-sized tables in bf16 beside dense SDPA (the faster of cuDNN and flash), FlexAttention where
   the table's blocks are multiples of 128 tokens, and FlashInfer's variable block sparse if it is installed.
   Density is the mean of the mask, efficiency = speedup over dense x density.
4. sweep: other tile sizes than the shipped ones.

Writes gpu.json and gpu.md after every line, so that what was measured stays if the machine is taken away.
"""

import argparse
import contextlib
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.attention import random_table, tile_table
from benchmarks.harness import machine, write_json
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import BackwardConfig, Config
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import oracles
from sparsify_compiler.testing.strategies import qkv, tables

CHECK_UNTIL, TRAINING_UNTIL, SPEED_UNTIL, SWEEP_UNTIL = 160, 240, 440, 550
"""Seconds after the start at which a section begins nothing new. One line takes at most some 20."""

FLASHINFER = importlib.util.find_spec("flashinfer") is not None
SWEPT = ("tile 4:21 of 1560", "random 64x64 0.25", "clusters 100x500")
HEAD_DIMS = (16, 48, 64, 72, 80, 96, 128, 256)
FLEX_BLOCK = 128
BACKWARD_FLOPS = 2.5
"""Those of a backward pass over those of the forward pass: five products over two."""
DEVICE = "cuda"


def cluster_table(tokens: int, q_clusters: int, kv_clusters: int, density: float) -> BlockTable:
    """Uneven clusters over permuted tokens, as k-means makes them."""
    generator = torch.Generator().manual_seed(0)

    def sizes(count: int) -> Tensor:
        cuts = torch.randint(tokens + 1, (1, 1, count - 1), generator=generator).sort(-1).values
        edges = torch.zeros(1, 1, 1, dtype=torch.long), cuts, torch.full((1, 1, 1), tokens)
        return torch.cat(edges, -1).diff(dim=-1)

    def order() -> Tensor:
        return torch.randperm(tokens, generator=generator).to(torch.int32)[None, None]

    kept = torch.rand(1, 1, q_clusters, kv_clusters, generator=generator) < density
    return BlockTable.from_block_mask(
        kept, sizes(q_clusters), sizes(kv_clusters), q_order=order(), kv_order=order()
    )


def single_key_table(tokens: int, group: int, density: float, device: str = DEVICE) -> BlockTable:
    """Each group of queries reads that share of the keys, drawn one by one: DSV's granularity."""
    generator = torch.Generator(device).manual_seed(0)
    rows, count = tokens // group, round(density * tokens)
    drawn = (
        torch.rand(1, 1, rows, tokens, generator=generator, device=device).topk(count).indices.sort().values
    )
    indices = torch.zeros(1, 1, rows, 1 << (count - 1).bit_length(), dtype=torch.int32, device=device)
    indices[..., :count] = drawn
    return BlockTable(
        q_bounds=torch.arange(0, tokens + 1, group, dtype=torch.int32, device=device)[None, None],
        kv_bounds=torch.arange(tokens + 1, dtype=torch.int32, device=device)[None, None],
        kv_num_blocks=torch.full((1, 1, rows), count, dtype=torch.int32, device=device),
        kv_indices=indices,
    )


@functools.cache
def cases() -> dict[str, BlockTable]:
    """The grids of Wan and HunyuanVideo at 480p and 720p, then other blocks on about 32,768 tokens."""
    return {
        **{f"tile {n}:21 of 1560": tile_table(21, 1560, n) for n in (1, 4, 10)},
        "tile 2:21 of 3600": tile_table(21, 3600, 2),
        "tile 2:32 of 3600": tile_table(32, 3600, 2),
        "clusters 100x500": cluster_table(32760, 100, 500, 0.25),
        "clusters 300x1000": cluster_table(75600, 300, 1000, 0.2),
        **{f"random {n}x{n} {d}": random_table(32768, n, n, d) for n in (128, 64) for d in (0.1, 0.25, 0.5)},
        "random 64x1 0.1": random_table(32768, 64, 1, 0.1),
        "tile 4:21 of 1536": tile_table(21, 1536, 4),
        "all": tile_table(8, 4096, 8),
    }


def tensors(table: BlockTable, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 query, key, value for a table; the fewer heads, the more tokens."""
    tokens = int(table.q_bounds[0, 0, -1])
    heads = 2**18 // tokens
    return qkv(1, heads, heads, tokens, tokens, head_dim, head_dim, torch.bfloat16, device=DEVICE)


def block_of_token(bounds: Tensor, order: Tensor | None) -> Tensor:
    """[S] int64: the block of each token, of a table that all batches and heads share."""
    positions = torch.arange(int(bounds[0, 0, -1]), dtype=torch.int32, device=bounds.device)
    block = torch.searchsorted(bounds[0, 0, 1:].contiguous(), positions, right=True)
    return block if order is None else torch.empty_like(block).scatter_(0, order[0, 0].long(), block)


def assert_sampled_rows(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, config: Config | None = None
) -> None:
    """Raise unless the kernel, with these tiles or the shipped ones, equals float64 on 64 of the queries."""
    out, lse = attention(query, key, value, table, config)
    rows, mask = sampled_rows(table, query.shape[2])
    oracles.assert_close_to_float64(out[:, :, rows], lse[:, :, rows], query[:, :, rows], key, value, mask)


def sampled_rows(table: BlockTable, tokens: int) -> tuple[Tensor, Tensor]:
    """(64 different queries, their rows of the mask), of a table that all batches and heads share."""
    rows = torch.randperm(tokens, device=table.q_bounds.device)[:64]
    q_block = block_of_token(table.q_bounds, table.q_order)[rows]
    return rows, table.block_mask()[:, :, q_block][..., block_of_token(table.kv_bounds, table.kv_order)]


def assert_sampled_gradients(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, config: BackwardConfig | None = None
) -> None:
    """Raise unless the backward pass, with these tiles or the shipped ones, equals float64's where 64 of the
    queries alone have a gradient, so that a dense oracle needs no others."""
    from sparsify_compiler.kernels.triton.backward import backward

    scale = query.shape[-1] ** -0.5
    out, lse = attention(query, key, value, table)
    rows, mask = sampled_rows(table, query.shape[2])
    # So large that those of keys, of which a row reads many, are not small beside what rounding is allowed.
    given = [torch.randn_like(t[:, :, rows]) * (key.shape[2] / 8) for t in (out, lse)]
    whole = [torch.zeros_like(t).index_copy_(2, rows, g) for t, g in zip((out, lse), given, strict=True)]
    d_query, d_key, d_value = backward(*whole, out, lse, query, key, value, table, None, scale, config)
    found = d_query[:, :, rows], d_key, d_value
    oracles.assert_gradients_close_to_float64(found, *given, query[:, :, rows], key, value, mask)
    d_query[:, :, rows] = 0
    assert not d_query.any(), "a query without a gradient got one"


def attention(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """The op as users call it, or the kernel alone with tiles of our choice."""
    if config is None:
        return block_sparse_attention(query, key, value, table, provider="triton")
    from sparsify_compiler.kernels.triton.attention import forward

    return forward(query, key, value, table, None, query.shape[-1] ** -0.5, config)


def check(deadline: float) -> Iterator[dict[str, Any]]:
    """Section 1, one record a check."""
    generation = configs.generation(torch.device(DEVICE))
    shipped = [
        (width, c, torch.bfloat16)
        for (g, width), pair in configs.HALF.items()
        if g == generation
        for c in pair
    ]
    shipped += [(width, c, torch.float32) for width, c in configs.SINGLE.items()]
    table = cluster_table(3000, 9, 70, 0.4).to(DEVICE)
    for width, config, dtype in shipped:
        assert_sampled_rows(*qkv(2, 4, 2, 3000, 3000, width, width, dtype, device=DEVICE), table, config)
        yield {"check": f"{config} D={width} {dtype}"}
    for head_dim, dtype in product(HEAD_DIMS, (torch.float16, torch.float32)):
        assert_sampled_rows(
            *qkv(1, 2, 1, 1000, 3000, head_dim, head_dim, dtype, device=DEVICE), cut(table, 1000)
        )
        yield {"check": f"D={head_dim} {dtype}"}
    for width, config, dtype in backward_ways(generation):
        with torch.inference_mode(False):
            assert_sampled_gradients(
                *qkv(2, 4, 2, 3000, 3000, width, width, dtype, device=DEVICE), table, config
            )
        yield {"check": f"{config} D={width} {dtype}"}
    drawn = 0

    @settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(tables(batch=2, heads=4, q_tokens=333, kv_tokens=1000))
    def draw(table: BlockTable) -> None:
        nonlocal drawn
        if time.monotonic() > deadline:
            return
        drawn += 1
        table = table.to(DEVICE)
        query, key, value = qkv(2, 4, 2, 333, 1000, 64, 64, torch.bfloat16, device=DEVICE, seed=drawn)
        out, lse = attention(query, key, value, table)
        oracles.assert_close_to_float64(out, lse, query, key, value, table.mask())

    draw()
    yield {"check": f"{drawn} tables drawn at random"}


def backward_ways(generation: int) -> Iterator[tuple[int, BackwardConfig, torch.dtype]]:
    """(head dim, tiles, dtype) of every way of the backward pass that is shipped for a GPU."""
    rows = [
        (width, pairs, torch.bfloat16)
        for (g, width), pairs in configs.BACKWARD_HALF.items()
        if g == generation
    ]
    rows += [(width, ((c, c), (c, c)), torch.float32) for width, c in configs.BACKWARD_SINGLE.items()]
    for width, (queries, keys), dtype in rows:
        yield width, BackwardConfig(queries[0], keys[0]), dtype
        yield width, BackwardConfig(queries[1], keys[1], configs.WORD), dtype
        yield width, BackwardConfig(queries[1], None), dtype


def cut(table: BlockTable, tokens: int) -> BlockTable:
    """The table with no query order and its query blocks cut off after `tokens`."""
    fields = table.tensors() | {"q_order": None, "q_bounds": table.q_bounds.clamp(max=tokens)}
    return BlockTable(**fields)


def milliseconds(function: Callable[..., object], *args: Any, **options: Any) -> float:
    """Median run time of a call, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    return float(do_bench(lambda: function(*args, **options), warmup=50, rep=250, return_mode="median"))


def dense(*tensors: Tensor, run: Callable[..., object] = scaled_dot_product_attention) -> dict[str, float]:
    """The run time of what calls SDPA, under each backend that takes these tensors."""
    times = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            try:
                times[name] = milliseconds(run, *tensors)
            except RuntimeError as error:
                print(f"{name} SDPA does not run: {error}")
    return times


def training(deadline: float) -> Iterator[dict[str, Any]]:
    """Section 2, one record for each table: forward and backward, with the atomics that it takes, and without."""
    tokens = 65536
    blocks = functools.partial(random_table, tokens, 128, 128, 0.08)
    keys = functools.partial(single_key_table, tokens, 32, 0.08)
    for name, make, deterministic in (
        ("random 128x128 0.08", blocks, False),
        ("random 32x1 0.08", keys, False),
        ("random 32x1 0.08 without atomics", keys, True),
    ):
        if time.monotonic() > deadline:
            return
        yield {"case": f"training, {name}"} | trained(make, tokens, deterministic)


@torch.inference_mode(False)
def trained(make: Callable[[], BlockTable], tokens: int, deterministic: bool) -> dict[str, Any]:
    """`figures` of a forward and a backward pass, ours checked first."""
    query, key, value = qkv(1, 4, 4, tokens, tokens, 128, 128, torch.bfloat16, device=DEVICE)
    table, grad = make().to(DEVICE), torch.randn_like(query)
    with determinism(deterministic):
        config = configs.choose_backward(query, key, value, table)
    assert_sampled_gradients(query, key, value, table, config)
    inputs = *(t.requires_grad_() for t in (query, key, value)), grad
    with determinism(deterministic):
        times = {"ours": milliseconds(passes, lambda q, k, v: attention(q, k, v, table)[0], *inputs)}
    times |= dense(*inputs, run=functools.partial(passes, scaled_dot_product_attention))
    return figures(query.shape, table.density(), times, 1 + BACKWARD_FLOPS)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """torch's deterministic mode."""
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def passes(
    function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(function(query, key, value), (query, key, value), grad)


def flex_mask(table: BlockTable) -> BlockMask | None:
    """The same blocks for FlexAttention, or None where they are not multiples of its own."""
    q_sizes, kv_sizes = table.q_bounds.diff().unique().tolist(), table.kv_bounds.diff().unique().tolist()
    if (
        table.kv_order is not None
        or len(q_sizes + kv_sizes) > 2
        or any(n % FLEX_BLOCK for n in q_sizes + kv_sizes)
    ):
        return None
    blocks = table.block_mask()
    for dim, size in ((-2, q_sizes[0]), (-1, kv_sizes[0])):
        blocks = blocks.repeat_interleave(size // FLEX_BLOCK, dim)
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    none_cut = torch.zeros_like(counts), torch.zeros_like(indices)
    return BlockMask.from_kv_blocks(*none_cut, counts, indices, BLOCK_SIZE=FLEX_BLOCK)


def flashinfer_run(query: Tensor, key: Tensor, value: Tensor, table: BlockTable) -> Callable[[], Tensor]:
    """FlashInfer's variable block sparse attention, planned."""
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper  # type: ignore[import-not-found]

    heads, head_dim = query.shape[1], query.shape[-1]
    wrapper = VariableBlockSparseAttentionWrapper(torch.empty(2**29, dtype=torch.uint8, device=DEVICE))
    blocks, q_sizes, kv_sizes = (
        t[0].expand(heads, *t.shape[2:]).contiguous()
        for t in (table.block_mask(), table.q_bounds.diff(), table.kv_bounds.diff())
    )
    wrapper.plan(
        block_mask_map=blocks,
        block_row_sz=q_sizes,
        block_col_sz=kv_sizes,
        num_qo_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        q_data_type=query.dtype,
    )
    q, k, v = (t[0].contiguous() for t in (query, key, value))
    return lambda: wrapper.run(q, k, v)


def speed(deadline: float) -> Iterator[dict[str, Any]]:
    """Section 3, one record a case."""
    flex = torch.compile(flex_attention, dynamic=False)
    dense_times: dict[torch.Size, dict[str, float]] = {}
    for head_dim, (name, table) in product((128, 64), cases().items()):
        if time.monotonic() > deadline:
            return
        query, key, value = tensors(table, head_dim)
        table = table.to(DEVICE)
        assert_sampled_rows(query, key, value, table)
        if query.shape not in dense_times:
            dense_times[query.shape] = dense(query, key, value)
        times = {"ours": milliseconds(attention, query, key, value, table)} | dense_times[query.shape]
        if (mask := flex_mask(table)) is not None:
            times["flex"] = milliseconds(flex, query, key, value, block_mask=mask)
        if FLASHINFER and table.kv_order is None:
            times["flashinfer"] = milliseconds(flashinfer_run(query, key, value, table))
        yield {"case": name} | figures(query.shape, table.density(), times)


def sweep(deadline: float) -> Iterator[dict[str, Any]]:
    """Section 4, one record for each case and head dim: the run time under each choice of tiles."""
    from triton.runtime.errors import OutOfResources

    tried = list(product((128, 64), (64, 128), (32, 64, 256), (8, 4), (3, 2, 4)))
    chosen = list(product((128, 64), SWEPT))
    for left, (head_dim, name) in zip(range(len(chosen), 0, -1), chosen, strict=True):
        query, key, value = tensors(cases()[name], head_dim)
        table = cases()[name].to(DEVICE)
        stop = time.monotonic() + (deadline - time.monotonic()) / left
        times = {"shipped": milliseconds(attention, query, key, value, table)}
        for config in (Config(*sizes) for sizes in tried):
            if time.monotonic() > stop:
                break
            try:
                times[str(config)] = milliseconds(attention, query, key, value, table, config)
            except OutOfResources:
                continue  # more shared memory than there is
        fastest = sorted(times, key=lambda config: times[config])
        yield {"case": name, "head_dim": head_dim, "ms": {config: times[config] for config in fastest}}


def figures(
    shape: torch.Size, density: float, times: dict[str, float], forwards: float = 1.0
) -> dict[str, Any]:
    """What follows from the milliseconds of each contestant for the work of so many forward passes."""
    _, heads, tokens, head_dim = shape
    flops = forwards * 4 * tokens**2 * head_dim * heads
    baseline = min(times.get("cudnn", float("inf")), times.get("flash", float("inf")))
    speedup = baseline / times["ours"]
    return {
        "tokens": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "density": density,
        "ms": times,
        "speedup": speedup,
        "efficiency": speedup * density,
        "tflops": flops * density / times["ours"] / 1e9,
        "dense_tflops": flops / baseline / 1e9,
    }


def markdown(records: list[dict[str, Any]]) -> str:
    """Sections 2 to 4 as tables."""
    contestants = ("ours", "cudnn", "flash", "flex", "flashinfer")
    header = (
        "case",
        "S",
        "H",
        "D",
        "density",
        *(f"{c} ms" for c in contestants),
        "TFLOP/s",
        "speedup",
        "efficiency",
    )
    lines = [header, ("---",) * len(header)]
    for r in (r for r in records if "speedup" in r):
        shape = (r["case"], r["tokens"], r["heads"], r["head_dim"], f"{r['density']:.3f}")
        times = (f"{r['ms'][c]:.2f}" if c in r["ms"] else "" for c in contestants)
        lines.append((*shape, *times, f"{r['tflops']:.0f}", f"{r['speedup']:.2f}", f"{r['efficiency']:.2f}"))
    lines += [(), ("case", "D", "shipped ms", "fastest ms", "fastest tiles"), ("---",) * 5]
    for r in (r for r in records if "speedup" not in r and "ms" in r):
        config, fastest = next(iter(r["ms"].items()))
        lines.append((r["case"], r["head_dim"], f"{r['ms']['shipped']:.2f}", f"{fastest:.2f}", config))
    return "".join("| " + " | ".join(map(str, line)) + " |\n" if line else "\n" for line in lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU, and torch sees none", file=sys.stderr)
        raise SystemExit(2)
    start = time.monotonic()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    if not FLASHINFER:
        print("FlashInfer is not installed")
    records: list[dict[str, Any]] = []
    sections = {
        check: CHECK_UNTIL,
        training: TRAINING_UNTIL,
        speed: SPEED_UNTIL,
        sweep: SWEEP_UNTIL,
    }
    for section, until in sections.items():
        for line in section(start + until):
            records.append(line)
            print(f"{time.monotonic() - start:4.0f} s  {line}", flush=True)
            write_json(options.out / "gpu.json", records)
            (options.out / "gpu.md").write_text(markdown(records))
    print(markdown(records))


if __name__ == "__main__":
    main()
