"""Grids in the values of positions, for models that get packed tokens and the coordinates of each token.

    positions [1, 3, 12]     frame    0 0 0 0 0 0 1 1 1 1 1 1
                             row      0 0 0 1 1 1 0 0 0 1 1 1      before 0, grid (2, 2, 3), after 0
                             column   0 1 2 0 1 2 0 1 2 0 1 2

No size shows such a grid. `mesh_along` finds it in the values: coordinates of any scale, of which each follows one
axis of the grid in steps of one direction. `mesh_of` reads a tensor again only if its values may have changed.
"""

import math
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

COORDINATES = range(3, 9)
"""The numbers of coordinates that a token may have: three, or a few more, or two bounds of each."""
_COLUMNS = 36
"""The most coordinates of a token, with those of all videos of a batch and without equal ones."""
_STARTS = 64
"""The most places where a grid may begin that are tried."""
_RARE = 16
"""The most places of a step between neighbours that may lie outside of every grid."""
_KEPT = 8
"""The number of tensors whose values are kept for comparison."""


class Mesh(NamedTuple):
    """The tokens along a dimension of positions: other tokens, a video in row-major order, other tokens."""

    before: int
    grid: tuple[int, int, int]
    """(frames, height, width)."""
    after: int


def may_be_positions(shape: torch.Size, dtype: torch.dtype, dim: int) -> bool:
    """Whether a tensor may hold the coordinates of each token along a dimension, for each video of a batch."""
    if dtype == torch.bool or dtype.is_complex or not 2 <= len(shape) <= 5 or shape[dim] < 8:
        return False
    numbers = shape.numel() // shape[dim]
    of_a_video = numbers // shape[0] if dim > 0 and len(shape) > 2 and shape[0] else numbers
    return numbers in COORDINATES or of_a_video in COORDINATES


def meshes_of(positions: Tensor) -> tuple[tuple[int, Mesh], ...]:
    """(dimension, mesh) for the dimensions of a tensor along which its values are a grid."""
    dims = [dim for dim in range(positions.dim()) if may_be_positions(positions.shape, positions.dtype, dim)]
    found = ((dim, mesh_of(positions, dim)) for dim in dims)
    return tuple((dim, mesh) for dim, mesh in found if mesh is not None)


_lock = Lock()
_read = WeakTensorKeyDictionary()
"""Tensor of a GPU -> (its state, dimension -> mesh)."""
_latest: list[tuple[Tensor, int, Mesh | None]] = []
"""(values, dimension, mesh), the last used at the end."""


def mesh_of(positions: Tensor, dim: int) -> Mesh | None:
    """The mesh in the values of a tensor, along a dimension; None if they are no grid.

    A tensor in the memory of the CPU is compared with the values that were read last. A tensor on another device is
    believed as long as nothing was written to it, so only a new tensor costs a synchronisation.
    """
    if positions.is_meta or type(positions) not in (Tensor, nn.Parameter):
        return None
    with _lock:
        state = None
        if positions.device.type != "cpu" and not positions.is_inference():
            state = positions.data_ptr(), positions._version
            known = _read.get(positions)
            if known is not None and known[0] == state and dim in known[1]:
                return known[1][dim]
        mesh = _compared(positions, dim)
        if state is not None:
            known = _read.get(positions)
            others = known[1] if known is not None and known[0] == state else {}
            _read[positions] = state, {**others, dim: mesh}
        return mesh


def _compared(positions: Tensor, dim: int) -> Mesh | None:
    """The mesh of a tensor, without a new search where its values are those of an earlier one."""
    for place, (values, along, mesh) in enumerate(reversed(_latest)):
        alike = values.shape == positions.shape and values.dtype == positions.dtype and along == dim
        if alike and values.device == positions.device and torch.equal(values, positions):
            _latest.append(_latest.pop(-1 - place))
            return mesh
    mesh = mesh_along(positions, dim)
    _latest.append((positions.detach().clone(), dim, mesh))
    del _latest[:-_KEPT]
    return mesh


