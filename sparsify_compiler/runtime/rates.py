"""The rates of this machine, each measured once: numbers for `cost.py`.

`measured_cluster` is a cluster with the rates of the ranks of a group.

`measured_speeds` are the speeds of dense and of sparse attention, without a selection.

`measured_cost` is the cost of sparse attention relative to dense. It is the time of forward and backward on random
tokens: of dense SDPA, and of method `dsv` at two densities, with its selection. The cost at other densities lies on
the straight line through the two.
"""

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler import _torch
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.far_field import attention_with_far_field
from sparsify_compiler.methods.dsv import FittedDsv
from sparsify_compiler.methods.grid import Cube
from sparsify_compiler.methods.selection import State, Tokens
from sparsify_compiler.parallel.exchange import exchange
from sparsify_compiler.plan import AttentionPlan, GraphPlan, Ranks, TokenLayout
from sparsify_compiler.runtime.cost import (
    OF_ONE_GROUP,
    Cluster,
    HeadCost,
    Speeds,
    choose_form,
    heads_suffice,
    needs_all_queries,
    work_of,
)
from sparsify_compiler.runtime.site import JUDGED_ROWS
from sparsify_compiler.table import BlockTable
from sparsify_compiler.timing import timed

DENSITIES = (1 / 16, 1 / 4)
HEADS = 2
"""Largest number of heads that are timed: enough for every core of a small machine, and fast on a large grid."""
REPEATS = 3
Clock = Callable[[], float]
NOTHING = State(torch.tensor(False, device="cpu"), ())
"""The empty state of `dsv`."""


def cpu_model() -> str:
    """Name of the CPU that Linux gives, else the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def measured_cost(plan: AttentionPlan, method: FittedDsv, group: Cube, rank: int) -> HeadCost:
    """The cost of forward and backward, with selection and far field, where groups of queries select keys together.

    The first call for a shape takes as long as a few dense attentions.
    """
    site, layout = plan.site, plan.layout
    return _measure(
        layout.grid or (1, 1, layout.video_tokens),
        group,
        method.chosen_by,
        rank,
        min(site.heads, HEADS),
        site.head_dim,
        site.dtype,
        site.device,
        plan.far_field,
        plan.provider,
        torch.get_num_threads(),
    )


@functools.cache
def _measure(
    grid: Cube,
    group: Cube,
    chosen_by: str,
    rank: int,
    heads: int,
    head_dim: int,
    dtype: str,
    device: str,
    far_field: str,
    provider: str,
    threads: int,
) -> HeadCost:
    generator = torch.Generator().manual_seed(0)
    tokens = math.prod(grid)
    shape = (1, heads, tokens, head_dim)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float32)
        .to(device, getattr(torch, dtype))
        .requires_grad_()
        for _ in range(3)
    ]
    query, key, value = inputs
    layout = TokenLayout(tokens=tokens, grid=grid)
    seen = Tokens(
        query=query.detach(),
        key=key.detach(),
        layout=layout,
        scale=head_dim**-0.5,
        provider=provider,
        far_field=far_field,
    )
    weights = (
        torch.randn(head_dim, rank, generator=generator, dtype=torch.float32)
        .expand(2 * heads, -1, -1)
        .to(device)
    )

    method = FittedDsv(rank=rank, query_group=group, chosen_by=chosen_by)
    constants = {name: tensor.to(device) for name, tensor in method.constants(layout).items()}

    def sparse(density: float) -> Tensor:
        budgeted = replace(method, kv_budget=density)
        shares = torch.full((heads,), density, dtype=torch.float32, device=device)
        with torch.no_grad():
            chosen, _ = budgeted.select(seen, NOTHING, weights=weights, shares=shares, **constants)
        if far_field == "drop":  # without the report of the call below, which training does not need
            return block_sparse_attention(query, key, value, chosen.table, provider=provider)[0]
        return attention_with_far_field(
            query,
            key,
            value,
            chosen.table,
            far_field=far_field,
            far_blocks=chosen.far_blocks,
            provider=provider,
            sampled_rows=JUDGED_ROWS,
        )[0]

    dense_time = _time(lambda: scaled_dot_product_attention(query, key, value), inputs)
    low, high = (_time(functools.partial(sparse, density), inputs) for density in DENSITIES)
    slope = max(0.0, high - low) / (DENSITIES[1] - DENSITIES[0])
    return HeadCost(fixed=max(0.0, low - slope * DENSITIES[0]) / dense_time, by_share=slope / dense_time)


def _time(forward: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """Median seconds of forward and backward."""

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    with torch.enable_grad():
        both()
        return median(timed(both, str(inputs[0].device))[0] for _ in range(REPEATS))


_known: dict[tuple[str, str, Clock], Cluster] = {}
"""(group, data type, clock) -> the cluster that its ranks measured."""
_MESSAGE = 1 << 22
"""Bytes of the message that is timed."""
_PRODUCTS = 1024
"""Rows and columns of the matrices whose product is timed."""
_VALUES = 1 << 23
"""Numbers whose copy is timed: more than a cache holds."""
_DENSITY = 0.25
_BLOCK = 64


def known_cluster(ranks: Ranks, dtype: str) -> Cluster | None:
    """The cluster that `measured_cluster` has measured before; None if it has not."""
    return _known.get((ranks.group, dtype, time.perf_counter))


def measured_cluster(
    ranks: Ranks, dtype: str, provider: str = "auto", clock: Clock = time.perf_counter
) -> Cluster:
    """The rates of ranks and of their links, the slowest of each, the same on all ranks.

    All ranks of the group call this together; it takes about a second. Hosts are those of torchrun.

    Args:
        dtype: data type of the products.
        provider: the implementation of sparse attention.
        clock: the clock of the rates. `time.process_time` counts this process alone, where others share the cores;
            all rates are then those of CPU time.

    Raises:
        RankError: another rank failed or did not take part.
    """
    key = ranks.group, dtype, clock
    if key not in _known:
        device = _torch.device_of_group(ranks.group)

        def seconds(function: Callable[[], object]) -> float:
            function()
            return median(timed(function, str(device), clock)[0] for _ in range(REPEATS))

        rates = [*_rates(device, getattr(torch, dtype), provider, seconds), *_links(ranks, device, seconds)]
        own = torch.tensor(rates, dtype=torch.float64, device=device)
        found = exchange(
            [[own] * ranks.size], [[(len(rates),)] * ranks.size], ranks, "the measured rates of ranks"
        )[0]
        *least, slowest = torch.stack(found).amin(0).tolist()
        memory, products, attention, sparse, traffic, inside, between = least
        _known[key] = Cluster(
            hosts=-(-ranks.size // _neighbours(ranks)),
            gpus=_neighbours(ranks),
            memory=memory,
            products=products,
            attention=attention,
            sparse=sparse,
            traffic=traffic,
            inside=inside,
            between=between,
            latency=-slowest,
        )
    return _known[key]


def in_best_form(plan: GraphPlan, ranks: Ranks, form: str, *, recall: bool, measure: bool) -> Ranks:
    """The ranks of a graph, in the form that takes least time where the option leaves the form open.

    Args:
        plan: the plan of the graph in one process.
        form: the form of the option `parallel`.
        recall: whether the recall of dynamic methods is measured.
        measure: whether the ranks of the group call this together, and may measure their rates. Otherwise ranks
            that have not measured them share heads.
    """
    dtypes = {one.site.dtype for one in plan}
    if form != "auto" or ranks.size == 1 or ranks.sequence is not None or len(dtypes) != 1:
        return ranks
    work, dtype = work_of(plan), dtypes.pop()
    if heads_suffice(work, ranks.size) or any(needs_all_queries(one, recall=recall) for one in plan):
        return ranks
    cluster = measured_cluster(ranks, dtype) if measure else known_cluster(ranks, dtype)
    if cluster is None or choose_form(work, cluster, ranks.size, OF_ONE_GROUP).form == "hcp":
        return ranks
    return replace(ranks, sequence=ranks)


def _neighbours(ranks: Ranks) -> int:
    """The number of ranks of a host."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), ranks.size)


