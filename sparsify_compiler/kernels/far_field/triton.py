"""Near and far field: two launches of attention, then the merge, whose kernel is in `triton_kernels.py`."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.attention import triton as attention
from sparsify_compiler.kernels.far_field import triton_kernels as kernels
from sparsify_compiler.kernels.far_field.near_and_far import in_parts
from sparsify_compiler.kernels.far_field.virtual_keys import (
    MOST_SECOND_ORDER,
    Judged,
    Listed,
    VirtualKeys,
)
from sparsify_compiler.kernels.statistics.triton import precision, value_tile
from sparsify_compiler.kernels.triton.launcher import (
    Launch,
    shared_strides,
    with_shared_strides,
    with_strides,
)
from sparsify_compiler.table import BlockTable


def merge(
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `far_field.merge_far_field`."""
    out, lse = empty_outputs(query, near_out)
    merge_launch(
        *(query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order, scale),
        *(out, lse),
    )()
    return out, lse


def merge_into_near(query: Tensor, near_out: Tensor, near_lse: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`merge`, whose `out` takes the memory of `near_out`: a program reads what it writes, and no other."""
    lse = torch.empty_like(near_lse)
    arguments: tuple[Any, ...] = (query, near_out, near_lse, *rest, near_out, lse)
    merge_launch(*arguments)()
    return near_out, lse


near_and_far = partial(in_parts, attention.forward, merge_into_near)
"""See `far_field.near_and_far`."""


COMPARED = 16
"""Number of rows whose blocks one program compares."""


def list_blocks(
    query: Tensor,
    mean_query: Tensor,
    mean_square: Tensor,
    log_weight: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    key_variance: Tensor,
    value_variance: Tensor,
    q_bounds: Tensor,
    kv_bounds: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    min_gain: float | None,
    scale: float,
    found: Listed,
) -> None:
    """Fill `found`, see `virtual_keys.Listed`."""
    for launch in list_launches(
        *(query, mean_query, mean_square, log_weight, key_mean, value_mean, key_variance, value_variance),
        *(q_bounds, kv_bounds, kv_num_blocks, kv_indices, min_gain, scale, found),
    ):
        launch()


def list_launches(
    query: Tensor,
    mean_query: Tensor,
    mean_square: Tensor,
    log_weight: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    key_variance: Tensor,
    value_variance: Tensor,
    q_bounds: Tensor,
    kv_bounds: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    min_gain: float | None,
    scale: float,
    found: Listed,
) -> Iterator[Launch]:
    """The two launches of `list_blocks`."""
    batch, heads, rows, head_dim = mean_query.shape
    _, groups, blocks, value_dim = value_mean.shape
    scores = mean_query.new_empty(*mean_query.shape[:3], blocks)
    lse, out = mean_query.new_empty(mean_query.shape[:3]), mean_query.new_empty(found.limits.shape)
    flags = mean_query.new_empty(scores.shape, dtype=torch.int8)
    largest = torch.finfo(query.dtype).max
    grid = triton.cdiv(rows, COMPARED), heads, batch
    shared = {
        **{"mean_square": mean_square, "value_mean": value_mean, "key_variance": key_variance},
        **{"scores": scores, "lse": lse, "out": out},
        **with_shared_strides(q_bounds=q_bounds),
        **{"rows": rows, "blocks": blocks, "heads_per_group": heads // groups, "scale": scale},
        **{"HEAD_DIM": head_dim, "VALUE_DIM": value_dim},
        **{"BLOCK_M": COMPARED, "BLOCK_N": 32 if max(head_dim, value_dim) <= 128 else 16},
    }
    yield Launch(
        kernels.compare_kernel,
        grid,
        shared
        | {"mean_query": mean_query, "log_weight": log_weight, "key_mean": key_mean, "bias": found.bias}
        | {"far_key": found.key, "far_value": found.value, "tokens": query.shape[2]}
        | {"most_second_order": MOST_SECOND_ORDER}
        | {"largest": None if largest >= 0.99 * torch.finfo(torch.float32).max else largest},
        num_warps=8,
    )
    yield Launch(
        kernels.list_kernel,
        grid,
        shared
        | {"value_variance": value_variance, "flags": flags}
        | {"new_counts": found.counts, "new_indices": found.indices, "shares": found.shares}
        | {"other_counts": found.other_counts, "other_indices": found.other_indices}
        | {"limits": found.limits, "kept": found.kept, "tokens": query.shape[2]}
        | with_shared_strides(kv_bounds=kv_bounds, counts=kv_num_blocks, indices=kv_indices)
        | {"width": kv_indices.shape[-1], "min_gain": min_gain, "NUMBERS": 32},
        num_warps=8,
    )


def judged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far: VirtualKeys,
    others: BlockTable,
    key_bias: Tensor | None,
    exact: tuple[Tensor, Tensor] | None,
    count: int,
    parts: int,
    scale: float,
    found: Judged,
) -> tuple[Tensor, Tensor]:
    """`near_and_far` without the terms that raise the error of `count` rows of a head. Fills `found`.

    The near and the far field of these rows are those of all rows, so the rows cost one launch that reads all keys.

    Args:
        exact: that of `exact_samples`, where it is known and there is no first order.
    """
    samples = bounds = None
    if exact is None:
        of_rows = table.q_bounds, table.q_order, key_bias, count, parts, scale
        samples, bounds, exact = exact_samples(query, key, value, *of_rows)
    near = attention.forward(query, key, value, table, key_bias, scale)
    rest = attention.forward(query, far.key, far.value, others, far.bias, scale)
    judge_launch(samples, bounds, table.q_order, exact, near, rest, far, count, scale, found)()
    limits = None if far.limits is None else found.limits
    return merge_into_near(query, *near, *rest, far.matrices, limits, table.q_bounds, table.q_order, scale)


def exact_samples(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_bounds: Tensor,
    q_order: Tensor | None,
    key_bias: Tensor | None,
    count: int,
    parts: int,
    scale: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """(`count` rows of each head, once for each part of the keys; the bounds of query blocks among them; near field
    of each copy under its part)."""
    batch, heads, _, head_dim = query.shape
    samples = query.new_empty(batch, heads, parts * count, head_dim)
    bounds = query.new_empty(batch, heads, q_bounds.shape[-1], dtype=torch.int32)
    numbers = query.new_empty(4, parts + 1, dtype=torch.int32)
    sample_launch(query, key.shape[2], q_bounds, q_order, samples, bounds, numbers, count)()
    return samples, bounds, attention.forward(samples, key, value, parts_table(numbers), key_bias, scale)


def parts_table(numbers: Tensor) -> BlockTable:
    """The table in which each copy of the sampled rows reads a part of the keys, from `sample_launch`."""
    q_bounds, kv_bounds, ones, parts = (numbers[None, None, row] for row in range(4))
    return BlockTable(
        q_bounds=q_bounds,
        kv_bounds=kv_bounds,
        kv_num_blocks=ones[..., :-1],
        kv_indices=parts[..., :-1, None],
    )


def sample_launch(
    query: Tensor,
    keys: int,
    q_bounds: Tensor,
    q_order: Tensor | None,
    samples: Tensor,
    bounds: Tensor,
    numbers: Tensor,
    count: int,
) -> Launch:
    """The launch that fills `samples`, `bounds` and `numbers`."""
    batch, heads, tokens, head_dim = query.shape
    arguments = {
        **with_strides(query=query),
        **with_shared_strides(q_bounds=q_bounds, q_order=q_order),
        **{"samples": samples, "bounds": bounds, "parts_table": numbers},
        **{"q_blocks": q_bounds.shape[-1] - 1, "tokens": tokens, "keys": keys, "count": count},
        **{"parts": numbers.shape[1] - 1, "HEAD_DIM": head_dim},
        **{"ROWS": max(2, triton.next_power_of_2(count)), "WIDTH": 128},
    }
    return Launch(kernels.sample_kernel, (1, heads, batch), arguments, num_warps=4)


def judge_launch(
    samples: Tensor | None,
    bounds: Tensor | None,
    q_order: Tensor | None,
    exact: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor],
    rest: tuple[Tensor, Tensor],
    far: VirtualKeys,
    count: int,
    scale: float,
    found: Judged,
) -> Launch:
    """The launch that fills `found`, and hides the far field of heads that do not use it.

    Args:
        samples, bounds: those of `exact_samples`; read only if there is a first order.
    """
    batch, heads, copies = exact[1].shape
    parts = copies // count
    matrices, limits = (t if t is None else t.contiguous() for t in (far.matrices, far.limits))
    arguments = {
        **{"samples": samples, "bounds": bounds},
        **with_strides(exact_out=exact[0], near_out=near[0], near_lse=near[1]),
        **with_strides(far_out=rest[0], far_lse=rest[1]),
        **with_shared_strides(q_order=q_order),
        **{"exact_lse": exact[1].contiguous(), "matrices": matrices, "limits": limits},
        "new_limits": None if limits is None else found.limits,
        **{"gate": found.gate, "recall": found.recall},
        "q_blocks": 0 if bounds is None else bounds.shape[-1] - 1,
        **{"tokens": near[1].shape[2], "count": count, "parts": parts, "scale": scale},
        **{"HEAD_DIM": far.key.shape[-1], "VALUE_DIM": near[0].shape[-1], "CHUNK": 32},
        **{"PARTS": triton.next_power_of_2(parts), "WIDTH": 1024},
    }
    return Launch(kernels.judge_kernel, (1, heads, batch), arguments, num_warps=8)


def merge_launch(
    query: Tensor,
    near_out: Tensor,
    near_lse: Tensor,
    far_out: Tensor,
    far_lse: Tensor,
    matrices: Tensor | None,
    limits: Tensor | None,
    q_bounds: Tensor,
    q_order: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> Launch:
    """The launch that fills `out` and `lse`."""
    q_bounds, q_order = q_bounds.contiguous(), q_order if q_order is None else q_order.contiguous()
    batch, heads, tokens, head_dim = query.shape
    columns = value_tile(head_dim)
    # The number of queries equals that of channels, so their product is square. In fp32 it does not fit registers.
    block = 32 if query.dtype == torch.float32 else columns
    blocks = q_bounds.shape[-1] - 1
    tensors = {
        "query": query,
        "near_out": near_out,
        "near_lse": near_lse,
        "far_out": far_out,
        "far_lse": far_lse,
        "out": out,
        "lse": lse,
    }
    arguments = {
        **tensors,
        "matrices": matrices if matrices is None else matrices.contiguous(),
        "limits": limits if limits is None else limits.contiguous(),
        "q_bounds": q_bounds,
        "q_order": q_order,
        **{f"{name}_strides": t.stride() for name, t in tensors.items()},
        "q_bounds_strides": shared_strides(q_bounds),
        "q_order_strides": shared_strides(q_order),
        "q_blocks": blocks,
        "scale": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": near_out.shape[-1],
        "VALUE_TILE": columns,
        "BLOCK": block,
        # fp32 is multiplied without tensor cores, from registers: few channels fit at a time.
        "CHUNK": 16 if query.dtype == torch.float32 else max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": precision(query.dtype),
    }
    # The most tiles that q_bounds of these shapes can have; surplus programs end at once.
    tiles = (tokens // block + blocks if tokens else 0) * -(-near_out.shape[-1] // columns)
    return Launch(kernels.merge_kernel, (tiles, heads, batch), arguments, num_warps=8)
