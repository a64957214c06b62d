"""The plans for functions, by the passes alone."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler import SparsifyError, _torch
from sparsify_compiler.backend import configure
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import AttentionPlan


def planned(function: Callable[..., Any], *args: Any, **options: Any) -> list[AttentionPlan]:
    """The plans for a function, which runs eagerly."""
    plans: list[AttentionPlan] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        try:
            plans.extend(graph_plan(pipeline.analyse(gm, configure({"method": "tile", **options}))))
        except SparsifyError as error:
            raise _torch.unwrapped(error) from None
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return plans


def each_planned(functions: Mapping[str, Callable[..., Tensor]], *args: Any) -> dict[str, AttentionPlan]:
    """The plan for each of several functions of one attention, all of them in one graph."""
    plans = planned(lambda *args: [function(*args) for function in functions.values()], *args)
    return dict(zip(functions, plans, strict=True))
