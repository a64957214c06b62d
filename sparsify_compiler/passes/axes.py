"""Where the elements of a dimension come from: the algebra behind layout inference.

A `Label` says how one dimension of a tensor is made up of *axes* (a spatial axis of a convolution, a dimension
of an input, an `arange`). It is a product of factors, the outer first, so that `flatten(2)` of (B, C, f, h, w)
gives a dimension labelled `(f, h, w)`: row-major order is part of the label. A concatenation is one factor,
`Cat`. Reshapes split and join factors exactly or give up with a fresh label; nothing is ever matched by size.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """Something that axes come from; compared by identity."""

    kind: str
    """`conv`: the spatial axes of a convolution. `input`: the dimensions of a graph input. `position`: an arange.
    `lost`: video tokens that may have been moved, so that no other label may be believed. `opaque`: something
    else that is not known. `blank`: uninitialised, constant or broadcast, so that any other label says more."""
    sizes: tuple[int, ...]
    images: "Label" = ()
    """For a conv over images: the label of its batch dimension, among whose axes the frames may be."""


@dataclass(frozen=True, slots=True)
class Atom:
    """A run of positions along one axis: `(position // stride) % size`, or a slice that starts at `offset`."""

    source: Source
    dim: int
    size: int
    stride: int = 1
    offset: int = 0
    inner: bool = False
    """The axis goes on further out: this is a position within a window of it, not the axis itself."""
    owner: tuple[Source, int] | None = None
    """Of a position: the axis of tokens that it was added to, so that the same mesh on other tokens differs."""

    @property
    def rank(self) -> int:
        """How much this says about where a token lies; the higher rank wins where two labels meet."""
        patches = self.stride > 1 and not self.inner
        whole = patches or self.size == self.source.sizes[self.dim]
        ranks = {"lost": 6, "conv": 5, "input": 4 if whole else 1, "opaque": 3, "position": 2, "blank": 0}
        return ranks[self.source.kind]

    @property
    def of_video(self) -> bool:
        """Whether this is, or was, an axis of a video: of a convolution, or of an input with four axes or more."""
        kind = self.source.kind
        return kind in ("conv", "lost") or (kind == "input" and len(self.source.sizes) >= 4)


@dataclass(frozen=True, slots=True)
class Cat:
    """A concatenation of labels, as one factor."""

    parts: tuple["Label", ...]

    @property
    def size(self) -> int:
        """Elements of all parts."""
        return sum(map(length, self.parts))


Factor = Atom | Cat
Label = tuple[Factor, ...]
"""The factors of one dimension, the outer first; empty for a dimension of size 1."""


def length(label: Label) -> int:
    """Size of the dimension a label describes."""
    return math.prod(factor.size for factor in label)


def fresh(size: int, kind: str = "opaque") -> Label:
    """A label for a dimension of which nothing is known."""
    return () if size == 1 else (Atom(Source(kind, (size,)), 0, size),)


def axis(source: Source, dim: int) -> Label:
    """The whole of one axis of a source."""
    size = source.sizes[dim]
    return () if size == 1 else (Atom(source, dim, size),)


def atoms(label: Label) -> list[Atom]:
    """All atoms of a label, those inside concatenations too."""
    found = []
    for factor in label:
        found += [factor] if isinstance(factor, Atom) else [a for part in factor.parts for a in atoms(part)]
    return found


def unknown(size: int, *origins: Label) -> Label:
    """For a dimension made of `origins` in a way that labels cannot tell: `lost` if that was video."""
    return fresh(
        size, "lost" if any(atom.of_video for label in origins for atom in atoms(label)) else "opaque"
    )


def is_blank(label: Label) -> bool:
    """Whether the label says nothing that another one could contradict."""
    return all(atom.rank == 0 for atom in atoms(label))


def _joined(label: Sequence[Factor]) -> Label:
    """Adjacent factors that are the outer and inner part of one axis become one again."""
    done: list[Factor] = []
    for factor in label:
        last = done[-1] if done else None
        if (
            isinstance(last, Atom)
            and isinstance(factor, Atom)
            and (last.source, last.dim) == (factor.source, factor.dim)
            and factor.inner
            and last.stride == factor.size * factor.stride
            and last.offset == factor.offset == 0
        ):
            done[-1] = replace(last, size=last.size * factor.size, stride=factor.stride)
        else:
            done.append(factor)
    return tuple(done)


def _proper(label: Label) -> list[Factor]:
    """The factors longer than 1."""
    return [factor for factor in label if factor.size > 1]


def _split(factor: Factor, outer: int) -> tuple[Factor, Factor] | None:
    """A factor as `outer` runs of equal length, or None where that cannot be said exactly."""
    if isinstance(factor, Cat) or factor.size % outer or factor.offset:
        return None
    inner = factor.size // outer
    return (
        replace(factor, size=outer, stride=factor.stride * inner),
        replace(factor, size=inner, inner=True),
    )


def reshape(labels: Sequence[Label], old: Sequence[int], new: Sequence[int]) -> list[Label]:
    """Labels after a row-major reshape from `old` to `new` sizes."""
    if math.prod(old) == 0:
        return [fresh(size) for size in new]
    result: list[Label] = []
    i = 0
    pending: list[Factor] = []  # factors of consumed old dimensions not yet given to a new one
    for position, size in enumerate(new):
        while not pending and i < len(old) and old[i] == 1 != size:
            i += 1
        if not pending and i < len(old) and old[i] == size:
            result.append(labels[i])
            i += 1
            continue
        taken: list[Factor] = []
        have = 1
        while have < size:
            while not pending:
                pending = _proper(labels[i])
                i += 1
            factor = pending.pop(0)
            if size % (have * factor.size) == 0:
                taken.append(factor)
                have *= factor.size
            elif size % have == 0 and (halves := _split(factor, size // have)):
                taken.append(halves[0])
                pending.insert(0, halves[1])
                have = size
            else:
                return result + _reshape_rest(labels, old, new, position)
        result.append(_joined(taken))
    return result


def _reshape_rest(
    labels: Sequence[Label], old: Sequence[int], new: Sequence[int], position: int
) -> list[Label]:
    """Fresh labels from new dimension `position` on, up to where old and new boundaries meet again."""
    done = math.prod(new[:position])
    old_ends = {math.prod(old[: i + 1]): i + 1 for i in range(len(old))}
    for end in range(position, len(new)):
        done *= new[end]
        if done in old_ends:
            middle = [unknown(size, *labels) for size in new[position : end + 1]]
            i = old_ends[done]
            return middle + reshape(labels[i:], old[i:], new[end + 1 :])
    return [unknown(size, *labels) for size in new[position:]]


def cat(labels: Sequence[Label]) -> Label:
    """The label of a concatenation; slices of one thing laid end to end become that thing again."""
    parts: list[Label] = []
    for label in labels:
        nested = label[0].parts if len(label) == 1 and isinstance(label[0], Cat) else (label,)
        for part in nested:
            if length(part) == 0:
                continue
            joined = _rejoin(parts[-1], part) if parts else None
            if joined is None:
                parts.append(part)
            else:
                parts[-1] = joined
    if len(parts) == 1:
        return parts[0]
    return (Cat(tuple(parts)),)


def _rejoin(left: Label, right: Label) -> Label | None:
    """`left` followed by `right`, where they are neighbouring slices along the outermost axis."""
    if not left or not right or left[1:] != right[1:]:
        return None
    a, b = left[0], right[0]
    if isinstance(a, Cat) or isinstance(b, Cat) or (a.source, a.dim) != (b.source, b.dim):
        return None
    if (a.stride, a.inner) != (b.stride, b.inner) or a.offset + a.size != b.offset:
        return None
    return (replace(a, size=a.size + b.size), *left[1:])


def cut(label: Label, start: int, stop: int) -> Label:
    """The label of positions `start` to `stop`."""
    size = length(label)
    if (start, stop) == (0, size):
        return label
    if stop <= start or not label:
        return fresh(stop - start)
    if len(label) == 1 and isinstance(label[0], Cat):
        pieces, at = [], 0
        for part in label[0].parts:
            a, b = max(start - at, 0), min(stop - at, length(part))
            if a < b:
                pieces.append(cut(part, a, b))
            at += length(part)
        return cat(pieces)
    outer, run = label[0], length(label[1:])
    if isinstance(outer, Cat) or start % run or stop % run:
        return unknown(stop - start, label)
    return (replace(outer, size=(stop - start) // run, offset=outer.offset + start // run), *label[1:])


def merge(a: Label, b: Label) -> Label:
    """The label of a dimension where two tensors meet element by element; `a` wins where both say as much."""
    if a == b or is_blank(b):
        return a if a else b
    if is_blank(a):
        return b
    assert length(a) == length(b)
    if (aligned := _aligned(a, b)) is not None:
        return _joined([factor for x, y in aligned for factor in _merge_factor(x, y)])
    kinds = [{atom.source.kind for atom in atoms(label)} for label in (a, b)]
    best = max(_rank(a), _rank(b))
    claims = all(kind & {"conv", "position"} for kind in kinds)
    pieces = best < 5 and any(isinstance(factor, Cat) for factor in (*a, *b))
    if claims or pieces:  # they say different things about where the tokens lie
        return unknown(length(a), a, b)
    return a if _rank(a) == best else b


def _rank(label: Label) -> int:
    return max((atom.rank for atom in atoms(label)), default=0)


class _Piece(NamedTuple):
    """A factor, and what it says: less than it did, where it had to be cut to meet the other label's."""

    factor: Factor
    rank: int


