"""The passes, in order, and the runner, which lints, checks, times, reports and dumps for all of them."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import OptionError
from sparsify_compiler.passes import spec
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.capture import capture
from sparsify_compiler.passes.fx import copy_graph, modules
from sparsify_compiler.passes.layout import infer_layouts
from sparsify_compiler.passes.lowering import lower
from sparsify_compiler.passes.planning import as_parts, graph_plan, plan_sites, plans_within
from sparsify_compiler.passes.reports import PassReport, operators, report
from sparsify_compiler.passes.run_time_sizes import (
    RunTimeSizes,
    depends_on_values,
    may_have_positions,
    run_time_sizes,
)
from sparsify_compiler.passes.sharding import shard
from sparsify_compiler.passes.sizes import fix_sizes
from sparsify_compiler.plan import Parts, Ranks
from sparsify_compiler.runtime.program import Variant

log = logging.getLogger(__name__)
Pass = Callable[[fx.GraphModule], fx.GraphModule]


def analysis(
    config: SparsifyConfig, device: str | None = None, *, part: bool = False, ends: bool = False
) -> list[Pass]:
    """The passes that analyse and plan, which `explain` runs; see `analyse`."""
    infer = partial(infer_layouts, grid=config.grid, text=config.text, part=part, ends=ends)
    return [
        capture,
        infer,
        partial(plan_sites, config=config, device=device),
        partial(fix_sizes, infer=infer),
    ]


def rewriting(config: SparsifyConfig, variant: Variant) -> list[Pass]:
    """The passes that carry out the plan, for one variant."""
    return [partial(lower, variant=variant, measure_recall=config.measure_recall)]


def analyse(
    gm: fx.GraphModule,
    config: SparsifyConfig,
    *,
    device: str | None = None,
    part: bool = False,
    ends: bool = False,
) -> fx.GraphModule:
    """A copy of a Dynamo graph that carries its plan: `graph_plan` reads it. `gm` itself does not change.

    Args:
        device: device type to plan for, instead of the graph's own.
        part: whether the graph may be a part of a model, which need not have the given grid.
        ends: whether `meta["ends"]` is needed.
    """
    return run(copy_graph(gm), analysis(config, device, part=part, ends=ends), config)


def sizes_by_values(
    gm: fx.GraphModule, config: SparsifyConfig, *, part: bool = False, positions: bool = True
) -> RunTimeSizes | None:
    """The values on which attention in a Dynamo graph depends: sizes, and positions of tokens; None without any.

    Args:
        part: whether the graph may be a part of a model.
        positions: whether its inputs may hold the positions of all tokens.

    Raises:
        NotKnownBefore: an attention depends on values that cannot be computed before the graph runs.
    """
    by_sizes = depends_on_values(gm)
    if not by_sizes and not (positions and may_have_positions(gm)):
        return None
    analysed = analyse(gm, replace(config, dump=None), part=part)
    plans, found = graph_plan(analysed), analysed.meta.get("positions", ()) if positions else ()
    needed = any(one.site.refusal or (one.layout.grid is None and one.site.kind != "cross") for one in plans)
    return run_time_sizes(gm, found) if found or (by_sizes and needed) else None


def captured(gm: fx.GraphModule, config: SparsifyConfig) -> fx.GraphModule:
    """A copy of a Dynamo graph with its sites, for `follow`."""
    return run(copy_graph(gm), [capture], config)


def follow(
    captured: fx.GraphModule, config: SparsifyConfig, tracker: AxisTracker, inputs: Sequence[Any]
) -> fx.GraphModule:
    """A copy of what `captured` returned, with layouts. It runs on `inputs` in a call that `tracker` follows."""
    infer = partial(infer_layouts, grid=config.grid, text=config.text, part=True, within=(tracker, inputs))
    return run(copy_graph(captured), [infer], config)


def plan_as(analysed: fx.GraphModule, config: SparsifyConfig, parts: Parts) -> fx.GraphModule:
    """A copy of what `analyse` returned, planned as parts of a model."""
    config = replace(config, dense_steps=parts.dense_steps)
    passes = [partial(as_parts, parts=parts.sites), partial(plan_sites, config=config)]
    return run(copy_graph(analysed), passes, config)


def plan_within(
    analysed: fx.GraphModule,
    config: SparsifyConfig,
    tracker: AxisTracker,
    inputs: Sequence[Any],
    *,
    device: str | None = None,
) -> fx.GraphModule:
    """A copy of what `analyse` returned, planned anew with what `tracker` knows about the graph's inputs."""
    infer = partial(infer_layouts, grid=config.grid, text=config.text, part=True, within=(tracker, inputs))
    return run(copy_graph(analysed), [infer, partial(plan_sites, config=config, device=device)], config)


def share(
    analysed: fx.GraphModule, config: SparsifyConfig, ranks: Ranks, *, trains: bool = False
) -> fx.GraphModule:
    """A copy of the result of `analyse` whose tokens these ranks share, as `shard` describes.

    Args:
        trains: whether it is for training, where heads stay on their ranks.
    """
    balance = "off" if trains or config.parallel is None else config.parallel.balance
    passes = [
        partial(shard, ranks=ranks, balance=balance, measure_recall=config.measure_recall, trains=trains)
    ]
    return run(copy_graph(analysed), passes, config)


def rewrite(
    analysed: fx.GraphModule,
    config: SparsifyConfig,
    variant: Variant | None = None,
) -> fx.GraphModule:
    """A copy of the result of `analyse`, or of `share`, that follows the plan, as `lower` describes."""
    passes = rewriting(config, variant or Variant())
    return run(copy_graph(analysed, alike=plans_within), passes, config)


def run(gm: fx.GraphModule, passes: Sequence[Pass], config: SparsifyConfig) -> fx.GraphModule:
    """Run passes one after the other; after each, lint, check against the spec, and add to `meta["reports"]`."""
    before = operators(gm)
    for one in passes:
        name = one.func.__name__ if isinstance(one, partial) else one.__name__
        start = time.perf_counter()
        gm = one(gm)
        seconds = time.perf_counter() - start
        for module in modules(gm):
            module.graph.lint()
        spec.check(gm, after=name)
        after = operators(gm)
        found = report(gm, name, seconds, before, after)
        before = after
        gm.meta["reports"] = (*gm.meta.get("reports", ()), found)
        log.debug("pass %s", found)
        if config.dump is not None:
            _dump(gm, found, config)
    for module in modules(gm):
        module.recompile()
    return gm


def _dump(gm: fx.GraphModule, found: PassReport, config: SparsifyConfig) -> None:
    """Write the graph after a pass to a new numbered file in `config.dump`."""
    assert config.dump is not None
    try:
        config.dump.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"dump must be a folder that can be written to, got {str(config.dump)!r}: {error}"
        ) from None
    number = len(list(config.dump.glob("*.py")))
    text = f"# after {found}\n" + "\n".join(
        module.print_readable(print_output=False) for module in modules(gm)
    )
    (config.dump / f"{number:03d}_{found.name}.py").write_text(text)
