"""The compiled form of a graph whose sizes depend on values of its inputs: a program for each of its sizes."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sparsify_compiler._torch_lock import compile_lock

_PROGRAMS = 32
"""The most programs of a graph. The one that was not used for the longest time is dropped."""


class Sizes(Protocol):
    """The values that decide the sizes of a graph; see `passes/run_time_sizes.py`."""

    def all_inputs(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs of the graph for the inputs of Dynamo's graph, with the values at the end."""

    def key(self, inputs: Sequence[Any]) -> Hashable:
        """Equal for all inputs that one program serves."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class ProgramsByValues:
    """A graph that has a program for each of its sizes. Dynamo calls it instead of the model's code."""

    sizes: Sizes
    compile: Callable[[Sequence[Any]], Callable[..., Any]]
    """Makes the program for inputs of these sizes."""
    _programs: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)
    """The last used at the end."""

    @property
    def program(self) -> Callable[..., Any] | None:
        """The program of the last call; None before the first one."""
        return next(reversed(self._programs.values()), None)

    def __call__(self, *args: Any) -> Any:
        """Run on the inputs of Dynamo's graph."""
        inputs = self.sizes.all_inputs(args)
        key = self.sizes.key(inputs)
        program = self._programs.get(key)
        if program is None:
            with compile_lock():
                program = self._programs.get(key) or self.compile(inputs)
        self._programs.pop(key, None)
        self._programs[key] = program
        for old in list(self._programs)[:-_PROGRAMS]:
            self._programs.pop(old, None)
        return program(*inputs)
