"""The axis labels against data that really moves.

Every element of a tensor carries the coordinates it started from. Random programs of views, slices, joins and
writes run on several tensors, some of which share memory, under the tracker; afterwards the labels of every one
must predict the coordinates that lie there.
"""

import math
from collections.abc import Callable
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.passes.axes import (
    Atom,
    Cat,
    Label,
    Source,
    atoms,
    axis,
    cat,
    cut,
    fresh,
    length,
    reshape,
    unknown,
)
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.axis_writes import Known
from sparsify_compiler.passes.meeting import either, merge

NOTHING = -1
"""In place of an element's number: it is a constant, of which nothing can be claimed."""


def numbered(sizes: tuple[int, ...], tracker: AxisTracker | None = None) -> tuple[Tensor, Source]:
    """A tensor whose elements are their own flat index, and the source its labels name."""
    tensor, source = torch.arange(math.prod(sizes)).reshape(sizes), Source("input", sizes)
    if tracker is not None:
        tracker.put(tensor, Known([axis(source, dim) for dim in range(len(sizes))]))
    return tensor, source


def claims(label: Label, index: int) -> list[tuple[Atom, int]]:
    """What a label says of position `index`: (run, position in it), inside concatenations too."""
    said = []
    for factor in reversed(label):
        index, at = divmod(index, factor.size)
        if isinstance(factor, Atom):
            said += [(claim, at) for claim in (factor, *factor.also)]
            continue
        for part in factor.parts:
            if at < length(part):
                said += claims(part, at)
                break
            at -= length(part)
    return said


def place(coordinate: Tensor, run: Atom) -> Tensor:
    """Where coordinates along its axis lie in a run."""
    there = (coordinate - run.base) // run.stride
    return (there if run.extent is None else there % run.extent) - run.offset


def check(tensor: Tensor, labels: list[Label], source: Source) -> int:
    """Every claim about `source` holds for the elements that lie there now; returns how many there are."""
    there = torch.unravel_index(tensor.clamp(min=0).flatten(), source.sizes)
    coordinates = torch.stack(there).reshape(-1, *tensor.shape)
    assert [length(label) for label in labels] == list(tensor.shape)
    count = 0
    for dim, label in enumerate(labels):
        for index in range(tensor.shape[dim]):
            for run, at in claims(label, index):
                if run.source is source:
                    right = (place(coordinates[run.dim], run) == at) | (tensor == NOTHING)
                    assert right.select(dim, index).all(), (dim, index, run)
                    count += 1
    return count


# One step of a program gets (choices, a tensor, one of its shape, a dimension) and makes a tensor, or writes.
Step = Callable[[Random, Tensor, Tensor, int], Tensor | None]


def divided(rng: Random, t: Tensor, other: Tensor, dim: int) -> Tensor:
    divisors = [n for n in range(1, t.shape[dim] + 1) if t.shape[dim] % n == 0]
    return t.unflatten(dim, (rng.choice(divisors), -1))


def joined_again(rng: Random, t: Tensor, other: Tensor, dim: int) -> Tensor:
    at = rng.randint(0, t.shape[dim])
    parts = t.split([at, t.shape[dim] - at], dim)
    return torch.cat(parts if rng.random() < 0.5 else parts[::-1], dim)


