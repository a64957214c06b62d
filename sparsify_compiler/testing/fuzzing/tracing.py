"""The graph that Dynamo would make of a program without control flow, recorded in a run, ten times as fast."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

_OPERATORS = {
    f"__{name}__": function
    for name, function in vars(operator).items()
    if not name.startswith("_") and callable(function) and hasattr(torch.Tensor, f"__{name}__")
}
"""`__setitem__` -> operator.setitem: Python's operators, in Dynamo's spelling."""
_OPERATORS["matmul"] = operator.matmul  # the name of `@` in a mode


class _Recorder(TorchFunctionMode):
    """Writes every function and method of torch that runs under it into a graph, in Dynamo's spelling."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.lifted: list[Tensor] = []
        """The tensors of the placeholders: the inputs, then weights."""
        self._nodes: dict[int, fx.Node] = {}
        self._kept: list[Any] = []  # kept alive, so that no id is used again
        for tensor in inputs:
            self._placeholder(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._kept.append(result)
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property with a tensor, such as mT, or another value, such as shape
            if isinstance(result, Tensor):
                self._call(getattr, (args[0], func.__self__.__name__), {}, result)
            return result
        if isinstance(result, Tensor) or (
            isinstance(result, (tuple, list)) and result and isinstance(result[0], Tensor)
        ):
            self._call(func, args, kwargs, result)
        elif name == "__setitem__":
            self._call(func, args, kwargs, None)
        return result

    def _call(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = getattr(func, "__name__", "")
        arguments = (self._argument(args), {key: self._argument(value) for key, value in kwargs.items()})
        if name in _OPERATORS:
            node = self.graph.call_function(_OPERATORS[name], *arguments)
        elif getattr(torch.Tensor, name, None) is func:
            node = self.graph.call_method(name, *arguments)
        else:
            node = self.graph.call_function(func, *arguments)
        self._record(node, result)
        if isinstance(result, (tuple, list)):
            for place, one in enumerate(result):
                self._record(self.graph.call_function(operator.getitem, (node, place)), one)

    def _record(self, node: fx.Node, value: Any) -> None:
        node.meta["example_value"] = value
        if isinstance(value, Tensor):
            self._nodes.setdefault(id(value), node)

    def _placeholder(self, tensor: Tensor) -> fx.Node:
        self.lifted.append(tensor)
        self._kept.append(tensor)
        last = next((node for node in reversed(self.graph.nodes) if node.op == "placeholder"), None)
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"input_{len(self.lifted)}")
        self._record(node, tensor)
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._placeholder(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._argument(one) for one in value)
        if isinstance(value, slice):
            return slice(*(self._argument(one) for one in (value.start, value.stop, value.step)))
        return value

    def output(self, value: Any) -> None:
        """Finish the graph."""
        self.graph.output(self._argument(value))


def record(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """(graph of `function(*inputs)`, its further inputs: other tensors that it reads, such as weights)."""
    recorder = _Recorder(inputs)
    with recorder:
        result = function(*inputs)
    recorder.output(result if isinstance(result, (tuple, list)) else (result,))
    return fx.GraphModule(torch.nn.Module(), recorder.graph), recorder.lifted[len(inputs) :]
