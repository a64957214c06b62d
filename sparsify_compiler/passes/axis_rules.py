"""How each ATen operator carries axis labels from its inputs to its outputs.

`AxisTracker` is a dispatch mode: run a graph on fake tensors under it and every tensor gets a list of labels
(see `axes.py`), one for each dimension. The vocabulary is ATen's, after composite operators have been taken
apart, so it is small and does not depend on how a model is spelled. An operator that is not listed here gives
fresh labels: layout inference then finds nothing, which is safe, rather than something wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify_compiler.passes.axes import (
    Atom,
    Label,
    Source,
    atoms,
    axis,
    cat,
    cut,
    fresh,
    is_blank,
    length,
    merge,
    reshape,
    share_axis,
    substitute,
    unknown,
)

Rule = Callable[..., list[Label]]
RULES: dict[str, Rule] = {}
"""ATen operator name -> rule(tracker, output, *args, **kwargs) -> the output's labels."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class AxisTracker(TorchDispatchMode):
    """Labels every tensor that operators under this mode produce."""

    def __init__(self) -> None:
        super().__init__()
        self._labels = WeakTensorKeyDictionary()
        self.positions: dict[int, Source] = {}
        """Of every length one: a mesh made once for queries and once for keys is the same mesh."""

    def of(self, tensor: Tensor) -> list[Label]:
        """The labels of a tensor's dimensions; fresh ones for a tensor not seen before."""
        if tensor not in self._labels:
            self._labels[tensor] = [fresh(int(size)) for size in tensor.shape]
        return self._labels[tensor]

    def put(self, tensor: Tensor, labels: Sequence[Label]) -> None:
        """Set the labels of a tensor's dimensions."""
        assert [length(label) for label in labels] == list(tensor.shape), (labels, tensor.shape)
        self._labels[tensor] = list(labels)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            return func(*args, **kwargs)
        name = _name(func)
        if name not in RULES and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        written = _written_arguments(func, args, kwargs)
        if written:
            for tensor in written:
                self._write(tensor, func, args)
            return result
        known = RULES.get(name) or (_pointwise if torch.Tag.pointwise in func.tags else None)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for index, output in enumerate(outputs):
            where = {"index": index} if isinstance(result, (list, tuple)) else {}
            labels = known(self, output, *args, **where, **kwargs) if known else []
            if [length(label) for label in labels] != list(output.shape):  # no rule, or it cannot say
                labels = [self._lost(args, size) for size in output.shape]
            self.put(output, labels)
        return result

    def _write(self, target: Tensor, func: Any, args: tuple[Any, ...]) -> None:
        """An in-place operator wrote to `target`. A dimension that was blank takes the label of what was written,
        in every view of that memory; one that was something else is no longer that in any other view."""
        name = _name(func)
        if name in ("fill_", "zero_"):
            return
        before, after = self.of(target), [self._lost(args, size) for size in target.shape]
        if name == "copy_":
            after = _broadcast([self.of(args[1])], target.shape)
        elif torch.Tag.pointwise in func.tags or name.removesuffix("_") in _POINTWISE:
            after = _pointwise(self, target, *args)
        storage = target.untyped_storage()._cdata
        views = [t for t in list(self._labels) if t is not target and t.untyped_storage()._cdata == storage]
        for view in views:
            labels = self.of(view)
            for old, new in zip(before, after, strict=True):
                if old == new or is_blank(new):
                    continue
                if is_blank(old) and len(old) == 1 and isinstance(old[0], Atom):
                    labels = [substitute(label, old[0], new) for label in labels]
                else:
                    labels = [unknown(length(la), new) if share_axis(la, old) else la for la in labels]
            # Where it is blank still, only a part of it was written, in an order that is not known.
            self.put(view, [unknown(length(la), *after) if la and is_blank(la) else la for la in labels])
        self.put(target, [old if is_blank(new) else new for old, new in zip(before, after, strict=True)])

    def _lost(self, args: Any, size: int) -> Label:
        """For an output whose relation to its inputs is not known: `lost` if video tokens went in."""
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        return unknown(size, *(label for t in tensors for label in self.of(t)))

    def is_table(self, tensor: Tensor) -> bool:
        """Whether a tensor is a graph input of at most two dimensions, as it came in: a weight or a table."""
        labels = [label for label in self.of(tensor) if label]
        sources = {atom.source for label in labels for atom in atoms(label)}
        whole = all(len(label) == 1 and atoms(label)[0].rank == 4 for label in labels)
        return whole and len(sources) == 1 and all(s.kind == "input" and len(s.sizes) <= 2 for s in sources)


def _name(func: Any) -> str:
    """`view` for aten::view.default."""
    return str(func.overloadpacket.__name__)


def _written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return written


