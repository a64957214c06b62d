"""Labels that meet: where tensors are combined element by element, written over each other, or compared.

Both labels are cut into factors of equal sizes. Where the factors of a pair differ, the result has the one that
says more, and the claims of both if neither contradicts the other.
"""

import itertools
from dataclasses import replace
from typing import NamedTuple

from sparsify_compiler.passes.axes import (
    CONV,
    PIECE,
    Atom,
    Cat,
    Factor,
    Label,
    atoms,
    axes_of,
    cat,
    cut,
    is_blank,
    joined,
    length,
    proper,
    single,
    split,
    unknown,
)


def merge(a: Label, b: Label) -> Label:
    """The label of a dimension where two tensors meet element by element: the claims of both, if they agree.

    The axes of a convolution alone fix the place of a token, so they are kept without other claims. Of two
    convolutions the axes of the first are kept.
    """
    if a == b or (is_blank(b) and _rank(a) >= _rank(b)):
        return a if a else b
    if is_blank(a):
        return b
    assert length(a) == length(b)
    if (pairs := aligned(a, b)) is not None:
        if _elsewhere(a, b, pairs):
            return unknown(length(a), a, b)
        return joined([factor for x, y in pairs for factor in _meet(x, y)])
    kinds = [{atom.source.kind for atom in atoms(label)} for label in (a, b)]
    best = max(_rank(a), _rank(b))
    if best != CONV or all(kind & {"conv", "position"} for kind in kinds):
        return unknown(length(a), a, b)  # the labels disagree about the place of the tokens
    return a if _rank(a) == best else b


def either(a: Label, b: Label) -> Label:
    """The label of a dimension of two tensors that are joined along another dimension: the claims that both make.

    Batches of two inputs count as one batch, and the axes of two videos (latents and their mask, whose channels are
    joined) as the axes of one.
    """
    if a == b or is_blank(b):
        return a if a else b
    if is_blank(a):
        return b
    pairs = aligned(a, b)
    if pairs is None or _elsewhere(a, b, pairs):
        return unknown(length(a), a, b)
    return joined([factor for x, y in pairs for factor in _share(x.factor, y.factor)])


def _elsewhere(a: Label, b: Label, pairs: "list[tuple[_Piece, _Piece]]") -> bool:
    """Whether one label is blank where the other claims an axis that the first has at another place."""
    return any(
        (is_blank((x.factor,)) and axes_of((y.factor,)) & axes_of(a))
        or (is_blank((y.factor,)) and axes_of((x.factor,)) & axes_of(b))
        for x, y in pairs
    )


def implies(label: Label, other: Label) -> bool:
    """Whether `label` makes every claim of `other`, about the same positions."""
    if label == other:
        return True
    pairs = aligned(label, other)
    if pairs is None or not single([other]) <= single([label]):
        return False
    return all(_covers(x.factor, y.factor) for x, y in pairs)


def _rank(label: Label) -> int:
    return max((atom.rank for atom in atoms(label)), default=0)


class _Piece(NamedTuple):
    """A factor and its rank, which is lower where the factor was cut to meet the other label's."""

    factor: Factor
    rank: int


def aligned(a: Label, b: Label) -> list[tuple[_Piece, _Piece]] | None:
    """Both labels cut into factors of equal sizes, or None where their sizes do not divide each other."""
    left, right = ([_Piece(factor, _rank((factor,))) for factor in proper(label)] for label in (a, b))
    pairs = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.factor.size == y.factor.size:
            pairs.append((x, y))
            continue
        small, big, rest = (x, y, right) if x.factor.size < y.factor.size else (y, x, left)
        halves = split(big.factor, small.factor.size)
        if halves is None:
            return None
        known = isinstance(big.factor, Atom) and big.factor.source.kind in ("input", "position")
        rank = min(big.rank, PIECE) if known else big.rank
        outer, inner = (_Piece(half, rank) for half in halves)
        rest.insert(0, inner)
        pairs.append((x, outer) if small is x else (outer, y))
    return pairs


