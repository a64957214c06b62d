"""Sizes that depend on values of the inputs: computed before the graph runs, and numbers in the graph.

    before   i = nonzero(mask); x[:, i]        x[:, i] has size u0, which is known only at run time
    values   nonzero(mask)                     a graph of its own, which runs first
    after    x[:, value_0]                     value_0 is an input; for each of its sizes there is a graph

A model may take the valid tokens of a prompt by `nonzero`, by a boolean index, or by a length that it reads from a
tensor. Where Dynamo captures such code, no layout and no table fits all of the sizes. The values mostly follow from
a mask by a few operators, so they can be computed without the rest of the graph.
"""

import logging
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import _torch
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.passes.fx import body_of, copy_graph, modules, recorded, sizes_of, value_of
from sparsify_compiler.passes.writes import storages_of, written_in
from sparsify_compiler.runtime.positions import may_be_positions, mesh_of

log = logging.getLogger(__name__)
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "poisson", "exponential")
"""Parts of the names of operators that draw random numbers."""
_ASSERTIONS = (
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
    torch._check,
)
"""Functions that only check numbers."""


Position = tuple[str, int]
"""(name of a node whose value may be positions, dimension of the tokens in it)."""


class NotKnownBefore(SparsifyError):
    """The sizes of a graph cannot be computed before it runs. The text is the reason."""


