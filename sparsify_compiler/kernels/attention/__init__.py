"""The op `sparsify::block_sparse_attention`: schema, fake, autograd, autocast.

This file imports only torch. A provider's kernels are imported when the op first runs on it.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import providers
from sparsify_compiler.kernels.statistics import no_second_derivative, wide
from sparsify_compiler.table import BlockTable


class Provider(Protocol):
    """The functions of a provider of attention. They get the tensors of `block_sparse_attention`, checked."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: BlockTable,
        key_bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), in the layout of `empty_outputs`."""

    def backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor,
        out: Tensor,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: BlockTable,
        key_bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, in the layout of `empty_gradients`."""


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention in which each query block reads the key blocks that its row of `table` lists.

    Args:
        query: [B, H, Sq, D] fp32, fp16, bf16 (reference: also fp64), any strides.
        key: [B, Hkv, Sk, D], H a multiple of Hkv; query head h reads key head h * Hkv // H.
        value: [B, Hkv, Sk, Dv].
        table: the keys that are read; its B and H are 1 or those of `query`.
        key_bias: [B|1, H|1, Sk] float, added to the scaled scores; -inf hides a key. No gradient flows to it.
        scale: factor on the scores, 1/sqrt(D) if None.
        provider: `reference`, `cpu`, `triton`, or `auto` for the fastest that runs on these tensors.

    Returns:
        out: [B, H, Sq, Dv] in the dtype of `query`, laid out in memory as [B, Sq, H, Dv].
        lse: [B, H, Sq] fp32 (fp64 for fp64 input), the log-sum-exp of the scores read. Where a query reads no key,
            or only hidden keys, lse is -inf and its row of `out` is 0.

    Raises:
        OperandError: shapes, dtypes or devices do not fit together.
        ProviderError: the requested provider cannot run on these tensors.
    """
    query, key, value = cast(query, key, value)
    check(query, key, value, table, key_bias)
    name = providers.choose(
        provider,
        device=query.device.type,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
    ).name
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return torch.ops.sparsify.block_sparse_attention(
        query, key, value, *table.tensors().values(), key_bias, scale, name
    )


AUTOCAST = ("cpu", "cuda")
"""Devices whose autocast the op follows."""


@custom_op("sparsify::block_sparse_attention")
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_bounds: Tensor,
    kv_bounds: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_order: Tensor | None,
    kv_order: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    table = BlockTable.of(q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order)
    check(query, key, value, table, key_bias)
    check_values(query, key, table, provider)
    return providers.load(provider, "attention").forward(query, key, value, table, key_bias, scale)


@_op.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, key_bias, _, _ = rest
    check(query, key, value, BlockTable.of(*tensors), key_bias)
    return empty_outputs(query, value)


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse) of the op: every provider returns exactly this layout."""
    batch, heads, tokens, _ = query.shape
    out = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, tokens, dtype=wide(query.dtype))


@custom_op("sparsify::block_sparse_attention_backward")
def _backward_op(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_bounds: Tensor,
    kv_bounds: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_order: Tensor | None,
    kv_order: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    table = BlockTable.of(q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order)
    _check_backward(grad_out, grad_lse, out, lse, query, key, value, table, key_bias)
    check_values(query, key, table, provider)
    return providers.load(provider, "attention").backward(
        grad_out, grad_lse, out, lse, query, key, value, table, key_bias, scale
    )


@_backward_op.register_fake
def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, key_bias, _, _ = rest
    _check_backward(grad_out, grad_lse, out, lse, query, key, value, BlockTable.of(*tensors), key_bias)
    return empty_gradients(query, key, value)


def _check_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    key_bias: Tensor | None,
) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    check(query, key, value, table, key_bias)
    rows, dtype = tuple(query.shape[:3]), query.dtype
    check_exactly(
        query.device,
        ("grad_out", grad_out, (*rows, value.shape[3]), dtype),
        ("grad_lse", grad_lse, rows, wide(dtype)),
        ("out", out, (*rows, value.shape[3]), dtype),
        ("lse", lse, rows, wide(dtype)),
    )


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of the op, contiguous: every provider returns exactly this layout."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_backward_op.register_autograd(no_second_derivative)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.provider = inputs
    if ctx.needs_input_grad[9]:
        raise OperandError("key_bias must not need a gradient: detach it, or leave this attention dense")
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.sparsify.block_sparse_attention_backward(
        grad_out, grad_lse, *ctx.saved_tensors, ctx.scale, ctx.provider
    )
    return (*grads, *[None] * 9)


