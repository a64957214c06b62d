"""The programs of a captured model: one for each phase, with functional state.

    (output, state) = program(state, **inputs)

`inputs` are the model's own arguments, those without tensors left out. `state` holds all that sites keep from call
to call: a flag (0-d bool on the CPU, whether a call has written the rest), then fp32 tensors. It is empty where no
method keeps anything.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from sparsify_compiler.exporting.capture import Captured
from sparsify_compiler.passes import pipeline
from sparsify_compiler.runtime.program import Phase, Variant
from sparsify_compiler.runtime.site_inputs import GraphInputs
from sparsify_compiler.runtime.state import Spec, blank


def phases(captured: Captured) -> tuple[Phase, ...]:
    """The phases that calls of a model run."""
    if not captured.plan.sparse:
        return ("dense",)
    return ("dense", "sparse") if captured.plan.dense_steps else ("sparse",)


class Functional(nn.Module):
    """The graph of one phase, as a function of state and inputs."""

    def __init__(self, graph: fx.GraphModule, kwargs: Mapping[str, Any], out_spec: TreeSpec) -> None:
        """Args:
        graph: a lowered graph, whose inputs are the leaves of `kwargs` and then `graph.meta["extra"]`.
        """
        super().__init__()
        self.model = graph
        self.extra: GraphInputs = graph.meta["extra"]
        self._kwargs, self._out_spec = dict(kwargs), out_spec
        for place, one in enumerate(self.extra.trained):
            self.register_buffer(f"trained_{place}", one.initial.to(one.device), persistent=False)

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The fp32 tensors of the state. Reports of sites are not among them."""
        return kept(self.extra)

    def first(self) -> tuple[Tensor, ...]:
        """The state before the first call."""
        flag = torch.zeros((), dtype=torch.bool, device="cpu")
        return (*([flag] if self.extra.initialised else []), *blank(self.specs))

    def forward(self, _state: Sequence[Tensor], /, **inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """(the model's output, the new state). A model may have an argument `state` of its own."""
        state = _state
        leaves = tree_leaves({name: inputs.get(name, value) for name, value in self._kwargs.items()})
        flags, old = (
            state[: self.extra.initialised],
            [tensor.clone() for tensor in state[self.extra.initialised :]],
        )
        reports, remaining, written = set(self.extra.reports.values()), iter(old), []
        for place, (_, shape, device) in enumerate(self.extra.state):
            is_report = place in reports
            written.append(torch.zeros(shape, device=device) if is_report else next(remaining))
        trained = [getattr(self, f"trained_{place}") for place in range(len(self.extra.trained))]
        output = self.model(*leaves, *trained, *flags, *written)
        return tree_unflatten(list(output), self._out_spec), (*map(torch.ones_like, flags), *old)


def name_in_model(name: str) -> str:
    """The name that a tensor of a program has in the model: `Functional` holds the model as `model`."""
    return name.removeprefix("model.")


def kept(extra: GraphInputs) -> tuple[Spec, ...]:
    """The fp32 tensors that sites keep from call to call, without their reports."""
    reports = set(extra.reports.values())
    return tuple(spec for place, spec in enumerate(extra.state) if place not in reports)


def functional(captured: Captured, phase: Phase) -> Functional:
    """The program of a phase. Its tensors have the names of the model's."""
    graph = pipeline.rewrite(captured.analysed, captured.config, Variant(phase))
    _name_tensors(graph, captured.model)
    return Functional(graph, captured.kwargs, captured.out_spec).eval()


def _name_tensors(graph: fx.GraphModule, model: nn.Module) -> None:
    """Give the tensors of a graph the names that they have in the model; Dynamo made names of its own.

    A tensor keeps Dynamo's name where the model's is an attribute that every graph has.
    """
    known = {id(tensor): name for name, tensor in (*model.named_buffers(), *model.named_parameters())}
    persistent = model.state_dict().keys()
    named: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        if node.target not in named:
            tensor = getattr(graph, node.target, None)
            name = known.get(id(tensor), "") if isinstance(tensor, Tensor) else ""
            owner, last = _owner(graph, name)
            named[node.target] = node.target
            if owner is None or not isinstance(getattr(owner, last, tensor), Tensor):
                continue
            delattr(graph, node.target)
            named[node.target] = name
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(last, tensor)
            else:
                owner.register_buffer(last, tensor, persistent=name in persistent)
        node.target = named[node.target]
    graph.recompile()


def _owner(graph: fx.GraphModule, name: str) -> tuple[nn.Module | None, str]:
    """(the module that holds a tensor of this name, its last part); no module where a part of the path is taken."""
    *path, last = name.split(".")
    owner: nn.Module = graph
    for part in path:
        if part not in owner._modules:
            if hasattr(owner, part):
                return None, last
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    return owner if last else None, last
