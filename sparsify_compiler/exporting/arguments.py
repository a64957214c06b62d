"""The arguments of an exported call, as a file holds them, and the check of later calls against them."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, treespec_dumps, treespec_loads

from sparsify_compiler.errors import OperandError

PLAIN = (str, int, float, bool, type(None))
"""Types of arguments that a file can name, besides tensors."""


def described(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The signature of a model and the arguments of a call, as JSON."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {
        "order": [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD],
        "defaults": {one.name: one.default for one in parameters if isinstance(one.default, PLAIN)},
        "given": {name: _described(value) for name, value in kwargs.items()},
    }


def _described(value: Any) -> dict[str, Any]:
    leaves, spec = tree_flatten(value)
    return {
        "tree": treespec_dumps(spec),
        "leaves": [
            {"shape": list(one.shape), "dtype": str(one.dtype), "device": one.device.type}
            if isinstance(one, Tensor)
            else {"value": one}
            for one in leaves
        ],
    }


def bind(known: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the exported call. Their tensors are contiguous.

    Args:
        known: what `described` returned.

    Raises:
        OperandError: the call does not fit the file: it was exported for other arguments, sizes, types, devices or
            values.
    """
    if len(args) > len(known["order"]):
        raise OperandError(f"the model takes {len(known['order'])} arguments in order, got {len(args)}")
    named = dict(zip(known["order"], args, strict=False))
    if twice := named.keys() & kwargs.keys():
        raise OperandError(f"argument {min(twice)!r} is given twice")
    named |= kwargs
    defaults = known["defaults"]
    for name, value in named.items():
        if name not in known["given"] and not (name in defaults and _same(value, defaults[name])):
            raise OperandError(
                f"argument {name!r} must be left out, as in the exported call, which had "
                f"{', '.join(known['given'])}: export again with it"
            )
    found = {}
    for name, one in known["given"].items():
        if name not in named and name not in defaults:
            raise OperandError(f"argument {name!r} is missing: the exported call was made with it")
        value = named.get(name, defaults.get(name))
        wanted, got = _text(one), _text(_described(value))
        if wanted != got:
            raise OperandError(
                f"argument {name!r} must be {wanted}, as in the exported call, got {got}: export again for other "
                "sizes or values"
            )
        found[name] = tree_map(contiguous, value)
    return found


def contiguous(leaf: Any) -> Any:
    """A leaf of an argument, as programs read it: they hold the strides of contiguous tensors."""
    return leaf.contiguous() if isinstance(leaf, Tensor) else leaf


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _text(one: Mapping[str, Any]) -> str:
    """An argument in words: `float32 [1, 16, 4, 8, 8]`, `False`, or several leaves."""
    leaves = [_leaf_text(leaf) for leaf in one["leaves"]]
    plain = treespec_loads(one["tree"]).is_leaf()
    return leaves[0] if plain else f"({', '.join(leaves)}) in the form {treespec_loads(one['tree'])}"


def _leaf_text(leaf: Mapping[str, Any]) -> str:
    if "shape" not in leaf:
        return repr(leaf["value"])
    place = "" if leaf["device"] == "cpu" else f" on {leaf['device']}"
    return f"{leaf['dtype'].removeprefix('torch.')} {leaf['shape']}{place}"
