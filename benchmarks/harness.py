"""What the benchmarks share: the machine in words, and the JSON they write."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsify_compiler.lab.machine import machine

__all__ = ["machine", "write_json"]


def write_json(path: Path, cases: list[dict[str, Any]], *, lines: bool = False, **about: Any) -> None:
    """The cases, with the machine, the date, the command and what else is said `about` them.

    lines: each case in a line of its own.
    """
    module = sys.modules["__main__"].__spec__
    command = ["python", *(["-m", module.name] if module else sys.argv[:1]), *sys.argv[1:]]
    record = {
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        **about,
        "cases": [] if lines else cases,
    }
    text = json.dumps(record, indent=2)
    if lines:
        text = text.replace('"cases": []', '"cases": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
