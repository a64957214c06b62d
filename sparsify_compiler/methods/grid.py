"""The video's grid cut into 3-D cubes, which begin at its first corner and are cut off at its edges."""

import torch
from torch import Tensor

from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods.selection import Blocks, check_count

Cube = tuple[int, int, int]
"""(frames, rows, columns)."""


def check_cube(name: str, value: object) -> Cube:
    """`value` as three integers of at least 1; OptionError else."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise OptionError(f"{name} must be three integers (frames, rows, columns), got {value!r}")
    frames, rows, columns = (check_count(name, size) for size in value)
    return frames, rows, columns


def cut(grid: Cube, cube: Cube) -> Blocks:
    """The tokens of a row-major grid, cube by cube; cubes and the tokens in each lie row-major too."""
    number = cube_of_token(grid, cube)
    sizes = number.bincount()
    bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    return Blocks(number.argsort(stable=True)[None, None].int(), bounds[None, None].int())


def cube_of_token(grid: Cube, cube: Cube) -> Tensor:
    """[V] int64: the number of the cube that each token lies in; cubes are counted row-major."""
    _, rows, columns = (-(-size // edge) for size, edge in zip(grid, cube, strict=True))
    t, y, x = (place // edge for place, edge in zip(_places(grid), cube, strict=True))
    return (t * rows + y) * columns + x


def middle_of_token(grid: Cube, cube: Cube) -> Tensor:
    """[V] int64: the token in the middle of each token's cube, of what the grid's edge leaves of it."""
    middle = []
    for place, edge, size in zip(_places(grid), cube, grid, strict=True):
        first = place // edge * edge
        middle.append(first + (size - first).clamp(max=edge) // 2)
    t, y, x = middle
    return (t * grid[1] + y) * grid[2] + x


def _places(grid: Cube) -> list[Tensor]:
    """Frame, row and column of each token, [V] int64 each."""
    axes = (torch.arange(size) for size in grid)
    return [place.flatten() for place in torch.meshgrid(*axes, indexing="ij")]