@dataclass(frozen=True, eq=False, slots=True)
class RunTimeSizes:
    """A graph some of whose sizes depend on values of its inputs, and the values that decide them."""

    graph: fx.GraphModule
    """The graph, with the values as further inputs at its end."""
    values: Callable[..., Sequence[Any]]
    """Inputs of the original graph -> the values: tensors, or numbers."""
    origin: fx.GraphModule
    """Dynamo's graph."""
    deciding: tuple[int, ...]
    """The places of the inputs whose sizes may differ from call to call: all but the model's own."""
    positions: tuple[tuple[int, int], ...] = ()
    """(place, dimension of the tokens) of the inputs that may be positions, whose values decide the layout."""

    def all_inputs(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs of a specialised graph, for the inputs of the original one."""
        return (*args, *self.values(*args))

    def key(self, inputs: Sequence[Any]) -> Hashable:
        """Equal for all inputs that one specialised graph serves."""
        found = (inputs[place] for place in self.deciding)
        sizes = tuple((one.shape, one.stride()) if isinstance(one, Tensor) else one for one in found)
        return sizes, tuple(mesh_of(inputs[place], dim) for place, dim in self.positions)

    def as_it_was(self, *inputs: Any) -> Any:
        """Run the original graph on `all_inputs`, uncompiled."""
        places = sum(node.op == "placeholder" for node in self.origin.graph.nodes)
        return self.origin.forward(*inputs[:places])

    def specialised(self, inputs: Sequence[Any]) -> fx.GraphModule:
        """The graph for inputs of these sizes, in which every size is a number.

        Args:
            inputs: as `all_inputs` returns them.

        Raises:
            NotKnownBefore: an operator does not run on fake tensors.
        """
        gm = copy_graph(self.graph)
        old = (node for node in self.origin.graph.nodes if node.op == "placeholder")
        new = (node for node in gm.graph.nodes if node.op == "placeholder")
        _torch.copy_sources(self.origin, gm, zip(old, new, strict=False))
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for place, dim in self.positions:
            placeholders[place].meta.setdefault("meshes", {})[dim] = mesh_of(inputs[place], dim)
        grad_enabled = torch.is_grad_enabled()
        try:
            with _torch.static_fakes() as fake, _torch.quiet_fakes():
                _Recorder(gm).run(*(fake(one) if isinstance(one, Tensor) else one for one in inputs))
        except Exception as error:  # whatever an operator raises on fake tensors
            raise NotKnownBefore(
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            ) from error
        finally:
            torch.set_grad_enabled(grad_enabled)
        for module in modules(gm):
            _fold_numbers(module.graph)
            module.recompile()
        return gm


def depends_on_values(gm: fx.GraphModule) -> bool:
    """Whether any size in a Dynamo graph is known only at run time."""
    return bool(_symbols(gm))


def may_have_positions(gm: fx.GraphModule) -> bool:
    """Whether an input of a Dynamo graph, or a tensor of integers in it, has few numbers for each token."""
    for node in gm.graph.nodes:
        value = value_of(node)
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            continue
        if node.op != "placeholder" and (value.is_floating_point() or node.op == "output"):
            continue
        sizes = sizes_of(value)
        if sizes is not None and any(
            may_be_positions(torch.Size(sizes), value.dtype, dim) for dim in range(len(sizes))
        ):
            return True
    return False


def _symbols(gm: fx.GraphModule) -> set[Any]:
    nodes = (node for module in modules(gm) for node in module.graph.nodes)
    return {one for node in nodes for one in _torch.run_time_symbols(node.meta.get("example_value"))}


def run_time_sizes(gm: fx.GraphModule, positions: Sequence[Position] = ()) -> RunTimeSizes:
    """Separate the values that decide the sizes of a Dynamo graph, which `depends_on_values`.

    Args:
        positions: the values that may be positions of tokens. Those that cannot be computed before are left out.

    Raises:
        NotKnownBefore: they depend on more than the inputs, or are not the same when they are computed before.
    """
    symbols, twin = _symbols(gm), copy_graph(gm)
    deciding: list[fx.Node] = []
    for node in [node for module in modules(twin) for node in module.graph.nodes]:
        if node.op == "placeholder" or not _torch.binds(node, symbols):
            continue
        if node.graph is not twin.graph:
            raise NotKnownBefore(f"{_name(node)} is in the body of another operator")
        deciding += _deciding(node)
    dims = {node: dict(positions)[node.name] for node in twin.graph.nodes if node.name in dict(positions)}
    for node in list(dims):
        try:
            _check_same_before(gm, twin, _ancestors([node]) if node.op != "placeholder" else set())
        except NotKnownBefore as error:
            log.debug("positions are not computed before: %s", error)
            del dims[node]
    deciding += [node for node in dims if node.op != "placeholder"]
    before = _ancestors(deciding)
    _check_same_before(gm, twin, before)
    same = _first_of_same(twin, before)
    cuts = [
        node
        for node in twin.graph.nodes
        if node in before
        and (node in deciding or _torch.run_time_symbols(value_of(node)))
        and not _is_tuple(node)
        and any(user not in before for user in node.users)
    ]
    places = {node: place for place, node in enumerate(dict.fromkeys(same[node] for node in cuts))}
    values = _graph_of(twin, list(places))
    _replace_by_inputs(twin, {node: places[same[node]] for node in cuts}, before)
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    own = {place for place, node in enumerate(inputs) if _torch.is_model_tensor(node)}
    deciding_places = (place for place in range(len(inputs) + len(places)) if place not in own)
    numbers = {node.name: place for place, node in enumerate(inputs)}
    of_positions = (
        (numbers[node.name] if node.op == "placeholder" else len(inputs) + places[same[node]], dim)
        for node, dim in dims.items()
    )
    return RunTimeSizes(twin, values, gm, tuple(deciding_places), tuple(of_positions))


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _deciding(node: fx.Node) -> list[fx.Node]:
    """The nodes that decide the sizes of the result of a node.

    An operator that takes elements of a tensor at the places of a mask is changed to take them at indices. Then
    only the indices are computed before, and not the elements.
    """
    change = _BY_INDICES.get(_name(node))
    of = node.args[0] if node.args else None
    known = isinstance(of, fx.Node) and isinstance(value_of(of), Tensor)
    return (change(node) if change is not None and known else []) or [node]


def _getitem(node: fx.Node) -> list[fx.Node]:
    """x[:, mask] -> x[:, i], with i from nonzero(mask)."""
    index = node.args[1]
    parts = index if isinstance(index, (tuple, list)) else (index,)
    deciding: list[fx.Node] = []
    found: list[Any] = []
    for one in parts:
        new = _indices(node, one, len(recorded(one).shape)) if _is_mask(one) else []
        deciding += new
        found += new[1:] or [one]
    if deciding:
        node.update_arg(1, tuple(found))
    return deciding


def _masked_select(node: fx.Node) -> list[fx.Node]:
    """masked_select(x, mask) -> x[i, j], with i and j from nonzero(mask)."""
    of, mask = (*node.args, *node.kwargs.values())[:2]
    if not isinstance(mask, fx.Node) or not _is_mask(mask):
        return []
    sizes = torch.broadcast_shapes(recorded(of).shape, recorded(mask).shape)
    if not all(isinstance(size, int) for size in sizes):
        return []
    with node.graph.inserting_before(node):
        x, where = (node.graph.call_function(torch.broadcast_to, (one, tuple(sizes))) for one in (of, mask))
    new = _indices(node, where, len(sizes))
    _become(node, operator.getitem, x, tuple(new[1:]))
    return new


def _repeat_interleave(node: fx.Node) -> list[fx.Node]:
    """repeat_interleave(x, repeats, dim) -> index_select(x, dim, i), with i from repeats."""
    named = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | node.kwargs
    of, repeats, dim = named["input"], named.get("repeats"), named.get("dim")
    x, times = recorded(of), value_of(repeats)
    dim = 0 if dim is None and x.dim() == 1 else dim
    if not isinstance(dim, int) or not isinstance(times, Tensor) or times.shape != (x.shape[dim],):
        return []
    with node.graph.inserting_before(node):
        indices = node.graph.call_function(torch.repeat_interleave, (repeats,))
    _become(node, torch.index_select, of, dim, indices)
    return [indices]


_BY_INDICES: dict[str, Callable[[fx.Node], list[fx.Node]]] = {
    "getitem": _getitem,
    "__getitem__": _getitem,
    "masked_select": _masked_select,
    "repeat_interleave": _repeat_interleave,
}
"""Operator -> the change of its node, which returns the nodes that decide its sizes; none if nothing changes."""


def _become(node: fx.Node, target: Callable[..., Any], *args: Any) -> None:
    """Let a node call a function instead."""
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, {}


def _is_mask(one: object) -> bool:
    value = value_of(one) if isinstance(one, fx.Node) else None
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8) and value.dim() > 0


def _indices(place: fx.Node, mask: Any, dims: int) -> list[fx.Node]:
    """New nodes before `place`: the indices of the elements of a mask as a tuple, and the tensors in it."""
    graph = place.graph
    with graph.inserting_before(place):
        all_of_them = graph.call_function(torch.nonzero, (mask,), {"as_tuple": True})
        return [
            all_of_them,
            *(graph.call_function(operator.getitem, (all_of_them, dim)) for dim in range(dims)),
        ]


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes with all that they are computed from, and the elements of tuples among them."""
    found: set[fx.Node] = set()
    open_nodes = list(nodes)
    while open_nodes:
        node = open_nodes.pop()
        if node not in found:
            found.add(node)
            open_nodes += node.all_input_nodes
    return found | {
        user for node in found if _is_tuple(node) for user in node.users if _name(user) == "getitem"
    }


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(value_of(node), (tuple, list)) or bool(node.kwargs.get("as_tuple"))


def _check_same_before(gm: fx.GraphModule, twin: fx.GraphModule, before: set[fx.Node]) -> None:
    """Raise NotKnownBefore unless these nodes have the same values when they are computed before the graph runs."""
    for node in twin.graph.nodes:
        if node not in before:
            continue
        if isinstance(value_of(node), nn.Parameter):
            raise NotKnownBefore(f"they depend on the parameter {node.name}")
        if any(part in _name(node) for part in _RANDOM) and node.op != "placeholder":
            raise NotKnownBefore(f"they depend on random numbers ({_name(node)})")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise NotKnownBefore(f"they depend on {_name(node)}")
    if not before:
        return
    written = written_in(gm)
    read = [storages_of(node) for node in before]
    if written is None or any(one is None or written & one for one in read):
        raise NotKnownBefore("they depend on a tensor that the graph may write to")


def _first_of_same(gm: fx.GraphModule, nodes: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Node -> the first of those nodes that compute the same from the same inputs."""
    found: dict[fx.Node, fx.Node] = {}
    known: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in nodes:
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda one: found.get(one, one))
            text = node.name if node.op == "placeholder" else f"{node.op} {node.target} {arguments}"
            found[node] = known.setdefault(text, node)
    return found


def _graph_of(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> fx.GraphModule:
    """A graph with the inputs of another one that computes some of its nodes."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    needed = _ancestors(nodes)
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, lambda one: copies[one])
    graph.output(tuple(copies[node] for node in nodes))
    return fx.GraphModule(gm, graph)


def _replace_by_inputs(gm: fx.GraphModule, places: dict[fx.Node, int], before: set[fx.Node]) -> None:
    """Let a graph get nodes as inputs: those with place 0 as its first new input, and so on."""
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1:]
    new: list[fx.Node] = []
    for place in range(len(set(places.values()))):
        with gm.graph.inserting_after((new or last)[-1]):
            new.append(gm.graph.placeholder(f"value_{place}"))
    for node, place in places.items():
        node.replace_all_uses_with(new[place], delete_user_cb=lambda user: user not in before)
    for node in reversed(gm.graph.nodes):
        if node in before and node.op != "placeholder" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()


class _Recorder(fx.Interpreter):
    """Runs a graph and the bodies in it, and records the value of every node as Dynamo does."""

    def run_node(self, n: fx.Node) -> Any:
        assert isinstance(self.module, fx.GraphModule)
        body = body_of(self.module, n) if n.op == "call_function" else None
        if body is None:
            value = super().run_node(n)
        else:
            args, _ = self.fetch_args_kwargs_from_env(n)
            value = _Recorder(body.module).run(*args[len(args) - body.arity :])
        if n.op not in ("output", "get_attr"):
            n.meta["example_value"] = value
            n.meta.pop("unbacked_bindings", None)
        return value


def _fold_numbers(graph: fx.Graph) -> None:
    """Write numbers in the place of nodes that have a number as their value, and drop what only checks numbers."""
    numbers: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: numbers.get(one, one))
        value = node.meta.get("example_value")
        if node.op != "output" and type(value) in (int, bool, float):
            numbers[node] = value
    for node in reversed(graph.nodes):
        checks = node.target in _ASSERTIONS and not isinstance(node.args[0], fx.Node)
        if checks or (node in numbers and node.op != "placeholder"):
            graph.erase_node(node)
