"""Follow the axes of a graph's inputs to its captured sites.

`follow` runs the graph on fake tensors under an `AxisTracker`, into the bodies of higher-order operators, and
returns the labels of every query and key. A fake tensor has the sizes, strides and shared memory that
Dynamo recorded, with a plain integer for every symbol, since labels need sizes. An operator that refuses fake
tensors gives the recorded value, whose axes are unknown.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify_compiler import _torch
from sparsify_compiler.passes.alike import Pieces
from sparsify_compiler.passes.axes import Source
from sparsify_compiler.passes.axis_tracker import AxisTracker, Embedding, End
from sparsify_compiler.passes.axis_writes import Known
from sparsify_compiler.passes.capture import attention, attention_nodes
from sparsify_compiler.passes.fx import body_of, input_name, sizes_of, strides_of, written_by

log = logging.getLogger(__name__)


class Site(NamedTuple):
    """Everything known about an attention's query [B, H, Sq, D] and key [B, Hkv, Sk, D]."""

    query: Known
    key: Known
    rows: Pieces = ()
    """The rows of its mask, with those that are alike; empty without a mask."""


class Ends(NamedTuple):
    """Everything known about the inputs and the outputs of a graph after it ran; None for values but tensors."""

    inputs: list[End | None]
    outputs: list[End | None]
    tracker: AxisTracker


class Followed(NamedTuple):
    """The axes found in a graph."""

    sites: dict[fx.Node, Site]
    """Every captured site that the graph reaches."""
    inputs: dict[fx.Node, Source]
    """The source of the axes of every tensor among the inputs."""
    embeddings: set[Embedding]
    """Every product of graph inputs with weights."""
    ends: Ends


See = Callable[[fx.Node, Any], None]
"""Gets each node of a graph, not of its bodies, and its value, as soon as it has one."""


def follow(
    gm: fx.GraphModule,
    within: tuple[AxisTracker, Sequence[Any]] | None = None,
    *,
    tracker: AxisTracker | None = None,
    see: See | None = None,
) -> Followed:
    """Run a graph on fake tensors with labels, and return the axes found.

    Args:
        within: the tracker of a call of a whole model, and the tensors that the graph gets there.
        tracker: follows the labels; by default a new one.
        see: gets every node and its value.
    """
    grad_enabled = torch.is_grad_enabled()
    tracker = tracker or AxisTracker()
    outer, given = within or (None, ())
    if outer is not None:
        tracker.embeddings, tracker.positions = outer.embeddings, outer.positions
        tracker.meshes = outer.meshes
    sites: dict[fx.Node, Site] = {}
    sources: dict[fx.Node, Source] = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        values = _fake_inputs([node.meta.get("example_value") for node in placeholders])
        with tracker:
            for place, (node, value) in enumerate(zip(placeholders, values, strict=True)):
                if isinstance(value, Tensor) and outer is not None:
                    tracker.receive(value, outer.end_of(given[place]))
                elif isinstance(value, Tensor):
                    is_weight = isinstance(node.meta["example_value"], nn.Parameter)
                    sources[node] = tracker.put_input(value, is_weight, input_name(node))
                    for dim, mesh in node.meta.get("meshes", {}).items():
                        if mesh is not None:
                            tracker.put_mesh(value, dim, mesh)
            returned = _Follower(gm, tracker, sites, see).run(*values)
            outputs = returned if isinstance(returned, (tuple, list)) else [returned]
            ends = [
                [tracker.end_of(one) if isinstance(one, Tensor) else None for one in some]
                for some in (values, outputs)
            ]
    torch.set_grad_enabled(grad_enabled)
    return Followed(sites, sources, tracker.embeddings, Ends(ends[0], ends[1], tracker))


def _fake_inputs(values: Sequence[Any]) -> list[Any]:
    """Fake tensors for a graph's inputs, which share memory where the inputs do; numbers stay numbers."""
    fakes = [_static(value) for value in values]
    sharing: dict[int, list[int]] = {}
    for i, (value, one) in enumerate(zip(values, fakes, strict=True)):
        if isinstance(one, Tensor) and (storage := _torch.storage_of(value)) is not None:
            sharing.setdefault(storage, []).append(i)
    for group in sharing.values():
        offsets = [_torch.hint(values[i].storage_offset()) for i in group]
        if len(group) > 1 and None not in offsets:
            _share(fakes, group, offsets)
    return fakes


