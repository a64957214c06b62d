"""Videos as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def strip(videos: Tensor, columns: int = 8, zoom: int = 2, labels: Sequence[str] = ()) -> "Image":
    """A picture with a row for each video, with `columns` of its frames.

    Args:
        videos: [count, 3, frames, height, width], RGB from 0 to 1.
        labels: one for each video, to the left of its row; or none.
    """
    from PIL import Image, ImageDraw

    frames = np.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().astype(int)
    chosen = videos[:, :, frames.tolist()].float().clamp(0, 1)
    framed = np.pad(chosen.numpy(), ((0, 0),) * 3 + ((0, 1), (0, 1)), constant_values=1)
    rows, _, across, height, width = framed.shape
    pixels = framed.transpose(0, 3, 2, 4, 1).reshape(rows * height, across * width, 3)
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    if not labels:
        return image
    measure = ImageDraw.Draw(image)
    margin = 8 + round(max(measure.textlength(label) for label in labels))
    labelled = Image.new("RGB", (margin + image.width, image.height), "white")
    labelled.paste(image, (margin, 0))
    draw = ImageDraw.Draw(labelled)
    for row, label in enumerate(labels):
        draw.text((4, (row + 0.5) * image.height / rows), label, fill="black", anchor="lm")
    return labelled


def side_by_side(*sets: Tensor, zoom: int = 4, gap: int = 4) -> "list[Image]":
    """A picture for each frame of sets of videos. A row shows a video of each set.

    Args:
        sets: each [count, 3, frames, height, width], RGB from 0 to 1.
        zoom: side of the square that shows a pixel.
        gap: width of the white lines between videos.
    """
    from PIL import Image

    stacked = torch.stack(sets, dim=1).float().clamp(0, 1)
    enlarged = stacked.repeat_interleave(zoom, dim=-2).repeat_interleave(zoom, dim=-1)
    framed = torch.nn.functional.pad(enlarged, (0, gap, 0, gap), value=1)
    rows, columns, channels, frames, height, width = framed.shape
    pixels = framed.permute(3, 0, 4, 1, 5, 2).reshape(frames, rows * height, columns * width, channels)
    inside = pixels[:, : rows * height - gap, : columns * width - gap]
    return [Image.fromarray(frame) for frame in (inside * 255).round().byte().numpy()]


def save_gif(frames: "Sequence[Image]", path: Path, *, milliseconds: int = 120) -> Path:
    """Write an animation that loops for ever. A frame equal to the one before it only lengthens that one."""
    first, *others = frames
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    return path
