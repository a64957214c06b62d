"""Files of a run, which is a folder.

A file is written under another name and then renamed, so it is complete or missing.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.errors import OptionError, SparsifyError

REMOVE = "remove it, and the run makes it again"


class DamagedError(SparsifyError):
    """A file of a run cannot be read."""


def refuse_others(out: Path, found: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Check that the settings found in a folder are those of this run.

    Raises:
        OptionError: one differs.
    """
    if odd := [name for name in mine if found.get(name) != mine[name]]:
        differences = ", ".join(f"{name} {found.get(name)!r} there and {mine[name]!r} now" for name in odd)
        raise OptionError(
            f"{out} holds a run of other settings: {differences}. Give those, or another folder"
        )


def digest(path: Path) -> str:
    """Hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """Read the tensor in a file; make and write it first if there is no file."""
    if not path.exists():
        write(path, lambda partial: torch.save(make(), partial))
    tensor = read_tensors(path)
    if not isinstance(tensor, Tensor):
        raise DamagedError(f"{path} must hold a tensor, got {type(tensor).__name__}: {REMOVE}")
    return tensor


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer` write a file, then rename that file to `path`."""
    partial = path.with_name(path.name + ".partial")
    writer(partial)
    partial.replace(path)


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record.

    Raises:
        SparsifyError: one of its numbers is not finite.
    """
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise SparsifyError(f"every number of {path} must be finite: {error}") from error
    write(path, lambda partial: partial.write_text(text, "utf-8"))


def read_tensors(path: Path) -> Any:
    """Read a file that torch.save wrote, and check every byte.

    Raises:
        DamagedError: the file is cut off or altered.
    """
    # A damaged file may raise anything; torch itself does not check the sums of a zip file.
    try:
        with zipfile.ZipFile(path) as file:
            if name := file.testzip():
                raise zipfile.BadZipFile(f"{name} has another checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedError(f"{path} is damaged ({type(error).__name__}: {error}): {REMOVE}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        DamagedError: the file holds none.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither text nor JSON
        raise DamagedError(f"{path} is damaged ({error}): {REMOVE}") from error
    if not isinstance(content, dict):
        raise DamagedError(f"{path} must hold a JSON object, got {type(content).__name__}: {REMOVE}")
    return content
