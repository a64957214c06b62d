"""Helpers of the tests of methods that choose blocks at every call: a call, and the choice in float64."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.methods.selection import Selection, State, Tokens
from sparsify_compiler.plan import Method, TokenLayout
from sparsify_compiler.testing.strategies import site_of

PROVIDERS = ("reference", "cpu")


def select(
    method: Method, query: Tensor, key: Tensor, layout: TokenLayout, provider: str, warm: Any = (), **others
) -> tuple[Selection, tuple[Tensor, ...]]:
    """One call of a method, warm if its state is given."""
    site = site_of(query, key)
    method = method.fit(site, layout)
    state = warm or tuple(torch.zeros(shape) for shape in method.state(site, layout).values())
    tokens = Tokens(
        query=query, key=key, layout=layout, scale=query.shape[-1] ** -0.5, provider=provider, **others
    )
    return method.select(tokens, State(torch.tensor(bool(warm)), state), **method.constants(layout))


def kept_pairs(
    q_means: Tensor, kv_means: Tensor, kv_sizes: list[int], scale: float, top_p: float, least: int
) -> tuple[list[set[int]], bool]:
    """The key blocks that each query block keeps, from the paper's words in float64; and whether any choice was so
    close that rounding may turn it."""
    kept, close = [], False
    for q in q_means.double():
        scores = [
            scale * float(q @ k) + math.log(n) if n else -math.inf
            for k, n in zip(kv_means.double(), kv_sizes, strict=True)
        ]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        total = sum(weights)
        ranked = sorted(range(len(weights)), key=lambda j: (-weights[j], j))
        row: set[int] = set()
        mass = 0.0
        for place, j in enumerate(ranked):
            if mass >= top_p and len(row) >= least:
                following = weights[ranked[place]] / total
                previous = weights[ranked[place - 1]] / total
                close |= previous - following < 1e-5
                break
            close |= abs(mass - top_p) < 1e-5 and len(row) >= least
            row.add(j)
            mass += weights[j] / total
        close |= abs(mass - top_p) < 1e-5
        kept.append(row)
    return kept, close


def expected_mask(
    layout: TokenLayout, q_labels: list[int], kv_labels: list[int], kept: list[set[int]]
) -> Tensor:
    """[S, S] bool: video by the labels, other tokens see and are seen by everything."""
    video = range(layout.before, layout.tokens - layout.after)
    rows = [
        [
            i not in video
            or j not in video
            or kv_labels[j - layout.before] in kept[q_labels[i - layout.before]]
            for j in range(layout.tokens)
        ]
        for i in range(layout.tokens)
    ]
    return torch.tensor(rows)


layouts = st.builds(
    lambda grid, before, after: TokenLayout(
        tokens=before + math.prod(grid) + after, grid=grid, before=before, after=after
    ),
    st.sampled_from([(1, 4, 5), (3, 3, 5), (2, 5, 7), (4, 4, 4)]),
    st.sampled_from([0, 1, 6]),
    st.sampled_from([0, 3]),
)
heads = st.sampled_from([(1, 1), (2, 2), (4, 2)])


def means(tokens: Tensor, labels: Tensor, count: int) -> Tensor:
    """[count, D] mean of the tokens that carry each label, 0 where none does."""
    return torch.stack(
        [tokens[labels == c].mean(0) if (labels == c).any() else 0 * tokens[0] for c in range(count)]
    )
