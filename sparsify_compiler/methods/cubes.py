"""Method `cubes`: the video is cut into 3-D cubes. At every call each cube of queries selects cubes of keys.

Neighbours in space and time attend alike, so a cube of the grid can replace a cluster of SVG2 (arXiv 2505.18875).
It needs no k-means: the order of the tokens is fixed, and all blocks have one size, except at the edges. Only
the selection (`BlockMethod`) is made at every call. Tokens outside the grid (text, references) see everything and
are seen by everything.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from sparsify_compiler.errors import OptionError
from sparsify_compiler.kernels.clustering import Side
from sparsify_compiler.methods.grid import Cube, check_cube, cut
from sparsify_compiler.methods.selection import (
    BlockMethod,
    Blocks,
    Selection,
    State,
    Tokens,
    check_share,
    floor_blocks,
    table_around,
)
from sparsify_compiler.plan import AttentionSite, TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Cubes(BlockMethod):
    """Options of the method."""

    cube: Cube = (4, 4, 4)
    """(frames, rows, columns) of a block of keys. The edges of the grid cut blocks off."""
    query_cube: Cube = (4, 8, 8)
    """(frames, rows, columns) of a block of queries."""
    kv_budget: float | None = None
    """The share of the key blocks, in (0, 1], that every block of queries reads: those with the largest gains
    with the linear far field, otherwise those with the largest mass. It takes the place of `top_p`,
    `min_kv_ratio` and `min_gain`. None sets none."""

    name: ClassVar[str] = "cubes"

    def __post_init__(self) -> None:
        BlockMethod.__post_init__(self)  # slots leave no super()
        for name in ("cube", "query_cube"):
            object.__setattr__(self, name, check_cube(name, getattr(self, name)))
        if self.kv_budget is not None:
            if self.max_error is not None:
                raise OptionError(
                    f"max_error decides how much is read, got kv_budget={self.kv_budget!r} too: leave out one"
                )
            budget = check_share("kv_budget", self.kv_budget, zero=False)
            for name, value in (
                ("kv_budget", budget),
                ("min_kv_ratio", budget),
                ("top_p", None),
                ("min_gain", None),
            ):
                object.__setattr__(self, name, value)

    def fit(self, site: AttentionSite, layout: TokenLayout) -> Self:
        """The same: every cube fits every grid, whose edges cut it off."""
        return self

    def constants(self, layout: TokenLayout) -> dict[str, Tensor]:
        """Orders and bounds of both sides, [1, 1, V] and [1, 1, N+1] int32."""
        assert layout.grid is not None
        query, key = (cut(layout.grid, cube) for cube in (self.query_cube, self.cube))
        return {
            "q_order": query.order,
            "q_bounds": query.bounds,
            "kv_order": key.order,
            "kv_bounds": key.bounds,
        }

    def state(self, site: AttentionSite, layout: TokenLayout) -> dict[str, tuple[int, ...]]:
        """Empty: the method keeps no state."""
        return {}

    def observe(self, tokens: Tokens, state: State, **constants: Tensor) -> tuple[Tensor, ...]:
        """Empty: a dense step changes no state."""
        return ()

    def select(
        self,
        tokens: Tokens,
        state: State,
        q_order: Tensor,
        q_bounds: Tensor,
        kv_order: Tensor,
        kv_bounds: Tensor,
    ) -> tuple[Selection, tuple[Tensor, ...]]:
        """The selection of this call, and no state."""
        query, key = Blocks(q_order, q_bounds), Blocks(kv_order, kv_bounds)
        if self.reads_by_gain(tokens.far_field):
            return self._by_gain(tokens, query, key), ()
        of_queries, of_keys = (
            self._side(tokens, blocks, tokens.block_means(points, blocks))
            for points, blocks in zip(tokens.video(), (query, key), strict=True)
        )
        return self.choose(tokens, of_queries, of_keys), ()

    def _side(self, tokens: Tokens, blocks: Blocks, means: Tensor) -> Side:
        """Blocks of the video among those of the sequence."""
        around = blocks.among(tokens.layout, tokens.query.shape[1])
        return Side(means, *around, blocks.bounds.diff(dim=-1))

    def reads_by_gain(self, far_field: str) -> bool:
        """Whether every block of queries reads a fixed number of blocks, by their gain."""
        return self.kv_budget is not None and far_field == "linear"

    def _by_gain(self, tokens: Tokens, query: Blocks, key: Blocks) -> Selection:
        """A table without blocks of the video, to which the far field adds those with the largest gains."""
        lead = (*tokens.query.shape[:2], query.bounds.shape[-1] - 1)
        every = torch.arange(key.bounds.shape[-1] - 1, dtype=torch.int32, device=key.bounds.device)
        none = every.new_zeros(lead)
        unknown = tokens.query.new_full((1, 1, 1), torch.nan)
        of_queries, of_keys = (self._side(tokens, blocks, unknown) for blocks in (query, key))
        table = table_around(tokens.layout, of_queries, of_keys, none, every.expand(*lead, -1))
        best = floor_blocks(self.min_kv_ratio, len(every))
        return Selection(table, unknown, min_gain=math.inf, best=best)
