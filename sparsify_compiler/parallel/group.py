"""The ranks that run a model together, and the comparison of their programs before the first call of each."""

import atexit
import functools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import _torch
from sparsify_compiler.config import Parallel
from sparsify_compiler.errors import OptionError, RankError
from sparsify_compiler.parallel.exchange import exchange
from sparsify_compiler.plan import Ranks

log = logging.getLogger(__name__)


def start_rank() -> None:
    """Give a process that torchrun started its GPU, as the one that `"cuda"` means, and the seed of all ranks."""
    import torch.distributed as dist

    if not _is_rank():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, _, _ = next(dist.rendezvous("env://"))
    torch.manual_seed(int(store.compare_set("sparsify_seed", "", str(torch.seed()))))


def join_ranks() -> None:
    """Join the process group of torchrun, until the process ends: gloo for tensors on CPUs, NCCL for those on GPUs.

    Does nothing in a process that torchrun did not start, or where there is a group already.
    """
    import torch.distributed as dist

    if _is_rank() and not dist.is_initialized():
        dist.init_process_group()
        atexit.register(_leave_ranks)


def _is_rank() -> bool:
    """Whether torchrun started this process itself; processes that a rank starts have the same environment."""
    import torch.distributed as dist

    of_torchrun = dist.is_available() and dist.is_torchelastic_launched()
    return of_torchrun and multiprocessing.parent_process() is None


def _leave_ranks() -> None:
    import torch.distributed as dist

    if dist.is_initialized():  # the script may have left them
        dist.destroy_process_group()


def ranks_of(asked: Parallel | None) -> Ranks | None:
    """The ranks that the option requests; None where one process runs the model.

    Raises:
        OptionError: a form was requested by name, and there is no process group.
    """
    import torch.distributed as dist

    if asked is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        if asked.form != "auto":
            raise OptionError(
                f"parallel's form {asked.form!r} needs a process group: call torch.distributed.init_process_group "
                "in a script that torchrun starts, or use parallel='auto'"
            )
        log.warning("parallel='auto' does nothing: there is no process group, so one process runs the model")
        return None
    mesh = asked.mesh

    def among(group: Any) -> Ranks:
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group.group_name, float(asked.timeout))

    if mesh is None or mesh.ndim == 1:
        ranks = among(dist.group.WORLD if mesh is None else mesh.get_group())
        return replace(ranks, sequence=ranks) if asked.form == "scp" else ranks
    members = mesh.mesh.flatten().tolist()
    if members != sorted(members):
        raise OptionError(
            f"parallel's mesh must have its ranks in rising order, got {mesh!r}: they are in the order of "
            "their tokens"
        )
    every = dist.group.WORLD if len(members) == dist.get_world_size() else _group_of(*members)
    return replace(among(every), sequence=among(mesh.get_group(0)), heads=among(mesh.get_group(1)))


@functools.cache
def _group_of(*members: int) -> Any:
    """The process group of these ranks, which alone call this."""
    import torch.distributed as dist

    return dist.new_group(members, use_local_synchronization=True)


BETWEEN_COMPARISONS = 8
"""The calls from one comparison of inputs to the next on a GPU, where each waits for the device."""


def compared(
    run: Callable[..., Any],
    ranks: Ranks,
    facts: Mapping[str, object],
    names: Sequence[str],
    changing: Sequence[str] = (),
) -> Callable[..., Any]:
    """`run`, which compares itself and all its inputs with the other ranks in its first call, and the inputs that
    change in later ones: in every call on a CPU, in every eighth on a GPU.

    Args:
        facts: what must be the same on all ranks: name -> anything with a text.
        names: names of the inputs; their sizes, types and elements must be the same too.
        changing: names of the inputs that are not the model's own.

    Raises:
        RankError: ranks differ.
    """
    every = 1 if _torch.device_of_group(ranks.group).type == "cpu" else BETWEEN_COMPARISONS
    texts = {name: str(fact) for name, fact in facts.items()}
    later = [place for place, name in enumerate(names) if name in changing]
    calls = 0

    @functools.wraps(run)
    def checked(*inputs: Any) -> Any:
        nonlocal calls
        first, places = calls == 0, later if calls else range(len(names))
        if first or (later and calls % every == 0):
            with torch.no_grad():
                found = _inputs((names[place], inputs[place]) for place in places)
                agree(ranks, {**found, **texts} if first else found)
        calls += 1
        return run(*inputs)

    return checked


def agree(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Compare facts with those of the other ranks, each by its text.

    Raises:
        RankError: ranks differ; or another rank failed, left, or has not come here within the timeout.
    """
    found = facts_of_all(ranks, facts, "the comparison of programs")
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each.get(name, "nothing") for each in found]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise RankError(
                f"ranks must have the same {name}, got {_short(values[0])} on rank 0 and {_short(values[other])} "
                f"on rank {other}: all ranks call one model with the same options, weights and inputs, and draw "
                "noise with the same seed"
            )


def facts_of_all(ranks: Ranks, facts: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """The facts of every rank.

    Args:
        facts: name -> anything that JSON holds.
        what: name of the exchange, the same on all ranks.

    Raises:
        RankError: another rank failed, left, or has not come here within the timeout.
    """
    device = _torch.device_of_group(ranks.group)
    text = torch.frombuffer(bytearray(json.dumps(dict(facts)).encode()), dtype=torch.uint8).to(device)
    length = torch.tensor([len(text)], device=device)
    (lengths,) = exchange([[length] * ranks.size], [[(1,)] * ranks.size], ranks, what)
    shapes = [[(int(one),) for one in lengths]]
    (texts,) = exchange([[text] * ranks.size], shapes, ranks, what)
    return [json.loads(bytes(one.tolist())) for one in texts]


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _inputs(given: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Name -> sizes, type and sums of an input, or a number."""
    facts: dict[str, str] = {}
    for name, value in given:
        if not isinstance(value, Tensor):
            facts[f"input {name}"] = str(value)
            continue
        text = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if value.numel() and not value.is_complex():
            flat = value.detach().flatten().double()
            # Twice, so that the same elements in another order differ.
            total, weighed = (
                flat.sum(),
                (flat * torch.linspace(1, 2, len(flat), device=flat.device).double()).sum(),
            )
            text += f" with sums {total.item():.17g} and {weighed.item():.17g}"
        facts[f"input {name}"] = text
    return facts
