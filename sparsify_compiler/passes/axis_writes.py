"""The effect of a write to memory on the labels of all tensors that share it.

A write is followed through the memory that it reaches, not through the tensors that use its result. A claim that is
not proved to hold still is dropped in every tensor of that memory: views taken before, views taken later, the base.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sparsify_compiler.passes.axes import (
    Atom,
    Axis,
    Cat,
    Factor,
    Label,
    atoms,
    cat,
    cut,
    is_blank,
    joined,
    length,
    unknown,
)
from sparsify_compiler.passes.meeting import common_parts, implies, precedence


@dataclass(frozen=True, slots=True)
class Known:
    """Everything known about a tensor."""

    labels: Sequence[Label]
    """One for each dimension."""
    taken: frozenset[Atom] = frozenset()
    """Positions from which any of its tokens were taken, along axes that it does not have."""
    fixed: frozenset[Atom] = frozenset()
    """Positions from which all of its tokens were taken, along such axes."""
    constant: bool = False
    """Whether nothing in it comes from an input."""

    @property
    def axes(self) -> set[Axis]:
        """Every axis along which anything in it lies, or lay."""
        runs = [*self.taken, *(run for label in self.labels for run in atoms(label))]
        return {axis for run in runs for claim in run.claims for axis in (claim.axis, *claim.source.roots)}


class Write:
    """Turns labels of memory before a write into labels after it.

    A claim holds still in three cases. The target was known to lie along that axis, and the new elements lie at the
    same places of it. The claim is about another part of a concatenation. The old elements took part in the new
    ones, and no other operand has the axis. A blank dimension takes the label of the elements written there.
    """

    def __init__(self, before: Known, after: Known, *, others: Iterable[Known] | None = None) -> None:
        """Compare the target before and after the write.

        Args:
            before: everything known about the tensor through which the operator writes.
            after: everything known about its new elements.
            others: the operands that met the old elements, element by element; None if the new ones replace them.
        """
        replaced = others is None
        self._brought = {axis for other in others or () for axis in other.axes}
        self._replaced = replaced
        doubtful: set[Axis] = set()
        proved: set[Atom] = set()
        for old, new in zip(before.labels, after.labels, strict=True):
            claims = _claims(old)
            if implies(new, old) if replaced else not _unknowns(new) - _unknowns(old):
                proved |= claims
            else:
                doubtful |= {claim.axis for claim in claims}
        fixed, now = (
            _by_axis(claim for atom in known.fixed for claim in atom.claims) for known in (before, after)
        )
        for axis, claims in fixed.items():
            if replaced and now.get(axis) != claims:
                doubtful.add(axis)
            else:
                proved |= claims
        runs = [run for label in before.labels for run in atoms(label)]
        self._axes = {*fixed, *(axis for run in runs for axis in (run.axis, *run.source.roots))}
        self._other_videos = {axis for axis in doubtful if _is_batch(axis)}
        self._covered = [part for label in before.labels for part in (label, *_parts(label))]
        self._proved = _by_axis(claim for claim in proved if claim.axis not in doubtful)
        self._complete = {axis for axis, claims in self._proved.items() if _determine(claims)}
        self._written = after.labels
        pairs = list(zip(before.labels, after.labels, strict=True))
        self._fills = [fill for old, new in pairs for fill in _fills(old, new)]
        still = {atom.source for old, new in pairs if is_blank(new) for atom in atoms(old)}
        self._blank = still | {blank.source for blank, _ in self._fills}

    def after(self, label: Label) -> Label:
        """The label, after the write, of a dimension of any tensor that shares the memory."""
        label = joined([factor for old in self._unmixed(label) for factor in self._kept(old)])
        for blank, by in self._fills:
            label = _fill(label, blank, by)
        return label

    def holds(self, claim: Atom) -> bool:
        """Whether a claim about all of the memory still holds."""
        if claim.axis in self._complete or not (self._replaced or claim.axis in self._brought):
            return True
        return any(_digit(one) == _digit(claim) for one in self._proved.get(claim.axis, ()))

    def _unmixed(self, label: Label) -> Label:
        """The label, or an unknown one if a part of it now has another video of the batch than the rest."""
        if len(label) == 1 and isinstance(label[0], Cat):
            return cat([self._unmixed(part) for part in label[0].parts])
        axes = {run.axis for run in atoms(label)}
        if self._other_videos - axes and axes & self._axes and label not in self._covered:
            return unknown(length(label), label)
        return label

    def _kept(self, factor: Factor) -> Label:
        if isinstance(factor, Cat):
            axes = [{run.axis for run in atoms(part)} for part in factor.parts]
            here = self._axes & set().union(*axes)
            return cat(
                [
                    part if here and own and not here & own else self._part(part)
                    for part, own in zip(factor.parts, axes, strict=True)
                ]
            )
        if factor.blank:  # its order is unknown where another dimension was written in part
            return (factor,) if factor.source in self._blank else unknown(factor.size, *self._written)
        kept = sorted(filter(self.holds, factor.claims), key=precedence)
        if not kept:
            return unknown(factor.size, (factor,))
        return (replace(kept[0], also=frozenset(kept[1:])),)

    def _part(self, part: Label) -> Label:
        return joined([factor for old in part for factor in self._kept(old)])


def _is_batch(axis: Axis) -> bool:
    """Whether positions along an axis may be videos of a batch."""
    source, dim = axis
    return source.of_batch or (source.kind == "input" and dim == 0)


def _parts(label: Label) -> tuple[Label, ...]:
    """The parts of a label that is a concatenation and nothing else."""
    return label[0].parts if len(label) == 1 and isinstance(label[0], Cat) else ()


def _claims(label: Label) -> set[Atom]:
    return {claim for atom in atoms(label) for claim in atom.claims if not claim.blank}


def _unknowns(label: Label) -> set[Atom]:
    return {atom for atom in atoms(label) if atom.source.kind in ("lost", "opaque")}


def _by_axis(claims: Iterable[Atom]) -> dict[Axis, set[Atom]]:
    found: dict[Axis, set[Atom]] = {}
    for claim in claims:
        found.setdefault(claim.axis, set()).add(claim)
    return found


def _determine(claims: Iterable[Atom]) -> bool:
    """Whether these runs along one axis together determine a position on it."""
    known = 1  # the position is known modulo this
    for claim in sorted(claims, key=lambda claim: claim.stride):
        if claim.stride > known:
            return False
        if claim.extent is None:
            return True
        known = max(known, claim.stride * claim.extent)
    return False


def _digit(claim: Atom) -> tuple[int, int, int | None]:
    """The part of a position on its axis that a run determines, wherever the run starts and ends."""
    return claim.stride, claim.base % claim.stride if claim.extent is None else claim.base, claim.extent


def _fills(target: Label, written: Label) -> list[tuple[Atom, Label]]:
    """(blank run of `target`, label written there), for every blank run that gets a label."""
    found: list[tuple[Atom, Label]] = []
    for factor, by in _grouped(target, written):
        if isinstance(factor, Atom):
            found += [(factor, by)] if factor.source.kind == "blank" and not is_blank(by) else []
        elif len(by) == 1 and isinstance(by[0], Cat):
            for part, new in common_parts(factor, by[0]) or []:
                found += _fills(part, new)
    return found


def _grouped(target: Label, written: Label) -> list[tuple[Factor, Label]]:
    """Every factor of one label with the factors of another in its place, as far as sizes agree."""
    rest, groups = list(written), []
    for factor in target:
        group: list[Factor] = []
        while rest and math.prod(one.size for one in group) < factor.size:
            group.append(rest.pop(0))
        if length(tuple(group)) != factor.size:
            break
        groups.append((factor, tuple(group)))
    return groups


def _fill(label: Label, blank: Atom, by: Label) -> Label:
    """`label` with `by` in place of the run `blank`, of which it has all or a part."""
    done: list[Factor] = []
    for factor in label:
        if isinstance(factor, Cat):
            done += cat([_fill(part, blank, by) for part in factor.parts])
        elif factor.source is not blank.source:
            done.append(factor)
        elif factor == blank:
            done += by
        elif factor.stride == blank.stride == 1 and factor.extent is blank.extent is None:
            done += _overlaid(factor, blank, by)
        else:
            done += unknown(factor.size, by)
    return joined(done)


def _overlaid(run: Atom, blank: Atom, by: Label) -> Label:
    """A plain run with `by` in place of its part inside `blank`."""
    start = min(max(blank.base - run.base, 0), run.size)
    stop = min(max(blank.base + blank.size - run.base, start), run.size)
    if start == stop:
        return (run,)
    shift = run.base - blank.base
    return cat([cut((run,), 0, start), cut(by, start + shift, stop + shift), cut((run,), stop, run.size)])
