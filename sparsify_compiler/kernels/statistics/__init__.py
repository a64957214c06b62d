"""Ops on the blocks of a table.

    sparsify::block_means         tokens -> means of blocks
    sparsify::block_statistics    keys and values -> moments of blocks
    sparsify::pairs_read          a table -> the number of query-key pairs of each row
    sparsify::keys_left           rows of single keys -> the keys of blocks that each row does not list

A far field (`kernels/far_field`) approximates blocks that are not read by these statistics. This file imports only
torch. A provider's kernels are imported when an op first runs on it. Statistics are fp32 (fp64 for fp64 input),
also under autocast.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import providers
from sparsify_compiler.table import check_blocks

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""(log_weight, key_mean, value_mean, key_variance, value_variance, covariance), see `block_statistics`."""


class Provider(Protocol):
    """The functions of a provider of statistics. They get the tensors of the ops, checked."""

    def block_means(self, tokens: Tensor, bounds: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mean, mean_square), in the layout of `empty_means`."""

    def block_statistics(
        self,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        order: Tensor | None,
        key_bias: Tensor | None,
        covariance: bool,
    ) -> Statistics:
        """The statistics, in the layout of `empty_statistics`."""

    def pairs_read(
        self, q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor
    ) -> Tensor:
        """See `pairs_read`."""

    def keys_left(self, keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor) -> Tensor:
        """See `keys_left`."""


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The gradient of an op that computes gradients."""
    raise OperandError("sparse attention has no second derivative: leave this attention dense")


