"""The messages of the package's errors and warnings, and the entries for them in docs/troubleshooting.md.

    python docs/messages.py    # messages that have no entry

A message is the text in a call that makes an error, warns, or logs a warning; `...` stands for a value.
An entry is a row of a table, whose first cell has patterns in inline code, in which `...` is any text.
`tests/test_docs.py` fails where a message has no entry, where a pattern fits no message, and where it has fewer
than two words of its own, so that it would fit almost everything.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sparsify_compiler"
PAGE = ROOT / "docs" / "troubleshooting.md"
LEFT_OUT = ("testing",)
"""Rooms whose errors no user sees."""
WARNS = ("warn", "warning", "warn_once")
FILLED_IN = "..."
REASONS = "## Attention stays dense"
"""The section after those of the messages. It has reasons of plans."""


class Message(NamedTuple):
    """A message and its place in the code."""

    text: str
    place: str


def messages(package: Path = PACKAGE) -> Iterator[Message]:
    """The messages of all files. Those whose text comes from a variable are left out: it is written elsewhere."""
    files = [
        path for path in sorted(package.rglob("*.py")) if path.relative_to(package).parts[0] not in LEFT_OUT
    ]
    nodes = {path: [*ast.walk(ast.parse(path.read_text()))] for path in files}
    classes = [node for some in nodes.values() for node in some if isinstance(node, ast.ClassDef)]
    errors, before = {"SparsifyError"}, 0
    while len(errors) > before:
        before = len(errors)
        errors |= {one.name for one in classes if any(_name(base) in errors for base in one.bases)}
    for path, some in nodes.items():
        texts = {
            _name(node.targets[0]): node.value.value
            for node in some
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for node in some:
            if isinstance(node, ast.Call) and node.args and _name(node.func) in {*errors, *WARNS}:
                text = re.sub(r"%[.\w]*[srdf]", FILLED_IN, _template(node.args[0], texts))
                if text.replace(FILLED_IN, "").strip(" .:"):
                    yield Message(text, f"{path.relative_to(package)}:{node.lineno}")


def patterns(page: Path = PAGE) -> list[str]:
    """The patterns of all entries."""
    text = page.read_text().split(REASONS)[0]
    rows = re.findall(r"^\| (`.*?`(?:<br>`.*?`)*) \|", text, re.MULTILINE)
    return [pattern for row in rows for pattern in re.findall(r"`(.*?)`(?:<br>|$)", row)]


def fits(pattern: str, text: str) -> bool:
    """Whether a message is one that a pattern describes; a message may be longer."""
    return _expression(pattern).match(text) is not None


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    words = (re.escape(part.strip()) for part in pattern.split(FILLED_IN))
    return re.compile(r"\s*.*?".join(words), re.DOTALL)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _template(node: ast.expr, texts: Mapping[str, object]) -> str:
    """The text of an expression, with `...` for values. `texts`: name -> value of constants."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.Name) and isinstance(texts.get(node.id), str):
        return str(texts[node.id])
    if isinstance(node, ast.FormattedValue):
        return _template(node.value, texts) if isinstance(node.value, ast.Name) else FILLED_IN
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, texts) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, texts) + _template(node.right, texts)
    return FILLED_IN


def main() -> None:
    known = patterns()
    for text, place in messages():
        if not any(fits(one, text) for one in known):
            print(f"{place}: {text}")


if __name__ == "__main__":
    main()
