"""Names of sites in models that are wrapped in other modules.

A trainer, a pipeline or DistributedDataParallel wraps a model in a module, and every path then begins with its
name. The part after the path that all sites share identifies the sites.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

ROOT = "attention"
"""The name of a site in the model itself, outside of its modules."""

TIME_STEP = re.compile(r"timesteps?|time|t|sigmas?|noise_levels?")
"""The names of the time step among the inputs of models, in lower case."""

_KERNEL = re.compile("attention|attn|transformer_encoder_layer", re.IGNORECASE)
"""Part of the name of operators that compute attention, in any library."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules in which PyTorch wraps other modules, anywhere in a model."""

Path = tuple[str, ...]


def is_attention_kernel(name: str) -> bool:
    """Whether an operator of this name computes attention."""
    return _KERNEL.search(name) is not None


class Aligned(NamedTuple):
    """The names that mean the same sites."""

    names: dict[str, str]
    """Name -> known name."""
    cut: int
    """Number of components that only one of the two paths has."""


class _Place(NamedTuple):
    path: Path
    ordinal: str
    """`2` for the second site in a module; empty for the first."""


def align(names: Sequence[str], known: Collection[str]) -> Aligned | None:
    """The known names of sites, which may differ by the path of a wrapper; None if they are other sites.

    One path is removed from the front of all names, and another is put there. Either path may be empty. If neither
    is, the names must match all known names; a single name must also keep two components, and the two paths must
    begin differently.
    """
    if not names:
        return Aligned({}, 0)
    for root in (False, True):  # a module may have the name `ROOT`
        places = [_place(name, root) for name in names]
        targets = {_place(name, root): name for name in known}
        found: dict[int, list[dict[str, str]]] = {}
        for cut, put in _moves(places[0], targets):
            moved = [_moved(place, cut, put) for place in places]
            alike = len(places[0].path) - len(cut)
            if cut and put:  # otherwise any site would match any other
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
    """The path without wrappers: `blocks.0.attn1` for `_orig_mod.blocks.0._fsdp_wrapped_module.attn1`."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _place(name: str, root: bool) -> _Place:
    """Args:
    root: whether `ROOT` means the model itself, and not a module of this name.
    """
    path, _, ordinal = name.partition("#")
    parts = tuple(without_wrappers(path).split("."))
    return _Place(() if root and parts == (ROOT,) else parts, ordinal)


def _moves(place: _Place, targets: Iterable[_Place]) -> set[tuple[Path, Path]]:
    """(path to remove, path to put) for every target with the same ending as a place."""
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


COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that PyTorch calls in place of the module's own call."""
