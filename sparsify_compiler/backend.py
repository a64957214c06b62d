"""The front door: `torch.compile(model, backend="sparsify", options={...})`."""

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
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.fx import value_of
from sparsify_compiler.passes.inputs import find_inputs
from sparsify_compiler.passes.offload import long_lists
from sparsify_compiler.passes.planning import graph_plan, learns
from sparsify_compiler.plan import GraphPlan
from sparsify_compiler.policy import ALL_OPTIONS, Policy, entry_of
from sparsify_compiler.runtime.program import Choices, Phase, Program, Sizes
from sparsify_compiler.runtime.site import works_of

DEFAULT_METHOD = "svg2"
_FIXED = ("policy", "preset", "method", "far_field", "dense_layers")
BESIDE_A_POLICY = tuple(name for name in GENERAL if name not in _FIXED)
"""Options that a policy leaves open."""


def sparsify(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Program:
    """Backend for torch.compile: block-sparse attention in, everything else to the inner backend untouched.

    Args:
        gm: Dynamo's graph; not modified.
        example_inputs: its inputs.
        options: see `configure`.
        mode: as torch.compile has it; passed on to Inductor.

    Raises:
        SparsifyError: options that cannot be met; it reaches the caller of the compiled model as itself.
    """
    try:
        config = configure(options)
        program = _program(gm, example_inputs, dict(options or {}), config, mode)
    except SparsifyError as error:
        raise _torch.unwrapped(error) from None
    _tell(program.plan, config, options or {}, _torch.graph_break(gm))
    if _torch.is_last_program():
        warn_once(
            "this is the last program that Dynamo compiles for this model: beyond it, other shapes run uncompiled "
            "and dense. Raise torch._dynamo.config.recompile_limit, or keep to fewer resolutions."
        )
    return program


def _program(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any],
    config: SparsifyConfig,
    mode: str | None,
) -> Program:
    marked = _torch.marked_dynamic(example_inputs)
    analysed = pipeline.analyse(gm, config)
    plan = graph_plan(analysed)
    # In training time steps are drawn at random, and what runs forward may run again.
    trains = torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in example_inputs
    )
    sparse = pipeline.rewrite(analysed, config, remembers=not trains)
    held = sparse.meta["held"]
    _check_marked(marked)
    works = works_of(sparse)

    def compile_phase(phase: Phase, choices: Choices, inputs: Sequence[Any]) -> Callable[..., Any]:
        if phase == "sparse" and not choices:
            graph = sparse
        else:
            graph = pipeline.rewrite(analysed, config, phase, remembers=not trains, choices=choices)
            works.update(works_of(graph))
        offload = long_lists if trains and config.offload_indices and phase == "sparse" else None
        return _torch.compile_with(config.inner_backend, graph, inputs, mode, offload=offload)

    program = Program(
        options=options,
        plan=plan,
        inputs=find_inputs(gm),
        sizes=_sizes(gm) if plan.sparse else {},
        held=held,
        works=works,
        compile=compile_phase,
        remembers=not trains and bool(plan.sparse),
        learning_sites=tuple(one for one in plan.sparse if learns(one)),
    )
    # Guards on sizes can be added now alone, and CUDA graphs want to know the model's tensors.
    if trains or mode is not None or any(isinstance(value, torch.SymInt) for value in example_inputs):
        extra = (_torch.example_like(example_inputs, tensor) for tensor in held.blank())
        program.prepare([*example_inputs, *extra])
    return program


def _check_marked(marked: Mapping[str, Any]) -> None:
    """Raise OptionError where a size that the user marked dynamic is one that a sparse plan rests on."""
    fixed = [f"{name} = {size}" for name, one in marked.items() if (size := _torch.known(one)) is not None]
    if fixed:
        raise OptionError(
            f"sizes that a grid of video tokens rests on must not be marked dynamic, got {', '.join(fixed)}: every "
            "grid gets a program of its own. Leave out mark_dynamic, or take maybe_mark_dynamic"
        )


def _sizes(gm: fx.GraphModule) -> dict[int, Sizes]:
    """What is fixed in this compilation of the inputs that the caller gives, by their places."""
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

    Keys: `preset`, the fields of `SparsifyConfig` (`method` by its name), and those of the method, e.g. `top_p`; or
    `policy`, the path of a file or a `Policy`, in place of all that says what sites do.

    Raises:
        OptionError: a name or value that is not known; names the option, the choices and the nearest one.
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
            f"preset {options['preset']!r} is of method {of!r}, got method={name!r}: leave out one"
        )
    for option in own:
        if option not in ALL_OPTIONS:
            raise unknown_choice("option", option, (*GENERAL, *ALL_OPTIONS))
    entry = entry_of({**own, "method": name, "far_field": general.get("far_field")})
    return SparsifyConfig(method=entry.method, **general)


def _policy(options: Mapping[str, Any]) -> Policy:
    """The policy asked for, and by itself."""
    for option in options:
        if option not in (*GENERAL, *ALL_OPTIONS):
            raise unknown_choice("option beside a policy", option, BESIDE_A_POLICY)
        if option not in ("policy", *BESIDE_A_POLICY):
            raise OptionError(
                f"a policy says what option {option!r} says, for every site: leave out one; "
                f"beside it may stand {', '.join(BESIDE_A_POLICY)}"
            )
    asked = options["policy"]
    if not isinstance(asked, (str, Path, Policy)):
        raise OptionError(f"policy must be the path of a file or a Policy, got {asked!r}")
    return asked if isinstance(asked, Policy) else Policy.load(asked)


def reads_more_or_less(far_field: str) -> str:
    """The option that says how much the default method reads with a far field, in words."""
    if far_field == "linear":
        return "options={'min_gain': g} reads more (towards 0) or less (above 0.02)"
    return f"options={{'far_field': {far_field!r}, 'top_p': p}} reads more (up to 1) or less"


def _tell(
    plan: GraphPlan, config: SparsifyConfig, options: Mapping[str, Any], end: _torch.GraphBreak | None
) -> None:
    """Say once what a user should know who did not ask.

    Args:
        end: what ended the graph before the end of the code.
    """
    if options.get("method") == "dense":
        return
    left = Counter(one.reason for one in plan if one.site.refusal or not plan.sparse)
    causes = "; ".join(f"{reason} ({count})" for reason, count in left.items())
    if not plan.sparse and options.get("policy") is None:
        what = f" Its {len(plan)} attention calls: {causes}." if left else f" {end}." if end else ""
        warn_once(
            f"sparsify found no attention to rewrite in a graph: it is compiled as it is.{what} "
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
            f"sparsify leaves {left.total()} of {len(plan)} attention calls of a graph as they are: {causes}. "
            "sparsify_compiler.explain(model, ...) names them."
        )
