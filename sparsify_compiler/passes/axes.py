"""Labels: the origin of every dimension of a tensor, in an algebra on which layout inference rests.

An *axis* is a spatial axis of a convolution, a dimension of a graph input or an `arange`. A `Label` says which axes
one dimension of a tensor runs over. It is a product of factors, the outer first, so row-major order is part of the
label. A factor is a run of positions along one axis (`Atom`) or a concatenation of labels (`Cat`). A Conv3d makes a
video whose spatial axes are f, h and w; text of T tokens comes before it:

    video = conv3d(x)                     [B, C, f, h, w]      B   C   f   h   w
    tokens = video.flatten(2).mT          [B, f*h*w, C]        B   (f, h, w)   C
    joint = cat([text, tokens], 1)        [B, T + f*h*w, C]    B   Cat(T, (f, h, w))   C
    joint[:, T:]                          [B, f*h*w, C]        B   (f, h, w)   C
    joint[:, T:].unflatten(1, (f, -1))    [B, f, h*w, C]       B   f   (h, w)   C

The right column has one label for each dimension. C is an axis of its own, since the convolution sums over the
channels of x. A label never comes from a size: where a reshape cannot split and join factors exactly, its result
gets a new label, of an unknown axis. Where two tensors meet element by element (tokens plus positions), one factor
may claim axes of both.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

_serials = itertools.count()


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """The origin of axes, e.g. a convolution or a graph input; compared by identity."""

    kind: str
    """`conv`: the spatial axes of a convolution. `input`: the dimensions of a graph input. `weight`: the dimensions
    of a parameter. `position`: an arange. `part`: stacked tensors, or tensors joined along their first dimension.
    `lost`: video tokens that an operator may have moved, so no other label is believed. `opaque`: any other unknown
    axis. `repeat`: a broadcast. `blank`: uninitialised or constant. Any other kind says more than these two.
    `tokens`: the axis of the tokens that ranks share (`sharding.py`), which wins against all others."""
    sizes: tuple[int, ...]
    of: tuple["Label", ...] = ()
    """For `conv`: the labels of its input's dimensions, batch and channels first."""
    roots: frozenset["Axis"] = frozenset()
    """For `lost` and `opaque`: the axes from which it is made."""
    of_batch: bool = False
    """For `lost` and `opaque`: whether its positions may be videos of a batch."""
    features: bool = False
    """For `lost` and `opaque`: whether each of its positions is a sum over channels, or over such sums."""
    serial: int = field(default_factory=partial(next, _serials))
    """Orders sources by age."""


Axis = tuple[Source, int]


@dataclass(frozen=True, slots=True)
class Atom:
    """A run of positions along one axis.

    Position i has the coordinates for which `(coordinate - base) // stride`, modulo `extent` if there is one, is
    `offset + i`. An axis of 12, split into [3, 4], gives a run of size 3 with stride 4 and a run of size 4 with
    extent 4.
    """

    source: Source
    dim: int
    size: int
    stride: int = 1
    base: int = 0
    extent: int | None = None
    """Length of a window: the axis continues further out, and the run is of positions within windows."""
    offset: int = 0
    """Start of the run within the window; 0 without one."""
    also: frozenset["Atom"] = frozenset()
    """Runs along other axes at the same positions, from tensors that met this one element by element."""

    @property
    def axis(self) -> Axis:
        """The axis of the run."""
        return self.source, self.dim

    @property
    def claims(self) -> frozenset["Atom"]:
        """All runs at these positions, each without `also`."""
        return self.also | {replace(self, also=frozenset())} if self.also else frozenset((self,))

    @property
    def whole(self) -> bool:
        """Whether the run is the whole axis."""
        return self.size == self.source.sizes[self.dim] and self.stride == 1 and self.extent is None

    @property
    def rank(self) -> int:
        """Precedence of the run's claim about the place of a token: where two labels meet, the higher rank wins."""
        if self.source.kind == "input":
            patches = self.stride > 1 and self.extent is None
            return 6 if patches or self.size == self.source.sizes[self.dim] else PIECE
        return _RANKS[self.source.kind]

    @property
    def blank(self) -> bool:
        """Whether the run says nothing that another label could contradict."""
        return self.rank <= _RANKS["repeat"]

    @property
    def of_video(self) -> bool:
        """Whether the run is, or was, of a video: a convolution, or an input with four dimensions or more."""
        kind = self.source.kind
        return kind in ("conv", "lost") or (kind == "input" and len(self.source.sizes) >= 4)

    @property
    def of_batch(self) -> bool:
        """Whether positions of the run may be videos of a batch: of the first dimension of an input, or of joined
        tensors."""
        kind = self.source.kind
        return kind == "part" or (kind == "input" and self.dim == 0) or self.source.of_batch


