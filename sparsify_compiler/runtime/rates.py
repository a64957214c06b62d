"""The rates of this machine, each measured once: numbers for `cost.py`.

`measured_cost` is the cost of sparse attention relative to dense. It is the time of forward and backward on random
tokens: of dense SDPA, and of method `dsv` at two densities, with its selection. The cost at other densities lies on
the straight line through the two.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.far_field import attention_with_far_field
from sparsify_compiler.methods.dsv import FittedDsv
from sparsify_compiler.methods.grid import Cube
from sparsify_compiler.methods.selection import State, Tokens
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.cost import HeadCost
from sparsify_compiler.runtime.site import GUARD_ROWS
from sparsify_compiler.timing import timed

DENSITIES = (1 / 16, 1 / 4)
HEADS = 2
"""Largest number of heads that are timed: enough for every core of a small machine, and fast on a large grid."""
REPEATS = 3
NOTHING = State(torch.tensor(False, device="cpu"), ())
"""The empty state of `dsv`."""


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
            sampled_rows=GUARD_ROWS,
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
