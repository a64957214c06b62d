"""The one place where ranks send tensors to each other, and notice that one of them does not take part.

On a CPU every exchange begins with a short message, the name and the size of the exchange. So ranks that run
different ops raise an error before they send anything else; otherwise gloo would end the process of a rank that
receives more than it expects. On a GPU a rank would have to wait for the device to read such a message: there the
timeout of the process group ends a wait.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_compiler import _torch
from sparsify_compiler.errors import RankError
from sparsify_compiler.plan import Ranks

_HEADER = 240
"""Bytes of the first message."""
_PATIENCE = 2.0
"""Seconds that a rank which failed waits for the others to say that they failed too."""


def exchange(
    messages: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]], ranks: Ranks, what: str
) -> list[list[Tensor]]:
    """Send tensors to every rank, in one message for all tensors of a type.

    Args:
        messages: `messages[i][peer]` goes to each rank; those with one i have one type.
        shapes: `shapes[i][peer]` is the shape of the tensor that comes from there.
        what: name of the exchange, the same on all ranks.

    Returns:
        The tensors that come, as `shapes` has them.

    Raises:
        RankError: another rank failed, left, runs another op, or did not take part within the timeout.
    """
    peers = range(ranks.size)
    results: list[list[Tensor]] = [[] for _ in messages]
    for dtype in dict.fromkeys(each[0].dtype for each in messages):
        places = [i for i, each in enumerate(messages) if each[0].dtype == dtype]
        sends = [sum(messages[i][peer].numel() for i in places) for peer in peers]
        counts = [[torch.Size(shapes[i][peer]).numel() for i in places] for peer in peers]
        receives = [sum(each) for each in counts]
        sent = torch.cat([messages[i][peer].reshape(-1) for peer in peers for i in places])
        received = sent.new_empty(sum(receives))
        try:
            if sent.device.type == "cpu":
                _check(ranks, what, sends, receives)
            _torch.all_to_all(received, sent, receives, sends, ranks.group, ranks.timeout)
        except RuntimeError as error:
            raise RankError(
                f"rank {ranks.rank} could not finish {what}: {_culprit(ranks, what)}. Look for the first error "
                f"among the ranks. The process group says: {' '.join(str(error).split())}"
            ) from error
        blocks = iter(received.split([count for each in counts for count in each]))
        for peer in peers:
            for i in places:
                results[i].append(next(blocks).view(shapes[i][peer]))
    return results


def _check(ranks: Ranks, what: str, sends: Sequence[int], receives: Sequence[int]) -> None:
    """Raise RankError if another rank runs another exchange, or has other sizes in mind."""
    texts = [f"{count} {what}".encode()[:_HEADER].ljust(_HEADER) for count in sends]
    own = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    found = torch.empty_like(own)
    each = [_HEADER] * ranks.size
    _torch.all_to_all(found, own, each, each, ranks.group, ranks.timeout)
    for peer, (row, expected) in enumerate(zip(found.view(-1, _HEADER), receives, strict=True)):
        text = bytes(row.tolist())
        if text != f"{expected} {what}".encode()[:_HEADER].ljust(_HEADER):
            count, _, other = text.decode(errors="replace").strip().partition(" ")
            raise RankError(
                f"all ranks must run the same ops: rank {ranks.rank} runs {what} and expects {expected} "
                f"elements, and rank {peer} runs {other} and sends {count}"
            )


def _culprit(ranks: Ranks, what: str) -> str:
    """The ranks that did not fail in an exchange too; they are the cause."""
    try:
        store = _torch.store_of_group(ranks.group)
        key = "sparsify_failed_{}".format
        store.set(key(ranks.rank), what)
        end = time.monotonic() + _PATIENCE
        while True:
            missing = [rank for rank in range(ranks.size) if not store.check([key(rank)])]
            if not missing or time.monotonic() > end:
                break
            time.sleep(0.05)
    except RuntimeError:  # the store went with the rank that held it
        return "another rank failed or left"
    if not missing:
        return "no rank could"
    names = " and ".join(f"rank {rank}" for rank in missing)
    return f"{names} did not take part: it failed, left, hangs or runs something else"
