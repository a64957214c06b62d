"""Names of sites in models that stand in other modules.

A trainer, a pipeline or DistributedDataParallel puts a module round a model, and every path then begins with its
name. The same sites are known again by what follows the path that all of them share.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

ROOT = "attention"
"""The name of a site that stands in the model itself, in no module of it."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that PyTorch puts round others, wherever in a model."""

Path = tuple[str, ...]


class Aligned(NamedTuple):
    """Which names mean the same sites."""

    names: dict[str, str]
    """Name -> known name."""
    cut: int
    """Components of the paths that only one of the two has."""


class _Place(NamedTuple):
    path: Path
    ordinal: str
    """`2` of the second site in a module; empty of the first."""


def align(names: Sequence[str], known: Collection[str]) -> Aligned | None:
    """The known names of sites, which may differ by the path of a wrapper; None where they are other sites.

    One path is cut from the front of all names, and one is put there instead. Both may be there only where all
    known names are met; and of a single name two components must stay, and the paths begin with other ones.
    """
    if not names:
        return Aligned({}, 0)
    for root in (False, True):  # a module may be called as the root is
        places = [_place(name, root) for name in names]
        targets = {_place(name, root): name for name in known}
        found: dict[int, list[dict[str, str]]] = {}
        for cut, put in _moves(places[0], targets):
            moved = [_moved(place, cut, put) for place in places]
            alike = len(places[0].path) - len(cut)
            if cut and put:  # else any site would do as well as another
                sure = len(names) > 1 or (alike > 1 and cut[0] != put[0])
                if not sure or len(names) != len(known):
                    continue
            if targets.keys() >= set(moved):
                pairs = zip(names, moved, strict=True)
                met = {name: targets[place] for name, place in pairs if place is not None}
                found.setdefault(len(cut) + len(put), []).append(met)
        if found and len(found[least := min(found)]) == 1:
            return Aligned(found[least][0], least)
    return None


def without_wrappers(path: str) -> str:
    """`blocks.0.attn1` of `_orig_mod.blocks.0._fsdp_wrapped_module.attn1`."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _place(name: str, root: bool) -> _Place:
    """Args:
    root: whether `ROOT` is no module's name.
    """
    path, _, ordinal = name.partition("#")
    parts = tuple(without_wrappers(path).split("."))
    return _Place(() if root and parts == (ROOT,) else parts, ordinal)


def _moves(place: _Place, targets: Iterable[_Place]) -> set[tuple[Path, Path]]:
    """(path to cut, path to put) that lead from a place to targets that end alike."""
    moves = set()
    for target in targets:
        alike = 0
        for one, other in zip(reversed(place.path), reversed(target.path), strict=False):
            if one != other:
                break
            alike += 1
        if place.ordinal == target.ordinal and (alike or not (place.path and target.path)):
            moves.add((place.path[: len(place.path) - alike], target.path[: len(target.path) - alike]))
    return moves


def _moved(place: _Place, cut: Path, put: Path) -> _Place | None:
    if place.path[: len(cut)] != cut:
        return None
    return _Place((*put, *place.path[len(cut) :]), place.ordinal)
