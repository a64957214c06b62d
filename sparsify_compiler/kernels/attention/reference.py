"""The attention op, defined in plain torch.

For query block i with key blocks L_i:  S = scale * Q_i K[L_i]ᵀ + bias,  lse = log sum exp S,
out = softmax(S) V[L_i].  Keys outside L_i are never touched, so a non-finite key or value reaches exactly
the rows that read its block. It computes in fp32 (fp64 for fp64 input).
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.table import BlockTable


def forward(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `attention.block_sparse_attention`."""
    q, k, v, bias = _widen(query, key, value, key_bias)
    out, lse = empty_outputs(query, value)
    for at, rows, columns in query_blocks(table):
        keys = k[at][:, :, columns]
        scores = scale * (q[at][:, :, rows] @ keys.mT) + bias[at][:, :, None, columns]
        out[at][:, :, rows] = (_weights(scores) @ v[at][:, :, columns]).to(out.dtype)
        lse[at][:, :, rows] = scores.logsumexp(-1)
    return out, lse


def backward(
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
    """Gradients of query, key and value, given those of `out` and `lse`.

    With P = softmax(S) and delta = rowsum(dO * O) - dlse:  dS = P * (dO Vᵀ - delta),  dQ = scale dS K,
    dK = scale dSᵀ Q,  dV = Pᵀ dO.
    """
    q, k, v, bias = _widen(query, key, value, key_bias)
    do = grad_out.to(q.dtype)
    delta = (do * out.to(q.dtype)).sum(-1) - grad_lse.to(q.dtype)
    dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
    for at, rows, columns in query_blocks(table):
        queries, keys = q[at][:, :, rows], k[at][:, :, columns]
        scores = scale * (queries @ keys.mT) + bias[at][:, :, None, columns]
        weights = _weights(scores)
        d_rows = do[at][:, :, rows]
        d_scores = weights * (d_rows @ v[at][:, :, columns].mT - delta[at][:, :, rows, None])
        dq[at][:, :, rows] = scale * (d_scores @ keys)
        dk[at][:, :, columns] += scale * (d_scores.mT @ queries)
        dv[at][:, :, columns] += weights.mT @ d_rows
    if (group := query.shape[1] // key.shape[1]) > 1:
        dk, dv = (d.unflatten(1, (-1, group)).sum(2) for d in (dk, dv))
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _widen(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors in the dtype of computation, with one key head for each query head; bias as [B, H, Sk]."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    q = query.to(dtype).contiguous()
    k, v = (t.to(dtype).repeat_interleave(group, dim=1) for t in (key, value))
    bias = q.new_zeros(1, 1, key.shape[2]) if key_bias is None else key_bias.to(dtype)
    return q, k, v, bias.expand(*query.shape[:2], -1)


def _weights(scores: Tensor) -> Tensor:
    """softmax(scores); all 0 where a query reads no visible key.

    Not exp(scores - lse): with a bias of -1e9, rounding leaves no digit of the scores in the lse.
    """
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def query_blocks(table: BlockTable) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """((batches, heads), query tokens, key tokens) of every query block, the tokens as int64 indices.

    Batches and heads that share their table are one slice.
    """
    tensors = [t for t in table.tensors().values() if t is not None]
    for b, h in itertools.product(*(range(max(t.shape[dim] for t in tensors)) for dim in (0, 1))):
        shared = [all(t.shape[dim] == 1 for t in tensors) for dim in (0, 1)]
        at = (
            slice(None) if shared[0] else slice(b, b + 1),
            slice(None) if shared[1] else slice(h, h + 1),
        )

        def one(tensor: Tensor, b: int = b, h: int = h) -> Tensor:
            return tensor[b % tensor.shape[0], h % tensor.shape[1]]

        q_bounds, kv_bounds = one(table.q_bounds).tolist(), one(table.kv_bounds).long()
        q_order, kv_order = (
            torch.arange(last, device=kv_bounds.device) if order is None else one(order).long()
            for order, last in ((table.q_order, q_bounds[-1]), (table.kv_order, int(kv_bounds[-1])))
        )
        counts, rows = one(table.kv_num_blocks).tolist(), one(table.kv_indices).long()
        for i, count in enumerate(counts):
            first, last = (kv_bounds[rows[i, :count] + side] for side in (0, 1))
            sizes = last - first
            ends = sizes.cumsum(0)
            positions = torch.repeat_interleave(first - ends + sizes, sizes)
            positions = positions + torch.arange(positions.numel(), device=positions.device)
            yield at, q_order[q_bounds[i] : q_bounds[i + 1]], kv_order[positions]
