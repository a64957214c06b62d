"""The one place where ranks send tensors to each other, and notice that one of them does not take part.

Every exchange begins with a short message between CPUs, the name and the sizes of the exchange. So ranks that run
different ops raise an error before they send anything else. Otherwise gloo would end the process of a rank that
receives more than it expects, and NCCL would wait. No rank waits for its GPU for this: names and sizes are known
before. In a process group that has NCCL alone there is no such message, and NCCL's own timeout ends a wait.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler import _torch
from sparsify_compiler.errors import RankError
from sparsify_compiler.plan import Ranks

_HEADER = 240
"""Bytes of the first message."""
_PATIENCE = 2.0
"""Seconds that a rank which failed waits for the others to say that they failed too, at most a fifth of the
timeout. The exchange may take the timeout except twice these seconds, so the error comes within the timeout."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Views of tensors that ranks send, and the views that get them. A rank copies what it sends to itself."""

    dtype: torch.dtype
    """The type that is sent."""
    sends: Sequence[Sequence[Tensor]]
    """`sends[peer]` are the views that go to a rank."""
    receives: Sequence[Sequence[Tensor]]
    """`receives[peer]` are the views that get what comes from a rank. Each has the shape of what it gets."""
    adds: bool = False
    """Whether the views are increased by what comes, in the order of ranks, instead of overwritten."""


def transfer(transfers: Sequence[Transfer], ranks: Ranks, what: str) -> None:
    """Send views to other ranks, in one message for all views of a type; write what comes.

    Args:
        transfers: the same on all ranks, with the views of each.
        what: name of the exchange, the same on all ranks.

    Raises:
        RankError: another rank failed, left, runs another op, or did not take part within the timeout.
    """
    for dtype in dict.fromkeys(one.dtype for one in transfers):
        _transfer(dtype, [one for one in transfers if one.dtype == dtype], ranks, what)


def exchange(
    messages: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], ranks: Ranks, what: str
) -> list[list[Tensor]]:
    """`transfer` of whole tensors, into new ones.

    Args:
        messages: `messages[i][peer]` goes to each rank; those with one i have one type.
        shapes: `shapes[i][peer]` is the shape of the tensor that comes from there.
        what: as in `transfer`.

    Returns:
        The tensors that come, as `shapes` has them.

    Raises:
        RankError: as in `transfer`.
    """
    results = [
        [each[0].new_empty(shape) for shape in found] for each, found in zip(messages, shapes, strict=True)
    ]
    transfer(
        [
            Transfer(each[0].dtype, [[x] for x in each], [[x] for x in found])
            for each, found in zip(messages, results, strict=True)
        ],
        ranks,
        what,
    )
    return results


def _transfer(dtype: torch.dtype, transfers: Sequence[Transfer], ranks: Ranks, what: str) -> None:
    """`transfer`, where all views are sent in one type."""
    peers = range(ranks.size)
    sends = [[view for one in transfers for view in one.sends[peer]] for peer in peers]
    receives = [[view for one in transfers for view in one.receives[peer]] for peer in peers]
    device = next(view.device for views in (*sends, *receives) for view in views)
    own, sends[ranks.rank], receives[ranks.rank] = sends[ranks.rank], [], []
    to_send, to_receive = ([sum(view.numel() for view in to) for to in each] for each in (sends, receives))
    sent, received = (torch.empty(sum(each), dtype=dtype, device=device) for each in (to_send, to_receive))
    for views, part in zip(sends, sent.split(to_send), strict=True):
        for view, place in zip(views, _places(views, part), strict=True):
            place.copy_(view)
    try:
        if device.type == "cpu" or _torch.device_of_group(ranks.group).type == "cpu":
            _check(ranks, what, to_send, to_receive)
        _torch.all_to_all(
            received, sent, to_receive, to_send, ranks.group, ranks.timeout - 2 * _patience(ranks)
        )
    except RuntimeError as error:
        raise RankError(
            f"rank {ranks.rank} could not finish {what}: {_culprit(ranks, what)}. Look for the first error "
            f"among the ranks. The process group says: {' '.join(str(error).split())}"
        ) from error
    came = [_places(views, part) for views, part in zip(receives, received.split(to_receive), strict=True)]
    came[ranks.rank] = iter(own)
    for one in transfers:
        for targets, found in zip(one.receives, came, strict=True):
            for view in targets:
                new = next(found)
                view.add_(new) if one.adds else view.copy_(new)


def _places(views: Sequence[Tensor], message: Tensor) -> Iterator[Tensor]:
    """The place of each view in a message, with the shape of the view."""
    at = 0
    for view in views:
        yield message[at : at + view.numel()].view(view.shape)
        at += view.numel()


def _check(ranks: Ranks, what: str, sends: Sequence[int], receives: Sequence[int]) -> None:
    """Raise RankError if another rank runs another exchange, or has other sizes in mind."""
    found = torch.empty(_HEADER * ranks.size, dtype=torch.uint8)
    each = [_HEADER] * ranks.size
    seconds = ranks.timeout - 2 * _patience(ranks)
    _torch.all_to_all(found, _headers(what, sends, receives), each, each, ranks.group, seconds)
    expected = _headers(what, receives, sends)
    if torch.equal(found, expected):
        return
    for peer, (row, wanted) in enumerate(zip(found.split(_HEADER), expected.split(_HEADER), strict=True)):
        if not torch.equal(row, wanted):
            text = bytes(row.tolist()).decode(errors="replace").strip()
            raise RankError(
                f"all ranks must run the same ops: rank {ranks.rank} sends {sends[peer]} elements and expects "
                f"{receives[peer]} in {what}, and rank {peer} {text}"
            )


def _headers(what: str, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
    """The first message to every rank."""
    texts = (
        f"sends {send} elements and expects {receive} in {what}"
        for send, receive in zip(sends, receives, strict=True)
    )
    message = b"".join(text.encode()[:_HEADER].ljust(_HEADER) for text in texts)
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def _patience(ranks: Ranks) -> float:
    return min(_PATIENCE, ranks.timeout / 5)


def _culprit(ranks: Ranks, what: str) -> str:
    """The ranks that did not fail in an exchange too; they are the cause."""
    try:
        store = _torch.store_of_group(ranks.group)
        key = "sparsify_failed_{}".format
        store.set(key(ranks.rank), what)
        end = time.monotonic() + _patience(ranks)
        while True:
            missing = [rank for rank in range(ranks.size) if not store.check([key(rank)])]
            if not missing or time.monotonic() > end:
                break
            time.sleep(0.05)
    except RuntimeError:  # the store went with the rank that held it
        return (
            "another rank failed or left, and the store of the group with it, which rank 0 or torchrun holds"
        )
    if not missing:
        return "no rank could"
    names = " and ".join(f"rank {rank}" for rank in missing)
    return f"{names} did not take part: it failed, left, hangs or runs something else"
