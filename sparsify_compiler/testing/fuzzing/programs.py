"""Programs of tokens: patches are cut, tokens move, attention runs over them; kinds `tokens` and `writes`.

A program is drawn move by move (`moves.py`). What cannot run is left out.
"""

import contextlib
from collections.abc import Callable

from torch import Tensor

from sparsify_compiler.testing.fuzzing.cases import Case, Draft, Draw, Scene
from sparsify_compiler.testing.fuzzing.machines import CHANNELS, WIDTH, Places

Move = Callable[["Tokens", Draw], str]
"""Statements for tokens such as these; empty where the move is none for them."""


GRIDS = ((3, 2, 4), (3, 3, 3), (4, 2, 3), (5, 3, 2), (2, 3, 4), (3, 4, 2))
"""(frames, rows, columns) of the videos that programs are for."""


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
        return self.names["x"]  # type: ignore[no-any-return]

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def count(self) -> int:
        """Tokens of the sequence."""
        return self.x.shape[1]

    @property
    def is_video(self) -> bool:
        """Whether the sequence has as many tokens as the video, and x the shape of tokens."""
        return self.x.shape == (self.scene.batch, self.scene.tokens, WIDTH)

    @property
    def video(self) -> slice:
        """Where in the sequence the video's tokens are, or would be."""
        return slice(self.before, self.before + self.scene.tokens)

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
    source = draw.of("channels first", "channels first", "frames first", "packed")
    patch = draw.of((1, 2, 2), (1, 1, 1), (2, 2, 2))
    return Scene(grid=grid, batch=batch, text=draw.of(3, 7), patch=patch, source=source)  # type: ignore[arg-type]


def embed(tokens: Tokens, draw: Draw) -> str:
    """From the video to x, in one of the ways that a grid can be known by."""
    scene, (frames, rows, columns) = tokens.scene, tokens.scene.grid
    if scene.source == "packed":
        how = draw.of("meshgrid", "repeats", "sums")
        mesh = f" + m.mesh({frames}, {rows}, {columns}, {how!r})" if draw.chance(85) else ""
        return f"x = m.linear(video){mesh}"
    way = draw.of("conv3d", "cut", "conv2d")
    video = "video.transpose(1, 2)" if scene.source == "frames first" else "video"
    if way == "conv3d":
        to_tokens = draw.of(".flatten(2).transpose(1, 2)", ".flatten(2).mT", ".permute(0, 2, 3, 4, 1).flatten(1, 3)",
                            f".reshape({scene.batch}, {WIDTH}, -1).permute(0, 2, 1)")  # fmt: skip
        return f"x = m.conv3d({video}){to_tokens}"
    if way == "conv2d" and scene.patch[0] == 1:
        images = "video" if scene.source == "frames first" else "video.transpose(1, 2)"
        to_tokens = draw.of(f".flatten(1, 2).reshape({scene.batch}, -1, {WIDTH})",
                            f".unflatten(0, ({scene.batch}, {frames})).flatten(1, 3)")  # fmt: skip
        return f"x = m.conv2d({images}.flatten(0, 1)).permute(0, 2, 3, 1){to_tokens}"
    sizes = [n for pair in zip(scene.grid, scene.patch, strict=True) for n in pair]
    return (
        f"x = {video}.reshape({scene.batch}, {CHANNELS}, {', '.join(map(str, sizes))})\n"
        "x = m.linear(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)).flatten(1, 3)"
    )


def embed_freely(tokens: Tokens, draw: Draw) -> str:
    """From the video to [batch, tokens, WIDTH], any of its axes anywhere."""
    scene, (frames, _, _) = tokens.scene, tokens.scene.grid
    video = "video.transpose(1, 2)" if scene.source == "frames first" else "video"
    way = draw.of("conv3d", "conv2d", "pixels", "images of channels")
    if way == "conv2d" and scene.patch[0] == 1:
        first, axes = f"m.conv2d({video}.transpose(1, 2).flatten(0, 1)).unflatten(0, ({scene.batch}, {frames}))", "bfchw"
    elif way == "images of channels":
        first, axes = f"m.conv2d({video}.flatten(0, 1)).unflatten(0, ({scene.batch}, {CHANNELS}))", "bkchw"
    elif way == "pixels" and scene.patch == (1, 1, 1):
        first, axes = video, "bcfhw"
    else:
        first, axes = f"m.conv3d({video})", "bcfhw"
    lines = [f"x = {first}"]
    for _ in range(draw.integer(0, 2)):
        order = draw.permutation(len(axes))
        lines.append(f"x = x.permute({', '.join(map(str, order))})")
        axes = "".join(axes[at] for at in order)
    rest = [axis for axis in axes if axis not in "bc"]
    wanted = draw.of(["b", *rest], [*draw_order(draw, axes)])
    if len(wanted) < len(axes):
        wanted = [*wanted, "c"]
    lines.append(f"x = x.permute({', '.join(str(axes.index(axis)) for axis in wanted)})")
    first, last = draw.of((1, 4), (draw.integer(0, 2), draw.integer(3, 5)))
    x = "x" if last == 5 else f"x.flatten({last})"
    x = f"{x}.unsqueeze(-1)" if last == 5 else x
    x = f"{x}.flatten({first}, {last - 1})"
    x = f"{x}.flatten(0, {first - 1})" if first else f"{x}.unsqueeze(0)"
    lines.append(f"x = m.linear({x})")
    return "\n".join(lines)


def draw_order(draw: Draw, axes: str) -> list[str]:
    """The letters in any order."""
    return [axes[at] for at in draw.permutation(len(axes))]


def draw_program(kind: str, draw: Draw) -> Case:
    """A program of the kind `tokens` or `writes`."""
    from sparsify_compiler.testing.fuzzing import moves

    tokens = Tokens(draw_scene(draw))
    freely = tokens.scene.source != "packed" and draw.chance(15)
    while not tokens.add((embed_freely if freely else embed)(tokens, draw)):
        freely = False
    kept, moved = moves.TABLES[kind]
    mood = draw.of("kept", "kept", "returning", "moved")
    tables = {"kept": [kept], "returning": [kept, moves.RETURNING], "moved": [kept, moved, moved]}[mood]
    for _ in range(draw.integer(0, 7)):
        with contextlib.suppress(ZeroDivisionError):
            if move := draw.of(*draw.of(*tables))(tokens, draw):
                tokens.add(move)
    tokens.add(draw.of(*moves.ATTEND[kind])(tokens, draw))
    return Case(kind=kind, scene=tokens.scene, moves=tuple(tokens.moves))