def _share(tensors: list[Any], group: Sequence[int], offsets: Sequence[Any]) -> None:
    """Lay the tensors with the indices `group` into one memory, at these offsets in elements."""
    spans = [
        (1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)))
        * bool(t.numel())
        for t in (tensors[i] for i in group)
    ]
    ends = [
        (offset + span) * tensors[i].itemsize for i, offset, span in zip(group, offsets, spans, strict=True)
    ]
    memory = torch.empty(max(ends), dtype=torch.uint8, device=tensors[group[0]].device)
    for i, offset, end in zip(group, offsets, ends, strict=True):
        t = tensors[i]
        tensors[i] = memory[:end].view(t.dtype).as_strided(t.shape, t.stride(), offset)


class Unknown:
    """A value that could not be followed; a write to it may reach any tensor of which it was made."""

    def __init__(self, made_of: Sequence[Tensor] = ()) -> None:
        self.made_of = made_of


def _behind(values: Any) -> list[Tensor]:
    """The tensors among values, and the tensors of which unknown values were made."""
    found: list[Tensor] = []
    for leaf in torch.utils._pytree.tree_leaves(values):
        found += [leaf] if isinstance(leaf, Tensor) else leaf.made_of if isinstance(leaf, Unknown) else []
    return found


def _static(value: Any, made_of: Sequence[Tensor] = ()) -> Any:
    """A value that Dynamo recorded, with plain integers for sizes; `Unknown` if these are unknown."""
    if isinstance(value, torch.SymInt):
        size = _torch.hint(value)
        return Unknown(made_of) if size is None else size
    if isinstance(value, (tuple, list)):
        items = [_static(item, made_of) for item in value]
        unknown = any(isinstance(item, Unknown) for item in items)
        return tuple(items) if unknown and isinstance(value, torch.Size) else type(value)(items)
    if not isinstance(value, Tensor):
        return value
    sizes = sizes_of(value)
    if sizes is None:
        return Unknown(made_of)
    strides = strides_of(value) or torch.empty(sizes, dtype=value.dtype, device="meta").stride()
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)


class _Follower(fx.Interpreter):
    """Runs a graph under an `AxisTracker`, with the bodies of higher-order operators; never raises."""

    def __init__(
        self, gm: fx.GraphModule, tracker: AxisTracker, found: dict[fx.Node, Site], see: See | None = None
    ) -> None:
        super().__init__(gm)
        self.tracker, self.found, self.see = tracker, found, see
        self._results = {node.meta["result"] for node in attention_nodes(gm)}

    def run_node(self, n: fx.Node) -> Any:
        value = self._value(n)
        if n in self._results:
            value = self._as_recorded(n, value)
        if self.see is not None:
            self.see(n, value)
        return value

    def _as_recorded(self, n: fx.Node, value: Any) -> Any:
        """The output of attention with the recorded strides: they decide which later tensors are views of it."""
        recorded = n.meta.get("example_value")
        strides = strides_of(recorded) if isinstance(recorded, Tensor) else None
        if strides is None or not isinstance(value, Tensor) or value.stride() == strides:
            return value
        out = value.new_empty_strided(value.shape, strides)
        self.tracker.put(out, self.tracker.known(value))
        return out

    def _value(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, Unknown) for leaf in leaves):
            return self._recorded(n, args, kwargs)
        if n.target is attention:
            return self._site(n, *args)
        try:
            if isinstance(self.module, fx.GraphModule) and (body := body_of(self.module, n)):
                operands = args[len(args) - body.arity :]
                return _Follower(body.module, self.tracker, self.found).run(*operands)
            return getattr(self, n.op)(n.target, args, kwargs)
        except Exception as error:  # any operator may refuse fake tensors: then its output is unknown
            log.debug("not followed: %s: %s", n.format_node(), error)
            return self._recorded(n, args, kwargs)

    def _recorded(self, n: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The recorded value of a node; nothing is known about it, nor about tensors that the node may write to."""
        tensors = _behind((args, kwargs))
        self.tracker.lose(_behind(written_by(n, args, kwargs)), tensors)
        recorded = n.meta.get("example_value")
        value = Unknown(tensors) if recorded is None else _static(recorded, tensors)
        for output in torch.utils._pytree.tree_leaves(value):
            if isinstance(output, Tensor):
                self.tracker.derive(output, tensors)
        return value

    def _site(
        self, n: fx.Node, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, _: float
    ) -> Tensor:
        q, k, v = (self.tracker.known(t) for t in (query, key, value))
        has_rows = mask is not None and mask.dim() >= 2
        self.found[n] = Site(q, k, self.tracker.alike.of(mask)[-2] if mask is not None and has_rows else ())
        out = query.new_empty(*query.shape[:3], value.shape[3])
        taken, fixed = q.taken | k.taken | v.taken, q.fixed & k.fixed & v.fixed
        self.tracker.put(out, Known([*q.labels[:3], v.labels[3]], taken, fixed))
        return out
