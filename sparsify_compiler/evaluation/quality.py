"""How far videos are from those that they should be, and how much moves in them."""

from torch import Tensor


def mse(videos: Tensor, exact: Tensor) -> Tensor:
    """Mean squared difference of each video [B, ...], RGB from 0 to 1: [B]."""
    return (videos - exact).square().flatten(1).mean(1)


def psnr(videos: Tensor, exact: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean over the videos; infinite where one is exact."""
    return float((-10 * mse(videos, exact).log10()).mean())


def motion(videos: Tensor) -> float:
    """Mean absolute difference of neighbouring frames: a video that stands still would pass for a good one."""
    return float(videos.diff(dim=2).abs().mean())
