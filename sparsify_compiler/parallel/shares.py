"""The arithmetic of shares: which tokens and which heads each rank has. Integers in, integers out.

Every rank has a run of the video's tokens; other tokens (text) are on all ranks. A dimension over tokens is a
sequence of parts. A rank's share of a dimension has the same parts, each cut to the tokens of that rank.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple


class Part(NamedTuple):
    """A part of a dimension: `tokens` that ranks share, with `width` positions each; 0 tokens: `width` positions
    that every rank has."""

    tokens: int
    width: int

    @property
    def whole(self) -> int:
        """The number of positions of all ranks."""
        return max(self.tokens, 1) * self.width

    def local(self, rank: int, size: int, each: int = 1) -> int:
        """The number of positions that a rank has."""
        return share(self.tokens, rank, size, each) * self.width if self.tokens else self.width

    def of_rank(self, rank: int, size: int, each: int = 1) -> "Part":
        """The part that a rank has, of the same width."""
        return Part(share(self.tokens, rank, size, each), self.width)


class Piece(NamedTuple):
    """A run of positions that a rank has: its place in the whole dimension and on the rank."""

    shared: bool
    """Whether ranks share the part, so that each has other positions of it."""
    whole: slice
    local: slice


def share(total: int, rank: int, size: int, each: int = 1) -> int:
    """The number of tokens of a rank: `total` divided evenly, the first ranks one more.

    Args:
        each: the number of neighbouring shares that a rank has; then `total` is divided among `size * each`.
    """
    return start(total, rank + 1, size, each) - start(total, rank, size, each)


def start(total: int, rank: int, size: int, each: int = 1) -> int:
    """The first token of a rank."""
    shares, first = size * each, rank * each
    return total // shares * first + min(first, total % shares)


def parts_of(numbers: Sequence[int]) -> list[Part]:
    """Parts from the flat list of numbers that an op takes."""
    return [Part(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


def flat(parts: Sequence[Part]) -> list[int]:
    """The list of numbers that an op takes for parts."""
    return [number for part in parts for number in part]


def whole_length(parts: Sequence[Part]) -> int:
    """Size of a dimension of all ranks."""
    return sum(part.whole for part in parts)


def local_length(parts: Sequence[Part], rank: int, size: int, each: int = 1) -> int:
    """Size of a rank's share of a dimension."""
    return sum(part.local(rank, size, each) for part in parts)


def pieces(parts: Sequence[Part], rank: int, size: int, each: int = 1) -> Iterator[Piece]:
    """The runs of a dimension that a rank has, in order."""
    whole = local = 0
    for part in parts:
        first, length = whole, part.local(rank, size, each)
        if part.tokens:
            first += start(part.tokens, rank, size, each) * part.width
        yield Piece(part.tokens > 0, slice(first, first + length), slice(local, local + length))
        whole += part.whole
        local += length


UNITS = 1 << 16
"""Units in which ranks share the queries of one head."""

Owners = Sequence[Sequence[int]]
"""The owners of heads, [query heads, ranks + 1]: rank r computes the queries of a head from unit [head][r] to unit
[head][r + 1]. A rank owns a head if it computes any of its queries."""


def whole_owners(ranks: Sequence[int], size: int) -> list[list[int]]:
    """The owners of heads that no ranks share, from the rank of each head."""
    return [[UNITS * (rank > owner) for rank in range(size + 1)] for owner in ranks]


def even_owners(heads: int, size: int) -> list[list[int]]:
    """The owners where all heads cost the same: runs of neighbours, the first ranks one more."""
    return whole_owners([rank for rank in range(size) for _ in range(share(heads, rank, size))], size)


def owners_of(owners: Owners, head: int) -> list[int]:
    """The ranks that own a head, in order."""
    return [rank for rank, (first, last) in enumerate(pairwise(owners[head])) if first < last]


def heads_of(owners: Owners, rank: int) -> list[int]:
    """The heads that a rank owns, in order."""
    return [head for head, units in enumerate(owners) if units[rank] < units[rank + 1]]


def queries_of(owners: Owners, head: int, rank: int, total: int) -> slice:
    """The queries of a head that a rank computes, of a sequence of `total`."""
    first, last = owners[head][rank : rank + 2]
    return slice(total * first // UNITS, total * last // UNITS)


def alike(owners: Owners, rank: int, total: int) -> list[tuple[slice, slice]]:
    """(slots, queries) of a rank: neighbouring slots of which it computes the same queries, in order."""
    queries = [queries_of(owners, head, rank, total) for head in heads_of(owners, rank)]
    found, first = list[tuple[slice, slice]](), 0
    for slot in range(1, len(queries) + 1):
        if slot == len(queries) or queries[slot] != queries[first]:
            found.append((slice(first, slot), queries[first]))
            first = slot
    return found


class HeadRun(NamedTuple):
    """Neighbouring heads of a rank: their place among the heads of a tensor and among the slots of the rank."""

    heads: slice
    slots: slice
    more: slice
    """Further slots that have the last of these heads: several queries may read one key head."""


def head_runs(owners: Owners, heads: int, rank: int) -> list[HeadRun]:
    """The heads of a tensor that the query heads of a rank read; slot i is for query head i of the rank.

    Where each query head reads its own, the rank computes the same queries of all heads of a run.
    """
    queries = len(owners) // heads
    readers: dict[int, list[int]] = {}
    for slot, head in enumerate(heads_of(owners, rank)):
        readers.setdefault(head // queries, []).append(slot)
    runs: list[HeadRun] = []
    for head, slots in readers.items():
        neighbours = queries == 1 and runs and head == runs[-1].heads.stop
        joins = neighbours and owners[head][rank : rank + 2] == owners[head - 1][rank : rank + 2]
        first, at = (runs[-1].heads.start, runs[-1].slots.start) if joins else (head, slots[0])
        run = HeadRun(slice(first, head + 1), slice(at, slots[0] + 1), slice(slots[0] + 1, slots[-1] + 1))
        runs[-1 if joins else len(runs) :] = [run]
    return runs
