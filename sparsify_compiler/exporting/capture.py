"""Capture a call of a model as one graph, and plan it as torch.compile does.

    model(**kwargs) -> Dynamo's graph, with the model's tensors as attributes -> the passes -> analysed graph

Dynamo writes the values of arguments that are not tensors into the graph, and all sizes. So a file fits calls with
these values and sizes alone.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map

from sparsify_compiler import _torch, _torch_export
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.exporting.arguments import PLAIN, contiguous
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.fx import tensor_of, written_by
from sparsify_compiler.passes.planning import graph_plan, learns
from sparsify_compiler.plan import GraphPlan

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Captured:
    """A call of a model as an analysed graph."""

    model: nn.Module
    kwargs: Mapping[str, Any]
    """The arguments of the call."""
    analysed: fx.GraphModule
    """The graph with its plan. Its inputs are the leaves of `kwargs`, in order."""
    out_spec: TreeSpec
    """The form of the model's output, whose leaves the graph returns."""
    config: SparsifyConfig
    batch: int | None = None
    """The size of the batch in `kwargs`, if it is free in the graph; None if all sizes are fixed."""
    of_batch: Sequence[bool] = ()
    """For each input of a program, whether its first size is that of the batch, and free."""

    @property
    def plan(self) -> GraphPlan:
        """The plan of the graph."""
        return graph_plan(self.analysed)

    @property
    def tensors(self) -> dict[str, Any]:
        """The arguments that are tensors or hold tensors: the inputs of a program."""
        return {name: value for name, value in self.kwargs.items() if has_tensor(value)}

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs of a program: of the arguments, with a number where one holds several tensors."""
        found = []
        for name, value in self.tensors.items():
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            found += [name] if len(leaves) == 1 else [f"{name}_{place}" for place in range(len(leaves))]
        return found

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs that are tensors: the fields of the model's output, if it has names for them.

        Where an input has the name, `_out` follows it.
        """
        leaves = _returned(self.analysed)
        names = _torch_export.field_names(self.out_spec) or [
            f"output_{place}" for place in range(len(leaves))
        ]
        names = ["output"] if len(leaves) == 1 and names == ["output_0"] else names
        taken = {*self.input_names}
        found = [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, fx.Node)]
        return [f"{name}_out" if name in taken else name for name in found]


def capture(
    model: nn.Module, kwargs: Mapping[str, Any], config: SparsifyConfig, *, free_batch: bool = False
) -> Captured:
    """Capture `model(**kwargs)`. Dynamo forgets the programs that it has compiled; they are compiled again.

    Args:
        free_batch: whether to leave the size of the batch free, if the model lets it.

    Raises:
        OptionError: the call cannot be exported, or options do not fit the model.
        SparsifyError: the model is not one graph.
    """
    _check(model, kwargs)
    kwargs = tree_map(contiguous, dict(kwargs))
    of_several = _of_several(model, kwargs) if free_batch else None
    gm, out_spec, kwargs, batch = of_several or (*_graph(model, kwargs), kwargs, None)
    _check_graph(gm, model)
    of_batch = _of_batch(gm, kwargs, batch)  # before lowering fixes sizes
    captured = Captured(
        model=model,
        kwargs=kwargs,
        analysed=pipeline.analyse(gm, config),
        out_spec=out_spec,
        config=config,
        batch=batch,
        of_batch=of_batch,
    )
    if waiting := [one.site.name for one in captured.plan.sparse if learns(one)]:
        raise OptionError(
            f"attention {waiting[0]} has method 'dsv' without a predictor: train one with "
            "sparsify_compiler.DSVTrainer, and give options={'predictor': its file}"
        )
    return captured


def _graph(
    model: nn.Module, kwargs: Mapping[str, Any], batch: int | None = None
) -> tuple[fx.GraphModule, TreeSpec]:
    """Dynamo's graph of a call, and the form of its output.

    If Dynamo refuses, the model itself runs once: it shows whether the call is wrong, and the class of its output.

    Args:
        batch: the size of the batch, if it is free.

    Raises:
        OptionError: the call fails without Dynamo too.
        SparsifyError: the model is not one graph.
    """
    try:
        with torch.no_grad():
            return _torch_export.capture_for_export(model, kwargs, batch)
    except SparsifyError:
        raise
    except Exception as error:  # whatever Dynamo or the model's own code raises
        refusal = error
    name = type(model).__name__
    try:
        with torch.no_grad():
            output = model(**copies(kwargs))
    except Exception as error:
        raise OptionError(
            f"the call of {name} must run before it is exported, got {type(error).__name__}: {first_line(error)}"
        ) from error
    if _torch_export.register_classes(output):
        return _graph(model, kwargs, batch)
    raise SparsifyError(
        f"export needs {name} as one graph, which Dynamo cannot make: {first_line(refusal)} "
        "torch.compile(model, fullgraph=True) shows where"
    ) from refusal


def _of_several(
    model: nn.Module, kwargs: Mapping[str, Any]
) -> tuple[fx.GraphModule, TreeSpec, Mapping[str, Any], int] | None:
    """(the graph with the size of the batch free, the form of the output, the arguments with a batch of at least 2,
    that batch); None if the model does not let it be free. A size of 1 is never free.

    The batch is the first size of the largest tensor.
    """
    tensors = [leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor) and leaf.dim()]
    if not tensors:
        return None
    batch = max(tensors, key=Tensor.numel).shape[0]

    def twice(leaf: Any) -> Any:
        is_of_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
        return torch.cat([leaf, leaf]) if is_of_batch else leaf

    if batch == 1:
        kwargs, batch = tree_map(twice, kwargs), 2
    try:
        gm, out_spec = _graph(model, kwargs, batch)
    except SparsifyError:
        return None
    inputs = map(tensor_of, gm.graph.find_nodes(op="placeholder"))
    return (gm, out_spec, kwargs, batch) if any(map(_is_free, inputs)) else None


