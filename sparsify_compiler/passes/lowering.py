"""Turn plans into ops.

    before   out = attention(q, k, v, m, scale)            meta["plan"]

    sparse   constants = get_attr(...)                     tables and the like, one set for each distinct plan
    phase    bias = where(m, 0, -inf)
             out = TableSite(q, k, v, bias, *constants)    a table and one op
        or   out = SparseSite(q, k, v, bias, *constants, warm, *memory, report)
             out = lay_out(out, strides)                   where somebody needs those that Dynamo recorded

    dense    out = scaled_dot_product_attention(q, k, v, ...)         the call that the model had
    phase    out = Observer(out, q, k, *constants, warm, *memory)     where a method learns from dense steps

A site whose plan is dense gets the call back that the model had. What sites remember comes in as new inputs of
the graph, after all others, which they write to; `meta["held"]` describes them. Constants reach the bodies of
higher-order operators as extra operands; a site there remembers nothing, since a body may run again (in
backward), and then must find what it found the first time: what it chose is kept for that.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import _torch
from sparsify_compiler.methods import DynamicMethod, LearningMethod, StaticMethod
from sparsify_compiler.passes.capture import attention_nodes
from sparsify_compiler.passes.fx import bodies, tensor_of
from sparsify_compiler.passes.planning import learns
from sparsify_compiler.passes.strides import lay_out, strides_to_restore
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.runtime.program import Choices, Held, Phase
from sparsify_compiler.runtime.site import REPORT, Observer, SparseSite, TableSite, settled, shapes_of
from sparsify_compiler.runtime.state import Learned

_LEAST = -1e30
"""Of a finite bias: added to any score, it is that score's only digits."""

_CHOICES = tuple(
    getattr(torch.ops.sparsify, name).default
    for name in ("kmeans", "sort_by_label", "top_p_blocks", "top_k_keys", "learn_site")
)
"""Ops that decide what is read, and learn from it."""

_Request = Callable[[str, Tensor | Learned], fx.Node]
"""(name, what it is) -> the node that stands for a constant or learned tensor in the graph at hand."""


def lower(
    gm: fx.GraphModule,
    *,
    phase: Phase = "sparse",
    remembers: bool = True,
    choices: Choices = (),
    measure_recall: float = 0.0,
) -> fx.GraphModule:
    """Replace every `attention` node by what its plan says; see the module's picture.

    Args:
        phase: `dense` puts every call back.
        remembers: whether dynamic sites keep anything from call to call; if not, the graph is one of training, and
            methods that learn do so.
        choices: what training chose for sites whose method learns.
        measure_recall: share of the queries to measure the true attention mass kept on.
    """
    first = next(iter(gm.graph.nodes))
    memory = _Memory(gm)

    def operand(name: str, source: Tensor | Learned) -> fx.Node:
        if isinstance(source, Learned):
            return memory.learned(name, source)
        gm.register_buffer(name, source, persistent=False)
        with gm.graph.inserting_before(first):
            return gm.graph.get_attr(name)

    lowering = _Lowering(phase, measure_recall, dict(choices), trains=not remembers)
    _lower_module(gm, lowering, operand, memory if remembers else None)
    gm.meta["held"] = memory.held()
    return gm


def _is_sparse(node: fx.Node) -> bool:
    return node.meta["plan"].method != "dense"


class _Lowering:
    """What all modules of one lowering share: how to lower, and the distinct constants, each built once."""

    def __init__(
        self, phase: Phase, measure_recall: float, choices: Mapping[str, Any], *, trains: bool
    ) -> None:
        self.phase, self.measure_recall, self.trains = phase, measure_recall, trains
        self.choices = choices
        self._known: dict[Any, tuple[str, dict[str, Tensor | None]]] = {}

    def learned(
        self, plan: AttentionPlan, device: torch.device
    ) -> tuple[dict[str, Learned], dict[str, Learned]]:
        """(what `select` reads, what `learn` writes and the signal), by name; nothing where nothing is learned."""
        method, site = plan.settings, plan.site
        if not isinstance(method, LearningMethod):
            return {}, {}
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
            read = method.learned(site, plan.layout)
            written = method.observed(site) if self.trains and method.learns else {}
            signal = torch.zeros(3, dtype=torch.int64)

        def named(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Learned]:
            return {name: Learned(f"{site.name}.{name}", tensor, device) for name, tensor in tensors.items()}

        if not written:
            return named(read, device), {}
        shared = Learned("signal", signal, torch.device("cpu"))
        return named(read, device), {**named(written, device), "signal": shared}

    def constants(self, plan: AttentionPlan, device: torch.device) -> dict[str, tuple[str, Tensor | None]]:
        """Field -> (name that is unique in the graph, tensor), in the order of the method's fields."""
        method, layout = settled(plan, self.choices.get(plan.site.name)), plan.layout
        key = layout, method, device
        if key not in self._known:
            # On real tensors, whatever fake or device mode the compiler is in.
            with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
                built = (
                    method.table(layout).tensors()
                    if isinstance(method, StaticMethod)
                    else method.constants(layout)  # type: ignore[attr-defined]
                )
                moved = {field: None if t is None else t.to(device) for field, t in built.items()}
            self._known[key] = f"sparsify_{plan.method}{len(self._known)}", moved
        name, tensors = self._known[key]
        return {field: (f"{name}_{field}", tensor) for field, tensor in tensors.items()}