def padded(rng: Random, t: Tensor, other: Tensor, dim: int) -> Tensor:
    left, right = rng.randint(-min(1, t.shape[dim] // 3), 2), rng.randint(-min(1, t.shape[dim] // 3), 2)
    return F.pad(t, [0, 0] * (t.dim() - 1 - dim) + [left, right], value=NOTHING)


def run_of(rng: Random, t: Tensor, dim: int) -> tuple[int, int]:
    start = rng.randrange(t.shape[dim])
    return start, rng.randint(1, t.shape[dim] - start)


def at_steps(rng: Random, t: Tensor, dim: int) -> Tensor:
    return t[(slice(None),) * dim + (slice(rng.randrange(min(2, t.shape[dim])), None, 2),)]


def filled(rng: Random, t: Tensor, other: Tensor, dim: int) -> Tensor:
    """A buffer of constants after one or two slices were written to it."""
    buffer, at = torch.full_like(t, NOTHING), rng.randint(1, t.shape[dim])
    buffer.narrow(dim, 0, at).copy_(t.narrow(dim, 0, at))
    if at < t.shape[dim] and rng.random() < 0.8:
        start = rng.choice([at, 0, at]) if 2 * at >= t.shape[dim] else at
        buffer.narrow(dim, at, t.shape[dim] - at).copy_(t.narrow(dim, start, t.shape[dim] - at))
    return buffer


def write_slice(rng: Random, t: Tensor, other: Tensor, dim: int) -> None:
    start, size = run_of(rng, t, dim)
    source = rng.choice([start, start, rng.randrange(t.shape[dim] - size + 1)])
    t.narrow(dim, start, size).copy_(other.narrow(dim, source, size))


def write_position(rng: Random, t: Tensor, other: Tensor, dim: int) -> None:
    at = rng.randrange(t.shape[dim])
    t.select(dim, at).copy_(other.select(dim, rng.choice([at, at, rng.randrange(t.shape[dim])])))


def write_steps(rng: Random, t: Tensor, other: Tensor, dim: int) -> None:
    target, source = at_steps(rng, t, dim), at_steps(rng, other, dim)
    if target.shape == source.shape:
        target.copy_(source)


def swap(rng: Random, t: Tensor, other: Tensor, dim: int) -> None:
    a, b = (t.select(dim, rng.randrange(t.shape[dim])) for _ in range(2))
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


def write_some(rng: Random, t: Tensor, other: Tensor, dim: int) -> None:
    """One element of another tensor to a corner of this one."""
    t[tuple(slice(0, rng.randint(1, n)) for n in t.shape)] = other[(slice(0, 1),) * t.dim()]


VIEWS: dict[str, Step] = {
    "divide": divided,
    "flatten": lambda rng, t, other, dim: t.flatten(dim, rng.randint(dim, t.dim() - 1)),
    "permute": lambda rng, t, other, dim: t.permute(rng.sample(range(t.dim()), t.dim())),
    "slice": lambda rng, t, other, dim: t.narrow(dim, *run_of(rng, t, dim)),
    "select": lambda rng, t, other, dim: t.select(dim, rng.randrange(-t.shape[dim], t.shape[dim])),
    "steps": lambda rng, t, other, dim: at_steps(rng, t, dim),
    "unsqueeze": lambda rng, t, other, dim: t.unsqueeze(dim),
    "squeeze": lambda rng, t, other, dim: t.squeeze(),
    "as_strided": lambda rng, t, other, dim: t.as_strided(t.shape[-1:], t.stride()[-1:]),
    "alias": lambda rng, t, other, dim: t.detach(),
}
COPIES: dict[str, Step] = {
    "cut and join": joined_again,
    "flip": lambda rng, t, other, dim: t.flip(dim),
    "roll": lambda rng, t, other, dim: t.roll(1, dim),
    "index": lambda rng, t, other, dim: t.index_select(
        dim, torch.tensor(rng.sample(range(n := t.shape[dim]), n))
    ),
    "clone": lambda rng, t, other, dim: t.clone(),
    "pad": padded,
    "stack": lambda rng, t, other, dim: torch.stack([t, other], dim),
    "cat": lambda rng, t, other, dim: torch.cat([t, other], dim),
    "expand": lambda rng, t, other, dim: t.narrow(dim, rng.randrange(t.shape[dim]), 1).expand_as(t).clone(),
    "repeat": lambda rng, t, other, dim: (
        t.repeat_interleave(2, dim) if rng.random() < 0.5 else torch.cat([t] * 2)
    ),
    "where": lambda rng, t, other, dim: torch.where(t % 2 == 0, t, other),
    "fill": filled,
}
WRITES: dict[str, Step] = {
    "slice": write_slice,
    "position": write_position,
    "steps": write_steps,
    "swap": swap,
    "element": write_some,
    "all": lambda rng, t, other, dim: t.copy_(other),
    "foreach": lambda rng, t, other, dim: torch._foreach_copy_([t], [other]),
    "constant": lambda rng, t, other, dim: t.narrow(dim, *run_of(rng, t, dim)).fill_(NOTHING),
    "scale": lambda rng, t, other, dim: at_steps(rng, t, dim).mul_(1),
    "scatter": lambda rng, t, other, dim: t.scatter_(dim, torch.zeros_like(t), other),
    "index": lambda rng, t, other, dim: t.index_copy_(dim, torch.arange(t.shape[dim]).flip(0), other),
}
STEPS = {
    **{f"view: {name}": step for name, step in VIEWS.items()},
    **{f"copy: {name}": step for name, step in COPIES.items()},
    **{f"write: {name}": step for name, step in WRITES.items()},
}
LARGEST = 400


def run(rng: Random, sizes: tuple[int, ...], names: list[str]) -> int:
    """Run a program, check all that came of it, and return how much was claimed."""
    tracker = AxisTracker()
    first, source = numbered(sizes, tracker)
    alive = [first]
    with tracker:
        for name in names:
            t = rng.choice([t for t in alive if 0 < t.numel() <= LARGEST and 0 < t.dim() < 5])
            other = rng.choice([one for one in alive if one.shape == t.shape]).clone()
            overlaps = any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True))
            if name.startswith("write") and overlaps:
                continue
            made = STEPS[name](rng, t, other, rng.randrange(t.dim()))
            if isinstance(made, Tensor) and not name.startswith("write"):
                alive.append(made)
    return sum(check(t, tracker.of(t), source) for t in alive)


