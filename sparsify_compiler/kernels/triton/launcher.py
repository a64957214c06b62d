"""From tensors to a launch of the kernel."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.triton.configs import Config
from sparsify_compiler.kernels.triton.kernel import block_sparse_attention_kernel
from sparsify_compiler.table import BlockTable


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as in `attention.block_sparse_attention`, computed with the tiles of `config`."""
    out, lse = attention.empty_outputs(query, value)
    if query.device.type == "cpu":  # interpreted: there tl.dot takes the bits of a bf16 for an integer
        query, key, value = query.float(), key.float(), value.float()
    if out.numel():
        with torch.cuda.device_of(query):
            block_sparse_attention_kernel[grid(query, table, config)](
                **arguments(query, key, value, table, key_bias, scale, out, lse, config),
                **options(table, config),
            )
    return out, lse


def grid(query: Tensor, table: BlockTable, config: Config) -> tuple[int, int, int]:
    """(tiles, heads, batches). No table of these shapes has more tiles; those it has not end at once."""
    batch, heads, tokens, _ = query.shape
    return tokens // config.block_m + table.kv_num_blocks.shape[-1], heads, batch


def options(table: BlockTable, config: Config) -> dict[str, int]:
    """The compiler's options. Where keys are found through an order, that takes every second stage."""
    stages = config.num_stages if table.kv_order is None else 2 * config.num_stages - 1
    return {"num_warps": config.num_warps, "num_stages": stages}


def arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    config: Config,
) -> dict[str, Any]:
    """The kernel's arguments by name."""
    index = {name: None if t is None else t.contiguous() for name, t in table.tensors().items()}
    index["key_bias"] = key_bias
    tensors = {"query": query, "key": key, "value": value, "out": out, "lse": lse}
    return {
        **tensors,
        **index,
        **{f"{name}_strides": t.stride() for name, t in tensors.items()},
        **{f"{name}_strides": shared_strides(t) for name, t in index.items()},
        "q_blocks": table.kv_num_blocks.shape[-1],
        "queries_per_key_head": query.shape[1] // key.shape[1],
        "scale": scale,
        "HEAD_DIM": query.shape[-1],
        "VALUE_DIM": value.shape[-1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNK": config.chunk,
        "ALIGN": math.gcd(16, *(n for t in (query, key, value, out) for n in row_starts(t))),
    }


def row_starts(tensor: Tensor) -> Iterator[int]:
    """Bytes of which sums and multiples are the addresses of a tensor's rows."""
    yield tensor.data_ptr()
    yield from (stride * tensor.element_size() for stride in tensor.stride()[:-1])


def shared_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a tensor [B|1, H|1, ...], 0 where a batch or head is shared or there is no tensor."""
    if tensor is None:
        return (0, 0)
    lead = (0 if tensor.shape[dim] == 1 else tensor.stride(dim) for dim in (0, 1))
    return (*lead, *tensor.stride()[2:])
