"""The analysis of a whole model, for calls in which Dynamo sees only parts of it.

The model is copied to the meta device without its hooks, and traced there as one call. Nothing is computed, and the
model does not change.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsify_compiler import _torch
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.hosts.blocks import repeated_blocks
from sparsify_compiler.hosts.values import Values
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.capture import all_sites
from sparsify_compiler.passes.layout import check_grid
from sparsify_compiler.passes.places import find_places, likeness
from sparsify_compiler.passes.planning import decide, dense_steps
from sparsify_compiler.passes.run_time_sizes import NotKnownBefore
from sparsify_compiler.plan import Analysis, AttentionPlan, AttentionSite, Part, TokenLayout
from sparsify_compiler.runtime.call import Arguments
from sparsify_compiler.runtime.positions import Mesh, meshes_of
from sparsify_compiler.runtime.program import Place
from sparsify_compiler.uncompiled import BetweenGraphs, Uncompiled

_META = torch.device("meta")
NATIVE = "native"
"""The attention backend of diffusers that calls SDPA."""

_OF_HOOKS = ("forward", "_compiled_call_impl", "_diffusers_hook", "_hf_hook", "_old_forward")
"""Attributes of a module that hold, or call, the hooks of others."""


def analyse(module: nn.Module, arguments: Arguments, config: SparsifyConfig) -> Analysis:
    """Find every attention of a model and decide what it does, for the shapes of one call.

    Raises:
        SparsifyError: options do not fit the model.
    """
    found = _found(module, arguments, config)
    if found.failure:
        return Analysis(failure=found.failure)
    if config.grid is not None:
        check_grid(config.grid, config.text, found.sites)
    decisions = decide(found.sites, config)
    parts = tuple(
        Part(
            name=site.name,
            like=likeness(site),
            kind=site.kind,
            layout=layout,
            entry=entry,
            reason=reason,
        )
        for (site, layout), (entry, reason) in zip(found.sites, decisions, strict=True)
    )
    return Analysis(
        parts,
        dense_steps(decisions, config),
        outside=found.outside,
        by_values=found.by_values,
        captures_sizes=found.captures_sizes,
    )


def _values(module: nn.Module, twin: nn.Module, real: Arguments, meta: Arguments) -> Values:
    """The values of the arguments and buffers."""
    values = Values()
    for one, other in zip(
        [*tree_leaves(real), *module.buffers()], [*tree_leaves(meta), *twin.buffers()], strict=True
    ):
        if isinstance(one, Tensor):
            values.put(other, one)
    return values


def _device_type(arguments: Arguments) -> str:
    """The device of the arguments of a call."""
    devices = [leaf.device.type for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return next((one for one in devices if one != "cpu"), "cpu")


Sites = list[tuple[AttentionSite, TokenLayout]]


class Found(NamedTuple):
    """The attentions of a model."""

    sites: Sequence[tuple[AttentionSite, TokenLayout]] = ()
    """Site and layout of every attention in graphs, in the order of execution."""
    outside: tuple[AttentionPlan, ...] = ()
    """The plans of those outside."""
    by_values: bool = False
    captures_sizes: bool = False
    failure: str = ""
    """As in `Analysis`."""


class _Way(NamedTuple):
    """A way to trace a model on the meta device."""

    by_blocks: bool = False
    """Whether one trace of Dynamo serves all blocks that its guards do not distinguish. The rest of the model runs
    as it is."""
    strict: bool = True
    """Whether Dynamo must be able to trace all code. Otherwise code that it cannot trace runs as it is."""
    meta_is_usual: bool = False
    """Whether new tensors without a device are on the meta device. A model on the CPU may leave out their device;
    but Dynamo knows fewer operators so."""
    captures_sizes: bool = False
    """Whether Dynamo captures sizes that depend on values, where it would end a graph otherwise."""


_WAYS = (
    _Way(by_blocks=True),
    _Way(),
    _Way(strict=False),
    _Way(strict=False, meta_is_usual=True),
    _Way(by_blocks=True, captures_sizes=True),
    _Way(captures_sizes=True),
)
"""The fastest first."""


def _found(module: nn.Module, arguments: Arguments, config: SparsifyConfig) -> Found:
    device = _device_type(arguments)
    best, failure, found_all = None, "", False
    for way in _WAYS:
        if way.captures_sizes and (best is None or not best.outside):
            continue
        if not way.captures_sizes and found_all:
            continue
        if way.meta_is_usual and (best is not None or device != "cpu"):
            continue
        try:
            twin, given = on_meta(module, arguments)
            blocks = repeated_blocks(twin) if way.by_blocks else []
            if way.by_blocks and not blocks:
                continue
            values = _values(module, twin, arguments, given)
            meshes = {
                id(other): meshes_of(one)
                for one, other in zip(tree_leaves(arguments), tree_leaves(given), strict=True)
                if isinstance(one, Tensor)
            }
            usual: Any = torch.device(_META) if way.meta_is_usual else nullcontext()
            captured = _torch.run_time_sizes(way.captures_sizes)
            with _torch.autocast_on_meta(device), usual, values, captured:
                sites, outside = _traced(
                    twin, *given, config, strict=way.strict, blocks=blocks, meshes=meshes
                )
        except SparsifyError:
            raise
        except Exception as error:  # whatever Dynamo or the model's own code raises on the meta device
            if not way.meta_is_usual:
                failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        if way.captures_sizes and best is not None and len(outside) >= len(best.outside):
            continue
        best = Found(sites, outside, values.were_read, way.captures_sizes)
        # Attention outside of blocks may lie in a graph.
        found_all = not blocks or bool(sites and not outside)
    return Found(failure=failure) if best is None else best


def _traced(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: SparsifyConfig,
    *,
    strict: bool,
    blocks: Sequence[nn.Module],
    meshes: Mapping[int, Sequence[tuple[int, Mesh]]],
) -> tuple[Sites, tuple[AttentionPlan, ...]]:
    """(site and layout of every attention in graphs, plans of those outside), in the order of execution.

    Where the model breaks into graphs, labels go from the outputs of one to the inputs of the next.

    Args:
        strict: whether to raise what Dynamo raises. Otherwise code that Dynamo cannot trace runs as it is.
        blocks: the modules that Dynamo traces; none if it traces the model.
        meshes: identity of an argument -> (dimension, mesh) of the grids in its values.
    """
    paths = {id(tensor): path for path, tensor in [*module.named_parameters(), *module.named_buffers()]}
    kinds = {path: type(one).__name__ for path, one in module.named_modules() if path}
    counts: Counter[str] = Counter()
    found: Sites = []
    errors: list[SparsifyError] = []
    tracker, uncompiled = _Tracker(), Uncompiled(module)
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            tracker.put_input(tensor, False, "of the model")
            for dim, mesh in meshes.get(id(tensor), ()):
                tracker.put_mesh(tensor, dim, mesh)
    for tensor in (*module.parameters(), *module.buffers()):
        tracker.put_input(tensor, isinstance(tensor, nn.Parameter))

    def record(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        try:
            sizes = pipeline.sizes_by_values(gm, config, part=True, positions=False)
        except NotKnownBefore:
            sizes = None
        known: dict[Hashable, tuple[fx.GraphModule, fx.GraphModule, tuple[Place, ...]]] = {}

        def run(*inputs: Any) -> Any:
            inputs = inputs if sizes is None else sizes.all_inputs(inputs)
            key = None if sizes is None else sizes.key(inputs)
            if key not in known:
                graph = gm if sizes is None else sizes.specialised(inputs)
                captured = pipeline.captured(graph, config)
                known[key] = graph, captured, find_places(captured, graph)
            graph, captured, places = known[key]
            try:
                analysed = pipeline.follow(captured, config, tracker, inputs)
            except SparsifyError as error:
                errors.append(error)
                raise
            for node, place in zip(all_sites(analysed), places, strict=True):
                name = place.name_in(
                    None if place.parameter is None else paths.get(id(inputs[place.parameter]))
                )
                site: AttentionSite = node.meta["site"]
                layout = node.meta.get("layout") or TokenLayout(tokens=site.q_tokens)
                # A graph of a block does not record the class of the block itself.
                site = replace(site, module=site.module or kinds.get(name, ""))
                counts[name] += 1
                name = name if counts[name] == 1 else f"{name}#{counts[name]}"
                found.append((replace(site, name=name), layout))
            outputs = graph.forward(*inputs)
            for tensors, ends in zip((inputs, outputs), analysed.meta["ends"][:2], strict=True):
                for tensor, end in zip(tensors, ends, strict=True):
                    if isinstance(tensor, Tensor) and end is not None:
                        tracker.receive(tensor, end)
            return outputs

        return tracker.in_graph()(uncompiled.in_graph()(run))

    try:
        with _torch.tracing(record, _call, strict=strict) as traced, uncompiled, tracker:
            for block in blocks:
                block.__dict__["_compiled_call_impl"] = partial(_call_block, traced, block)
            (_call if blocks else traced)(module, args, kwargs)
    except SparsifyError as error:
        raise (errors or [error])[0] from None  # without the text that Dynamo appends
    return found, tuple(uncompiled.plans)


class _Tracker(BetweenGraphs, AxisTracker):
    """Follows the operators of a call that run in no graph: a graph has a tracker of its own."""

    def seen(self, func: torch._ops.OpOverload, types: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator and label its outputs."""
        return AxisTracker.__torch_dispatch__(self, func, types, args, kwargs)


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


