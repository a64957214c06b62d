"""What a user can set.

General options are the fields of `SparsifyConfig`; a method's own options are the fields of its dataclass in
`methods/`. Unknown names and wrong values are told apart by `OptionError`, before anything is compiled.
"""

import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any

from sparsify_compiler.errors import GridError, OptionError, unknown_choice


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifyConfig:
    """The options of one compilation, checked."""

    method: Any
    """The method with its settings, e.g. `Tile(reference_frames=2)`. Written `method="tile"` in options. Of every
    site, but where there is a policy."""
    policy: Any = None
    """A `Policy`, which says what each site does. Written as the path of its file in options."""
    grid: tuple[int, int, int] | None = None
    """(frames, height, width) of the video tokens, in place of what the graph says."""
    text: tuple[int, int] | None = None
    """(before, after): other tokens that come before and after the video's where they are in one sequence, beside
    `grid`."""
    provider: str = "auto"
    """Implementation of the attention op: `reference`, `cpu`, `triton`, or `auto` for the device's fastest."""
    far_field: str | None = None
    """What becomes of the keys that a query block does not read: `drop`, `mean`, `linear`; the method's if None."""
    dense_steps: int | float | None = None
    """First steps of a generation that stay dense: an integer, or a share in [0.0, 1.0]; the method's if None."""
    dense_layers: int | float | None = None
    """First attentions of a graph that stay dense, likewise."""
    measure_recall: float = 0.0
    """Share of the queries on which the true attention mass kept is measured, for `stats`."""
    offload_indices: bool = False
    """Whether, in training on a GPU, the long lists of the keys that `dsv` reads wait on the host for backward."""
    inner_backend: str = "inductor"
    """The backend the rewritten graph goes to: `inductor`, or `eager` / `aot_eager` for debugging."""
    dump: Path | None = None
    """A folder to write each pass's graph and time to."""

    def __post_init__(self) -> None:
        if self.grid is not None:
            object.__setattr__(self, "grid", _grid(self.grid))
        if self.text is not None:
            object.__setattr__(self, "text", _text(self.text))
            if self.grid is None:
                raise OptionError(
                    f"text says what is beside the grid: give grid too, got text={self.text!r} alone"
                )
        for name in ("dense_steps", "dense_layers"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _count_or_share(name, value))
        if share(self.measure_recall) is None:
            raise OptionError(f"measure_recall must be a share in [0, 1], got {self.measure_recall!r}")
        if not isinstance(self.offload_indices, bool):
            raise OptionError(f"offload_indices must be True or False, got {self.offload_indices!r}")
        if self.offload_indices and self.inner_backend != "inductor":
            raise OptionError(
                f"offload_indices needs inner_backend='inductor', which moves them, got {self.inner_backend!r}"
            )
        if self.dump is not None:
            if not isinstance(self.dump, (str, Path)) or not str(self.dump):
                raise OptionError(f"dump must be the path of a folder, got {self.dump!r}")
            object.__setattr__(self, "dump", Path(self.dump))


def integer(value: object) -> int | None:
    """`value` as an int if it is a whole number of any integer type, NumPy's too; None else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def share(value: object) -> float | None:
    """`value` as a float if it is a real number in [0, 1]; None else."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    return number if 0 <= number <= 1 else None


def _count_or_share(name: str, value: object) -> int | float:
    """An integer is a number, anything else a share; 1.0 is the whole."""
    count = integer(value)
    if count is not None and count >= 0:
        return count
    if count is None and (part := share(value)) is not None:
        return part
    raise OptionError(f"{name} must be an integer of at least 0 or a share in [0.0, 1.0], got {value!r}")


def _grid(value: object) -> tuple[int, int, int]:
    sizes = [integer(n) for n in value] if isinstance(value, (tuple, list)) else []
    if len(sizes) != 3 or any(n is None or n < 1 for n in sizes):
        raise GridError(f"grid must be three positive integers (frames, height, width), got {value!r}")
    return tuple(sizes)  # type: ignore[return-value]


CHECK_TABLES = os.environ.get("SPARSIFY_CHECK_TABLES", "0") not in ("", "0")
"""A switch for debugging, the environment variable SPARSIFY_CHECK_TABLES: whether ops on a GPU check every element
of a table before a kernel reads memory by it, as ops on a CPU always do. They then wait for the device at every
call, and CUDA graphs cannot be captured. Without it they check shapes, types and devices alone."""


def _text(value: object) -> tuple[int, int]:
    counts = [integer(n) for n in value] if isinstance(value, (tuple, list)) else []
    if len(counts) != 2 or any(n is None or n < 0 for n in counts):
        raise OptionError(f"text must be two integers (before, after) of at least 0, got {value!r}")
    return tuple(counts)  # type: ignore[return-value]


GENERAL = ("preset", *(f.name for f in fields(SparsifyConfig)))
"""Names of the options that belong to no method."""

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
"""Options by name: `svg2` as Sparse VideoGen2 was released for Wan (arXiv 2505.18875; HunyuanVideo: 10 % dense
steps, Wan image-to-video 35 %); `svg2-turbo` reads less, as its Turbo does, for which no settings were given."""


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(general options, options for the method), by name; those of a preset where none are given."""
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


def option_names(settings: type[Any]) -> tuple[str, ...]:
    """The options a method's dataclass takes."""
    return tuple(f.name for f in fields(settings))
