"""Rules: the way in which each ATen operator carries axis labels from its inputs to its outputs.

A rule takes an operator's output and arguments, and returns one label (`axes.py`) for each dimension of the output;
`axis_tracker.py` calls it. The operators are ATen's, after composite operators are decomposed, so they are few, and
the spelling of a model does not matter. An operator without a rule gets labels of unknown axes: then layout
inference finds nothing, which is safe, and never something wrong.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify_compiler.passes.axes import (
    Atom,
    Label,
    Source,
    axes_of,
    axis,
    cat,
    cut,
    every,
    fresh,
    is_blank,
    length,
    pick,
    reshape,
    single,
    unknown,
)
from sparsify_compiler.passes.axis_writes import Known
from sparsify_compiler.passes.meeting import either, merge

Rule = Callable[..., list[Label]]
RULES: dict[str, Rule] = {}
"""ATen operator name -> rule(tracker, output, *args, **kwargs) -> the output's labels."""


class Tracker(Protocol):
    """Everything that a rule reads or records in addition to its output and arguments."""

    positions: dict[int, Source]
    """Length -> the source of an `arange` of that length."""

    def known(self, tensor: Tensor) -> Known:
        """Everything known about a tensor."""

    def of(self, tensor: Tensor) -> list[Label]:
        """The labels of a tensor's dimensions."""

    def take(self, positions: Iterable[Atom]) -> None:
        """Record that the output is taken from these positions, along axes that it does not have."""

    def keep(self, operand: Tensor, positions: Iterable[Atom]) -> None:
        """Record that the output has these positions of an operand, as parts of longer runs."""

    def embed(self, kept: Sequence[Label], summed: Label) -> None:
        """Record that the operator sums over `summed` with weights, at every position of `kept`."""

    def taken_from(self, label: Label, index: Tensor) -> Label:
        """The label of a dimension of positions that an index takes from a dimension."""

    def is_table(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight or a table of at most two dimensions."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators with these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@functools.cache
def is_pointwise(packet: Any) -> bool:
    """Whether an operator computes element by element in any of its overloads."""
    if packet.__name__.removesuffix("_") in _POINTWISE:
        return True
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in arguments or results of an operator."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict) and value:
            found += tensors_in(*value.values())
    return found


def broadcast(labels: Sequence[Sequence[Label]], shape: Sequence[int]) -> list[Label]:
    """The labels of an output in which several tensors meet element by element."""
    result: list[Label] = []
    for dim, size in enumerate(shape):
        met: Label = ()
        for one in labels:
            at = dim - len(shape) + len(one)
            if at >= 0 and length(one[at]) == size:
                met = merge(met, one[at]) if met else one[at]
        result.append(met if length(met) == size else fresh(size, "repeat"))
    return result


# Operators that compute element by element: those tagged `pointwise`, and these.
_POINTWISE = ("clone", "_to_copy", "alias", "detach", "lift_fresh", "native_dropout", "bernoulli",
              "_conj", "_conj_physical", "resolve_conj", "real", "imag", "polar", "complex", "contiguous",
              "_softmax", "_log_softmax", "cumsum", "nan_to_num", "masked_fill", "_safe_softmax",
              "glu_jvp", "dropout", "to")  # fmt: skip


@rule(*_POINTWISE)
def pointwise(tracker: Tracker, output: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
    operands = [tracker.of(t) for t in tensors_in(args)]
    return broadcast(operands, output.shape)


@rule("where")
def _where(tracker: Tracker, output: Tensor, condition: Tensor, *branches: Any) -> list[Label]:
    """Every element comes from one of the branches."""
    each = [tracker.known(branch) for branch in branches if isinstance(branch, Tensor)]
    met = _side_by_side([Known(broadcast([list(known.labels)], output.shape), known.taken) for known in each])
    return broadcast([met, tracker.of(condition)], output.shape)


@rule("copy")
def _copy(tracker: Tracker, output: Tensor, x: Tensor, source: Tensor, *_: Any) -> list[Label]:
    return broadcast([tracker.of(source)], output.shape)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten")
def _view(tracker: Tracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    if output.dtype != x.dtype:
        return []
    return reshape(tracker.of(x), x.shape, output.shape)


@rule("permute")
def _permute(tracker: Tracker, output: Tensor, x: Tensor, dims: list[int]) -> list[Label]:
    return [tracker.of(x)[dim] for dim in dims]


@rule("transpose", "t")
def _transpose(tracker: Tracker, output: Tensor, x: Tensor, a: int = 0, b: int = 1) -> list[Label]:
    labels = list(tracker.of(x))
    if len(labels) > 1:
        labels[a], labels[b] = labels[b], labels[a]
    return labels


@rule("expand")
def _expand(tracker: Tracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    return broadcast([tracker.of(x)], output.shape)


@rule("repeat")
def _repeat(tracker: Tracker, output: Tensor, x: Tensor, *_: Any) -> list[Label]:
    """Tiling puts a repeat outside the dimension that it repeats."""
    labels = [()] * (output.dim() - x.dim()) + tracker.of(x)
    return [
        (*fresh(size // length(label), "repeat"), *label) if length(label) else fresh(size)
        for size, label in zip(output.shape, labels, strict=True)
    ]


@rule("repeat_interleave")
def _repeat_interleave(
    tracker: Tracker, output: Tensor, x: Tensor, repeats: Any = None, dim: int | None = None, **_: Any
) -> list[Label]:
    if dim is None or not isinstance(repeats, int):
        return []
    labels = list(tracker.of(x))
    labels[dim] = (*labels[dim], *fresh(repeats, "repeat"))
    return labels


@rule("slice")
def _slice(
    tracker: Tracker,
    output: Tensor,
    x: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> list[Label]:
    labels = list(tracker.of(x))
    size = x.shape[dim]
    begin, stop, _ = slice(start, end).indices(size)
    if output.shape[dim] == 1:
        labels[dim] = tuple(pick(labels[dim], begin))
    elif step == 1:
        labels[dim] = cut(labels[dim], begin, max(begin, stop))
    elif stop == size:
        labels[dim] = _every(tracker, labels[dim], begin, step, output.shape[dim])
    else:
        labels[dim] = unknown(output.shape[dim], labels[dim])
    return labels


def _every(tracker: Tracker, label: Label, start: int, step: int, size: int) -> Label:
    """Every `step`-th position of a dimension, from `start` on."""
    found = every(label, start, step)
    if found is None:
        return unknown(size, label)
    tracker.take(found[1])
    return found[0]


@rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _resize(
    tracker: Tracker, output: Tensor, x: Tensor, sizes: Any, *scales: float | None, **_: Any
) -> list[Label]:
    """Repeated positions, or every n-th one, where sizes divide each other and floats hold their ratio exactly."""
    labels = tracker.of(x)
    if any(scale is not None for scale in scales):
        return []
    for dim in range(2, x.dim()):
        old, new = x.shape[dim], output.shape[dim]
        if old % new == 0:
            labels[dim] = _every(tracker, labels[dim], 0, old // new, new) if new < old else labels[dim]
        elif new % old == 0 and (new // old).bit_count() == 1:
            labels[dim] = (*labels[dim], *fresh(new // old, "repeat"))
        else:
            labels[dim] = unknown(new, labels[dim])
    return labels


@rule("select")
def _select(tracker: Tracker, output: Tensor, x: Tensor, dim: int, index: int) -> list[Label]:
    labels = tracker.of(x)
    tracker.take(pick(labels.pop(dim), index % x.shape[dim]))
    return labels


@rule("unbind")
def _unbind(tracker: Tracker, output: Tensor, x: Tensor, dim: int = 0, *, index: int) -> list[Label]:
    return _select(tracker, output, x, dim, index)


@rule("split", "split_with_sizes")
def _split(
    tracker: Tracker, output: Tensor, x: Tensor, sizes: int | list[int], dim: int = 0, *, index: int
) -> list[Label]:
    start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
    return _slice(tracker, output, x, dim, start, start + output.shape[dim])


@rule("cat")
def _cat(tracker: Tracker, output: Tensor, tensors: list[Tensor], dim: int = 0) -> list[Label]:
    dim %= output.dim()  # ATen accepts an empty 1-D tensor
    tensors = [t for t in tensors if t.dim() == output.dim() and t.shape[dim]] or tensors[:1]
    each = [tracker.known(t) for t in tensors]
    column = [known.labels[dim] or (() if dim else _in_batch(known)) for known in each]
    for one, label in zip(tensors, column, strict=True):
        tracker.keep(one, single([label]))
    rest = [Known([*known.labels[:dim], *known.labels[dim + 1 :]], known.taken) for known in each]
    labels = _side_by_side(rest)
    labels.insert(dim, cat(_named(column) if dim == 0 and len(column) > 1 else column))
    return labels


def _in_batch(known: Known) -> Label:
    """The one position of a batch that all tokens are from; empty if they are from several, or it is not known."""
    claims = {claim for run in known.fixed if run.of_batch for claim in run.claims if claim.of_batch}
    if len({(one.base, one.stride, one.extent, one.offset) for one in claims}) != 1:
        return ()
    first = min(claims, key=lambda one: (one.source.serial, one.dim))
    return (replace(first, also=frozenset(claims - {first})),)


def _side_by_side(each: Sequence[Known]) -> list[Label]:
    """The labels of the dimensions that tensors have in common, when they are joined along another one."""
    labels = []
    for column in zip(*(known.labels for known in each), strict=True):
        met = functools.reduce(either, column)
        blank = [known for known, label in zip(each, column, strict=True) if is_blank(label)]
        # One position, repeated, takes the place of others.
        if any(known.axes & axes_of(met) for known in blank):
            met = unknown(length(met), *column)
        labels.append(met)
    return labels


def _without_features(known: Known) -> Known:
    labels = [
        tuple(run for run in label if not (isinstance(run, Atom) and run.source.features))
        for label in known.labels
    ]
    return Known(labels, known.taken)


def _named(labels: Sequence[Label]) -> list[Label]:
    """Labels of parts of a batch; a single video gets a position of the batch."""
    source = Source("part", (sum(map(length, labels)),))
    starts = itertools.accumulate(map(length, labels), initial=0)
    return [label or (Atom(source, 0, 1, base=at),) for label, at in zip(labels, starts, strict=False)]


@rule("stack")
def _stack(tracker: Tracker, output: Tensor, tensors: list[Tensor], dim: int = 0) -> list[Label]:
    each = [tracker.known(t) for t in tensors]
    labels = _side_by_side(each)
    places = [_in_batch(known) for known in each]
    along = cat(places)
    if length(along) == len(tensors) > 1 and all(places) and isinstance(along[0], Atom):
        for one, place in zip(tensors, places, strict=True):
            tracker.keep(one, single([place]))
        labels.insert(dim % output.dim(), along)
        return labels
    alike = all(_without_features(known) == _without_features(each[0]) for known in each)
    labels.insert(dim % output.dim(), fresh(len(tensors), "opaque" if alike else "part"))
    return labels


@rule("constant_pad_nd")
def _pad(
    tracker: Tracker, output: Tensor, x: Tensor, pad: list[int], *_: Any, kind: str = "blank"
) -> list[Label]:
    labels = list(tracker.of(x))
    for back in range(len(pad) // 2):
        dim = x.dim() - 1 - back
        left, right = pad[2 * back], pad[2 * back + 1]
        if left or right:
            inside = cut(labels[dim], max(-left, 0), x.shape[dim] - max(-right, 0))
            ends = [[fresh(n, kind)] if n > 0 else [] for n in (left, right)]
            labels[dim] = cat([*ends[0], inside, *ends[1]])
    return labels


@rule("replication_pad1d", "replication_pad2d", "replication_pad3d", "reflection_pad1d", "reflection_pad2d",
      "reflection_pad3d")  # fmt: skip
def _pad_with_edges(tracker: Tracker, output: Tensor, x: Tensor, pad: list[int]) -> list[Label]:
    return _pad(tracker, output, x, pad, kind="opaque")


@rule("arange")
def _arange(tracker: Tracker, output: Tensor, *_: Any, **__: Any) -> list[Label]:
    (size,) = output.shape
    return [axis(tracker.positions.setdefault(size, Source("position", (size,))), 0)]


@rule("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like", "new_empty",
      "new_zeros", "new_ones", "new_full", "scalar_tensor", "empty_strided", "new_empty_strided",
      "rand", "randn", "rand_like", "randn_like", "randint", "randint_like")  # fmt: skip
def blank(tracker: Tracker, output: Tensor, *_: Any, **__: Any) -> list[Label]:
    return [fresh(size, "blank") for size in output.shape]


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "argmax", "argmin", "all", "any",
      "var_mean", "max", "min")  # fmt: skip
def _reduce(tracker: Tracker, output: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
    dims = kwargs.get("dim", args[0] if args else None)
    if not isinstance(dims, (int, list, tuple)):
        return []
    gone = {dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = output.dim() == x.dim()
    return [
        () if dim in gone else label for dim, label in enumerate(tracker.of(x)) if kept or dim not in gone
    ]


@rule("linalg_vector_norm", "norm")
def _reduce_by_order(
    tracker: Tracker, output: Tensor, x: Tensor, order: Any = 2, dim: Any = None, *_: Any, **kwargs: Any
) -> list[Label]:
    return _reduce(tracker, output, x, dim)


@rule("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
      "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_fused_rms_norm", "rms_norm")  # fmt: skip
def _norm(tracker: Tracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    return tracker.of(x) if output.shape == x.shape else []


@rule("mm", "bmm", "matmul")
def _matmul(tracker: Tracker, output: Tensor, a: Tensor, b: Tensor, **_: Any) -> list[Label]:
    """Rows of `a` and columns of `b`; a dimension that a weight makes is not an axis of the tokens."""
    if a.dim() < 2 or b.dim() < 2:
        return []
    lead = broadcast([tracker.of(a)[:-2], tracker.of(b)[:-2]], output.shape[:-2])
    rows, columns = tracker.of(a)[-2], tracker.of(b)[-1]
    if tracker.is_table(a) and not tracker.is_table(b):
        rows = unknown(a.shape[-2], tracker.of(b)[-2], summed=True)
    if tracker.is_table(b):
        columns = unknown(b.shape[-1], tracker.of(a)[-1], summed=True)
        tracker.embed([*lead, rows], tracker.of(a)[-1])
    return [*lead, rows, columns]


@rule("addmm", "baddbmm")
def _add_matmul(tracker: Tracker, output: Tensor, c: Tensor, a: Tensor, b: Tensor, **_: Any) -> list[Label]:
    return _matmul(tracker, output, a, b)


@rule("linear")
def _linear(tracker: Tracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    *kept, features = tracker.of(x)
    tracker.embed(kept, features)
    return [*kept, unknown(output.shape[-1], features, summed=True)]


@rule("embedding")
def _embedding(
    tracker: Tracker, output: Tensor, weight: Tensor, index: Tensor, *_: Any, **__: Any
) -> list[Label]:
    if not tracker.is_table(weight):
        return []
    return [*tracker.of(index), fresh(output.shape[-1])]


@rule("index")
def _index(tracker: Tracker, output: Tensor, x: Tensor, indices: list[Tensor | None]) -> list[Label]:
    """A lookup of rows in a table: the result runs over the axes of the index. Or positions of one dimension."""
    if tracker.is_table(x) and len(indices) == 1 and indices[0] is not None:
        return [*tracker.of(indices[0]), *tracker.of(x)[1:]]
    given = [(dim, one) for dim, one in enumerate(indices) if one is not None]
    if len(given) != 1 or given[0][1].dim() != 1:
        return []
    return _index_select(tracker, output, x, *given[0])


@rule("index_select")
def _index_select(tracker: Tracker, output: Tensor, x: Tensor, dim: int, index: Tensor) -> list[Label]:
    """Positions of one dimension, which are the same wherever one index takes them from the same axes."""
    labels = list(tracker.of(x))
    if not labels or index.dim() != 1 or index.dtype in (torch.bool, torch.uint8):
        return []
    labels[dim] = tracker.taken_from(labels[dim], index)
    return labels


@rule("convolution")
def _convolution(tracker: Tracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    spatial = tuple(output.shape[2:])
    if output.dim() != x.dim() or len(spatial) not in (2, 3):
        return []
    batch, channels, *axes = tracker.of(x)
    tracker.embed([batch, *axes], channels)
    source = Source("conv", spatial, of=(batch, channels, *axes))
    return [
        batch,
        unknown(output.shape[1], channels, summed=True),
        *[axis(source, dim) for dim in range(len(spatial))],
    ]


@rule("view_as_real", "view_as_complex")
def _complex(tracker: Tracker, output: Tensor, x: Tensor) -> list[Label]:
    labels = tracker.of(x)
    return [*labels, fresh(2)] if output.dim() > x.dim() else labels[:-1]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
      "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def _attention(
    tracker: Tracker, output: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, index: int = 0, **__: Any
) -> list[Label]:
    return [] if index else [*tracker.of(q)[:-1], tracker.of(v)[-1]]