def _call_block(traced: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return traced(block, args, kwargs)


def _own_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The method of its class that a module itself has chosen as its `forward`; None if it has chosen none."""
    forward = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return None
    return forward.__func__ if getattr(type(module), forward.__name__, None) is forward.__func__ else None


def on_meta(module: nn.Module, arguments: Arguments) -> tuple[nn.Module, Arguments]:
    """Copies of a model and of the arguments of its call on the meta device, the model without hooks.

    Weights that are only stored in 8 bits get the widest type of the arguments: hooks cast them before they are
    used.
    """
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    widest = max(
        (one.dtype for one in given), key=lambda one: one.itemsize, default=torch.get_default_dtype()
    )
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def tensor(old: Tensor) -> Tensor:
        if id(old) not in tensors:
            stored = old.is_floating_point() and old.dtype.itemsize == 1
            new = torch.empty_strided(
                old.shape, old.stride(), dtype=widest if stored else old.dtype, device=_META
            )
            is_parameter = isinstance(old, nn.Parameter)
            tensors[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
        return tensors[id(old)]

    def value(old: Any) -> Any:
        if isinstance(old, Tensor):
            return tensor(old)
        if isinstance(old, nn.Module):
            return twin(old)
        if hasattr(old, "_attention_backend"):
            new = copy(old)
            new._attention_backend = NATIVE
            return new
        if type(old) in (list, tuple):
            return type(old)(map(value, old))
        if type(old) is dict:
            return {key: value(one) for key, one in old.items()}
        return old

    def twin(old: nn.Module) -> nn.Module:
        if id(old) in modules:
            return modules[id(old)]
        new = modules[id(old)] = object.__new__(type(old))
        own = new.__dict__
        for key, one in old.__dict__.items():
            if key in _OF_HOOKS:
                continue
            if "_hooks" in key and isinstance(one, dict):
                own[key] = type(one)()
            else:
                own[key] = value(one)
        forward = _own_forward(old)
        if forward is not None:
            own["forward"] = MethodType(forward, new)
        return new

    args, kwargs = tree_map(lambda leaf: tensor(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
    return twin(module), (args, kwargs)
