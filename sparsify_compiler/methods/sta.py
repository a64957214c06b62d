"""Method `sta`: sliding tile attention, STA (arXiv 2502.04507).

The video is cut into tiles of neighbours in time and space. All queries of a tile read the same keys: those of the
tiles in a window, which has a number w of tiles in each dimension. The window is centred on the tile of the queries
and shifted inwards at the edges of the video. So in a dimension of n tiles, tile i reads w tiles from

    min(max(i - (w - 1) / 2, 0), n - w)

on, and every tile reads the same number of tiles. Each head may have a window of its own. The paper takes videos of
whole tiles; here the edges of the grid cut the last tiles off. Tokens outside the grid (text, references) see
everything and are seen by everything.
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from sparsify_compiler.config import integer
from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods.base import VideoMethod
from sparsify_compiler.methods.grid import Cube, check_cube, cubes_in, cut, static_table
from sparsify_compiler.plan import AttentionSite, TokenLayout
from sparsify_compiler.table import BlockTable

USUAL = 3
"""Tiles of a window in each dimension where no option says otherwise."""

Window = tuple[int | None, int | None, int | None]
"""(frames, rows, columns) in tiles; None: all tiles of the dimension."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sta(VideoMethod):
    """Options of the method."""

    tile: Cube = (6, 8, 8)
    """(frames, rows, columns) of a tile, in tokens. The edges of the grid cut tiles off."""
    window: Window | tuple[Window, ...] | None = None
    """(frames, rows, columns) of the window, in tiles. It is shifted inwards at the edges of the grid. Each
    size is an odd integer, at most the number of tiles in the dimension, or None for all of them. A list of
    windows gives each head its own. None takes 3 tiles in each dimension, or all where there are fewer."""

    name: ClassVar[str] = "sta"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", check_cube("tile", self.tile))
        if self.window is not None:
            object.__setattr__(self, "window", check_windows(self.window))

    def refusal(self, layout: TokenLayout) -> str:
        """The reason why there is no grid, or why the windows skip nothing; empty otherwise. Raises OptionError."""
        if layout.grid is None:
            return VideoMethod.refusal(self, layout)
        tiles = cubes_in(layout.grid, self.tile)
        if any(window != tiles for window in windows_in(tiles, self.window)):
            return ""
        return f"the window covers all tiles of {_text(self.tile)} in the grid: try a smaller tile or window"

    def fit(self, site: AttentionSite, layout: TokenLayout) -> "FittedSta":
        """Fill in every size of every window as a number."""
        assert layout.grid is not None
        windows = windows_in(cubes_in(layout.grid, self.tile), self.window)
        if len(windows) not in (1, site.heads):
            raise OptionError(
                f"window must be one window for all heads or a list of {site.heads}, one for each head of "
                f"{site.name}, got a list of {len(windows)}"
            )
        return self.filled(FittedSta, window=windows if len(windows) > 1 else windows[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedSta(Sta):
    """The options with windows in tiles of the grid."""

    window: Cube | tuple[Cube, ...]

    def __post_init__(self) -> None:
        """Check nothing: all tiles of a dimension may be an even number."""

    def table(self, layout: TokenLayout) -> BlockTable:
        """A block for each tile, one for the tokens before the grid and one for those after it."""
        assert layout.grid is not None
        tiles = cubes_in(layout.grid, self.tile)
        kept = [window_mask(tiles, window) for window in windows_in(tiles, self.window)]
        return static_table(layout, torch.stack(kept), cut(layout.grid, self.tile))


def windows_in(tiles: Cube, window: Window | tuple[Window, ...] | None) -> tuple[Cube, ...]:
    """The window of each head, or one for all, in a grid of these tiles.

    Raises:
        OptionError: a window is larger than the grid.
    """
    if window is None:
        frames, rows, columns = (min(USUAL, count) for count in tiles)
        return ((frames, rows, columns),)
    shared = not isinstance(window[0], tuple)
    windows = (cast(Window, window),) if shared else cast(tuple[Window, ...], window)
    found = []
    for one in windows:
        sizes = [count if size is None else size for size, count in zip(one, tiles, strict=True)]
        if any(size > count for size, count in zip(sizes, tiles, strict=True)):
            raise OptionError(
                f"window must be at most {_text(tiles)}, the tiles of the grid, got {_text(one)}: None takes all "
                "tiles of a dimension, and a smaller tile makes more of them"
            )
        frames, rows, columns = sizes
        found.append((frames, rows, columns))
    return tuple(found)


def window_mask(tiles: Cube, window: Cube) -> Tensor:
    """[N, N] bool: the tiles that each tile reads; tiles are counted row-major."""
    t, y, x = (_sees(count, size) for count, size in zip(tiles, window, strict=True))
    mask = t[:, None, None, :, None, None] & y[:, None, None, :, None] & x[:, None, None, :]
    return mask.flatten(3).flatten(0, 2)


def _sees(count: int, size: int) -> Tensor:
    """[count, count] bool: the tiles of one dimension that each tile reads."""
    place = torch.arange(count)
    first = (place - (size - 1) // 2).clamp(min=0).clamp(max=count - size)[:, None]
    return (place >= first) & (place < first + size)


def check_windows(value: object) -> Window | tuple[Window, ...]:
    """`value` as a window, or as a window for each head; raises OptionError if it is neither."""
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], (tuple, list)):
        return tuple(_check_window(one) for one in value)
    return _check_window(value)


def _check_window(value: object) -> Window:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise OptionError(
            "window must be three sizes in tiles (frames, rows, columns), such as (3, 3, 3), or a list of such "
            f"windows, one for each head, got {value!r}"
        )
    frames, rows, columns = (_check_size(size, value) for size in value)
    return frames, rows, columns


def _check_size(size: object, window: object) -> int | None:
    number = integer(size)
    if size is None or (number is not None and number > 0 and number % 2):
        return number
    even = f": try {number - 1} or {number + 1}" if number is not None and number > 0 else ""
    raise OptionError(
        "each size of window must be an odd integer of at least 1, so that the window has a middle, or None for "
        f"all tiles of the dimension, got {size!r} in {window!r}{even}"
    )


def _text(sizes: Window) -> str:
    return " x ".join("all" if size is None else str(size) for size in sizes)
