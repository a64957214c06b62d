"""Sizes of the demo's models and videos."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes of the model whose step is timed, and of the videos of the trained model."""

    grid: tuple[int, int, int]
    """Latent (frames, height, width) in tokens."""
    heads: int
    head_dim: int
    layers: int
    dtype: torch.dtype
    """Data type of both models. The trained one has float32 weights and runs under autocast."""
    reference_frames: int = 2
    rounds: int = 5
    """Rounds of timing: each times one dense and one sparse step."""
    prompts: int = 2
    """Videos of the trained model, all in one batch."""
    frames: int = 32
    """Frames of each of these videos."""
    steps: int = 16
    """Steps of their generation."""
    backend: str = "inductor"
    """Backend that compiles the model whose step is timed, and the sparse graphs after their rewriting."""


SIZES = {
    "cpu": Size(grid=(16, 24, 24), heads=4, head_dim=64, layers=2, dtype=torch.float32),
    "cuda": Size(grid=(21, 30, 52), heads=12, head_dim=128, layers=8, dtype=torch.bfloat16, rounds=15),
}
"""Device -> sizes."""
