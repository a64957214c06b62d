"""Turn plans into ops.

    before   out = attention(q, k, v, m, scale)            meta["plan"]

    ranks    owners = placeholder                          in place of a constant, where heads move

    sparse   constants = get_attr(...)                     tables and other tensors, a set for each distinct plan
    variant  bias = where(m, 0, -inf)
             out = TableSite(q, k, v, bias, *constants)    a table and one op
        or   out = SparseSite(q, k, v, bias, *tensors)     its tensors, ordered by `runtime/site_inputs.py`
             out = lay_out(out, strides)                   where a node needs those that Dynamo recorded

    dense    out = scaled_dot_product_attention(q, k, v, ...)         the model's own call
    variant  out = Observer(out, q, k, bias, *tensors)     where a method learns from dense steps

A site with a dense plan gets the model's own call back, and so does one that the guard runs dense. Tensors that
trainers write and sites keep are new inputs of the graph, which `meta["extra"]` describes. Constants and trained
tensors reach the bodies of higher-order operators as extra operands. A site there keeps no state, since a body may
run again (in backward) and must then read the same tensors; its choices are kept for the second run.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify_compiler import _torch
from sparsify_compiler.methods import DynamicMethod, LearningMethod, constants_of
from sparsify_compiler.parallel.ops import GATHER_TOKENS, TO_HEADS, TO_TOKENS
from sparsify_compiler.parallel.sequence import queries_of
from sparsify_compiler.passes.capture import attention_nodes
from sparsify_compiler.passes.fx import bodies, node_of, recorded
from sparsify_compiler.passes.planning import learns
from sparsify_compiler.passes.strides import lay_out, strides_to_restore
from sparsify_compiler.plan import AttentionPlan, AttentionSite
from sparsify_compiler.runtime.program import Variant
from sparsify_compiler.runtime.site import Observer, SparseSite, TableSite, is_table_alone, settled
from sparsify_compiler.runtime.site_inputs import (
    InputBuilder,
    SiteInputs,
    add_placeholder,
    state_shapes,
    trained_tensors,
)
from sparsify_compiler.runtime.state import Trained
from sparsify_compiler.table import BlockTable

_LEAST = -1e30
"""Lowest finite bias: large enough to swamp any score that it is added to."""

_CHOICES = tuple(
    getattr(torch.ops.sparsify, name).default
    for name in ("kmeans", "cluster", "sort_by_label", "top_p_blocks", "top_k_keys", "learn_site")
)
"""Ops that decide which keys a site reads, and the op that learns from them."""
_EXCHANGES = (TO_HEADS, TO_TOKENS, GATHER_TOKENS)
"""Ops in which ranks take part: none of them runs again while others are in backward."""

_Request = Callable[[str, Tensor | Trained], fx.Node]
"""(name, source) -> the node of a constant or trained tensor in the current graph."""


def lower(
    gm: fx.GraphModule, *, variant: Variant | None = None, measure_recall: float = 0.0
) -> fx.GraphModule:
    """Replace every `attention` node according to its plan; see the module's picture.

    Args:
        variant: the variant to make; by default the sparse one of inference.
        measure_recall: share of the queries on which the true attention mass kept is measured.
    """
    variant = variant or Variant()
    first = next(iter(gm.graph.nodes))
    inputs = InputBuilder(gm.graph, warm=variant.warm)

    def operand(name: str, source: Tensor | Trained) -> fx.Node:
        if isinstance(source, Trained):
            return inputs.trained(name, source)
        gm.register_buffer(name, source, persistent=False)
        with gm.graph.inserting_before(first):
            return gm.graph.get_attr(name)

    if not variant.trains:
        _give_owners(gm, inputs)
    lowering = _Lowering(variant, measure_recall)
    _lower_module(gm, lowering, operand, None if variant.trains else inputs)
    gm.meta["extra"], gm.meta["variant"] = inputs.built(), variant
    return gm


def _give_owners(gm: fx.GraphModule, inputs: InputBuilder) -> None:
    """Make the owners of heads inputs of the graph where heads move between ranks."""
    for node in attention_nodes(gm):
        plan = node.meta["plan"]
        if plan.sharing is not None and plan.sharing.balance != "off":
            constant, node.meta["owners"] = node.meta["owners"], inputs.owners(plan)
            constant.replace_all_uses_with(node.meta["owners"])
            gm.graph.erase_node(constant)


def _is_sparse(node: fx.Node) -> bool:
    return node.meta["plan"].method != "dense"


class _Lowering:
    """The common part of all modules of one lowering: the variant, and distinct constants, each built once."""

    def __init__(self, variant: Variant, measure_recall: float) -> None:
        self.variant, self.measure_recall = variant, measure_recall
        self.choices = dict(variant.choices)
        self._known: dict[Any, tuple[str, dict[str, Tensor | None]]] = {}

    def constants(self, plan: AttentionPlan, device: torch.device) -> dict[str, tuple[str, Tensor | None]]:
        """Field -> (name that is unique in the graph, tensor), in the order of the method's fields."""
        method, layout = settled(plan, self.choices.get(plan.site.name)), plan.layout
        key = layout, method, plan.sequence, device
        if key not in self._known:
            # On real tensors, also where the compiler has set a fake or device mode.
            with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
                built = constants_of(method, layout)
                if plan.sequence is not None and not plan.sequence.asks:
                    places = queries_of(plan.sequence, plan.sequence.ranks.rank)
                    built = BlockTable.of(*built.values()).of_queries(places).tensors()
                moved = {field: None if t is None else t.to(device) for field, t in built.items()}
            self._known[key] = f"sparsify_{plan.method}{len(self._known)}", moved
        name, tensors = self._known[key]
        return {field: (f"{name}_{field}", tensor) for field, tensor in tensors.items()}


