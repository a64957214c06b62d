"""The tokens of a program that is being drawn, and the videos that programs are for."""

from collections.abc import Callable

from torch import Tensor

from sparsify_compiler.testing.fuzzing.cases import Draft, Draw, Scene, Source
from sparsify_compiler.testing.fuzzing.machines import WIDTH, Places

Move = Callable[["Tokens", Draw], None]
"""Appends something to a program, if its tokens allow it."""

GRIDS = ((3, 2, 4), (3, 3, 3), (4, 2, 3), (5, 3, 2), (2, 3, 4), (3, 4, 2))
"""(frames, rows, columns) of the videos that programs are for."""

MESHES = ("meshgrid", "repeats", "sums", "index", "embedding")
"""How positions may be spelled."""


class Tokens(Draft):
    """A program of tokens, drawn on places. Between moves, x is [batch, tokens, WIDTH]."""

    def __init__(self, scene: Scene) -> None:
        places = Places(scene)
        video, text = places.inputs()
        super().__init__(m=places, video=video, text=text)
        self.scene = scene
        self.before = self.after = 0
        """Tokens of text in the sequence."""
        self.tags = 0
        """Attentions so far."""

    @property
    def x(self) -> Tensor:
        """The tokens."""
        return self.names["x"]

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.x.shape[0]

    @property
    def count(self) -> int:
        """Tokens of the sequence."""
        return self.x.shape[1]

    @property
    def is_video(self) -> bool:
        """Whether the sequence has as many tokens as the video, and x the shape of tokens."""
        return self.x.shape == (self.scene.batch, self.scene.tokens, WIDTH)

    def tag(self) -> int:
        """The number of the next attention."""
        self.tags += 1
        return self.tags - 1


def draw_scene(draw: Draw) -> Scene:
    """A small video; now and then two of its sizes are the same, or that of the batch.

    There are few of them: PyTorch remembers what an operator does to shapes that it has seen.
    """
    grid = draw.of(*GRIDS)
    batch = draw.of(2, 1, grid[0])
    source: Source = draw.of("channels first", "channels first", "frames first", "packed")
    patch = draw.of((1, 2, 2), (1, 1, 1), (2, 2, 2))
    return Scene(grid=grid, batch=batch, text=draw.of(3, 7), patch=patch, source=source)
