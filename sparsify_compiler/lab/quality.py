"""How far videos are from those that they should be, and how much moves in them; each a number a video."""

from statistics import fmean

import torch
from torch import Tensor

from sparsify_compiler.lab import require

EXACT = 150.0
"""dB that a video has which differs in nothing: far above what rounding leaves."""


def mse(videos: Tensor, exact: Tensor) -> Tensor:
    """Mean squared difference of each video [B, ...], RGB from 0 to 1: [B]."""
    return (videos - exact).square().flatten(1).mean(1)


def psnr(videos: Tensor, exact: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video in dB, at most `EXACT`: [B]."""
    return (-10 * mse(videos, exact).log10()).clamp(max=EXACT)


def ssim(videos: Tensor, exact: Tensor) -> Tensor:
    """Structural similarity of each video, mean over its frames, 1 for one that is exact: [B].

    Args:
        videos, exact: [B, 3, frames, height, width], RGB from 0 to 1.

    Raises:
        SparsifyError: a package of the laboratory is missing.
    """
    require()
    from skimage.metrics import structural_similarity

    pairs = ((x.numpy(), y.numpy()) for x, y in zip(videos.float(), exact.float(), strict=True))
    return torch.tensor(
        [
            fmean(
                structural_similarity(frame, true, channel_axis=0, data_range=1.0)
                for frame, true in zip(x.swapaxes(0, 1), y.swapaxes(0, 1), strict=True)
            )
            for x, y in pairs
        ]
    )


def motion(videos: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, [B]: a video that stands still would pass for a good one."""
    return videos.diff(dim=2).abs().flatten(1).mean(1)
