"""Checks that a command can write its outputs, made before its work: a run of hours must not fail at a path."""

import functools
import os
import tempfile
from pathlib import Path

import torch

from sparsify_compiler.errors import OptionError


@functools.cache
def cache_folder() -> Path:
    """The folder for what later processes use: next to torch.hub's directory, or one for this process if that is
    read-only."""
    path = Path(torch.hub.get_dir()).parent / "sparsify_compiler"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="sparsify_compiler-"))
    return path if os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix="sparsify_compiler-"))


def make_folder(out: Path, *names: str) -> None:
    """Make a folder, and check that files of these names can be written in it.

    Raises:
        OptionError: the folder cannot be made or written to, or one of the names is a folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OptionError(
            f"out must be a folder that can be written to, got {str(out)!r}: {error}. Try another folder"
        ) from error
    for name in names:
        if (out / name).is_dir():
            raise OptionError(
                f"{out / name} must be a file, got a folder: remove it, or give another folder as out"
            )


def check_page(path: str | Path) -> Path:
    """Check that an HTML page can be written to a path. Return it.

    Raises:
        OptionError: the suffix is another, the folder does not exist, or the file cannot be written.
    """
    if not isinstance(path, (str, Path)):
        raise OptionError(f"the report must be the path of an HTML file, got {path!r}")
    path = Path(path)
    if path.is_dir():
        raise OptionError(
            f"the report must be a file, got the folder {str(path)!r}: try {path / 'report.html'}"
        )
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(
            f"the report is an HTML page, so its name must end in .html, got {str(path)!r}: try "
            f"{path.with_suffix('.html') if path.name else 'report.html'}"
        )
    if not path.parent.is_dir():
        raise OptionError(f"the folder of the report must exist, got {str(path)!r}: make {path.parent} first")
    try:
        check_file(path)
    except OSError as error:
        raise OptionError(
            f"the report must be a file that can be written, got {str(path)!r}: {error}. Try another folder"
        ) from error
    return path


def check_file(path: Path) -> None:
    """Check that a file can be written; a file that exists does not change.

    Raises:
        OSError: the file cannot be written.
    """
    is_new = not os.path.lexists(path)
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()
