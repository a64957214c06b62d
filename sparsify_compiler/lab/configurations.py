"""Configurations of `sparsify bench quality`: methods at matched densities, noise floors and policies.

`tile` takes the number of reference frames whose density is nearest. Short generations of another prompt find
the `top_p` of `svg2` and `cubes`, or their `min_gain` with the linear far field. `keys` and `dsv` have a
budget.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify_compiler.config import integer, share
from sparsify_compiler.errors import OptionError, unknown_choice
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.lab import files, world
from sparsify_compiler.lab.model import check_frames
from sparsify_compiler.methods.svg2 import clusters_for
from sparsify_compiler.methods.tile import frame_mask
from sparsify_compiler.policy import Policy

COMPARED = ("tile", "svg2", "cubes", "keys", "dsv")
DENSITIES = (0.1, 0.2, 0.3)
TUNED: Mapping[str, Mapping[str, Any]] = {
    "svg2": {"min_kv_ratio": 0.01},
    "cubes": {"cube": (4, 2, 2), "query_cube": (4, 2, 4), "min_kv_ratio": 0.01},
}
"""Methods that decide how much they read, with options that let them read less than every density."""
KEYS_CLUSTERS = 4
"""The number of query clusters of `keys` for each of `svg2`. At a small density many clusters choose keys best. The
default has fewer and reads more, which takes less time."""
TRIES, NEAR = 8, 0.03
"""Tries for a density, and the relative difference from the target that ends them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of a run."""

    seeds: int = 8
    """Videos for each configuration."""
    steps: int = 16
    dense_steps: int = 2
    frames: int = world.FRAMES
    densities: tuple[float, ...] = DENSITIES
    methods: tuple[str, ...] = COMPARED
    policies: tuple[Path, ...] = ()
    predictor: Path | None = None
    """File of the predictor of `dsv`; trained in the run if None."""

    def __post_init__(self) -> None:
        check_frames(self.frames, least=2)
        for name, least in (("seeds", 1), ("steps", 1), ("dense_steps", 0)):
            value = integer(getattr(self, name))
            if value is None or value < least:
                raise OptionError(
                    f"{name} must be an integer of at least {least}, got {getattr(self, name)!r}"
                )
        if self.dense_steps >= self.steps:
            raise OptionError(f"dense_steps must be less than the {self.steps} steps, got {self.dense_steps}")
        for density in self.densities:
            if not share(density):
                raise OptionError(f"density must be a share in (0, 1], got {density!r}")
        for method in self.methods:
            if method not in COMPARED:
                raise unknown_choice("method", method, COMPARED)
        for path in (*self.policies, *filter(None, (self.predictor,))):
            if not path.is_file():
                raise OptionError(
                    f"there is no file {str(path)!r}: give the path of one that `sparsify search` or training wrote"
                )
        for path in self.policies:
            for grid in {layer.mark.grid for layer in Policy.load(path).layers}:
                if grid[0] != self.frames:
                    raise OptionError(
                        f"{path} must be of {self.frames} frames, as the videos are, got {grid[0]}: search again"
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """Way to run the model, for one row."""

    name: str
    line: str | None = None
    """The line of the picture that has this point: method and far field; None for a noise floor."""
    target: float | None = None
    """The density to match."""
    options: Mapping[str, Any] | None = None
    """Options of torch.compile; None runs the plain model. A method of `TUNED` has no `reading` yet."""
    autocast: bool = False
    """Whether products of matrices are in bfloat16."""
    policy: Path | None = None
    predictor: Path | None = None

    @property
    def file(self) -> str | None:
        """Digest of the file that the row depends on."""
        path = self.policy or self.predictor
        return None if path is None else files.digest(path)


def configurations(settings: Settings, predictor: Path) -> list[Configuration]:
    """All rows: noise floors, methods at every density, policies."""
    frames = settings.frames
    tokens = frames * (world.HEIGHT // 4) * (world.WIDTH // 4)
    everything = {"method": "tile", "reference_frames": frames, "far_field": "drop", "dense_steps": 0}
    found = [
        Configuration(name="floor: another kernel", options=everything),
        Configuration(name="floor: bfloat16", autocast=True),
    ]
    for density in settings.densities:
        k, budget = nearest_tile(frames, density), {"kv_budget": float(density)}
        own: dict[str, Mapping[str, Any]] = {
            "tile": {"reference_frames": k},
            **TUNED,
            "keys": {**budget, "q_clusters": KEYS_CLUSTERS * clusters_for(tokens)[0]},
            "dsv": {"predictor": str(predictor), **budget},
        }
        found += [
            Configuration(
                name=f"{method} {f'{k}:{frames - k}' if method == 'tile' else density} {far_field}",
                line=f"{method} {far_field}",
                target=density,
                options={"method": method, **own[method], "far_field": far_field},
                predictor=predictor if method == "dsv" else None,
            )
            for method in settings.methods
            for far_field in FAR_FIELDS
        ]
    stems = [path.stem for path in settings.policies]
    for path in settings.policies:
        name = f"policy {path.stem if stems.count(path.stem) == 1 else path}"
        found.append(Configuration(name=name, line=name, options={"policy": str(path)}, policy=path))
    # Two densities may have the same nearest tile.
    return list({one.name: one for one in reversed(found)}.values())[::-1]


def nearest_tile(frames: int, density: float) -> int:
    """Reference frames of the tile with the nearest density."""
    return min(range(1, frames + 1), key=lambda k: abs(frame_mask(frames, k).float().mean().item() - density))


def reading(far_field: str, much: float) -> dict[str, float]:
    """Option with which a method of `TUNED` reads a part of the keys, from none (`much` 0) to all (1)."""
    return {"min_gain": 10.0 ** (1 - 7 * much)} if far_field == "linear" else {"top_p": much}


def find_reading(
    density_at: Callable[[float], float], target: float, known: dict[float, float], tries: int = TRIES
) -> float:
    """The value of `much` whose density comes nearest to a target.

    Each try lies between the nearest known values below and above the target. By turns it is the middle, and
    the place where the straight line through the logarithms of the densities meets the target, but never very
    near an end: a density may jump.

    Args:
        density_at: measures the density at a value of `much`; it does not fall.
        known: `much` -> density of earlier measurements; new ones are added.
    """

    def miss(much: float) -> float:
        return abs(math.log(known[much] / target))

    for attempt in range(tries):
        if known and miss(min(known, key=miss)) <= NEAR:
            break
        low = max(((p, d) for p, d in known.items() if d < target), default=(0.0, target / 4))
        high = min(((p, d) for p, d in known.items() if d >= target), default=(1.0, 1.0))
        width = math.log(high[1] / low[1])
        along = math.log(target / low[1]) / width if width > 0 and attempt % 2 == 0 else 0.5
        much = low[0] + min(0.85, max(0.15, along)) * (high[0] - low[0])
        known[much] = density_at(much)
    return min(known, key=miss)
