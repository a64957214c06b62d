"""A backend that keeps what it makes."""

from typing import Any

from torch import fx

from sparsify_compiler.backend import sparsify
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.runtime.by_values import ProgramsByValues
from sparsify_compiler.runtime.program import Program

TILE = {"method": "tile", "reference_frames": 2}


class Recorder:
    """A backend that hands graphs to `sparsify` with these options, by default `TILE`, and keeps the programs."""

    def __init__(self, **options: Any) -> None:
        self.options = {"inner_backend": "eager", **({} if "method" in options else TILE), **options}
        self._made: list[Any] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Any:
        self._made.append(sparsify(gm, inputs, options=self.options))
        return self._made[-1]

    @property
    def programs(self) -> list[Program]:
        """Where values choose programs, the last one that ran."""
        made = (one.program if isinstance(one, ProgramsByValues) else one for one in self._made)
        return [one for one in made if one is not None]

    def forget(self) -> None:
        """Keep no program any more."""
        self._made.clear()

    @property
    def plans(self) -> list[AttentionPlan]:
        return [plan for program in self.programs for plan in program.plan]

    def layouts(self) -> list[tuple[int, int]]:
        """(tokens before, after the video) of the sparse plans."""
        return [(plan.layout.before, plan.layout.after) for one in self.programs for plan in one.plan.sparse]
