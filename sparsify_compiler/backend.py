"""The entry: `torch.compile(model, backend="sparsify", options={...})`."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler import _torch
from sparsify_compiler.config import GENERAL, PRESETS, SparsifyConfig, split_options
from sparsify_compiler.errors import OptionError, SparsifyError, unknown_choice, warn_once
from sparsify_compiler.kernels import providers
from sparsify_compiler.parallel.group import compared_first, ranks_of
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.fx import value_of
from sparsify_compiler.passes.inputs import find_inputs
from sparsify_compiler.passes.offload import long_lists
from sparsify_compiler.passes.places import find_places, fix_tokens
from sparsify_compiler.passes.planning import graph_plan, learns
from sparsify_compiler.plan import GraphPlan
from sparsify_compiler.policy import ALL_OPTIONS, Policy, entry_of
from sparsify_compiler.runtime.call import open_call
from sparsify_compiler.runtime.program import PlannedGraph, Program, Sizes, Variant
from sparsify_compiler.runtime.site import functions_of

log = logging.getLogger(__name__)
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that make CUDA graphs."""
DEFAULT_METHOD = "svg2"
_FIXED = ("policy", "preset", "method", "far_field", "dense_layers")
WITH_A_POLICY = tuple(name for name in GENERAL if name not in _FIXED)
"""Options that may be given with a policy."""


def sparsify(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Program:
    """Backend for torch.compile: makes attention block-sparse, and gives the rest unchanged to the inner backend.

    Args:
        gm: Dynamo's graph; not modified.
        example_inputs: its inputs.
        options: see `configure`.
        mode: the mode of torch.compile, for Inductor.

    Raises:
        SparsifyError: options are wrong or do not fit the model. Dynamo does not wrap this error.
    """
    try:
        config = configure(options)
        program = _program(gm, example_inputs, dict(options or {}), config, mode)
    except SparsifyError as error:
        raise _torch.unwrapped(error) from None
    if open_call() is None:  # the call of an applied model says more, and once for all its graphs
        _tell(program.plan, config, options or {}, _torch.graph_break(gm))
    if _torch.is_last_program():
        warn_once(
            "this is the last program that Dynamo compiles for this model: after it, other shapes run uncompiled "
            "and dense. Raise torch._dynamo.config.recompile_limit, or use fewer resolutions."
        )
    return program


def _program(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any],
    config: SparsifyConfig,
    mode: str | None,
) -> Program:
    ranks = ranks_of(config.parallel)
    if ranks is not None and mode in _CUDA_GRAPHS:
        raise OptionError(f"parallel does not work with CUDA graphs, got mode={mode!r}: leave out mode")
    marked = _torch.marked_dynamic(example_inputs)
    in_a_model = open_call() is not None
    analysed = pipeline.analyse(gm, config, part=in_a_model)
    if in_a_model:
        fix_tokens(analysed)
    # In training, time steps are random, and checkpointing may run a forward pass again.
    trains = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )
    sizes = _sizes(gm)

    def planned_as(analysed: fx.GraphModule) -> PlannedGraph:
        if ranks is not None:
            analysed = pipeline.share(analysed, config, ranks)
            log.info("%s", analysed.meta["sharding"])
        plan, first = graph_plan(analysed), Variant(trains=trains)
        sparse = pipeline.rewrite(analysed, config, first)
        functions = functions_of(sparse)

        def compile_variant(variant: Variant, inputs: Sequence[Any]) -> Callable[..., Any]:
            graph = sparse if variant == first else pipeline.rewrite(analysed, config, variant)
            functions.update(functions_of(graph))
            offload = long_lists if trains and config.offload_indices and variant.phase == "sparse" else None
            run = _torch.compile_with(config.inner_backend, graph, inputs, mode, offload=offload)
            if ranks is None:
                return run
            facts = {"options": dict(options), "seed": torch.initial_seed(), "plan": plan, "variant": variant}
            names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
            return compared_first(run, ranks, facts, names)

        return PlannedGraph(
            plan=plan,
            sizes=sizes if plan.sparse else {},
            extra=sparse.meta["extra"],
            functions=functions,
            compile=compile_variant,
            trains=trains,
            learning_sites=tuple(one for one in plan.sparse if learns(one)),
        )

    own = planned_as(analysed)
    _check_marked(marked)
    program = Program(
        options=options,
        inputs=find_inputs(gm),
        own=own,
        ends_early=_torch.graph_break(gm) is not None,
        places=find_places(analysed, gm),
        plan_as=lambda parts: planned_as(pipeline.plan_as(analysed, config, parts)),
    )
    # Guards on sizes can be added only now, and CUDA graphs need to know the model's tensors.
    if trains or mode is not None or any(isinstance(value, torch.SymInt) for value in example_inputs):
        examples = (_torch.example_like(example_inputs, tensor) for tensor in own.extra.blank())
        own.prepare([*example_inputs, *examples])
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


