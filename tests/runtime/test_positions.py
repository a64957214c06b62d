"""Grids in the values of positions: the search against loops, and models whose tokens are packed before them."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler.runtime.positions import Mesh, mesh_along, mesh_of
from sparsify_compiler.testing.oracles import MaskedAttention

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]

GRID = (4, 3, 5)
OTHER = (3, 4, 5)
"""A grid of as many tokens."""
TEXT, CHANNELS, HEAD = 6, 12, 12
TILE: dict[str, Any] = {"method": "tile", "reference_frames": 1, "inner_backend": "eager"}


def coordinates(grid: tuple[int, int, int]) -> Tensor:
    """[3, N]."""
    return torch.tensor([*itertools.product(*map(range, grid))]).T


# ---- the search


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int, int]]:
    """(coordinates [3, N] of a grid with a scale, an offset and a sign for each axis, the grid)."""
    grid = tuple(draw(st.integers(2, 6)) for _ in range(3))
    places = coordinates(grid).double()
    for axis in range(3):
        steps = draw(st.lists(st.sampled_from([0.125, 1.0, 3.0]), min_size=grid[axis], max_size=grid[axis]))
        places[axis] = (torch.tensor(steps).cumsum(0) - 5)[places[axis].long()]
    for axis in (1, 2):
        places[axis] *= draw(st.sampled_from([1, -1]))
    return places, grid  # type: ignore[return-value]


@given(tokens(), st.data())
@settings(max_examples=60)
def test_a_grid_of_any_scale_between_other_tokens(
    drawn: tuple[Tensor, tuple[int, int, int]], data: st.DataObject
) -> None:
    """Other tokens lie at one place, at which no token of the video is."""
    places, grid = drawn
    before, after = (data.draw(st.integers(0, 4)) for _ in range(2))
    ends = [torch.full((3, number), -100.0, dtype=torch.float64) for number in (before, after)]
    whole = torch.cat([ends[0], places, ends[1]], 1)
    assert mesh_along(whole, 1) == Mesh(before, grid, after)
    type_ = data.draw(st.sampled_from([torch.float32, torch.float64]))
    batch = torch.stack([whole, whole * 2 + 1]).to(type_)
    assert mesh_along(batch, 2) == mesh_along(batch.mT, 1) == Mesh(before, grid, after)


@given(tokens(), st.data())
@settings(max_examples=60)
def test_one_wrong_coordinate_leaves_no_whole_grid(
    drawn: tuple[Tensor, tuple[int, int, int]], data: st.DataObject
) -> None:
    places, grid = drawn
    token = data.draw(st.integers(0, places.shape[1] - 1))
    places[data.draw(st.integers(0, 2)), token] += 1000
    mesh = mesh_along(places, 1)
    assert mesh is None or mesh.grid != grid
    if mesh is not None:  # then a part of the frames without the wrong token
        stop = mesh.before + mesh.grid[0] * mesh.grid[1] * mesh.grid[2]
        assert mesh.grid[1:] == grid[1:]
        assert not mesh.before <= token < stop


def _bounds(places: Tensor) -> Tensor:
    return torch.stack([places, places + 1], -1)


CONDITION = coordinates((1, *GRID[1:])) + torch.tensor([[16], [0], [0]])


@pytest.mark.parametrize(
    ("positions", "dim", "mesh"),
    [
        (_bounds(coordinates(GRID)), 1, Mesh(0, GRID, 0)),
        (coordinates(GRID).bfloat16() * 32, 1, Mesh(0, GRID, 0)),
        (F.pad(coordinates(GRID), (0, 0, 1, 0)), 1, Mesh(0, GRID, 0)),  # a constant coordinate
        (torch.cat([CONDITION, coordinates(GRID)], 1), 1, Mesh(15, GRID, 0)),
        (torch.cat([CONDITION, CONDITION + 1, coordinates(GRID)], 1), 1, Mesh(30, GRID, 0)),
        (torch.cat([coordinates(GRID), CONDITION - 20], 1), 1, Mesh(0, GRID, 15)),
        (F.pad(coordinates(GRID), (TEXT, 0)), 1, Mesh(TEXT, GRID, 0)),
        (coordinates(GRID).flip(0), 1, None),
        (coordinates(GRID)[[0, 2, 1]], 1, None),
        (coordinates(GRID).flip(1), 1, None),
        (coordinates((5, 3, 4))[[2, 0, 1]], 1, None),  # time is the innermost axis of the tokens
        (coordinates(GRID)[:, torch.randperm(60, generator=torch.Generator().manual_seed(1))], 1, None),
        (torch.stack([coordinates(GRID), coordinates(OTHER)]), 2, None),
        (torch.cat([coordinates(GRID), coordinates(GRID)], 1), 1, None),
        (coordinates((1, 6, 10)), 1, None),
        (torch.zeros(3, 60), 1, None),
        (torch.randn(3, 60, generator=torch.Generator().manual_seed(1)), 1, None),
        (coordinates(GRID) / torch.tensor([[1.0], [0.0], [1.0]]), 1, None),
    ],
)
def test_forms_of_positions(positions: Tensor, dim: int, mesh: Mesh | None) -> None:
    assert mesh_along(positions, dim) == mesh


def test_a_tensor_is_read_again_after_a_write() -> None:
    positions = coordinates(GRID).float()
    assert mesh_of(positions, 1) == Mesh(0, GRID, 0)
    positions.copy_(coordinates(OTHER))
    assert mesh_of(positions, 1) == Mesh(0, OTHER, 0)
    positions.numpy()[0] = 0  # which no version counts
    assert mesh_of(positions, 1) is None


# ---- models


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2 * HEAD, 6 * HEAD)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(2, (3, 2, HEAD)).permute(2, 0, 3, 1, 4)
        query, key = (turned(one, angles) for one in (query, key))
        return x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Packed(nn.Module):
    """Blocks of joint attention over text and packed tokens, with a rotary embedding by their positions."""

    def __init__(self, positions_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.positions_of = positions_of
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.text = nn.Linear(CHANNELS, 2 * HEAD), nn.Linear(4, 2 * HEAD)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.out = nn.Linear(2 * HEAD, CHANNELS)
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor, positions: Tensor, text: Tensor | None = None) -> Tensor:
        x, places = self.embed(hidden_states), self.positions_of(positions).float()  # [B, N, 3]
        if text is not None:
            x, places = torch.cat([self.text(text), x], 1), F.pad(places, (0, 0, text.shape[1], 0))
        frequencies = torch.tensor([1.0, 0.1], device=places.device)
        angles = (places[..., None] * frequencies).flatten(2)[:, None]  # [B, 1, N, 6]
        for block in self.blocks:
            x = block(x, angles)
        return self.out(x)[:, x.shape[1] - hidden_states.shape[1] :]


def turned(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def frames_mask(times: Tensor, before: int, after: int) -> Tensor:
    """[S, S]: the attention tile whose first frame is the reference, from the time of each token; other tokens see
    everything."""
    own = times[before : len(times) - after]
    order = {time: place for place, time in enumerate(sorted(set(own.tolist())))}
    frame = [None] * before + [order[time] for time in own.tolist()] + [None] * after
    rows = [[i is None or j is None or i == j or 0 in (i, j) for j in frame] for i in frame]
    return torch.tensor(rows)


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "[B, 3, N], seconds and pixels": (
        lambda p: torch.stack([p[:, 0] / 20, p[:, 1] / 64, p[:, 2] / 64], -1),
        lambda c: (c * torch.tensor([[8 / 25], [32], [32]])).repeat(2, 1, 1),
    ),
    "[1, N, 3], integers": (lambda p: p, lambda c: c.T[None]),
    "[N, 3], bfloat16": (lambda p: p[None], lambda c: c.T.bfloat16()),
    "[3, N], flipped rows": (lambda p: p.T[None], lambda c: c * torch.tensor([[1], [-1], [1]])),
    "[B, 3, N, 2], bounds": (lambda p: p.mean(-1).mT, lambda c: _bounds(c).float().repeat(2, 1, 1, 1)),
    "[B, N, 4], with a constant": (lambda p: p[..., 1:], lambda c: F.pad(c.T, (1, 0)).repeat(2, 1, 1)),
}


def inputs(count: int = 60) -> Tensor:
    return torch.randn(2, count, CHANNELS, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check(compiled: nn.Module, model: nn.Module, mask: Tensor | None, *given: Tensor) -> None:
    """Compare a call with attention under a mask, which differs from dense attention, or else with the latter."""
    got, dense = compiled(*given), model(*given)
    if mask is None:
        assert (got - dense).norm() <= 2e-5 * dense.norm()
        return
    with MaskedAttention([mask] * 2, len(mask)):
        expected = model(*given)
    assert (got - expected).norm() <= 2e-5 * expected.norm() < 1e-2 * (dense - expected).norm()


@pytest.mark.parametrize("form", FORMS)
def test_each_grid_of_one_size_has_its_program(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles once. Positions of another grid, or of none, never run under the table of the first one."""
    positions_of, given = FORMS[form]
    model, counts = Packed(positions_of), list[int]()
    compiled = torch.compile(model, backend="sparsify", options=TILE)
    made = list[Any]()
    original = sparsify_compiler._torch.compile_with  # type: ignore[attr-defined]
    monkeypatch.setattr(
        sparsify_compiler._torch,  # type: ignore[attr-defined]
        "compile_with",
        lambda *a, **k: (made.append(a), original(*a, **k))[1],
    )
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for places in (*map(coordinates, (GRID, OTHER)), coordinates(GRID)[:, order], coordinates(GRID)):
        mask = None if places.equal(coordinates(GRID)[:, order]) else frames_mask(places[0], 0, 0)
        check(compiled, model, mask, inputs(), given(places))
        counts.append(len(made))
    assert counts[-1] == counts[-2] == 3


