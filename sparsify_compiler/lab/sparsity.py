"""Sparsity of a model's dense attention: the share of the keys that carries most of the weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Listen(TorchFunctionMode):
    """Mode that calls `hear(query, key, value)` before every self-attention, and leaves the attention as it is."""

    def __init__(self, hear: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.hear = hear

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["query"].shape == given["key"].shape:
                self.hear(*(given[name] for name in ("query", "key", "value")))
        return func(*args, **kwargs)


def critical_share(query: Tensor, key: Tensor, theta: float = 0.9, rows: int = 128) -> Tensor:
    """Least share of the keys that carries `theta` of a query's attention, on average: float32 [heads].

    Args:
        query: [batch, heads, tokens, head_dim], as `scaled_dot_product_attention` gets it.
        key: as `query`.
        rows: number of queries to look at, evenly spaced over the tokens.
    """
    tokens = key.shape[-2]
    chosen = torch.linspace(0, tokens - 1, min(rows, tokens)).long()
    scores = query[..., chosen, :].float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    heaviest = scores.softmax(dim=-1).sort(dim=-1, descending=True).values
    needed = (heaviest.cumsum(dim=-1) < theta).sum(dim=-1) + 1
    return (needed / tokens).mean(dim=(0, 2))


@torch.no_grad()
def critical_shares(call: Callable[[], object], theta: float = 0.9) -> Tensor:
    """Critical share of every self-attention of an uncompiled call: float32 [attentions, heads]."""
    shares: list[Tensor] = []
    with Listen(lambda query, key, _: shares.append(critical_share(query, key, theta))):
        call()
    return torch.stack(shares)