def _lower_module(
    gm: fx.GraphModule, lowering: _Lowering, operand: _Request, kept: InputBuilder | None
) -> list[tuple[str, Tensor | Trained]]:
    """Lower one graph and its bodies; return the operands that they request.

    Args:
        operand: gives a constant or trained tensor.
        kept: gives the state of a site; None where sites keep none.
    """
    nodes: dict[str, fx.Node] = {}
    asked: list[tuple[str, Tensor | Trained]] = []

    def request(name: str, source: Tensor | Trained) -> fx.Node:
        if name not in nodes:
            nodes[name] = operand(name, source)
            asked.append((name, source))
        return nodes[name]

    dense = lowering.variant.phase == "dense"
    restored = {} if dense else strides_to_restore(gm)
    for node in attention_nodes(gm):
        original, result, plan = node.meta["original"], node.meta["result"], node.meta["plan"]
        guarded = plan.site.name in lowering.variant.guarded
        if not _is_sparse(node) or dense or guarded:
            out = original
            if _is_sparse(node) and (kept is not None or learns(plan)):
                out = _emit_observer(gm, node, lowering, request, kept)
            result.replace_all_uses_with(out)
            _erase_inserted(gm.graph, result)
        else:
            out = _with_other_rows(gm.graph, node, _emit_site(gm, node, lowering, request, kept))
            node.replace_all_uses_with(out)
            gm.graph.erase_node(node)
            if (strides := restored.get(node)) is not None:
                lay_out(out if result is node else result, strides)
            if plan.site.spelling != "unfused":  # the inner backend drops the rest of attention by hand
                outputs = original.all_input_nodes if plan.site.spelling == "flex" else []
                for one in (original, *outputs):  # FlexAttention has several outputs
                    sources = one.all_input_nodes
                    gm.graph.erase_node(one)
                    for source in sources:
                        _erase_inserted(gm.graph, source)
    lowered: dict[int, list[tuple[str, Tensor | Trained]]] = {}
    for body in list(bodies(gm)):
        module = body.module
        if id(module) not in lowered:
            lowered[id(module)] = _lower_module(
                module, lowering, partial(_add_placeholder_for, module.graph), None
            )
            chooses = any(isinstance(part, (SparseSite, Observer)) for part in module.modules())
            if chooses or any(one.target in _EXCHANGES for one in module.graph.nodes):
                _torch.keep_results(module, (*_CHOICES, *_EXCHANGES))
        body.call.args = (*body.call.args, *(request(*table) for table in lowered[id(module)]))
    return asked


