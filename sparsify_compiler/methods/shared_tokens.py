"""Functions of dynamic methods over the video's tokens that ranks share: each has a run of them.

Sums over blocks and clusters are made on each rank, and added in the order of ranks. So all ranks have the same
means, and select the same blocks; they differ from those of one process by rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.kernels import attention, clustering, statistics
from sparsify_compiler.kernels.far_field import merge_parts
from sparsify_compiler.parallel.shares import Part, flat, share, start
from sparsify_compiler.plan import Ranks
from sparsify_compiler.table import BlockTable, blocks_of_places

_TAGS = (torch.Tag.cudagraph_unsafe,)


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """The video's tokens of one attention call, which ranks share."""

    tokens: int
    """Those of all ranks."""
    ranks: Ranks
    part: Part
    """The part of the sequence that has them."""
    each: int
    """As in `plan.SharedSequence`."""
    site: str
    """Name of the attention, for errors."""
    provider: str

    def block_means(self, points: Tensor, order: Tensor, bounds: Tensor) -> Tensor:
        """[B, H, N, D] fp32: the mean of each block; 0 for an empty block.

        Args:
            points: [B, H, n, D], the tokens of this rank.
            order, bounds: [B|1, H|1, V] and [B|1, H|1, N+1] int32, the blocks of all tokens.
        """
        order, bounds = blocks_of_places(order, bounds, self._places().to(order.device))
        means, _ = statistics.block_means(points, bounds, order, provider=self.provider)
        return self._mean_of_ranks(means, bounds.diff(dim=-1))[0]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        scale: float,
        before: int,
    ) -> Tensor:
        """[B, H, R, Dv]: attention to all keys, of queries that every rank has.

        Each rank attends to its own tokens, the first also to those that every rank has; the results are merged.

        Args:
            query: [B, H, R, D].
            key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], with the tokens of this rank.
            key_bias, scale: as in `attention.block_sparse_attention`.
            before: the number of tokens before the video.
        """
        first, count = self._run()
        first, last = first + before, before + self.tokens
        cuts = [0, before, first, first + count, last, key.shape[2]]
        listed = [2] if self.ranks.rank else [0, 2, 4]
        bounds, rows, indices, counts = (
            torch.tensor(numbers, dtype=torch.int32, device=query.device)
            for numbers in ([[cuts]], [[[0, query.shape[2]]]], [[[listed]]], [[[len(listed)]]])
        )
        table = BlockTable(q_bounds=rows, kv_bounds=bounds, kv_indices=indices, kv_num_blocks=counts)
        out, lse = attention.block_sparse_attention(
            query, key, value, table, key_bias=key_bias, scale=scale, provider=self.provider
        )
        found = self._of_ranks(torch.cat([out.to(lse.dtype), lse[..., None]], -1)).movedim(0, 2)
        return merge_parts(found[..., :-1], found[..., -1])[0].to(out.dtype)

    def kmeans(
        self, points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, *, first: int, later: int
    ) -> tuple[Tensor, Tensor]:
        """(centroids, labels of all tokens [B, H, V]), as `clustering.kmeans` has them.

        Args:
            points: [B, H, n, D], the tokens of this rank.
            centroids, start, warm, first, later: as in `clustering.kmeans`; `start` names tokens of all ranks.
        """
        part, place = [*self.part, self.each], (*self._place(), self.provider)
        return torch.ops.sparsify.kmeans_of_ranks(
            points.detach(), centroids.detach(), start, warm, [first, later], part, *place
        )

    def clustered(
        self, points: Tensor, centroids: Tensor, start: Tensor, warm: bool, first: int, later: int
    ) -> tuple[Tensor, Tensor]:
        """`kmeans`, on real tensors."""
        places = self._places().to(points.device)
        if not warm:
            here = (start[:, None] == places).nonzero()
            centroids = torch.zeros_like(centroids)
            centroids[:, :, here[:, 0]] = points[:, :, here[:, 1]].to(centroids.dtype)
            centroids = self._of_ranks(centroids).sum(0)  # one rank has each
        going = torch.ones((), dtype=torch.bool)
        for _ in range(later if warm else first):
            means, labels = clustering.kmeans(
                points, centroids, start, going, first=1, later=1, provider=self.provider
            )
            index = labels.long()
            counts = index.new_zeros(centroids.shape[:3]).scatter_add_(2, index, torch.ones_like(index))
            means, total = self._mean_of_ranks(means, counts)
            centroids = torch.where(total > 0, means, centroids)
        return centroids, self._every_token(labels)

    def _run(self) -> tuple[int, int]:
        """(first token, number of tokens) of this rank."""
        numbers = self.part.tokens, self.ranks.rank, self.ranks.size, self.each
        return start(*numbers) * self.part.width, share(*numbers) * self.part.width

    def _places(self) -> Tensor:
        """[n] int64: the tokens of this rank."""
        first, count = self._run()
        return torch.arange(first, first + count)

    def _mean_of_ranks(self, means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(mean [B, H, N, D] of the tokens of all ranks, their number [B, H, N, 1]), from those of each."""
        counts = counts[..., None].expand(*means.shape[:3], 1).to(means.dtype)
        found = self._of_ranks(torch.cat([means, counts], -1))
        numbers = found[..., -1:]
        sums, total = (found[..., :-1] * numbers).sum(0), numbers.sum(0)
        return torch.where(total > 0, sums / total.clamp(min=1), 0.0), total

    def _of_ranks(self, numbers: Tensor) -> Tensor:
        """[ranks, ...]: the numbers of every rank."""
        part, order = Part(self.ranks.size, 1), torch.zeros((), dtype=torch.float32, device="cpu")
        found, _ = torch.ops.sparsify.gather_tokens([numbers[None], order], 0, flat([part]), *self._place())
        return found

    def _every_token(self, numbers: Tensor) -> Tensor:
        """[B, H, V], from [B, H, n] of this rank's tokens."""
        order = torch.zeros((), dtype=torch.float32, device="cpu")
        read = torch.ones(1, 1, self.tokens, dtype=torch.bool, device="cpu")
        asked = read.new_ones(self.ranks.size, 1, 1, numbers.shape[2])
        parts = flat([self.part]), self.each
        found, _ = torch.ops.sparsify.fetch_keys(
            [numbers[..., None], order], read, asked, *parts, *self._place()
        )
        return found[..., 0]

    def _place(self) -> tuple[int, int, str, float, str]:
        return *self.ranks.fields, self.site


@torch.library.custom_op("sparsify::kmeans_of_ranks", mutates_args=(), tags=_TAGS)
def _kmeans_of_ranks(
    points: Tensor,
    centroids: Tensor,
    start: Tensor,
    warm: Tensor,
    iterations: list[int],
    part: list[int],
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
    provider: str,
) -> tuple[Tensor, Tensor]:
    tokens, width, each = part
    shared = SharedTokens(
        tokens * width, Ranks(rank, size, group, timeout), Part(tokens, width), each, site, provider
    )
    return shared.clustered(points, centroids, start, bool(warm), *iterations)


@_kmeans_of_ranks.register_fake
def _kmeans_fake(
    points: Tensor,
    centroids: Tensor,
    start: Tensor,
    warm: Tensor,
    iterations: list[int],
    part: list[int],
    *_: Any,
) -> tuple[Tensor, Tensor]:
    tokens, width = part[:2]
    labels = points.new_empty(*points.shape[:2], tokens * width, dtype=torch.int32)
    return centroids.new_empty(centroids.shape), labels
