"""Attention whose sizes depend on values: a program for each of the sizes, next to the model's own code."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import needs_diffusers
from torch import Tensor, fx, nn

import sparsify_compiler
from sparsify_compiler import _torch
from sparsify_compiler.passes.run_time_sizes import NotKnownBefore, depends_on_values, run_time_sizes
from sparsify_compiler.runtime import by_values
from sparsify_compiler.testing.models import CASES
from sparsify_compiler.testing.models import GRID as LARGE
from sparsify_compiler.testing.videos import CHANNELS, latents

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]

GRID, VIDEO, TEXT, DIM = (3, 4, 5), 60, 8, 16
EXACT: dict[str, Any] = {
    "method": "svg2",
    "top_p": 1.0,
    "far_field": "drop",
    "dense_steps": 0,
    "dense_layers": 0,
    "inner_backend": "eager",
}
LENGTHS = ((5, 3), (8, 8), (1, 1), (5, 3))
"""The numbers of valid tokens of the two prompts of a call, call by call."""

Rows = Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]]
"""(block, text [B, T, dim], mask [B, T]) -> the text of each sequence, [B', tokens, dim]."""


def by_nonzero(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [text[i : i + 1, torch.nonzero(mask[i], as_tuple=False).flatten()] for i in range(len(text))]


def by_mask(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [text[i][mask[i]][None] for i in range(len(text))]


def by_selection(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [text[i].masked_select(mask[i][:, None]).view(1, -1, DIM) for i in range(len(text))]


def by_repeats(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [torch.repeat_interleave(one, m.long(), 0)[None] for one, m in zip(text, mask, strict=True)]


def to_the_longest(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [text[:, : int(mask.sum(1).max().item())]]


def split_by_lengths(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [one[None] for one in torch.split(text[mask], mask.sum(1).tolist())]


def packed(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    ends = F.pad(mask.sum(1).cumsum(0), (1, 0))
    flat = text.flatten(0, 1)[torch.where(mask.flatten())[0]]
    return [flat[int(ends[i]) : int(ends[i + 1])][None] for i in range(len(text))]


def by_a_parameter(block: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [text[i : i + 1, (block.score(text[i])[:, 0] > 0).nonzero().flatten()] for i in range(len(text))]


def by_chance(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    return [text[:, (torch.rand_like(text[0, :, 0]) > 2).logical_not().nonzero().flatten()]]


def after_a_write(_: nn.Module, text: Tensor, mask: Tensor) -> Sequence[Tensor]:
    mask = mask.clone()
    mask[:, 0] = False
    return by_nonzero(_, text, mask)


class Block(nn.Module):
    """Joint attention of the video and the valid text of its prompt."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows, self.norm = rows, nn.LayerNorm(DIM)
        self.qkv, self.proj, self.score = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 1)

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        rows = self.rows(self, text, mask)
        parts = self.norm(x).chunk(len(rows))
        return x + torch.cat(
            [self.attend(torch.cat([one, row], 1))[:, :VIDEO] for one, row in zip(parts, rows, strict=True)]
        )


class Prompted(nn.Module):
    """Two blocks over the patches of a video."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch = nn.Conv3d(CHANNELS, DIM, (1, 2, 2), (1, 2, 2))
            self.blocks = nn.ModuleList(Block(rows) for _ in range(2))
            self.out, self.time = nn.Linear(DIM, CHANNELS), nn.Linear(1, DIM)
        self.eval()

    def forward(self, hidden_states: Tensor, text: Tensor, mask: Tensor, timestep: Tensor) -> Tensor:
        x = (
            self.patch(hidden_states).flatten(2).transpose(1, 2)
            + self.time(timestep[:, None] / 1000)[:, None]
        )
        for block in self.blocks:
            x = block(x, text, mask)
        return self.out(x)


def inputs(lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    text = torch.randn(2, TEXT, DIM, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    return latents(GRID, 2), text, mask, torch.full((2,), 500.0)


@torch.no_grad()
def check(model: nn.Module, twin: nn.Module, lengths: tuple[int, ...]) -> None:
    got, expected = model(*inputs(lengths)), twin(*inputs(lengths))
    assert (got - expected).norm() <= 2e-5 * expected.norm()


def sparse_text(plans: Any) -> list[tuple[str, int]]:
    """Name, and number of text tokens, of every sparse attention."""
    found = [plan for plan in plans if plan.method == "svg2"]
    assert {plan.layout.grid for plan in found} <= {GRID}
    return [(plan.site.name, plan.layout.after) for plan in found]


def expected_text(rows: Rows, lengths: tuple[int, ...]) -> list[tuple[str, int]]:
    longest = max(lengths)
    taken = [longest] if rows is to_the_longest else [one - (rows is after_a_write) for one in lengths]
    return [(f"blocks.{i}" + (f"#{j + 1}" if j else ""), n) for i in range(2) for j, n in enumerate(taken)]


ALL = (by_nonzero, by_mask, by_selection, by_repeats, to_the_longest, split_by_lengths, packed)


def graph_of(rows: Rows, lengths: tuple[int, ...]) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Dynamo's graph of `rows`, with symbols for its sizes, and its inputs for prompts of these lengths."""
    found: list[Any] = []
    _, text, mask, _ = inputs(lengths)
    block = Block(rows)

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.append((gm, args))
            return gm(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda a, b: rows(block, a, b), backend=backend, fullgraph=True)(text, mask)
    return found[-1]


@pytest.mark.parametrize("rows", ALL)
def test_a_graph_for_each_of_the_sizes(rows: Rows) -> None:
    """It has no size that is not a number, and computes the same; prompts of equal lengths share it."""
    gm, args = graph_of(rows, (5, 3))
    assert depends_on_values(gm)
    sizes = run_time_sizes(gm)
    keys = set()
    for lengths in ((5, 3), (1, 8), (5, 3)):
        text, mask = inputs(lengths)[1:3]
        own = [mask if one.dtype == torch.bool else text if one.shape == text.shape else one for one in args]
        given = sizes.all_inputs(own)
        keys.add(sizes.key(given))
        graph = sizes.specialised(given)
        assert not depends_on_values(graph)
        for one, same in zip(graph(*given), gm(*own), strict=True):
            assert torch.equal(one, same)
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (by_a_parameter, "the parameter .*score"),
        (by_chance, "random numbers"),
        (after_a_write, "may write to"),
    ],
)
def test_values_that_are_not_known_before(rows: Rows, why: str) -> None:
    gm, _ = graph_of(rows, (5, 3))
    with pytest.raises(NotKnownBefore, match=why):
        run_time_sizes(gm)


APPLIED = [
    (by_nonzero, None),
    (by_mask, None),
    (by_nonzero, True),
    *(pytest.param(rows, None, marks=pytest.mark.nightly) for rows in ALL[2:]),
    *(pytest.param(rows, True, marks=pytest.mark.nightly) for rows in ALL[1:]),
]


@pytest.mark.parametrize(("rows", "regional"), APPLIED)
def test_valid_text_is_attended_with_the_video(
    rows: Rows, regional: bool | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, counts = list[Any](), list[int]()
    original = _torch.compile_with
    monkeypatch.setattr(_torch, "compile_with", lambda *a, **k: (compiled.append(a), original(*a, **k))[1])
    model, twin = Prompted(rows), Prompted(rows)
    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        changed = sparsify_compiler.apply(model, regional=regional, **EXACT)
        for lengths in LENGTHS:
            check(model, twin, lengths)
            assert sparse_text(changed.explain().plans) == expected_text(rows, lengths)
            counts.append(len(compiled))
    names = [name for name, _ in expected_text(rows, LENGTHS[0])]
    assert list(dict.fromkeys(one.site for one in changed.stats().measurements)) == names
    assert f"Prompted: {len(names)} of {len(names)} video attentions sparse" in caplog.text
    assert "one graph" not in caplog.text
    # The two blocks get tensors of two kinds of strides.
    assert counts[-1] == counts[-2] <= (2 if regional else 1) * len(set(LENGTHS))


def test_by_the_backend_alone() -> None:
    """Where the caller lets Dynamo capture such operators, `explain` shows them too."""
    settings = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    model = Prompted(by_mask)
    with settings, torch.no_grad():
        compiled = torch.compile(model, backend="sparsify", options=EXACT)
        for lengths in LENGTHS:
            check(compiled, model, lengths)
        shown = sparsify_compiler.explain(compiled, *inputs((4, 2)))
    assert sparse_text(shown.plans) == expected_text(by_mask, (4, 2))
    names = [name for name, _ in expected_text(by_mask, (4, 2))]
    assert list(dict.fromkeys(one.site for one in sparsify_compiler.stats(compiled).measurements)) == names


def test_the_number_of_programs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_values, "_PROGRAMS", 2)
    kept: list[Any] = []
    original = by_values.ProgramsByValues.__call__

    def call(self: Any, *args: Any) -> Any:
        kept.append(self)
        return original(self, *args)

    monkeypatch.setattr(by_values.ProgramsByValues, "__call__", call)
    model, twin = Prompted(to_the_longest), Prompted(to_the_longest)
    sparsify_compiler.apply(model, **EXACT)
    for length in (1, 2, 3, 1):
        check(model, twin, (length, 1))
        assert len(kept[-1]._programs) <= 2
    assert len({id(one) for one in kept}) == 1


def test_sizes_that_are_not_known_before_leave_the_parts(caplog: pytest.LogCaptureFixture) -> None:
    """The model's own code runs around them, and the log gives the reason."""
    model, twin = Prompted(by_a_parameter), Prompted(by_a_parameter)
    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        sparsify_compiler.apply(model, **EXACT)
        check(model, twin, LENGTHS[0])
    lines = [line for line in caplog.messages if "does not give one graph" in line]
    assert len(lines) == 1
    assert re.search("known only at run time: they depend on the parameter .*score", lines[0])


@needs_diffusers
@pytest.mark.parametrize("regional", [None, pytest.param(True, marks=pytest.mark.nightly)])
def test_mochi(regional: bool | None) -> None:
    model, given = CASES["mochi"].build(LARGE, batch=2)
    twin, _ = CASES["mochi"].build(LARGE, batch=2)
    changed = sparsify_compiler.apply(model, regional=regional, **EXACT)
    width = given["encoder_attention_mask"].shape[1]
    for lengths in ((7, 8), (width, 1)):
        given["encoder_attention_mask"] = torch.arange(width) < torch.tensor(lengths)[:, None]
        with torch.no_grad():
            got, expected = model(**given)[0], twin(**given)[0]
        assert (got - expected).norm() <= 2e-5 * expected.norm()
        found = [plan for plan in changed.explain().plans if plan.method == "svg2"]
        assert [(one.layout.grid, one.layout.after) for one in found] == [(LARGE, n) for n in lengths] * 2
