"""`apply`: sparse attention in every video transformer of a pipeline, in place."""

import inspect
import logging
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from sparsify_compiler import _torch, page
from sparsify_compiler.backend import configure, sparsify
from sparsify_compiler.config import CUDA_GRAPHS
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.explanation import Explanation
from sparsify_compiler.hosts.blocks import Block, Changes, WholeOrBlocks, call_of, repeated_blocks
from sparsify_compiler.hosts.pipelines import video_of
from sparsify_compiler.hosts.whole import NATIVE, analyse
from sparsify_compiler.measured import RunStats, stats_of
from sparsify_compiler.names import COMPILED_CALL, TIME_STEP
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.call import AppliedModel, Hook
from sparsify_compiler.runtime.clock import PerGeneration, StepClock

log = logging.getLogger("sparsify_compiler")
_OF_IMAGES = re.compile("2D|UNet")


@dataclass(slots=True, eq=False)
class _Attention:
    """The attention backend of diffusers, which is native while a model is applied: the compiler reads SDPA."""

    kind: str
    """The class of the model, for messages."""
    owners: list["weakref.ref[Any]"]
    """The modules with an attention processor that has a backend."""
    replaced: list[tuple[Any, Any]] = field(default_factory=list)
    """(attention processor, the backend that a script set), in order."""

    @classmethod
    def of(cls, model: nn.Module) -> "_Attention":
        """The backend of a model."""
        owners = [
            weakref.ref(one)
            for one in model.modules()
            if hasattr(getattr(one, "processor", None), "_attention_backend")
        ]
        return cls(type(model).__name__, owners)

    def use_native(self) -> None:
        """Let all processors call SDPA, and say so if they called something else."""
        before = len(self.replaced)
        for owner in self.owners:
            processor: Any = getattr(owner(), "processor", None)
            if getattr(processor, "_attention_backend", NATIVE) != NATIVE:
                self.replaced.append((processor, processor._attention_backend))
                processor._attention_backend = NATIVE
        if len(self.replaced) > before:
            dispatch = sys.modules.get("diffusers.models.attention_dispatch")
            usual = dispatch._AttentionBackendRegistry.get_active_backend()[0] if dispatch else NATIVE
            asked = (backend or usual for _, backend in self.replaced[before:])
            if names := {str(getattr(one, "value", one)) for one in asked} - {NATIVE}:
                log.warning(
                    "%s: its attention backend is now native, not %s, since the compiler reads calls of SDPA",
                    self.kind,
                    ", ".join(sorted(names)),
                )

    def undo(self) -> None:
        """Give every processor the backend that a script set last."""
        for processor, backend in dict(self.replaced).items():
            if processor._attention_backend == NATIVE:  # else a script has set another since the last call
                processor._attention_backend = backend
        self.replaced = []


@dataclass(slots=True, eq=False)
class Applied:
    """The changes of one `apply`."""

    models: tuple[AppliedModel, ...]
    _changes: Changes
    _attention: tuple[_Attention, ...]

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
                one = stats_of([model.state])
            except SparsifyError as error:
                errors.append(error)
                continue
            prefix = f"{model.name}." if len(self.models) > 1 else ""
            measured = tuple(replace(m, site=prefix + m.site) for m in one.measurements)
            guarded = tuple((prefix + site, times) for site, times in one.guarded)
            example = one.example and replace(one.example, site=prefix + one.example.site)
            found.append(replace(one, measurements=measured, guarded=guarded, example=example))
        if not found:
            raise errors[0]
        return RunStats(
            tuple(m for one in found for m in one.measurements),
            sum(one.dense_calls for one in found),
            tuple(site for one in found for site in one.guarded),
            tuple(time for one in found for time in one.times),
            next((one.example for one in found if one.example is not None), None),
        )

    def explain(self) -> Explanation:
        """The plan of every attention in the last call of each model, with its reason.

        Raises:
            SparsifyError: no model was called yet.
        """
        if not any(model.graphs or model.outside for model in self.models):
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

    def report(self, path: str | Path) -> Path:
        """Write a page on the last video: times, densities, masks, what stayed dense, and why.

        Args:
            path: an HTML file in a folder that exists. The page is one file, and loads nothing from elsewhere.

        Returns:
            The path.

        Raises:
            OptionError: the path cannot be written to.
            SparsifyError: no model was called yet.
        """
        kinds = (one.kind for one in self._attention)
        named = zip(self.models, kinds, strict=True)
        return page.write(
            path, [page.run_of(one, f"{one.name} ({kind})" if one.name else kind) for one, kind in named]
        )

    def restore(self) -> None:
        """Make the models what they were before `apply`. A second call does nothing."""
        self._changes.undo()
        for one in self._attention:
            one.undo()