class _Memory:
    """The inputs of a graph through which its sites remember."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._graph = gm.graph
        self._warm: fx.Node | None = None
        self._specs: list[tuple[str, tuple[int, ...], torch.device]] = []
        self._reports: dict[str, int] = {}
        self._nodes: list[fx.Node] = []
        self._learned: list[Learned] = []

    def learned(self, name: str, source: Learned) -> fx.Node:
        """An input for a learned tensor, before all those through which sites remember."""
        self._learned.append(source)
        others = [self._warm] if self._warm is not None else self._nodes
        return _add_placeholder(self._graph, name, before=others)

    def of(self, plan: AttentionPlan, device: torch.device) -> list[fx.Node | None]:
        """(warm, *memory, report) of a site, as inputs of the graph."""
        shapes = shapes_of(plan)
        if shapes and self._warm is None:
            self._warm = _add_placeholder(self._graph, "sparsify_warm", before=self._nodes)
        site = plan.site
        tensors = {**shapes, "report": (len(REPORT), site.batch, site.heads)}
        self._reports[site.name] = len(self._specs) + len(shapes)
        for name, shape in tensors.items():
            self._specs.append((f"{site.name}.{name}", shape, device))
            self._nodes.append(_add_placeholder(self._graph, f"sparsify_{name}{site.index}"))
        return [self._warm if shapes else None, *self._nodes[-len(tensors) :]]

    def held(self) -> Held:
        """What `Program` has to pass."""
        return Held(
            specs=tuple(self._specs),
            reports=self._reports,
            warm=self._warm is not None,
            learned=tuple(self._learned),
        )


def _lower_module(
    gm: fx.GraphModule, lowering: _Lowering, operand: _Request, memory: _Memory | None
) -> list[tuple[str, Tensor | Learned]]:
    """Lower one graph and its bodies, taking constants from `operand`; returns those it asked for."""
    nodes: dict[str, fx.Node] = {}
    asked: list[tuple[str, Tensor | Learned]] = []

    def request(name: str, source: Tensor | Learned) -> fx.Node:
        if name not in nodes:
            nodes[name] = operand(name, source)
            asked.append((name, source))
        return nodes[name]

    restored = strides_to_restore(gm) if lowering.phase == "sparse" else {}
    for node in attention_nodes(gm):
        original, result, plan = node.meta["original"], node.meta["result"], node.meta["plan"]
        if not _is_sparse(node) or lowering.phase == "dense":
            out = original
            if _is_sparse(node) and (memory is not None or learns(plan)):
                out = _emit_observer(gm, node, lowering, request, memory)
            result.replace_all_uses_with(out)
            _erase_inserted(gm.graph, result)
        else:
            out = _emit_site(gm, node, lowering, request, memory)
            node.replace_all_uses_with(out)
            gm.graph.erase_node(node)
            if (strides := restored.get(node)) is not None:
                lay_out(out if result is node else result, strides)
            if plan.site.spelling == "sdpa":  # what is left of attention by hand, the inner backend drops
                gm.graph.erase_node(original)
    lowered: dict[int, list[tuple[str, Tensor | Learned]]] = {}
    for body in list(bodies(gm)):
        module = body.module
        if id(module) not in lowered:
            lowered[id(module)] = _lower_module(
                module, lowering, partial(_add_placeholder_for, module.graph), None
            )
            if any(isinstance(part, (SparseSite, Observer)) for part in module.modules()):
                _torch.keep_results(module, _CHOICES)
        body.call.args = (*body.call.args, *(request(*table) for table in lowered[id(module)]))
    return asked


def _is_static(plan: AttentionPlan) -> bool:
    """Whether a site is a table and one op: nothing is decided at run time, nothing approximated."""
    return isinstance(plan.settings, StaticMethod) and plan.far_field == "drop"


def _erase_inserted(graph: fx.Graph, node: fx.Node) -> None:
    """Erase what capture inserted for `node` and nobody reads any more.

    Not by dead-code elimination: a Dynamo graph mutates tensors by calls whose value nobody reads.
    """
    if node.meta.get("inserted") and not node.users:
        sources = node.all_input_nodes
        graph.erase_node(node)
        for source in sources:
            _erase_inserted(graph, source)


def _add_placeholder(graph: fx.Graph, name: str, *, before: list[fx.Node] | None = None) -> fx.Node:
    """A new last input of a graph, or one before others."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if before:
        place = graph.inserting_before(before[0])
    else:
        place = graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before()
    with place:
        node = graph.placeholder(name)
    node._dynamo_source = None
    return node


