"""Method `cubes`: the video cut into 3-D cubes, each of which reads the cubes that matter to it now.

Neighbours in space and time attend alike, so a cube of the grid can do what a cluster does in SVG2 (arXiv
2505.18875), without k-means: the order of the tokens is fixed, blocks are of one size but for the tails at the
grid's edges, and only the choice is made anew in every call. With mean query q_i and mean key k_j of cubes,

    P_ij = |K_j| exp(s q_i . k_j) / sum over j' of |K_j'| exp(s q_i . k_j')

and a query cube reads the key cubes with the largest P until their sum passes `top_p`, never fewer than
`min_kv_ratio` of them. Tokens outside the grid (text, references) see everything and are seen by everything.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from sparsify_compiler.kernels.clustering import top_p_blocks
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.kernels.statistics import block_means
from sparsify_compiler.methods.grid import Cube, check_cube, cut
from sparsify_compiler.methods.selection import (
    MASS_ALONE,
    Blocks,
    Memory,
    Selection,
    Tokens,
    check_gain,
    check_share,
    check_top_p,
    floor_blocks,
    key_counts,
    table_amid,
)
from sparsify_compiler.plan import AttentionSite, TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Cubes:
    """Options of the method."""

    top_p: float | None = None
    """Estimated attention mass that every query cube keeps at least, in (0, 1]; 1 keeps everything. 0.9 where
    what is not read is dropped, 0.5 where its mean stands for it."""
    min_kv_ratio: float = 0.03
    """Share of the key cubes that every query cube keeps at least, in [0, 1]; 0.1 without the linear far
    field."""
    min_gain: float | None = 1.0
    """With the linear far field: a query cube also keeps every key cube that lowers the estimated relative
    error of the output by more than so many times the share of the keys that it is. None: no more than the above.
    The smaller, the more is read: 0.3, 1 and 3 read some 30, 18 and 11 % in a small trained model."""
    cube: Cube = (4, 4, 4)
    """(frames, rows, columns) of a block of keys; cut off at the edges of the grid."""
    query_cube: Cube = (4, 8, 8)
    """(frames, rows, columns) of a block of queries."""

    name: ClassVar[str] = "cubes"
    dense_steps: ClassVar[float] = 0.2
    dense_layers: ClassVar[float] = 0.03
    far_field: ClassVar[str] = "linear"
    far_fields: ClassVar[tuple[str, ...]] = FAR_FIELDS
    otherwise: ClassVar[dict[str, dict[str, Any]]] = MASS_ALONE

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_p", check_top_p(self.top_p))
        object.__setattr__(self, "min_kv_ratio", check_share("min_kv_ratio", self.min_kv_ratio, zero=True))
        object.__setattr__(self, "min_gain", check_gain(self.min_gain))
        for name in ("cube", "query_cube"):
            object.__setattr__(self, name, check_cube(name, getattr(self, name)))

    def refusal(self, layout: TokenLayout) -> str:
        """The method needs to know where the tokens lie in the video."""
        return layout.reason if layout.grid is None else ""

    def fit(self, site: AttentionSite, layout: TokenLayout) -> Self:
        """Itself: cubes larger than the grid are cut off."""
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

    def memory(self, site: AttentionSite, layout: TokenLayout) -> dict[str, tuple[int, ...]]:
        """Nothing is remembered."""
        return {}

    def observe(self, tokens: Tokens, memory: Memory, **constants: Tensor) -> tuple[Tensor, ...]:
        """Nothing is learnt from dense steps."""
        return ()

    def select(
        self,
        tokens: Tokens,
        memory: Memory,
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
        counts, indices, kept = top_p_blocks(
            q_means,
            kv_means,
            key_counts(tokens, key),
            scale=tokens.scale,
            top_p=self.top_p or 0.0,
            min_blocks=floor_blocks(self.min_kv_ratio, kv_means.shape[2]),
            provider=tokens.provider,
        )
        table = table_amid(tokens.layout, query, key, counts, indices, q_means.shape[1])
        return Selection(table, kept, min_gain=self.min_gain), ()
