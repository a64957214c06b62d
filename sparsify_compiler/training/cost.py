"""What sparse attention costs beside dense on this machine: measured once for a shape, then remembered.

Timed are forward and backward, of dense SDPA and of what method `dsv` runs at two densities with its selection, on
random tokens. Between and beyond the two the cost is taken to grow by the density in a straight line.
"""

import functools
import math
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.prediction import top_k_keys
from sparsify_compiler.methods.dsv import Dsv, single_key_table
from sparsify_compiler.methods.grid import Cube
from sparsify_compiler.plan import AttentionSite, TokenLayout
from sparsify_compiler.timing import timed


class Cost(NamedTuple):
    """Of a head that reads a share of the video's keys; 1 is dense."""

    fixed: float
    by_share: float

    def of(self, share: Tensor) -> Tensor:
        """Of heads that read these shares. Below 1 it pays to be sparse."""
        return self.fixed + self.by_share * share


DENSITIES = (1 / 16, 1 / 4)
HEADS = 2
"""Heads that are timed, at most: enough for every core of a small machine, soon done on a large grid."""
REPEATS = 3


def measured_cost(
    site: AttentionSite, layout: TokenLayout, method: Dsv, group: Cube, rank: int, provider: str
) -> Cost:
    """Of forward and backward, with selection, where queries choose their keys by groups.

    The first call for a shape takes a few dense attentions' time.
    """
    return _measure(
        layout.grid or (1, 1, layout.video_tokens),
        group,
        method.chosen_by,
        rank,
        min(site.heads, HEADS),
        site.head_dim,
        site.dtype,
        site.device,
        provider,
        torch.get_num_threads(),
    )


@functools.cache
def _measure(
    grid: Cube,
    group: Cube,
    chosen_by: str | None,
    rank: int,
    heads: int,
    head_dim: int,
    dtype: str,
    device: str,
    provider: str,
    threads: int,
) -> Cost:
    generator = torch.Generator().manual_seed(0)
    tokens = math.prod(grid)
    shape = (1, heads, tokens, head_dim)
    inputs = [
        torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)).requires_grad_()
        for _ in range(3)
    ]
    query, key, value = inputs
    layout = TokenLayout(tokens=tokens, grid=grid)
    method = Dsv(query_group=group, chosen_by=chosen_by)
    constants = {name: tensor.to(device) for name, tensor in method.constants(layout).items()}
    order, bounds, voters = (constants[name] for name in ("q_order", "q_bounds", "voters"))
    weights = torch.randn(head_dim, rank, generator=generator).to(device)

    def sparse(density: float) -> Tensor:
        keys = max(1, round(density * tokens))
        with torch.no_grad():
            budget = torch.full((1, heads), keys, dtype=torch.int32, device=device)
            counts, indices = top_k_keys(
                query[:, :, voters].float() @ weights,
                key.float() @ weights,
                budget,
                width=1 << (keys - 1).bit_length(),
                q_bounds=constants.get("voter_bounds"),
                provider=provider,
            )
            is_dense = torch.zeros(heads, dtype=torch.bool, device=device)
            table = single_key_table(layout, order, bounds, counts, indices, is_dense)
        return attention.block_sparse_attention(query, key, value, table, provider=provider)[0]

    dense_time = _time(lambda: scaled_dot_product_attention(query, key, value), inputs)
    low, high = (_time(functools.partial(sparse, density), inputs) for density in DENSITIES)
    slope = max(0.0, high - low) / (DENSITIES[1] - DENSITIES[0])
    return Cost(fixed=max(0.0, low - slope * DENSITIES[0]) / dense_time, by_share=slope / dense_time)


def _time(forward: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """Median seconds of forward and backward."""

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    with torch.enable_grad():
        both()
        return median(timed(both, str(inputs[0].device))[0] for _ in range(REPEATS))
