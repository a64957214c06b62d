"""`Applied.report`: one page without scripts or links, whose numbers are those of `stats` and `explain`."""

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsify_compiler
from sparsify_compiler import page
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.measured import CallTime
from sparsify_compiler.page import document, run_of
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.videos import Video, latents, steps

pytestmark = pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")

GRID = (5, 4, 6)


class Page(HTMLParser):
    """The tables, pictures and words of a page. Fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.tables: dict[str, list[list[str]]] = {}
        """Caption -> rows of cells; the first row has the headings."""
        self.pictures: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self._caption, self._rows = "", list[list[str]]()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("rect", "path"), f"<{tag}/> does not close a tag in HTML"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = dict(attrs)
        assert len(named) == len(attrs)
        assert not {name for name in named if name.startswith("on") or name in ("href", "src")}
        if tag == "svg":
            self.pictures.append(named)
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag
        if tag == "table":
            self.tables.setdefault(self._caption, self._rows)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self._rows[-1][-1] += data
        elif self.open and self.open[-1] == "caption":
            self._caption = data
        elif self.open and self.open[-1] == "p":
            self.words.append(data)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Page, str]]:
    """(what apply returned, its page, the text of the page) after a video with a dense layer and dense steps."""
    torch._dynamo.reset()
    model = Video()
    changed = sparsify_compiler.apply(
        model, method="svg2", q_clusters=4, kv_clusters=12, min_gain=None, top_p=0.5, dense_steps=2,
        dense_layers=1, measure_recall=0.2, inner_backend="eager",
    )  # fmt: skip
    steps(model, latents(GRID), 5)
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert changed.report(path) == path
    text = path.read_text()
    yield changed, Page(text), text
    del model  # an applied model is not kept by what apply returns


def test_the_page_is_one_file_that_loads_nothing(dynamic: tuple[Any, Page, str]) -> None:
    _, found, text = dynamic
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    assert found.tags >= {"title", "main", "h1", "caption"}
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text


def test_its_numbers_are_those_of_stats(dynamic: tuple[Any, Page, str]) -> None:
    changed, found, _ = dynamic
    stats = changed.stats()
    heads, *rows = found.tables["Density by attention (rows) and step (columns)"]
    assert heads == ["attention", "2", "3", "4"]
    for name, *cells in rows:
        mine = {one.step: one.density.mean().item() for one in stats.measurements if one.site == name}
        assert cells == [f"{mine[step]:.3f}" for step in (2, 3, 4)]
    assert [row[0] for row in rows] == ["blocks.1", "blocks.2"]
    heads, *rows = found.tables["Means of each attention over all its sparse calls"]
    for name, *cells in rows:
        some = [one for one in stats.measurements if one.site == name]
        for field in ("density", "kept", "recall", "far_field"):
            mean = torch.stack([getattr(one, field).mean() for one in some]).mean().item()
            assert cells[heads.index(field.replace("_", " ")) - 1] == f"{mean:.3f}", field
    heads, *rows = found.tables["Time of each call"]
    assert [(row[0], row[2]) for row in rows] == [(str(i), "dense" if i < 2 else "sparse") for i in range(5)]
    for row, one in zip(rows, stats.times, strict=True):
        assert (row[3], row[4]) == (f"{one.wall:.4f}", f"{one.cpu:.4f}")
        assert one.wall > 0
    assert "The last video has 2 dense and 3 sparse calls." in found.words[0]
    assert f"The mean density of the sparse ones is {stats.density:.3f}." in found.words[0]


def test_what_stayed_dense_has_its_reason(dynamic: tuple[Any, Page, str]) -> None:
    changed, found, _ = dynamic
    (plan,) = (one for one in changed.explain().plans if one.method == "dense")
    assert found.tables["Attention that stayed the model's own call"][1:] == [
        ["blocks.0", "self", "120", plan.reason]
    ]
    assert ["top_p", "0.5"] in found.tables["The options that were given"]
    versions = dict(map(tuple, found.tables["Versions"][1:]))
    assert versions["torch"] == torch.__version__
    assert versions["sparsify-compiler"] == sparsify_compiler.__version__
    assert found.tables["Machine"][1][0] == "cpu"


def cells_of(picture: str, kind: str) -> set[tuple[int, int]]:
    """The cells (x, y) of one kind in a picture of a frame."""
    found = re.search(rf'<path class="{kind}" d="([^"]*)"', picture)
    runs = re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", found[1]) if found else []
    return {(int(x) + i, int(y)) for x, y, length in runs for i in range(int(length))}


def test_the_choice_of_a_dynamic_site_is_drawn(dynamic: tuple[Any, Page, str]) -> None:
    """The pictures have the keys that were read, in a call that had this density."""
    changed, found, text = dynamic
    example = changed.stats().example
    assert example.site == "blocks.1"
    pictures = re.findall(r'<svg class="frame".*?</svg>', text)
    drawn = torch.zeros(2, *GRID, dtype=torch.bool)
    for frame, picture in enumerate(pictures):
        for place, kind in enumerate(("read", "own")):
            for x, y in cells_of(picture, kind):
                drawn[place, frame, y, x] = True
    assert torch.equal(drawn[0].flatten(), example.keys)
    assert torch.equal(drawn[1].flatten(), example.queries)
    assert drawn[1, 2, 2, 3], "the token in the middle"
    assert 0 < example.keys.sum() < example.keys.numel()
    assert [one["aria-label"] for one in found.pictures[1:]] == [
        f"Frame {frame}: {int(drawn[0, frame].sum())} of 24 tokens read"
        + (f", {count} in the query block" if (count := int(drawn[1, frame].sum())) else "")
        for frame in range(5)
    ]
    assert all(one["role"] == "img" and one["aria-label"] for one in found.pictures)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_table_that_is_known_before_is_drawn_too(tmp_path: Path) -> None:
    """The middle frame reads itself and the two references."""
    model = Video(1)
    changed = sparsify_compiler.apply(model, method="tile", reference_frames=2, inner_backend="eager")
    with pytest.raises(SparsifyError, match="run the pipeline first"):
        changed.report(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    steps(model, latents((5, 2, 3)), 1)
    text = changed.report(tmp_path / "page.html").read_text()
    pictures = re.findall(r'<svg class="frame".*?</svg>', text)
    read = [len(cells_of(picture, "read")) for picture in pictures]
    assert read == [6, 0, 6, 6, 0], "frames 0 and 3 are the references"
    assert [len(cells_of(picture, "own")) for picture in pictures] == [0, 0, 6, 0, 0]
    assert "Recall was not measured" in text


@pytest.mark.usefixtures("fresh_dynamo")
def test_errors_are_shown_where_they_are_limited(dynamic: tuple[Any, Page, str], tmp_path: Path) -> None:
    model = Video(1)
    changed = sparsify_compiler.apply(
        model,
        method="cubes",
        cube=(1, 2, 2),
        max_error=0.2,
        dense_layers=0,
        dense_steps=0,
        inner_backend="eager",
    )
    steps(model, latents(GRID), 2)
    found = Page(changed.report(tmp_path / "page.html").read_text())
    heads, row = found.tables["Means of each attention over all its sparse calls"]
    stats = changed.stats()
    for field in ("asked_error", "estimated_error", "measured_error"):
        assert row[heads.index(field.replace("_", " "))] == f"{stats.mean(field):.3f}"
    assert any("Asked error: the largest relative error" in words for words in found.words)
    assert "asked error" not in dynamic[1].tables["Means of each attention over all its sparse calls"][0]


@pytest.mark.usefixtures("fresh_dynamo")
def test_calls_that_cuda_graphs_replay_keep_no_example() -> None:
    """A tensor of the pool of a CUDA graph must not outlive its call."""
    for mode, kept in ((None, True), ("reduce-overhead", False)):
        torch._dynamo.reset()
        model = Video(1)
        changed = sparsify_compiler.apply(
            model,
            mode=mode,
            method="cubes",
            cube=(1, 2, 2),
            dense_layers=0,
            dense_steps=0,
            inner_backend="eager",
        )
        steps(model, latents(GRID), 1)
        assert changed.stats().measurements
        assert (changed.stats().example is not None) == kept


def test_a_row_of_a_table_is_that_of_its_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    table = BlockTable.from_block_mask(
        torch.rand(1, 1, 4, 5, generator=generator) > 0.5,
        torch.tensor([[[3, 0, 4, 5]]]),
        torch.tensor([[[2, 6, 0, 1, 3]]]),
        q_order=torch.randperm(12, generator=generator).int()[None, None],
        kv_order=torch.randperm(12, generator=generator).int()[None, None],
    )
    mask = table.mask()[0, 0]
    for query in range(12):
        queries, keys = table.row_of(query)
        assert torch.equal(keys, mask[query])
        assert queries[query]
        assert all(torch.equal(mask[other], keys) for other in queries.nonzero()[:, 0].tolist())
        assert int(queries.sum()) in (3, 4, 5)


def test_names_are_escaped(dynamic: tuple[Any, Page, str]) -> None:
    changed, _, _ = dynamic
    run = page.run_of(changed.models[0], "<b>\"'&amp;</b>")
    text = page.document([page.ModelRun(
        name=run.name, options={"<script>": "<i>&"}, stats=run.stats, explanation=run.explanation
    )])  # fmt: skip
    assert "<b>" not in text
    assert "<script>" not in text
    assert f"<h2>{html.escape(run.name)}</h2>" in text
    assert ["<script>", "'<i>&'"] in Page(text).tables["The options that were given"]


def test_a_call_that_compiles_is_no_usual_one(dynamic: tuple[Any, Page, str]) -> None:
    changed, *_ = dynamic
    dense = CallTime(call=0, step=0, stream=0, phase="dense", wall=9.0, cpu=9.0)
    sparse = [replace(dense, phase="sparse", wall=wall) for wall in (5.0, 0.25, 0.5, 0.75)]
    run = run_of(changed.models[0], "model")
    assert run.stats is not None
    summary = document([replace(run, stats=replace(run.stats, times=(dense, *sparse)))])
    assert "without the first of its phase: sparse 0.500 s." in summary


@pytest.mark.parametrize("path", [None, 5])
def test_a_page_has_a_path(dynamic: tuple[Any, Page, str], path: Any) -> None:
    with pytest.raises(OptionError, match="must be the path of an HTML file, got"):
        dynamic[0].report(path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere/page.html", "folder of the report must exist"),
        ("", "must be a file, got the folder"),
        ("page", "must end in .html"),
        ("page.html.txt", "must end in .html"),
        ("page.html/x.html", "folder of the report must exist"),
    ],
)
def test_bad_paths_are_refused(dynamic: tuple[Any, Page, str], tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(OptionError, match=says):
        dynamic[0].report(tmp_path / name)
    assert (tmp_path / "page.html").read_text() == "old"