def mesh_along(positions: Tensor, dim: int) -> Mesh | None:
    """Find the largest grid in the coordinates of tokens.

    Each coordinate must follow one axis of the grid and go in one direction along it, or be constant. The
    coordinates must be in the order of frame, row and column, and so must the tokens; frames go upwards. The grid
    must have at least half of the tokens, and more than one frame, row and column.

    Args:
        positions: coordinates of any type and scale; all dimensions except `dim` are coordinates, or videos of a
            batch, which must have the same grid.
        dim: the dimension of the tokens.

    Returns:
        None if there is no such grid, or if there are two of one size.
    """
    values = positions.detach().movedim(dim, -1).flatten(0, -2).to("cpu", torch.float64)
    columns = torch.stack(list({row.numpy().tobytes(): row for row in values.unbind(0)}.values()))
    if len(columns) > _COLUMNS or not bool(columns.isfinite().all()):
        return None
    signs = columns.diff(dim=1).sign().long()  # [K, N - 1]
    steps = (signs * 3 ** torch.arange(len(columns), device="cpu")[:, None]).sum(0)
    tokens = columns.shape[1]
    found = [mesh for start in _starts(steps) if (mesh := _from(start, columns, steps, signs)) is not None]
    found = [mesh for mesh in found if 2 * math.prod(mesh.grid) >= tokens]
    largest = max((math.prod(mesh.grid) for mesh in found), default=0)
    best = [mesh for mesh in found if math.prod(mesh.grid) == largest]
    return best[0] if len(best) == 1 else None


def _starts(steps: Tensor) -> list[int]:
    """The tokens at which a grid may begin: after a rare step, or where coordinates begin to change."""
    _, inverse, counts = steps.unique(return_inverse=True, return_counts=True)
    rare = counts[inverse] <= _RARE
    still = steps == 0
    ends = still & ~torch.cat([still[1:], still.new_zeros(1)])
    return [0, *((rare | ends).nonzero()[:, 0] + 1).tolist()][:_STARTS]


def _from(start: int, columns: Tensor, steps: Tensor, signs: Tensor) -> Mesh | None:
    """The largest grid whose first token is `start`; None if there is none.

    Args:
        columns: the coordinates [K, N].
        steps: a number for the signs of each step between neighbours [N - 1].
        signs: the signs of each coordinate's steps [K, N - 1].
    """
    steps, signs = steps[start:], signs[:, start:]
    if not len(steps):
        return None
    width = 1 + _leading(steps == steps[0])
    rows = torch.cat([steps, steps.new_zeros(1)])[: (len(steps) + 1) // width * width].view(-1, width)
    ends = rows[: _leading((rows[:, :-1] == steps[0]).all(1)), -1]  # the step after each row
    if len(ends) < 4:
        return None
    height = 1 + _leading(ends[:-1] == ends[0])
    frames = ends[: len(ends) // height * height].view(-1, height)
    complete = _leading((frames[:, :-1] == ends[0]).all(1))
    if height < 2 or complete < 2:
        return None
    last = frames[: complete - 1, -1]  # the step after each frame except the last
    grid = 1 + _leading(last == last[0]), height, width
    stop = start + math.prod(grid)
    axes = _axes(*(signs[:, at] for at in (0, width - 1, width * height - 1)))
    if axes is None or not _separable(columns[:, start:stop].view(-1, *grid), axes):
        return None
    return Mesh(start, grid, columns.shape[1] - stop)


def _leading(flags: Tensor) -> int:
    """The number of True values before the first other one."""
    return int(flags.long().cumprod(0).sum())


def _axes(column: Tensor, row: Tensor, frame: Tensor) -> list[Tensor] | None:
    """The coordinates that follow time, rows and columns, bool [K] each.

    None if an axis has none, if one does not go back at the end of its run, or if they are in another order.

    Args:
        column: the signs of the step to the next column; the others to the next row and the next frame.
    """
    of_column = column != 0
    of_row = (row != 0) & ~of_column
    of_frame = (frame != 0) & ~of_column & ~of_row
    axes = [of_frame, of_row, of_column]
    if not all(bool(own.any()) for own in axes) or bool((frame[of_frame] < 0).any()):
        return None
    if bool((column[of_column] == row[of_column]).any() | (column[of_column] == frame[of_column]).any()):
        return None
    if bool((row[of_row] == frame[of_row]).any()):
        return None
    first = [int(own.nonzero()[0]) for own in axes]
    return axes if first == sorted(first) else None


def _separable(values: Tensor, axes: list[Tensor]) -> bool:
    """Whether each coordinate [K, frames, height, width] depends on its own axis alone."""
    for axis, own in enumerate(axes, 1):
        along = values[own].movedim(axis, 1).flatten(2)
        if not torch.equal(along, along[:, :, :1].expand_as(along)):
            return False
    rest = values[~(axes[0] | axes[1] | axes[2])].flatten(1)
    return torch.equal(rest, rest[:, :1].expand_as(rest))
