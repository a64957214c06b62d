"""Find the words that went, as CONTRIBUTING.md lists them: `python docs/words.py [PATH...]`.

In Markdown everything is searched except code, inline code and the list itself; in Python comments and strings.
"""

import argparse
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("README.md", "DESIGN.md", "CONTRIBUTING.md", "docs", "sparsify_compiler")
"""Files and folders that have none of these words."""

LIST = re.compile(r"<!-- words -->.*?<!-- /words -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r'"""(Of|By|What)\b')
OUTPUT = re.compile(r"<!-- output.*?<!-- /output -->", re.DOTALL)


def went() -> dict[str, str]:
    """Word -> words to use instead, from the list in CONTRIBUTING.md."""
    found = LIST.search((ROOT / "CONTRIBUTING.md").read_text())
    assert found, "CONTRIBUTING.md must hold the list between <!-- words --> and <!-- /words -->"
    rows = [line.strip("| ").split(" | ") for line in found[0].splitlines() if line.startswith("|")][2:]
    return {word: instead for words, instead in rows for word in words.split(", ")}


def blank(found: re.Match[str]) -> str:
    """As many lines, with nothing in them."""
    return "\n" * found[0].count("\n")


def prose(path: Path) -> str:
    """The text of a file that people read, on the lines where it stands."""
    text = path.read_text()
    if path.suffix != ".py":
        for pattern in (LIST, OUTPUT, CODE):
            text = pattern.sub(blank, text)
        return text
    lines = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
            for number, line in enumerate(token.string.splitlines(), token.start[0] - 1):
                lines[number] += line.strip("# ") + " "
    return CODE.sub(blank, "\n".join(lines))


def find(paths: Iterable[Path]) -> Iterator[str]:
    """`file:line: word -> instead` for each word that went, in files and in the files of folders."""
    words = went()
    spaced = sorted((r"\s+".join(map(re.escape, word.split())) for word in words), key=len, reverse=True)
    pattern = re.compile(rf"\b(?:{'|'.join(spaced)})\b", re.IGNORECASE)
    for path in paths:
        inside = sorted((*path.rglob("*.md"), *path.rglob("*.py"))) if path.is_dir() else [path]
        for file in inside:
            text = prose(file)
            for found in pattern.finditer(text):
                word = " ".join(found[0].split())
                line = text.count("\n", 0, found.start()) + 1
                yield f"{file}:{line}: {word!r} -> {words[word.lower()]}"
            for found in OPENING.finditer(text) if file.suffix == ".py" else ():
                line = text.count("\n", 0, found.start()) + 1
                yield f"{file}:{line}: a docstring begins with {found[1]!r} -> a verb or a noun"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python docs/words.py", description="Find words that went.")
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / path for path in PATHS])
    lines = list(find(parser.parse_args().paths))
    print(*lines, sep="\n")
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
