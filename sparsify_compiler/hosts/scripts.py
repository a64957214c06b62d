"""The video transformers of a script that knows nothing of this package: each becomes sparse at its first call.

Every class whose `forward` takes a time step gets a descriptor as its `_compiled_call_impl`, which PyTorch asks at
each call of a module. So it does not matter how the script makes its models, or puts them into pipelines. The first
call outside of other models that shows a video decides: `apply` then changes the model, together with the other
experts of its pipeline. Models of images and all other modules stay as they are.

The script's own `torch.compile` of a video transformer waits for this decision too. Its mode and backend are kept;
where no video is seen, it is done as the script said.
"""

import functools
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.names import COMPILED_CALL, TIME_STEP

log = logging.getLogger("sparsify_compiler")
_NO_CALL = (
    "sparsify: no sparse call: the script called no video transformer, that is, no module with repeated blocks, "
    "a time step and a video among its inputs. Models that the script itself gives to sparsify, or calls in "
    "functions that it compiles, are not counted"
)


class _FirstCall:
    """The `_compiled_call_impl` of classes whose modules may be video transformers."""

    def __init__(self, script: "Script") -> None:
        self.script = script

    def __get__(self, module: nn.Module | None, owner: type) -> Callable[..., Any] | None:
        if module is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        return self.script.first_call(module)


@dataclass(slots=True, eq=False)
class _Changed:
    """A model that became sparse. Only its measurements outlive it."""

    name: str
    model: Any
    """Its `AppliedModel`; None once it exists no longer."""
    ended: Any = None
    """Its last video, a `ModelRun`, once it exists no longer."""

    @property
    def last_run(self) -> Any:
        """Its last video, a `ModelRun`."""
        from sparsify_compiler.page import run_of

        return self.ended if self.model is None else run_of(self.model, self.name)

    def end(self, wanted: bool) -> None:
        """Keep the last video, if it is wanted, and drop the state of the model."""
        if self.model is not None:
            self.ended = self.last_run if wanted else None
            self.model = None


