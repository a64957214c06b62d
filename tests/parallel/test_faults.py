"""A rank that fails: the others end within the timeout, with the rank, the op and the attention named."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from sparsify_compiler import _torch
from sparsify_compiler.errors import RankError
from sparsify_compiler.parallel import ops  # noqa: F401
from sparsify_compiler.parallel.shares import local_length, parts_of
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.dits import Attend
from sparsify_compiler.testing.ranks import Pool, RankFailedError

TIMEOUT = 2.0
VIDEO = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
FAULTS = ("kill", "raise", "hang", "skip", "other")
EXCHANGES = ("to_heads of attention 'attention'", "to_tokens of attention 'attention'", "gather_tokens for ")
"""Of one call, in order."""


def compiled(ranks: Ranks) -> Callable[[], Any]:
    """A model compiled for these ranks, after its first call."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    mesh = DeviceMesh.from_group(_torch.process_group(ranks.group), "cpu")
    options: Any = {
        "method": "tile",
        "inner_backend": "eager",
        "parallel": {"form": "hcp", "mesh": mesh, "timeout": TIMEOUT},
    }
    model = torch.compile(Attend(), backend="sparsify", options=options, dynamic=False)
    model(VIDEO)
    return partial(model, VIDEO)


def by_ops(ranks: Ranks) -> Callable[[], Any]:
    """The ops of such a call."""
    place, parts = (ranks.rank, ranks.size, ranks.group, TIMEOUT), [9, 1]
    owners, order = torch.arange(3) % ranks.size, torch.zeros(())
    length = local_length(parts_of(parts), ranks.rank, ranks.size)

    def run() -> None:
        to_heads, to_tokens, gather = (
            getattr(torch.ops.sparsify, name) for name in ("to_heads", "to_tokens", "gather_tokens")
        )
        x = torch.zeros(1, 3, length, 4)
        x, after = to_heads([x, order], owners, parts, 2, False, *place, "attention")
        x, after = to_tokens([x, after], owners, parts, [3], True, *place, "attention")
        gather([x, after], 2, parts, *place, "output")

    return run


def fail(
    ranks: Ranks, make: Callable[[Ranks], Callable[[], Any]], fault: str, culprit: int, place: int
) -> tuple[float, str]:
    """(seconds, error) of a rank where `culprit` fails in exchange number `place` of what `make` returns."""
    with torch.no_grad():
        run = make(ranks)
    exchange, done = _torch.all_to_all, 0

    def faulty(*args: Any) -> None:
        nonlocal done
        done += 1
        if ranks.rank == culprit and done == 2 * place + 1:  # an exchange is a header and a message
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "raise":
                raise ZeroDivisionError("a kernel failed")
            if fault == "hang":
                time.sleep(TIMEOUT + 5)  # longer than the others wait for its failure
            if fault == "other":
                try:
                    torch.distributed.all_reduce(torch.ones(5), group=_torch.process_group(ranks.group))
                except RuntimeError as error:
                    raise ZeroDivisionError("another collective failed") from error
        if ranks.rank == culprit and fault == "skip" and done in (2 * place + 1, 2 * place + 2):
            args[0].copy_(args[1]) if done == 2 * place + 1 else args[0].zero_()
            return
        exchange(*args)

    start = time.monotonic()
    try:
        with patch.object(_torch, "all_to_all", faulty), torch.no_grad():
            run()
    except RankError as error:
        return time.monotonic() - start, str(error)
    return time.monotonic() - start, "no error"


def case(make: Callable[[Ranks], Callable[[], Any]], fault: str, culprit: int, place: int) -> None:
    with Pool(3, timeout=4) as pool:
        try:
            results = [(True, one) for one in pool.run(3, fail, make, fault, culprit, place)]
        except RankFailedError as error:
            results = error.results
    if fault in ("kill", "raise", "other"):
        good, text = results[culprit]
        assert not good
        assert ("the process ended" if fault == "kill" else "ZeroDivisionError") in text
    for rank, (good, result) in enumerate(results):
        if rank == culprit:
            continue
        assert good, result
        seconds, message = result
        assert seconds < 2 * TIMEOUT + 4
        assert EXCHANGES[place] in message
        assert f"rank {culprit}" in message
        assert "\n" not in message


@pytest.mark.parametrize(("fault", "culprit", "place"), [(one, i % 3, i % 3) for i, one in enumerate(FAULTS)])
def test_the_others_end_and_name_the_rank(fault: str, culprit: int, place: int) -> None:
    case(by_ops, fault, culprit, place)


@pytest.mark.nightly
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_rank_at_every_exchange(fault: str, culprit: int, place: int) -> None:
    case(compiled, fault, culprit, place)
