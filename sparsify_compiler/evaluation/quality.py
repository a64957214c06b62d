"""How far videos are from those that they should be, and how much moves in them; each a number a video."""

from torch import Tensor


def mse(videos: Tensor, exact: Tensor) -> Tensor:
    """Mean squared difference of each video [B, ...], RGB from 0 to 1: [B]."""
    return (videos - exact).square().flatten(1).mean(1)


def psnr(videos: Tensor, exact: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each video in dB, infinite for one that is exact: [B]."""
    return -10 * mse(videos, exact).log10()


def motion(videos: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, [B]: a video that stands still would pass for a good one."""
    return videos.diff(dim=2).abs().flatten(1).mean(1)
