"""Count the work of a model: operations, bytes and memory, of all ranks and of each.

Dynamo traces the model on the meta device. Its graphs are shared among 2 and among 4 ranks, as at run time, and
each node is counted on the first rank of both. A count is linear in a rank's part of the tokens, so these two give
it for any number of ranks. Attention whose heads are shared is left out: `runtime/cost.py` has its formula.

Of blocks that are alike only two are traced; the second one counts for all that are left out. The count holds only
if its operations are those of the whole model, which runs once without tracing. Otherwise all blocks are traced.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sparsify_compiler import _torch
from sparsify_compiler.backend import configure
from sparsify_compiler.parallel.ops import GATHER_TOKENS, TO_HEADS, TO_TOKENS
from sparsify_compiler.parallel.shares import share
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.fx import module_path, written_by
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.passes.sharding import Sharding
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime.cost import Attention, Split, Work, attention_of

SIZES = (2, 4)
"""Numbers of ranks for which nodes are counted."""
_TRACED = 2
"""Blocks that are traced of those that are alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """The work of a model, with the names of its attentions."""

    work: Work
    names: tuple[str, ...]
    """The name of each attention in `work`."""
    sharings: tuple[Sharding, ...]
    """The way in which 2 ranks share each graph."""


def count(model: nn.Module, inputs: Mapping[str, Any], *, fuses: bool = True) -> Counted:
    """The work of one call of a model without gradients, all attention dense.

    Args:
        model: a model on the meta device, in eval mode.
        inputs: the keyword arguments of the call, with tensors on the meta device.
        fuses: whether operators between products run as one, as Inductor compiles them; otherwise each of them
            reads and writes the memory.

    Raises:
        OptionError: the model has something that ranks cannot share and must not repeat.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    total, weights = counter.get_total_flops(), _weights(model)
    short, lists = _shortened(model)
    found = _count(short, lists, inputs, fuses)
    if lists and not math.isclose(found.work.total, total, rel_tol=1e-9):
        found = _count(model, {}, inputs, fuses)
    shared, every = found.work.flops
    outside = max(0.0, total - found.work.total)  # in the code between graphs, on every rank
    work = replace(found.work, flops=Split(shared, every + outside), weights=weights)
    return replace(found, work=work)


def _weights(model: nn.Module) -> int:
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}.values()
    return sum(one.numel() * one.element_size() for one in tensors)


def _shortened(model: nn.Module) -> tuple[nn.Module, dict[str, int]]:
    """(a copy with fewer blocks, path of a list of blocks -> its number of blocks)."""
    lists: dict[str, int] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{one}.") for one in lists)
        if isinstance(module, nn.ModuleList) and len(module) > _TRACED and not inside:
            first = _likeness(module[0])
            if all(_likeness(one) == first for one in module):
                lists[path] = len(module)
    if not lists:
        return model, {}
    short = copy.deepcopy(model)
    for path in lists:
        owner, _, name = path.rpartition(".")
        blocks = short.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        setattr(short.get_submodule(owner), name, blocks[:_TRACED])
    return short, lists


def _likeness(block: nn.Module) -> object:
    return type(block), [(name, one.shape, one.dtype) for name, one in block.named_parameters()]


def _count(model: nn.Module, lists: Mapping[str, int], inputs: Mapping[str, Any], fuses: bool) -> Counted:
    """The count of the graphs of a model.

    Args:
        lists: path of a list of blocks -> the number of blocks for which its last one stands.
    """
    config = configure({"method": "dense"})
    graphs = _graphs(model, inputs)
    names, attentions, sharings = list[str](), list[Attention](), list[Sharding]()
    totals = [_Totals() for _ in SIZES]
    tokens = 0
    for gm, args in graphs:
        analysed = pipeline.analyse(gm, config)
        shared = [pipeline.share(analysed, config, Ranks(0, size)) for size in SIZES]
        sharing: Sharding = shared[0].meta["sharding"]
        sharings.append(sharing)
        tokens = max(tokens, sharing.tokens)
        for plan in graph_plan(analysed):
            if plan.site.name in sharing.sites:
                named = _names(plan.site.name, lists)
                names += named
                attentions += [attention_of(plan, sharing.tokens)] * len(named)
        for one, total in zip(shared, totals, strict=True):
            _Counter(pipeline.rewrite(one, config), lists, fuses, total).run(*args)
    parts = [share(tokens, 0, size) / tokens if tokens else 1.0 for size in SIZES]

    def split(at: Sequence[float]) -> Split:
        """The quantity with these values for both sizes."""
        if at[0] == at[1]:
            return Split(0.0, float(at[0]))
        slope = (at[0] - at[1]) / (parts[0] - parts[1])
        return Split(slope, at[0] - slope * parts[0])

    first, second = totals
    gathered = [split(pair).shared for pair in zip(first.gathered, second.gathered, strict=True)]
    work = Work(
        tokens=tokens,
        attentions=tuple(attentions),
        flops=split((first.flops, second.flops)),
        traffic=split((first.traffic, second.traffic)),
        gathered=tuple(gathered),
        live=_largest([split(pair) for pair in zip(first.live, second.live, strict=True)]),
    )
    return Counted(work=work, names=tuple(names), sharings=tuple(sharings))


def _graphs(model: nn.Module, inputs: Mapping[str, Any]) -> list[tuple[fx.GraphModule, tuple[Any, ...]]]:
    """The graphs that Dynamo makes of a call, with their inputs."""
    found: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        def run(*args: Any) -> Any:
            found.append((gm, args))
            return gm.forward(*args)

        return run

    with torch.no_grad(), _torch.tracing(backend, _call) as call:
        call(model, dict(inputs))
    return found


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model(**inputs)


def _last(path: str, lists: Mapping[str, int]) -> str:
    """The list of blocks whose last traced block has this path; empty if none has."""
    return next((one for one in lists if f"{path}.".startswith(f"{one}.{_TRACED - 1}.")), "")


def _names(name: str, lists: Mapping[str, int]) -> list[str]:
    """The names of the attentions for which a traced one stands."""
    if not (path := _last(name, lists)):
        return [name]
    rest = name.removeprefix(f"{path}.{_TRACED - 1}")
    return [f"{path}.{place}{rest}" for place in range(_TRACED - 1, lists[path])]


def _largest(splits: Sequence[Split]) -> tuple[Split, ...]:
    """Those that are largest for some part of the tokens."""
    found = {max(splits, key=lambda one: (one.on(1 / 2**power), one)) for power in range(21)}
    return tuple(sorted(found, reverse=True))


@dataclass(slots=True)
class _Totals:
    """The count of one rank."""

    flops: float = 0.0
    traffic: float = 0.0
    gathered: list[float] = field(default_factory=list)
    """Bytes of each tensor before it is gathered."""
    live: list[float] = field(default_factory=list)
    """Bytes that live after each node."""


class _Counter(fx.Interpreter):
    """Runs the graph of one rank on the meta device and counts it."""

    def __init__(self, gm: fx.GraphModule, lists: Mapping[str, int], fuses: bool, totals: _Totals) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.lists, self.fuses, self.totals = lists, fuses, totals
        self.heads: set[fx.Node] = set()
        """Nodes whose tensors are by heads."""
        self.products: set[int] = set()
        """Memory that products, exchanges and the caller wrote."""
        self.wanted: set[int] = set()
        """Memory whose write by another operator was counted."""
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []
        """Every tensor: memory that is gone could be another's."""
        self.uses: list[list[int]] = []
        self.born: list[set[int]] = []

    def run(self, *args: Any, **_: Any) -> None:
        """Add the graph to the totals."""
        with torch.no_grad():
            super().run(*args, enable_io_processing=False)
        last = {one: at for at, uses in enumerate(self.uses) for one in uses}
        now = 0
        for at, born in enumerate(self.born):
            now += sum(self.sizes[one] for one in born)
            self.totals.live.append(float(now))
            now -= sum(self.sizes[one] for one in set(self.uses[at]) if last[one] == at and one in self.sizes)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and count it."""
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        given = self._tensors([self.env[one] for one in n.all_input_nodes])
        made = [one for one in self._tensors(result) if _memory(one) not in {*map(_memory, given)}]
        self.kept += made
        if n.target == TO_HEADS or (n.target != TO_TOKENS and self.heads & {*n.all_input_nodes}):
            self.heads.add(n)
            made = []
        elif n.op in ("call_function", "call_method"):
            self._add(n, counter.get_total_flops(), given, made)
        elif n.op in ("placeholder", "get_attr"):
            self.products |= {*map(_memory, made)}
            made = []  # weights and inputs
        for one in made:
            self.sizes[_memory(one)] = one.numel() * one.element_size()
        self.born.append({*map(_memory, made)})
        self.uses.append([*map(_memory, given), *map(_memory, made)])
        return result

    def _add(self, node: fx.Node, flops: int, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        path = _last(self._path(node), self.lists)
        weight = self.lists[path] - _TRACED + 1 if path else 1
        exchanges = node.target in (TO_TOKENS, GATHER_TOKENS)
        if node.target == GATHER_TOKENS:
            self.totals.gathered += [float(given[0].numel() * given[0].element_size())] * weight
        self.totals.flops += weight * flops
        if flops or exchanges:
            self.products |= {*map(_memory, made)}
            if self.fuses:  # the operators before them wrote what they read
                self._write(given, weight)
        elif self.fuses:
            self._read(given, weight)
        else:
            written = [
                one
                for arg in written_by(node, node.args, node.kwargs)
                if isinstance(arg, fx.Node)
                for one in self._tensors(self.env[arg])
            ]
            if made or written:
                self.totals.traffic += weight * sum(map(_bytes, (*given, *made)))

    def _write(self, given: Sequence[Tensor], weight: int) -> None:
        for one in given:
            if _memory(one) not in self.products | self.wanted:
                self.wanted.add(_memory(one))
                self.totals.traffic += weight * _bytes(one)

    def _read(self, given: Sequence[Tensor], weight: int) -> None:
        for one in given:
            if _memory(one) in self.products:
                self.totals.traffic += weight * _bytes(one)

    def _path(self, node: fx.Node) -> str:
        """The module of a node; of an exchange, that of the node that reads it."""
        while not (path := module_path(node)) and node.users and "nn_module_stack" not in node.meta:
            node = next(iter(node.users))
        return path

    def _tensors(self, values: Any) -> list[Tensor]:
        return [one for one in tree_leaves(values) if isinstance(one, Tensor) and one.is_meta]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
