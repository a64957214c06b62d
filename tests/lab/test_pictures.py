"""Pictures of videos, pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_compiler.lab.pictures import save_gif, side_by_side

Image = pytest.importorskip("PIL.Image")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_pixel_of_side_by_side_is_that_of_its_video(data):
    count, frames, height, width, zoom, gap = (
        data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 4), (1, 4), (1, 4), (1, 3), (0, 3))
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    left, right = torch.rand(2, count, 3, frames, height, width, generator=generator)
    pictures = side_by_side(left, right, zoom=zoom, gap=gap)
    assert len(pictures) == frames
    tall, wide = zoom * height, zoom * width
    for frame, picture in enumerate(pictures):
        assert picture.size == (2 * wide + gap, count * tall + (count - 1) * gap)
        pixels = np.asarray(picture)
        for y, x in np.ndindex(pixels.shape[:2]):
            (row, inner_y), (column, inner_x) = divmod(y, tall + gap), divmod(x, wide + gap)
            if inner_y >= tall or inner_x >= wide:
                assert (pixels[y, x] == 255).all()
            else:
                source = (left, right)[column][row, :, frame, inner_y // zoom, inner_x // zoom]
                assert np.abs(pixels[y, x] - 255 * source.numpy()).max() <= 0.5 + 1e-3


def test_a_gif_holds_all_frames_and_loops(tmp_path):
    levels = torch.tensor([0.0, 1.0, 0.2, 0.8])
    video = levels.view(1, 1, -1, 1, 1).expand(1, 3, -1, 4, 6)
    path = save_gif(side_by_side(video, 1 - video), tmp_path / "new" / "videos.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == len(levels)
        assert gif.info["loop"] == 0
        for frame, level in enumerate(levels):
            gif.seek(frame)
            assert gif.info["duration"] == 120
            pixels = np.asarray(gif.convert("RGB")).astype(int)
            assert (pixels[0, 0] == round(255 * float(level))).all()
            assert (pixels[0, -1] == round(255 * (1 - float(level)))).all()
