"""The op that selects single keys by predicted scores, after DSV (arXiv 2502.07590).

    sparsify::top_k_keys    low-rank queries and keys -> the keys that each query group reads

It is a decision, not a differentiable function: inputs are detached, and autocast changes nothing. This file
imports only torch. A provider's kernels are imported when the op first runs on it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import providers
from sparsify_compiler.table import check_bounds


class Provider(Protocol):
    """The function of a provider of prediction. It gets the tensors of `top_k_keys`, checked."""

    def top_k_keys(
        self,
        query: Tensor,
        key: Tensor,
        budget: Tensor,
        q_bounds: Tensor | None,
        key_bias: Tensor | None,
        width: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """(kv_num_blocks, kv_indices), in the layout of `empty_top_k`."""


def top_k_keys(
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    *,
    width: int,
    q_bounds: Tensor | None = None,
    scale: float = 1.0,
    key_bias: Tensor | None = None,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Select the `budget` keys with the highest predicted score for each query group.

    The score of key j for query i is

        scale query_i . key_j + key_bias_j

    It is -inf where the bias is -inf, and the lowest finite number where it is NaN. Without `q_bounds` every
    query is its own group. A group's score for a key is the predicted attention of all its queries together: the
    sum of their softmax over all keys, and -inf where the bias is -inf. So a key that only one query of the group
    needs still has a high score. A group without queries selects nothing.

    A key with score -inf is never selected. At equal scores (-0 equals 0) the key of lower index comes first. The
    scores of all Q x S pairs are never in memory together; the reference holds those of one group.

    Scores are fp32 (reference: fp64 for fp64). Each provider sums the R products in its own order, so scores may
    differ in the last bits, and so may the choice among keys whose scores differ by no more. Where every sum is
    exact, as for small integers, all providers select the same keys.

    Args:
        query: [B, H, Q, R] fp32, fp16, bf16 (reference: also fp64), any strides.
        key: [B, Hkv, S, R] of the same dtype, H a multiple of Hkv; query head h reads key head h * Hkv // H.
        budget: [B|1, H|1] int32 on the device of the query; it is not read back. The number of keys to select for
            each group of a head, clamped to 0 and min(width, S).
        width: W, the length of a row of the result, at least 1; by convention a power of two.
        q_bounds: [G+1] int32 on the device of the query, rising from 0 to Q: group g has the queries q_bounds[g] to
            q_bounds[g + 1] - 1. None: G = Q groups of one query.
        scale: factor on the products.
        key_bias: [B|1, H|1, S] float, or None.
        provider: `reference`, `cpu`, `triton`, or `auto` for the fastest that runs on these tensors.

    Returns:
        kv_num_blocks: [B, H, G] int32, number of selected keys: `budget`, or all keys above -inf if they are fewer.
        kv_indices: [B, H, G, W] int32, the selected keys by rising index, then zeros.

    Raises:
        OperandError: arguments do not fit together.
        ProviderError: the requested provider cannot run on these tensors.
    """
    return torch.ops.sparsify.top_k_keys(
        query.detach(),
        key.detach(),
        budget,
        q_bounds,
        key_bias if key_bias is None else key_bias.detach(),
        int(width),
        float(scale),
        _choose(provider, query),
    )


def _choose(provider: str, query: Tensor) -> str:
    """The name of the provider to run. The op itself raises the error for tensors that no provider takes."""
    dtype = query.dtype if query.is_floating_point() else torch.float32
    rank = query.shape[-1] if query.dim() == 4 else 1
    return providers.choose(
        provider, device=query.device.type, dtype=dtype, head_dim=rank, value_dim=rank
    ).name


@custom_op("sparsify::top_k_keys")
def _top_k_keys(
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    q_bounds: Tensor | None,
    key_bias: Tensor | None,
    width: int,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    _check(query, key, budget, q_bounds, key_bias, width)
    if q_bounds is not None and providers.checks_values(provider, query.device):
        check_bounds("q_bounds", q_bounds, query.shape[2])
    with providers.without_autocast(query.device.type):
        return providers.load(provider, "prediction").top_k_keys(
            query, key, budget, q_bounds, key_bias, width, scale
        )


@_top_k_keys.register_fake
def _top_k_keys_fake(
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    q_bounds: Tensor | None,
    key_bias: Tensor | None,
    width: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    _check(query, key, budget, q_bounds, key_bias, width)
    return empty_top_k(query, q_bounds, width)


def empty_top_k(query: Tensor, q_bounds: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (kv_num_blocks, kv_indices): every provider returns exactly this layout."""
    groups = query.shape[2] if q_bounds is None else q_bounds.shape[0] - 1
    lead = (*query.shape[:2], groups)
    return query.new_empty(lead, dtype=torch.int32), query.new_empty(*lead, width, dtype=torch.int32)


def _check(
    query: Tensor,
    key: Tensor,
    budget: Tensor,
    q_bounds: Tensor | None,
    key_bias: Tensor | None,
    width: int,
) -> None:
    """Raise OperandError for arguments that do not fit together. Reads no value."""
    if query.dim() != 4 or not query.is_floating_point() or query.shape[3] == 0:
        raise OperandError(f"query must be a float tensor [B, H, Q, R] with R >= 1, got {_described(query)}")
    batch, heads, _, rank = query.shape
    fits = key.dim() == 4 and key.shape == (batch, *key.shape[1:3], rank) and key.shape[2] > 0
    if not fits or key.dtype != query.dtype:
        raise OperandError(
            f"key must be {str(query.dtype)[6:]} [{batch}, Hkv, S, {rank}] for query {tuple(query.shape)}, "
            f"with at least one token, got {_described(key)}"
        )
    kv_heads, tokens = key.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise OperandError(f"query heads must be a multiple of key heads, got {heads} and {kv_heads}")
    fits = budget.dim() == 2 and budget.shape[0] in (1, batch) and budget.shape[1] in (1, heads)
    if not fits or budget.dtype != torch.int32:
        raise OperandError(f"budget must be int32 [1 or {batch}, 1 or {heads}], got {_described(budget)}")
    tensors = {"query": query, "key": key, "budget": budget}
    if q_bounds is not None:
        if q_bounds.dim() != 1 or q_bounds.shape[0] == 0 or q_bounds.dtype != torch.int32:
            raise OperandError(f"q_bounds must be int32 [G + 1] or None, got {_described(q_bounds)}")
        tensors["q_bounds"] = q_bounds
    if key_bias is not None:
        shape = tuple(key_bias.shape)
        fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] == tokens
        if not fits or not key_bias.is_floating_point():
            raise OperandError(
                f"key_bias must be a float tensor [1 or {batch}, 1 or {heads}, {tokens}] or None, "
                f"got {_described(key_bias)}"
            )
        tensors["key_bias"] = key_bias
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise OperandError(f"these tensors must be on one device, got {places}")
    if width < 1:
        raise OperandError(f"width must be at least 1, got {width}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} {list(tensor.shape)}"
