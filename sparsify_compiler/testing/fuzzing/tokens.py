"""The tokens of a program while it is drawn, and the videos that programs run on."""

from collections.abc import Callable

from torch import Tensor

from sparsify_compiler.testing.fuzzing.cases import Draft, Draw, Scene, Source
from sparsify_compiler.testing.fuzzing.machines import WIDTH, Places

Move = Callable[["Tokens", Draw], None]
"""Appends something to a program, if its tokens allow it."""

GRIDS = ((3, 2, 4), (3, 3, 3), (4, 2, 3), (5, 3, 2), (2, 3, 4), (3, 4, 2))
"""(frames, rows, columns) of the videos that programs run on."""

MESHES = ("meshgrid", "repeats", "sums", "index", "embedding")
"""Spellings of positions."""


class Tokens(Draft):
    """A program of tokens that is run on `Places` while it is drawn. Between moves, x is [batch, tokens, WIDTH]."""

    def __init__(self, scene: Scene) -> None:
        places = Places(scene)
        video, text = places.inputs()
        super().__init__(m=places, video=video, text=text)
        self.scene = scene
        self.before = self.after = 0
        """Numbers of text tokens before and after the video's."""
        self.tags = 0
        """Number of attentions so far."""

    @property
    def x(self) -> Tensor:
        """The tokens."""
        return self.names["x"]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.x.shape[0]

    @property
    def count(self) -> int:
        """Number of tokens of the sequence."""
        return self.x.shape[1]

    @property
    def is_video(self) -> bool:
        """Whether x has the shape of the video's tokens."""
        return self.x.shape == (self.scene.batch, self.scene.tokens, WIDTH)

    def tag(self) -> int:
        """The number of the next attention."""
        self.tags += 1
        return self.tags - 1


def draw_scene(draw: Draw) -> Scene:
    """Draw a small video. Sometimes two of its sizes are equal, or one equals the batch.

    The set of videos is small, since PyTorch keeps the results of an operator on shapes it had before.
    """
    grid = draw.of(*GRIDS)
    batch = draw.of(2, 1, grid[0])
    source: Source = draw.of("channels first", "channels first", "frames first", "packed")
    patch = draw.of((1, 2, 2), (1, 1, 1), (2, 2, 2))
    return Scene(grid=grid, batch=batch, text=draw.of(3, 7), patch=patch, source=source)
