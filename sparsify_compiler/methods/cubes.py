"""Method `cubes`: the video cut into 3-D cubes, each of which reads the cubes that matter to it now.

Neighbours in space and time attend alike, so a cube of the grid can do what a cluster does in SVG2 (arXiv
2505.18875), without k-means: the order of the tokens is fixed, blocks are of one size but for the tails at the
grid's edges, and only the choice (`BlockMethod`) is made anew in every call. Tokens outside the grid (text,
references) see everything and are seen by everything.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from sparsify_compiler.kernels.statistics import block_means
from sparsify_compiler.methods.grid import Cube, check_cube, cut
from sparsify_compiler.methods.selection import BlockMethod, Blocks, Selection, State, Tokens
from sparsify_compiler.plan import AttentionSite, TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Cubes(BlockMethod):
    """Options of the method."""

    cube: Cube = (4, 4, 4)
    """(frames, rows, columns) of a block of keys. The edges of the grid cut blocks off."""
    query_cube: Cube = (4, 8, 8)
    """(frames, rows, columns) of a block of queries."""

    name: ClassVar[str] = "cubes"

    def __post_init__(self) -> None:
        BlockMethod.__post_init__(self)  # slots leave no super()
        for name in ("cube", "query_cube"):
            object.__setattr__(self, name, check_cube(name, getattr(self, name)))

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
        """Nothing is remembered."""
        return {}

    def observe(self, tokens: Tokens, state: State, **constants: Tensor) -> tuple[Tensor, ...]:
        """Nothing is learnt from dense steps."""
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
        """What this call reads."""
        query, key = Blocks(q_order, q_bounds), Blocks(kv_order, kv_bounds)
        q_means, kv_means = (
            block_means(points, blocks.bounds, blocks.order, provider=tokens.provider)[0]
            for points, blocks in zip(tokens.video(), (query, key), strict=True)
        )
        return self.choose(tokens, query, key, q_means, kv_means), ()
