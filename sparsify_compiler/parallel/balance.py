"""The arithmetic of balance: which ranks own which heads, from the load of each head. Numbers in, numbers out.

All ranks compute it from the same loads, with ties decided by index, so all come to the same owners. Heads are
placed whole, the heaviest first, each on the rank that has least (LPT, Graham 1969); few heads are placed by an
exact search. Where the largest rank still has more than `GOOD` times the mean, such as where one head needs more
than all others, ranks share the queries of heads.
"""

import math
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import accumulate, pairwise, product

from sparsify_compiler.parallel.shares import UNITS, Owners, whole_owners

GOOD = 1.05
"""Largest load of a rank over the mean load, up to which no head moves and ranks share no head. A shared head costs
its selection and its keys on each of its ranks."""
_LIMITS = (1.04, 1.02, 1.0)
"""Loads of a rank, over the mean, up to which heads are shared; a higher limit shares fewer heads."""
_LEAST = 0.02
"""Least part of a head that a rank takes, over the mean load of a rank."""
_EXACT_HEADS = 12
"""Most heads for the exact search."""
_EXACT_NODES = 1_000
"""Most placements that the exact search tries."""


def capacity(heads: int, size: int) -> int:
    """The number of heads that a rank has room for.

    Half more than its even number lets a rank take many light heads. Two more are for shared heads: where ranks are
    filled one after the other, each ends one shared head and begins another. Memory bounds it: an empty slot costs
    no arithmetic, but holds queries, keys and values.
    """
    return min(heads, math.ceil(1.5 * heads / size) + 2)


def rank_loads(loads: Sequence[float], owners: Owners) -> list[float]:
    """The load of each rank."""
    totals = [0.0] * (len(owners[0]) - 1)
    for load, units in zip(loads, owners, strict=True):
        for rank, (first, last) in enumerate(pairwise(units)):
            totals[rank] += load * (last - first) / UNITS
    return totals


def spread(loads: Sequence[float], owners: Owners) -> float:
    """The largest load of a rank over the mean load of all; 1 where there is no load."""
    totals = rank_loads(loads, owners)
    return max(totals) * len(totals) / sum(totals) if sum(totals) > 0 else 1.0


def balanced(loads: Sequence[float], size: int, room: int) -> list[list[int]]:
    """The owners of heads that balance their loads.

    Args:
        loads: the load of each head, at least 0.
        size: the number of ranks.
        room: the most heads of a rank, at least as many as all ranks need for all heads.
    """
    ranks = lpt(loads, size, room)
    if len(loads) <= _EXACT_HEADS and spread(loads, whole_owners(ranks, size)) > GOOD:
        ranks = exact(loads, size, room, ranks)
    whole = whole_owners(ranks, size)
    if spread(loads, whole) <= GOOD:
        return whole
    found, heavy = whole, _heaviest_first(loads)
    mean = sum(loads) / size
    # Ranks that heavy heads fill have no place for their number of light ones. Then light heads come first.
    light = sorted(heavy, key=lambda head: loads[head] >= mean)
    for limit, order in product(_LIMITS, (heavy, light)):
        tried = _shared(loads, size, room, limit, order)
        if spread(loads, tried) < spread(loads, found):
            found = tried
        if spread(loads, found) <= GOOD:
            break
    return found


def lpt(loads: Sequence[float], size: int, room: int) -> list[int]:
    """The rank of each head: heaviest heads first, each on the rank that has least and has room.

    Of equal loads, the rank with fewer heads is taken, then the first.
    """
    ranks, totals, free = [0] * len(loads), [0.0] * size, [room] * size
    for head in _heaviest_first(loads):
        with_room = (rank for rank in range(size) if free[rank])
        rank = min(with_room, key=lambda rank: (totals[rank], -free[rank], rank))
        ranks[head] = rank
        totals[rank] += loads[head]
        free[rank] -= 1
    return ranks


def exact(loads: Sequence[float], size: int, room: int, known: Sequence[int]) -> list[int]:
    """The rank of each head with the least largest load, or the best of `_EXACT_NODES` placements.

    Args:
        known: a placement that is good already.
    """
    order = _heaviest_first(loads)
    totals, free = [0.0] * size, [room] * size
    best, ranks = list(known), [0] * len(loads)
    most = max(rank_loads(loads, whole_owners(known, size)))
    bound = max(sum(loads) / size, max(loads, default=0.0)) * (1 + 1e-9)
    nodes = 0

    def place(depth: int) -> None:
        nonlocal best, most, nodes
        if depth == len(order):
            best, most = list(ranks), max(totals)
            return
        head = order[depth]
        tried = set[tuple[float, int]]()  # ranks with equal loads and room are alike
        for rank in sorted(range(size), key=lambda rank: (totals[rank], rank)):
            like = totals[rank], free[rank]
            if most <= bound or nodes >= _EXACT_NODES or totals[rank] + loads[head] >= most:
                return
            if not free[rank] or like in tried:
                continue
            tried.add(like)
            nodes += 1
            ranks[head] = rank
            totals[rank] += loads[head]
            free[rank] -= 1
            place(depth + 1)
            totals[rank], free[rank] = like

    place(0)
    return best


def _heaviest_first(loads: Sequence[float]) -> list[int]:
    return sorted(range(len(loads)), key=lambda head: (-loads[head], head))


def _shared(
    loads: Sequence[float], size: int, room: int, limit: float, order: Sequence[int]
) -> list[list[int]]:
    """Owners of heads that are placed in an order, each on the rank that has least.

    A head that would lift a rank above `limit` times the mean load is cut there. The rest of it goes to the rank
    that has least then, as in McNaughton's rule for tasks that may be cut (1959).
    """
    mean = sum(loads) / size
    full, least = limit * mean, _LEAST * mean
    free, spare = [room] * size, size * room - len(loads)
    ranks = [(-full, rank) for rank in range(size)]  # a heap: the rank that has least first
    parts: list[list[int]] = [[0] * size for _ in loads]
    for head in order:
        units, again = UNITS, list[tuple[float, int]]()
        while units:
            left, rank = heappop(ranks) if ranks else heappop(again)
            left = -left
            taken = units
            if loads[head] * units > left * UNITS and spare > 0 and ranks:
                cut = int(left * UNITS / loads[head])
                if loads[head] * min(cut, units - cut) >= least * UNITS:
                    taken, spare = cut, spare - 1
            free[rank] -= not parts[head][rank]
            parts[head][rank] += taken
            units -= taken
            left -= loads[head] * taken / UNITS
            if free[rank]:
                again.append((-left, rank))
        for one in again:
            heappush(ranks, one)
    return [[0, *accumulate(units)] for units in parts]
