"""`apply`: sparse attention in every video transformer of a pipeline, in place."""

import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from sparsify_compiler import _torch
from sparsify_compiler.backend import configure, sparsify
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.explanation import Explanation
from sparsify_compiler.hosts.whole import NATIVE, analyse
from sparsify_compiler.measured import RunStats, stats
from sparsify_compiler.names import TIME_STEP
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.call import AppliedModel, Hook
from sparsify_compiler.runtime.clock import Clocks

log = logging.getLogger("sparsify_compiler")
_CALL = "_compiled_call_impl"
"""The attribute of a module that PyTorch calls in place of the module's own call."""


@dataclass(slots=True, eq=False)
class Applied:
    """The changes of one `apply`."""

    models: tuple[AppliedModel, ...]
    _hooks: tuple[tuple[nn.Module, Any], ...]
    """(module, the object in its `_compiled_call_impl`)."""
    _programs: tuple[Callable[..., Any], ...]
    _backends: list[tuple[Any, Any]] = field(default_factory=list)
    """(attention processor of diffusers, its attention backend before)."""

    def stats(self) -> RunStats:
        """The calls since the last video began, as `sparsify_compiler.stats` has them.

        Where there are several models, the names of sites begin with the name of the component.

        Raises:
            SparsifyError: no call was recorded.
        """
        found: list[RunStats] = []
        errors: list[SparsifyError] = []
        for model in self.models:
            try:
                one = stats(_alive(model))
            except SparsifyError as error:
                errors.append(error)
                continue
            prefix = f"{model.name}." if len(self.models) > 1 else ""
            measured = tuple(replace(m, site=prefix + m.site) for m in one.measurements)
            found.append(RunStats(measured, one.dense_calls))
        if not found:
            raise errors[0]
        return RunStats(
            tuple(m for one in found for m in one.measurements), sum(one.dense_calls for one in found)
        )

    def explain(self) -> Explanation:
        """The plan of every attention in the last call of each model, with its reason.

        Raises:
            SparsifyError: no model was called yet.
        """
        if not any(model.graphs for model in self.models):
            raise SparsifyError(
                "explain shows the last call, and no model was called yet: run the pipeline first, or call "
                "sparsify_compiler.explain(model, inputs..., options=...)"
            )
        graphs: list[GraphPlan] = []
        outside: list[AttentionPlan] = []
        for model in self.models:
            named = partial(_named, f"{model.name}." if len(self.models) > 1 else "")
            graphs += [replace(graph, plans=tuple(map(named, graph))) for graph in model.graphs if len(graph)]
            outside += map(named, model.outside)
        return Explanation(tuple(graphs), outside=tuple(outside))

    def restore(self) -> None:
        """Make the models what they were before `apply`. A second call does nothing."""
        for module, hook in self._hooks:
            if module.__dict__.get(_CALL) is hook:
                del module.__dict__[_CALL]
        for processor, backend in self._backends:
            processor._attention_backend = backend
        for program in self._programs:
            _torch.forget(program)
        self._hooks, self._programs, self._backends = (), (), []


def apply(target: Any, *, regional: bool | None = None, mode: str | None = None, **options: Any) -> Applied:
    """Make the attention of a pipeline or model sparse, in place.

    Every video transformer is compiled at its next call.
    Hooks that a script sets before or after (offloading, caching, casting) still work.

    Args:
        target: a module, or an object whose `components` is a dict of name -> module, such as a pipeline of
            diffusers. Of the components, every video transformer is changed; they share one generation.
        regional: whether the repeated blocks of each model are compiled instead of the model, each distinct
            block once. None compiles the whole model.
        mode: the mode of torch.compile.
        options: the options of the backend.

    Raises:
        OptionError: an option is wrong, or the target has no module to change.
        SparsifyError: a model was compiled or applied before.
    """
    config = configure(options)
    if regional not in (None, True, False):
        raise OptionError(f"regional must be True, False or None, got {regional!r}")
    if regional and config.parallel is not None:
        raise OptionError("parallel shares a whole model, got regional=True: leave out one")
    _torch.check_mode(mode)
    found = _video_transformers(target)
    for name, module in found.items():
        _check_unchanged(name or type(module).__name__, module)
    blocks = {name: _repeated_blocks(module) if regional else [] for name, module in found.items()}
    for name, module in found.items():
        if regional and not blocks[name]:
            raise OptionError(
                f"regional=True needs repeated blocks, and {type(module).__name__} has no list of modules of one "
                "class: leave out regional"
            )
    clocks = Clocks()
    models: list[AppliedModel] = []
    hooks: list[tuple[nn.Module, Any]] = []
    programs: list[Callable[..., Any]] = []
    backends: list[tuple[Any, Any]] = []
    backend = partial(sparsify, options=options, mode=mode)
    for name, module in found.items():
        backends += _native_attention(module)
        model = AppliedModel(
            weakref.ref(module), name, clocks, partial(_analyse, config=config), parts_only=bool(regional)
        )
        if regional:
            kinds = {type(block) for block in blocks[name]}
            compiled = {kind: _torch.compiled_apart(_call, backend) for kind in kinds}
            hooks += [(block, _Block(weakref.ref(block), compiled[type(block)])) for block in blocks[name]]
            hooks.append((module, Hook(model, _call)))
            programs += compiled.values()
        else:
            run = _torch.compiled_apart(_call, backend)
            hooks.append((module, Hook(model, run)))
            programs.append(run)
        models.append(model)
    for hook in (Hook.__call__, _Block.__call__):
        _torch.never_compile(hook)
    for module, hook in hooks:
        module.__dict__[_CALL] = hook
    return Applied(tuple(models), tuple(hooks), tuple(programs), backends)