def configure(options: Mapping[str, Any] | None) -> SparsifyConfig:
    """Check the options of torch.compile and turn them into a config.

    Keys: `preset`, the fields of `SparsifyConfig` (`method` by its name), and those of the method, e.g. `top_p`. Or
    `policy`, the path of a file or a `Policy`, instead of the options that decide what sites do.

    Raises:
        OptionError: a name or value is unknown. The error names the option, the choices and the nearest one.
        PolicyError: the policy cannot be read.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a dict such as {{'method': 'tile'}}, got {options!r}")
    general, own = split_options(options or {})
    providers.check_name(general.get("provider", "auto"))
    _torch.check_backend(general.get("inner_backend", "inductor"))
    if options and options.get("policy") is not None:
        return SparsifyConfig(method=None, **{**general, "policy": _policy(options)})
    name = general.pop("method", DEFAULT_METHOD)
    if options and options.get("preset") is not None and name != (of := PRESETS[options["preset"]]["method"]):
        raise OptionError(
            f"preset {options['preset']!r} has method {of!r}, got method={name!r}: leave out one"
        )
    for option in own:
        if option not in ALL_OPTIONS:
            raise unknown_choice("option", option, (*GENERAL, *ALL_OPTIONS))
    entry = entry_of({**own, "method": name, "far_field": general.get("far_field")})
    return SparsifyConfig(method=entry.method, **general)


def _policy(options: Mapping[str, Any]) -> Policy:
    """The requested policy. No other option may decide what sites do."""
    for option in options:
        if option not in (*GENERAL, *ALL_OPTIONS):
            raise unknown_choice("option with a policy", option, WITH_A_POLICY)
        if option not in ("policy", *WITH_A_POLICY):
            raise OptionError(
                f"a policy sets option {option!r} for every site: leave out one. "
                f"With a policy you may give {', '.join(WITH_A_POLICY)}"
            )
    asked = options["policy"]
    if not isinstance(asked, (str, Path, Policy)):
        raise OptionError(f"policy must be the path of a file or a Policy, got {asked!r}")
    return asked if isinstance(asked, Policy) else Policy.load(asked)


def reads_more_or_less(far_field: str) -> str:
    """A sentence about the option that sets how much the default method reads, for a far field."""
    if far_field == "linear":
        return "options={'min_gain': g} reads more (towards 0) or less (above 0.02)"
    return f"options={{'far_field': {far_field!r}, 'top_p': p}} reads more (up to 1) or less"


def _tell(
    plan: GraphPlan, config: SparsifyConfig, options: Mapping[str, Any], end: _torch.GraphBreak | None
) -> None:
    """Warn once about dense attention and about the default method.

    Args:
        end: the graph break that ended the graph before the end of the code.
    """
    if options.get("method") == "dense":
        return
    left = Counter(one.reason for one in plan if one.site.refusal or not plan.sparse)
    causes = "; ".join(f"{reason} ({count})" for reason, count in left.items())
    if not plan.sparse and options.get("policy") is None:
        what = f" Its {len(plan)} attention calls: {causes}." if left else f" {end}." if end else ""
        warn_once(
            f"sparsify found no attention to rewrite in a graph: the graph is compiled unchanged.{what} "
            "sparsify_compiler.explain(model, ...) shows why."
        )
    if config.policy is not None and plan.plans and config.policy.advice:
        warn_once(f"{config.policy.advice}.")
    if plan.sparse and not {"method", "preset", "policy"} & set(options):
        warn_once(
            f"sparsify rewrites attention to be sparse, which is lossy. The default method is {DEFAULT_METHOD!r}, "
            f"here with far_field={plan.sparse[0].far_field!r}: {reads_more_or_less(plan.sparse[0].far_field)}; "
            "options={'method': 'dense'} keeps full attention."
        )
    if plan.sparse and left:
        warn_once(
            f"sparsify leaves {left.total()} of {len(plan)} attention calls of a graph unchanged: {causes}. "
            "sparsify_compiler.explain(model, ...) names them."
        )