@pytest.mark.parametrize("conditions", [0, 2])
def test_conditioned_frames_and_text_are_other_tokens(conditions: int) -> None:
    """Two programs: with conditions in front of the video, and without."""
    positions_of, given = FORMS["[B, 3, N], seconds and pixels"]
    model = Packed(positions_of)
    compiled = torch.compile(model, backend="sparsify", options=TILE)
    text = torch.randn(2, TEXT, 4, generator=torch.Generator().manual_seed(2))
    extra = [CONDITION + torch.tensor([[place], [0], [0]]) for place in range(conditions)]
    places = torch.cat([*extra, coordinates(GRID)], 1)
    before = TEXT + 15 * conditions
    mask = frames_mask(F.pad(places[0], (TEXT, 0)), before, 0)
    check(compiled, model, mask, inputs(places.shape[1]), given(places), text)
    shown = sparsify_compiler.explain(compiled, inputs(places.shape[1]), given(places), text)
    assert {(one.layout.before, one.layout.grid, one.layout.after) for one in shown.plans} == {
        (before, GRID, 0)
    }


def test_the_reason_names_positions_that_are_no_grid() -> None:
    positions_of, given = FORMS["[1, N, 3], integers"]
    model = Packed(positions_of)
    shown = sparsify_compiler.explain(model, inputs(), given(coordinates(GRID).flip(1)), options=TILE)
    reasons = {plan.reason.partition(";")[0] for plan in shown.plans}
    assert reasons == {"the positions of its tokens are no grid in the order of frame, row and column"}