def _meet(a: _Piece, b: _Piece) -> Label:
    """One factor of `merge`."""
    x, y = a.factor, b.factor
    if isinstance(x, Atom) and isinstance(y, Atom):
        if a.rank == b.rank and x.source.kind == y.source.kind == "input":
            return _meet_atoms(*sorted((x, y), key=precedence))
        return _meet_atoms(x, y) if a.rank >= b.rank else _meet_atoms(y, x)
    if isinstance(x, Cat) and isinstance(y, Cat):
        if (parts := common_parts(x, y)) is not None:
            return cat([merge(p, q) for p, q in parts])
        if (a.rank == CONV) == (b.rank == CONV):
            return unknown(x.size, (x,), (y,))
        return (x,) if a.rank == CONV else (y,)
    run, parts_of = (x, y) if isinstance(x, Atom) else (y, x)
    assert isinstance(run, Atom)
    assert isinstance(parts_of, Cat)
    if run.source.kind not in ("input", "position", "weight"):
        rank = a.rank if x is run else b.rank
        ranks = [_rank(part) for part in parts_of.parts]
        # Otherwise part by part: a known text says nothing about the rest.
        if rank > max(ranks) or rank < min(ranks):
            return (run,) if rank > max(ranks) else (parts_of,)
    starts = itertools.accumulate(map(length, parts_of.parts), initial=0)
    met = [
        merge(cut((run,), at, at + length(part)), part)
        for at, part in zip(starts, parts_of.parts, strict=False)
    ]
    return cat(met)


def _meet_atoms(best: Atom, other: Atom) -> Label:
    """The claims of two runs together; the rank of the first is not below that of the second."""
    if other.blank:
        return (best,)
    if any(_clash(p, q) for p in best.claims for q in other.claims):
        return unknown(best.size, (best,), (other,))
    if best.source.kind == "conv":
        return (best,)
    claims = [*best.also, *other.claims]
    also = {claim for claim in claims if claim.source.kind in ("input", "position")}
    if best.source.kind == "input":  # of unknown tokens it keeps their identity
        also |= set([claim for claim in claims if claim.source.kind in ("opaque", "part")][:1])
    return (replace(best, also=frozenset(also - {replace(best, also=frozenset())})),)


def _clash(x: Atom, y: Atom) -> bool:
    """Whether two claims have one origin in two orders: then the result of the meeting has no order."""
    if x.source is y.source:
        return x != y
    return y.axis in x.source.roots or x.axis in y.source.roots


def precedence(atom: Atom) -> tuple[int, int, int]:
    """Orders claims: the highest rank first, then the source with most dimensions, then the oldest source."""
    return -atom.rank, -len(atom.source.sizes), atom.source.serial


def _share(x: Factor, y: Factor) -> Label:
    """One factor of `either`."""
    if x == y or is_blank((y,)):
        return (x,)
    if is_blank((x,)):
        return (y,)
    if isinstance(x, Cat) and isinstance(y, Cat) and (parts := common_parts(x, y)) is not None:
        return cat([either(p, q) for p, q in parts])
    if isinstance(x, Atom) and isinstance(y, Atom):
        if common := sorted(x.claims & y.claims, key=precedence):
            return (replace(common[0], also=frozenset(common[1:])),)
        for p, q in itertools.product(x.claims, y.claims):
            if _twins(p, q):
                return (min(p, q, key=precedence),)
    return unknown(x.size, (x,), (y,))


def _twins(x: Atom, y: Atom) -> bool:
    """Whether two claims differ only in their input, and are of the batches of both or of axes of two videos.

    The videos may have different resolutions: the runs are then the same parts of their axes.
    """
    if not (x.source.kind == y.source.kind == "input" and x.source is not y.source):
        return False
    if x.dim == y.dim == 0:
        return replace(x, source=y.source, dim=y.dim) == y
    videos = min(len(x.source.sizes), len(y.source.sizes)) >= 4 and 0 not in (x.dim, y.dim)
    old, new = (run.source.sizes[run.dim] for run in (x, y))
    scaled = (x.stride * new, x.base * new) == (y.stride * old, y.base * old)
    return videos and scaled and (x.size, x.extent, x.offset) == (y.size, y.extent, y.offset)


def _covers(x: Factor, y: Factor) -> bool:
    """One factor of `implies`."""
    if x == y or is_blank((y,)):
        return True
    if isinstance(x, Cat) and isinstance(y, Cat) and (parts := common_parts(x, y)) is not None:
        return all(implies(p, q) for p, q in parts)
    return isinstance(x, Atom) and isinstance(y, Atom) and y.claims <= x.claims


def common_parts(x: Cat, y: Cat) -> list[tuple[Label, Label]] | None:
    """Both concatenations cut at the boundaries of both; None if a cut would divide a part of several factors."""
    ends = [list(itertools.accumulate(map(length, factor.parts))) for factor in (x, y)]
    edges = sorted({0, *ends[0], *ends[1]})
    for factor, own in zip((x, y), ends, strict=True):
        for part, end in zip(factor.parts, own, strict=True):
            if len(part) > 1 and any(end - length(part) < edge < end for edge in edges):
                return None
    spans = itertools.pairwise(edges)
    return [(cut((x,), start, stop), cut((y,), start, stop)) for start, stop in spans]


def share_axis(a: Label, b: Label) -> bool:
    """Whether two labels run over parts of one axis."""
    return bool({atom.axis for atom in atoms(a)} & {atom.axis for atom in atoms(b)})