@dataclass(slots=True, eq=False)
class Script:
    """The models of the script that runs, and what becomes of them."""

    options: Mapping[str, Any]
    """The options of the backend."""
    regional: bool | None = None
    mode: str | None = None
    reports: bool = False
    """Whether a report is wanted of models that are deleted before the script ends."""
    changed: list[_Changed] = field(default_factory=list)
    _denoisers: "weakref.WeakKeyDictionary[nn.Module, bool]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    """Module -> whether it may be a video transformer; False also for those that are left alone."""
    _compiles: "weakref.WeakKeyDictionary[nn.Module, dict[str, Any]]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    """Module -> the arguments with which the script compiles it."""
    _compile: Any = None
    """PyTorch's own `torch.compile`."""
    _lock: Any = field(default_factory=threading.RLock)

    def watch(self) -> None:
        """Watch the classes of modules that are made from now on, and `torch.compile`."""
        if self.options.get("parallel") is not None:
            from sparsify_compiler.parallel.group import start_rank

            start_rank()
        first_call = _FirstCall(self)

        def init_subclass(cls: type[nn.Module], **kwargs: Any) -> None:
            super(nn.Module, cls).__init_subclass__(**kwargs)
            if _may_take_a_time_step(cls):
                setattr(cls, COMPILED_CALL, first_call)

        nn.Module.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]
        self._compile = torch.compile

        @functools.wraps(torch.compile)
        def compile(model: Any = None, *args: Any, **kwargs: Any) -> Any:
            if model is None:
                return lambda model: compile(model, *args, **kwargs)
            return self._compiled(model, args, kwargs)

        torch.compile = compile

    def report(self) -> str:
        """The measurements of all models, or why there are none."""
        return "\n".join([_report(one.last_run) for one in self.changed] or [_NO_CALL])

    def write_page(self, path: str) -> str:
        """Write the page on all models. Return a line for the log."""
        from sparsify_compiler.errors import SparsifyError
        from sparsify_compiler.page import write

        if not self.changed:
            return _NO_CALL
        try:
            return f"sparsify: report: {write(path, [one.last_run for one in self.changed])}"
        except (SparsifyError, OSError) as error:
            return f"sparsify: no report: {error}"

    def first_call(self, module: nn.Module) -> Callable[..., Any] | None:
        """The function that runs a call of a module about which nothing is decided; None to run it as it is."""
        return partial(self._call, module) if self._is_denoiser(module) and not _in_a_model() else None

    def _is_denoiser(self, module: nn.Module) -> bool:
        if module not in self._denoisers:
            from sparsify_compiler.hosts.apply import is_denoiser

            self._denoisers[module] = is_denoiser(module)
        return self._denoisers[module]

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            if not self._is_open(module):
                decided = True  # by another thread
            elif decided := shows_a_video(module, args, kwargs):
                backend = self._compiles.get(module, {}).get("backend")
                if backend is None or isinstance(backend, str):
                    self._change(module)
                else:
                    log_lines()
                    log.warning(
                        "%s stays dense: the script compiles it by a backend of its own",
                        type(module).__name__,
                    )
                    self._leave(module)
            elif decided := module in self._compiles:
                self._leave(module)
        return module(*args, **kwargs) if decided else module._call_impl(*args, **kwargs)

    def _call_in_place(self, module: "weakref.ref[nn.Module]", *args: Any, **kwargs: Any) -> Any:
        """The call of a module that the script compiled in place."""
        one = module()
        assert one is not None, "the module calls its own hook"
        return one._call_impl(*args, **kwargs) if _in_a_model() else self._call(one, *args, **kwargs)

    def _compiled(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of `torch.compile` in the script."""
        from sparsify_compiler._torch import wrapped
        from sparsify_compiler.hosts.pipelines import unwrapped

        is_call = isinstance(model, MethodType) and isinstance(model.__self__, nn.Module)
        if is_call and model.__name__ not in ("_call_impl", "_wrapped_call_impl", "__call__", "forward"):
            return self._compile(model, *args, **kwargs)
        target = model.__self__ if is_call else model
        if not isinstance(target, nn.Module):
            return self._compile(model, *args, **kwargs)
        module = unwrapped(target)
        if kwargs.get("backend") == "sparsify":
            self._denoisers[module] = False
        if not self._is_denoiser(module) or kwargs.get("disable"):
            self._compiles[module] = kwargs
            return self._compile(model, *args, **kwargs)
        self._compile(_nothing, *args, **kwargs)  # raises the errors of wrong arguments
        hook = module.__dict__.get(COMPILED_CALL)
        if not isinstance(hook, _hook()):
            self._compiles[module] = kwargs
            hook = partial(self._call_in_place, weakref.ref(module))
        elif kwargs.get("mode") is not None and self.mode is None:
            log.warning(
                "%s was called before torch.compile: mode=%r comes too late, give --mode",
                type(module).__name__,
                kwargs["mode"],
            )
        if not is_call:
            return target if target is not module else wrapped(module)
        return hook if model.__name__ == "_call_impl" else _Forward(module, model)

    def _change(self, module: nn.Module) -> None:
        """Make a model sparse, and with it the others of its class in the same pipeline."""
        from sparsify_compiler.hosts.apply import apply

        log_lines()
        if self.options.get("parallel") is not None:
            from sparsify_compiler.parallel.group import join_ranks

            join_ranks()
        alike: list[tuple[dict[str, Any], dict[str, nn.Module]]] = []
        """(arguments of `apply`, models that get them), which share one clock."""
        for name, one in self._experts(module).items():
            arguments = self._arguments(one)
            for others, models in alike:
                if others == arguments:
                    models[name] = one
                    break
            else:
                alike.append((arguments, {name: one}))
        for arguments, models in alike:
            changed = apply(models[""] if "" in models else SimpleNamespace(components=models), **arguments)
            for model, (name, one) in zip(changed.models, models.items(), strict=True):
                kind = type(one).__name__
                entry = _Changed(f"{name} ({kind})" if name else kind, model)
                self.changed.append(entry)
                weakref.finalize(one, entry.end, self.reports).atexit = False

    def _arguments(self, module: nn.Module) -> dict[str, Any]:
        """The arguments of `apply` for a model: the user's, and then those of the script's own compilation."""
        kwargs, in_blocks = self._taken_back(module)
        arguments = dict(self.options)
        backend = kwargs.get("backend") or "inductor"
        if backend != "inductor":
            arguments.setdefault("inner_backend", backend)
        if kwargs.get("options"):
            log.warning("%s: the options of the script's torch.compile are left out", type(module).__name__)
        arguments["regional"] = (in_blocks or None) if self.regional is None else self.regional
        arguments["mode"] = self.mode or kwargs.get("mode")
        return arguments

    def _experts(self, module: nn.Module) -> dict[str, nn.Module]:
        """Name -> module, for a module and those of its class that the same pipeline calls in turn with it."""
        from sparsify_compiler.hosts.pipelines import callers, unwrapped

        for caller in callers(module):
            if caller.owner is not None:
                owned = {
                    name: unwrapped(one)
                    for name, one in vars(caller.owner).items()
                    if isinstance(one, nn.Module)
                }
                return {
                    name: one
                    for name, one in owned.items()
                    if one is module or (type(one) is type(module) and self._is_open(one))
                }
        return {"": module}

    def _is_open(self, module: nn.Module) -> bool:
        return self._is_denoiser(module) and not isinstance(module.__dict__.get(COMPILED_CALL), _hook())

    def _taken_back(self, module: nn.Module) -> tuple[dict[str, Any], bool]:
        """Take back what the script compiled of a model. Return (arguments, whether it compiled its blocks)."""
        from sparsify_compiler.hosts.pipelines import unwrapped

        kwargs, in_blocks = self._compiles.pop(module, {}), False
        module.__dict__.pop(COMPILED_CALL, None)
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.__dict__["forward"]
        for one in list(module.modules()):
            for name, child in list(one._modules.items()):
                inner = child if child is None else unwrapped(child)
                if inner is not None and inner in self._compiles:
                    one._modules[name] = inner
                    inner.__dict__.pop(COMPILED_CALL, None)
                    kwargs = {**self._compiles.pop(inner), **kwargs}
                    in_blocks |= isinstance(one, nn.ModuleList)
        return kwargs, in_blocks

    def _leave(self, module: nn.Module) -> None:
        """Compile a module that is called without a video, as the script said."""
        self._denoisers[module] = False
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.__dict__["forward"]
        module.__dict__[COMPILED_CALL] = self._compile(module._call_impl, **self._compiles.pop(module))


class _Forward:
    """The `forward` of a model that the script compiles: a call of it is a call of the model."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.forward = module, forward
        functools.update_wrapper(self, forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _in_a_model():
            return self.forward(*args, **kwargs)
        return self.module(*args, **kwargs)


def _nothing() -> None:
    pass


def _in_a_model() -> bool:
    """Whether the call of an applied model runs; nothing is imported for it."""
    call = sys.modules.get("sparsify_compiler.runtime.call")
    return call is not None and call.open_call() is not None


def _hook() -> type:
    from sparsify_compiler.runtime.call import Hook

    return Hook


def _may_take_a_time_step(cls: type) -> bool:
    """Whether a class defines a `forward` with an argument that is named like a time step."""
    forward = cls.__dict__.get("forward")
    if forward is None:
        return False
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None:
        return False
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return any(TIME_STEP.fullmatch(name.lower()) for name in names)


def shows_a_video(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gets a video of more than one frame: latents, a number of frames, or positions.

    Images have latents of four dimensions, or one frame.
    """
    try:
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        named = {str(place): value for place, value in enumerate(args)} | dict(kwargs)
    rest = named.get("kwargs")
    named = {**named, **rest} if isinstance(rest, dict) else named
    return any(
        isinstance(value, int) and value > 1 if "frames" in name else _is_a_video(value)
        for name, value in named.items()
    )


def _is_a_video(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        if len(value) == 3 and all(isinstance(one, int) for one in value):
            return all(one > 1 for one in value)  # frames, rows and columns
        return any(
            one.dim() == 4 and one.shape[1] > 1 if isinstance(one, Tensor) else _is_a_video(one)
            for one in value
        )
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        return False
    if value.dim() == 5:
        return value.shape[1] > 1 and value.shape[2] > 1
    if value.dim() in (2, 3) and value.shape[-1] in (3, 4) and value.numel() > 8 * value.shape[-1]:
        places = value.detach().flatten(0, -2)[:, :3]  # frame, row and column of each token
        return bool((places.amax(0) > places.amin(0)).all())
    return False


def log_lines() -> None:
    """Let the lines of the log go to stderr, whatever the script does with its own log."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("sparsify: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _report(run: Any) -> str:
    """The measurements of a model, or why there are none. `run`: its last video, a `ModelRun`."""
    if run.stats is None:
        return f"sparsify: no sparse call of {run.name} was recorded: {_why(run.explanation.plans)}"
    if not run.stats.measurements and not run.stats.guarded:
        return (
            f"sparsify: no sparse call of {run.name}: all {run.stats.dense_calls} calls of its last video are "
            "among the first steps, which stay dense (--option dense_steps=)"
        )
    return f"sparsify: the last video of {run.name}\n{run.stats}"


def _why(plans: Iterable[Any]) -> str:
    plans = list(plans)
    if any(plan.method != "dense" for plan in plans):
        return "the calls need gradients, under which nothing is measured; use torch.no_grad()"
    reasons = dict.fromkeys(plan.reason for plan in plans)
    return "; ".join(reasons) or "no call of it ended"
