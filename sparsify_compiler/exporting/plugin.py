"""The attention node as a kernel for an ahead-of-time plugin of TensorRT 10 and later, or of torch_tensorrt.

    kernel = attention_kernel(inputs, scale=scale, gpu=90)

Such a plugin holds the PTX of one kernel, the number of its threads, its shared memory, and a grid that TensorRT
computes from symbolic sizes. The parameters of the kernel must be the inputs, then the outputs. So strides and
scale are constants of the kernel, and so are all sizes except that of the batch. Nothing here needs TensorRT or a
GPU, and no such plugin has run yet.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsify_compiler.errors import OptionError
from sparsify_compiler.exporting.standard import INPUTS, Kind
from sparsify_compiler.kernels.attention.triton_kernels import block_sparse_attention_kernel
from sparsify_compiler.kernels.triton import configs

OUTPUTS = ("out", "lse")
GPUS = (80, 89, 90, 100)
"""Compute capabilities, times ten."""

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
}
"""Triton's names of types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionKernel:
    """The kernel of a node."""

    name: str
    """The entry of `ptx`."""
    ptx: str
    parameters: tuple[str, ...]
    """The tensors that the kernel takes, in order: the inputs that the node has, then `out` and `lse`. All are
    contiguous; `lse` is fp32."""
    threads: int
    """The size of a block of threads, along its first dimension."""
    shared: int
    """The shared memory of a block, in bytes."""
    queries: int
    """The largest number of queries of a block."""

    def grid(self, query: Sequence[Any], q_bounds: Sequence[Any]) -> tuple[Any, Any, Any]:
        """The grid for the shapes of these inputs, whose sizes are integers or TensorRT's symbolic expressions."""
        batch, heads, tokens, _ = query
        return tokens // self.queries + (q_bounds[2] - 1), heads, batch


def attention_kernel(inputs: Mapping[str, Kind | None], *, scale: float, gpu: int) -> AttentionKernel:
    """Compile the kernel of a node.

    Args:
        inputs: type and sizes of each input of the node, by its name in `standard.INPUTS`; None, or no entry, for
            one that the node does not have. The size of the batch is None where it is free.
        scale: the factor of the scores.
        gpu: one of `GPUS`.

    Raises:
        OptionError: an input or the GPU is none of those that the kernel takes.
    """
    kinds = _checked(inputs, gpu)
    tiles = _tiles(kinds, gpu)
    constants = kernel_constants(kinds, scale, tiles)
    kernel: Any = attention_plugin_kernel
    types: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(kernel.arg_names):
        if (kind := kinds.get(name)) is not None:
            types[name], hints[(place,)] = f"*{_TYPES[kind.dtype]}", [["tt.divisibility", 16]]
        else:
            types[name], values[(place,)] = "constexpr", constants.get(name)
    built = triton.compile(
        ASTSource(kernel, types, values, hints),
        target=GPUTarget("cuda", gpu, 32),
        options={
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages if "kv_order" not in kinds else 2 * tiles.num_stages - 1,
        },
    )
    return AttentionKernel(
        name=built.metadata.name,
        ptx=_with_parameters(built.asm["ptx"], len(kinds)),
        parameters=tuple(kinds),
        threads=built.metadata.num_warps * 32,
        shared=built.metadata.shared,
        queries=tiles.block_m,
    )


def kernel_constants(kinds: Mapping[str, Kind], scale: float, tiles: configs.Config) -> dict[str, Any]:
    """The constants of `attention_plugin_kernel`. `kinds`: of all tensors, with `out` and `lse`."""
    query, key, value = (kinds[name] for name in INPUTS[:3])
    strides = {f"{name}_strides".upper(): _strides(kinds.get(name), name) for name in (*INPUTS, *OUTPUTS)}
    head_dim, value_dim = cast(int, query.shape[3]), cast(int, value.shape[3])
    return {
        **strides,
        "Q_BLOCKS": kinds["kv_indices"].shape[2],
        "GROUP": cast(int, query.shape[1]) // cast(int, key.shape[1]),
        "SCALE": scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "CHUNK": tiles.chunk,
        "ALIGN": math.gcd(16, *(query.dtype.itemsize * width for width in (head_dim, value_dim))),
    }