_op.register_autograd(_backward, setup_context=_setup_context)


def _autocast(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The op under autocast: cast, then call it with autocast off."""
    inputs = cast(query, key, value)
    with torch.amp.autocast(query.device.type, enabled=False):
        return torch.ops.sparsify.block_sparse_attention(*inputs, *rest)


def cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast inputs as autocast does for SDPA, where it is on: to its lower-precision type, except fp64."""
    device = query.device.type
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)

    def lower(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return lower(query), lower(key), lower(value)


_library = torch.library.Library("sparsify", "FRAGMENT")  # kept alive: freeing it would unregister the op
for _device in AUTOCAST:
    _library.impl("block_sparse_attention", _autocast, f"Autocast{_device.upper()}")


def check(query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    q, k, v, dtype, device = query.shape, key.shape, value.shape, query.dtype, query.device
    for name, shape in (("query", q), ("key", k), ("value", v)):
        if len(shape) != 4:
            raise OperandError(f"{name} must have shape [B, H, S, D], got {tuple(shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype or tensor.device != device:
            raise OperandError(
                f"query, key and value must agree in dtype and device, got query {dtype} on {device}, "
                f"{name} {tensor.dtype} on {tensor.device}"
            )
    batch, heads, _, head_dim = q
    kv_heads, kv_tokens = k[1], k[2]
    if k[0] != batch or k[3] != head_dim or v[:3] != k[:3]:
        raise OperandError(
            "key must be [B, Hkv, Sk, D] and value [B, Hkv, Sk, Dv] for query [B, H, Sq, D], got "
            f"query {tuple(q)}, key {tuple(k)}, value {tuple(v)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise OperandError(f"query heads must be a multiple of key heads, got {heads} and {kv_heads}")
    _check_table(table, q, kv_tokens, device)
    if key_bias is not None:
        shape = key_bias.shape
        fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] == kv_tokens
        if not fits:
            raise OperandError(
                f"key_bias must be [1 or {batch}, 1 or {heads}, {kv_tokens}], got {tuple(shape)}"
            )
        if not key_bias.is_floating_point():
            raise OperandError(f"key_bias must be a float tensor (-inf hides a key), got {key_bias.dtype}")
        if key_bias.device != device:
            raise OperandError(f"key_bias must be on {device}, got {key_bias.device}")


def _check_table(table: BlockTable, query: Sequence[int], kv_tokens: int, device: torch.device) -> None:
    """Raise OperandError unless a table has the shapes, dtypes and device for a query of shape [B, H, Sq, D]."""
    batch, heads, q_tokens, _ = query
    *_, blocks, width = (0, 0, *table.kv_indices.shape)
    expected = (
        ("q_bounds", (blocks + 1,)),
        ("kv_bounds", None),
        ("kv_num_blocks", (blocks,)),
        ("kv_indices", (blocks, width)),
        ("q_order", (q_tokens,)),
        ("kv_order", (kv_tokens,)),
    )
    for name, end in expected:
        tensor = getattr(table, name)
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.device != device:
            raise OperandError(
                f"table.{name} must be int32 on {device}, got {tensor.dtype} on {tensor.device}"
            )
        shape = tensor.shape
        if len(shape) < 2 or shape[0] not in (1, batch) or shape[1] not in (1, heads):
            raise OperandError(
                f"table.{name} must begin with [1 or {batch}, 1 or {heads}], got {tuple(shape)}"
            )
        if len(shape) != 3 or shape[2] == 0 if end is None else shape[2:] != end:
            wanted = "(1 or more,)" if end is None else end
            raise OperandError(f"table.{name} must end with {wanted}, got {tuple(shape)}")


def check_values(query: Tensor, key: Tensor, table: BlockTable, provider: str) -> None:
    """Raise OperandError for a table of other tokens, unless the provider checks it or a GPU would have to wait."""
    if providers.checks_values(provider, query.device):
        table.check(query.shape[2], key.shape[2])


def check_exactly(device: torch.device, *expected: tuple[str, Tensor, tuple[int, ...], torch.dtype]) -> None:
    """Raise OperandError unless each of (name, tensor, shape, dtype) has exactly this shape, dtype and device."""
    for name, tensor, shape, dtype in expected:
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            raise OperandError(
                f"{name} must be {dtype} {shape} on {device}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
