"""The axis labels against data that really moves.

Every element of a tensor carries the coordinates it started from. Random programs of views, slices, joins and
writes run on it under the tracker; afterwards each label must predict the coordinates that lie there.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
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
    merge,
)
from sparsify_compiler.passes.axis_rules import AxisTracker


def numbered(sizes: tuple[int, ...]) -> tuple[Tensor, Source]:
    """A tensor whose elements are their own flat index, and the source its labels name."""
    return torch.arange(math.prod(sizes)).reshape(sizes), Source("input", sizes)


def claims(label: Label, index: int) -> list[tuple[Atom, int]]:
    """What a label says of position `index`: (atom, position along it), inside concatenations too."""
    said = []
    for factor in reversed(label):
        index, at = divmod(index, factor.size)
        if isinstance(factor, Atom):
            said.append((factor, at))
            continue
        for part in factor.parts:
            if at < length(part):
                said += claims(part, at)
                break
            at -= length(part)
    return said


def check(tensor: Tensor, labels: list[Label], source: Source) -> None:
    """Every claim about `source` holds for the elements that lie there now."""
    coordinates = torch.stack(torch.unravel_index(tensor.flatten(), source.sizes)).reshape(-1, *tensor.shape)
    assert [length(label) for label in labels] == list(tensor.shape)
    for dim, label in enumerate(labels):
        for index in range(tensor.shape[dim]):
            for atom, at in claims(label, index):
                if atom.source is source:
                    there = coordinates[atom.dim].select(dim, index) // atom.stride
                    there = there % atom.size if atom.inner else there - atom.offset
                    assert (there == at).all(), (dim, index, atom)


@st.composite
def steps(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """One random operator applied to `tensor`; what it draws depends on the shape."""
    kind = draw(
        st.sampled_from(["reshape", "flatten", "permute", "slice", "cut and join", "unbind", "flip", "write"])
    )
    dims = tensor.dim()
    dim = draw(st.integers(0, dims - 1))
    size = tensor.shape[dim]
    match kind:
        case "reshape":
            divisors = [n for n in range(1, size + 1) if size % n == 0]
            return (
                tensor.unflatten(dim, (draw(st.sampled_from(divisors)), -1)) if size and dims < 5 else tensor
            )
        case "flatten":
            return tensor.flatten(dim, draw(st.integers(dim, dims - 1)))
        case "permute":
            return tensor.permute(draw(st.permutations(range(dims))))
        case "slice":
            start = draw(st.integers(0, max(size - 1, 0)))
            return tensor.narrow(dim, start, draw(st.integers(1, max(size - start, 1)))) if size else tensor
        case "cut and join":
            at = draw(st.integers(0, size))
            parts = [tensor.narrow(dim, 0, at), tensor.narrow(dim, at, size - at)]
            return torch.cat(parts if draw(st.booleans()) else parts[::-1], dim)
        case "unbind":
            return tensor.unbind(dim)[draw(st.integers(0, size - 1))] if dims > 1 and size else tensor
        case "flip":
            return tensor.flip(dim)
    blank = torch.empty_like(tensor)
    blank[:] = tensor
    return blank


@given(st.data())
def test_labels_predict_where_elements_lie(data: Any) -> None:
    tensor, source = numbered(data.draw(st.sampled_from([(2, 3, 4), (4, 6), (3, 2, 2, 5), (12,), (5, 7, 3)])))
    tracker = AxisTracker()
    tracker.put(tensor, [axis(source, dim) for dim in range(tensor.dim())])
    with tracker:
        for _ in range(data.draw(st.integers(1, 7))):
            tensor = data.draw(steps(tensor))
    check(tensor, tracker.of(tensor), source)


def test_the_labels_do_claim_something() -> None:
    tensor, source = numbered((2, 5, 7, 9))
    tracker = AxisTracker()
    tracker.put(tensor, [axis(source, dim) for dim in range(4)])
    with tracker:
        tokens = tensor.flatten(1).unsqueeze(-1).expand(-1, -1, 4)
        text = torch.zeros(2, 11, 4, dtype=tensor.dtype)
        joined = torch.cat([text, tokens], 1)
        video = joined[:, 11:]
        heads = (video + 1).unflatten(-1, (2, 2)).transpose(1, 2)
    assert [atom.size for atom in tracker.of(tokens)[1]] == [5, 7, 9]
    (both,) = tracker.of(joined)[1]
    assert isinstance(both, Cat)
    assert tracker.of(heads)[2] == tracker.of(tokens)[1]


@pytest.mark.parametrize("write", ["flipped", "shuffled", "half"])
def test_a_write_in_another_order_is_forgotten_everywhere(write: str) -> None:
    tensor, source = numbered((4, 6))
    tracker = AxisTracker()
    tracker.put(tensor, [axis(source, 0), axis(source, 1)])
    with tracker:
        base = tensor.clone()
        view = base.t()
        if write == "flipped":
            base.copy_(tensor.flip(0))
        elif write == "shuffled":
            base[:, torch.randperm(6)] = tensor
        else:
            base[2:] = tensor[:2]
    for one in (base, view):
        check(one, tracker.of(one), source)


@given(st.integers(1, 40), st.data())
def test_cutting_and_joining_gives_the_label_back(tokens: int, data: Any) -> None:
    rows = axis(Source("input", (tokens,)), 0)
    label = (*rows, *fresh(3))
    at = data.draw(st.integers(0, tokens)) * 3
    assert cat([cut(label, 0, at), cut(label, at, tokens * 3)]) == label


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
    assert merge(fresh(315, "lost"), mesh)[0].source.kind == "lost"  # type: ignore[union-attr]


def _parts(label: Label) -> list[Label]:
    (factor,) = label
    assert isinstance(factor, Cat)
    return list(factor.parts)
