"""Find neighbouring slices of a tensor that are equal for all inputs: the rows of a mask that are alike.

    seg = pad(~keep, (480, 0))                    [B, 500]        480 alike, then 20 by the input `keep`
    mask = seg[:, :, None] == seg[:, None, :]     [B, 500, 500]   the same in its rows, and in its columns

Each dimension of a tensor is a sequence of pieces. All slices at the positions of an alike piece are equal. Pieces
lie in a `_Memory`, for the tensor that allocated it. Any other tensor of this memory reads them by its strides, and
writes to them through its strides. So a write through a view reaches all views, and the base.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring positions of a dimension."""

    size: int
    content: Hashable = None
    """A number for the content of each slice; None where slices may differ. Equal numbers mean equal slices."""
    differs: str = ""
    """The cause of the difference; empty where there is none."""


Pieces = tuple[Piece, ...]
_UNKNOWN = "an operator that cannot be followed"


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Memory:
    """The pieces of the tensor that allocated it."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    pieces: list[Pieces]
    serial: int
    writes: int = 0
    """Number of writes so far."""


class _Place(NamedTuple):
    """The part of a memory that a tensor shows."""

    dims: tuple[int | None, ...]
    """Dimension of the tensor -> dimension of the memory; None for a dimension along which it repeats."""
    starts: tuple[int, ...]
    """The first position along each dimension of the memory."""
    stops: tuple[int, ...]


@dataclass(slots=True, eq=False)
class AlikeSlices:
    """Knows the pieces of every tensor that it has followed."""

    _memories: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _by_storage: "WeakValueDictionary[int, _Memory]" = field(default_factory=WeakValueDictionary)
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _serial: Any = field(default_factory=itertools.count)

    def of(self, tensor: Tensor) -> list[Pieces]:
        """The pieces of each dimension of a tensor."""
        memory = self._memory(tensor)
        place = _place(memory, tensor)
        if place is None:
            return _all_differ(tensor.shape, _cause(memory.pieces) or _UNKNOWN)
        found: list[Pieces] = []
        for size, dim in zip(tensor.shape, place.dims, strict=True):
            if dim is None:
                found.append((self._same(size),))
                continue
            rest = (
                tuple(place.dims),
                *(one[:dim] + one[dim + 1 :] for one in (place.starts, place.stops, memory.sizes)),
            )
            whole = rest[1] == (0,) * len(rest[1]) and rest[2] == rest[3] and place.dims == _straight(memory)
            pieces = _cut(memory.pieces[dim], place.starts[dim], place.stops[dim])
            found.append(pieces if whole else self._map(pieces, rest))
        return found

    def put(self, tensor: Tensor, pieces: Sequence[Pieces], *, written: bool = False) -> None:
        """Set the pieces of a tensor that no operator made here.

        Args:
            written: whether the tensor's memory was written to. If not, known memory keeps its pieces.
        """
        known = self._by_storage.get(_storage(tensor))
        if known is not None and not written:
            self._memories[tensor] = known
            return
        if known is not None:
            self._lose(known, _UNKNOWN)
        numbers: dict[Hashable, Hashable] = {None: None}
        for piece in itertools.chain.from_iterable(pieces):
            constant = isinstance(piece.content, tuple)
            numbers.setdefault(piece.content, piece.content if constant else self._fresh())
        self._new(tensor, [tuple(replace(p, content=numbers[p.content]) for p in one) for one in pieces])

    def put_input(self, tensor: Tensor, name: str) -> None:
        """Record an input: any two slices of it may differ."""
        self.put(tensor, _all_differ(tensor.shape, f"input {name!r}"))

    def lose(self, tensor: Tensor) -> None:
        """Record a write of anything to the memory of a tensor."""
        self._lose(self._memory(tensor), _UNKNOWN)

    def is_written(self, tensor: Tensor) -> bool:
        """Whether the memory of a tensor was written to."""
        return self._memory(tensor).writes > 0

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: Any, written: Sequence[Tensor], out: Any
    ) -> None:
        """Record an ATen operator after it ran: `written` are the arguments to which it wrote."""
        name = func.overloadpacket.__name__ if func.namespace == "aten" else ""
        pointwise = _is_pointwise(func)
        for target in written:
            self._write(target, name, pointwise, args, kwargs)
        for output in out if isinstance(out, (list, tuple)) else [out]:
            if not isinstance(output, Tensor) or output in self._memories:
                continue
            known = self._by_storage.get(_storage(output))
            if known is not None:
                self._memories[output] = known
                continue
            rule = _RULES.get(name) or (_pointwise if pointwise else None)
            pieces = rule(self, name, output, args, kwargs) if rule and output is out else None
            self._new(output, pieces or _all_differ(output.shape, self._why(name, args, kwargs)))

    def content(self, tensor: Tensor) -> Hashable:
        """A number for the content of all of a tensor, as it is now."""
        memory = self._memory(tensor)
        place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        constants = {piece.content for pieces in memory.pieces for piece in pieces}
        if len(constants) == 1 and isinstance(constant := constants.pop(), tuple):
            return constant
        return self.number("tensor", memory.serial, memory.writes, place)

    def number(self, *key: Hashable) -> int:
        """A number for a content that `key` determines."""
        return self._numbers.setdefault(key, self._fresh())

    def meet(self, each: Sequence[Pieces], key: Hashable) -> Pieces:
        """The pieces of slices that are made, in a way that `key` determines, of slices of several tensors."""
        ends = sorted({end for pieces in each for end in itertools.accumulate(p.size for p in pieces)})
        met = []
        for start, stop in itertools.pairwise([0, *ends]):
            parts = [_cut(pieces, start, stop)[0] for pieces in each]
            cause = next((part.differs for part in parts if part.content is None), "")
            content = None if cause else self.number(key, *(part.content for part in parts))
            met.append(Piece(stop - start, content, cause))
        return _merged(met)

    def _map(self, pieces: Pieces, key: Hashable) -> Pieces:
        """The pieces of slices that are made of these, one by one; constants stay."""
        return _merged(
            piece
            if piece.content is None or isinstance(piece.content, tuple)
            else replace(piece, content=self.number(key, piece.content))
            for piece in pieces
        )

    def _same(self, size: int) -> Piece:
        return Piece(size, self._fresh())

    def _fresh(self) -> int:
        return next(self._serial)

    def _memory(self, tensor: Tensor) -> _Memory:
        known = self._by_storage.get(_storage(tensor))
        if known is None:
            self._new(tensor, _all_differ(tensor.shape, _UNKNOWN))
        elif self._memories.get(tensor) is not known:  # it shows other memory now
            self._memories[tensor] = known
        return self._memories[tensor]

    def _new(self, tensor: Tensor, pieces: list[Pieces]) -> None:
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        memory = _Memory(shape, strides, int(tensor.storage_offset()), tensor.dtype, pieces, self._fresh())
        self._memories[tensor] = self._by_storage[_storage(tensor)] = memory

    def _lose(self, memory: _Memory, why: str) -> None:
        memory.writes += 1
        memory.pieces = _all_differ(memory.sizes, why)

    def _why(self, name: str, args: Sequence[Any], kwargs: Any) -> str:
        """The cause of differences in an output about which nothing is known."""
        causes = (_cause(self.of(one)) for one in _tensors(args, kwargs))
        return next(filter(None, causes), "") or f"operator {name or 'of another library'!r}"

    def _write(self, target: Tensor, name: str, pointwise: bool, args: Sequence[Any], kwargs: Any) -> None:
        memory = self._memory(target)
        place = _place(memory, target)
        value: list[Pieces] | None = None
        if name == "zero_" or (name == "fill_" and isinstance(args[1], (bool, int, float))):
            value = _constant(target, 0 if name == "zero_" else args[1])
        elif name in ("copy_", "fill_"):
            value = _pointwise(self, "copy_", target, args[1:2], {})
        elif pointwise and name.endswith("_") and args and args[0] is target:
            value = _pointwise(self, name, target, args, kwargs)
        if place is None or value is None:
            self._lose(memory, self._why(name, args[1:], kwargs))
            return
        fulls = [
            start == 0 and stop == size
            for start, stop, size in zip(place.starts, place.stops, memory.sizes, strict=True)
        ]
        serial = self._fresh()
        after = []
        for dim, size in enumerate(memory.sizes):
            start, stop = place.starts[dim], place.stops[dim]
            own = value[place.dims.index(dim)] if dim in place.dims else (self._same(stop - start),)
            inside = own
            if not all(fulls[:dim] + fulls[dim + 1 :]):
                inside = self.meet([_cut(memory.pieces[dim], start, stop), own], ("write", serial, dim))
            ends = _cut(memory.pieces[dim], 0, start), _cut(memory.pieces[dim], stop, size)
            after.append(_merged([*ends[0], *inside, *ends[1]]))
        memory.writes += 1
        memory.pieces = after


def _straight(memory: _Memory) -> tuple[int, ...]:
    return tuple(range(len(memory.sizes)))


def _place(memory: _Memory, tensor: Tensor) -> _Place | None:
    """The part of a memory that a tensor shows; None if it is no block of it."""
    if tensor.dtype != memory.dtype or tensor.layout is not torch.strided:
        return None
    order = sorted(
        (dim for dim, size in enumerate(memory.sizes) if size > 1), key=lambda dim: -memory.strides[dim]
    )
    inner = 1
    for dim in reversed(order):
        if memory.strides[dim] < inner:
            return None  # its elements overlap
        inner = memory.strides[dim] * memory.sizes[dim]
    starts, stops = [0] * len(memory.sizes), [1] * len(memory.sizes)
    rest = int(tensor.storage_offset()) - memory.offset
    for dim in order:
        starts[dim], rest = divmod(rest, memory.strides[dim])
        stops[dim] = starts[dim] + 1
        if not 0 <= starts[dim] < memory.sizes[dim]:
            return None
    dims: list[int | None] = []
    by_stride = {memory.strides[dim]: dim for dim in order}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        at = by_stride.get(stride) if size > 1 and stride else None
        if size == 0 or (size > 1 and stride and at is None) or (at is not None and at in dims):
            return None
        if at is not None:
            stops[at] = starts[at] + int(size)
            if stops[at] > memory.sizes[at]:
                return None
        dims.append(at)
    single = [dim for dim, size in enumerate(memory.sizes) if size <= 1]
    if 0 in memory.sizes:
        return None
    if tuple(tensor.shape) == memory.sizes:  # dimensions of size 1 stay what they are
        dims = [at if at is not None else dim if dim in single else None for dim, at in enumerate(dims)]
    return None if rest else _Place(tuple(dims), tuple(starts), tuple(stops))


def _cut(pieces: Pieces, start: int, stop: int) -> Pieces:
    """The pieces of a part of a dimension."""
    found, at = [], 0
    for piece in pieces:
        size = min(stop, at + piece.size) - max(start, at)
        if size > 0:
            found.append(replace(piece, size=size))
        at += piece.size
    return tuple(found)


def _merged(pieces: Iterable[Piece]) -> Pieces:
    """Pieces with neighbours of equal content, or of the same cause, in one."""
    done: list[Piece] = []
    for piece in pieces:
        last = done[-1] if done else None
        if last is not None and (last.content, last.differs) == (piece.content, piece.differs):
            done[-1] = replace(piece, size=last.size + piece.size)
        else:
            done.append(piece)
    return tuple(done)


def _all_differ(shape: Iterable[int], why: str) -> list[Pieces]:
    return [(Piece(int(size), None, why),) for size in shape]


def _constant(output: Tensor, value: Any) -> list[Pieces]:
    """The pieces of a tensor that has one value everywhere, or new ones of a dimension."""
    content = ("constant", float(value), str(output.dtype))
    return [(Piece(int(size), content),) for size in output.shape]


def _cause(each: Iterable[Pieces]) -> str:
    """The first cause of a difference."""
    return next((piece.differs for pieces in each for piece in pieces if piece.content is None), "")


def _tensors(args: Sequence[Any], kwargs: Any) -> list[Tensor]:
    leaves = tree_leaves((list(args), kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# The rules: (slices, name, output, args, kwargs) -> the pieces of the output; None if nothing is known

_Rule = Callable[[AlikeSlices, str, Tensor, Sequence[Any], Any], list[Pieces] | None]
_ELEMENTWISE = (
    "clone",
    "_to_copy",
    "masked_fill",
    "masked_fill_",
    "where",
    "nan_to_num",
    "alias",
    "lift_fresh",
)


def _is_pointwise(func: Any) -> bool:
    if func.namespace != "aten" or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in _ELEMENTWISE


def _pointwise(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    operands = _tensors(args, kwargs)
    numbers = tree_map(lambda leaf: "tensor" if isinstance(leaf, Tensor) else leaf, (list(args), kwargs))
    key = (name, str(numbers), str(output.dtype))
    each = [known.of(one) for one in operands]
    found = []
    for back in range(output.dim(), 0, -1):
        size = int(output.shape[-back])
        sides = [
            own[-back]
            if back <= one.dim() and one.shape[-back] == size
            else (Piece(size, known.content(one)),)
            for one, own in zip(operands, each, strict=True)
        ]
        copies = name in ("copy_", "clone") and operands[0].dtype == output.dtype
        found.append(sides[0] if copies else known.meet(sides or [(known._same(size),)], key))
    return found


def _filled(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    place = 2 if name == "new_full" else 1
    value = args[place] if len(args) > place else kwargs.get("fill_value")
    if name in ("zeros", "zeros_like", "new_zeros"):
        value = 0
    elif name in ("ones", "ones_like", "new_ones"):
        value = 1
    return _constant(output, value) if isinstance(value, (bool, int, float)) else None


def _beside(known: AlikeSlices, name: str, tensors: Sequence[Tensor], dim: int) -> list[Pieces]:
    """The pieces of tensors that lie one after the other along a dimension."""
    each = [known.of(one) for one in tensors]
    shape = tuple(one.shape[dim] for one in tensors)
    return [
        _merged(itertools.chain.from_iterable(own[dim] for own in each))
        if at == dim
        else known.meet([own[at] for own in each], (name, shape))
        for at in range(tensors[0].dim())
    ]


def _cat(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0))
    if any(one.dim() != output.dim() or one.dtype != output.dtype for one in tensors):
        return None
    return _beside(known, name, tensors, dim % output.dim())


def _stack(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    tensors, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.dim()
    each = [known.of(one) for one in tensors]
    found = [known.meet([own[at] for own in each], name) for at in range(output.dim() - 1)]
    found.insert(dim, _merged(Piece(1, known.content(one)) for one in tensors))
    return found


def _padded(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    x, pad = args[0], list(args[1])
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    if min(pad) < 0 or not isinstance(value, (bool, int, float)):
        return None
    each, constants = known.of(x), _constant(output, value)
    if all(piece.content == constants[0][0].content for pieces in each for piece in pieces):
        return constants
    ends = [(0, 0)] * x.dim()
    for back in range(len(pad) // 2):
        ends[x.dim() - 1 - back] = pad[2 * back], pad[2 * back + 1]
    found = []
    for at, own in enumerate(each):
        if any(end != (0, 0) for end in ends[:at] + ends[at + 1 :]):  # every slice gets padding too
            own = known.meet([own], (name, tuple(pad), value))
        left, right = ((replace(constants[at][0], size=size),) if size else () for size in ends[at])
        found.append(_merged([*left, *own, *right]))
    return found


def _repeated(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    x, each = args[0], known.of(args[0])
    found: list[Pieces] = []
    for back in range(output.dim(), 0, -1):
        size = int(output.shape[-back])
        if back > x.dim() or x.shape[-back] == 1:
            found.append((known._same(size),))
        else:
            own = known._map(each[-back], (name, tuple(output.shape)))
            found.append(_merged(own * (size // int(x.shape[-back]))))
    return found


def _reduced(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    x, dims = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    gone = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {dim % x.dim() for dim in gone}
    kept = [at for at in range(x.dim()) if at not in gone]
    each = known.of(x)
    found = {at: known.meet([each[at]], (name, tuple(sorted(gone)), output.dim())) for at in kept}
    if output.dim() == x.dim():
        return [found.get(at, (known._same(1),)) for at in range(x.dim())]
    return list(found.values())


def _outer(
    known: AlikeSlices, name: str, output: Tensor, args: Sequence[Any], kwargs: Any
) -> list[Pieces] | None:
    """A product of a column and a row: one multiplication for each element."""
    a, b = args[:2]
    if a.shape[-1] != 1 or a.dim() != b.dim():
        return None
    rows, columns = known.of(a), known.of(b)
    lead = [known.meet([rows[at], columns[at]], name) for at in range(a.dim() - 2)]
    return [
        *lead,
        known.meet([rows[-2]], (name, known.content(b))),
        known.meet([columns[-1]], (name, known.content(a))),
    ]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("full", "full_like", "new_full", "scalar_tensor", "zeros", "zeros_like", "new_zeros", "ones", "ones_like",
         "new_ones"), _filled,
    ),
    "cat": _cat,
    "stack": _stack,
    "constant_pad_nd": _padded,
    "repeat": _repeated,
    **dict.fromkeys(("any", "all", "amax", "amin"), _reduced),
    **dict.fromkeys(("mm", "bmm"), _outer),
}  # fmt: skip
