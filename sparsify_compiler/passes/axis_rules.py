"""How each ATen operator carries axis labels from its inputs to its outputs.

`AxisTracker` is a dispatch mode: run a graph on fake tensors under it and every tensor gets a list of labels
(see `axes.py`), one for each dimension. The vocabulary is ATen's, after composite operators have been taken
apart, so it is small and does not depend on how a model is spelled. An operator that is not listed here gives
fresh labels: layout inference then finds nothing, which is safe, rather than something wrong. A write changes the
labels of all tensors that share the memory (see `writes.py`).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify_compiler.passes.axes import (
    Atom,
    Label,
    Source,
    atoms,
    axes_of,
    axis,
    cat,
    cut,
    either,
    fresh,
    is_blank,
    length,
    merge,
    pick,
    reshape,
    single,
    unknown,
)
from sparsify_compiler.passes.axis_writes import Known, Write

Rule = Callable[..., list[Label]]
RULES: dict[str, Rule] = {}
"""ATen operator name -> rule(tracker, output, *args, **kwargs) -> the output's labels."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(frozen=True, slots=True)
class Embedding:
    """A product of graph inputs with weights: the axes it runs over, and those that it is a sum over."""

    kept: frozenset[Atom]
    summed: frozenset[Atom]


class AxisTracker(TorchDispatchMode):
    """Labels every tensor that operators under this mode produce or write to."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()
        self._memory: dict[int, list[ref[Tensor]]] = {}
        """The tensors that were seen, by storage."""
        self._taken: frozenset[Atom] = frozenset()
        """Where its output was taken from, by the rule that runs."""
        self.positions: dict[int, Source] = {}
        """Of every length one: a mesh made once for queries and once for keys is the same mesh."""
        self.embeddings: set[Embedding] = set()
        """All that were met."""

    def known(self, tensor: Tensor) -> Known:
        """What is known of a tensor; nothing of one that was not seen before."""
        found = self._known.get(tensor)
        if found is None:
            self.put(tensor, Known([fresh(int(size)) for size in tensor.shape], constant=True))
            found = self._known[tensor]
        return found

    def of(self, tensor: Tensor) -> list[Label]:
        """The labels of a tensor's dimensions."""
        return list(self.known(tensor).labels)

    def put(self, tensor: Tensor, known: Known) -> None:
        """Set what is known of a tensor that was not seen before, or now lies elsewhere."""
        self._set(tensor, known)
        self._memory.setdefault(_storage(tensor), []).append(ref(tensor))

    def put_input(self, tensor: Tensor, is_weight: bool) -> Source:
        """Label an input, or a weight, by its own axes."""
        source = Source("weight" if is_weight else "input", tuple(tensor.shape))
        self.put(tensor, Known([axis(source, dim) for dim in range(tensor.dim())]))
        return source

    def take(self, positions: Iterable[Atom]) -> None:
        """By a rule: its output was taken from these positions, along axes that it does not have."""
        self._taken = self._taken.union(positions)

    def embed(self, kept: Sequence[Label], summed: Label) -> None:
        """By a rule: weights are multiplied into `summed`, over all else that is kept."""
        gone = _inputs([summed])
        if gone or not summed:
            self.embeddings.add(Embedding(_inputs(kept), gone))

    def derive(self, tensor: Tensor, operands: Sequence[Tensor]) -> None:
        """A tensor was made of others in a way that is not known."""
        self.put(tensor, Known([self._lost(operands, size) for size in tensor.shape]))

    def lose(self, tensors: Sequence[Tensor], operands: Sequence[Tensor]) -> None:
        """Something was written to tensors, made of others in a way that is not known."""
        lost = [Known([self._lost([tensor, *operands], size) for size in tensor.shape]) for tensor in tensors]
        for tensor, after in zip(tensors, lost, strict=True):
            self._spread(tensor, after)

    def _set(self, tensor: Tensor, known: Known) -> None:
        assert [length(label) for label in known.labels] == list(tensor.shape), (known, tensor.shape)
        self._known[tensor] = known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = func.namespace == "aten"
        name = _name(func)
        if aten and name not in RULES and func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        targets = _written_arguments(func, args, kwargs)
        for number, target in enumerate(targets):
            self._write(target, number, func, args, kwargs)
        operands = (
            _tensors(args, kwargs) if RULES.get(name) is not _blank else []
        )  # of these it takes the shape
        for index, output in enumerate(_tensors(result)):
            if not any(output is target for target in targets):
                where = {"index": index} if isinstance(result, (list, tuple)) else {}
                labels = self._labelled(func, output, operands, args, {**where, **kwargs})
                self.put(output, self._found(operands, labels))
        return result

    def _labelled(
        self,
        func: Any,
        output: Tensor,
        operands: Sequence[Tensor],
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> list[Label]:
        """The labels of an output by the operator's rule; such of which nothing is known where there is none."""
        labels: list[Label] = []
        if func.namespace == "aten":
            known = RULES.get(_name(func)) or (_pointwise if _is_pointwise(func.overloadpacket) else None)
            labels = known(self, output, *args, **kwargs) if known else []
        if [length(label) for label in labels] != list(output.shape):  # no rule, or it cannot say
            labels = [self._lost(operands, size) for size in output.shape]
        return labels

    def _found(self, operands: Sequence[Tensor], labels: Sequence[Label]) -> Known:
        """What is known of an operator's output, of which a rule found the labels."""
        each = [self.known(t) for t in operands]
        constant = all(known.constant for known in each)
        here = {run for run in self._taken if _tells(run)}
        self._taken = frozenset()
        own = [{*known.fixed, *filter(_tells, single(known.labels))} for known in each]
        taken = here.union(*own, *(known.taken for known in each))
        if not taken:
            return Known(labels, constant=constant)
        fixed = {run for runs in own for run in runs if _of_all(run, own, each)}
        kept = single(labels)
        return Known(labels, frozenset(taken - kept), frozenset((here | fixed) - kept), constant)

    def _lost(self, operands: Sequence[Tensor], size: int) -> Label:
        """For an output whose relation to its inputs is not known: `lost` if video tokens went in."""
        return unknown(size, *(label for t in operands for label in self.known(t).labels))

    def _write(
        self, target: Tensor, number: int, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """An operator wrote to `target`, the one with this number of all that it wrote to."""
        if func.namespace != "aten":
            operands = _tensors(args, kwargs)
            self._spread(target, Known([self._lost(operands, size) for size in target.shape]))
            return
        name = _name(func)
        if name in _MOVED:  # the tensor lies elsewhere; memory is as it was
            labels = self.known(target).labels
            self.put(target, Known([unknown(int(size), *labels) for size in target.shape]))
            return
        met = name.endswith("_") and (name.startswith("_foreach_") or _is_pointwise(func.overloadpacket))
        if name.startswith("_foreach_"):
            name = name.removeprefix("_foreach_")
            args = [one[number] if isinstance(one, (list, tuple)) else one for one in args]
        value = args[_VALUE[name]] if name in _VALUE else None
        if name in _FILLED or (name in _VALUE and not self._moves(value, target)):
            return
        operands = _tensors(args, kwargs)
        if name == "copy_":
            met, operands = False, [args[1]]
        if met or name == "copy_":
            labels = _broadcast([self.of(t) for t in operands], target.shape)
        elif name.endswith("_"):
            labels = [self._lost(operands, size) for size in target.shape]
        else:  # an output that was handed in
            given = {key: each for key, each in kwargs.items() if each is not target}
            labels = self._labelled(func, target, operands, args, given)
        others = [self.known(t) for t in operands if t is not target] if met else None
        self._spread(target, self._found(operands, labels), others)

    def _moves(self, value: Any, target: Tensor) -> bool:
        """Whether writing `value` to `target` may bring something from elsewhere: no constant, and not itself."""
        if not isinstance(value, Tensor) or _place(value) == _place(target):
            return False
        known = self.known(value)
        return not (known.constant and all(map(is_blank, known.labels)))

    def _spread(self, target: Tensor, after: Known, others: Iterable[Known] | None = None) -> None:
        """Let all tensors of the memory know what `target` holds now; `others` as `Write` has it."""
        write = Write(self.known(target), after, others=others)
        place = _place(target)
        for one in self._sharing(target):
            known = self._known[one]
            if _place(one) == place:
                self._set(one, after)
            else:
                labels = [write.after(label) for label in known.labels]
                fixed = frozenset(filter(write.holds, known.fixed))
                constant = known.constant and after.constant
                self._set(one, Known(labels, known.taken | after.taken, fixed, constant))

    def _sharing(self, target: Tensor) -> list[Tensor]:
        """The tensors that are still there of those whose memory is `target`'s, it among them."""
        self.known(target)
        refs = self._memory[_storage(target)]
        found = {id(one): one for one in (ref() for ref in refs) if one is not None}
        alive = [one for one in found.values() if _storage(one) == _storage(target)]
        self._memory[_storage(target)] = [ref(one) for one in alive]
        return alive

    def is_table(self, tensor: Tensor) -> bool:
        """Whether a tensor is a graph input of at most two dimensions, as it came in but for repeats: a weight or a
        table."""
        runs = [run for label in self.of(tensor) for run in atoms(label) if run.source.kind != "repeat"]
        sources = {run.source for run in runs}
        whole = all(run.whole and not run.also for run in runs) and len({run.dim for run in runs}) == len(
            runs
        )
        return (
            whole
            and len(sources) == 1
            and all(s.kind in ("input", "weight") and len(s.sizes) <= 2 for s in sources)
        )


_MOVED = ("set_", "resize_", "resize_as_", "as_strided_", "t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_",
          "unsqueeze_")  # fmt: skip
"""Operators in place that change which memory a tensor shows, or how."""
_FILLED = ("fill_", "zero_", "masked_fill_", "index_fill_", "fill_diagonal_", "tril_", "triu_", "normal_",
           "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_")  # fmt: skip
"""Operators that write constants or noise: whatever is left is where it was."""
_VALUE = {"copy_": 1, "index_put_": 2, "_index_put_impl_": 2, "scatter_": 3}
"""Operators that write an argument's elements -> its number; a number for an argument writes nothing else."""


def _name(func: Any) -> str:
    """`view` for aten::view.default."""
    return str(func.overloadpacket.__name__)


@functools.cache
def _is_pointwise(packet: Any) -> bool:
    """Whether an operator goes element by element, in any of its overloads."""
    if packet.__name__.removesuffix("_") in _POINTWISE:
        return True
    return any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


def _tensors(*values: Any) -> list[Tensor]:
    """The tensors in arguments or results of an operator."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
        elif isinstance(value, dict) and value:
            found += _tensors(*value.values())
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which memory a tensor shows, and how."""
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _inputs(labels: Sequence[Label]) -> frozenset[Atom]:
    """Every run along an axis of a graph input."""
    runs = [claim for label in labels for atom in atoms(label) for claim in atom.claims]
    return frozenset(claim for claim in runs if claim.source.kind == "input")


def _of_all(run: Atom, fixed: Sequence[set[Atom]], each: Sequence[Known]) -> bool:
    """Whether all that any of several tensors has of the axis of a run was taken from this run."""
    return all(run in own or run.axis not in known.axes for own, known in zip(fixed, each, strict=True))


def _tells(atom: Atom) -> bool:
    """Whether a position along this axis tells tensors apart: of an input, a convolution, a part of a batch."""
    return atom.source.kind in ("input", "conv") or atom.of_batch


def _written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += _tensors(value)
    return written


def _broadcast(labels: Sequence[Sequence[Label]], shape: Sequence[int]) -> list[Label]:
    """Labels of the element-by-element meeting of several tensors."""
    result: list[Label] = []
    for dim, size in enumerate(shape):
        met: Label = ()
        for one in labels:
            at = dim - len(shape) + len(one)
            if at >= 0 and length(one[at]) == size:
                met = merge(met, one[at]) if met else one[at]
        result.append(met if length(met) == size else fresh(size, "repeat"))
    return result


# Element by element: operators tagged `pointwise`, and these.
_POINTWISE = ("clone", "_to_copy", "alias", "detach", "lift_fresh", "native_dropout", "bernoulli",
              "_conj", "_conj_physical", "resolve_conj", "real", "imag", "polar", "complex", "contiguous",
              "_softmax", "_log_softmax", "cumsum", "nan_to_num", "masked_fill", "_safe_softmax",
              "glu_jvp", "dropout", "to")  # fmt: skip


@rule(*_POINTWISE)
def _pointwise(tracker: AxisTracker, output: Tensor, *args: Any, **kwargs: Any) -> list[Label]:
    operands = [tracker.of(t) for t in _tensors(args)]
    return _broadcast(operands, output.shape)


@rule("where")
def _where(tracker: AxisTracker, output: Tensor, condition: Tensor, *branches: Any) -> list[Label]:
    """Every element is of one branch or the other."""
    each = [tracker.known(branch) for branch in branches if isinstance(branch, Tensor)]
    met = _side_by_side(
        [Known(_broadcast([list(known.labels)], output.shape), known.taken) for known in each]
    )
    return _broadcast([met, tracker.of(condition)], output.shape)


@rule("copy")
def _copy(tracker: AxisTracker, output: Tensor, x: Tensor, source: Tensor, *_: Any) -> list[Label]:
    return _broadcast([tracker.of(source)], output.shape)


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
    """Tiling puts a repeat outside of the dimension it repeats."""
    labels = [()] * (output.dim() - x.dim()) + tracker.of(x)
    return [
        (*fresh(size // length(label), "repeat"), *label) if length(label) else fresh(size)
        for size, label in zip(output.shape, labels, strict=True)
    ]


@rule("repeat_interleave")
def _repeat_interleave(
    tracker: AxisTracker, output: Tensor, x: Tensor, repeats: Any = None, dim: int | None = None, **_: Any
) -> list[Label]:
    if dim is None or not isinstance(repeats, int):
        return []
    labels = list(tracker.of(x))
    labels[dim] = (*labels[dim], *fresh(repeats, "repeat"))
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
    if output.shape[dim] == 1:
        labels[dim] = tuple(pick(labels[dim], begin))
    elif step == 1:
        labels[dim] = cut(labels[dim], begin, max(begin, stop))
    else:
        labels[dim] = unknown(output.shape[dim], labels[dim])
    return labels


@rule("select")
def _select(tracker: AxisTracker, output: Tensor, x: Tensor, dim: int, index: int) -> list[Label]:
    labels = tracker.of(x)
    tracker.take(pick(labels.pop(dim), index % x.shape[dim]))
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
    dim %= output.dim()  # ATen lets an empty 1-D tensor pass
    tensors = [t for t in tensors if t.dim() == output.dim() and t.shape[dim]] or tensors[:1]
    each = [tracker.known(t) for t in tensors]
    column = [known.labels[dim] for known in each]
    rest = [Known([*known.labels[:dim], *known.labels[dim + 1 :]], known.taken) for known in each]
    labels = _side_by_side(rest)
    labels.insert(dim, cat(_named(column) if dim == 0 and len(column) > 1 else column))
    return labels


def _side_by_side(each: Sequence[Known]) -> list[Label]:
    """The labels of the dimensions that tensors have in common which lie in one from now on."""
    labels = []
    for column in zip(*(known.labels for known in each), strict=True):
        met = functools.reduce(either, column)
        blank = [known for known, label in zip(each, column, strict=True) if is_blank(label)]
        if any(
            known.axes & axes_of(met) for known in blank
        ):  # one position, repeated, is in the place of others
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
    """Labels of parts of a batch, in which one video by itself is a position of the batch."""
    source = Source("part", (sum(map(length, labels)),))
    starts = itertools.accumulate(map(length, labels), initial=0)
    return [label or (Atom(source, 0, 1, base=at),) for label, at in zip(labels, starts, strict=False)]


@rule("stack")
def _stack(tracker: AxisTracker, output: Tensor, tensors: list[Tensor], dim: int = 0) -> list[Label]:
    each = [tracker.known(t) for t in tensors]
    labels = _side_by_side(each)
    alike = all(_without_features(known) == _without_features(each[0]) for known in each)
    labels.insert(dim % output.dim(), fresh(len(tensors), "opaque" if alike else "part"))
    return labels


@rule("constant_pad_nd")
def _pad(
    tracker: AxisTracker, output: Tensor, x: Tensor, pad: list[int], *_: Any, kind: str = "blank"
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
def _pad_with_edges(tracker: AxisTracker, output: Tensor, x: Tensor, pad: list[int]) -> list[Label]:
    return _pad(tracker, output, x, pad, kind="opaque")


@rule("arange")
def _arange(tracker: AxisTracker, output: Tensor, *_: Any, **__: Any) -> list[Label]:
    (size,) = output.shape
    return [axis(tracker.positions.setdefault(size, Source("position", (size,))), 0)]


@rule("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like", "new_empty",
      "new_zeros", "new_ones", "new_full", "scalar_tensor", "empty_strided", "new_empty_strided",
      "rand", "randn", "rand_like", "randn_like", "randint", "randint_like")  # fmt: skip
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


@rule("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
      "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_fused_rms_norm", "rms_norm")  # fmt: skip
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
        rows = unknown(a.shape[-2], tracker.of(b)[-2], summed=True)
    if tracker.is_table(b):
        columns = unknown(b.shape[-1], tracker.of(a)[-1], summed=True)
        tracker.embed([*lead, rows], tracker.of(a)[-1])
    return [*lead, rows, columns]


@rule("addmm", "baddbmm")
def _add_matmul(
    tracker: AxisTracker, output: Tensor, c: Tensor, a: Tensor, b: Tensor, **_: Any
) -> list[Label]:
    return _matmul(tracker, output, a, b)


@rule("linear")
def _linear(tracker: AxisTracker, output: Tensor, x: Tensor, *_: Any, **__: Any) -> list[Label]:
    *kept, features = tracker.of(x)
    tracker.embed(kept, features)
    return [*kept, unknown(output.shape[-1], features, summed=True)]


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
    batch, channels, *axes = tracker.of(x)
    tracker.embed([batch, *axes], channels)
    source = Source("conv", spatial, of=(batch, channels, *axes))
    return [
        batch,
        unknown(output.shape[1], channels, summed=True),
        *[axis(source, dim) for dim in range(len(spatial))],
    ]


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