PIECE = 3
"""The rank of a run over a part of an input's axis."""
_RANKS = {
    "tokens": 9,
    "lost": 8,
    "conv": 7,
    "opaque": 5,
    "part": 5,
    "position": 4,
    "weight": 2,
    "repeat": 1,
    "blank": 0,
}
CONV = _RANKS["conv"]
"""The rank of an axis of a convolution."""


@dataclass(frozen=True, slots=True)
class Cat:
    """A concatenation of labels, as one factor."""

    parts: tuple["Label", ...]

    @property
    def size(self) -> int:
        """Number of elements of all parts."""
        return sum(map(length, self.parts))


Factor = Atom | Cat
Label = tuple[Factor, ...]
"""The factors of one dimension, the outer first; empty for a dimension of size 1."""


def length(label: Label) -> int:
    """Size of the dimension that a label describes."""
    return math.prod(factor.size for factor in label)


def fresh(size: int, kind: str = "opaque") -> Label:
    """A label of a new axis, about which nothing is known."""
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


def single(labels: Iterable[Label]) -> set[Atom]:
    """The runs of one position in labels."""
    return {factor for label in labels for factor in label if isinstance(factor, Atom) and factor.size == 1}


def axes_of(label: Label) -> set[Axis]:
    """All axes that a label claims, without blank ones."""
    return {claim.axis for atom in atoms(label) for claim in atom.claims if not claim.blank}


def unknown(size: int, *origins: Label, summed: bool = False) -> Label:
    """A label for a dimension made of `origins` in a way that labels cannot express: `lost` if one is of a video.

    `summed`: a product with weights makes each position of all positions of the origins.
    """
    if size == 1:
        return ()
    claims = [claim for label in origins for atom in atoms(label) for claim in atom.claims if not claim.blank]
    of_batch = any(claim.of_batch and not (summed and claim.source.of_batch) for claim in claims)
    features = summed or (bool(claims) and all(claim.source.features for claim in claims))
    roots: set[Axis] = set()
    for claim in claims:
        if claim.source.kind in ("input", "conv", "part"):
            roots.add(claim.axis)
        roots |= claim.source.roots
    kind = "lost" if any(claim.of_video for claim in claims) else "opaque"
    source = Source(kind, (size,), roots=frozenset(roots), of_batch=of_batch, features=features)
    return (Atom(source, 0, size),)


def is_blank(label: Label) -> bool:
    """Whether the label says nothing that another one could contradict."""
    return all(atom.blank for atom in atoms(label))


# Runs along one axis: split, joined, cut.


def split(atom: Factor, outer: int) -> tuple[Atom, Atom] | None:
    """(run of `outer` positions, run inside each of them) of a factor, or None where the split is not exact."""
    if isinstance(atom, Cat) or atom.size % outer:
        return None
    inner = atom.size // outer
    also = [split(claim, outer) for claim in atom.also]
    if None in also or (atom.extent is not None and (atom.offset % inner or atom.extent % inner)):
        return None
    halves = list(zip(*also, strict=True)) or [(), ()]
    head = replace(
        atom,
        size=outer,
        stride=atom.stride * inner,
        extent=None if atom.extent is None else atom.extent // inner,
        offset=atom.offset // inner,
        also=frozenset(halves[0]),
    )
    tail = replace(
        atom,
        size=inner,
        base=atom.base % (atom.stride * inner),
        extent=inner,
        offset=0,
        also=frozenset(halves[1]),
    )
    return head, tail


def _join(outer: Atom, inner: Atom) -> Atom | None:
    """The run that was split into `outer` and `inner`, or None where they are not the parts of one run."""
    if (
        outer.axis != inner.axis
        or inner.extent != inner.size
        or outer.stride != inner.stride * inner.size
        or outer.base % outer.stride != inner.base
    ):
        return None
    also = _paired(_join, outer.also, inner.also)
    if also is None:
        return None
    return replace(
        outer,
        size=outer.size * inner.size,
        stride=inner.stride,
        extent=None if outer.extent is None else outer.extent * inner.size,
        offset=outer.offset * inner.size,
        also=also,
    )


def _follow(first: Atom, second: Atom) -> Atom | None:
    """The run of `first` and then `second`, or None where the second does not start where the first ends."""
    if replace(first, size=1, base=0, offset=0, also=frozenset()) != replace(
        second, size=1, base=0, offset=0, also=frozenset()
    ):
        return None
    if first.extent is None:
        adjacent = first.base + first.size * first.stride == second.base
    else:
        adjacent = first.base == second.base and first.offset + first.size == second.offset
    also = _paired(_follow, first.also, second.also) if adjacent else None
    return None if also is None else replace(first, size=first.size + second.size, also=also)


