"""The grid of a video, cut into 3-D cubes. Cubes begin at its first corner; its edges cut the last ones off."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods.selection import Blocks, check_count
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.table import BlockTable

Cube = tuple[int, int, int]
"""(frames, rows, columns)."""


def check_cube(name: str, value: object) -> Cube:
    """`value` as three integers of at least 1; raises OptionError if it is not."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise OptionError(f"{name} must be three integers (frames, rows, columns), got {value!r}")
    frames, rows, columns = (check_count(name, size) for size in value)
    return frames, rows, columns


def cut(grid: Cube, cube: Cube) -> Blocks:
    """The tokens of a row-major grid, cube by cube. Cubes are row-major in the grid, tokens in their cube."""
    number = cube_of_token(grid, cube)
    sizes = number.bincount()
    bounds = pad(sizes.cumsum(0), (1, 0))
    return Blocks(number.argsort(stable=True)[None, None].int(), bounds[None, None].int())


def cubes_in(grid: Cube, cube: Cube) -> Cube:
    """The number of cubes in each dimension, with those that the edges of the grid cut off."""
    frames, rows, columns = (-(-size // edge) for size, edge in zip(grid, cube, strict=True))
    return frames, rows, columns


def cube_of_token(grid: Cube, cube: Cube) -> Tensor:
    """[V] int64: the number of each token's cube; cubes are counted row-major."""
    _, rows, columns = cubes_in(grid, cube)
    t, y, x = (place // edge for place, edge in zip(_places(grid), cube, strict=True))
    return (t * rows + y) * columns + x


def middle_of_token(grid: Cube, cube: Cube) -> Tensor:
    """[V] int64: the token in the middle of each token's cube, or of the part that the grid's edges leave."""
    middle = []
    for place, edge, size in zip(_places(grid), cube, grid, strict=True):
        first = place // edge * edge
        middle.append(first + (size - first).clamp(max=edge) // 2)
    t, y, x = middle
    return (t * grid[1] + y) * grid[2] + x


def static_table(layout: TokenLayout, kept: Tensor, blocks: Blocks) -> BlockTable:
    """The table in which blocks of the video read each other as a mask says, and other tokens see and are seen by
    everything.

    Args:
        kept: [H|1, N, N] bool, whether each block of queries reads each block of keys.
        blocks: the video's tokens in N blocks, the same for all heads.
    """
    others = int(layout.before > 0), int(layout.after > 0)
    order, bounds = blocks.among(layout, 1)
    sizes = bounds.diff(dim=-1)
    moved = None if torch.equal(order[0, 0], torch.arange(layout.tokens)) else order
    kept = pad(kept, (*others, *others), value=True)
    return BlockTable.from_block_mask(kept[None], sizes, sizes, q_order=moved, kv_order=moved)


def _places(grid: Cube) -> list[Tensor]:
    """Frame, row and column of each token, [V] int64 each."""
    axes = (torch.arange(size) for size in grid)
    return [place.flatten() for place in torch.meshgrid(*axes, indexing="ij")]