class _Block:
    """The call of a block that is compiled by itself."""

    def __init__(self, module: "weakref.ref[nn.Module]", run: Callable[..., Any]) -> None:
        self.module, self.run = module, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.module(), args, kwargs)


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


def _analyse(module: nn.Module, arguments: Any, *, config: SparsifyConfig) -> Any:
    return analyse(module, arguments, config)


def _alive(model: AppliedModel) -> nn.Module:
    module = model.module()
    if module is None:
        raise SparsifyError("the model of this Applied exists no longer")
    return module


def _check_unchanged(name: str, module: nn.Module) -> None:
    for path, one in module.named_modules():
        call = one.__dict__.get(_CALL)
        where = f"{name}.{path}" if path else name
        if isinstance(call, (Hook, _Block)):
            raise SparsifyError(
                f"apply has changed {where} already: call restore() of what it returned first"
            )
        if call is not None or _torch.uncompiled(one) is not one:
            raise SparsifyError(
                f"{where} is compiled already: apply compiles the model itself, so leave out torch.compile and "
                "compile_repeated_blocks"
            )


def _video_transformers(target: Any) -> dict[str, nn.Module]:
    """Name of the component -> module, for all modules to change; the name is empty for a module alone."""
    if isinstance(target, nn.Module):
        return {"": target}
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise OptionError(
            f"apply needs a module or a pipeline with a dict of components, got {type(target).__name__}"
        )
    found = {}
    for name, module in components.items():
        if isinstance(module, nn.Module) and _is_denoiser(module):
            found[str(name)] = module
    if not found:
        names = (
            ", ".join(name for name, one in components.items() if isinstance(one, nn.Module)) or "no module"
        )
        raise OptionError(
            f"apply finds no video transformer among the components of {type(target).__name__} ({names}): give "
            "the module itself"
        )
    return found


def _is_denoiser(module: nn.Module) -> bool:
    """Whether a component is called with a time step and has repeated blocks, as no text encoder or VAE is."""
    inner: Any = _torch.uncompiled(module)
    return _takes_a_time_step(inner) and bool(_repeated_blocks(inner))


def _takes_a_time_step(module: nn.Module) -> bool:
    names = inspect.signature(module.forward).parameters
    return any(TIME_STEP.fullmatch(name.lower()) for name in names)


def _repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules of all lists in which a class occurs, outermost lists only."""
    found: list[nn.Module] = []

    def walk(one: nn.Module) -> None:
        for child in one.children():
            if isinstance(child, nn.ModuleList) and len(child) and any(True for _ in child[0].children()):
                found.extend(child)
            else:
                walk(child)

    walk(module)
    return found


def _native_attention(module: nn.Module) -> list[tuple[Any, Any]]:
    """Let diffusers' attention processors of a model call SDPA. Returns (processor, its backend before)."""
    processors: list[Any] = [getattr(one, "processor", None) for one in module.modules()]
    changed = [(one, one._attention_backend) for one in processors if hasattr(one, "_attention_backend")]
    for processor, _ in changed:
        processor._attention_backend = NATIVE
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    usual = dispatch._AttentionBackendRegistry.get_active_backend()[0] if dispatch else NATIVE
    names = {str(getattr(one, "value", one)) for one in (backend or usual for _, backend in changed)} - {
        NATIVE
    }
    if names:
        log.warning(
            "%s: its attention backend is now native, not %s, since the compiler reads calls of SDPA",
            type(module).__name__,
            ", ".join(sorted(names)),
        )
    return changed


def _named(prefix: str, plan: AttentionPlan) -> AttentionPlan:
    return replace(plan, site=replace(plan.site, name=prefix + plan.site.name))
