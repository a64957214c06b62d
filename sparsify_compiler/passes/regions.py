"""Put the bodies of checkpoints and nested compile regions into the graph around them, and take them out again.

    before   out = tag_activation_checkpoint(body, x, w)[0]

    inline   h = linear(x, w)                              meta["region"]: the nodes of the body
             out = relu(h)

    outline  out = tag_activation_checkpoint(body, x, w)[0]

A pass that works between the two sees one graph. Nodes that it adds among those of a region become part of the
region; all values that the region then reads and returns become operands and results of the new body.
"""

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sparsify_compiler.passes.fx import Body, bodies, value_of

_OPERATORS = ("tag_activation_checkpoint", "invoke_subgraph")
"""The operators whose bodies are put into the graph around them."""


@dataclass(frozen=True, eq=False, slots=True)
class Region:
    """A call of a body that was put into the graph around it."""

    outer: "Region | None"
    """The region in whose body the call lies."""
    target: Any
    before: tuple[Any, ...]
    """The arguments of the call before its operands; None in the place of the body."""
    kwargs: dict[str, Any]
    body: fx.GraphModule
    """The body before."""
    meta: dict[str, Any]

    def chain(self) -> Iterator["Region"]:
        """The region, and those around it, inner first."""
        yield self
        if self.outer is not None:
            yield from self.outer.chain()


def inline(gm: fx.GraphModule) -> None:
    """Put the bodies of regions into a graph, those in bodies too; `node.meta["region"]` is then a `Region`."""
    _inline(gm, None)


def _inline(gm: fx.GraphModule, outer: Region | None) -> None:
    for body in list(bodies(gm)):
        call = body.call
        operator_ = call.target
        assert isinstance(operator_, torch._ops.HigherOrderOperator)
        if operator_.name() not in _OPERATORS or not _takes_results_apart(call):
            continue
        before = call.args[: len(call.args) - body.arity]
        region = Region(
            outer=outer,
            target=call.target,
            before=tuple(None if _is_body(one, body) else one for one in before),
            kwargs=dict(call.kwargs),
            body=body.module,
            meta=dict(call.meta),
        )
        _inline(body.module, region)
        nodes: dict[fx.Node, Any] = {}
        operands = iter(body.operands)
        with gm.graph.inserting_before(call):
            for node in body.module.graph.nodes:
                if node.op == "placeholder":
                    nodes[node] = next(operands)
                elif node.op == "output":
                    results = fx.node.map_arg(node.args[0], nodes.__getitem__)
                else:
                    _copy(node, gm, body.module, nodes)
                    nodes[node].meta.setdefault("region", region)
        _point_to(nodes)
        for user in list(call.users):
            _replace(user, results[user.args[1]])
        source = next(one for one in before if _is_body(one, body))
        gm.graph.erase_node(call)
        if isinstance(source, fx.Node) and not source.users:
            gm.graph.erase_node(source)


def outline(gm: fx.GraphModule) -> None:
    """Take regions out of a graph again, each into a body of its own."""
    numbers = itertools.count()
    while spans := _spans(gm.graph):
        depth = {region: len(list(region.chain())) for region in spans}
        region = max(spans, key=lambda one: depth[one])
        _outline(gm, region, spans[region], next(numbers))


def _spans(graph: fx.Graph) -> dict[Region, list[fx.Node]]:
    """Region -> the nodes of a graph from its first to its last."""
    nodes = list(graph.nodes)
    ends: dict[Region, tuple[int, int]] = {}
    for place, node in enumerate(nodes):
        if (inner := node.meta.get("region")) is not None:
            for region in inner.chain():
                ends[region] = ends.get(region, (place, place))[0], place
    return {region: nodes[first : last + 1] for region, (first, last) in ends.items()}


def _outline(gm: fx.GraphModule, region: Region, span: Sequence[fx.Node], number: int) -> None:
    inside, graph = set(span), gm.graph
    operands = list(dict.fromkeys(one for node in span for one in node.all_input_nodes if one not in inside))
    results = [node for node in span if any(user not in inside for user in node.users)]
    body = fx.GraphModule({}, fx.Graph())
    body.meta.update(region.body.meta)
    body.meta["body"] = name = f"sparsify_region{number}"
    nodes: dict[fx.Node, Any] = {}
    for one in operands:
        nodes[one] = body.graph.placeholder(one.name)
        nodes[one].meta["example_value"] = value_of(one)
    for node in span:
        _copy(node, body, gm, nodes)
        if nodes[node].meta.get("region") is region:
            del nodes[node].meta["region"]
    _point_to(nodes)
    body.graph.output(tuple(nodes[one] for one in results))
    body.meta["name"] = name
    body.recompile()
    setattr(gm, name, body)
    with graph.inserting_before(span[0]):
        source = graph.get_attr(name)
        before = (source if one is None else one for one in region.before)
        call = graph.call_function(region.target, (*before, *operands), region.kwargs)
        call.meta = {**region.meta, "example_value": tuple(map(value_of, results))}
        if region.outer is not None:
            source.meta["region"] = call.meta["region"] = region.outer
        for place, one in enumerate(results):
            taken = graph.call_function(operator.getitem, (call, place))
            taken.meta = {**call.meta, "example_value": value_of(one)}
            one.replace_all_uses_with(taken, lambda user: user not in inside)
    for node in reversed(span):
        graph.erase_node(node)


def _takes_results_apart(call: fx.Node) -> bool:
    """Whether all users of a call take one of its results each."""
    return all(user.target is operator.getitem and user.args[0] is call for user in call.users)


def _is_body(argument: object, body: Body) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.target == body.attribute


def _copy(node: fx.Node, to: fx.GraphModule, of: fx.GraphModule, nodes: dict[fx.Node, Any]) -> None:
    """Append a copy of a node to another graph, with the graph that it reads, and add it to `nodes`."""
    new = nodes[node] = to.graph.node_copy(node, nodes.__getitem__)
    if node.op == "get_attr":
        name = str(node.target)
        while hasattr(to, name):
            name += "_"
        setattr(to, name, getattr(of, str(node.target)))
        new.target = name


def _point_to(nodes: dict[fx.Node, Any]) -> None:
    """Let the metadata of copies name copies too."""
    for node in nodes.values():
        if isinstance(node, fx.Node):
            node.meta = {
                key: nodes.get(value, value) if isinstance(value, fx.Node) else value
                for key, value in node.meta.items()
            }


def _replace(node: fx.Node, by: Any) -> None:
    """Give users of a node a value instead, and erase the node."""
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg(
            (user.args, user.kwargs), lambda one: by if one is node else one
        )
    node.graph.erase_node(node)
