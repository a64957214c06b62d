"""The graphs that ran in training, so that a graph that runs again in backward runs as in forward.

Activation checkpointing runs parts of a model again in backward. Then no call of the model is open. The memory of
the activations that a graph gets shows which call it was part of: checkpointing keeps these tensors. After a graph
break, a graph gets recomputed tensors; it is then the one that followed in the call.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from sparsify_compiler import _torch
from sparsify_compiler.plan import Parts
from sparsify_compiler.runtime.state import ModelState

REMEMBERED = 64
"""The number of calls that may wait for their backward pass."""


class Mark(NamedTuple):
    """The signs by which a graph is known again."""

    memory: frozenset[int]
    """The storages of its activations."""
    parameters: tuple[int | None, ...]
    """The ids of its owner and of the Parameters near its attentions."""
    likes: tuple[Any, ...]
    """The sizes of its attentions."""

    def same_place(self, other: "Mark") -> bool:
        """Whether both may be the same part of a model."""
        return self[1:] == other[1:]


@dataclass(frozen=True, slots=True)
class Ran:
    """A graph that ran in a call in training."""

    mark: Mark
    state: ModelState
    names: tuple[str, ...]
    parts: Parts | None
    """The parts of the model that it was; None for its own plan."""


@dataclass(slots=True, eq=False)
class Log:
    """The graphs that ran in one call, in order."""

    call: "weakref.ref[object]"
    graphs: list[Ran] = field(default_factory=list)
    _memory: list[Any] = field(default_factory=list)
    """References to the storages of activations, which do not keep them."""

    @property
    def needed(self) -> bool:
        """Whether the call is not over, or a tensor of it still lives, so that backward may run."""
        return self.call() is not None or not all(one.expired() for one in self._memory)

    def add(self, ran: Ran, activations: Iterable[Tensor]) -> None:
        """Append a graph.

        Args:
            activations: the tensors that it got and that were made in the call.
        """
        self.graphs.append(ran)
        self._memory += filter(None, map(_torch.weak_storage, activations))


_logs: deque[Log] = deque(maxlen=REMEMBERED)
_last = threading.local()
"""`place`: (log, number) of the graph that this thread recomputed last."""


def new_log(call: object) -> Log:
    """The log of a call that begins, in training."""
    for log in list(_logs):
        if not log.needed:
            _logs.remove(log)
    log = Log(weakref.ref(call))
    _logs.append(log)
    return log


def find(mark: Mark) -> Ran | None:
    """The run of a graph in forward that runs again in backward now; None if it does not."""
    if not _torch.in_backward():
        return None
    places = [(log, number) for log in reversed(_logs) for number in range(len(log.graphs))]
    alike = [(log, number) for log, number in places if log.graphs[number].mark.same_place(mark)]
    before = getattr(_last, "place", None)
    following = [place for place in alike if before and place == (before[0], before[1] + 1)]
    exact = [(log, number) for log, number in alike if log.graphs[number].mark.memory == mark.memory]
    found = next(iter([*exact, *following, *alike]), None)
    if found is None:
        return None
    _last.place = found
    log, number = found
    return log.graphs[number]
