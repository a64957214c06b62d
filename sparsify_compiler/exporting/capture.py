"""Capture a call of a model as one graph, and plan it as torch.compile does.

    model(**kwargs) -> Dynamo's graph, with the model's tensors as attributes -> the passes -> analysed graph

Dynamo writes the values of arguments that are not tensors into the graph, and all sizes. So a file fits calls with
these values and sizes alone.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map

from sparsify_compiler import _torch, _torch_export
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.fx import tensor_of
from sparsify_compiler.passes.planning import graph_plan, learns
from sparsify_compiler.plan import GraphPlan

PLAIN = (str, int, float, bool, type(None))
"""Types of arguments that a file can name, besides tensors."""


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
    """The size that is free in the graph, where it is the first of a tensor's; None if all are fixed."""

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
        """The names of the outputs: the fields of the model's output, if it has names for them."""
        count, names = self.out_spec.num_leaves, self.out_spec.context
        if (
            isinstance(names, (list, tuple))
            and len(names) == count
            and all(isinstance(n, str) for n in names)
        ):
            return list(names)
        return ["output"] if count == 1 else [f"output_{place}" for place in range(count)]

    def is_of_batch(self, tensor: Tensor) -> bool:
        """Whether the first size of an argument is free."""
        return self.batch is not None and tensor.shape[:1] == (self.batch,)


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
    several, batch = _of_several(kwargs) if free_batch else (kwargs, None)
    try:
        with torch.no_grad():
            gm, out_spec = _torch_export.capture_for_export(model, several, batch)
    except SparsifyError:
        raise
    except Exception as error:  # whatever Dynamo or the model's own code raises
        raise SparsifyError(
            f"export needs {type(model).__name__} as one graph, which Dynamo cannot make: {first_line(error)} "
            "torch.compile(model, fullgraph=True) shows where"
        ) from error
    if _torch_export.remove_autocast(gm):
        raise SparsifyError(
            f"{type(model).__name__} turns autocast on in its own code, which a file cannot hold: cast the model "
            "with model.to(dtype)"
        )
    if batch is not None and not _has_free_size(gm):
        return capture(model, kwargs, config)
    kwargs = several
    captured = Captured(
        model=model,
        kwargs=kwargs,
        analysed=pipeline.analyse(gm, config),
        out_spec=out_spec,
        config=config,
        batch=batch,
    )
    if waiting := [one.site.name for one in captured.plan.sparse if learns(one)]:
        raise OptionError(
            f"attention {waiting[0]} has method 'dsv' without a predictor: train one with "
            "sparsify_compiler.DSVTrainer, and give options={'predictor': its file}"
        )
    return captured


def _of_several(kwargs: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """(the arguments with a batch of at least 2, that batch): a size of 1 is never free.

    The batch is the first size of the largest tensor.
    """
    tensors = [leaf for leaf in tree_leaves(kwargs) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = max(tensors, key=Tensor.numel).shape[0]
    if batch > 1:
        return kwargs, batch

    def twice(leaf: Any) -> Any:
        is_of_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
        return torch.cat([leaf, leaf]) if is_of_batch else leaf

    return tree_map(twice, dict(kwargs)), 2


def _has_free_size(gm: fx.GraphModule) -> bool:
    """Whether a size of an input is free."""
    values = (tensor_of(node) for node in gm.graph.find_nodes(op="placeholder"))
    return any(
        _torch.known(size) is None for value in values if value is not None for size in value.shape[:1]
    )


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
    taken = inspect.signature(model.forward).parameters
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
    text = str(error).strip().partition("\n")[0].rstrip(".:")
    return f"{text or type(error).__name__}."


def _kind(value: object) -> str:
    if not isinstance(value, Mapping):
        return type(value).__name__
    return f"a mapping of {', '.join(map(str, value)) or 'nothing'}"
