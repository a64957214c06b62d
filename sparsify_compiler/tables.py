"""Tables of attention sites as text. Imports rich."""

import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def fitting(
    console: Console,
    options: ConsoleOptions,
    names: Sequence[str],
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> RenderResult:
    """A table with a row for each site; no name is cut off. Cells may have several lines.

    If the console has too few columns, headings take two lines. If that is not enough, each name stands on a line
    above its row, and the widest column of the row may take several lines.
    """

    def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
        result = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in headings:
            result.add_column(heading, no_wrap=True)
        for row in rows:
            result.add_row(*row)
        return result

    on_two_lines = [heading.replace(" ", "\n") for heading in headings]
    for form in (headings, on_two_lines):
        wide = table(["site", *form], ([name, *row] for name, row in zip(names, rows, strict=True)))
        if console.measure(wide, options=options.update(max_width=sys.maxsize)).maximum <= options.max_width:
            yield wide
            return
    widths = [
        max(len(line) for cell in cells for line in cell.split("\n"))
        for cells in zip(on_two_lines, *rows, strict=True)
    ]
    widest = widths.index(max(widths))
    widths[widest] = max(1, widths[widest] - max(0, 2 + sum(widths) + len(widths) - options.max_width))
    for name, row in (("site", on_two_lines), *zip(names, rows, strict=True)):
        grid = Table.grid(padding=(0, 1, 0, 0))
        for width in widths:
            grid.add_column(width=width, overflow="fold")
        grid.add_row(*row)
        yield Text(name, overflow="fold")
        yield Padding(grid, (0, 0, 0, 2), expand=False)
    yield ""
