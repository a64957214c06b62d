"""The common parts of the benchmarks: a description of the machine, and the JSON that they write."""

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsify_compiler.lab.machine import machine

__all__ = ["machine", "row_in_a_process", "write_json"]


def write_json(path: Path, cases: list[dict[str, Any]], *, lines: bool = False, **about: Any) -> None:
    """Write the cases, with the machine, the date, the command and further facts `about` them.

    lines: whether each case has its own line.
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


def row_in_a_process(command: list[str]) -> dict[str, Any]:
    """The result that a module prints as its last line, in JSON; its errors as a `fault` where it prints none.

    Args:
        command: the module and its arguments.
    """
    ran = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    try:
        return dict(json.loads(ran.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        return {"fault": (ran.stderr or "no output").strip()[-300:]}
