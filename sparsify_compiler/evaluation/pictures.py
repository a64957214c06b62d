"""Videos as pictures for people to look at."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def strip(videos: Tensor, columns: int = 8, zoom: int = 2) -> "Image":
    """A row for each of the videos [count, 3, frames, height, width], RGB from 0 to 1: `columns` of its frames."""
    from PIL import Image

    frames = np.linspace(0, videos.shape[2] - 1, min(columns, videos.shape[2])).round().astype(int)
    chosen = videos[:, :, frames.tolist()].float().clamp(0, 1)
    framed = np.pad(chosen.numpy(), ((0, 0),) * 3 + ((0, 1), (0, 1)), constant_values=1)
    rows, _, across, height, width = framed.shape
    pixels = framed.transpose(0, 3, 2, 4, 1).reshape(rows * height, across * width, 3)
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
