"""Functions that save pictures, with errors that say what to try. They import matplotlib when they draw."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.outputs import check_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> "Figure":
    """An empty figure, with width and height in inches; raises SparsifyError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SparsifyError(
            "the picture needs matplotlib: try pip install 'sparsify-compiler[demo]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def check(path: Path) -> None:
    """Check that a picture can be saved at a path, and make the folders that are missing.

    Raises:
        SparsifyError: the path cannot be written to, or has no suffix that matplotlib knows; matplotlib is missing.
    """
    if path.is_dir():
        raise SparsifyError(f"cannot save the picture as {path}: it is a folder. Try {path / 'picture.png'}")
    ending, known = path.suffix[1:].lower(), figure(1, 1).canvas.get_supported_filetypes()
    if ending not in known:
        raise SparsifyError(
            f"cannot save the picture as {path}: its name must end in one of {', '.join(known)}, "
            f"got {ending!r}. Try {path.with_suffix('.png')}"
        )
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        check_file(path)


def save(drawn: "Figure", path: str | Path) -> Path:
    """Write a figure in the format of the path's suffix, and make the folders that are missing.

    Raises:
        SparsifyError: the path cannot be written to, or has no suffix that matplotlib knows.
    """
    path = Path(path)
    check(path)
    with _writing(path):
        drawn.savefig(path, dpi=150)
    return path


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a SparsifyError."""
    try:
        yield
    except OSError as error:
        raise SparsifyError(
            f"cannot save the picture as {path}: {error}. Try a folder that can be written to"
        ) from error
