"""Oracles: definitions that share no code with the package.

The error bound of a kernel test: the kernel's distance to float64 attention may be at most `SLACK` times that of
plain low-precision attention on the same inputs, plus a floor for inputs on which eager is exact by chance.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sparsify_compiler.table import BlockTable

SLACK = 2.0
"""Kernels add in another order than eager, so rounding errors differ, but their size is the same."""

FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Two units in the last place of an output near 1 (for fp32, of a sum of some hundred terms)."""


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense attention under a boolean mask, written out: (out [B,H,Sq,Dv], lse [B,H,Sq]) in `dtype`.

    A row without visible keys is 0, with lse -inf. `mask` broadcasts to [B, H, Sq, Sk].
    """
    weights, lse = _masked_weights(query, key, mask, key_bias=key_bias, scale=scale, dtype=dtype)
    return weights @ value.to(dtype).repeat_interleave(query.shape[1] // value.shape[1], 1), lse


def _masked_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    *,
    key_bias: Tensor | None,
    scale: float | None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """(weights [B,H,Sq,Sk], lse [B,H,Sq]) of `masked_attention`."""
    q, k = query.to(dtype), key.to(dtype)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        scores = scores + key_bias.to(dtype)[:, :, None, :]
    scores = scores.masked_fill(~mask, -torch.inf)
    # Rows without visible keys are masked out, so that their gradient is 0 and not NaN.
    blind = (scores == -torch.inf).all(-1)
    scores = scores.masked_fill(blind[..., None], 0.0)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(blind[..., None], 0.0)
    return weights.to(dtype), lse.masked_fill(blind, -torch.inf)


def far_field_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far_field: str,
    *,
    cubes: list[list[int]] | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64 of near keys and approximated blocks, query by query from the formulas, without guard.

    Args:
        cubes: tokens of each block that approximates its unread keys; if None, the blocks of the table do.
    """
    q, k, v = query.double(), key.double(), value.double()
    batch, heads, q_tokens, head_dim = q.shape
    s = head_dim**-0.5 if scale is None else scale
    out = q.new_zeros(batch, heads, q_tokens, v.shape[-1])
    lse = q.new_full((batch, heads, q_tokens), -torch.inf)
    for b, h in itertools.product(range(batch), range(heads)):
        square = (q[b, h] ** 2).mean(0)
        kv_head = h * k.shape[1] // heads
        keys, values = k[b, kv_head], v[b, kv_head]
        rows, columns, listed = _blocks_of(table, b, h, q_tokens, k.shape[2])
        bias, columns, groups = _groups(keys, values, columns, key_bias, b, h)
        blocks = columns
        if cubes is not None:
            _, blocks, groups = _groups(keys, values, cubes, key_bias, b, h)
        for row, near in zip(rows, listed, strict=True):
            near_tokens = [t for j in near for t in columns[j]]
            left = {j: [t for t in blocks[j] if t not in near_tokens] for j in groups}
            far = [j for j in groups if left[j]]
            weight = {j: math.log(len(left[j]) / len(blocks[j])) for j in far}

            def far_scores(
                x: Tensor,
                weight: dict[int, float] = weight,
                groups: dict[int, Any] = groups,
                square: Tensor = square,
            ) -> Tensor:
                scores = []
                for j, share in weight.items():
                    log_weight, mean, _, variance, _, _ = groups[j]
                    score = s * x.dot(mean) + log_weight + share
                    if far_field == "linear":
                        score = score + (s * s / 2 * square.dot(variance)).clamp(max=0.5).detach()
                    scores.append(score)
                return torch.stack(scores)

            slope = torch.zeros(head_dim, v.shape[-1], dtype=torch.float64)
            limit = torch.zeros(v.shape[-1], dtype=torch.float64)
            if far and row and far_field == "linear":
                shares = far_scores(q[b, h, row].mean(0)).softmax(0)
                slope = sum((p * groups[j][5] for p, j in zip(shares, far, strict=True)), slope)
                limit = sum((p * groups[j][4] for p, j in zip(shares, far, strict=True)), limit)
            for t in row:
                x = q[b, h, t]
                scores = [s * x.dot(keys[u]) + bias[u] for u in near_tokens]
                answers = [values[u] for u in near_tokens]
                if far_field != "drop" and far:
                    scores += list(far_scores(x))
                    shift = (s * x @ slope).clamp(-limit.sqrt(), limit.sqrt())
                    answers += [groups[j][2] + shift for j in far]
                if scores:
                    stacked = torch.stack(scores)
                    lse[b, h, t] = stacked.logsumexp(0)
                    out[b, h, t] = stacked.softmax(0) @ torch.stack(answers)
    return out, lse