def _erase_inserted(graph: fx.Graph, node: fx.Node) -> None:
    """Erase nodes that capture inserted for `node`, as far as no node reads them any more.

    Dead-code elimination would erase too much: a Dynamo graph mutates tensors by calls whose value no node reads.
    """
    if node.meta.get("inserted") and not node.users:
        sources = node.all_input_nodes
        graph.erase_node(node)
        for source in sources:
            _erase_inserted(graph, source)


def _add_placeholder_for(graph: fx.Graph, name: str, source: Tensor | Trained) -> fx.Node:
    """A new last operand of a body, for a tensor that its caller passes."""
    return add_placeholder(graph, name)


def _operands(
    gm: fx.GraphModule,
    node: fx.Node,
    lowering: _Lowering,
    request: _Request,
    state: list[fx.Node | None],
) -> tuple[SiteInputs, fx.Node | None, list[fx.Node | None]]:
    """(names of the tensors of a site, its bias, the tensors) of an `attention` node."""
    query, _, _, mask, _ = node.args
    plan, device = node.meta["plan"], recorded(query).device
    with gm.graph.inserting_before(node):
        bias = None if mask is None else _key_bias(gm.graph, node_of(mask), _row_of(plan))
        constants = {
            field: None if tensor is None else request(name, tensor)
            for field, (name, tensor) in lowering.constants(plan, device).items()
        }
        trained, observed = (
            {field: request(f"sparsify_{field}_{_identifier(one.name)}", one) for field, one in found.items()}
            for found in trained_tensors(plan, device, trains=lowering.variant.trains)
        )
    owners = [node.meta["owners"]] if plan.sharing is not None and not is_table_alone(plan) else []
    orders = [node.meta["order"]] if plan.sequence is not None and not is_table_alone(plan) else []
    names = SiteInputs(
        owners=bool(owners),
        order=bool(orders),
        constants=tuple(constants),
        trained=tuple(trained),
        observed=tuple(observed),
        state=tuple(state_shapes(plan)) if state else (),
        remembers=bool(state),
        warm=lowering.variant.warm,
    )
    return names, bias, [*owners, *orders, *constants.values(), *trained.values(), *observed.values(), *state]


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _emit_site(
    gm: fx.GraphModule, node: fx.Node, lowering: _Lowering, request: _Request, kept: InputBuilder | None
) -> fx.Node:
    plan: AttentionPlan = node.meta["plan"]
    inputs, bias, tensors = _operands(gm, node, lowering, request, _kept_by(node, kept))
    site: nn.Module = TableSite(plan)
    if not is_table_alone(plan):
        site = SparseSite(
            plan,
            inputs,
            choice=lowering.choices.get(plan.site.name),
            sampled_rows=round(lowering.measure_recall * plan.site.q_tokens) if inputs.remembers else 0,
        )
    name = f"sparsify_site{plan.site.index}"
    gm.add_submodule(name, site)
    with gm.graph.inserting_before(node):
        out = gm.graph.call_module(name, (*node.args[:3], bias, *tensors))
    _describe(node, out)
    return out


def _with_other_rows(graph: fx.Graph, node: fx.Node, out: fx.Node) -> fx.Node:
    """The output of a site, where queries outside the video have masks of their own: these attend densely."""
    plan: AttentionPlan = node.meta["plan"]
    layout = plan.layout
    if plan.site.mask != "query":
        return out
    with graph.inserting_before(node):
        for start, stop in ((0, layout.before), (layout.tokens - layout.after, layout.tokens)):
            if start == stop:
                continue
            query, mask = (
                graph.call_method("narrow", (node_of(one), -2, start, stop - start))
                for one in (node.args[0], node.args[3])
            )
            rows = _dense(graph, plan.site, (query, *map(node_of, node.args[1:3]), mask))
            out = graph.call_function(torch.slice_scatter, (out, rows, 2, start, stop))
            _describe(node, out)
    return out


