"""The compiled form of one graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsify_compiler.plan import GraphPlan


@dataclass(frozen=True, slots=True)
class Program:
    """What Dynamo calls instead of the model's code: a compiled graph, and the plan it follows."""

    plan: GraphPlan
    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Run the compiled graph on the inputs of Dynamo's graph."""
        return self.run(*args)
