"""The verdict on programs of tokens.

The grid that the compiler claims is compared with the real places of the tokens, and the output with dense
attention under the mask that follows from these places.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from sparsify_compiler.backend import configure, sparsify
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.by_values import ProgramsByValues
from sparsify_compiler.testing.fuzzing.cases import Case, Level, Verdict
from sparsify_compiler.testing.fuzzing.machines import Call, Masked, Numbers, Places, Program, scale_of
from sparsify_compiler.testing.fuzzing.tracing import record

OPTIONS = {"method": "tile", "reference_frames": 1, "inner_backend": "eager"}
"""With three or more frames, a frame attends to itself and the first frame: a wrong grid gives a wrong output."""


@torch.no_grad()
def judge_tokens(case: Case, level: Level, program: Program) -> Verdict:
    """Run a program that moves tokens, and check the compiler's claims about them."""
    options = OPTIONS | case.options
    places, numbers = Places(case.scene), Numbers(case.scene)
    try:
        places_out = program(places, *places.inputs())
        dense = program(numbers, *numbers.inputs())
    except Exception as error:
        return Verdict("invalid", described(error))
    assert places_out.stride() == dense.stride(), "memory must be laid out the same on places and on numbers"
    try:
        run = recorded if level == "analysis" else partial(compiled, fullgraph=True)
        plans, out = run(program, options, numbers, *numbers.inputs())
    except torch._dynamo.exc.Unsupported as error:  # tokens that moved in one graph are unknown in the next
        return Verdict("invalid", described(error))
    except SparsifyError as error:
        return Verdict("refused", described(error))
    except Exception as error:
        return Verdict("CRASH", described(error))
    claims = list(zip(places.calls, claims_of(plans, places.calls), strict=True))
    for call, plan in claims:
        if plan is not None and (fault := fault_of(plan.layout, call, places)):
            return Verdict("WRONG", f"attention {call.tag} is planned on {claimed(plan.layout)}, but {fault}")
    masks = [
        _mask(plan.layout, call, places) if plan is not None and plan.method != "dense" else None
        for call, plan in claims
    ]
    sparse = any(mask is not None for mask in masks)
    masked = Masked(case.scene, masks)
    expected = program(masked, *masked.inputs()) if sparse else dense
    if out is not None and (difference := differs(out, expected, case.tolerance)):
        return Verdict("WRONG", f"differs from dense attention under the true mask by {difference}")
    return Verdict("sparse" if sparse else "dense")


def recorded(
    program: Program, options: dict[str, Any], machine: Numbers, *inputs: Tensor
) -> tuple[list[AttentionPlan], Any]:
    """The same as `compiled`, from a graph recorded without Dynamo; no output if nothing is sparse."""
    gm, weights = record(lambda *args: program(machine, *args), *inputs)
    config = configure(options)
    for one in pipeline.analysis(config):
        gm = one(gm)
    plan = graph_plan(gm)
    (out,) = pipeline.rewrite(gm, config)(*machine.inputs(), *weights) if plan.sparse else (None,)
    return list(plan), out


def compiled(
    program: Program, options: dict[str, Any], *args: Any, fullgraph: bool = False
) -> tuple[list[AttentionPlan], Any]:
    """(plans, output) of `program(*args)`, compiled.

    The program must be new to Dynamo. A program that is made for each case needs no reset between cases.
    """
    plans: list[AttentionPlan] = []
    sparse = torch.compile(program, backend=backend(options, plans), dynamic=False, fullgraph=fullgraph)
    return plans, sparse(*args)