def _add_placeholder_for(graph: fx.Graph, name: str, source: Tensor | Learned) -> fx.Node:
    """A new last operand of a body, for a tensor that its caller passes."""
    return _add_placeholder(graph, name)


def _inputs(graph: fx.Graph, node: fx.Node, lowering: _Lowering, request: _Request) -> tuple[Any, ...]:
    """(query, key, value, bias, {operand by name}, {observed by name}) of an `attention` node."""
    query, key, value, mask, _ = node.args
    plan, device = node.meta["plan"], tensor_of(query).device  # type: ignore[union-attr]
    constants = lowering.constants(plan, device)
    operands = {field: None if t is None else request(name, t) for field, (name, t) in constants.items()}
    read, observed = (
        {field: request(f"sparsify_{field}_{_identifier(one.name)}", one) for field, one in learned.items()}
        for learned in lowering.learned(plan, device)
    )
    bias = None if mask is None else _key_bias(graph, mask)  # type: ignore[arg-type]
    return query, key, value, bias, {**operands, **read}, observed


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _emit_site(
    gm: fx.GraphModule, node: fx.Node, lowering: _Lowering, request: _Request, memory: _Memory | None
) -> fx.Node:
    plan: AttentionPlan = node.meta["plan"]
    with gm.graph.inserting_before(node):
        query, key, value, bias, operands, observed = _inputs(gm.graph, node, lowering, request)
    held = _held_by(node, memory)
    site: nn.Module = TableSite(plan)
    if not _is_static(plan):
        site = SparseSite(
            plan,
            tuple(operands),
            remembers=bool(held),
            observed=tuple(observed),
            choice=lowering.choices.get(plan.site.name),
            sampled_rows=round(lowering.measure_recall * plan.site.q_tokens) if held else 0,
        )
    name = f"sparsify_site{plan.site.index}"
    gm.add_submodule(name, site)
    with gm.graph.inserting_before(node):
        tensors = (*operands.values(), *observed.values(), *held)
        out = gm.graph.call_module(name, (query, key, value, bias, *tensors))
    _describe(node, out)
    return out


def _emit_observer(
    gm: fx.GraphModule, node: fx.Node, lowering: _Lowering, request: _Request, memory: _Memory | None
) -> fx.Node:
    """The output of the model's own call, after the site has seen its query and key."""
    plan: AttentionPlan = node.meta["plan"]
    original = node.meta["original"]
    held = _held_by(node, memory)
    if not shapes_of(plan) and not isinstance(plan.settings, LearningMethod):
        return original
    with gm.graph.inserting_before(node):
        query, key, _, bias, operands, observed = _inputs(gm.graph, node, lowering, request)
    if not shapes_of(plan) and not observed:
        return original
    name = f"sparsify_site{plan.site.index}"
    gm.add_submodule(name, Observer(plan, tuple(operands), observed=tuple(observed)))
    with gm.graph.inserting_after(original):
        out = gm.graph.call_module(name)
    original.replace_all_uses_with(out)
    out.args = (original, query, key, bias, *operands.values(), *observed.values(), *held)
    _describe(node, out)
    return out


def _held_by(node: fx.Node, memory: _Memory | None) -> list[fx.Node | None]:
    """The inputs through which a site remembers; none for a site that does not."""
    plan = node.meta["plan"]
    if memory is None or not isinstance(plan.settings, DynamicMethod):
        return []
    query = tensor_of(node.args[0])
    assert query is not None
    int(query.shape[0])  # memory has a batch: guard on it
    return memory.of(plan, query.device)


def _describe(node: fx.Node, *new: fx.Node) -> None:
    """Carry over where a call stands in the model, and what is done there; to the last node its output too."""
    for one in new:
        one.meta = {
            k: node.meta[k] for k in ("nn_module_stack", "stack_trace", "site", "plan") if k in node.meta
        }
    if "example_value" in node.meta:
        new[-1].meta["example_value"] = node.meta["example_value"]


def _key_bias(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """[B|1, H|1, Sk] additive bias from a mask that broadcasts to [B, H, Sq, Sk] and is constant along Sq."""
    value = tensor_of(mask)
    assert value is not None
    dims = value.dim()
    if dims >= 2:
        mask = graph.call_method("select", (mask, -2, 0))
    for _ in range(dims - 1 if dims >= 2 else 1, 3):
        mask = graph.call_method("unsqueeze", (mask, 0))
    if value.dtype == torch.bool:
        zeros = graph.call_function(torch.zeros_like, (mask,), {"dtype": torch.float32})
        return graph.call_method(
            "masked_fill", (zeros, graph.call_method("logical_not", (mask,)), -torch.inf)
        )
    # Kernels scale the bias, which must not make -inf of the least number: rows that see hidden keys alone weigh
    # them all the same. Half precision has no number as low as that.
    mask = graph.call_method("to", (mask, torch.promote_types(value.dtype, torch.float32)))
    finite = graph.call_method("clamp", (mask, _LEAST))
    return graph.call_function(torch.where, (graph.call_method("isneginf", (mask,)), mask, finite))
