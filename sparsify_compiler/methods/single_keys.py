"""Functions of methods that read single keys of the video: the budget, the table, the far field of cubes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.config import integer, share
from sparsify_compiler.errors import OptionError
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks
from sparsify_compiler.kernels.statistics import keys_left
from sparsify_compiler.methods.base import VideoMethod
from sparsify_compiler.methods.grid import Cube, cube_of_token, cut
from sparsify_compiler.methods.selection import Blocks, State, Tokens
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.table import BlockTable

FAR_CUBE: Cube = (4, 2, 2)
"""(frames, rows, columns) of the keys that one mean approximates where they are not read."""

Budget = int | float
"""The keys that a group of queries reads: a number, or a share of the video's keys."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleKeyMethod(VideoMethod):
    """Options of a method whose rows list single keys. These lists may take more memory than queries and keys."""

    def rows(self, layout: TokenLayout) -> tuple[int, int]:
        """(rows of the table of a head, capacity of a row), of a fitted method."""
        raise NotImplementedError

    def list_bytes(self, layout: TokenLayout, far_field: str) -> int:
        """The bytes of the lists of a head: the keys that are read, and the cubes that approximate the others."""
        assert layout.grid is not None
        rows, width = self.rows(layout)
        cubes = math.prod(-(-size // edge) for size, edge in zip(layout.grid, FAR_CUBE, strict=True))
        # The number of keys that are left of each cube, which the far field's table replaces, and a flag.
        return rows * (4 * width if far_field == "drop" else 4 * width + 5 * cubes)

    def of_all_heads(
        self, tokens: Tokens, state: State, read: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        """Tensors [B, H, ...] that `select` takes by these names, where it selects for some of the heads at a time:
        the results of work whose memory is small.

        Args:
            tokens, state: as for `select`, of all heads.
            read: the other arguments of `select`.
        """
        return {}


def check_budget(value: object) -> Budget:
    """`value` as an int of at least 1 or a float in (0, 1]; raises OptionError if it is not."""
    whole = integer(value)
    number = share(value) if whole is None else whole
    if number is None or number <= 0:
        raise OptionError(
            f"kv_budget must be an integer of at least 1 or a share in (0.0, 1.0], got {value!r}"
        )
    return number


def check_fits(budget: Budget | None, layout: TokenLayout) -> None:
    """Raise OptionError if a budget exceeds the keys of the video."""
    if isinstance(budget, int) and budget > layout.video_tokens:
        raise OptionError(
            f"kv_budget must be at most the {layout.video_tokens} tokens of the video, got {budget}"
        )


def keys_of(budget: Budget, video: int) -> int:
    """A budget as a number of keys."""
    return budget if isinstance(budget, int) else max(1, math.ceil(budget * video - 1e-6))


def share_of(budget: Budget, video: int) -> float:
    """A budget as a share of the video's keys."""
    return budget / video if isinstance(budget, int) else budget


def room(entries: int) -> int:
    """The capacity of a row with this number of blocks: the next power of two, or multiple of 512."""
    return min(1 << (entries - 1).bit_length(), -(-entries // 512) * 512)


def others(layout: TokenLayout) -> int:
    """The number of blocks that every row lists for the tokens before and after the video."""
    return int(layout.before > 0) + int(layout.after > 0)


def far_cubes(layout: TokenLayout) -> dict[str, Tensor]:
    """Order and bounds of the far field's cubes of keys, [1, 1, V] and [1, 1, N+1] int32, and the cube of each
    token, [V] int32."""
    assert layout.grid is not None
    order, bounds = cut(layout.grid, FAR_CUBE)
    return {"far_order": order, "far_bounds": bounds, "far_cube": cube_of_token(layout.grid, FAR_CUBE).int()}


def unread(
    tokens: Tokens,
    counts: Tensor,
    indices: Tensor,
    is_dense: Tensor | None,
    *,
    far_order: Tensor,
    far_bounds: Tensor,
    far_cube: Tensor,
) -> FarBlocks | None:
    """The keys of each cube that groups of video queries do not read. The tokens before and after the video are
    always read. None where the far field is dropped.

    Args:
        counts, indices, is_dense: as for `single_key_table`.
        far_order, far_bounds, far_cube: the results of `far_cubes`.
    """
    if tokens.far_field == "drop":
        return None
    layout, seen = tokens.layout, far_bounds.diff(dim=-1)
    if (bias := tokens.key_bias) is not None:
        visible = bias[..., layout.before : layout.tokens - layout.after] != -torch.inf
        cube = far_cube.long().expand(visible.shape)
        seen = visible.new_zeros(*visible.shape[:2], seen.shape[-1], dtype=torch.int32)
        seen = seen.scatter_add(-1, cube, visible.int())
    sides = int(layout.before > 0), int(layout.after > 0)
    unlisted = seen if is_dense is None else seen.masked_fill(is_dense[None, :, None], 0)
    # Blocks of other tokens have no keys left; a row lists none of them here.
    if any(sides):
        unlisted, seen = pad(unlisted, sides), pad(seen, sides, value=1)
        far_cube = far_cube + sides[0]
    left = keys_left(unlisted, far_cube, counts, indices, provider=tokens.provider)
    order, bounds = Blocks(far_order, far_bounds).among(layout, counts.shape[1])
    return FarBlocks(order, bounds, keys=seen, left=left)


def single_key_table(
    layout: TokenLayout,
    q_order: Tensor,
    q_bounds: Tensor,
    counts: Tensor,
    indices: Tensor,
    is_dense: Tensor | None = None,
) -> BlockTable:
    """The table in which groups of video queries read single video keys, and the tokens before and after it.

    Args:
        q_order, q_bounds: the groups, [1|B, 1|H, V] and [1|B, 1|H, N+1] int32.
        counts, indices: [B, H, N] and [B, H, N, W] int32, the video keys that each group reads, from 0. A row has
            room for `others` after its keys. The table takes the memory of `indices`.
        is_dense: [H] bool, whether a head reads everything. Then its first block of queries, and of keys, has all
            tokens, the others are empty, and `counts` and `indices` are 0.
    """
    before, after, tokens = int(layout.before > 0), int(layout.after > 0), layout.tokens
    last = tokens - layout.after
    edges = torch.arange(layout.before, last + 1, dtype=torch.int32, device=indices.device)
    bounds = pad(pad(edges, (before, 0), value=0), (0, after), value=tokens) if before or after else edges
    around = [0] * before + [bounds.shape[0] - 2] * after
    if before:
        indices += before
    for place, other in enumerate(around):
        indices.scatter_(-1, (counts + place).long()[..., None], other)
    table = BlockTable(
        q_bounds=q_bounds,
        q_order=q_order,
        kv_bounds=bounds[None, None],
        kv_num_blocks=counts + len(around) if around else counts,
        kv_indices=indices,
    )
    if is_dense is None:
        return table
    dense = is_dense[None, :, None]
    if around:
        indices[..., 0].masked_fill_(dense, 0)
    return replace(
        table,
        q_bounds=torch.where(dense, _one_block(q_bounds, layout.video_tokens), q_bounds),
        kv_bounds=torch.where(dense, _one_block(bounds, tokens), bounds),
        kv_num_blocks=torch.where(dense, 1, table.kv_num_blocks),
    )


def density_of(
    layout: TokenLayout, q_bounds: Tensor, counts: Tensor, is_dense: Tensor | None = None
) -> Tensor:
    """[B, H] fp32: the density of `single_key_table`, from its arguments. Each key that is read is one token."""
    read = (counts + (layout.tokens - layout.video_tokens)) * q_bounds.diff(dim=-1).double()
    density = (read.sum(-1) / (layout.video_tokens * layout.tokens)).float()
    return density if is_dense is None else density.masked_fill(is_dense, 1.0)


def _one_block(bounds: Tensor, tokens: int) -> Tensor:
    """Bounds of the same number of blocks: the first has all tokens, the others are empty."""
    result = torch.full_like(bounds, tokens)
    result[..., 0] = 0
    return result
