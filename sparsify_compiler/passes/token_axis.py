"""Where tokens are in a graph: labels in which the tokens have an axis of their own.

`find_tokens` finds the sequences over which attention runs. `TokenTracker` then follows one axis for the tokens,
and notes the operators that do not keep tokens apart: those in which an element of the result depends on several
tokens, or on the place of a token. `sharding.py` uses both.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.parallel.shares import Part
from sparsify_compiler.passes.axes import Atom, Cat, Label, Source, atoms, fresh, joined, length
from sparsify_compiler.passes.axis_rules import RULES, is_pointwise, tensors_in
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.axis_writes import Known
from sparsify_compiler.passes.following import follow


class CannotShareError(Exception):
    """The graph cannot be shared; the message is the reason."""


def _keeps_apart(
    tracker: "TokenTracker", func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> bool:
    """Whether no element of an ATen operator's result depends on several tokens, nor on a token's place."""
    if name in _STRUCTURE or is_pointwise(func.overloadpacket):
        mixed: Iterable[tuple[Tensor, Iterable[int]]] = ()
        if name in _ALONG:
            mixed = [(args[0], [kwargs.get("dim", args[1] if len(args) > 1 else 0)])]
    elif name in _ALONG:
        mixed = [(args[0], [kwargs.get("dim", args[1] if len(args) > 1 else 0)])]
    elif name in _REDUCTIONS:
        dims = kwargs.get("dim", args[_REDUCTIONS[name]] if len(args) > _REDUCTIONS[name] else None)
        dims = [dims] if isinstance(dims, int) else dims or range(args[0].dim())
        mixed = [(args[0], dims)]
    elif name in ("mm", "bmm", "matmul"):
        mixed = [(args[0], [-1]), (args[1], [-2 if args[1].dim() > 1 else -1])]
    elif name in ("addmm", "baddbmm"):
        mixed = [(args[1], [-1]), (args[2], [-2])]
    elif name == "linear":
        mixed = [(args[0], [-1]), *((one, range(one.dim())) for one in args[1:] if isinstance(one, Tensor))]
    elif name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
        mixed = [(args[0], range(-len(args[1]), 0))]
    elif name == "embedding":
        mixed = [(args[0], range(2))]
    elif name.startswith("_scaled_dot_product"):
        mixed = [(args[0], [-1]), (args[1], [-1, -2]), (args[2], [-1, -2])]
    else:
        mixed = [(one, range(one.dim())) for one in tensors_in(args, kwargs)]
    return not any(tracker.has(tracker.of(one)[dim]) for one, dims in mixed for dim in dims)


_STRUCTURE = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten",
    "permute", "transpose", "t", "expand", "slice", "unbind", "split", "split_with_sizes", "cat", "stack",
    "repeat", "select", "constant_pad_nd", "alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous",
    "copy_", "fill_", "zero_", "view_as_real", "view_as_complex", "empty_like", "zeros_like", "ones_like",
    "full_like", "empty", "zeros", "ones", "full", "arange", "scalar_tensor", "new_zeros", "new_ones",
    "new_empty", "new_full",
}  # fmt: skip
"""ATen operators that only place elements, or make constants."""
_ALONG = {"_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "unbind", "select"}
"""ATen operators that work along the dimension that is their first argument after the tensor."""
_REDUCTIONS = dict.fromkeys(
    ("sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "all", "any", "var_mean", "argmax",
     "argmin"), 1,
) | {"linalg_vector_norm": 2, "norm": 2}  # fmt: skip
"""ATen reductions, and the place of their dimensions among the arguments."""


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers. Attention does so only with dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "dropout_p" not in names or given.get("dropout_p", 0.0) > 0


class TokenTracker(AxisTracker):
    """Labels in which the tokens have an axis of their own; notes operators that do not keep tokens apart."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.axis = Source("tokens", (tokens,))
        self.mixing: list[str] = []
        """The operators of the current node that mix tokens."""
        self.draws = False
        """Whether the current node draws random numbers for tokens."""
        self.pointwise = True
        """Whether all operators of the current node compute element by element."""

    def has(self, label: Label) -> bool:
        """Whether a dimension has tokens."""
        return any(atom.source is self.axis for atom in atoms(label))

    def parts(self, label: Label) -> tuple[int, list[Part]] | None:
        """(how often the parts repeat, outside of them; the parts) of a dimension with tokens.

        None where it does not run over all tokens in their order.
        """
        label = joined(
            replace(one, also=frozenset()) if isinstance(one, Atom) and one.source is self.axis else one
            for one in label
        )
        places = [i for i, factor in enumerate(label) if self.has((factor,))]
        if len(places) != 1:
            return None
        (place,) = places
        factor = label[place]
        outer, inner = length(label[:place]), length(label[place + 1 :])
        if isinstance(factor, Atom):
            return (outer, [Part(self.tokens, inner)]) if factor.whole and not factor.base else None
        found: list[Part] = []
        for one in factor.parts:
            if not self.has(one):
                found.append(Part(0, length(one) * inner))
                continue
            within = self.parts(one)
            if within is None or within[0] > 1:
                return None
            found += [Part(tokens, width * inner) for tokens, width in within[1]]
        return outer, found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.overloadpacket.__name__)
        aten = func.namespace == "aten"
        if aten and name not in RULES and func._can_decompose():
            return super().__torch_dispatch__(func, types, args, kwargs)
        touched = [one for one in tensors_in(args, kwargs or {}) if any(map(self.has, self.of(one)))]
        self.draws |= bool(touched) and _draws(func, args, kwargs or {})
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if tensors_in(result):
            self.pointwise &= aten and is_pointwise(func.overloadpacket)
            if touched and not (aten and _keeps_apart(self, func, name, args, kwargs or {})):
                self.mixing.append(name)
        if name.endswith("_like") and isinstance(args[0], Tensor):
            labels = [
                label if self.has(label) else fresh(length(label), "blank") for label in self.of(args[0])
            ]
            self.put(result, Known(labels, constant=True))
        return result


def find_tokens(gm: fx.GraphModule) -> tuple[list[Label], dict[fx.Node, list[Label]]]:
    """(the labels of the video's tokens at the sites; node -> the labels of its value, as it was made)."""
    tracker, labels = AxisTracker(), dict[fx.Node, list[Label]]()

    def see(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            labels[node] = tracker.of(value)

    followed = follow(gm, tracker=tracker, see=see)
    found: list[tuple[bool, Label]] = []
    for node, site in followed.sites.items():
        layout, kind = node.meta["layout"], node.meta["site"].kind
        label = site.query.labels[2]
        if kind not in ("self", "joint"):
            continue
        parts = label[0].parts if len(label) == 1 and isinstance(label[0], Cat) else (label,)
        if layout.grid is None:
            found.append((False, max(parts, key=length)))
            continue
        at = 0
        for part in parts:
            if at == layout.before and length(part) == layout.video_tokens:
                found.append((True, part))
            at += length(part)
    if not found:
        raise CannotShareError("no attention over its own tokens could be followed")
    best = max((gridded, length(label)) for gridded, label in found)
    return list(dict.fromkeys(label for gridded, label in found if (gridded, length(label)) == best)), labels
