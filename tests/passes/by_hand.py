"""Attention by hand in many spellings, compiled and compared with eager."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.backend import configure
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import AttentionPlan

B, H, D = 2, 2, 8
GRID = (3, 1, 5)
S = math.prod(GRID)
OPTIONS = {"method": "tile", "reference_frames": GRID[0], "grid": GRID, "inner_backend": "eager"}
"""Every frame sees every other: a table whose output is that of full attention."""
X = torch.randn(B, S, H * D, generator=torch.Generator().manual_seed(0))
SEEN = torch.rand(B, 1, 1, S, generator=torch.Generator().manual_seed(1)) > 0.3
SEEN[..., 0] = True
BIAS = 3 * torch.randn(B, 1, 1, S, generator=torch.Generator().manual_seed(2))
Function = Callable[[Tensor], Tensor]
Outcome = tuple[Tensor, Tensor, AttentionPlan]
"""Output compiled and by eager, and the plan of its one attention."""


def outcomes(functions: dict[str, Function], x: Tensor = X, **options: Any) -> dict[str, Outcome]:
    """The outcomes of functions of tokens [B, S, H D], as one graph: most of the time goes into tracing."""
    plans: list[AttentionPlan] = []

    def together(x: Tensor) -> list[Tensor]:
        return [function(x.clone()) for function in functions.values()]

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        config = configure(OPTIONS)
        analysed = pipeline.analyse(gm, config)
        plans.extend(graph_plan(analysed))
        return pipeline.rewrite(analysed, config).forward

    torch._dynamo.reset()
    exact = together(x)
    got = torch.compile(together, backend=backend, fullgraph=True, **options)(x)
    return {name: found for name, *found in zip(functions, got, exact, plans, strict=True)}


def is_rewritten(outcome: Outcome) -> None:
    """It is sparse, and its numbers are eager's."""
    got, exact, plan = outcome
    assert plan.method == "tile", plan.reason
    assert plan.site.spelling == "unfused"
    error = 1e-5 if exact.dtype in (torch.float32, torch.float64) else 4 * torch.finfo(exact.dtype).eps
    torch.testing.assert_close(got, exact, rtol=error, atol=error * float(exact.detach().abs().max()))


def stays(outcome: Outcome, reason: str) -> None:
    """It is dense with that reason, and its bits are eager's."""
    got, exact, plan = outcome
    assert plan.method == "dense"
    assert reason in plan.reason
    assert torch.equal(got, exact)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(2 * x), heads(2 * x.sin()), heads(x.cos().cumsum(-1))


NO = -math.inf


def flat(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = project(x)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)


def rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, D]"""
    q, k, v = project(x)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def spelled(
    scores: Function = lambda s: s, weights: Function = lambda w: w, dtype: torch.dtype = torch.float32
) -> Function:
    """softmax(scores(q kᵀ)), changed by `weights`, times v."""

    def function(x: Tensor) -> Tensor:
        q, k, v = project(x.to(dtype))
        return weights(scores(q @ k.mT).softmax(-1)) @ v

    return function


def multiplied(
    product: Callable[[Tensor, Tensor, Tensor], Tensor], of: Callable[[Tensor], Any] = project
) -> Function:
    """A function of q, k and v."""
    return lambda x: product(*of(x))