@pytest.mark.parametrize("regional", [None, True])
def test_applied_models(regional: bool | None) -> None:
    """Also where a graph shows only a block, whose tokens the analysis of the whole model follows."""
    positions_of, given = FORMS["[B, 3, N], seconds and pixels"]
    model, twin = Packed(positions_of), Packed(positions_of)
    changed = sparsify_compiler.apply(model, regional=regional, **TILE, dense_steps=0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for places in (coordinates(GRID), coordinates(OTHER), coordinates(GRID)[:, order], coordinates(GRID)):
        shuffled = places.equal(coordinates(GRID)[:, order])
        mask = None if shuffled else frames_mask(places[0], 0, 0)
        check(model, twin, mask, inputs(), given(places))
        grids = {plan.layout.grid for plan in changed.models[0].plans}
        assert grids == {None if shuffled else OTHER if places.equal(coordinates(OTHER)) else GRID}


def _divided(numbers: Tensor) -> Tensor:
    height, width = GRID[1:]
    return torch.stack([numbers // (height * width), numbers // width % height, numbers % width], -1)[None]


@pytest.mark.parametrize(
    ("positions_of", "given"),
    [
        (_divided, torch.arange(60)),
        (lambda p: _divided(torch.arange(60, device=p.device)), torch.zeros(1)),
        (lambda p: torch.stack([p[0], p[1], p[2]], -1)[None], coordinates(GRID)),
    ],
)
def test_positions_that_a_graph_computes(positions_of: Callable[[Tensor], Tensor], given: Tensor) -> None:
    model = Packed(positions_of)
    compiled = torch.compile(model, backend="sparsify", options=TILE)
    check(compiled, model, frames_mask(coordinates(GRID)[0], 0, 0), inputs(), given)


def test_gradients_under_each_grid() -> None:
    positions_of, given = FORMS["[B, 3, N], seconds and pixels"]
    model = Packed(positions_of).requires_grad_(True)
    compiled = torch.compile(model, backend="sparsify", options=TILE | {"inner_backend": "aot_eager"})
    for places in map(coordinates, (GRID, OTHER)):
        got = torch.autograd.grad(compiled(inputs(), given(places)).square().sum(), model.blocks.parameters())
        with MaskedAttention([frames_mask(places[0], 0, 0)] * 2, 60):
            loss = model(inputs(), given(places)).square().sum()
        expected = torch.autograd.grad(loss, model.blocks.parameters())
        for one, other in zip(got, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
