"""Distances of videos from exact ones, and their motion; one number for each video."""

from statistics import fmean

import torch
from torch import Tensor

from sparsify_compiler.lab import require

EXACT = 150.0
"""PSNR in dB of a video without any difference: far above that of rounding errors."""


def mse(videos: Tensor, exact: Tensor) -> Tensor:
    """Mean squared difference of each video [B, ...], RGB from 0 to 1: [B]."""
    return (videos - exact).square().flatten(1).mean(1)


def psnr(videos: Tensor, exact: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video in dB, at most `EXACT`: [B]."""
    return (-10 * mse(videos, exact).log10()).clamp(max=EXACT)


def ssim(videos: Tensor, exact: Tensor) -> Tensor:
    """Structural similarity of each video, mean over its frames: [B]. An exact video has 1.

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
    """Mean absolute difference of neighbouring frames: [B]. It shows videos that stand still."""
    return videos.diff(dim=2).abs().flatten(1).mean(1)
