"""A hook of mkdocs: files outside of this folder that the pages link to become part of the site.

The pages keep the relative links with which they work in the repository. In the site such a file has its path in
the repository. DESIGN.md, CONTRIBUTING.md and CHANGELOG.md become pages.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ABOVE = ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")
"""Pages from the root of the repository."""
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[\w-]+)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and the files that pages link to."""
    for name in ABOVE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for _, target, _, _ in LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            if not path.startswith("docs/") and path not in ABOVE and path != "README.md":
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to the places in the site."""

    def link(found: re.Match[str]) -> str:
        opening, target, anchor, closing = found.groups()
        path = _in_repository(page.file.src_uri, target)
        path = "index.md" if path == "README.md" else path.removeprefix("docs/")
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"{opening}{posixpath.relpath(path, start)}{anchor or ''}{closing}"

    return LINK.sub(link, markdown)


def _in_repository(page: str, target: str) -> str:
    """The path in the repository of the target of a link; pages of the root link from there."""
    return posixpath.normpath(target if page in ABOVE else f"docs/{target}")
