"""The analysis of a whole model, for calls in which Dynamo sees only parts of it.

The model is copied to the meta device without its hooks, and traced there as one call. Nothing is computed, and the
model does not change.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsify_compiler import _torch
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.layout import check_grid
from sparsify_compiler.passes.places import find_places, likeness
from sparsify_compiler.passes.planning import decide, dense_steps, graph_plan
from sparsify_compiler.plan import AttentionSite, TokenLayout
from sparsify_compiler.runtime.call import Analysis, Arguments, Part
from sparsify_compiler.runtime.program import Place

_META = torch.device("meta")
_OF_HOOKS = ("forward", "_compiled_call_impl", "_diffusers_hook", "_hf_hook", "_old_forward")
"""Attributes of a module that hold, or call, the hooks of others."""


def analyse(module: nn.Module, arguments: Arguments, config: SparsifyConfig) -> Analysis:
    """Find every attention of a model and decide what it does, for the shapes of one call.

    Raises:
        SparsifyError: options do not fit the model.
    """
    try:
        copy, (args, kwargs) = on_meta(module, arguments)
        found = _traced(copy, args, kwargs, config)
    except SparsifyError:
        raise
    except Exception as error:  # whatever the model's own code raises on the meta device
        return Analysis(failure=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
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
    return Analysis(parts, dense_steps(decisions, config))


def _traced(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: SparsifyConfig
) -> list[tuple[AttentionSite, TokenLayout]]:
    """Site and layout of every attention, in the order of execution."""
    paths = {id(tensor): path for path, tensor in [*module.named_parameters(), *module.named_buffers()]}
    counts: Counter[str] = Counter()
    found: list[tuple[AttentionSite, TokenLayout]] = []
    errors: list[SparsifyError] = []

    def record(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        try:
            analysed = pipeline.analyse(gm, config, part=True)
        except SparsifyError as error:
            errors.append(error)
            raise _torch.unwrapped(error) from None
        plan, places = graph_plan(analysed), find_places(analysed)

        def run(*inputs: Any) -> Any:
            for one, place in zip(plan, places, strict=True):
                name = _name(place, inputs, paths)
                counts[name] += 1
                name = name if counts[name] == 1 else f"{name}#{counts[name]}"
                found.append((replace(one.site, name=name), one.layout))
            return gm.forward(*inputs)

        return run

    try:
        with _torch.tracing(record, _call) as call:
            call(module, args, kwargs)
    except SparsifyError:
        raise errors[0] from None  # without the text that Dynamo appends
    return found


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module(*args, **kwargs)


def _name(place: Place, inputs: Sequence[Any], paths: dict[int, str]) -> str:
    return place.name_in(None if place.parameter is None else paths.get(id(inputs[place.parameter])))


def on_meta(module: nn.Module, arguments: Arguments) -> tuple[nn.Module, Arguments]:
    """Copies of a model and of the arguments of its call on the meta device, the model without hooks.

    Weights that are only stored in 8 bits get the widest type of the arguments: hooks cast them before they are
    used.
    """
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    widest = max((one.dtype for one in given), key=lambda one: one.itemsize, default=torch.get_default_dtype())
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
