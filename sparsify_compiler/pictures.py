"""Saving pictures, with errors that say what to try. matplotlib is imported when a picture is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_compiler.errors import SparsifyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches; SparsifyError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SparsifyError(
            "the picture needs matplotlib: try pip install 'sparsify-compiler[demo]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: "Figure", path: str | Path) -> Path:
    """Write a figure in the format of the path's ending, folders made where they are missing.

    Raises:
        SparsifyError: the path cannot be written to, or has no ending that matplotlib knows.
    """
    path = Path(path)
    if path.is_dir():
        raise SparsifyError(f"cannot save the picture as {path}: it is a folder. Try {path / 'picture.png'}")
    ending, known = path.suffix[1:].lower(), drawn.canvas.get_supported_filetypes()
    if ending not in known:
        raise SparsifyError(
            f"cannot save the picture as {path}: its name must end in one of {', '.join(known)}, "
            f"got {ending!r}. Try {path.with_suffix('.png')}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, dpi=150)
    except OSError as error:
        raise SparsifyError(
            f"cannot save the picture as {path}: {error}. Try a folder that can be written to"
        ) from error
    return path