def block_means(
    tokens: Tensor, bounds: Tensor, order: Tensor | None, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The mean of each block, and the mean of its squares.

    Args:
        tokens: [B, H, S, D] fp32, fp16, bf16 (reference: also fp64), any strides.
        bounds: [B|1, H|1, N+1] int32, as `BlockTable.q_bounds`.
        order: [B|1, H|1, S] int32, as `BlockTable.q_order`, or None.
        provider: as in `attention.block_sparse_attention`.

    Returns:
        mean: [B, H, N, D] fp32 (fp64 for fp64 input), the mean token; 0 for an empty block.
        mean_square: [B, H, N, D] in the same dtype, the mean of the squares. No gradient flows through it.
    """
    _check_means(tokens, bounds, order)
    return torch.ops.sparsify.block_means(tokens, bounds, order, _choose(provider, tokens, tokens))


def block_statistics(
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    *,
    covariance: bool,
    provider: str = "auto",
) -> Statistics:
    """Weight, means and centred second moments of the keys and values of each block.

    A key has the weight w = exp(its bias), 1 without a bias; E is the mean over a block under w. A key of weight 0
    does not count, even if it is not finite.

    Args:
        key: [B, Hkv, S, D] fp32, fp16, bf16 (reference: also fp64), any strides.
        value: [B, Hkv, S, Dv].
        bounds: [B|1, H|1, N+1] int32, as `BlockTable.kv_bounds`; H is a multiple of Hkv.
        order: [B|1, H|1, S] int32, as `BlockTable.kv_order`, or None.
        key_bias: [B|1, H|1, S] float, as for `attention.block_sparse_attention`, or None. No gradient flows to it.
        covariance: whether to compute second moments; if not, the last three results are empty.
        provider: as in `attention.block_sparse_attention`.

    Returns:
        All fp32 (fp64 for fp64 input), for G heads: those of bounds, order and key_bias, or Hkv if these are
        shared. Head g reads key head g * Hkv // G.

        log_weight: [B, G, N], log of the sum of w. If all keys have weight 0, it is -inf and all others are 0.
        key_mean: [B, G, N, D], E k.
        value_mean: [B, G, N, Dv], E v.
        key_variance: [B, G, N, D], E (k - E k)².
        value_variance: [B, G, N, Dv], E (v - E v)².
        covariance: [B, G, N, D, Dv], E (k - E k) (v - E v)ᵀ. It is the largest result, and products read it in the
            dtype of the key. So off the CPU it has that dtype, clamped to its range.
    """
    _check_statistics(key, value, bounds, order, key_bias)
    return torch.ops.sparsify.block_statistics(
        key, value, bounds, order, key_bias, covariance, _choose(provider, key, value)
    )


def pairs_read(
    q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, *, provider: str = "auto"
) -> Tensor:
    """The number of query-key pairs that each row of a table reads. Takes no memory for the listed blocks.

    Args:
        q_bounds, kv_bounds, kv_num_blocks, kv_indices: as in `BlockTable`.
        provider: as in `attention.block_sparse_attention`.

    Returns:
        [B|1, H|1, Nq] int64.
    """
    return _counted("pairs_read", q_bounds, kv_bounds, kv_num_blocks, kv_indices, provider=provider)


def keys_left(
    keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor, *, provider: str = "auto"
) -> Tensor:
    """The number of keys of each block that a row of single keys does not list.

    Args:
        keys: [B|1, H|1, N] int32, the number of keys of each block.
        block_of_key: [V] int32, each in 0..N-1.
        counts: [B, H, Nq] int32, the number of keys that each row lists.
        indices: [B, H, Nq, W] int32, these keys, each in 0..V-1; the rest of a row is ignored.
        provider: as in `attention.block_sparse_attention`.

    Returns:
        [B, H, Nq, N] int32, `keys` without the listed keys.
    """
    return _counted("keys_left", keys, block_of_key, counts, indices, provider=provider)


def _counted(name: str, *tensors: Tensor, provider: str) -> Tensor:
    """The result of an op that counts. While a model is exported, in plain torch: the library of exported programs
    lacks these ops."""
    device = tensors[0].device.type
    provider = providers.choose(provider, device=device, dtype=torch.float32, head_dim=1, value_dim=1).name
    if torch.compiler.is_exporting():
        return getattr(providers.load("reference", "statistics"), name)(*tensors)
    return getattr(torch.ops.sparsify, name)(*tensors, provider)


@custom_op("sparsify::pairs_read")
def _pairs_op(
    q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, provider: str
) -> Tensor:
    _check_pairs(q_bounds, kv_bounds, kv_num_blocks, kv_indices)
    return providers.load(provider, "statistics").pairs_read(q_bounds, kv_bounds, kv_num_blocks, kv_indices)


@_pairs_op.register_fake
def _pairs_fake(
    q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, _: Any
) -> Tensor:
    _check_pairs(q_bounds, kv_bounds, kv_num_blocks, kv_indices)
    return empty_pairs(q_bounds, kv_bounds, kv_num_blocks, kv_indices)


def empty_pairs(q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor) -> Tensor:
    """The uninitialised result of `pairs_read`."""
    lead = torch.broadcast_shapes(*(t.shape[:2] for t in (q_bounds, kv_bounds, kv_num_blocks, kv_indices)))
    return kv_indices.new_empty(*lead, kv_indices.shape[2], dtype=torch.int64)


@custom_op("sparsify::keys_left")
def _left_op(keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor, provider: str) -> Tensor:
    _check_left(keys, block_of_key, counts, indices)
    return providers.load(provider, "statistics").keys_left(keys, block_of_key, counts, indices)


@_left_op.register_fake
def _left_fake(keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor, _: Any) -> Tensor:
    _check_left(keys, block_of_key, counts, indices)
    return empty_left(keys, counts)


def empty_left(keys: Tensor, counts: Tensor) -> Tensor:
    """The uninitialised result of `keys_left`."""
    return counts.new_empty(*counts.shape, keys.shape[-1])


@custom_op("sparsify::block_means")
def _means_op(tokens: Tensor, bounds: Tensor, order: Tensor | None, provider: str) -> tuple[Tensor, Tensor]:
    _check_means(tokens, bounds, order)
    if providers.checks_values(provider, tokens.device):
        check_blocks("", bounds, order, tokens.shape[2])
    return providers.load(provider, "statistics").block_means(tokens, bounds, order)


@_means_op.register_fake
def _means_fake(tokens: Tensor, bounds: Tensor, order: Tensor | None, _: Any) -> tuple[Tensor, Tensor]:
    _check_means(tokens, bounds, order)
    return empty_means(tokens, bounds)


def empty_means(tokens: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised results of `block_means`."""
    shape = (*tokens.shape[:2], bounds.shape[-1] - 1, tokens.shape[-1])
    return tokens.new_empty(shape, dtype=wide(tokens.dtype)), tokens.new_empty(
        shape, dtype=wide(tokens.dtype)
    )


@custom_op("sparsify::block_statistics")
def _statistics_op(
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    covariance: bool,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_statistics(key, value, bounds, order, key_bias)
    if providers.checks_values(provider, key.device):
        check_blocks("", bounds, order, key.shape[2])
    module = providers.load(provider, "statistics")
    return module.block_statistics(key, value, bounds, order, key_bias, covariance)


@_statistics_op.register_fake
def _statistics_fake(
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    covariance: bool,
    _: Any,
) -> Statistics:
    _check_statistics(key, value, bounds, order, key_bias)
    return empty_statistics(key, value, bounds, order, key_bias, covariance)


def empty_statistics(
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
    covariance: bool,
) -> Statistics:
    """Uninitialised results of `block_statistics`: every provider returns exactly this layout."""
    lead = key.shape[0], heads_of_statistics(key, bounds, order, key_bias), bounds.shape[-1] - 1
    head_dim, value_dim = key.shape[-1], value.shape[-1]

    def empty(*shape: int) -> Tensor:
        return key.new_empty(shape, dtype=wide(key.dtype))

    return (
        empty(*lead),
        empty(*lead, head_dim),
        empty(*lead, value_dim),
        empty(*lead, head_dim) if covariance else empty(0),
        empty(*lead, value_dim) if covariance else empty(0),
        key.new_empty(
            (*lead, head_dim, value_dim) if covariance else (0,),
            dtype=wide(key.dtype) if key.device.type == "cpu" else key.dtype,
        ),
    )


@custom_op("sparsify::block_means_backward")
def _means_backward_op(grad: Tensor, tokens: Tensor, bounds: Tensor, order: Tensor | None) -> Tensor:
    from sparsify_compiler.kernels.statistics import reference

    return reference.block_means_backward(grad, tokens, bounds, order)


@_means_backward_op.register_fake
def _means_backward_fake(grad: Tensor, tokens: Tensor, *_: Any) -> Tensor:
    return tokens.new_empty(tokens.shape)


_means_backward_op.register_autograd(no_second_derivative)


def _means_setup(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3])


def _means_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    return torch.ops.sparsify.block_means_backward(grad, *ctx.saved_tensors), None, None, None


_means_op.register_autograd(_means_backward, setup_context=_means_setup)


@custom_op("sparsify::block_statistics_backward")
def _statistics_backward_op(
    grad_key_mean: Tensor,
    grad_value_mean: Tensor,
    grad_key_variance: Tensor,
    grad_value_variance: Tensor,
    grad_covariance: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    order: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from sparsify_compiler.kernels.statistics import reference

    return reference.block_statistics_backward(
        grad_key_mean,
        grad_value_mean,
        grad_key_variance,
        grad_value_variance,
        grad_covariance,
        key,
        value,
        bounds,
        order,
        key_bias,
    )


@_statistics_backward_op.register_fake
def _statistics_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    key, value = arguments[5:7]
    return key.new_empty(key.shape), value.new_empty(value.shape)


_statistics_backward_op.register_autograd(no_second_derivative)


def _statistics_setup(ctx: Any, inputs: Sequence[Any], output: Statistics) -> None:
    if ctx.needs_input_grad[4]:
        raise OperandError("key_bias must not need a gradient: detach it, or leave this attention dense")
    ctx.save_for_backward(*inputs[:5])


def _statistics_backward(ctx: Any, _: Tensor, *grads: Tensor) -> tuple[Any, ...]:
    # log_weight depends only on the bias, so its gradient ends here.
    found = torch.ops.sparsify.block_statistics_backward(*grads, *ctx.saved_tensors)
    return (*found, *[None] * 5)


_statistics_op.register_autograd(_statistics_backward, setup_context=_statistics_setup)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of lse, for tensors of a given dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def heads_of_statistics(key: Tensor, bounds: Tensor, order: Tensor | None, key_bias: Tensor | None) -> int:
    """The number of heads with their own blocks or weights; the heads of `key` if all are shared."""
    for tensor in (bounds, order, key_bias):
        if tensor is not None and tensor.shape[1] != 1:
            return tensor.shape[1]
    return key.shape[1]


def _choose(provider: str, tokens: Tensor, others: Tensor) -> str:
    return providers.choose(
        provider,
        device=tokens.device.type,
        dtype=tokens.dtype,
        head_dim=tokens.shape[-1],
        value_dim=others.shape[-1],
    ).name


def _check_tokens(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise OperandError(f"{name} must have shape [B, H, S, D], got {tuple(tensor.shape)}")


def _check_pairs(q_bounds: Tensor, kv_bounds: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    tensors = q_bounds, kv_bounds, kv_num_blocks, kv_indices
    lead = [max(sizes) for sizes in zip(*(t.shape[:2] for t in tensors), strict=True)]
    rows, width = kv_indices.shape[2:] if kv_indices.dim() == 4 else (0, 0)
    blocks = kv_bounds.shape[-1]
    shapes = (*lead, rows + 1), (*lead, blocks), (*lead, rows), (*lead, rows, width)
    names = "q_bounds", "kv_bounds", "kv_num_blocks", "kv_indices"
    _check_integers(dict(zip(names, zip(tensors, shapes, strict=True), strict=True)))


def _check_left(keys: Tensor, block_of_key: Tensor, counts: Tensor, indices: Tensor) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    lead, width = counts.shape[:2], indices.shape[-1]
    _check_integers(
        {
            "counts": (counts, (*lead, counts.shape[-1])),
            "keys": (keys, (*lead, keys.shape[-1])),
            "block_of_key": (block_of_key, (block_of_key.shape[-1],)),
        }
    )
    _check_integers(
        {"indices": (indices, (*counts.shape, width)), "counts": (counts, counts.shape)}, shared=0
    )


def _check_integers(expected: dict[str, tuple[Tensor, tuple[int, ...]]], *, shared: int = 2) -> None:
    """Raise OperandError unless all are int32 of these shapes, on one device. The first `shared` sizes may be 1."""
    device = next(iter(expected.values()))[0].device
    for name, (tensor, shape) in expected.items():
        pairs = list(zip(tensor.shape, shape, strict=False))
        same = all(
            got == size or (got == 1 and place < shared and len(shape) > 1)
            for place, (got, size) in enumerate(pairs)
        )
        if tensor.dim() != len(shape) or not same or tensor.dtype != torch.int32 or tensor.device != device:
            raise OperandError(
                f"{name} must be int32 {list(shape)} on {device}, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )


def _check_means(tokens: Tensor, bounds: Tensor, order: Tensor | None) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    _check_tokens("tokens", tokens)
    check_block_shapes(tokens, tokens.shape[1], bounds, order)


def _check_statistics(
    key: Tensor, value: Tensor, bounds: Tensor, order: Tensor | None, key_bias: Tensor | None
) -> None:
    """Raise OperandError for shapes, dtypes and devices that do not fit together. Reads no value."""
    for name, tensor in (("key", key), ("value", value)):
        _check_tokens(name, tensor)
    if key.shape[:3] != value.shape[:3] or key.dtype != value.dtype or key.device != value.device:
        raise OperandError(
            "key [B, Hkv, S, D] and value [B, Hkv, S, Dv] must agree in batch, heads, tokens, dtype and device, "
            f"got key {tuple(key.shape)} {key.dtype} on {key.device}, "
            f"value {tuple(value.shape)} {value.dtype} on {value.device}"
        )
    heads = heads_of_statistics(key, bounds, order, key_bias)
    check_block_shapes(key, heads, bounds, order)
    if key_bias is not None:
        _check_lead("key_bias", key_bias, key, heads, key.shape[2])
        if not key_bias.is_floating_point():
            raise OperandError(f"key_bias must be a float tensor (-inf hides a key), got {key_bias.dtype}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise OperandError(
            f"heads of a table must be a multiple of key heads, got {heads} and {key.shape[1]}"
        )


def check_block_shapes(
    tokens: Tensor, heads: int, bounds: Tensor, order: Tensor | None, prefix: str = ""
) -> None:
    """Raise OperandError unless blocks have the shapes, dtypes and device that fit tokens [B, H, S, D]."""
    _check_lead(f"{prefix}bounds", bounds, tokens, heads)
    if order is not None:
        _check_lead(f"{prefix}order", order, tokens, heads, tokens.shape[2])
    for name, tensor in (("bounds", bounds), ("order", order)):
        if tensor is not None and tensor.dtype != torch.int32:
            raise OperandError(f"{prefix}{name} must be int32, got {tensor.dtype}")


def _check_lead(name: str, tensor: Tensor, tokens: Tensor, heads: int, last: int | None = None) -> None:
    """Raise OperandError unless a tensor is [B|1, H|1, last] on the device of the tokens."""
    shape, batch = tuple(tensor.shape), tokens.shape[0]
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, heads)
    if not fits or (shape[2] == 0 if last is None else shape[2] != last):
        end = "blocks + 1" if last is None else last
        raise OperandError(f"{name} must be [1 or {batch}, 1 or {heads}, {end}], got {shape}")
    if tensor.device != tokens.device:
        raise OperandError(f"{name} must be on {tokens.device}, got {tensor.device}")
