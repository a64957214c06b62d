"""The analysis of a whole model, for calls in which Dynamo sees only parts of it.

The model is copied to the meta device without its hooks, and traced there as one call. Nothing is computed, and the
model does not change.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsify_compiler import _torch
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.hosts.values import Values
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.capture import all_sites
from sparsify_compiler.passes.layout import check_grid
from sparsify_compiler.passes.places import find_places, likeness
from sparsify_compiler.passes.planning import decide, dense_steps
from sparsify_compiler.plan import AttentionPlan, AttentionSite, TokenLayout
from sparsify_compiler.runtime.call import Analysis, Arguments, Part
from sparsify_compiler.uncompiled import Uncompiled

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
    device = _device_type(arguments)
    # A model on the CPU may leave out the device of new tensors. Dynamo knows fewer operators with a usual device.
    last = torch.device(_META) if device == "cpu" else nullcontext()
    attempts: list[tuple[bool, Any]] = [(True, nullcontext()), (False, nullcontext()), (False, last)]
    failures = []
    for strict, usual in attempts:
        try:
            twin, (args, kwargs) = on_meta(module, arguments)
            values = _values(module, twin, arguments, (args, kwargs))
            with _torch.autocast_on_meta(device), usual, values:
                found, outside = _traced(twin, args, kwargs, config, strict)
            break
        except SparsifyError:
            raise
        except Exception as error:  # whatever Dynamo or the model's own code raises on the meta device
            failures.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    else:
        return Analysis(failure=failures[1])
    if config.grid is not None:
        check_grid(config.grid, config.text, found)
    decisions = decide(found, config)
    parts = tuple(
        Part(
            name=site.name,
            like=likeness(site),
            kind=site.kind,
            layout=layout,
            entry=entry,
            reason=reason,
        )
        for (site, layout), (entry, reason) in zip(found, decisions, strict=True)
    )
    return Analysis(parts, dense_steps(decisions, config), outside=outside, by_values=values.were_read)


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


Found = list[tuple[AttentionSite, TokenLayout]]


def _traced(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: SparsifyConfig, strict: bool
) -> tuple[Found, tuple[AttentionPlan, ...]]:
    """(site and layout of every attention in graphs, plans of those outside), in the order of execution.

    Where the model breaks into graphs, labels go from the outputs of one to the inputs of the next.

    Args:
        strict: whether to raise what Dynamo raises. Otherwise code that Dynamo cannot trace runs as it is.
    """
    paths = {id(tensor): path for path, tensor in [*module.named_parameters(), *module.named_buffers()]}
    counts: Counter[str] = Counter()
    found: Found = []
    errors: list[SparsifyError] = []
    tracker, uncompiled = _BetweenGraphs(), Uncompiled(module)
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor):
            tracker.put_input(tensor, False)
    for tensor in (*module.parameters(), *module.buffers()):
        tracker.put_input(tensor, isinstance(tensor, nn.Parameter))

    def record(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            try:
                analysed = pipeline.follow(gm, config, tracker, inputs)
            except SparsifyError as error:
                errors.append(error)
                raise
            for node, place in zip(all_sites(analysed), find_places(analysed, gm), strict=True):
                name = place.name_in(
                    None if place.parameter is None else paths.get(id(inputs[place.parameter]))
                )
                counts[name] += 1
                name = name if counts[name] == 1 else f"{name}#{counts[name]}"
                site: AttentionSite = node.meta["site"]
                layout = node.meta.get("layout") or TokenLayout(tokens=site.q_tokens)
                found.append((replace(site, name=name), layout))
            outputs = gm.forward(*inputs)
            for tensors, ends in zip((inputs, outputs), analysed.meta["ends"], strict=True):
                for tensor, known in zip(tensors, ends, strict=True):
                    if isinstance(tensor, Tensor) and known is not None:
                        tracker.put(tensor, known)
            return outputs

        return tracker.paused()(uncompiled.in_graph()(run))

    try:
        with _torch.tracing(record, _call, strict=strict) as call, uncompiled, tracker:
            call(module, args, kwargs)
    except SparsifyError:
        raise errors[0] from None  # without the text that Dynamo appends
    return found, tuple(uncompiled.plans)


class _BetweenGraphs(AxisTracker):
    """Follows the operators of a call that run in no graph. Dynamo compiles as without it."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._paused = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: otherwise Dynamo compiles nothing under a mode."""
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing inside: a graph has its own tracker."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


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
        return new

    args, kwargs = tree_map(lambda leaf: tensor(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
    return twin(module), (args, kwargs)