def _broadcast(labels: Sequence[list[Label]], shape: Sequence[int]) -> list[Label]:
    """Labels of the element-by-element meeting of several tensors."""
    result: list[Label] = []
    for dim, size in enumerate(shape):
        met: Label = ()
        for one in labels:
            at = dim - len(shape) + len(one)
            if at >= 0 and length(one[at]) == size:
                met = merge(met, one[at]) if met else one[at]
        result.append(met if length(met) == size else fresh(size, "blank"))
    return result


# Element by element: operators tagged `pointwise`, and these.
_POINTWISE = ("copy", "clone", "_to_copy", "alias", "detach", "lift_fresh", "native_dropout", "bernoulli",
              "_conj", "_conj_physical", "resolve_conj", "real", "imag", "polar", "complex", "contiguous",
              "_softmax", "_log_softmax", "cumsum", "nan_to_num", "masked_fill", "where", "type_as",
              "view_as", "_safe_softmax", "glu_jvp", "expand_as", "dropout", "to")  # fmt: skip


@rule(*_POINTWISE)
def _pointwise(tracker: AxisTracker, output: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
    operands = [tracker.of(t) for t in tree_leaves(args) if isinstance(t, Tensor)]
    return _broadcast(operands, output.shape)


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten")
def _view(tracker: AxisTracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    if output.dtype != x.dtype:
        return []
    return reshape(tracker.of(x), x.shape, output.shape)


@rule("permute")
def _permute(tracker: AxisTracker, output: Tensor, x: Tensor, dims: list[int]) -> list[Label]:
    return [tracker.of(x)[dim] for dim in dims]


@rule("transpose", "t")
def _transpose(tracker: AxisTracker, output: Tensor, x: Tensor, a: int = 0, b: int = 1) -> list[Label]:
    labels = list(tracker.of(x))
    if len(labels) > 1:
        labels[a], labels[b] = labels[b], labels[a]
    return labels


@rule("expand")
def _expand(tracker: AxisTracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    return _broadcast([tracker.of(x)], output.shape)


@rule("repeat")
def _repeat(tracker: AxisTracker, output: Tensor, x: Tensor, *_: Any) -> list[Label]:
    """Tiling puts a blank factor outside of the dimension it repeats."""
    labels = [()] * (output.dim() - x.dim()) + tracker.of(x)
    return [
        (*fresh(size // length(label), "blank"), *label) if length(label) else fresh(size)
        for size, label in zip(output.shape, labels, strict=True)
    ]


@rule("repeat_interleave")
def _repeat_interleave(
    tracker: AxisTracker, output: Tensor, x: Tensor, repeats: Any = None, dim: int | None = None, **_: Any
) -> list[Label]:
    if dim is None or not isinstance(repeats, int):
        return []
    labels = list(tracker.of(x))
    labels[dim] = (*labels[dim], *fresh(repeats, "blank"))
    return labels


@rule("slice")
def _slice(
    tracker: AxisTracker,
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
    labels[dim] = (
        cut(labels[dim], begin, max(begin, stop)) if step == 1 else unknown(output.shape[dim], labels[dim])
    )
    return labels


@rule("select")
def _select(tracker: AxisTracker, output: Tensor, x: Tensor, dim: int, index: int) -> list[Label]:
    labels = list(tracker.of(x))
    del labels[dim]
    return labels


@rule("unbind")
def _unbind(tracker: AxisTracker, output: Tensor, x: Tensor, dim: int = 0, *, index: int) -> list[Label]:
    return _select(tracker, output, x, dim, index)


@rule("split", "split_with_sizes")
def _split(
    tracker: AxisTracker, output: Tensor, x: Tensor, sizes: int | list[int], dim: int = 0, *, index: int
) -> list[Label]:
    start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
    return _slice(tracker, output, x, dim, start, start + output.shape[dim])


@rule("cat")
def _cat(tracker: AxisTracker, output: Tensor, tensors: list[Tensor], dim: int = 0) -> list[Label]:
    tensors = [t for t in tensors if t.dim() == output.dim()]  # ATen lets an empty 1-D tensor pass
    dim %= output.dim()
    labels = []
    for d in range(output.dim()):
        column = [tracker.of(t)[d] for t in tensors]
        if d == dim:
            labels.append(cat(column))
            continue
        met = column[0]
        for label in column[1:]:
            met = merge(met, label)
        labels.append(met)
    return labels


@rule("stack")
def _stack(tracker: AxisTracker, output: Tensor, tensors: list[Tensor], dim: int = 0) -> list[Label]:
    shape = list(tensors[0].shape)
    labels = _broadcast([tracker.of(t) for t in tensors], shape)
    labels.insert(dim % output.dim(), fresh(len(tensors)))
    return labels


@rule("constant_pad_nd")
def _pad(tracker: AxisTracker, output: Tensor, x: Tensor, pad: list[int], *_: Any) -> list[Label]:
    labels = list(tracker.of(x))
    for back in range(len(pad) // 2):
        dim = x.dim() - 1 - back
        left, right = pad[2 * back], pad[2 * back + 1]
        if left < 0 or right < 0:
            labels[dim] = fresh(output.shape[dim])
        elif left or right:
            ends = [fresh(n) for n in (left, right)]
            labels[dim] = cat([ends[0], labels[dim], ends[1]])
    return labels


@rule("arange")
def _arange(tracker: AxisTracker, output: Tensor, *_: Any, **__: Any) -> list[Label]:
    (size,) = output.shape
    return [axis(tracker.positions.setdefault(size, Source("position", (size,))), 0)]


@rule("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like", "new_empty",
      "new_zeros", "new_ones", "new_full", "scalar_tensor", "empty_strided", "new_empty_strided")  # fmt: skip
def _blank(tracker: AxisTracker, output: Tensor, *_: Any, **__: Any) -> list[Label]:
    return [fresh(size, "blank") for size in output.shape]


@rule("sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "argmax", "argmin", "all", "any",
      "var_mean", "linalg_vector_norm", "norm", "max", "min")  # fmt: skip
def _reduce(tracker: AxisTracker, output: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
    dims = kwargs.get("dim", args[0] if args else None)
    if not isinstance(dims, (int, list, tuple)):
        return []
    gone = {dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = output.dim() == x.dim()
    return [
        () if dim in gone else label for dim, label in enumerate(tracker.of(x)) if kept or dim not in gone
    ]


@rule("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm", "rms_norm")
def _norm(tracker: AxisTracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    return tracker.of(x) if output.shape == x.shape else []


@rule("mm", "bmm", "matmul")
def _matmul(tracker: AxisTracker, output: Tensor, a: Tensor, b: Tensor, **_: Any) -> list[Label]:
    """Rows of `a` and columns of `b`; what a weight multiplied into them is another axis than the tokens'."""
    if a.dim() < 2 or b.dim() < 2:
        return []
    lead = _broadcast([tracker.of(a)[:-2], tracker.of(b)[:-2]], output.shape[:-2])
    rows, columns = tracker.of(a)[-2], tracker.of(b)[-1]
    if tracker.is_table(a) and not tracker.is_table(b):
        rows = unknown(a.shape[-2], tracker.of(b)[-2])
    if tracker.is_table(b):
        columns = unknown(b.shape[-1], tracker.of(a)[-1])
    return [*lead, rows, columns]


@rule("addmm", "baddbmm")
def _add_matmul(
    tracker: AxisTracker, output: Tensor, c: Tensor, a: Tensor, b: Tensor, **_: Any
) -> list[Label]:
    return _matmul(tracker, output, a, b)


@rule("linear")
def _linear(tracker: AxisTracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    return [*tracker.of(x)[:-1], unknown(output.shape[-1], tracker.of(x)[-1])]


@rule("embedding")
def _embedding(
    tracker: AxisTracker, output: Tensor, weight: Tensor, index: Tensor, *_: Any, **__: Any
) -> list[Label]:
    if not tracker.is_table(weight):
        return []
    return [*tracker.of(index), fresh(output.shape[-1])]


@rule("index")
def _index(tracker: AxisTracker, output: Tensor, x: Tensor, indices: list[Tensor | None]) -> list[Label]:
    """Looking up the rows of a table: the result runs over what the index runs over."""
    if not tracker.is_table(x) or len(indices) != 1 or indices[0] is None:
        return []
    return [*tracker.of(indices[0]), *tracker.of(x)[1:]]


@rule("convolution")
def _convolution(tracker: AxisTracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    spatial = tuple(output.shape[2:])
    if output.dim() != x.dim() or len(spatial) not in (2, 3):
        return []
    batch = tracker.of(x)[0]
    source = Source("conv", spatial, images=batch if len(spatial) == 2 else ())
    return [batch, fresh(output.shape[1]), *[axis(source, dim) for dim in range(len(spatial))]]


@rule("view_as_real", "view_as_complex")
def _complex(tracker: AxisTracker, output: Tensor, x: Tensor) -> list[Label]:
    labels = tracker.of(x)
    return [*labels, fresh(2)] if output.dim() > x.dim() else labels[:-1]


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
      "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
      "_scaled_dot_product_attention_math", "scaled_dot_product_attention",
      "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def _attention(
    tracker: AxisTracker, output: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, index: int = 0, **__: Any
) -> list[Label]:
    return [] if index else [*tracker.of(q)[:-1], tracker.of(v)[-1]]
