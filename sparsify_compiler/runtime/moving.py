"""Heads that move between ranks, from call to call.

A program gets the owners of heads as inputs, so heads move without a new program. `Stream` has the owners by which
its state is arranged, and `place_heads` changes both together. In dense steps all heads cost the same, so ranks
have evenly many. In sparse steps owners follow the loads: the densities that sites have reported.

Every rank has the reports of all heads, and calls are counted alike, so all ranks decide alike and ask nobody. No
decision waits for the device: copies of reports to the host begin after each call, and a plan leaves out the last.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_compiler.parallel.balance import GOOD, balanced, capacity, spread
from sparsify_compiler.parallel.exchange import exchange
from sparsify_compiler.parallel.shares import Owners, even_owners, heads_of, owners_of
from sparsify_compiler.runtime.site_inputs import REPORT, MovingSite, tensor_of
from sparsify_compiler.runtime.state import Stream

log = logging.getLogger(__name__)


def note_loads(sites: Sequence[MovingSite], stream: Stream) -> None:
    """Keep the densities that sites reported on a sparse call, as loads of their heads."""
    reports = [stream.tensors[one.report] for one in sites]
    stream.loads.note(torch.cat([one[REPORT.index("density")].sum(0) for one in reports]))


def place_heads(
    sites: Sequence[MovingSite], stream: Stream, *, sparse: bool, initialised: bool
) -> list[Tensor]:
    """The owners of heads for the next call of a stream. Heads that move take their state along.

    Args:
        sparse: whether the call runs sparse.
        initialised: whether the state holds anything that has to move.
    """
    even = [_even(one.sharing.heads, one.sharing.ranks.size) for one in sites]
    if not stream.owners:
        stream.owners, stream.owner_tensors = even, [tensor_of(owners) for owners in even]
    if sparse:
        balance = sites[0].sharing.balance
        again = isinstance(balance, int) and stream.sparse_calls % balance == 0
        if (stream.planned is None or again) and (known := _loads(sites, stream)) is not None:
            now = even if stream.planned is None else stream.planned
            stream.planned = [
                _planned(site, of_heads, owners)
                for site, of_heads, owners in zip(sites, known, now, strict=True)
            ]
            _log_moves(known, now, stream.planned)
        stream.sparse_calls += 1
    wanted = stream.planned if sparse and stream.planned is not None else even
    if wanted != stream.owners:
        if initialised:
            move(sites, stream.tensors, stream.owners, wanted)
        stream.owners, stream.owner_tensors = wanted, [tensor_of(owners) for owners in wanted]
    return stream.owner_tensors


@functools.cache
def _even(heads: int, size: int) -> Owners:
    return even_owners(heads, size)


def _loads(sites: Sequence[MovingSite], stream: Stream) -> list[list[float]] | None:
    """The load of each head of each site; None as long as too few calls are known."""
    known = stream.loads.mean()
    if known is None:
        return None
    return [one.tolist() for one in known.split([site.sharing.heads for site in sites])]


def _planned(site: MovingSite, loads: Sequence[float], now: Owners) -> Owners:
    """The owners of a site's heads for these loads; those of now if they are good."""
    size = site.sharing.ranks.size
    good = spread(loads, now) <= GOOD
    return now if good else balanced(loads, size, capacity(site.sharing.heads, size))


def _log_moves(loads: Sequence[Sequence[float]], before: Sequence[Owners], after: Sequence[Owners]) -> None:
    """Log the balance of all attention calls, in one line, if any heads move."""
    pairs = zip(loads, before, after, strict=True)
    moved = [(spread(of_heads, old), spread(of_heads, new)) for of_heads, old, new in pairs if old != new]
    if moved:
        worst, left = map(max, zip(*moved, strict=True))
        log.info(
            "heads of %d of %d attention calls move: largest load of a rank %.2f times the mean before, %.2f after",
            len(moved), len(loads), worst, left,
        )  # fmt: skip


def move(
    sites: Sequence[MovingSite], tensors: Sequence[Tensor], before: Sequence[Owners], after: Sequence[Owners]
) -> None:
    """Send the state of heads to the ranks that own them now, in one message for all sites.

    Args:
        tensors: the state of a stream; its order of heads changes from the owners before to those after.

    Raises:
        RankError: another rank failed, left, or runs another op.
    """
    ranks = sites[0].sharing.ranks
    held = [
        (tensors[at], old, new)
        for site, old, new in zip(sites, before, after, strict=True)
        for at in site.state
        if old != new
    ]
    if not held:
        return
    messages = [
        [_of(x, old, ranks.rank, _sent(old, new, ranks.rank, peer)) for peer in range(ranks.size)]
        for x, old, new in held
    ]
    shapes = [
        [(x.shape[0], len(_sent(old, new, peer, ranks.rank)), *x.shape[2:]) for peer in range(ranks.size)]
        for x, old, new in held
    ]
    with torch.no_grad():
        received = exchange(messages, shapes, ranks, "the state of heads that move")
        for (x, old, new), blocks in zip(held, received, strict=True):
            heads = heads_of(new, ranks.rank)
            moved = x.new_zeros(x.shape)
            stay = [head for head in heads if ranks.rank in owners_of(old, head)]
            moved[:, [heads.index(head) for head in stay]] = _of(x, old, ranks.rank, stay)
            for peer, block in enumerate(blocks):
                arrived = _sent(old, new, peer, ranks.rank)
                moved[:, [heads.index(head) for head in arrived]] = block
            x.copy_(moved)


def _of(x: Tensor, owners: Owners, rank: int, heads: Sequence[int]) -> Tensor:
    """The state of heads among the slots of a rank."""
    mine = heads_of(owners, rank)
    return x[:, [mine.index(head) for head in heads]]


def _sent(old: Owners, new: Owners, rank: int, to: int) -> list[int]:
    """The heads whose state a rank sends to another. The first owner sends it to those that were no owners."""
    return [
        head
        for head in heads_of(old, rank)
        if owners_of(old, head)[0] == rank and to not in owners_of(old, head) and to in owners_of(new, head)
    ]
