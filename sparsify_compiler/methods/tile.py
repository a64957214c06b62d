"""Method `tile`: the attention tile of Efficient-vDiT (arXiv 2502.06155).

The attention map of a video model falls into F x F tiles, one for each pair of frames; the diagonal is strong
and a few reference frames represent the rest. The mask "k : F-k" has the reference frames

    R = {ceil(i F / k) : 0 <= i < k}

and keeps the frame pair (i, j) iff i == j or i in R or j in R: (2k+1) F - k (k+1) of F * F pairs, linear in F.
Tokens outside the grid (text, references) see everything and are seen by everything.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.config import integer, share
from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods.base import VideoMethod
from sparsify_compiler.methods.grid import cut, static_table
from sparsify_compiler.plan import AttentionSite, TokenLayout
from sparsify_compiler.table import BlockTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile(VideoMethod):
    """Options of the method."""

    reference_frames: int | float = 0.5
    """The number of reference frames, k in the paper. Every frame reads them, and they read every frame. An
    integer from 1 to the latent frames of the video; or a share of these frames below 1, rounded down to at
    least one frame. The share 1.0 is refused, since it equals the integer 1."""

    name: ClassVar[str] = "tile"

    def __post_init__(self) -> None:
        whole = integer(self.reference_frames)
        k = share(self.reference_frames) if whole is None else whole
        if k is None or k <= 0 or (whole is None and k == 1):
            raise OptionError(
                "reference_frames must be an integer of at least 1 or a share between 0 and 1, "
                f"got {self.reference_frames!r}"
            )
        object.__setattr__(self, "reference_frames", k)

    def fit(self, site: AttentionSite, layout: TokenLayout) -> "FittedTile":
        """Fill in `reference_frames` as a number."""
        if (k := self.count(layout.frames)) > layout.frames:
            raise OptionError(
                f"reference_frames must be in 1..{layout.frames}, the latent frames of the video "
                f"(grid {layout.grid}), got {k}"
            )
        return self.filled(FittedTile, reference_frames=k)

    def count(self, frames: int) -> int:
        """`reference_frames` as a number, in a video with this number of frames."""
        k = self.reference_frames
        return k if isinstance(k, int) else max(1, int(k * frames + 1e-6))


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedTile(Tile):
    """The options with a number of reference frames."""

    reference_frames: int

    def table(self, layout: TokenLayout) -> BlockTable:
        """A block for each frame, one for the tokens before the grid and one for those after it."""
        assert layout.grid is not None
        frames, rows, columns = layout.grid
        kept = frame_mask(frames, self.reference_frames)
        return static_table(layout, kept[None], cut(layout.grid, (1, rows, columns)))


def reference_set(frames: int, reference_frames: int) -> list[int]:
    """R: the reference frames, evenly spread from frame 0 on."""
    return [-(-i * frames // reference_frames) for i in range(reference_frames)]


def frame_mask(frames: int, reference_frames: int) -> Tensor:
    """[F, F] bool: whether each pair of frames is kept."""
    reference = torch.zeros(frames, dtype=torch.bool)
    reference[reference_set(frames, reference_frames)] = True
    return torch.eye(frames, dtype=torch.bool) | reference[:, None] | reference[None, :]


def tile_sparsity(frames: int, reference_frames: int, tokens_per_frame: int, block_size: int = 128) -> float:
    """The share of the score matrix that is skipped when whole `block_size` x `block_size` blocks are computed.

    A block is computed if it touches a kept pair of frames. This is the paper's arithmetic and gives its table to
    0.01 points (8 frames of 3,600 tokens: 4:4 17.60 %, 3:5 29.88 %, 2:6 45.47 %, 1:7 64.38 %). The kernels of
    this package cut blocks at the bounds of frames and do not round.

    Raises:
        OptionError: an argument below 1, or more reference frames than frames.
    """
    numbers = {"frames": frames, "reference_frames": reference_frames, "tokens_per_frame": tokens_per_frame,
               "block_size": block_size}  # fmt: skip
    for name, number in numbers.items():
        if number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}")
    if reference_frames > frames:
        raise OptionError(f"reference_frames must be in 1..{frames}, got {reference_frames}")
    tokens = frames * tokens_per_frame
    blocks = -(-tokens // block_size)
    first = torch.arange(blocks) * block_size
    last = (first + block_size).clamp(max=tokens) - 1
    frame = torch.arange(frames)
    touches = (first[:, None] // tokens_per_frame <= frame) & (frame <= last[:, None] // tokens_per_frame)
    touched = touches.double() @ frame_mask(frames, reference_frames).double() @ touches.double().T
    area = (last - first + 1).double()
    computed = ((touched > 0) * area[:, None] * area[None, :]).sum()
    return float(1.0 - computed / tokens**2)
