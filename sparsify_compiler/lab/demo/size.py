"""How large what the demo runs is."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Of the model and video whose step is timed, and of the videos that are made by the trained model."""

    grid: tuple[int, int, int]
    """Latent (frames, height, width) in tokens."""
    heads: int
    head_dim: int
    layers: int
    dtype: torch.dtype
    """Of both models; the trained one, whose weights are float32, is there by autocast."""
    reference_frames: int = 2
    rounds: int = 5
    """Dense and sparse steps that are timed, by turns."""
    prompts: int = 2
    """Videos of the trained model, all in one batch."""
    frames: int = 24
    """Of each of them."""
    steps: int = 16
    """In which they are made."""
    backend: str = "inductor"
    """What compiles the model whose step is timed, dense, and sparse after its rewriting."""


SIZES = {
    "cpu": Size(grid=(16, 24, 24), heads=4, head_dim=64, layers=2, dtype=torch.float32),
    "cuda": Size(grid=(21, 30, 52), heads=12, head_dim=128, layers=8, dtype=torch.bfloat16, rounds=15),
}
"""By device."""
