"""Tables of moves, and the numbers in their lines."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsify_compiler.testing.fuzzing.cases import Draw, lines
from sparsify_compiler.testing.fuzzing.machines import WIDTH
from sparsify_compiler.testing.fuzzing.tokens import Tokens

OTHERS = lines("""
    x.flip(1)
    x.roll({n}, 1)
    torch.cat([x[:, {n}:], x[:, :{n}]], 1)
    x.flip(0)
    F.pad(x, (0, 0, -1, 1))
""")
"""Tokens in another order."""


def _place(t: Tokens, draw: Draw) -> int:
    """A place between two tokens, sometimes between two frames."""
    frame = t.scene.tokens // t.scene.grid[0]
    return draw.of(draw.integer(1, max(t.count - 1, 1)), t.before + frame, t.before + t.scene.tokens - frame)


NUMBERS: dict[str, Callable[[Tokens, Draw], Any]] = {
    "B": lambda t, draw: t.batch,
    "S": lambda t, draw: t.count,
    "C": lambda t, draw: WIDTH,
    "f": lambda t, draw: t.scene.grid[0],
    "h": lambda t, draw: t.scene.grid[1],
    "w": lambda t, draw: t.scene.grid[2],
    "g": lambda t, draw: f"x.unflatten(1, {t.scene.grid})",
    "n": _place,
    "i": lambda t, draw: draw.integer(0, t.count - 1),
    "j": lambda t, draw: draw.integer(0, t.count - 1),
    "a": lambda t, draw: draw.divisor(t.count),
    "perm": lambda t, draw: draw.permutation(t.count),
    "axis": lambda t, draw: draw.integer(1, 3),
    "order": lambda t, draw: ", ".join(str(1 + axis) for axis in draw.permutation(3)),
    "k": lambda t, draw: draw.integer(0, min(t.scene.grid) - 1),
    "tag": lambda t, draw: t.tag(),
    "copy": lambda t, draw: draw.of("x.clone()", "torch.zeros_like(x)", "x.contiguous().clone()"),
    "blank": lambda t, draw: draw.of("torch.empty_like(x)", "torch.zeros_like(x)", "x.clone()"),
    "other": lambda t, draw: filled(draw.of(*OTHERS), t, draw),
}
"""B, S, C, f, h, w: batch, tokens, channels, frames, rows, columns. g: the tokens on their grid. n: a place in
the sequence. i, j: two tokens. a: a divisor of the number of tokens. perm: an order of the tokens. axis, order,
k: an axis of the grid, an order of its axes, an index into any of them. tag: the next attention. copy, blank: a
buffer that is written in part, a buffer that is written completely. other: the tokens in another order."""


def filled(line: str, t: Tokens, draw: Draw, **more: Any) -> str:
    """A line of a table with drawn numbers, as statements."""
    names = {name for _, name, _, _ in string.Formatter().parse(line) if name}
    numbers = {name: NUMBERS[name](t, draw) for name in sorted(names - more.keys())}
    return line.format(**numbers, **more)


@dataclass(frozen=True)
class Table:
    """A move that is one of these lines."""

    lines: tuple[str, ...]
    video: bool
    """Whether it needs a sequence of only the video's tokens."""

    def __call__(self, t: Tokens, draw: Draw) -> None:
        """Append one of the lines to a program."""
        if t.is_video or not self.video:
            t.add(filled(draw.of(*self.lines), t, draw))


def table(text: str, *, inside: str = "{line}", video: bool = False) -> Table:
    """The table with the lines of a text.

    Args:
        inside: the text around each line.
        video: whether the lines need a sequence of only the video's tokens.
    """
    return Table(tuple(inside.replace("{line}", line) for line in lines(text)), video)
