"""Hand labels from the outputs of one graph to the inputs of the next, where a model breaks without `apply`.

A tensor keeps its labels while it is the same object with the same version: operators that run between the graphs
make other tensors, and writes change the version. A graph that gets labels has a plan for each set of them, as the
parts of an applied model do.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparsify_compiler import _torch
from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.axis_tracker import AxisTracker, End
from sparsify_compiler.passes.capture import all_sites
from sparsify_compiler.passes.following import Ends
from sparsify_compiler.passes.fx import input_name, sizes_of, value_of


class _Handed(NamedTuple):
    """The labels of a tensor that left a graph."""

    tracker: AxisTracker
    end: End
    state: Hashable
    """The memory that it showed, and its version."""
    beside: tuple[tuple[ref[Tensor], Hashable], ...]
    """The other outputs in its memory, and their states. A compiler may give them versions of their own."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether nothing was written to the tensor since."""
        others = ((one(), state) for one, state in self.beside)
        return _state(tensor) == self.state and all(
            one is not None and _state(one) == state for one, state in others
        )


_handed = WeakTensorKeyDictionary()
"""Output of a graph -> its labels."""


def _state(tensor: Tensor) -> Hashable:
    """Changes with every write; None for a tensor that does not count them."""
    if tensor.is_inference():
        return None
    place = tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
    return tensor.untyped_storage()._cdata, place, tensor._version


def may_leave(gm: fx.GraphModule) -> bool:
    """Whether other graphs of the model may follow: a break ends Dynamo's graph, or one came before."""
    return _torch.graph_break(gm) is not None or len(_handed) > 0


def may_receive(analysed: fx.GraphModule) -> bool:
    """Whether the sites of a graph may become sparse by labels from other graphs."""
    plans = [node.meta["plan"] for node in all_sites(analysed)]
    return len(_handed) > 0 and any(
        one.method == "dense" and not one.site.refusal and one.site.q_tokens == one.site.kv_tokens
        for one in plans
    )


def fix_videos(gm: fx.GraphModule) -> None:
    """Fix the sizes of all inputs that may be videos, except their batch: labels hold for these sizes."""
    for node in gm.graph.nodes:
        value = node.meta.get("example_value") if node.op == "placeholder" else None
        if isinstance(value, Tensor) and value.dim() >= 4:
            for size in value.shape[1:]:
                int(size)


@dataclass(slots=True, eq=False)
class Handover:
    """Labels that a graph receives, and those that it leaves."""

    analysed: fx.GraphModule
    """The graph under the plan of its own analysis."""
    config: SparsifyConfig
    receives: bool
    """Whether its sites may become sparse by labels from other graphs."""
    leaves: bool
    """Whether other graphs follow."""
    device: str | None = None
    _under: dict[tuple[tuple[int, int], ...], tuple[list[End], fx.GraphModule]] = field(default_factory=dict)
    """(place, label) of each input with labels -> (the labels, the graph under them)."""

    def receive(self, args: Sequence[Any]) -> fx.GraphModule:
        """The graph with its plan under the labels of these inputs."""
        handed = self._labels(args) if self.is_as_traced(args) else {}
        if not handed:
            return self.analysed
        key = tuple((place, id(one.end)) for place, one in handed.items())
        if key not in self._under:
            ends = [one.end for one in handed.values()]  # they live as long as their numbers are in use
            self._under[key] = ends, self._planned(args, handed)
        return self._under[key][1]

    def leave(self, graph: fx.GraphModule, args: Sequence[Any], outputs: Any) -> None:
        """Give the outputs of a call the labels that they have in the graph that `receive` returned for it."""
        ends: Ends | None = graph.meta.get("ends")
        if not self.leaves or ends is None or not self.is_as_traced(args):
            return
        tensors = [one for one in outputs if isinstance(one, Tensor) and one.layout is torch.strided]
        for output, end in zip(outputs, ends.outputs, strict=True):
            if end is None or not any(output is one for one in tensors):
                continue
            memory, state = output.untyped_storage()._cdata, _state(output)
            beside = tuple(
                (ref(one), _state(one))
                for one in tensors
                if one is not output and one.untyped_storage()._cdata == memory
            )
            if state is not None:
                _handed[output] = _Handed(ends.tracker, end, state, beside)

    def is_as_traced(self, args: Sequence[Any]) -> bool:
        """Whether all inputs have the sizes with which labels were found."""
        placeholders = [node for node in self.analysed.graph.nodes if node.op == "placeholder"]
        return all(
            _sizes(value_of(node)) == (tuple(arg.shape) if isinstance(arg, Tensor) else (arg,))
            for node, arg in zip(placeholders, args, strict=True)
            if isinstance(arg, (Tensor, int))
        )

    def _labels(self, args: Sequence[Any]) -> dict[int, _Handed]:
        """Place -> labels of an input."""
        handed = {place: _handed.get(arg) for place, arg in enumerate(args) if isinstance(arg, Tensor)}
        return {place: one for place, one in handed.items() if one is not None and one.holds(args[place])}

    def _planned(self, args: Sequence[Any], handed: dict[int, _Handed]) -> fx.GraphModule:
        outer = AxisTracker()
        for one in handed.values():
            outer.embeddings |= one.tracker.embeddings
            outer.positions |= one.tracker.positions
        placeholders = (node for node in self.analysed.graph.nodes if node.op == "placeholder")
        for place, (node, arg) in enumerate(zip(placeholders, args, strict=False)):
            if place in handed:
                outer.receive(arg, handed[place].end)
            elif isinstance(arg, Tensor):
                outer.put_input(arg, isinstance(arg, nn.Parameter), input_name(node))
        return pipeline.plan_within(self.analysed, self.config, outer, args, device=self.device)


def _sizes(traced: Any) -> tuple[int, ...] | None:
    """The sizes of an input in the trace, or the number that it was."""
    if isinstance(traced, Tensor):
        return sizes_of(traced)
    number = _torch.hint(traced) if isinstance(traced, torch.SymInt) else traced
    return None if number is None else (number,)