def apply(target: Any, *, regional: bool | None = None, mode: str | None = None, **options: Any) -> Applied:
    """Make the attention of a pipeline or model sparse, in place.

    Every video transformer is compiled at its next call.
    Hooks that a script sets before or after (offloading, caching, casting) still work.

    Args:
        target: a module, or an object whose `components` is a dict of name -> module, such as a pipeline of
            diffusers. Of the components, every video transformer is changed; they share one generation.
        regional: whether the repeated blocks of each model are compiled instead of the model, each distinct
            block once. None compiles the whole model where Dynamo can make one graph of it, else the blocks.
        mode: the mode of torch.compile.
        options: the options of the backend.

    Raises:
        OptionError: an option is wrong, or the target has no module to change.
        SparsifyError: a model was compiled or applied before.
    """
    if "options" in options:
        raise OptionError(
            "apply takes the options of the backend as keywords, such as method='svg2', got options="
        )
    config = configure(options)
    if regional not in (None, True, False):
        raise OptionError(f"regional must be True, False or None, got {regional!r}")
    _torch.check_mode(mode)
    if config.parallel is not None:
        config.parallel.check_mode(mode, regional=regional)
    found = _video_transformers(target)
    for name, module in found.items():
        _check_unchanged(name or type(module).__name__, module)
    by_blocks = regional is not False and config.parallel is None
    blocks = {name: repeated_blocks(module) if by_blocks else [] for name, module in found.items()}
    for name, module in found.items():
        if regional and not blocks[name]:
            raise OptionError(
                f"regional=True needs repeated blocks, and {type(module).__name__} has no list of modules of one "
                "class: leave out regional"
            )
    clocks = PerGeneration(StepClock)
    changes = Changes(partial(sparsify, options=options, mode=mode))
    models: list[AppliedModel] = []
    attention: list[_Attention] = []
    _keep_hooks()
    for hook in (Hook.__call__, Block.__call__):
        _torch.never_compile(hook)
    for name, module in found.items():
        native = _Attention.of(module)
        native.use_native()
        attention.append(native)
        model = AppliedModel(
            weakref.ref(module),
            name,
            clocks,
            partial(analyse, config=config),
            changes.compile_apart,
            native.use_native,
            video_of,
            parts_only=bool(regional),
            checks_grid=config.grid is not None,
            replays=mode in CUDA_GRAPHS,
            options=options,
        )
        run: Callable[..., Any]
        if regional:
            for block in blocks[name]:
                changes.compile_apart(block)
            run = call_of
        elif config.parallel is None:
            run = WholeOrBlocks(model, changes, by_blocks=bool(blocks[name]))
        else:
            run = changes.compiled(module)
        changes.put(module, Hook(model, run))
        models.append(model)
    return Applied(tuple(models), changes, tuple(attention))


def _is_ours(module: nn.Module) -> bool:
    """Whether `module.compile()` would remove a hook of `apply`; if so, warn that it does nothing."""
    ours = isinstance(module.__dict__.get(COMPILED_CALL), (Hook, Block))
    if ours:
        log.warning(
            "%s.compile() does nothing: apply compiles it already. Give apply the mode, or call restore() first",
            type(module).__name__,
        )
    return ours


@cache
def _keep_hooks() -> None:
    """Let `module.compile()` leave the hooks of `apply` in place from now on."""
    _torch.on_compile(_is_ours)


def _check_unchanged(name: str, module: nn.Module) -> None:
    for path, one in module.named_modules():
        call = one.__dict__.get(COMPILED_CALL)
        where = f"{name}.{path}" if path else name
        if isinstance(call, (Hook, Block)):
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
    if isinstance(target, type):
        raise OptionError(f"apply needs an instance, got the class {target.__name__}")
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise OptionError(
            f"apply needs a module or a pipeline with a dict of components, got {type(target).__name__}"
        )
    found: dict[str, nn.Module] = {}
    for name, module in components.items():
        if (
            isinstance(module, nn.Module)
            and is_denoiser(module)
            and not any(module is one for one in found.values())
        ):
            found[str(name)] = module
    if not found:
        names = (
            ", ".join(
                f"{name}: {type(one).__name__}"
                for name, one in components.items()
                if isinstance(one, nn.Module)
            )
            or "no module"
        )
        raise OptionError(
            f"apply finds no video transformer among the components of {type(target).__name__} ({names}): give "
            "the module itself"
        )
    return found


def is_denoiser(module: nn.Module) -> bool:
    """Whether a component is called with a time step and has repeated blocks, as no text encoder or VAE is.

    Image models of diffusers do too: their names say that they are 2-D, or a UNet.
    """
    inner: Any = _torch.uncompiled(module)
    if _OF_IMAGES.search(type(inner).__name__):
        return False
    return _takes_a_time_step(inner) and bool(repeated_blocks(inner))


def _takes_a_time_step(module: nn.Module) -> bool:
    names = inspect.signature(module.forward).parameters
    return any(TIME_STEP.fullmatch(name.lower()) for name in names)


def _named(prefix: str, plan: AttentionPlan) -> AttentionPlan:
    return replace(plan, site=replace(plan.site, name=prefix + plan.site.name))