def _of_batch(gm: fx.GraphModule, kwargs: Mapping[str, Any], batch: int | None) -> list[bool]:
    """`Captured.of_batch`. An input that the model does not read is of the batch if it has its size."""
    nodes = gm.graph.find_nodes(op="placeholder")
    tensors = [
        (leaf, tensor_of(node))
        for leaf, node in zip(tree_leaves(kwargs), nodes, strict=True)
        if isinstance(leaf, Tensor)
    ]
    return [
        leaf.shape[:1] == (batch,) if read is None and batch is not None else _is_free(read)
        for leaf, read in tensors
    ]


def _is_free(tensor: Tensor | None) -> bool:
    """Whether the first size of an input of a graph is free."""
    return tensor is not None and tensor.dim() > 0 and _torch.known(tensor.shape[0]) is None


def copies(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call for a model that may write to them."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, dict(kwargs))


def _returned(gm: fx.GraphModule) -> list[Any]:
    """The leaves of the output: nodes for tensors, and constants."""
    return tree_leaves(gm.graph.output_node().args[0])


def _check_graph(gm: fx.GraphModule, model: nn.Module) -> None:
    """Raise SparsifyError unless a file can hold this graph."""
    name = type(model).__name__
    if _torch_export.remove_autocast(gm):
        raise SparsifyError(
            f"{name} turns autocast on in its own code, which a file cannot hold: cast the model "
            "with model.to(dtype)"
        )
    leaves = _returned(gm)
    if not any(isinstance(leaf, fx.Node) for leaf in leaves):
        raise SparsifyError(f"{name} returns no tensor, so there is nothing to export")
    for leaf in leaves:
        if isinstance(leaf, str):
            raise SparsifyError(
                f"{name} returns the string {leaf!r}, which a file cannot hold: return tensors, numbers or None"
            )
    own = {_memory(node): node for node in gm.graph.find_nodes(op="get_attr")}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        for written in written_by(node, node.args, node.kwargs):
            if isinstance(written, fx.Node) and (held := own.get(_memory(written))) is not None:
                tensor = getattr(gm, str(held.target), None)
                called = next((known for known, one in model.named_buffers() if one is tensor), held.target)
                raise SparsifyError(
                    f"{name} writes to its tensor {called!r} in every call, which a file cannot hold: return the "
                    "new value in place of the write"
                )


def _memory(node: fx.Node) -> object:
    """A key that nodes have in common whose tensors share memory."""
    tensor = tensor_of(node)
    return node if tensor is None else _torch.storage_of(tensor)


def _check(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise OptionError unless this call can be exported."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a module, got {type(model).__name__}")
    if not isinstance(kwargs, Mapping) or not any(map(has_tensor, kwargs.values())):
        raise OptionError(
            "kwargs must be the keyword arguments of a call of the model, with tensors among them, such as "
            f"{{'hidden_states': ..., 'timestep': ...}}, got {_kind(kwargs)}"
        )
    if model.training:
        raise OptionError("model must be in evaluation mode to be exported: call model.eval() first")
    devices = {leaf.device.type for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor)}
    if any(torch.amp.is_autocast_available(one) and torch.is_autocast_enabled(one) for one in devices):
        raise OptionError("export must run outside of autocast: cast the model with model.to(dtype) instead")
    signature = inspect.signature(model.forward)
    taken = signature.parameters
    for name, value in kwargs.items():
        if name not in taken and not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
            raise OptionError(
                f"{type(model).__name__} takes no argument {name!r}: it takes {', '.join(taken)}"
            )
        for leaf in tree_leaves(value):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise OptionError(
                    f"argument {name!r} must hold tensors, numbers, strings or None, got {type(leaf).__name__}: "
                    "a file cannot name another value"
                )
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise OptionError(
            f"kwargs must be the keyword arguments of a call of {type(model).__name__}, got {_kind(kwargs)}: "
            f"{first_line(error)}"
        ) from error


def check_device(model: nn.Module, kwargs: Mapping[str, Any], device: str | torch.device | None) -> None:
    """Raise OptionError unless the model and the arguments of a call are on a device."""
    if device is None:
        return
    wanted = device_of(device)
    tensors = (*model.parameters(), *model.buffers(), *tree_leaves(dict(kwargs)))
    others = {leaf.device.type for leaf in tensors if isinstance(leaf, Tensor)} - {wanted.type}
    if others:
        raise OptionError(
            f"device must be that of the model and its arguments, {' and '.join(sorted(others))}, "
            f"got {str(device)!r}: move both with .to({str(device)!r}) before the export"
        )


def device_of(device: str | torch.device) -> torch.device:
    """A device of this machine. Raises OptionError if it has none of this name."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise OptionError(
            f"device must be one of this machine, where the model runs while it is exported, got {str(device)!r}: "
            "export where there is one"
        ) from error
    return found


def has_tensor(value: Any) -> bool:
    """Whether a value is a tensor or holds one."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as a sentence."""
    text = _COLOUR.sub("", str(error)).strip().partition("\n")[0].rstrip(".:")
    return f"{text or type(error).__name__}."


def _kind(value: object) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
