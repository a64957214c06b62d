"""A backend that keeps what it makes."""

from typing import Any

from torch import fx

from sparsify_compiler.backend import sparsify
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.runtime.program import Program

TILE = {"method": "tile", "reference_frames": 2}


class Recorder:
    """A backend that hands graphs to `sparsify` with these options, by default `TILE`, and keeps the programs."""

    def __init__(self, **options: Any) -> None:
        self.options = {"inner_backend": "eager", **({} if "method" in options else TILE), **options}
        self.programs: list[Program] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any]) -> Program:
        self.programs.append(sparsify(gm, inputs, options=self.options))
        return self.programs[-1]

    @property
    def plans(self) -> list[AttentionPlan]:
        return [plan for program in self.programs for plan in program.plan]

    def layouts(self) -> list[tuple[int, int]]:
        """(tokens before, after the video) of the sparse plans."""
        return [(plan.layout.before, plan.layout.after) for one in self.programs for plan in one.plan.sparse]
