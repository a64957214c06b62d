"""Labels for every tensor of a graph: a dispatch mode under which a graph runs on fake tensors.

`AxisTracker` keeps one label (`axes.py`) for each dimension of each tensor. The rule of an ATen operator
(`axis_rules.py`) gives the labels of its output. A write changes the labels of all tensors that share the memory
(`axis_writes.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify_compiler.passes.alike import AlikeSlices, Pieces
from sparsify_compiler.passes.axes import (
    Atom,
    Label,
    Source,
    atoms,
    axis,
    cat,
    fresh,
    is_blank,
    length,
    single,
    unknown,
)
from sparsify_compiler.passes.axis_rules import RULES, blank, broadcast, is_pointwise, pointwise, tensors_in
from sparsify_compiler.passes.axis_writes import Known, Write
from sparsify_compiler.runtime.positions import Mesh


@dataclass(frozen=True, slots=True)
class Embedding:
    """A product of graph inputs with weights: the axes that it keeps, and those over which it sums."""

    kept: frozenset[Atom]
    summed: frozenset[Atom]


class End(NamedTuple):
    """Everything known about an input or an output of a graph after it ran."""

    known: Known
    alike: list[Pieces]
    written: bool
    """Whether its memory was written to."""


class AxisTracker(TorchDispatchMode):
    """Labels every tensor that operators under this mode make or write to."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()
        self._memory: dict[int, list[ref[Tensor]]] = {}
        """Storage -> the tensors seen in it."""
        self._taken: frozenset[Atom] = frozenset()
        """The positions from which the current rule takes its output."""
        self._kept: dict[int, set[Atom]] = {}
        """Identity of an operand -> its positions that the output of the current rule has in longer runs."""
        self.positions: dict[int, Source] = {}
        """Length -> its source: a mesh made once for queries and once for keys is the same mesh."""
        self.meshes: dict[Mesh, Label] = {}
        """The label of each mesh that was found in values: equal meshes are one."""
        self._taken_by = WeakTensorKeyDictionary()
        """Index, until it is written to -> label of a dimension -> label of the positions that it takes from it."""
        self.alike = AlikeSlices()
        """The slices of every tensor that are equal: a mask whose rows are alike is a mask of keys."""
        self.embeddings: set[Embedding] = set()
        """All embeddings met so far."""

    def known(self, tensor: Tensor) -> Known:
        """Everything known about a tensor; nothing about one that was not seen before."""
        found = self._known.get(tensor)
        if found is None:
            self.put(tensor, Known([fresh(int(size)) for size in tensor.shape], constant=True))
            found = self._known[tensor]
        return found

    def of(self, tensor: Tensor) -> list[Label]:
        """The labels of a tensor's dimensions."""
        return list(self.known(tensor).labels)

    def put(self, tensor: Tensor, known: Known) -> None:
        """Set the knowledge about a tensor that was not seen before, or that now shows other memory."""
        self._set(tensor, known)
        self._memory.setdefault(_storage(tensor), []).append(ref(tensor))

    def put_input(self, tensor: Tensor, is_weight: bool, name: str = "") -> Source:
        """Label an input, or a weight, by its own axes."""
        self.alike.put_input(tensor, name)
        source = Source("weight" if is_weight else "input", tuple(tensor.shape))
        self.put(tensor, Known([axis(source, dim) for dim in range(tensor.dim())]))
        return source

    def put_mesh(self, tensor: Tensor, dim: int, mesh: Mesh) -> None:
        """Label a dimension of an input whose values are the positions of a grid as the mesh that they are."""
        known = self.known(tensor)
        if mesh not in self.meshes:
            video = tuple(factor for size in mesh.grid for factor in fresh(size, "position"))
            self.meshes[mesh] = cat([fresh(mesh.before), video, fresh(mesh.after)])
        labels = [self.meshes[mesh] if place == dim else label for place, label in enumerate(known.labels)]
        self._set(tensor, replace(known, labels=labels))

    def end_of(self, tensor: Tensor) -> End:
        """Everything known about a tensor, for the tracker of another graph."""
        return End(self.known(tensor), self.alike.of(tensor), self.alike.is_written(tensor))

    def receive(self, tensor: Tensor, end: End) -> None:
        """Set the knowledge about a tensor to that of another tracker."""
        self.put(tensor, end.known)
        self.alike.put(tensor, end.alike, written=end.written)

    def take(self, positions: Iterable[Atom]) -> None:
        """Record, for a rule, the positions from which its output is taken, along axes that it does not have."""
        self._taken = self._taken.union(positions)

    def keep(self, operand: Tensor, positions: Iterable[Atom]) -> None:
        """Record, for a rule, the positions of an operand that its output has as parts of longer runs."""
        self._kept.setdefault(id(operand), set()).update(positions)

    def taken_from(self, label: Label, index: Tensor) -> Label:
        """The label of the positions that an index takes from a dimension, the same for the same index."""
        known: dict[Label, Label] = self._taken_by.setdefault(index, {})
        return known.setdefault(label, unknown(len(index), label, *self.of(index)))

    def embed(self, kept: Sequence[Label], summed: Label) -> None:
        """Record, for a rule, that it multiplies weights into `summed`, at every position of `kept`."""
        gone = _inputs([summed])
        if gone or not summed:
            self.embeddings.add(Embedding(_inputs(kept), gone))

    def derive(self, tensor: Tensor, operands: Sequence[Tensor]) -> None:
        """Record that a tensor is made of `operands` in an unknown way."""
        self.put(tensor, Known([self._lost(operands, size) for size in tensor.shape]))

    def lose(self, tensors: Sequence[Tensor], operands: Sequence[Tensor]) -> None:
        """Record a write to `tensors`, whose new elements are made of `operands` in an unknown way."""
        lost = [Known([self._lost([tensor, *operands], size) for size in tensor.shape]) for tensor in tensors]
        for tensor, after in zip(tensors, lost, strict=True):
            self._forget(tensor)
            self._spread(tensor, after)
            self.alike.lose(tensor)

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
        self.alike.follow(func, args, kwargs, targets, result)
        for number, target in enumerate(targets):
            self._write(target, number, func, args, kwargs)
        # `blank` reads only the shapes of its operands.
        operands = tensors_in(args, kwargs) if RULES.get(name) is not blank else []
        for index, output in enumerate(tensors_in(result)):
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
        """The labels of an output by the operator's rule; labels of unknown axes without a rule."""
        labels: list[Label] = []
        if func.namespace == "aten":
            known = RULES.get(_name(func)) or (pointwise if is_pointwise(func.overloadpacket) else None)
            labels = known(self, output, *args, **kwargs) if known else []
        if [length(label) for label in labels] != list(output.shape):  # no rule, or it finds no labels
            labels = [self._lost(operands, size) for size in output.shape]
        return labels

    def _found(self, operands: Sequence[Tensor], labels: Sequence[Label]) -> Known:
        """Everything known about an operator's output, from its labels and operands."""
        each = [self.known(t) for t in operands]
        constant = all(known.constant for known in each)
        here = {run for run in self._taken if _distinguishes(run)}
        kept = [self._kept.get(id(t), ()) for t in operands]
        each = [_without(known, runs) if runs else known for known, runs in zip(each, kept, strict=True)]
        own = [
            {*known.fixed, *filter(_distinguishes, single(known.labels).difference(runs))}
            for known, runs in zip(each, kept, strict=True)
        ]
        self._taken, self._kept = frozenset(), {}
        taken = here.union(*own, *(known.taken for known in each))
        if not taken:
            return Known(labels, constant=constant)
        fixed = {run for runs in own for run in runs if _of_all(run, own, each)}
        there = single(labels)
        return Known(labels, frozenset(taken - there), frozenset((here | fixed) - there), constant)

    def _lost(self, operands: Sequence[Tensor], size: int) -> Label:
        """A label for an output whose relation to its inputs is unknown: `lost` if video tokens went in."""
        return unknown(size, *(label for t in operands for label in self.known(t).labels))

    def _write(
        self, target: Tensor, number: int, func: Any, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        """Update the labels after a write to `target`, number `number` of the operator's written arguments."""
        self._forget(target)
        if func.namespace != "aten":
            operands = tensors_in(args, kwargs)
            self._spread(target, Known([self._lost(operands, size) for size in target.shape]))
            return
        name = _name(func)
        if name in _MOVED:  # the tensor shows memory otherwise; no element changes
            labels = self.known(target).labels
            self.put(target, Known([unknown(int(size), *labels) for size in target.shape]))
            return
        met = name.endswith("_") and (name.startswith("_foreach_") or is_pointwise(func.overloadpacket))
        if name.startswith("_foreach_"):
            name = name.removeprefix("_foreach_")
            args = [one[number] if isinstance(one, (list, tuple)) else one for one in args]
        value = args[_VALUE[name]] if name in _VALUE else None
        if name in _FILLED or (name in _VALUE and not self._moves(value, target)):
            return
        operands = tensors_in(args, kwargs)
        if name == "copy_":
            met, operands = False, [args[1]]
        if met or name == "copy_":
            labels = broadcast([self.of(t) for t in operands], target.shape)
        elif name.endswith("_"):
            labels = [self._lost(operands, size) for size in target.shape]
        else:  # an output given as an argument
            given = {key: each for key, each in kwargs.items() if each is not target}
            labels = self._labelled(func, target, operands, args, given)
        others = [self.known(t) for t in operands if t is not target] if met else None
        self._spread(target, self._found(operands, labels), others)

    def _forget(self, target: Tensor) -> None:
        """Note that an index may have other values from now on."""
        for one in self._sharing(target) if len(self._taken_by) else ():
            self._taken_by.pop(one, None)

    def _moves(self, value: Any, target: Tensor) -> bool:
        """Whether `value` may bring elements from other places: it is no constant, and not `target` itself."""
        if not isinstance(value, Tensor) or _place(value) == _place(target):
            return False
        known = self.known(value)
        return not (known.constant and all(map(is_blank, known.labels)))

    def _spread(self, target: Tensor, after: Known, others: Iterable[Known] | None = None) -> None:
        """Update every tensor that shares memory with `target`, after a write; `after`, `others` as in `Write`."""
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
        """The live tensors with the memory of `target`, `target` among them."""
        self.known(target)
        refs = self._memory[_storage(target)]
        found = {id(one): one for one in (ref() for ref in refs) if one is not None}
        alive = [one for one in found.values() if _storage(one) == _storage(target)]
        self._memory[_storage(target)] = [ref(one) for one in alive]
        return alive

    def is_table(self, tensor: Tensor) -> bool:
        """Whether a tensor is a weight or a table: a graph input of at most two dimensions, unchanged except for
        repeats."""
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
"""In-place operators that change which memory a tensor shows, or how."""
_FILLED = ("fill_", "zero_", "masked_fill_", "index_fill_", "fill_diagonal_", "tril_", "triu_", "normal_",
           "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_")  # fmt: skip
"""Operators that write constants or noise: all other elements stay in place."""
_VALUE = {"copy_": 1, "index_put_": 2, "_index_put_impl_": 2, "scatter_": 3}
"""Operator -> position of the argument whose elements it writes; a number there counts as a constant."""


def _name(func: Any) -> str:
    """`view` for aten::view.default."""
    return str(func.overloadpacket.__name__)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The memory that a tensor shows, with offset, sizes, strides and type."""
    return _storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _inputs(labels: Sequence[Label]) -> frozenset[Atom]:
    """The runs of labels along axes of graph inputs."""
    runs = [claim for label in labels for atom in atoms(label) for claim in atom.claims]
    return frozenset(claim for claim in runs if claim.source.kind == "input")


def _without(known: Known, runs: Iterable[Atom]) -> Known:
    """Knowledge without the positions from which a tensor was taken, as far as these runs claim them."""
    claims = {claim for run in runs for claim in run.claims}
    taken = frozenset(run for run in known.taken if not run.claims <= claims)
    return replace(known, taken=taken, fixed=known.fixed & taken)


def _of_all(run: Atom, fixed: Sequence[set[Atom]], each: Sequence[Known]) -> bool:
    """Whether every tensor that has anything of the axis of a run was taken from this run."""
    return all(run in own or run.axis not in known.axes for own, known in zip(fixed, each, strict=True))


def _distinguishes(atom: Atom) -> bool:
    """Whether a position on this axis distinguishes tensors: of an input, a convolution or a batch."""
    return atom.source.kind in ("input", "conv") or atom.of_batch


def _written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += tensors_in(value)
    return written
