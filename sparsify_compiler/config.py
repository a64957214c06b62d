"""The options of a compilation.

General options are the fields of `SparsifyConfig`; the options of a method are the fields of its dataclass in
`methods/`. An unknown name or a wrong value raises `OptionError` before anything is compiled.
"""

import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

from sparsify_compiler.errors import GridError, OptionError, unknown_choice
from sparsify_compiler.plan import AttentionSite, Balance, Entry, Method, TokenLayout


class SitePolicy(Protocol):
    """The part of a `policy.Policy` that planning needs."""

    @property
    def advice(self) -> str:
        """The advice where every site stays dense; empty where one is sparse."""

    def of(self, sites: Sequence[tuple[AttentionSite, TokenLayout]]) -> Sequence[tuple[Entry, str]]:
        """(entry, reason) of each site of a graph; raises PolicyError."""


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes of torch.compile that make CUDA graphs."""
GUARDS = ("measured", "cached", "off")
"""Choices of the option `guard`, the default first."""
GUARD_VARIABLE = "SPARSIFY_GUARD"
"""The environment variable `SPARSIFY_GUARD` has the choice of the option `guard` where a program sets none:
`measured`, `cached` or `off`. The file of the guard lies next to torch.hub's directory, which `TORCH_HOME`
moves."""
FORMS = ("auto", "hcp", "scp", "hybrid")
"""Forms of sharing a model among ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """The way in which several ranks run one model."""

    form: str = "auto"
    """Ranks share the tokens in every form. `hcp`: they share the heads of every attention too. `scp`: each keeps
    its queries in attention, and gets the keys that these read. `hybrid`: heads inside of a host, queries across
    hosts. `auto`: `hybrid` for a mesh of two dimensions; otherwise `hcp`, or `scp` where it is predicted to take
    less time. Without a process group one process runs the model."""
    mesh: Any = None
    """The `DeviceMesh` of the ranks; None takes the default process group. It has one dimension; for `hybrid` it
    has two, hosts and the ranks of a host."""
    balance: Balance = "video"
    """When heads move between ranks, so that all have as much to compute: `video` plans once for each video, an
    integer n also after every n sparse steps, `off` leaves them where they are, evenly many on every rank."""
    timeout: float = 60.0
    """Seconds after which ranks give up on one that does not take part."""

    def check_mode(self, mode: str | None, *, regional: bool | None = None) -> None:
        """Raise OptionError where ranks cannot run what these arguments of `apply` compile."""
        if mode in CUDA_GRAPHS:
            raise OptionError(f"parallel does not work with CUDA graphs, got mode={mode!r}: leave out mode")
        if regional:
            raise OptionError("parallel shares a whole model, got regional=True: leave out one")

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown_choice("form of parallel", self.form, FORMS)
        steps = integer(self.balance)
        if steps is not None and steps < 1:
            raise OptionError(f"parallel's balance must be at least 1 step, got {self.balance!r}")
        if steps is not None:
            object.__setattr__(self, "balance", steps)
        elif self.balance not in ("video", "off"):
            raise unknown_choice("balance of parallel", self.balance, ("video", "off", "a number of steps"))
        dims, hybrid = getattr(self.mesh, "ndim", None), self.form == "hybrid"
        if hybrid and dims != 2:
            raise OptionError(
                "parallel's form 'hybrid' needs a DeviceMesh of two dimensions, hosts and the ranks of a host, "
                f"got mesh={self.mesh!r}: torch.distributed.device_mesh.init_device_mesh makes one"
            )
        if self.mesh is not None and dims != 1 and not (dims == 2 and self.form in ("auto", "hybrid")):
            raise OptionError(
                f"parallel's mesh must be a DeviceMesh of one dimension, got {self.mesh!r}: take one of its "
                "dimensions by name, mesh['cp']"
            )
        if (
            isinstance(self.timeout, bool)
            or not isinstance(self.timeout, Real)
            or not 0 < self.timeout < math.inf
        ):
            raise OptionError(
                f"parallel's timeout must be a positive number of seconds, got {self.timeout!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifyConfig:
    """The options of one compilation, checked."""

    method: Method | None
    """The method, which decides what each attention reads. Options give its name; the config holds its
    dataclass with all settings, or None with a policy."""
    policy: SitePolicy | None = None
    """A policy gives every attention a method of its own. Options give the path of its file, or a `Policy`.
    It replaces `method`, the method's options, `preset`, `far_field` and `dense_layers`."""
    grid: tuple[int, int, int] | None = None
    """(frames, height, width) of the video tokens. Give it where the graph does not show the grid: packed
    tokens, or blocks that are compiled one by one. It holds for every attention over that number of tokens,
    and replaces a grid that the graph shows. Attention whose queries and keys are not the same tokens stays dense.
    Compiling fails if the grid fits no attention."""
    text: tuple[int, int] | None = None
    """(before, after): the numbers of other tokens before and after the video tokens in one sequence. Give it
    where the graph does not show them. It needs `grid`."""
    provider: str = "auto"
    """The implementation of the ops: `cpu` (C++), `triton`, `reference` (plain torch), or `auto`, the fastest
    one for the device. A provider given by name runs or raises an error."""
    far_field: str | None = None
    """The approximation of the keys that a query block skips. `drop` leaves them out. `mean` adds one virtual
    key for each block, the mean of its keys. `linear` adds the first order of their scores too. `keys` and
    `dsv` approximate the skipped keys of each cube of 4 x 2 x 2 tokens. None takes the method's default."""
    dense_steps: int | float | None = None
    """The first steps of a generation that stay dense: an integer, or a share of the steps in [0.0, 1.0].
    None takes the method's default."""
    dense_layers: int | float | None = None
    """The first attentions of the model that stay dense: an integer, or a share of them in [0.0, 1.0]. None
    takes the method's default."""
    measure_recall: float = 0.0
    """The share of the queries, in [0, 1], on which the attention mass that was truly kept is measured. `stats`
    shows it as recall. A far field needs a few rows anyway, so at 0 its recall is that of these rows."""
    offload_indices: bool = False
    """In training on a GPU, whether the long index lists of `dsv` stay in host memory between the forward and
    the backward pass. It needs `inner_backend="inductor"`. It was not tried on a GPU yet."""
    parallel: Parallel | None = None
    """Several ranks run one model: `"auto"`, or a dict of `form`, `mesh`, `balance` and `timeout`. All ranks call
    the model with the same inputs and get its whole output. None leaves the model to one process."""
    guard: str | None = None
    """Whether attention runs dense where that takes less time. `measured` times dense and sparse attention of
    every distinct site at its second sparse call, and keeps the times in a file for this machine. `cached` decides
    by this file alone and never times, as `measured` does in training, with CUDA graphs, and where torch must be
    deterministic. `off` runs sparse what the other options make sparse. None takes the environment variable
    `SPARSIFY_GUARD`, and `measured` where it is not set."""
    inner_backend: str = "inductor"
    """The backend that compiles the rewritten graph: `inductor`, or `eager` and `aot_eager` for debugging."""
    dump: Path | None = None
    """A folder for the graph and the time of every pass."""

    def __post_init__(self) -> None:
        if self.grid is not None:
            object.__setattr__(self, "grid", _grid(self.grid))
        if self.text is not None:
            object.__setattr__(self, "text", _text(self.text))
            if self.grid is None:
                raise OptionError(
                    f"text gives the tokens around the grid and needs it: give grid too, got text={self.text!r}"
                )
        for name in ("dense_steps", "dense_layers"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _count_or_share(name, value))
        if share(self.measure_recall) is None:
            raise OptionError(f"measure_recall must be a share in [0, 1], got {self.measure_recall!r}")
        if not isinstance(self.offload_indices, bool):
            raise OptionError(f"offload_indices must be True or False, got {self.offload_indices!r}")
        source = "guard"
        if self.guard is None:
            source = f"{source} in the environment variable {GUARD_VARIABLE}"
            object.__setattr__(self, "guard", os.environ.get(GUARD_VARIABLE) or GUARDS[0])
        if self.guard not in GUARDS:
            raise unknown_choice(source, self.guard, GUARDS)
        if self.offload_indices and self.inner_backend != "inductor":
            raise OptionError(
                f"offload_indices needs inner_backend='inductor', which moves the lists, got {self.inner_backend!r}"
            )
        if self.parallel is not None:
            object.__setattr__(self, "parallel", _parallel(self.parallel))
        if self.dump is not None:
            if not isinstance(self.dump, (str, Path)) or not str(self.dump):
                raise OptionError(f"dump must be the path of a folder, got {self.dump!r}")
            object.__setattr__(self, "dump", Path(self.dump))


def integer(value: object) -> int | None:
    """`value` as an int if it is a whole number of any integer type, also NumPy's; otherwise None."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of another type
        return None


def integers(value: object, *, least: int) -> tuple[int, ...]:
    """`value` as ints if it is a tuple or list of integers of at least `least`; otherwise empty."""
    numbers = [integer(number) for number in value] if isinstance(value, (tuple, list)) else []
    found = tuple(number for number in numbers if number is not None and number >= least)
    return found if len(found) == len(numbers) else ()


def share(value: object) -> float | None:
    """`value` as a float if it is a real number in [0, 1]; otherwise None."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    return number if 0 <= number <= 1 else None


def _count_or_share(name: str, value: object) -> int | float:
    """`value` as a number if it is an integer, otherwise as a share; 1.0 is the whole."""
    count = integer(value)
    if count is not None and count >= 0:
        return count
    if count is None and (part := share(value)) is not None:
        return part
    raise OptionError(f"{name} must be an integer of at least 0 or a share in [0.0, 1.0], got {value!r}")


def _parallel(value: object) -> Parallel:
    if isinstance(value, Parallel):
        return value
    if value == "auto":
        return Parallel()
    names = tuple(f.name for f in fields(Parallel))
    if not isinstance(value, Mapping):
        raise OptionError(f"parallel must be 'auto' or a dict of {', '.join(names)}, got {value!r}")
    for name in value:
        if name not in names:
            raise unknown_choice("option of parallel", name, names)
    return Parallel(**value)


def _grid(value: object) -> tuple[int, int, int]:
    sizes = integers(value, least=1)
    if len(sizes) != 3:
        raise GridError(f"grid must be three positive integers (frames, height, width), got {value!r}")
    frames, height, width = sizes
    return frames, height, width


CHECK_TABLES = os.environ.get("SPARSIFY_CHECK_TABLES", "0") not in ("", "0")
"""The environment variable `SPARSIFY_CHECK_TABLES`, a switch for debugging. With the value 1, ops on a GPU
check every element of a table before a kernel reads memory through it, as ops on a CPU always do. Every call
then waits for the device, and CUDA graphs cannot be captured. Without it, ops on a GPU check shapes, types
and devices only."""


def _text(value: object) -> tuple[int, int]:
    counts = integers(value, least=0)
    if len(counts) != 2:
        raise OptionError(f"text must be two integers (before, after) of at least 0, got {value!r}")
    before, after = counts
    return before, after


GENERAL = ("preset", *(f.name for f in fields(SparsifyConfig)))
"""The names of the options of all methods."""

_SVG2 = {
    "method": "svg2",
    "far_field": "drop",
    "kmeans_iters": (50, 2),
    "dense_steps": 0.2,
    "dense_layers": 0.03,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "svg2": {**_SVG2, "top_p": 0.9, "min_kv_ratio": 0.1},
    "svg2-turbo": {**_SVG2, "top_p": 0.7, "min_kv_ratio": 0.05},
}
"""Named sets of options; options given next to a preset override it. `svg2` has the settings with which
Sparse VideoGen2 (arXiv 2505.18875) was released for Wan; HunyuanVideo has 10 % dense steps there, Wan
image-to-video 35 %. `svg2-turbo` reads less, like the paper's Turbo, which was released without settings."""


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(general options, options of the method), by name. A preset gives those that are left out."""
    for name in options:
        if not isinstance(name, str):
            raise OptionError(f"option names must be strings, got {name!r}")
    if (preset := options.get("preset")) is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise unknown_choice("preset", preset, PRESETS)
        options = {**PRESETS[preset], **options}
    options = {name: value for name, value in options.items() if name != "preset"}
    general = {name: value for name, value in options.items() if name in GENERAL}
    return general, {name: value for name, value in options.items() if name not in GENERAL}


def option_names(method: type[Method]) -> tuple[str, ...]:
    """The names of a method's options."""
    return tuple(f.name for f in fields(method))
