"""Small helpers over torch.fx graphs that several passes share."""

import copy
import itertools
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from sparsify_compiler import _torch
from sparsify_compiler.names import without_wrappers


class Body(NamedTuple):
    """A call of a higher-order operator (activation checkpointing, a nested compile region) and its body."""

    call: fx.Node
    attribute: str
    module: fx.GraphModule

    @property
    def operands(self) -> tuple[object, ...]:
        """The arguments of the call that the body's placeholders receive."""
        return self.call.args[-self.arity :] if self.arity else ()

    @property
    def arity(self) -> int:
        """The number of placeholders of the body."""
        return sum(node.op == "placeholder" for node in self.module.graph.nodes)


def body_of(gm: fx.GraphModule, node: fx.Node) -> Body | None:
    """The body of a higher-order call of the form op(..., body, ..., *operands); None for any other node.

    Operators with several bodies (conditions, loops, custom autograd functions) do not have this
    form; nor do those that take their operands in lists (maps, scans).
    """
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    modules = [
        (arg, getattr(gm, str(arg.target), None))
        for arg in node.args
        if isinstance(arg, fx.Node) and arg.op == "get_attr"
    ]
    bodies = [(arg, module) for arg, module in modules if isinstance(module, fx.GraphModule)]
    if len(bodies) != 1:
        return None
    arg, module = bodies[0]
    body = Body(node, str(arg.target), module)
    after = len(node.args) - 1 - node.args.index(arg)
    if body.arity > after or any(isinstance(operand, (tuple, list, dict)) for operand in body.operands):
        return None
    return body