SIZES = [(2, 3, 4), (4, 6), (3, 2, 2, 5), (12,), (5, 7, 3), (4, 3)]


@given(st.randoms(), st.sampled_from(SIZES), st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=8))
@settings(max_examples=250)
def test_labels_predict_where_elements_lie(rng: Random, sizes: tuple[int, ...], names: list[str]) -> None:
    run(rng, sizes, names)


DIVISIONS = ["view: divide", "view: flatten", "view: slice", "copy: cut and join"]


@given(
    st.randoms(), st.sampled_from([(24,), (36,), (4, 6)]), st.lists(st.sampled_from(DIVISIONS), max_size=9)
)
@settings(max_examples=250)
def test_runs_stay_exact_however_they_are_divided(
    rng: Random, sizes: tuple[int, ...], names: list[str]
) -> None:
    run(rng, sizes, names)


def test_runs_that_are_not_parts_of_one_are_not_joined() -> None:
    rows = axis(Source("input", (24,)), 0)
    (outer, inner), shifted = (reshape([cut(rows, start, start + 12)], [12], [3, 4]) for start in (0, 2))
    assert len(reshape([outer, shifted[1]], [3, 4], [12])[0]) == 2
    assert len(reshape([outer, cut(inner, 0, 2)], [3, 2], [6])[0]) == 2
    pairs, fours = reshape([rows], [24], [12, 2])[0], reshape([rows], [24], [6, 4])[1]
    assert len(reshape([pairs, cut(fours, 0, 2)], [12, 2], [24])[0]) == 2
    late = cut(reshape([outer], [3], [3])[0], 1, 3)
    assert reshape([late, inner], [2, 4], [8]) == [cut(rows, 4, 12)]
    assert reshape([cut(inner, 1, 3)], [2], [2, 1])[0] != cut(inner, 0, 2)
    window = cut(reshape([rows], [24], [2, 12])[1], 3, 9)
    for part in reshape([window], [6], [3, 2]):
        assert rows[0].source not in {run.source for run in atoms(part)}


def test_repeats_are_not_at_the_place_of_others() -> None:
    tracker = AxisTracker()
    tensor, source = numbered((4, 6), tracker)
    with tracker:
        column = tensor[:, 2:3].expand(4, 6)
        beside = torch.cat([tensor, column])
        tiled = torch.stack([tensor.repeat_interleave(2, 0), tensor.repeat(2, 1)], 2)
        met = tensor.repeat_interleave(2, 0) + tensor.repeat(2, 1)
    check(beside, tracker.of(beside), source)
    check(tiled, tracker.of(tiled), source)
    assert {run.source.kind for run in atoms(tracker.of(met)[0])} <= {"lost", "opaque"}


def test_every_nth_position_keeps_its_place() -> None:
    tracker = AxisTracker()
    tensor, source = numbered((2, 4, 12), tracker)
    with tracker:
        steps = [tensor[..., 1::3], tensor[:, 3::4], tensor[:, 1::2, ::6]]
        resized = [F.interpolate(tensor.double(), size=size).long() for size in (12, 4, 24, 9, 36)]
    for made, claimed in zip([*steps, *resized], [1, 1, 1, 1, 1, 1, 0, 0], strict=True):
        check(made, tracker.of(made), source)
        assert any(run.source is source for run in atoms(tracker.of(made)[2])) == claimed


def test_programs_do_claim_something() -> None:
    rng = Random(0)
    claimed = [run(rng, rng.choice(SIZES), rng.choices(sorted(STEPS), k=3)) for _ in range(60)]
    assert sum(n > 20 for n in claimed) > 20