def _aligned(a: Label, b: Label) -> list[tuple[_Piece, _Piece]] | None:
    """Both labels cut into factors of equal sizes, or None where they do not divide each other."""
    left, right = ([_Piece(factor, _rank((factor,))) for factor in _proper(label)] for label in (a, b))
    pairs = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.factor.size == y.factor.size:
            pairs.append((x, y))
            continue
        small, big, rest = (x, y, right) if x.factor.size < y.factor.size else (y, x, left)
        halves = _split(big.factor, small.factor.size)
        if halves is None:
            return None
        known = isinstance(big.factor, Atom) and big.factor.source.kind in ("input", "position")
        rank = min(big.rank, 1) if known else big.rank
        outer, inner = (_Piece(half, rank) for half in halves)
        rest.insert(0, inner)
        pairs.append((x, outer) if small is x else (outer, y))
    return pairs


def _merge_factor(a: _Piece, b: _Piece) -> Label:
    x, y = a.factor, b.factor
    if isinstance(x, Cat) and isinstance(y, Cat) and (parts := _common_parts(x, y)):
        return cat([merge(p, q) for p, q in parts])
    if isinstance(x, Cat) or isinstance(y, Cat):
        return (x,) if isinstance(x, Cat) and (not isinstance(y, Cat) or a.rank >= b.rank) else (y,)
    best, other = (x, y) if a.rank >= b.rank else (y, x)
    assert isinstance(best, Atom)
    assert isinstance(other, Atom)
    if best.source.kind == "position" and best.owner is None and other.rank > 0:
        best = replace(best, owner=other.owner or (other.source, other.dim))
    return (best,)


def _common_parts(x: Cat, y: Cat) -> list[tuple[Label, Label]] | None:
    """Both concatenations cut where either one is; None if that would cut through more than one axis."""
    ends = [list(itertools.accumulate(map(length, factor.parts))) for factor in (x, y)]
    edges = sorted({0, *ends[0], *ends[1]})
    for factor, own in zip((x, y), ends, strict=True):
        for part, end in zip(factor.parts, own, strict=True):
            if len(part) > 1 and any(end - length(part) < edge < end for edge in edges):
                return None
    spans = itertools.pairwise(edges)
    return [(cut((x,), start, stop), cut((y,), start, stop)) for start, stop in spans]


def substitute(label: Label, atom: Atom, by: Label) -> Label:
    """`label` with an atom replaced by another label of its size."""
    done: list[Factor] = []
    for factor in label:
        if factor == atom:
            done += by
        elif isinstance(factor, Cat):
            done.append(Cat(tuple(substitute(part, atom, by) for part in factor.parts)))
        else:
            done.append(factor)
    return _joined(done)


def share_axis(a: Label, b: Label) -> bool:
    """Whether two labels run over parts of one axis."""
    return bool({(x.source, x.dim) for x in atoms(a)} & {(x.source, x.dim) for x in atoms(b)})
