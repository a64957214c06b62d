"""Times of kernels and sites at video size. Everything is checked against float64 on a few rows before it is timed.

All times of one table are taken in turns, so that they have the same clock rates, and one of them twice: the
difference of this pair is noise. Inputs are far larger than the L2 cache.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.attention import (
    SCALE,
    Problem,
    candidates,
    check_rows,
    error_of_gradients,
    run,
    short,
    video_problem,
)
from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import (
    error_of_rows,
    flat_table,
    mask_of_rows,
    qkv,
    randn,
    single_key_table,
    some_rows,
)
from benchmarks.gpu.observe import milliseconds_of_kernels
from benchmarks.gpu.runner import Case
from benchmarks.gpu.sites import VIDEO, Site, distance_from_dense, method_of, video_inputs
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.attention.triton_backward import backward
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import BackwardConfig
from sparsify_compiler.methods import METHODS, DynamicMethod
from sparsify_compiler.methods.selection import State, Tokens
from sparsify_compiler.table import BlockTable

HEADS = 40
FLEX_BLOCK = 128
"""Size of the blocks of queries and of keys in FlexAttention's tables."""


def milliseconds(device: Device, function: Callable[[], object]) -> float:
    """Milliseconds of one call, by the device's clock."""
    first = device.stamp()
    function()
    last = device.stamp()
    device.synchronise()
    return device.between(first, last)