def test_the_labels_do_claim_something() -> None:
    tracker = AxisTracker()
    tensor, _ = numbered((2, 5, 7, 9), tracker)
    with tracker:
        tokens = tensor.flatten(1).unsqueeze(-1).expand(-1, -1, 4)
        text = torch.zeros(2, 11, 4, dtype=tensor.dtype)
        joined = torch.cat([text, tokens], 1)
        video = joined[:, 11:]
        heads = (video + 1).unflatten(-1, (2, 2)).transpose(1, 2)
        apart = torch.cat([text, tokens], 1).split([11, 315], 1)[1].unflatten(1, (5, 63))[:, 1:]
    assert [atom.size for atom in tracker.of(tokens)[1]] == [5, 7, 9]
    (both,) = tracker.of(joined)[1]
    assert isinstance(both, Cat)
    assert tracker.of(heads)[2] == tracker.of(tokens)[1]
    assert tracker.of(apart)[1] == cut(tracker.of(tensor)[1], 1, 5)


HARMLESS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "all again": lambda y, x: y.copy_(x),
    "a slice again": lambda y, x: y[:, 1:3].copy_(x[:, 1:3]),
    "a position again": lambda y, x: y[:, 3].copy_(x[:, 3]),
    "rows again": lambda y, x: y.unflatten(1, (2, 3))[:, 1].copy_(x.unflatten(1, (2, 3))[:, 1]),
    "through a transpose": lambda y, x: y.t()[1:3].copy_(x.t()[1:3]),
    "scaled in steps": lambda y, x: y[:, ::2].mul_(2),
    "a constant": lambda y, x: y[:, torch.tensor([4, 1])].fill_(0),
    "a constant by index": lambda y, x: y.__setitem__((slice(None), torch.tensor([4, 1])), 0),
    "itself": lambda y, x: y[:, 3].copy_(y[:, 3]),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_write_that_moves_nothing_leaves_all_labels(name: str) -> None:
    tracker = AxisTracker()
    tensor, _ = numbered((4, 6), tracker)
    with tracker:
        base = tensor.clone()
        views = [base, base.t(), base[1:], base.unflatten(1, (2, 3))]
        before = [tracker.of(view) for view in views]
        HARMLESS[name](base, tensor)
        assert [tracker.of(view) for view in views] == before


@pytest.mark.parametrize("write", ["flipped", "shuffled", "half", "a column", "through a view", "of a view"])
def test_a_write_in_another_order_is_forgotten_everywhere(write: str) -> None:
    tracker = AxisTracker()
    tensor, source = numbered((4, 6), tracker)
    with tracker:
        base = tensor.clone()
        view, rows = base.t(), base[1:3]
        match write:
            case "flipped":
                base.copy_(tensor.flip(0))
            case "shuffled":
                base[:, torch.randperm(6)] = tensor
            case "half":
                base[2:] = tensor[:2]
            case "a column":
                base[:, 1] = tensor[:, 2]
            case "through a view":
                view[::2].copy_(tensor.t()[1::2])
            case "of a view":
                rows.as_strided((6,), (1,), 12).copy_(tensor[0])
    for one in (base, view, rows):
        check(one, tracker.of(one), source)
    touched = 0 if write in ("flipped", "half", "of a view") else 1
    assert source not in {run.source for run in atoms(tracker.of(base)[touched])}


def test_a_write_to_one_part_of_a_concatenation_leaves_the_others() -> None:
    tracker = AxisTracker()
    (first, _), (second, source) = numbered((2, 4), tracker), numbered((2, 6), tracker)
    with tracker:
        both = torch.cat([first, second], 1)
        both[:, :4] = first.flip(1)
        assert cut(tracker.of(both)[1], 4, 10) == tracker.of(second)[1]
        buffer = torch.zeros(2, 10)
        buffer[:, :4], buffer[:, 4:] = first, second
        assert tracker.of(buffer)[1] == cat([tracker.of(first)[1], tracker.of(second)[1]])
        both[:, 4:] = second.flip(1)
        assert source not in {run.source for run in atoms(tracker.of(both)[1])}


def test_a_copy_of_one_position_is_no_empty_buffer() -> None:
    tracker = AxisTracker()
    tensor, source = numbered((4, 6), tracker)
    with tracker:
        base = tensor[:, 2:3].expand(4, 6).clone()
        base[0] = tensor[0]
        tiled = tensor.repeat(1, 2)
    assert check(base, tracker.of(base), source)
    assert check(tiled, tracker.of(tiled), source)