def _rates(
    device: torch.device, dtype: torch.dtype, provider: str, seconds: Callable[[Callable[[], object]], float]
) -> Iterator[float]:
    """Bytes of memory, FLOP/s of products, of dense and of sparse attention, bytes/s of operators; of a rank."""
    if device.type == "cuda":
        yield torch.cuda.mem_get_info(device)[1]
    else:
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    matrix = torch.ones(_PRODUCTS, _PRODUCTS, dtype=dtype, device=device)
    yield 2 * _PRODUCTS**3 / seconds(lambda: matrix @ matrix)
    yield from _speeds(device, dtype, provider, seconds)
    values = torch.ones(_VALUES, dtype=dtype, device=device)
    yield 2 * values.nbytes / seconds(values.clone)


def measured_speeds(dtype: str, device: str, provider: str) -> Speeds:
    """The speeds of attention on a device of this process, measured once; it takes about a tenth of a second."""
    return _measured_speeds(dtype, device, provider, torch.get_num_threads())


@functools.cache
def _measured_speeds(dtype: str, device: str, provider: str, threads: int) -> Speeds:
    def seconds(function: Callable[[], object]) -> float:
        function()
        return min(timed(function, device)[0] for _ in range(REPEATS))

    return _speeds(torch.device(device), getattr(torch, dtype), provider, seconds)


def _speeds(
    device: torch.device, dtype: torch.dtype, provider: str, seconds: Callable[[Callable[[], object]], float]
) -> Speeds:
    tokens, heads, dim = (8192, 8, 128) if device.type == "cuda" else (1024, 2, 64)
    query = torch.ones(1, heads, tokens, dim, dtype=dtype, device=device)
    flops = 4.0 * heads * tokens**2 * dim
    dense = seconds(lambda: scaled_dot_product_attention(query, query, query))
    shape, draw = (1, 1, tokens // _BLOCK, tokens // _BLOCK), torch.Generator().manual_seed(0)
    blocks = torch.rand(shape, generator=draw, dtype=torch.float32)
    sizes = torch.full(shape[:3], _BLOCK, dtype=torch.int64)
    table = BlockTable.from_block_mask(blocks < _DENSITY, sizes, sizes)
    table = table.to(device)
    sparse = seconds(lambda: block_sparse_attention(query, query, query, table, provider=provider))
    return Speeds(flops / dense, flops * table.density() / sparse)


def _links(
    ranks: Ranks, device: torch.device, seconds: Callable[[Callable[[], object]], float]
) -> Iterator[float]:
    """Bytes/s to ranks of this host, then to those of other hosts, then minus the seconds of an empty exchange."""
    count = _neighbours(ranks)
    peers = range(ranks.size)
    near = [peer // count == ranks.rank // count and peer != ranks.rank for peer in peers]
    far = [peer // count != ranks.rank // count for peer in peers]

    def exchanging(reached: Sequence[bool]) -> float:
        message = torch.zeros(_MESSAGE, dtype=torch.uint8, device=device)
        messages = [message if one else message[:0] for one in reached]
        shapes = [tuple(one.shape) for one in messages]
        return seconds(lambda: exchange([messages], [shapes], ranks, "the measured links"))

    empty = exchanging([False] * ranks.size)
    for reached in (near, far):
        taken = max(exchanging(reached) - empty, 1e-9)
        yield sum(reached) * _MESSAGE / taken if any(reached) else math.inf
    yield -empty