def backend(options: dict[str, Any], plans: list[AttentionPlan]) -> Callable[..., Callable[..., Any]]:
    """The backend `sparsify` with these options. It appends its plans to `plans`."""

    def planned(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        made = sparsify(gm, inputs, options=options)
        if not isinstance(made, ProgramsByValues):
            plans.extend(made.plan)
            return made

        def run(*args: Any) -> Any:
            """Run the program of the values, which shows its plan only then."""
            result = made(*args)
            plans.extend(getattr(made.program, "plan", ()))
            return result

        return run

    return planned


def claims_of(plans: Sequence[AttentionPlan], calls: Sequence[Call]) -> list[AttentionPlan | None]:
    """The plan of each call, which has the call's scale; None where the plan has no grid."""
    found: list[AttentionPlan | None] = []
    for at, call in enumerate(calls):
        same = [plan for plan in plans if abs(plan.site.scale - scale_of(call.tag)) < 1e-6]
        before = sum(one.tag == call.tag for one in calls[:at])
        count = sum(one.tag == call.tag for one in calls)
        assert len(same) in (0, 1, count), "there must be a plan for each call with a tag, or one for all"
        plan = same[before if len(same) == count else 0] if same else None
        found.append(plan if plan is not None and plan.layout.grid is not None else None)
    return found


def claimed(layout: TokenLayout) -> str:
    """A layout as text, `5 + (3, 2, 3) + 0`: the tokens before, the grid, the tokens after."""
    return f"{layout.before} + {layout.grid} + {layout.after}"


def fault_of(layout: TokenLayout, call: Call, places: Places) -> str:
    """The fault of a layout in words, or "".

    In every row of the batch and every head, token (t, y, x) of the grid must be at frame f(t), row r(y) and column
    c(x) of one video, where f, r and c rise; and keys must have the same places as queries.
    """
    assert layout.grid is not None
    video = slice(layout.before, layout.tokens - layout.after)
    found = []
    for name, codes in (("query", call.query), ("key", call.key)):
        if codes.shape[-2] != layout.tokens:
            return f"there are {codes.shape[-2]} tokens of the {name}"
        rows = codes[..., video, :].flatten(0, -3)
        rows = rows[(rows != 0).flatten(1).any(1)]  # only the filled rows of a partly filled buffer
        at = places.places(rows)  # [rows, tokens, D, 4]
        if (at < 0).any():
            token = int((at < 0).flatten(2).any(-1).nonzero()[0][1])
            return f"token {token} of the {name} is not a token of the video"
        if (at != at[:, :, :1]).any():
            return f"a token of the {name} is several tokens of the video"
        found.append(at[:, :, 0])
    at = found[0]
    if (at != at[:, :1])[..., 0].any():
        return "its tokens are from several videos"
    grid = at[..., 1:].unflatten(1, layout.grid)  # [rows, F, H, W, 3]
    for axis, name in enumerate(("frame", "row", "column")):
        there = grid[..., axis].movedim(axis + 1, 1).flatten(2)  # [rows, n, others]
        if (there != there[..., :1]).any() or (there[:, 1:, 0] <= there[:, :-1, 0]).any():
            shown = at[0, :, axis + 1].tolist()
            return f"its tokens are from {name} {shown}"
    if found[1].shape != at.shape or (found[1] != at).any():
        return "keys have other places than queries"
    return ""


def _mask(layout: TokenLayout, call: Call, places: Places) -> Tensor:
    """[S, S] mask of a call, from the real frames of its tokens."""
    frame = torch.full((layout.tokens,), -1)
    video = slice(layout.before, layout.tokens - layout.after)
    rows = call.query.flatten(0, -3)[:, video, 0]
    row = int((rows != 0).any(1).nonzero()[0])  # the first with tokens
    frame[video] = places.places(rows[row])[:, 1]
    return seen(frame)


def seen(frame: Tensor) -> Tensor:
    """[S, S] bool, the mask of tile attention with one reference frame: a frame attends to itself and the first
    frame; other tokens attend to everything.

    Args:
        frame: [S], the frame of every token; -1 for other tokens than the video's.
    """
    sees_all = (frame == frame[frame >= 0].min()) | (frame < 0)
    return (frame[:, None] == frame) | sees_all[:, None] | sees_all


def differs(got: Any, expected: Any, tolerance: float) -> str:
    """The difference of two outputs as text, or "" within `tolerance`, which is relative to the largest number."""
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if not isinstance(b, Tensor):
            if a != b:
                return f"{a} instead of {b}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{tuple(a.shape)} {a.dtype} instead of {tuple(b.shape)} {b.dtype}"
        x, y = a.detach().double(), b.detach().double()
        if not torch.equal(x.isnan(), y.isnan()):
            return f"{int(x.isnan().sum())} NaN instead of {int(y.isnan().sum())}"
        error = float(torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(0.0).max()) if x.numel() else 0.0
        size = float(y[y.isfinite()].abs().max()) if y.isfinite().any() else 0.0
        if not error <= tolerance * max(size, 1e-3):
            return f"{error:.1e} of {size:.1e}"
    return ""


def described(error: BaseException) -> str:
    """An error as text: `RuntimeError: first line of its message`."""
    cause = getattr(error, "inner_exception", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0][:200]}"