def in_turns(
    device: Device, functions: Mapping[str, Callable[[], object]], *, seconds: float, rounds: int = 9
) -> dict[str, float]:
    """Median milliseconds of each function over as many rounds as fit into `seconds`; three rounds if these fit
    into twice the time.

    A first round does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    end = time.monotonic() + seconds
    for turn in device.size(range(-1, rounds), range(1)):
        late = time.monotonic() - end
        if (turn >= 3 and late > 0) or (turn >= 1 and late > seconds):
            break
        for name, function in functions.items():
            one = milliseconds(device, function)
            if turn >= 0:
                found[name].append(one)
    return {name: median(values) for name, values in found.items()}


def ceilings(device: Device) -> dict[str, Any]:
    """Rates of copying memory, read and written, and of products of bfloat16 matrices."""
    size, width = device.size((2**32, 8192), (2**20, 64))
    source = torch.empty(size, dtype=torch.uint8, device=device.name).random_(0, 256)
    target = torch.empty_like(source)
    left, right = (randn(device, width, width, dtype=torch.bfloat16, seed=s) for s in (0, 1))
    times = in_turns(
        device,
        {
            "copy": lambda: target.copy_(source),
            "product": lambda: left @ right,
            "product again": lambda: left @ right,
        },
        seconds=3.0,
    )
    return {
        "copy_tb_s": 2 * size / times["copy"] / 1e9,
        "product_tflops": 2 * width**3 / times["product"] / 1e9,
        "product_again_tflops": 2 * width**3 / times["product again"] / 1e9,
    }


def dense_calls(
    device: Device, attend: Callable[..., object], *inputs: Tensor
) -> dict[str, Callable[[], object]]:
    """Name -> call of dense attention, for each of its kernels that takes these tensors."""

    def under(backend: Any) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return attend(*inputs)

        return call

    calls = {}
    for name, backend in device.dense.items():
        call = under(backend)
        try:
            call()
            device.synchronise()
        except RuntimeError as error:
            print(f"{name} does not run: {error}")
            continue
        calls[name] = call
    assert calls, "no kernel of dense attention runs"
    return calls


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, scale=SCALE)


def flops(query: Tensor, key: Tensor) -> float:
    """FLOP of the forward pass of dense attention."""
    return 4.0 * math.prod(query.shape) * key.shape[2]


def rated(
    times: Mapping[str, float], density: float, work: float, dense_names: Iterable[str]
) -> dict[str, Any]:
    """Figures from milliseconds: the fastest dense kernel, and for the others speed-up, efficiency (1 if sparse
    work runs at the rate of dense work) and TFLOP/s."""
    fastest = min(times[name] for name in dense_names)
    return {
        "density": round(density, 4),
        "dense_ms": fastest,
        "dense_tflops": work / fastest / 1e9,
        "ms": dict(times),
        "speedup": {name: fastest / ms for name, ms in times.items()},
        "efficiency": {name: fastest / ms * density for name, ms in times.items()},
        "tflops": {
            name: work * (1 if name in dense_names else density) / ms / 1e9 for name, ms in times.items()
        },
    }


def tile_cases(device: Device) -> Iterable[Case]:
    """The device; then the candidates at every density, next to dense attention."""
    yield "device", device.facts
    yield "ceilings", partial(ceilings, device)
    for density in device.size((0.2, 0.1, 0.3), (0.2,)):
        yield f"tiles at density {density}", partial(time_tiles, device, density)


def time_tiles(device: Device, density: float) -> dict[str, Any]:
    """Time the candidates. Those that are wrong, or do not run, have a reason instead of a time."""
    tensors = video_problem(device, device.size(HEADS, 2), density)
    q, k, v, table, _ = tensors
    calls: dict[str, Callable[[], object]] = {}
    wrong, errors = {}, {}
    for name, config in candidates(device).items():
        call = partial(run, tensors, config)
        try:
            errors[name] = check_rows(tensors, call)
        except Exception as error:
            wrong[name] = str(error)[:300]
        else:
            calls[name] = call
    assert calls, f"every candidate is wrong: {wrong}"
    beside = dense_calls(device, dense, q, k, v)
    shipped = next(iter(candidates(device)))
    if shipped in calls:
        calls[f"{shipped} again"] = calls[shipped]
    times = in_turns(device, calls | beside, seconds=8.0)
    found = rated(times, table.density(), flops(q, k), beside)
    return found | {"shipped": shipped, "off_of_tiles": errors, "wrong": wrong}


def site_cases(name: str, device: Device) -> Iterable[Case]:
    """A method's site at every density with its own far field, and once without a far field.

    The lists of `dsv`, for 2,640 groups of queries in each head, fit into memory at 40 heads only for the lowest
    density.
    """
    own = METHODS[name].far_field
    few = 8 if name == "dsv" else HEADS
    tried = [(own, 0.2, few), (own, 0.1, HEADS), (own, 0.3, few)]
    if own != "drop":
        tried.append(("drop", 0.2, few))
    for far_field, density, heads in device.size(tried, tried[:1] + tried[3 if name == "cubes" else 4 :]):
        what = f"{name} {far_field} at density {density}, {heads} heads"
        yield what, partial(time_site, device, name, far_field, density, heads)


def time_site(device: Device, name: str, far_field: str, density: float, heads: int) -> dict[str, Any]:
    """Time a later call of a generation as a whole, in a graph and kernel by kernel, and measure its memory."""
    inputs = video_inputs(device, VIDEO, heads)
    # Gains are estimated but select no block, so densities are the requested ones.
    min_gain = 1e9 if far_field == "linear" else None
    method = method_of(device, name, density, min_gain, inputs.layout.grid)
    site = Site(device, method, density, far_field, "triton", inputs)
    cold = milliseconds(device, partial(site.call, warm=False))
    out = site.call()
    assert out.isfinite().all(), "not all of the output is finite"
    checked = {"from_dense": distance_from_dense(out, inputs)}
    if far_field == "drop":
        checked["off"] = error_under_its_table(site)
    del out
    calls: dict[str, Callable[[], object]] = {"site": site.call, "site again": site.call}
    beside = dense_calls(
        device, partial(scaled_dot_product_attention, scale=site.plan.site.scale), *qkv_of(site)
    )
    times = in_turns(device, calls | beside, seconds=2.5)
    kernels = milliseconds_of_kernels(device, site.call)
    peak = device.peak_bytes(site.call)
    _, replay = device.captured(site.call)
    graph = in_turns(device, {"graph": replay}, seconds=1.0)["graph"]
    in_kernels = sum(ms for ms, _ in kernels.values())
    work = flops(inputs.query, inputs.key)
    return (
        checked
        | rated(times, site.reported()["density"], work, beside)
        | {
            "cold_ms": cold,
            "graph_ms": graph,
            "kernels": {n: {"ms": ms, "launches": count} for n, (ms, count) in kernels.items()},
            "kernels_ms": in_kernels,
            "outside_kernels_ms": times["site"] - in_kernels,
            "peak_gib": peak / 2**30,
            "peak_over_qkv": peak / sum(t.nbytes for t in qkv_of(site)),
        }
    )


def qkv_of(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    return site.inputs.query, site.inputs.key, site.inputs.value


def error_under_its_table(site: Site) -> float:
    """Check a call that drops the far field against float64 under the mask of its own table, on a few rows."""
    inputs = site.inputs
    remembered = State(site.warm, tuple(t.clone() for t in site.state))
    out = site.call()
    if isinstance(site.method, DynamicMethod):
        tokens = Tokens(
            query=inputs.query,
            key=inputs.key,
            layout=inputs.layout,
            scale=site.plan.site.scale,
            provider="triton",
        )
        table = site.method.select(tokens, remembered, **site.operands)[0].table
    else:
        table = BlockTable(**site.operands)
    rows = some_rows(inputs.layout.tokens, 12, out)
    q, k, v = qkv_of(site)
    return error_of_rows(out[:, :, rows], None, q[:, :, rows], k, v, mask_of_rows(table, rows))


BACKWARD_WORK = 3.5
"""Products of a forward and a backward pass, relative to a forward pass, which has two; backward has five more."""


def backward_cases(device: Device) -> Iterable[Case]:
    """Time forward and backward together, for clusters and for single keys, with and without atomics."""
    yield "clusters", partial(time_backward, device, "clusters", False)
    yield "single keys, by atomics", partial(time_backward, device, "single keys", False)
    yield "single keys, without atomics", partial(time_backward, device, "single keys", True)


def time_backward(device: Device, kind: str, deterministic: bool) -> dict[str, Any]:
    heads = device.size(8, 2)
    if kind == "clusters":
        q, k, v, table, _ = video_problem(device, heads, 0.2)
    else:
        tokens = device.size(65_536, 64)
        q, k, v = qkv(device, 1, heads, heads, tokens, 128, torch.bfloat16)
        table = single_key_table(device, heads, tokens, device.size(32, 16), 0.1)
    with determinism(deterministic):
        way = configs.choose_backward(q, k, v, table)
    error_of_some_gradients((q, k, v, table, None), way)
    grad = randn(device, *q.shape, dtype=q.dtype, seed=7)
    inputs = *(t.requires_grad_() for t in (q, k, v)), grad

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_sparse_attention(query, key, value, table, scale=SCALE, provider="triton")[0]

    def both(attend: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, given = tensors
        with torch.enable_grad():
            return torch.autograd.grad(attend(*leaves), leaves, given)

    def sparse() -> tuple[Tensor, ...]:
        with determinism(deterministic):
            return both(ours, *inputs)

    beside = dense_calls(device, partial(both, dense), *inputs)
    times = in_turns(device, {"ours": sparse, "ours again": sparse} | beside, seconds=5.0)
    kernels = milliseconds_of_kernels(device, sparse)
    peak = device.peak_bytes(sparse)
    work = BACKWARD_WORK * flops(q, k)
    return rated(times, table.density(), work, beside) | {
        "way": "atomics" if way.keys is None else "grouped" if way.group > 1 else "by block",
        "tiles": short(way.queries),
        "kernels": {n: {"ms": ms, "launches": count} for n, (ms, count) in kernels.items()},
        "peak_over_qkv": peak / sum(t.nbytes for t in (q, k, v)),
    }


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Set torch's deterministic mode. Dense attention may have no kernel for it."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error_of_some_gradients(tensors: Problem, way: BackwardConfig) -> None:
    """Check gradients against float64. Only a few queries have a gradient, so dense float64 needs only these."""
    q, k, v, table, _ = tensors
    out, lse = run(tensors, None)
    rows = some_rows(q.shape[2], 24, q)
    # Large, so that gradients of keys are not small next to the tolerance, although a row reads many keys.
    size = k.shape[2] / 8
    given = [torch.randn_like(t[:, :, rows]) * size for t in (out, lse)]
    whole = [torch.zeros_like(t).index_copy_(2, rows, g) for t, g in zip((out, lse), given, strict=True)]
    found = backward(*whole, out, lse, q, k, v, table, None, SCALE, way)
    mask = mask_of_rows(table, rows)
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        d_query, d_key, d_value = (d[:, one] for d in found)
        error_of_gradients(
            (d_query[:, :, rows], d_key, d_value),
            *(g[:, one] for g in given),
            *(q[:, one][:, :, rows], k[:, one], v[:, one], mask[:, one]),
        )
    found[0][:, :, rows] = 0
    assert not found[0].any(), "a query without a gradient got one"


def other_cases(device: Device) -> Iterable[Case]:
    """The backward pass, and FlexAttention."""
    yield from backward_cases(device)
    yield "FlexAttention, blocks of 128 at density 0.2", partial(time_flex, device)


def time_flex(device: Device) -> dict[str, Any]:
    """Time FlexAttention on its own blocks, compiled, on eight heads."""
    tokens, heads = device.size((75_776, 8), (256, 2))
    q, k, v = qkv(device, 1, heads, heads, tokens, 128, torch.bfloat16)
    table = flat_table(device, heads, tokens, FLEX_BLOCK, FLEX_BLOCK, device.size(0.2, 0.5))
    mask, attend = flex_mask(table), device.compiled(flex_attention)
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(run, (q, k, v, table, None), None),
        "flex": partial(attend, q, k, v, block_mask=mask, scale=SCALE),
    }
    for call in calls.values():
        check_rows((q, k, v, table, None), call)
    beside = dense_calls(device, dense, q, k, v)
    times = in_turns(device, calls | beside, seconds=4.0)
    return rated(times, table.density(), flops(q, k), beside)


def flex_mask(table: BlockTable) -> BlockMask:
    """The same blocks for FlexAttention, all of them full; uncompiled, it only uses the mask of pairs."""
    blocks = table.block_mask()
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    none_cut = torch.zeros_like(counts), torch.zeros_like(indices)

    def reads(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return blocks[b, h, i // FLEX_BLOCK, j // FLEX_BLOCK]

    return BlockMask.from_kv_blocks(*none_cut, counts, indices, BLOCK_SIZE=FLEX_BLOCK, mask_mod=reads)