def bodies(gm: fx.GraphModule) -> Iterator[Body]:
    """The higher-order calls of a graph whose bodies the passes enter."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and (body := body_of(gm, node)):
            yield body


def graphs_in(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs among the arguments of a node: the bodies of a higher-order call of any form."""
    names = (str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr")
    return [graph for name in names if isinstance(graph := getattr(gm, name, None), fx.GraphModule)]


def modules(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and, depth first, the bodies of its higher-order calls; each module once."""
    seen: set[int] = set()

    def walk(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield module
        for body in bodies(module):
            yield from walk(body.module)

    yield from walk(gm)


def copy_graph(
    gm: fx.GraphModule, *, alike: Callable[[fx.GraphModule], Hashable] | None = None
) -> fx.GraphModule:
    """A copy of a graph and its bodies that passes can rewrite; the original stays, and tensors are shared.

    Every call of a body gets its own copy of it, so that results for one call do not apply to another. With
    `alike`, calls of one body share a copy where `alike` returns the same value.
    """
    return _copy(gm, alike, itertools.count())


def _copy(
    gm: fx.GraphModule, alike: Callable[[fx.GraphModule], Hashable] | None, numbers: Iterator[int]
) -> fx.GraphModule:
    """Do the work of `copy_graph`. `numbers` gives every body of the graph its own name."""
    twin = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    twin.meta.update(gm.meta)
    twins = dict(zip(gm.graph.nodes, twin.graph.nodes, strict=True))
    for node in twin.graph.nodes:
        node.meta = {
            key: twins.get(value, value) if isinstance(value, fx.Node) else value
            for key, value in node.meta.items()
        }
    copies: dict[Hashable, str] = {}
    for number, body in enumerate(list(bodies(twin))):
        origin = body.module.meta.get("body", body.attribute)
        key = number if alike is None else (origin, alike(body.module))
        if key not in copies:
            copies[key] = _unused(twin, body.attribute, copies.values())
            own = _copy(body.module, alike, numbers)
            own.meta |= {"body": origin, "name": f"{origin}_{next(numbers)}"}
            setattr(twin, copies[key], own)
        _call(body, copies[key])
    for name in dict.fromkeys(str(node.target) for node in twin.graph.nodes if node.op == "get_attr"):
        other = getattr(twin, name, None)
        if isinstance(other, fx.GraphModule) and name not in copies.values():
            setattr(twin, name, _copy(other, alike, numbers))
    return twin


def _unused(gm: fx.GraphModule, attribute: str, taken: Collection[str]) -> str:
    """`attribute` if it is not taken; else the first of `attribute_1`, `attribute_2`, ... that is free in `gm`."""
    if attribute not in taken:
        return attribute
    return next(name for i in itertools.count(1) if not hasattr(gm, name := f"{attribute}_{i}"))


def _call(body: Body, attribute: str) -> None:
    """Replace the body of a higher-order call."""
    call = body.call
    if attribute != body.attribute:
        inputs = call.all_input_nodes
        (old,) = (arg for arg in inputs if arg.op == "get_attr" and arg.target == body.attribute)
        with call.graph.inserting_before(call):
            call.replace_input_with(old, call.graph.get_attr(attribute))
        if not old.users:
            call.graph.erase_node(old)
    _torch.name_body(call, getattr(call.graph.owning_module, attribute).meta["name"])


def value_of(node: object) -> object:
    """The value Dynamo recorded for an argument: a fake tensor, a number, or the constant itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor_of(node: object) -> Tensor | None:
    """The fake tensor Dynamo recorded for a node; None where it recorded none."""
    value = value_of(node)
    return value if isinstance(value, Tensor) else None


def node_of(argument: object) -> fx.Node:
    """An argument that is known to be a node."""
    assert isinstance(argument, fx.Node), f"expected a node of the graph, got {argument!r}"
    return argument


def run_call(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of the function or the method that a node calls, for these arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target), f"expected a call of a function or a method, got a {node.op}"
    return node.target(*args, **kwargs)


def sizes_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The sizes as integers, not specialised; None where a size is known only at run time."""
    sizes = [_torch.hint(size) for size in tensor.shape]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def strides_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides as integers, not specialised; None where they are known only at run time, or do not exist."""
    if tensor.layout is not torch.strided:
        return None
    strides = [_torch.hint(stride) for stride in tensor.stride()]
    return None if None in strides else tuple(stride for stride in strides if stride is not None)


_FUNCTIONAL = ("cond", "while_loop", "map_impl", "scan", "associative_scan", "flex_attention")
"""Higher-order operators whose bodies write to none of their inputs."""


_IN_PLACE = {"setitem", *(f"i{name}" for name in ("add", "and", "concat", "floordiv", "lshift", "matmul", "mod",
             "mul", "or", "pow", "rshift", "sub", "truediv", "xor"))}  # fmt: skip
"""Python's operators that write to their first argument."""


def written_by(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """The arguments that a call may write to, as far as its name and schema show."""
    target = node.target
    everything = (*args, *kwargs.values())
    if isinstance(target, torch._ops.HigherOrderOperator):
        return () if target.name() in _FUNCTIONAL else everything
    if isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, name)._schema for name in target.overloads()]
        return everything if any(schema.is_mutable for schema in schemas) else ()
    if isinstance(target, torch._ops.OpOverload):
        return everything if target._schema.is_mutable else ()
    if node.op == "call_module":
        return everything
    name = target if isinstance(target, str) else target.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _IN_PLACE or kwargs.get("inplace"):
        return args[:1]
    return [kwargs["out"]] if kwargs.get("out") is not None else ()


Step = tuple[Any, ...]
"""The name of a tensor's method, and its arguments."""


class Operand(NamedTuple):
    """A tensor of a graph, and the methods that bring it into another form."""

    node: fx.Node
    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> "Operand":
        """The operand with further steps at the end."""
        return Operand(self.node, (*self.steps, *steps))

    @property
    def value(self) -> Tensor | None:
        """The fake tensor after the steps; None where Dynamo recorded none."""
        value = tensor_of(self.node)
        return None if value is None else step_through(value, self.steps)

    def insert_before(self, place: fx.Node) -> fx.Node:
        """Insert the steps right before a node and mark them: they read the tensor as it is at that place."""
        node, value = self.node, tensor_of(self.node)
        for step in self.steps:
            with place.graph.inserting_before(place):
                node = place.graph.call_method(step[0], (node, *step[1:]))
            node.meta["inserted"] = True
            if value is not None:
                value = node.meta["example_value"] = step_through(value, [step])
        return node


def step_through(value: Tensor, steps: Iterable[Step]) -> Tensor:
    """The tensor after the steps; a fake tensor stays in its mode."""
    with getattr(value, "fake_mode", nullcontext()):
        for method, *arguments in steps:
            value = getattr(value, method)(*arguments)
    return value


def recorded(one: object) -> Tensor:
    """The fake tensor of a node or an operand for which Dynamo is known to have recorded one."""
    value = one.value if isinstance(one, Operand) else tensor_of(one)
    assert value is not None, f"Dynamo recorded no tensor for {one}"
    return value


def input_name(node: fx.Node) -> str:
    """The name of an input of a graph in the code of the model, if Dynamo kept it: `keep` for `L_keep_`."""
    name = re.sub(r"^[lL]_(kwargs_|args_)?", "", str(node.target))
    return re.sub(r"_+$", "", name)


def input_path(node: fx.Node) -> str:
    """An input of a graph as the caller knows it, e.g. `timestep` or `self.blocks.0.attn1.to_q.weight`."""
    source = _torch.source_name(node)
    return re.sub(r"^L\.(kwargs\.)?", "", _as_path(source)) if source else str(node.target)


def _as_path(expression: str) -> str:
    """An expression by which Dynamo reads something, as a path: `L.self.blocks.0`."""
    path = re.sub(r"\.__dict__\['_modules'\]|\._(modules|parameters|buffers)", "", expression)
    path = re.sub(r"\['(\w+)'\]", r".\1", path)
    return re.sub(r"\[(\d+)\]", r".\1", path)


def module_path(node: fx.Node) -> str:
    """The path of the module a node was traced in, e.g. `blocks.0.attn1`; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = _as_path(next((path for path, _ in reversed(stack.values())), ""))
    path = re.sub(r"^L?\.?self\.?|^L\.\w+\.?", "", path)
    return without_wrappers(path)


def module_class(node: fx.Node) -> str:
    """The class name of that module; empty for the model itself, whose class not every graph records."""
    stack = node.meta.get("nn_module_stack") or {}
    kind = next((kind for _, kind in reversed(stack.values())), "")
    name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
    return name if module_path(node) else ""
