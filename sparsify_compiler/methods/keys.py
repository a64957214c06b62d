"""Method `keys`: clusters of queries read single keys; the means of cubes approximate the other keys.

The method combines two papers. As in Sparse VideoGen2 (arXiv 2505.18875), k-means clusters the queries of a head,
warm from call to call. Keys are not clustered: the centroid of each cluster is multiplied with every key, and the K
best keys are read, one by one, as in DSV (arXiv 2502.07590). There is no predictor to train. So keys with much of
the attention are read exactly wherever they lie, and the other keys are even enough for the means of coarse cubes
(`kernels/far_field/virtual_keys.py`).

K is the same for all clusters, so the density is known before a run, whatever the weights are, and all rows have
one length. To multiply C centroids with S keys costs C / 2S of dense attention; an iteration of k-means costs the
same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.errors import OptionError
from sparsify_compiler.kernels.clustering import kmeans, sort_by_label
from sparsify_compiler.kernels.prediction import top_k_keys
from sparsify_compiler.methods.selection import Selection, State, Tokens, check_count, check_seed
from sparsify_compiler.methods.single_keys import (
    Budget,
    SingleKeyMethod,
    check_budget,
    check_fits,
    density_of,
    far_cubes,
    keys_of,
    others,
    room,
    single_key_table,
    unread,
)
from sparsify_compiler.methods.svg2 import check_iterations, clusters_for
from sparsify_compiler.plan import AttentionSite, TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys(SingleKeyMethod):
    """Options of the method."""

    kv_budget: Budget = 0.2
    """The keys that every cluster of queries reads: an integer, or a share of the video tokens. It is the
    density. A larger budget errs less and takes longer."""
    q_clusters: int | None = None
    """The number of query clusters. None takes as many as `svg2`. More of them err less and take longer;
    a larger `kv_budget` does so for less time."""
    kmeans_iters: tuple[int, int] = (50, 2)
    """The iterations of k-means in the first call of a video and in later calls."""
    seed: int = 0
    """The seed that draws the queries from which the clusters start."""

    name: ClassVar[str] = "keys"
    dense_steps: ClassVar[int | float] = 0.2
    dense_layers: ClassVar[int | float] = 0.03
    far_field: ClassVar[str] = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_budget", check_budget(self.kv_budget))
        if self.q_clusters is not None:
            object.__setattr__(self, "q_clusters", check_count("q_clusters", self.q_clusters))
        object.__setattr__(self, "kmeans_iters", check_iterations(self.kmeans_iters))
        object.__setattr__(self, "seed", check_seed(self.seed))

    def fit(self, site: AttentionSite, layout: TokenLayout) -> "FittedKeys":
        """Fill in the number of clusters."""
        tokens = layout.video_tokens
        check_fits(self.kv_budget, layout)
        if (asked := self.q_clusters) is not None and asked > tokens:
            raise OptionError(f"q_clusters must be at most the {tokens} tokens of the video, got {asked}")
        return self.filled(FittedKeys, q_clusters=asked or clusters_for(tokens)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedKeys(Keys):
    """The options, with a number of query clusters."""

    q_clusters: int

    def constants(self, layout: TokenLayout) -> dict[str, Tensor]:
        """The queries from which clusters start, [clusters] int64, drawn without repetition; and `far_cubes`."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(layout.video_tokens, generator=generator)
        return {"q_start": drawn[: self.q_clusters], **far_cubes(layout)}

    def state(self, site: AttentionSite, layout: TokenLayout) -> dict[str, tuple[int, ...]]:
        """The centroids: [B, H, q_clusters, D]."""
        return {"q_centroids": (site.batch, site.heads, self.q_clusters, site.head_dim)}

    def rows(self, layout: TokenLayout) -> tuple[int, int]:
        """See `SingleKeyMethod`."""
        return self.q_clusters, room(keys_of(self.kv_budget, layout.video_tokens) + others(layout))

    def observe(self, tokens: Tokens, state: State, q_start: Tensor, **far: Tensor) -> tuple[Tensor, ...]:
        """Cluster, so that the first sparse step starts from warm centroids. Returns the new state."""
        return (self._cluster(tokens, state, q_start)[0],)

    def of_all_heads(
        self, tokens: Tokens, state: State, read: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """The clusters of the queries: `centroids`, `q_order` and `q_bounds`."""
        q_start = read["q_start"]
        assert q_start is not None
        centroids, labels = self._cluster(tokens, state, q_start)
        order, bounds = sort_by_label(labels, self.q_clusters, provider=tokens.provider)
        return {"centroids": centroids, "q_order": order, "q_bounds": bounds}

    def select(
        self,
        tokens: Tokens,
        state: State,
        q_start: Tensor,
        centroids: Tensor | None = None,
        q_order: Tensor | None = None,
        q_bounds: Tensor | None = None,
        **far: Tensor,
    ) -> tuple[Selection, tuple[Tensor, ...]]:
        """The selection of this call, and the new state. The clusters: from `of_all_heads`, where it ran."""
        layout, bias = tokens.layout, tokens.key_bias
        _, key = tokens.video()
        if centroids is None or q_order is None or q_bounds is None:
            centroids, q_order, q_bounds = self.of_all_heads(tokens, state, {"q_start": q_start}).values()
        budget = keys_of(self.kv_budget, layout.video_tokens)
        counts, indices = top_k_keys(
            centroids.to(key.dtype),
            key,
            torch.full((1, 1), budget, dtype=torch.int32, device=key.device),
            width=self.rows(layout)[1],
            scale=tokens.scale,
            key_bias=None if bias is None else bias[..., layout.before : layout.tokens - layout.after],
            provider=tokens.provider,
        )
        left = unread(tokens, counts, indices, None, **far)
        density = density_of(layout, q_bounds, counts)
        table = single_key_table(layout, q_order, q_bounds, counts, indices)
        kept = tokens.query.new_full((1, 1, 1), torch.nan)
        return Selection(table, kept, whole=False, far_blocks=left, density=density), (centroids,)

    def _cluster(self, tokens: Tokens, state: State, q_start: Tensor) -> tuple[Tensor, Tensor]:
        """(centroids, labels) of the queries."""
        first, later = self.kmeans_iters
        query, _ = tokens.video()
        return kmeans(
            query,
            state.tensors[0],
            q_start,
            state.initialised,
            first=first,
            later=later,
            provider=tokens.provider,
        )