def _checked(inputs: Mapping[str, Kind | None], gpu: int) -> dict[str, Kind]:
    """The tensors of the kernel, in order: the inputs that the node has, and the outputs."""
    if gpu not in GPUS:
        raise OptionError(f"gpu must be one of {', '.join(map(str, GPUS))}, got {gpu!r}")
    kinds = {name: kind for name in INPUTS if (kind := inputs.get(name)) is not None}
    optional = ("q_order", "kv_order", "key_bias")
    if missing := [name for name in INPUTS if name not in kinds and name not in optional]:
        raise OptionError(f"the kernel needs the input {missing[0]}, got {', '.join(kinds) or 'nothing'}")
    for name, kind in kinds.items():
        wanted = (
            (torch.float16, torch.bfloat16, torch.float32)
            if name in INPUTS[:3]
            else (torch.float32 if name == "key_bias" else torch.int32,)
        )
        if kind.dtype not in wanted or any(size is None for size in kind.shape[1:]):
            types = " or ".join(str(one)[6:] for one in wanted)
            raise OptionError(f"input {name} must be {types}, with all sizes but the batch known, got {kind}")
    rows = tuple(kinds["query"].shape[:3])
    out = Kind(kinds["query"].dtype, (*rows, kinds["value"].shape[3]))
    return {**kinds, "out": out, "lse": Kind(torch.float32, rows)}


def _tiles(kinds: Mapping[str, Kind], gpu: int) -> configs.Config:
    """The tiles of `kernels.triton.configs`, without launches of their own for the last tiles of blocks."""
    query, key, value = (
        torch.empty([size or 1 for size in kinds[name].shape], dtype=kinds[name].dtype, device="meta")
        for name in INPUTS[:3]
    )
    widest = configs.width(max(query.shape[3], value.shape[3]))
    if query.dtype == torch.float32:
        return configs.SINGLE[widest]
    q_blocks, kv_blocks = (cast(int, kinds[name].shape[2]) - 1 for name in ("q_bounds", "kv_bounds"))
    short = query.shape[2] < configs.SHORT_QUERIES * q_blocks or key.shape[2] < configs.SHORT_KEYS * kv_blocks
    return replace(configs.HALF[configs.row(gpu // 10), widest][short], tails=())


def _strides(kind: Kind | None, name: str) -> tuple[int, ...]:
    """Strides of a contiguous tensor in elements; 0 where the batch or the heads of a table are shared."""
    if kind is None:
        return (0, 0)
    sizes = [1 if size is None else size for size in kind.shape]
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    shared = name not in (*INPUTS[:3], *OUTPUTS)
    return tuple(
        0 if shared and place < 2 and kind.shape[place] == 1 else stride
        for place, stride in enumerate(strides)
    )


def _with_parameters(ptx: str, count: int) -> str:
    """PTX whose entry has the first `count` parameters only. The others are memory that Triton's own launcher gives
    to kernels that ask for it; this one does not."""
    found = re.search(r"\.entry (\w+)\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    assert found is not None
    name, every = found.group(1), found.group(2).split(",")
    for place in range(count, len(every)):
        assert f"[{name}_param_{place}]" not in ptx, "a parameter of Triton's launcher is read"
    return ptx[: found.start(2)] + ",".join(every[:count]) + ptx[found.end(2) :]


@triton.jit
def attention_plugin_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    q_bounds,
    kv_bounds,
    kv_num_blocks,
    kv_indices,
    q_order,
    kv_order,
    key_bias,
    out,
    lse,
    QUERY_STRIDES: tl.constexpr,
    KEY_STRIDES: tl.constexpr,
    VALUE_STRIDES: tl.constexpr,
    Q_BOUNDS_STRIDES: tl.constexpr,
    KV_BOUNDS_STRIDES: tl.constexpr,
    KV_NUM_BLOCKS_STRIDES: tl.constexpr,
    KV_INDICES_STRIDES: tl.constexpr,
    Q_ORDER_STRIDES: tl.constexpr,
    KV_ORDER_STRIDES: tl.constexpr,
    KEY_BIAS_STRIDES: tl.constexpr,
    OUT_STRIDES: tl.constexpr,
    LSE_STRIDES: tl.constexpr,
    Q_BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Grid: [tiles, H, B]. `block_sparse_attention_kernel` with the outputs last, and numbers as constants."""
    block_sparse_attention_kernel(
        query,
        key,
        value,
        out,
        lse,
        q_bounds,
        kv_bounds,
        kv_num_blocks,
        kv_indices,
        q_order,
        kv_order,
        key_bias,
        QUERY_STRIDES,
        KEY_STRIDES,
        VALUE_STRIDES,
        OUT_STRIDES,
        LSE_STRIDES,
        Q_BOUNDS_STRIDES,
        KV_BOUNDS_STRIDES,
        KV_NUM_BLOCKS_STRIDES,
        KV_INDICES_STRIDES,
        Q_ORDER_STRIDES,
        KV_ORDER_STRIDES,
        KEY_BIAS_STRIDES,
        Q_BLOCKS,
        GROUP,
        SCALE,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_M,
        BLOCK_N,
        CHUNK,
        ALIGN,
        0,
        0,
    )
