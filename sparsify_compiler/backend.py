"""The entry: `torch.compile(model, backend="sparsify", options={...})`."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler import _torch
from sparsify_compiler.config import CUDA_GRAPHS, SparsifyConfig
from sparsify_compiler.errors import OptionError, SparsifyError, warn_once
from sparsify_compiler.methods.base import max_error_of
from sparsify_compiler.options import configure
from sparsify_compiler.parallel.group import compared, ranks_of
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.capture import all_sites
from sparsify_compiler.passes.fx import input_path, value_of
from sparsify_compiler.passes.handover import Handover, fix_videos, may_leave, may_receive
from sparsify_compiler.passes.inputs import find_inputs
from sparsify_compiler.passes.offload import long_lists
from sparsify_compiler.passes.places import find_places, fix_tokens
from sparsify_compiler.passes.planning import graph_plan, learns
from sparsify_compiler.passes.run_time_sizes import NotKnownBefore, RunTimeSizes
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.by_values import ProgramsByValues
from sparsify_compiler.runtime.call import open_call
from sparsify_compiler.runtime.guard import Guard
from sparsify_compiler.runtime.program import Inputs, PlannedGraph, Program, Sizes, Variant
from sparsify_compiler.runtime.rates import in_best_form
from sparsify_compiler.runtime.site import functions_of

log = logging.getLogger(__name__)
FOLLOWS = "sparsify_compiler.apply(model) follows the tokens through all graphs of a model"


def sparsify(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Program | ProgramsByValues:
    """Backend for torch.compile: makes attention block-sparse, and gives the rest unchanged to the inner backend.

    Args:
        gm: Dynamo's graph; not modified.
        example_inputs: its inputs.
        options: see `configure`.
        mode: the mode of torch.compile, for Inductor.

    Raises:
        SparsifyError: options are wrong or do not fit the model. Dynamo does not wrap this error.
    """
    given = dict(options or {})
    try:
        config = configure(options)
        sizes = _sizes_by_values(gm, config)
        program = (
            _program(gm, example_inputs, given, config, mode)
            if sizes is None
            else _by_values(sizes, gm, given, config, mode)
        )
    except SparsifyError as error:
        raise _torch.unwrapped(error) from None
    if _torch.is_last_program():
        warn_once(
            "this is the last program that Dynamo compiles for this model: after it, other shapes run uncompiled "
            "and dense. Raise torch._dynamo.config.recompile_limit, or use fewer resolutions."
        )
    return program


def _sizes_by_values(gm: fx.GraphModule, config: SparsifyConfig) -> RunTimeSizes | None:
    """The sizes and positions that attention depends on, if they can be computed before the graph runs."""
    call = open_call()
    try:
        return pipeline.sizes_by_values(
            gm, config, part=call is not None, positions=call is None or call.as_one_graph
        )
    except NotKnownBefore as error:
        if call is not None and call.as_one_graph:  # smaller graphs may show the sizes
            raise
        log.info("the sizes of a graph are known only at run time: %s", error)
        return None


def _by_values(
    sizes: RunTimeSizes,
    gm: fx.GraphModule,
    options: Mapping[str, Any],
    config: SparsifyConfig,
    mode: str | None,
) -> ProgramsByValues:
    """The programs of a graph whose attention depends on values; each is compiled when its values occur."""
    inputs = find_inputs(gm)  # Dynamo knows the numbers of the call only now

    def compile(given: Sequence[Any]) -> Callable[..., Any]:
        try:
            graph = sizes.specialised(given)
        except NotKnownBefore as error:
            warn_once(f"a graph whose sizes depend on values runs uncompiled and dense ({error})")
            return sizes.as_it_was
        return _program(graph, given, options, config, mode, inputs)

    return ProgramsByValues(sizes, compile)


def _program(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any],
    config: SparsifyConfig,
    mode: str | None,
    inputs: Inputs | None = None,
) -> Program:
    """The program of a graph.

    Args:
        inputs: the inputs that distinguish calls, if they are known.
    """
    if config.parallel is not None:
        config.parallel.check_mode(mode)
    ranks = ranks_of(config.parallel)
    marked = _torch.marked_dynamic(example_inputs)
    in_a_model = open_call() is not None
    leaves = not in_a_model and may_leave(gm)
    analysed = pipeline.analyse(gm, config, part=in_a_model, ends=leaves)
    receives = not in_a_model and may_receive(analysed)
    if in_a_model or receives:
        fix_tokens(analysed)
    if leaves:
        fix_videos(analysed)
    # In training, time steps are random, and checkpointing may run a forward pass again.
    with_gradients = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )
    sizes = _sizes(gm)

    def planned_as(analysed: fx.GraphModule, trains: bool) -> PlannedGraph:
        if ranks is not None and config.parallel is not None:
            form = "hcp" if trains else config.parallel.form  # with gradients, methods share heads
            recall = config.measure_recall > 0
            placed = in_best_form(graph_plan(analysed), ranks, form, recall=recall, measure=True)
            analysed = pipeline.share(analysed, config, placed, trains=trains)
            log.info("%s", analysed.meta["sharding"])
        replays = mode in CUDA_GRAPHS and not trains
        plan, first = graph_plan(analysed), Variant(trains=trains, warm=True if replays else None)
        sparse = pipeline.rewrite(analysed, config, first)
        functions = functions_of(sparse)

        def compile_variant(variant: Variant, inputs: Sequence[Any]) -> Callable[..., Any]:
            graph = sparse if variant == first else pipeline.rewrite(analysed, config, variant)
            functions.update(functions_of(graph))
            offloads = with_gradients and config.offload_indices and variant.phase == "sparse"
            offload = long_lists if offloads else None
            run = _torch.compile_with(config.inner_backend, graph, inputs, mode, offload=offload)
            if ranks is None:
                return run
            facts = {
                "options": dict(options),
                "guard": config.guard,
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "seed": torch.initial_seed(),
                "plan": plan,
                "variant": variant,
            }
            inputs_of_graph = [node for node in gm.graph.nodes if node.op == "placeholder"]
            names = [input_path(node) for node in inputs_of_graph]
            changing = [input_path(node) for node in inputs_of_graph if not _torch.is_model_tensor(node)]
            return compared(run, ranks, facts, names, changing)

        guard = Guard.of(
            plan,
            [node.meta["plan"] for node in all_sites(analysed) if "plan" in node.meta],
            config.guard,
            recall=config.measure_recall,
            ranks=ranks,
            mode=mode,
            trains=trains,
        )
        return PlannedGraph(
            plan=plan,
            guard=guard,
            sizes=sizes if plan.sparse else {},
            extra=sparse.meta["extra"],
            functions=functions,
            compile=compile_variant,
            trains=trains,
            replays=replays,
            learning_sites=tuple(one for one in plan.sparse if learns(one)),
        )

    own = planned_as(analysed, with_gradients)
    _check_marked(marked)
    program = Program(
        options=options,
        inputs=inputs or find_inputs(gm),
        own=own,
        ends_early=_torch.graph_break(gm) is not None,
        handover=Handover(analysed, config, receives, leaves) if receives or leaves else None,
        planned_as=planned_as,
        places=find_places(analysed, gm),
        plan_as=lambda parts, trains: planned_as(
            analysed if parts is None else pipeline.plan_as(analysed, config, parts), trains
        ),
    )
    # Guards on sizes can be added only now, and CUDA graphs need to know the model's tensors.
    if with_gradients or mode is not None or any(isinstance(value, torch.SymInt) for value in example_inputs):
        examples = (_torch.example_like(example_inputs, tensor) for tensor in own.extra.blank())
        own.prepare([*example_inputs, *examples])
    if not in_a_model:  # the call of an applied model says more, and once for all its graphs
        tell = partial(_tell, config=config, options=options, end=_torch.graph_break(gm))
        if program.handover is not None and program.handover.receives:
            program.tell = partial(tell, after_a_break=True)
        else:
            tell(program.plan)
    return program


def _check_marked(marked: Mapping[str, Any]) -> None:
    """Raise OptionError if a sparse plan needs a fixed size that the user marked dynamic."""
    fixed = [f"{name} = {size}" for name, one in marked.items() if (size := _torch.known(one)) is not None]
    if fixed:
        raise OptionError(
            f"sizes that determine a grid of video tokens must not be marked dynamic, got {', '.join(fixed)}: "
            "every grid gets its own program. Leave out mark_dynamic, or use maybe_mark_dynamic"
        )


def _sizes(gm: fx.GraphModule) -> dict[int, Sizes]:
    """Place of an input from the caller -> the sizes of it that are fixed in this compilation."""
    found = {}
    for place, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder"):
        value = value_of(node)
        if isinstance(value, Tensor) and not _torch.is_model_tensor(node):
            found[place] = Sizes(node.name, tuple(map(_torch.known, value.shape)))
        elif isinstance(value, torch.SymInt) and (number := _torch.known(value)) is not None:
            found[place] = Sizes(node.name, number)
    return found


def reads_more_or_less(plan: AttentionPlan) -> str:
    """A sentence about the option that sets how much a method of `DEFAULT_METHODS` reads."""
    far_field = plan.far_field
    if plan.method == "keys":
        return "options={'kv_budget': b} reads more (up to 1.0) or less"
    if max_error_of(plan.settings) is not None:
        return "options={'max_error': e} reads more (towards 0) or less (towards 1)"
    if far_field == "linear":
        return "options={'min_gain': g} reads more (towards 0) or less (above 0.02)"
    return f"options={{'far_field': {far_field!r}, 'top_p': p}} reads more (up to 1) or less"


def _tell(
    plan: GraphPlan,
    config: SparsifyConfig,
    options: Mapping[str, Any],
    end: _torch.GraphBreak | None,
    after_a_break: bool = False,
) -> None:
    """Warn once about dense attention and about the default method.

    Args:
        end: the graph break that ended the graph before the end of the code.
        after_a_break: whether the graph gets tensors from another graph of the model.
    """
    if options.get("method") == "dense":
        return
    left = Counter(one.reason for one in plan if one.site.refusal or not plan.sparse)
    causes = "; ".join(f"{reason} ({count})" for reason, count in left.items())
    if not plan.sparse and options.get("policy") is None:
        what = f" Its {len(plan)} attention calls: {causes}." if left else f" {end}." if end else ""
        if left and after_a_break:
            what += f" The graph follows a graph break: {FOLLOWS}."
        warn_once(
            f"sparsify found no attention to rewrite in a graph: the graph is compiled unchanged.{what} "
            "sparsify_compiler.explain(model, ...) shows why."
        )
    if config.policy is not None and plan.plans and config.policy.advice:
        warn_once(f"{config.policy.advice}.")
    if plan.sparse and not {"method", "preset", "policy"} & set(options):
        first = plan.sparse[0]
        warn_once(
            f"sparsify rewrites attention to be sparse, which is lossy. The default method is {first.method!r}, "
            f"here with far_field={first.far_field!r}: {reads_more_or_less(first)}; "
            "options={'method': 'dense'} keeps full attention."
        )
    if plan.sparse and left:
        warn_once(
            f"sparsify leaves {left.total()} of {len(plan)} attention calls of a graph unchanged: {causes}. "
            "sparsify_compiler.explain(model, ...) names them."
        )