def test_an_empty_buffer_written_in_part_is_not_empty() -> None:
    tracker = AxisTracker()
    tensor, _ = numbered((4, 6), tracker)
    with tracker:
        buffer = torch.zeros_like(tensor)
        buffer[:, ::2] = tensor[:, :3]
        placed = buffer * torch.arange(6)
    assert {run.source.kind for run in atoms(tracker.of(placed)[1])} <= {"lost", "opaque"}


def test_what_was_taken_from_a_position_may_be_overwritten() -> None:
    tracker = AxisTracker()
    tensor, source = numbered((4, 6), tracker)
    with tracker:
        first, second = tensor.clone(), tensor.clone()
        rows = first[:, 3][1:3]
        first[:, 3] = tensor[:, 1]
        second[1:3, 3] = rows
    check(second, tracker.of(second), source)


def test_a_write_is_proved_by_every_digit_of_a_position() -> None:
    tracker = AxisTracker()
    tensor, source = numbered((24,), tracker)
    with tracker:
        base = tensor.clone()
        base.view(2, 4, 3)[:, ::2] = tensor.view(2, 4, 3)[:, 1::2]
    check(base, tracker.of(base), source)


@given(st.integers(1, 40), st.data())
def test_cutting_and_joining_gives_the_label_back(tokens: int, data: st.DataObject) -> None:
    rows = axis(Source("input", (tokens,)), 0)
    label = (*rows, *fresh(3))
    at = data.draw(st.integers(0, tokens)) * 3
    assert cat([cut(label, 0, at), cut(label, at, tokens * 3)]) == label


@given(st.integers(0, 20), st.sampled_from([(2, 6), (3, 4), (4, 3), (6, 2), (2, 2, 3)]))
def test_dividing_a_slice_and_flattening_gives_the_label_back(start: int, sizes: tuple[int, ...]) -> None:
    label = cut(axis(Source("input", (40,)), 0), start, start + 12)
    apart = reshape([label], [12], sizes)
    assert all(len(one) == 1 for one in apart)
    assert reshape(apart, sizes, [12]) == [label]


def test_the_better_founded_label_wins_a_meeting() -> None:
    grid = Source("conv", (5, 7, 9))
    video: Label = sum((axis(grid, dim) for dim in range(3)), ())
    mesh: Label = sum((axis(Source("position", (n,)), 0) for n in (5, 7, 9)), ())
    tokens = axis(Source("input", (2, 315)), 1)
    assert merge(video, mesh) == merge(mesh, video) == merge(tokens, video) == video
    owned = merge(tokens, mesh)
    assert [atom.source for atom in atoms(owned)] == [atom.source for atom in atoms(mesh)]
    assert owned != merge(axis(Source("input", (2, 315)), 1), mesh)  # the same mesh on other tokens
    assert merge(video, fresh(315, "blank")) == merge(fresh(315, "blank"), video) == video
    padded = cat([fresh(10), mesh])
    joined = cat([fresh(7), fresh(3), tokens])
    assert _parts(merge(joined, padded)) == [*_parts(joined)[:2], owned]
    other: Label = sum((axis(Source("position", (n,)), 0) for n in (7, 5, 9)), ())
    assert all(atom.source.kind == "opaque" for atom in atoms(merge(mesh, other)))
    assert merge(fresh(315, "lost"), mesh)[0].source.kind == "lost"
    assert merge(fresh(325, "lost"), padded)[0].source.kind == "lost"


def test_tables_do_not_stand_for_the_tokens_that_they_meet() -> None:
    x, y, table = (axis(Source("input", sizes), 1) for sizes in ((2, 30, 4), (2, 30, 4), (1, 30, 1, 4)))
    assert merge(table, x) == merge(x, table)
    assert merge(table, x) != merge(table, y)
    assert merge(merge(x, table), x) == merge(x, table)


def test_what_meets_its_own_tokens_in_another_order_has_none() -> None:
    tokens = axis(Source("input", (2, 30)), 1)
    for moved in (unknown(30, tokens), (cut(tokens, 15, 30)[0], *fresh(2))):
        for met in (merge(tokens, moved), merge(moved, tokens), either(tokens, moved)):
            assert tokens[0].source not in {atom.source for atom in atoms(met)}


def _parts(label: Label) -> list[Label]:
    (factor,) = label
    assert isinstance(factor, Cat)
    return list(factor.parts)