def _dense(graph: fx.Graph, site: AttentionSite, operands: Sequence[fx.Node]) -> fx.Node:
    """Attention to all keys, as the model spells it: SDPA differs where a query sees no key at all."""
    groups = site.heads // site.kv_heads
    if site.spelling != "unfused":
        options: dict[str, Any] = {"scale": site.scale, "enable_gqa": groups > 1}
        return graph.call_function(F.scaled_dot_product_attention, tuple(operands), options)
    is_bool = recorded(node_of(operands[3].args[0])).dtype == torch.bool
    query, key, value = (graph.call_method("float", (one,)) for one in operands[:3])
    if groups > 1:
        key, value = (graph.call_method("repeat_interleave", (one, groups, 1)) for one in (key, value))
    scores = graph.call_function(torch.matmul, (query, graph.call_method("transpose", (key, -1, -2))))
    scores = graph.call_method("mul", (scores, site.scale))
    if is_bool:
        hidden = graph.call_method("logical_not", (operands[3],))
        scores = graph.call_method("masked_fill", (scores, hidden, -torch.inf))
    else:
        scores = graph.call_method("add", (scores, operands[3]))
    weights = graph.call_method("softmax", (scores, -1))
    product = graph.call_function(torch.matmul, (weights, value))
    return graph.call_method("to", (product, getattr(torch, site.dtype)))


def _emit_observer(
    gm: fx.GraphModule, node: fx.Node, lowering: _Lowering, request: _Request, kept: InputBuilder | None
) -> fx.Node:
    """The output of the model's own call, after an observer of its query and key if the site needs one.

    A site that the guard runs dense needs none: it runs dense for the rest of the video too.
    """
    plan: AttentionPlan = node.meta["plan"]
    original = node.meta["original"]
    state = _kept_by(node, kept)  # all variants of a program have the same inputs
    guarded = plan.site.name in lowering.variant.guarded
    if (guarded or not state_shapes(plan)) and not isinstance(plan.settings, LearningMethod):
        return original
    inputs, bias, tensors = _operands(gm, node, lowering, request, state)
    if guarded or (not inputs.state and not inputs.observed):
        return original
    name = f"sparsify_site{plan.site.index}"
    gm.add_submodule(name, Observer(plan, inputs))
    with gm.graph.inserting_after(original):
        out = gm.graph.call_module(name)
    original.replace_all_uses_with(out)
    out.args = (original, *node.args[:2], bias, *tensors)
    _describe(node, out)
    return out


def _kept_by(node: fx.Node, kept: InputBuilder | None) -> list[fx.Node | None]:
    """The inputs through which a site keeps its state; none for a site without state."""
    plan = node.meta["plan"]
    if kept is None or not isinstance(plan.settings, DynamicMethod):
        return []
    query = recorded(node.args[0])
    int(query.shape[0])  # state has a batch: guard on it
    return kept.kept(plan, query.device)


def _describe(node: fx.Node, *new: fx.Node) -> None:
    """Give new nodes the place of a call in the model, its site and its plan; give the last one its output too."""
    for one in new:
        one.meta = {
            k: node.meta[k] for k in ("nn_module_stack", "stack_trace", "site", "plan") if k in node.meta
        }
    if "example_value" in node.meta:
        new[-1].meta["example_value"] = node.meta["example_value"]


def _row_of(plan: AttentionPlan) -> int:
    """A query whose row of the mask holds for all queries of the video."""
    return plan.layout.before if plan.site.mask == "query" else 0


def _key_bias(graph: fx.Graph, mask: fx.Node, row: int) -> fx.Node:
    """[B|1, H|1, Sk] additive bias: a row of a mask that broadcasts to [B, H, Sq, Sk]."""
    value = recorded(mask)
    dims = value.dim()
    if dims >= 2:
        mask = graph.call_method("select", (mask, -2, row))
    for _ in range(dims - 1 if dims >= 2 else 1, 3):
        mask = graph.call_method("unsqueeze", (mask, 0))
    if value.dtype == torch.bool:
        zeros = graph.call_function(torch.zeros_like, (mask,), {"dtype": torch.float32})
        return graph.call_method(
            "masked_fill", (zeros, graph.call_method("logical_not", (mask,)), -torch.inf)
        )
    # Kernels scale the bias, which must not turn the least number into -inf: a row that sees only hidden keys gives
    # all of them the same weight. Half precision has no number that low.
    mask = graph.call_method("to", (mask, torch.promote_types(value.dtype, torch.float32)))
    finite = graph.call_method("clamp", (mask, _LEAST))
    return graph.call_function(torch.where, (graph.call_method("isneginf", (mask,)), mask, finite))