def _paired(
    join: Callable[[Atom, Atom], Atom | None], left: frozenset[Atom], right: frozenset[Atom]
) -> frozenset[Atom] | None:
    """Claims of two neighbours, joined in pairs, or None where one has no partner."""
    if len(left) != len(right):
        return None
    joined = frozenset(both for a in left for b in right if (both := join(a, b)) is not None)
    return joined if len(joined) == len(left) else None


def _run(atom: Atom, start: int, size: int) -> Atom:
    """The positions `start` to `start + size` of an atom."""
    also = frozenset(_run(claim, start, size) for claim in atom.also)
    if atom.extent is None:
        return replace(atom, size=size, base=atom.base + start * atom.stride, also=also)
    return replace(atom, size=size, offset=atom.offset + start, also=also)


def joined(label: Iterable[Factor]) -> Label:
    """A label whose neighbours are joined where they are the outer and inner part of one run."""
    done: list[Factor] = []
    for factor in label:
        last = done[-1] if done else None
        both = _join(last, factor) if isinstance(last, Atom) and isinstance(factor, Atom) else None
        if both is None:
            done.append(factor)
        else:
            done[-1] = both
    return tuple(done)


def proper(label: Label) -> list[Factor]:
    """The factors longer than 1."""
    return [factor for factor in label if factor.size > 1]


def reshape(labels: Sequence[Label], old: Sequence[int], new: Sequence[int]) -> list[Label]:
    """Labels after a row-major reshape from `old` to `new` sizes."""
    if math.prod(old) == 0:
        return [fresh(size) for size in new]
    result: list[Label] = []
    i = 0
    pending: list[Factor] = []  # factors of consumed old dimensions that no new one has yet
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
                pending = proper(labels[i])
                i += 1
            factor = pending.pop(0)
            if size % (have * factor.size) == 0:
                taken.append(factor)
                have *= factor.size
            elif size % have == 0 and (halves := split(factor, size // have)):
                taken.append(halves[0])
                pending.insert(0, halves[1])
                have = size
            else:
                return result + _reshape_rest(labels, old, new, position)
        result.append(joined(taken))
    return result


def _reshape_rest(
    labels: Sequence[Label], old: Sequence[int], new: Sequence[int], position: int
) -> list[Label]:
    """Labels from new dimension `position` on: unknown ones up to the point where old and new boundaries meet."""
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
    """The label of a concatenation; neighbouring slices of one label become that label again."""
    parts: list[Label] = []
    for label in labels:
        nested = label[0].parts if len(label) == 1 and isinstance(label[0], Cat) else (label,)
        for part in nested:
            if length(part) == 0:
                continue
            both = _rejoin(parts[-1], part) if parts else None
            if both is None:
                parts.append(part)
            else:
                parts[-1] = both
    if len(parts) == 1:
        return parts[0]
    return (Cat(tuple(parts)),)


def _rejoin(left: Label, right: Label) -> Label | None:
    """`left` followed by `right`, where they are neighbouring slices along the outermost axis."""
    if not left or not right or left[1:] != right[1:]:
        return None
    a, b = left[0], right[0]
    both = _follow(a, b) if isinstance(a, Atom) and isinstance(b, Atom) else None
    return None if both is None else (both, *left[1:])


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
    if stop - start == 1:
        return tuple(pick(label, start))
    outer, run = label[0], length(label[1:])
    if isinstance(outer, Cat) or start % run or stop % run:
        return unknown(stop - start, label)
    return (_run(outer, start // run, (stop - start) // run), *label[1:])


def every(label: Label, start: int, step: int) -> tuple[Label, list[Atom]] | None:
    """(the label of every `step`-th position from `start` on, their place in each run of `step` positions).

    None where the label has several factors, or the runs do not fill it.
    """
    if len(label) != 1 or start >= step or label[0].size % step:
        return None
    halves = split(label[0], label[0].size // step)
    return None if halves is None else ((halves[0],), pick((halves[1],), start))


def pick(label: Label, index: int) -> list[Atom]:
    """The place of position `index`: a run of one position along each axis of the dimension, the outer first."""
    found: list[Atom] = []
    for factor in reversed(label):
        index, at = divmod(index, factor.size)
        if isinstance(factor, Atom):
            found.append(_run(factor, at, 1))
            continue
        for part in factor.parts:
            if at < length(part):
                found += reversed(pick(part, at))
                break
            at -= length(part)
    return found[::-1]
