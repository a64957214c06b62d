"""A small video transformer whose calls Dynamo sees whole, or breaks in front of or around its attention."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHANNELS = 4
"""Channels of the latents."""

Breaks = Literal["nowhere", "before", "around"]


class Block(nn.Module):
    """Self-attention of two heads over the video, conditioned by the time step."""

    breaks: Breaks = "nowhere"
    """Where Dynamo must end a graph: nowhere, before attention, or before and after it."""
    skipped: bool = False
    """Whether a call leaves this block out, as caches do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, S, dim], time [B, dim] -> [B, S, dim]."""
        if self.skipped:
            return x
        query, key, value = (
            self.qkv(self.norm(x) + time[:, None]).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        )
        if self.breaks != "nowhere":
            torch._dynamo.graph_break()
        out = F.scaled_dot_product_attention(query, key, value)
        if self.breaks == "around":
            torch._dynamo.graph_break()
        return x + self.proj(out.transpose(1, 2).flatten(2))


class Video(nn.Module):
    """Patches of 1 x 2 x 2 by a 3-D convolution, then blocks."""

    use_reentrant: bool | None = None
    """Whether activation checkpointing of the blocks is reentrant; None without checkpointing."""

    def __init__(self, layers: int = 3, dim: int = 32, *, seed: int = 0, breaks: Breaks = "nowhere") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patch = nn.Conv3d(CHANNELS, dim, (1, 2, 2), (1, 2, 2))
            self.time, self.out = nn.Linear(1, dim), nn.Linear(dim, CHANNELS)
            blocks = [Block(dim) for _ in range(layers)]
        for block in blocks:
            block.breaks = breaks
            block.qkv.weight.data.mul_(3)  # sharp attention: a skipped key shows in the output
        self.blocks = nn.ModuleList(blocks)
        self.eval()

    def forward(self, hidden_states: Tensor, timestep: Tensor | float, scale: float = 1.0) -> Tensor:
        """hidden_states [B, 4, f, 2 h, 2 w], timestep [B] or a number -> [B, f h w, 4]."""
        x = self.patch(hidden_states).flatten(2).transpose(1, 2)
        times = torch.as_tensor(timestep, dtype=x.dtype, device=x.device).reshape(-1, 1) / 1000
        time = self.time(times.expand(len(x), 1))
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x, time)
            else:
                x = checkpoint(block, x, time, use_reentrant=self.use_reentrant)
        return scale * self.out(x)


def latents(grid: tuple[int, int, int], batch: int = 1, *, seed: int = 1) -> Tensor:
    """Seeded latents of a video with this grid (frames, height, width) of tokens."""
    frames, height, width = grid
    shape = batch, CHANNELS, frames, 2 * height, 2 * width
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(model: Callable[..., Tensor], video: Tensor, count: int, *, first: float = 900.0) -> list[Tensor]:
    """The outputs of `count` calls at falling time steps, on latents that change with the steps."""
    with torch.no_grad():
        return [model(video + 0.1 * i, torch.full((len(video),), first - 100 * i)) for i in range(count)]
