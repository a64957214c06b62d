"""Labels for every tensor of a graph: a dispatch mode under which a graph runs on fake tensors.

`AxisTracker` keeps one label (`axes.py`) for each dimension of each tensor. For every ATen operator it asks the
operator's rule (`axis_rules.py`) for the labels of the output. A write changes the labels of all tensors that share
the memory (`axis_writes.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify_compiler.passes.axes import Atom, Label, Source, atoms, fresh, is_blank, length, single, unknown
from sparsify_compiler.passes.axis_rules import RULES, blank, broadcast, is_pointwise, pointwise, tensors_in
from sparsify_compiler.passes.axis_writes import Known, Write


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
            tensors_in(args, kwargs) if RULES.get(name) is not blank else []
        )  # of these it takes the shape
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
        """The labels of an output by the operator's rule; such of which nothing is known where there is none."""
        labels: list[Label] = []
        if func.namespace == "aten":
            known = RULES.get(_name(func)) or (pointwise if is_pointwise(func.overloadpacket) else None)
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
            operands = tensors_in(args, kwargs)
            self._spread(target, Known([self._lost(operands, size) for size in target.shape]))
            return
        name = _name(func)
        if name in _MOVED:  # the tensor lies elsewhere; memory is as it was
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
            written += tensors_in(value)
    return written
