"""Read the files of `sparsify plan-parallel`: the description of a cluster, and recorded densities."""

import json
import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from sparsify_compiler.config import integer, share
from sparsify_compiler.errors import OptionError, SparsifyError, unknown_choice
from sparsify_compiler.runtime.cost import Cluster

UNITS: Mapping[str, tuple[str, float]] = {
    "memory": ("GB of a GPU", 1e9),
    "tflops": ("TFLOP/s of products outside of attention", 1e12),
    "attention_tflops": ("TFLOP/s of dense attention", 1e12),
    "sparse_tflops": ("TFLOP/s of sparse attention", 1e12),
    "memory_bandwidth": ("GB/s of a GPU's memory", 1e9),
    "inside": ("GB/s of a GPU to others of its host", 1e9),
    "between": ("GB/s of a GPU to other hosts", 1e9),
    "latency": ("microseconds of an exchange", 1e-6),
}
"""Key of a cluster's description -> what it measures, and the unit."""
_OTHERWISE = {"attention_tflops": "tflops", "sparse_tflops": "attention_tflops"}
"""Key that may be left out -> the key whose number it then has."""
_MAY_BE_ZERO = ("latency",)


def read_cluster(path: Path) -> Cluster:
    """The cluster that a YAML file describes, or a JSON file with the suffix `.json`.

    Raises:
        SparsifyError: the file cannot be read, a number is missing or wrong, or PyYAML is missing.
    """
    return cluster_of(_read(path, "cluster file"), f"cluster file {path}")


def cluster_of(given: Mapping[str, Any], source: str = "the cluster") -> Cluster:
    """The cluster with these numbers, in the units of `UNITS`, and its `hosts` and `gpus`.

    Raises:
        OptionError: a number is missing or wrong.
    """
    known = ("hosts", "gpus", *UNITS)
    for name in given:
        if name not in known:
            raise unknown_choice(f"key in {source}", name, known)
    counts = {}
    for name in ("hosts", "gpus"):
        found = integer(given.get(name))
        if found is None or found < 1:
            raise OptionError(
                f"{source} must have {name}, an integer of at least 1, got {_got(given.get(name))}"
            )
        counts[name] = found
    numbers: dict[str, float] = {}
    for name, (meaning, unit) in UNITS.items():
        value = given.get(name)
        if value is None and name in _OTHERWISE:
            numbers[name] = numbers[_OTHERWISE[name]]
            continue
        if value is None and name == "between" and counts["hosts"] == 1:
            numbers[name] = numbers["inside"]
            continue
        number = _number(value)
        if not (0 < number < math.inf or (number == 0 and name in _MAY_BE_ZERO)):
            least = "of at least 0" if name in _MAY_BE_ZERO else "above 0"
            raise OptionError(f"{source} must have {name}, a number {least}: {meaning}, got {_got(value)}")
        numbers[name] = number * unit
    return Cluster(
        **counts,
        memory=numbers["memory"],
        products=numbers["tflops"],
        attention=numbers["attention_tflops"],
        sparse=numbers["sparse_tflops"],
        traffic=numbers["memory_bandwidth"],
        inside=numbers["inside"],
        between=numbers["between"],
        latency=numbers["latency"],
    )


def read_densities(path: Path) -> dict[str, list[float]]:
    """Name of an attention -> its densities: one number for each head, or one for all.

    Raises:
        SparsifyError: the file cannot be read, or holds something else.
    """
    found = {}
    for name, value in _read(path, "density file").items():
        numbers = [share(one) for one in (value if isinstance(value, list) else [value])]
        if not numbers or None in numbers:
            raise OptionError(
                f"density file {path} must have a share in [0, 1] for {name!r}, or a list with one for each head, "
                f"got {value!r}"
            )
        found[name] = [number for number in numbers if number is not None]
    return found


def _read(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a JSON or a YAML file."""
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
        else:
            try:
                import yaml
            except ImportError as error:
                raise SparsifyError(
                    f"{what} {path} needs PyYAML: try pip install 'sparsify-compiler[clusters]', or write a "
                    ".json file"
                ) from error
            try:
                found = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise OptionError(f"{what} {path} must be YAML: {' '.join(str(error).split())}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, SparsifyError):
            raise
        raise OptionError(f"{what} {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise OptionError(f"{what} {path} must hold names with values, got {type(found).__name__}")
    return found


def _number(value: object) -> float:
    """A number, or a text such as `1e3`, which is not a number in YAML; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def _got(value: object) -> str:
    return "nothing" if value is None else repr(value)
