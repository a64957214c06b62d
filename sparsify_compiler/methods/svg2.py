"""Method `svg2`: semantic permutation, Sparse VideoGen2 (arXiv 2505.18875).

For each head, k-means clusters the queries of the video, and separately its keys, after QK-norm and RoPE. Each
cluster of queries selects clusters of keys (`BlockMethod`). The released code selects those with the largest
estimated attention, until their sum passes `top_p`. Clusters are warm: a call continues from the centroids of the
previous call, in a few iterations. Tokens outside the grid (text, references) are a block before and a block after
it, see everything and are seen by everything.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods.selection import (
    BlockMethod,
    Selection,
    State,
    Tokens,
    check_count,
    check_seed,
)
from sparsify_compiler.plan import AttentionSite, TokenLayout

RELEASED = ((32_760, 200, 1000), (75_600, 300, 1000), (118_800, 400, 1000))
"""(video tokens, query clusters, key clusters) of the released settings: Wan 480p, Wan 720p, HunyuanVideo 720p."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Svg2(BlockMethod):
    """Options of the method."""

    q_clusters: int | None = None
    """The number of query clusters. None takes the released numbers, 200 at 32,760 video tokens, 300 at
    75,600 and 400 at 118,800, on a straight line between them; below, it shrinks with the square root of the
    tokens."""
    kv_clusters: int | None = None
    """The number of key clusters. None takes the released 1000; below 32,760 video tokens, a cluster for 33
    tokens."""
    kmeans_iters: tuple[int, int] = (50, 2)
    """The iterations of k-means in the first call of a video and in later calls."""
    seed: int = 0
    """The seed that draws the tokens from which the clusters start."""

    name: ClassVar[str] = "svg2"

    def __post_init__(self) -> None:
        BlockMethod.__post_init__(self)  # slots leave no super()
        checked = {
            "seed": check_seed(self.seed),
            "kmeans_iters": check_iterations(self.kmeans_iters),
        }
        for name in ("q_clusters", "kv_clusters"):
            if (value := getattr(self, name)) is not None:
                checked[name] = check_count(name, value)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def fit(self, site: AttentionSite, layout: TokenLayout) -> "FittedSvg2":
        """Fill in the numbers of clusters."""
        tokens = layout.video_tokens
        counts = dict(zip(("q_clusters", "kv_clusters"), clusters_for(tokens), strict=True))
        for name in counts:
            if (asked := getattr(self, name)) is not None:
                if asked > tokens:
                    raise OptionError(f"{name} must be at most the {tokens} tokens of the video, got {asked}")
                counts[name] = asked
        return self.filled(FittedSvg2, **counts)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedSvg2(Svg2):
    """The options, with numbers of clusters."""

    q_clusters: int
    kv_clusters: int

    def constants(self, layout: TokenLayout) -> dict[str, Tensor]:
        """The tokens from which clusters start: [clusters] int64, drawn without repetition."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(layout.video_tokens, generator=generator)
        return {"q_start": drawn[: self.q_clusters], "kv_start": drawn[: self.kv_clusters]}

    def state(self, site: AttentionSite, layout: TokenLayout) -> dict[str, tuple[int, ...]]:
        """The centroids: [B, H, q_clusters, D] and [B, Hkv, kv_clusters, D]."""
        return {
            "q_centroids": (site.batch, site.heads, self.q_clusters, site.head_dim),
            "kv_centroids": (site.batch, site.kv_heads, self.kv_clusters, site.head_dim),
        }

    def observe(self, tokens: Tokens, state: State, q_start: Tensor, kv_start: Tensor) -> tuple[Tensor, ...]:
        """Cluster, so that the first sparse step starts from warm centroids. Returns the new state."""
        first, later = self.kmeans_iters
        return tokens.centroids(state, (q_start, kv_start), first=first, later=later)

    def select(
        self, tokens: Tokens, state: State, q_start: Tensor, kv_start: Tensor
    ) -> tuple[Selection, tuple[Tensor, ...]]:
        """The selection of this call, and the new state."""
        first, later = self.kmeans_iters
        query, key = tokens.clusters(state, (q_start, kv_start), first=first, later=later)
        return self.choose(tokens, query, key), (query.centroids, key.centroids)


def check_iterations(value: object) -> tuple[int, int]:
    """`value` as two ints of at least 1; raises OptionError if it is not."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise OptionError(f"kmeans_iters must be two integers (first, later), got {value!r}")
    return check_count("kmeans_iters[0]", value[0]), check_count("kmeans_iters[1]", value[1])


def clusters_for(tokens: int) -> tuple[int, int]:
    """(query clusters, key clusters) for a video with this number of tokens.

    The numbers lie on straight lines through `RELEASED`, also beyond its end. Below its start, key clusters keep
    their size of 33 tokens, and the number of query clusters shrinks with the square root of the tokens. At equal
    total time (`python -m benchmarks.methods --only clusters`) smaller key clusters cost more time, in k-means and
    as virtual keys of the far field, than their precision saves.
    """
    least, q_least, kv_least = RELEASED[0]
    if tokens < least:
        share = tokens / least
        return max(1, round(q_least * share**0.5)), max(1, round(kv_least * share))
    low, high = next((pair for pair in pairwise(RELEASED) if tokens <= pair[1][0]), RELEASED[-2:])
    along = (tokens - low[0]) / (high[0] - low[0])
    q_clusters, kv_clusters = (round(a + along * (b - a)) for a, b in zip(low[1:], high[1:], strict=True))
    return q_clusters, kv_clusters