def _blocks_of(
    table: BlockTable, b: int, h: int, q_tokens: int, kv_tokens: int
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """(tokens of each query block, tokens of each key block, key blocks of each row) of one batch and head."""

    def one(tensor: Tensor | None, else_: list[int]) -> Any:
        return else_ if tensor is None else tensor[b % tensor.shape[0], h % tensor.shape[1]].tolist()

    q_order, kv_order = one(table.q_order, list(range(q_tokens))), one(table.kv_order, list(range(kv_tokens)))
    rows = [q_order[x:y] for x, y in itertools.pairwise(one(table.q_bounds, []))]
    columns = [kv_order[x:y] for x, y in itertools.pairwise(one(table.kv_bounds, []))]
    counts = one(table.kv_num_blocks, [])
    listed = [row[:n] for row, n in zip(one(table.kv_indices, []), counts, strict=True)]
    return rows, columns, listed


def gains(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(gain of reading each block of `table`, estimated share of the attention of each block), both [B, H, Nq, N]
    float64, block by block from the formulas."""
    q, k, v = query.double(), key.double(), value.double()
    batch, heads, q_tokens, _ = q.shape
    found = q.new_zeros(batch, heads, table.q_bounds.shape[-1] - 1, table.kv_bounds.shape[-1] - 1)
    attention = torch.zeros_like(found)
    for b in range(batch):
        power = []
        for h in range(heads):
            keys, values = (t[b, h * k.shape[1] // heads] for t in (k, v))
            rows, columns, _ = _blocks_of(table, b, h, q_tokens, k.shape[2])
            _, _, groups = _groups(keys, values, columns, key_bias, b, h)
            square = (q[b, h] ** 2).mean(0)
            squared_norms = 0.0
            for i, row in enumerate(rows):
                if not row or not groups:
                    continue
                scores = torch.stack(
                    [
                        scale * q[b, h, row].mean(0).dot(mean)
                        + log_weight
                        + min(float(scale**2 / 2 * square.dot(variance)), 0.5)
                        for log_weight, mean, _, variance, _, _ in groups.values()
                    ]
                )
                shares = dict(zip(groups, scores.softmax(0), strict=True))
                out = sum(shares[j] * groups[j][2] for j in groups)
                squared_norms += len(row) * float(out.square().sum())
                for j, (_, _, middle, variance, value_variance, _) in groups.items():
                    attention[b, h, i, j] = shares[j]
                    spread = scale**2 * (q[b, h, row] ** 2).mean(0).dot(variance)
                    distance = ((middle - out).square().sum() + value_variance.sum()).sqrt()
                    part = len(columns[j]) / k.shape[2]
                    found[b, h, i, j] = (shares[j] * spread * distance) ** 2 / part
            power.append(squared_norms / q_tokens)
        found[b] /= max(sum(power) / heads, 1e-300)
    return found, attention


def _groups(
    keys: Tensor, values: Tensor, columns: list[list[int]], key_bias: Tensor | None, b: int, h: int
) -> tuple[list[float], list[list[int]], dict[int, Any]]:
    """(bias of each key, visible keys of each block, `_moments` of the blocks with visible keys)."""
    bias = [0.0] * len(keys)
    if key_bias is not None:
        bias = key_bias[b % key_bias.shape[0], h % key_bias.shape[1]].double().tolist()
    seen = [[t for t in block if bias[t] != -math.inf] for block in columns]
    groups = {
        j: _moments(keys[block], values[block], [bias[t] for t in block])
        for j, block in enumerate(seen)
        if block
    }
    return bias, seen, groups


def _moments(
    keys: Tensor, values: Tensor, bias: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log weight, key mean, value mean, key variance, value variance, covariance) of one block's tokens."""
    logs = torch.tensor(bias, dtype=torch.float64)
    w = logs.softmax(0)
    key_mean, value_mean = w @ keys, w @ values
    k, v = keys - key_mean, values - value_mean
    covariance = torch.stack([p * torch.outer(x, y) for p, x, y in zip(w, k, v, strict=True)]).sum(0)
    return logs.logsumexp(0), key_mean, value_mean, w @ (k * k), w @ (v * v), covariance


def assert_close_to_float64(
    out: Tensor,
    lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Assert that `out` and `lse` are as close to float64 attention as eager attention in the inputs' dtype."""
    exact, exact_lse = masked_attention(query, key, value, mask, key_bias=key_bias, scale=scale)
    eager, eager_lse = masked_attention(
        query, key, value, mask, key_bias=key_bias, scale=scale, dtype=query.dtype
    )
    floor = FLOOR[query.dtype]
    _assert_within(out, exact, eager, floor)
    if lse is not None:
        _assert_within(lse, exact_lse, eager_lse, floor)


def assert_gradients_close_to_float64(
    gradients: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Assert that gradients of query, key and value are as close to those of float64 attention as autograd's in the
    inputs' dtype. A row without visible keys has gradient 0."""
    sizes = _sizes_of_gradients(
        grad_out.double(), grad_lse.double(), query, key, value, mask, key_bias=key_bias, scale=scale
    )
    expected = []
    for dtype in (torch.float64, query.dtype):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (query, key, value))
        outputs = masked_attention(q, k, v, mask, key_bias=key_bias, scale=scale, dtype=dtype)
        expected.append(torch.autograd.grad(outputs, (q, k, v), (grad_out.to(dtype), grad_lse.to(dtype))))
    for got, exact, eager, size in zip(gradients, *expected, sizes, strict=True):
        _assert_within(got, exact, eager, FLOOR[query.dtype], size)


def _sizes_of_gradients(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    key_bias: Tensor | None,
    scale: float | None,
) -> list[float]:
    """For query, key and value: the largest sum of magnitudes of the terms of a gradient. Rounding is relative to
    this sum. The gradient itself may be small, since weights x grad_out . value and weights x delta cancel."""
    q, k, v = query.detach().double(), key.detach().double(), value.detach().double()
    group = q.shape[1] // k.shape[1]
    v = v.repeat_interleave(group, 1)
    weights, _ = _masked_weights(q, k, mask, key_bias=key_bias, scale=scale)
    delta = (grad_out * (weights @ v)).sum(-1, keepdim=True) - grad_lse[..., None]
    terms = weights * ((grad_out @ v.mT).abs() + delta.abs())
    terms *= q.shape[-1] ** -0.5 if scale is None else scale
    sums = (
        terms @ k.repeat_interleave(group, 1).abs(),
        (terms.mT @ q.abs()).unflatten(1, (-1, group)).sum(2),
        (weights.mT @ grad_out.abs()).unflatten(1, (-1, group)).sum(2),
    )
    return [s.max().item() for s in sums]


def _assert_within(
    got: Tensor, exact: Tensor, eager: Tensor, floor: float, size: float | None = None
) -> None:
    """Assert the error bound. `floor` is relative to `size`, or to the largest element of `exact`."""
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite), "finite where it must not be, or the reverse"
    got64 = got.double()
    # Non-finite entries must agree in kind: an lse of -inf is not +inf.
    assert torch.equal(got64[~finite].nan_to_num(), exact[~finite].nan_to_num())
    if not finite.any():
        return
    error = (got64 - exact)[finite].abs().max().item()
    allowed = (eager.double() - exact)[finite].abs()
    size = exact[finite].abs().max().item() if size is None else size
    bound = SLACK * allowed[allowed.isfinite()].max().item() + floor * (1 + size)
    assert error <= bound, f"error {error:.3e} above the bound {bound:.3e}"


def tile_mask(
    frames: int, reference_frames: int, tokens_per_frame: int, before: int = 0, after: int = 0
) -> Tensor:
    """[S, S] bool: Efficient-vDiT's mask k : F-k, for each token pair from the paper's definition."""
    reference = {-(-i * frames // reference_frames) for i in range(reference_frames)}
    frame: list[int | None] = [None] * before
    frame += [t // tokens_per_frame for t in range(frames * tokens_per_frame)]
    frame += [None] * after
    rows = [
        [i is None or j is None or i == j or i in reference or j in reference for j in frame] for i in frame
    ]
    return torch.tensor(rows, dtype=torch.bool)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((got - exact).abs().max() / exact.abs().max())


class _Attention(TorchFunctionMode):
    """While active, `_attention` runs instead of scaled_dot_product_attention."""

    _attention: Callable[..., Tensor]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)


class MaskedAttention(_Attention):
    """While active, every self-attention over at least `tokens` tokens is dense under the next of the masks.

    Args:
        masks: boolean, broadcast to [B, H, S, S], in the order of the calls; None leaves a call as it is.
    """

    def __init__(self, masks: Iterable[Tensor | None], tokens: int) -> None:
        super().__init__()
        self.masks, self.tokens = iter(masks), tokens

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **others: Any,
    ) -> Tensor:
        is_long = query.shape[-2] == key.shape[-2] >= self.tokens
        if not is_long or (mask := next(self.masks)) is None:
            return scaled_dot_product_attention(query, key, value, attn_mask, *args, **others)
        bias = attn_mask
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros(()).masked_fill(~bias, -torch.inf)
            bias = bias[..., 0, :].expand(query.shape[0], -1, -1)
        return masked_attention(query, key, value, mask, key_bias=bias, dtype=torch.float32)[0]


class TileAttention(_Attention):
    """A mode in which every attention over the whole sequence is dense SDPA under Efficient-vDiT's mask.

    It is the oracle of a whole model without the compiler: run the model eagerly `with TileAttention(...)`.
    Queries are computed frame by frame, so no mask of S x S is needed.
    """

    def __init__(
        self, frames: int, reference_frames: int, tokens_per_frame: int, *, before: int = 0, after: int = 0
    ) -> None:
        super().__init__()
        sees = tile_mask(frames, reference_frames, 1, before=before > 0, after=after > 0)
        sizes = [size for size in [before, *[tokens_per_frame] * frames, after] if size]
        self.sizes, self.rows = sizes, sees.repeat_interleave(torch.tensor(sizes), dim=1)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        tokens = self.rows.shape[1]
        if not query.shape[-2] == key.shape[-2] == tokens:
            return scaled_dot_product_attention(query, key, value, attn_mask, **others)
        assert attn_mask is None or attn_mask.shape[-2] == 1
        parts = []
        for rows, kept in zip(query.split(self.sizes, dim=-2), self.rows.to(query.device), strict=True):
            if attn_mask is None:
                mask = kept
            elif attn_mask.dtype == torch.bool:
                mask = kept & attn_mask
            else:
                mask = attn_mask.masked_fill(~kept, -torch.inf)
            mask = mask.expand(*mask.shape[:-2], rows.shape[-2], tokens)
            parts.append(scaled_dot_product_attention(rows, key, value, mask, **others))
        return torch.cat(parts, dim=-2)
