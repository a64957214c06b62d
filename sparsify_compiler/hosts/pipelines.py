"""The videos of pipelines: their number of steps, read from the scheduler of whoever calls the model.

Nothing is patched. The frames above the call of a model belong to a pipeline or to a loop of a script, and hold its
scheduler. `set_timesteps` makes a new tensor of time steps for every call of a pipeline, so this tensor identifies
the video: all models that are called at its time steps share one `Generation`.

A scheduler may be stale: a script may loop over times of its own. So its tensor is believed only where the time
step of the call lies in it, or where a pipeline's own code calls the model and the scheduler moves on from call to
call.
"""

import inspect
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsify_compiler.runtime.call import ModelCall
from sparsify_compiler.runtime.clock import Generation, Times, generation, opened

_NO_OWNERS = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
"""Objects whose attributes are not searched for a model and a scheduler."""


class Caller(NamedTuple):
    """An owner of a scheduler above the call of a model."""

    scheduler: Any
    owner: object | None
    """The object that has the model among its attributes; None if only variables hold it."""
    is_own_code: bool
    """Whether a method of the owner runs, such as `__call__` of a pipeline."""


@dataclass(slots=True, eq=False)
class _Video:
    """The calls of models at the time steps of one tensor."""

    handle: Generation
    times: tuple[float, ...]
    by_value: bool
    """Whether the time steps of calls are those of the scheduler, perhaps scaled or rounded."""
    time: Times
    """The time steps of the last call."""
    index: int
    """The place of the scheduler at the last call."""


_videos: dict[int, tuple["weakref.ref[Tensor]", _Video]] = {}
"""id of a scheduler's tensor of time steps -> (reference that removes the entry, video)."""


def video_of(call: ModelCall) -> AbstractContextManager[Any]:
    """The generation of the scheduler's video that a call belongs to, to be open while the model runs.

    An open `generation` of the user stays the open one, and where no scheduler is known the clock estimates.
    """
    time = None if opened() is not None else call.numbers[0]
    if time is None or call.time_name is None:
        return nullcontext()
    dtype = getattr(call.named[call.time_name], "dtype", torch.float64)
    for caller in callers(call.module):
        times = caller.scheduler.timesteps
        _, video = _videos.get(id(times), (None, None))
        if video is None:
            video = _begin(caller, time, dtype)
            if video is not None:
                _keep(times, video)
        elif not _continues(video, caller.scheduler, time, dtype):
            video = None
        if video is not None:
            return video.handle
    return nullcontext()


def _keep(times: Tensor, video: _Video) -> None:
    key = id(times)
    _videos[key] = weakref.ref(times, lambda _: _videos.pop(key, None)), video


def callers(module: nn.Module) -> Iterator[Caller]:
    """The schedulers of the frames that lead to the call of a module, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        first, values = _variables(frame)
        owners = [one for one in values if _holds(_attributes(one), module)]
        seen: set[int] = set()
        for owner in owners:
            for one in _attributes(owner).values():
                if _is_scheduler(one) and id(one) not in seen:
                    seen.add(id(one))
                    yield Caller(one, owner, owner is first)
        if owners or any(_is(one, module) for one in values):
            owner = owners[0] if len(owners) == 1 else None
            for one in values:
                if _is_scheduler(one) and id(one) not in seen:
                    seen.add(id(one))
                    yield Caller(one, owner, owner is not None and owner is first)
        frame = frame.f_back


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of those in which torch.compile and data parallelism wrap it."""
    while (inside := module.__dict__.get("_modules", {})).keys() & {"_orig_mod", "module"} and len(
        inside
    ) == 1:
        (module,) = inside.values()
    return module


def _variables(frame: FrameType) -> tuple[Any, list[Any]]:
    """(first argument, values of all local variables) of a frame."""
    variables, code = frame.f_locals, frame.f_code
    values = list(variables.values())
    first = variables.get(code.co_varnames[0]) if code.co_argcount else None
    # Before Python 3.13 a function's frame keeps this copy, and so the tensors in it, until the function ends.
    copied = code.co_flags & inspect.CO_OPTIMIZED and type(variables) is dict
    if copied and sys.getrefcount(variables) <= 3:  # no one else called `locals()`
        variables.clear()
    return first, values


def _attributes(one: object) -> Mapping[str, Any]:
    if isinstance(one, _NO_OWNERS):
        return {}
    found = getattr(one, "__dict__", None)
    return found if isinstance(found, dict) else {}


def _holds(attributes: Mapping[str, Any], module: nn.Module) -> bool:
    return any(_is(one, module) for one in list(attributes.values()))


def _is(one: object, module: nn.Module) -> bool:
    return one is module or (isinstance(one, nn.Module) and unwrapped(one) is module)


def _is_scheduler(one: object) -> bool:
    if isinstance(one, _NO_OWNERS) or not callable(getattr(type(one), "set_timesteps", None)):
        return False
    times = getattr(one, "timesteps", None)
    return isinstance(times, Tensor) and times.dim() == 1 and times.numel() > 0


def _begin(caller: Caller, time: Times, dtype: torch.dtype) -> _Video | None:
    """The video that a call begins at the time steps of a scheduler; None if the call is not at one of them."""
    scheduler = caller.scheduler
    times = tuple(map(float, scheduler.timesteps.tolist()))
    at = getattr(scheduler, "_step_index", None)
    start = at if at is not None else getattr(scheduler, "_begin_index", None)
    places = [place for place in range(len(times)) if _fits(scheduler, times[place], time, dtype)]
    fresh = hasattr(scheduler, "_step_index") and at is None and caller.is_own_code
    if start is not None and start >= len(times):
        return None
    if places:
        start = places[0] if start is None else start
        if start not in places:
            return None
    elif not fresh:
        return None
    rest = times[start or 0 :]
    # A solver of second order calls twice at a time step; time steps of others may be rounded to one number.
    steps = len(list(groupby(rest))) if getattr(scheduler, "order", 1) > 1 else len(rest)
    return _Video(generation(steps), times, bool(places), time, start or 0)


def _continues(video: _Video, scheduler: Any, time: Times, dtype: torch.dtype) -> bool:
    """Whether a call is one of a video: at a time step of the scheduler, which has not finished."""
    at = getattr(scheduler, "_step_index", None)
    if at is not None and at >= len(video.times):
        return False
    if time == video.time:
        return True
    if video.by_value:
        moves = any(_fits(scheduler, one, time, dtype) for one in video.times)
    else:
        moves = at is not None and at > video.index
    if moves:
        video.time, video.index = time, at or 0
    return moves


def _fits(scheduler: Any, of_scheduler: float, time: Times, dtype: torch.dtype) -> bool:
    """Whether a model may get a time step of a scheduler as `time`: rounded to `dtype`, or as a share of all."""
    share = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000
    for expected in (of_scheduler, of_scheduler / share):
        apart = torch.finfo(dtype).eps * abs(expected) if dtype.is_floating_point else 1.0
        if min(abs(time.largest - expected), abs(time.mean - expected)) <= max(apart, 1e-6 * abs(expected)):
            return True
    return False
