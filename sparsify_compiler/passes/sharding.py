"""Share the tokens of a planned graph among ranks.

    before   tokens = patches(video)                         [B, S, C]
             out = attention(q, k, v, m, scale)              [B, H, S, D]
             video = unpatchify(linear(tokens))

    after    tokens = patches(video).narrow(1, first, s)     the tokens of this rank
             q, k, v = to_heads([q, k, v], owners)           [B, slots, S, D]: all tokens of the rank's heads
             out = attention(q, k, v, m, scale)              its site and plan have `slots` heads
             out = to_tokens([out], owners)                  [B, H, s, D]
             video = unpatchify(gather_tokens(linear(tokens)))

    or       k, v = fetch_keys([k, v], read, asked)          [B, H, S, D]: the keys that the rank's queries read
             out = attention(q, k, v, m, scale)              [B, H, s, D]: its site and plan have the rank's queries

The second form is that of sequences; a hybrid has `to_heads` and `to_tokens` around it, for the ranks of one host.

Two runs of the labels (`token_axis.py`) show where the tokens are. The first finds the sequences of the captured
sites. The second has one axis for the tokens, which begins at every value that first lies along such a sequence.
Then each node is decided in order. A node whose operators keep tokens apart works on the rank's tokens: its literal
sizes become local ones, and operands that every rank has are cut where they meet tokens (`localizing.py`). Any
other node gets its tokens gathered and runs on all ranks alike. All ranks decide the same, since each decision is
tried with the shapes of every rank. Tokens of text stay on all ranks.

Nothing here runs a collective; the ops are in `parallel/ops.py`.
"""

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from sparsify_compiler._torch import quiet_fakes
from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.parallel.ops import GATHER_TOKENS, TO_HEADS, TO_TOKENS
from sparsify_compiler.parallel.sequence import AFTER, FETCH_KEYS, asked_of, keys_read, of_key_heads
from sparsify_compiler.parallel.shares import (
    Owners,
    flat,
    pieces,
    share,
)
from sparsify_compiler.passes.axes import (
    Atom,
    Label,
    atoms,
    length,
)
from sparsify_compiler.passes.axis_rules import tensors_in
from sparsify_compiler.passes.capture import attention, attention_nodes
from sparsify_compiler.passes.following import Unknown, follow
from sparsify_compiler.passes.forms import SharedSite, share_site
from sparsify_compiler.passes.fx import (
    copy_graph,
    module_path,
    modules,
    node_of,
    run_call,
    strides_of,
    tensor_of,
    value_of,
    written_by,
)
from sparsify_compiler.passes.localizing import Localizer, Place, View
from sparsify_compiler.passes.meeting import implies
from sparsify_compiler.passes.regions import inline, outline
from sparsify_compiler.passes.strides import AUTOCAST
from sparsify_compiler.passes.token_axis import CannotShareError, TokenTracker, find_tokens
from sparsify_compiler.plan import AttentionPlan, AttentionSite, Balance, Ranks
from sparsify_compiler.runtime import site as _ops_of_sites  # noqa: F401

_NUMBER = re.compile(r"(?<![A-Za-z_])\d+")
"""A number in the path of a module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """The way in which ranks share a graph."""

    size: int
    """The number of ranks."""
    tokens: int = 0
    """The number of tokens that they share; 0 where every rank runs the whole graph."""
    sites: tuple[str, ...] = ()
    """Names of the attention calls that they share."""
    form: str = "hcp"
    """The form of the option `parallel`."""
    by_heads: tuple[tuple[str, str], ...] = ()
    """(attention call, the reason why ranks share its heads alone), in a form that shares sequences."""
    gathered: tuple[tuple[str, str], ...] = ()
    """(operator and its module, the reason why it runs on all tokens), in order."""
    reason: str = ""
    """The reason why every rank runs the whole graph; empty where they share it."""

    def __str__(self) -> str:
        if self.reason:
            return f"every one of {self.size} ranks runs the whole graph: {self.reason}"
        places = "; ".join(folded(self.gathered))
        heads = f"the heads of {len(self.sites)} attention calls"
        if self.form != "hcp":
            number, kept = len(self.by_heads), "; ".join(f"{name}: {why}" for name, why in self.by_heads)
            queries = f"the queries of {len(self.sites) - number} attention calls (form {self.form!r})"
            heads = f"{queries}, and the heads of {number} ({kept})" if number else queries
        return (
            f"{self.size} ranks share {self.tokens} tokens, and {heads}; "
            f"all tokens are gathered {len(self.gathered)} times ({places})"
        )


def folded(places: Iterable[tuple[str, str]]) -> list[str]:
    """`name: reason` of places. Those that differ in numbers alone are one: `view in blocks.*: ... (40 times)`."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, why in places:
        names.setdefault((_NUMBER.sub("*", name), why), []).append(name)
    return [
        f"{each[0] if len({*each}) == 1 else name}: {why}{f' ({len(each)} times)' if len(each) > 1 else ''}"
        for (name, why), each in names.items()
    ]


def shard(
    gm: fx.GraphModule,
    *,
    ranks: Ranks,
    balance: Balance = "off",
    measure_recall: float = 0.0,
    trains: bool = False,
) -> fx.GraphModule:
    """Share the tokens of a planned graph; see the module's picture. `meta["sharding"]` is then a `Sharding`.

    Args:
        ranks: the ranks, and the one that the graph is for.
        balance: when heads may move between ranks; the graph needs room for them.
        measure_recall: as in `lower`.
        trains: whether the graph runs in training.

    Raises:
        OptionError: the graph has something that ranks cannot share and must not repeat.
    """
    twin = copy_graph(gm)
    inline(twin)
    for module in modules(twin):
        if module is not twin and attention_nodes(module):
            raise OptionError(
                "parallel shares attention in checkpoints and nested compile regions, but in no other "
                f"higher-order operator, got {attention_nodes(module)[0].meta['site'].name!r} in one"
            )
    try:
        found = _Sharder(twin, ranks, balance, measures=measure_recall > 0, trains=trains).run()
    except CannotShareError as why:
        gm.meta["sharding"] = Sharding(size=ranks.size, reason=str(why))
        return gm
    outline(twin)
    twin.meta["sharding"] = found
    return twin


class _Sharder:
    """Rewrites one graph in place."""

    def __init__(
        self, gm: fx.GraphModule, ranks: Ranks, balance: Balance, *, measures: bool, trains: bool
    ) -> None:
        self.gm, self.graph, self.ranks, self.balance = gm, gm.graph, ranks, balance
        self.measures, self.trains = measures, trains
        for value in map(value_of, gm.graph.nodes):  # shares of tokens are numbers, so every size is fixed
            sizes = value.shape if isinstance(value, Tensor) else [value]
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    int(size)
        labels, first = find_tokens(gm)
        self.tokens = length(labels[0])
        if self.tokens < ranks.size:
            raise CannotShareError(f"{self.tokens} tokens are fewer than ranks")
        self.tracker = TokenTracker(self.tokens)
        self.starts: set[fx.Node] = set()
        """The nodes whose value first lies along the tokens."""
        self.mixing: dict[fx.Node, str] = {}
        self.pointwise: set[fx.Node] = set()
        self.whole: dict[fx.Node, Any] = {}
        """Node -> its value in one process."""

        def is_tokens(label: Label) -> bool:
            return (
                length(label) == self.tokens
                and not any(atom.blank for atom in atoms(label))
                and any(implies(known, label) for known in labels)
            )

        def see(node: fx.Node, value: Any) -> None:
            tracker, before = self.tracker, first.get(node)
            if isinstance(value, Tensor) and before is not None:
                now = tracker.of(value)
                if not any(map(tracker.has, now)):
                    dims = [dim for dim, label in enumerate(before) if is_tokens(label)]
                    if dims:
                        now[dims[0]] = (Atom(tracker.axis, 0, self.tokens),)
                        tracker.put(value, replace(tracker.known(value), labels=now))
                        self.starts.add(node)
            if tracker.draws:
                raise OptionError(
                    f"parallel needs a model that draws no random numbers for its tokens, got {_name_of(node)}: "
                    "every rank would draw others. Set dropout to 0"
                )
            if tracker.mixing:
                self.mixing[node] = tracker.mixing[0]
            if tracker.pointwise:
                self.pointwise.add(node)
            tracker.mixing, tracker.pointwise = [], True
            self.whole[node] = value

        follow(gm, tracker=self.tracker, see=see)
        self.local = Localizer(self.tracker, self.whole, self.pointwise, ranks.size)
        counts = {share(self.tokens, rank, ranks.size): rank for rank in (*range(ranks.size), ranks.rank)}
        self.views = [View(counts[count]) for count in sorted(counts)]
        """A rank for every number of tokens, this one among them."""
        self.here = next(view for view in self.views if view.rank == ranks.rank)
        self.written = {
            _memory(one)
            for node in gm.graph.nodes
            for to in written_by(node, node.args, node.kwargs)
            for one in tensors_in(self.whole.get(to) if isinstance(to, fx.Node) else None)
        }
        """Memory that some node writes to."""
        self.gathers: dict[fx.Node, fx.Node] = {}
        self.gathered: list[tuple[str, str]] = []
        self.sites: list[str] = []
        self.by_heads: list[tuple[str, str]] = []
        self.contexts: dict[fx.Node, Any] = {}
        self.order: fx.Node | None = None
        self.constants: dict[str, fx.Node] = {}
        self.reads: dict[Any, tuple[fx.Node, fx.Node]] = {}
        """Table -> the keys that this rank reads, and those that each rank reads of its tokens."""
        self.first = next(node for node in gm.graph.nodes if node.op != "placeholder")

    def run(self) -> Sharding:
        """Rewrite the graph."""
        shared = self._prepare()
        mode = next(
            one.fake_mode for one in tensors_in(list(self.whole.values())) if isinstance(one, FakeTensor)
        )
        with mode, torch.no_grad():
            for node in list(self.graph.nodes):
                if node in shared:
                    self._attention(node)
                elif node.target in AUTOCAST:
                    args = fx.node.map_arg(node.args, lambda one: self.contexts.get(one, one))
                    self.contexts[node] = run_call(node, args, {})
                elif node.op == "output":
                    self._gather_inputs(node, "the result of the model")
                else:
                    self._node(node)
        if not self.sites:
            raise CannotShareError("tokens reach no attention whose heads can be shared")
        return Sharding(
            size=self.ranks.size,
            tokens=self.tokens,
            sites=tuple(self.sites),
            form=self.ranks.form,
            by_heads=tuple(self.by_heads),
            gathered=tuple(self.gathered),
        )

    # Attention

    def _prepare(self) -> set[fx.Node]:
        """Find the sites whose heads ranks share, and remove the model's own calls there; the other dense sites
        become the model's own calls."""
        shared = set()
        for node in attention_nodes(self.gm):
            original, result = node.meta["original"], node.meta["result"]
            if self._shares_heads(node):
                shared.add(node)
                self._erase(original)
            elif node.meta["plan"].method == "dense":
                result.replace_all_uses_with(original)
                original.meta |= {key: node.meta[key] for key in ("site", "layout", "plan")}
                self._erase(result)
        return shared

    def _shares_heads(self, node: fx.Node) -> bool:
        """Whether query, key and value have all tokens in their sequence, in order, and in no other dimension, and
        the mask, if there is one, is the same for all queries."""
        if node.meta["site"].mask == "query":
            return False
        found = [self.local.place(self.whole[node_of(one)]) for one in node.args[:3]]
        return found[0] is not None and found[0][:2] == (2, 1) and found[0] == found[1] == found[2]

    def _attention(self, node: fx.Node) -> None:
        """Share the heads of a site, or its queries, or both; see the picture of the module."""
        site, operands = node.meta["site"], [*map(node_of, node.args[:3])]
        wholes = [self.whole[one] for one in operands]
        place = self.local.place(wholes[0])
        assert place is not None
        shared = share_site(
            node.meta["plan"],
            place[2],
            self.ranks,
            balance=self.balance,
            recall=self.measures,
            trains=self.trains,
        )
        plan = shared.plan
        self.sites.append(site.name)
        if shared.why_heads:
            self.by_heads.append((site.name, shared.why_heads))
        mask, scale = node.args[3:]
        recorded, users = tensor_of(node), list(node.users)
        owners: fx.Node | None = None
        with self.graph.inserting_before(node):
            given = [one if one in self.here.values else self._cut(one, place) for one in operands]
            if plan.sharing is not None:
                owners = node.meta["owners"] = self._owners(site, shared.owners)
            if isinstance(mask, fx.Node):
                mask = self._mask(mask, owners, plan)
            if owners is not None:
                given = self._to_heads(shared, owners, given)
            read = given if plan.sequence is None else self._with_fetched_keys(plan, given, node)
        self._note_shapes(shared, read, wholes)
        shape = site.batch, plan.site.heads, shared.queries, site.value_dim
        attended = _lies_by_tokens(wholes[0], shape, getattr(torch, site.dtype))
        asks = "order" in node.meta
        with self.graph.inserting_before(node.next):
            call = self._dense_attention(shared, read, mask, owners, scale, attended)
            call.meta |= {
                key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta
            }
            call.meta["example_value"] = node.meta["example_value"] = attended
            node.meta |= {"site": plan.site, "plan": plan, "original": call, "result": node}
            node.args = (*(given if asks else read), mask, scale)
            if asks:
                self.order = self.graph.call_function(AFTER, (node.meta["order"], [node]))
            out = node if owners is None else self._to_tokens(shared, owners, node)
            for view in self.views:
                shape = site.batch, site.heads, self.local.shape(wholes[0], view.rank)[2], site.value_dim
                view.values[out] = _lies_by_tokens(wholes[0], shape, attended.dtype)
            if recorded is not None:
                out = self._laid_as(out, recorded)
        if out is not node:
            self._take_over(node, out, users)

    def _to_heads(self, shared: SharedSite, owners: fx.Node, tensors: Sequence[fx.Node]) -> list[fx.Node]:
        """Query, key and value of the rank's heads, with all tokens of the ranks that share heads."""
        site, sharing = shared.plan.site, shared.plan.sharing
        assert sharing is not None
        others = (owners, flat(shared.rows), site.heads, False, *sharing.ranks.fields, site.name)
        return self._communicate(TO_HEADS, tensors, others)

    def _to_tokens(self, shared: SharedSite, owners: fx.Node, out: fx.Node) -> fx.Node:
        """The output of a site, with all heads of the rank's tokens."""
        sharing = shared.plan.sharing
        assert sharing is not None
        place = *sharing.ranks.fields, shared.plan.site.name
        others = (owners, flat(shared.rows), [sharing.heads], True, *place)
        return self._communicate(TO_TOKENS, [out], others)[0]

    def _note_shapes(self, shared: SharedSite, read: Sequence[fx.Node], wholes: Sequence[Tensor]) -> None:
        """Give query, key and value of the dense call of a site an example."""
        heads, kv_heads = shared.plan.site.heads, shared.plan.site.kv_heads
        sizes = (heads, shared.queries), (kv_heads, shared.keys), (kv_heads, shared.keys)
        for one, (count, size), whole in zip(read, sizes, wholes, strict=True):
            value = self.here.values.get(one)
            if value is None:
                value = whole.new_empty(whole.shape[0], count, size, whole.shape[3])
            one.meta["example_value"] = value

    def _with_fetched_keys(
        self, plan: AttentionPlan, tensors: Sequence[fx.Node], node: fx.Node
    ) -> list[fx.Node]:
        """Query, and the keys and values that its rows of the table read; all of them for a site that asks itself,
        which needs the order of `node.meta`."""
        shared = plan.sequence
        assert shared is not None
        static = plan.settings if isinstance(plan.settings, StaticMethod) and not shared.asks else None
        known = static, plan.layout, shared
        if known not in self.reads:
            with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
                read = keys_read(None if static is None else static.table(plan.layout), shared)
                read = [of_key_heads(one, plan.site.kv_heads) for one in read]
                name = f"sparsify_{{}}{len(self.reads)}".format
                self.reads[known] = (
                    self._constant(name("read"), read[shared.ranks.rank].contiguous()),
                    self._constant(name("asked"), asked_of(read, shared).contiguous()),
                )
        query, *keys = tensors
        place = *shared.ranks.fields, plan.site.name
        others = (*self.reads[known], list(shared.parts), shared.each, *place)
        if not shared.asks:
            return [query, *self._communicate(FETCH_KEYS, keys, others)]
        # The dense variant has these; the sparse variant erases them.
        node.meta["order"] = self._first_order()
        fetch = self.graph.call_function(FETCH_KEYS, ([*keys, node.meta["order"]], *others))
        fetched = [self.graph.call_function(operator.getitem, (fetch, i)) for i in range(2)]
        for one in (fetch, *fetched):
            one.meta["inserted"] = True
        return [query, *fetched]

    def _dense_attention(
        self,
        shared: SharedSite,
        tensors: Sequence[fx.Node],
        mask: Any,
        owners: fx.Node | None,
        scale: Any,
        attended: Tensor,
    ) -> fx.Node:
        """The dense attention of a site, which lies in memory as `attended`."""
        sharing = shared.plan.sharing
        if shared.moves and sharing is not None:
            others = mask, owners, sharing.ranks.rank, scale
            return self.graph.call_function(torch.ops.sparsify.attend_owned.default, (*tensors, *others))
        options: dict[str, Any] = {"attn_mask": mask, "scale": scale}
        query, key, value = (one.meta["example_value"].to(attended.dtype) for one in tensors)
        if query.shape[1] != key.shape[1]:
            options["enable_gqa"] = True
        call = self.graph.call_function(F.scaled_dot_product_attention, tuple(tensors), options)
        if isinstance(mask, fx.Node):
            bias = mask.meta["example_value"]
            options["attn_mask"] = bias if bias.dtype == torch.bool else bias.to(attended.dtype)
        with quiet_fakes():
            found = F.scaled_dot_product_attention(query, key, value, **options)
        if found.stride() == attended.stride():
            return call
        call.meta["inserted"] = True
        return self.graph.call_function(torch.ops.sparsify.lay_out.default, (call, attended.stride()))

    def _owners(self, site: AttentionSite, owners: Owners) -> fx.Node:
        """The owners of the heads of a site, in the graph."""
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
            return self._constant(f"sparsify_owners{site.index}", torch.tensor(owners))

    def _mask(self, mask: fx.Node, owners: fx.Node | None, plan: AttentionPlan) -> fx.Node:
        """The mask of a site, which is constant along queries, for one query and this rank's heads."""
        value, slots, sharing = self.whole[mask], plan.site.heads, plan.sharing
        new = self._gathered(mask, "it is the mask of an attention")
        if value.dim() > 1:
            new, value = self.graph.call_method("narrow", (new, -2, 0, 1)), value.narrow(-2, 0, 1)
        if sharing is not None and value.dim() > 2 and value.shape[-3] > 1:
            op = torch.ops.sparsify.heads_in_slots.default
            places = self.graph.call_function(op, (owners, sharing.ranks.rank, slots))
            places = self.graph.call_method("to", (places, value.device))
            new = self.graph.call_method("index_select", (new, -3, places))
            value = value.narrow(-3, 0, 1).expand(*value.shape[:-3], slots, -1, -1)
        new.meta["example_value"] = value
        return new

    def _laid_as(self, out: fx.Node, recorded: Tensor) -> fx.Node:
        """The output of a site, with dimensions in the order in memory that Dynamo recorded."""
        strides = strides_of(recorded)
        local = {view.rank: view.values[out] for view in self.views}
        if strides is None or all(_in_order(x.shape, strides) == x.stride() for x in local.values()):
            return out
        wanted = _in_order(local[self.ranks.rank].shape, strides)
        laid = self.graph.call_function(torch.ops.sparsify.lay_out.default, (out, wanted))
        for view in self.views:
            x = local[view.rank]
            view.values[laid] = x.new_empty_strided(x.shape, _in_order(x.shape, strides))
        return laid

    # Other nodes

    def _node(self, node: fx.Node) -> None:
        """Decide one node: on this rank's tokens, or on all of them."""
        whole = self.whole.get(node)
        if isinstance(whole, (int, torch.SymInt)):
            self._replace_by_numbers(node, int(whole) if isinstance(whole, torch.SymInt) else whole)
            return
        shared = [one for one in node.all_input_nodes if one in self.here.values]
        tensors = tensors_in(whole)
        into = [one for of in node.all_input_nodes for one in tensors_in(self.whole.get(of))]
        if not into and node.op != "placeholder" and node not in self.starts:
            shared += [
                node for one in tensors if self.local.has_tokens(one)
            ]  # tokens are written to it later
        if not shared:
            self._begin(node)
            return
        if not tensors and whole is not None and all(isinstance(x, (int, float)) for x in tree_leaves(whole)):
            self._replace_by_numbers(node, whole)
            return
        why = self._refusal(node, whole, tensors) or self._run_here(node, whole)
        if why:
            self._gather_inputs(node, why)
            self._begin(node)

    def _refusal(self, node: fx.Node, whole: Any, tensors: Sequence[Tensor]) -> str:
        """The reason why a node needs all tokens, as far as labels show it; else empty."""
        if node in self.mixing:
            return f"{self.mixing[node]} mixes tokens"
        if (
            node.op not in ("call_function", "call_method")
            or node.target is attention
            or isinstance(node.target, torch._ops.HigherOrderOperator)
        ):
            return "an attention or a body that is not shared"
        if any(isinstance(one, Unknown) for one in tree_leaves(whole)):
            return "its result could not be followed"
        if any(self.local.has_tokens(one) and self.local.place(one) is None for one in tensors):
            return "its result has only some tokens, or tokens in another order"
        return ""

    def _run_here(self, node: fx.Node, whole: Any) -> str:
        """Let a node work on this rank's tokens if every rank can; else the reason."""
        try:
            cuts = self.local.cuts(node, whole, self.here.values)
            tried = [self.local.run(node, whole, cuts, view) for view in self.views]
        except LookupError as why:
            return str(why.args[0])
        args, kwargs, _ = tried[self.views.index(self.here)]
        with self.graph.inserting_before(node):
            new = {one: self._cut(one, place) for one, place in cuts.items()}
        node.args, node.kwargs = fx.node.map_arg((args, kwargs), lambda one: new.get(one, one))
        if written_by(node, node.args, node.kwargs):
            self.gathers.clear()
        if any(map(self.local.has_tokens, tensors_in(whole))):
            for view, (_, _, result) in zip(self.views, tried, strict=True):
                view.values[node] = result
            node.meta["example_value"] = self.here.values[node]
        return ""

    # Nodes

    def _cut(self, node: fx.Node, place: Place) -> fx.Node:
        """A new node, at the current place, for this rank's share of a node of all tokens."""
        dim, repeats, parts = place
        at, x = dim + (repeats > 1), node
        if repeats > 1:
            x = self.graph.call_method("unflatten", (x, dim, (repeats, -1)))
        runs = [one.whole for one in pieces(parts, self.ranks.rank, self.ranks.size)]
        cut = [self.graph.call_method("narrow", (x, at, run.start, run.stop - run.start)) for run in runs]
        new = self.graph.call_function(torch.cat, (cut, at)) if len(cut) > 1 else cut[0]
        if repeats > 1:
            new = self.graph.call_method("flatten", (new, dim, at))
        for view in self.views:
            view.values[new] = self.local.share_of(self.whole[node], place, view.rank)
        return new

    def _begin(self, node: fx.Node) -> None:
        """Cut the result of a node that runs on all tokens, if it has them: its users get this rank's share."""
        whole, users = self.whole.get(node), list(node.users)
        place = self.local.place(whole) if isinstance(whole, Tensor) else None
        if place is None or not users or _memory(tensors_in(whole)[0]) in self.written:
            return
        with self.graph.inserting_before(self.first if node.op == "placeholder" else node.next):
            new = self._cut(node, place)
        self._take_over(node, new, users)

    def _take_over(self, node: fx.Node, new: fx.Node, users: Iterable[fx.Node]) -> None:
        """Give users of a node another one, which has this rank's share of its value."""
        self.whole[new] = self.whole[node]
        new.meta["example_value"] = self.here.values[new]
        for user in users:
            user.replace_input_with(node, new)

    def _gather_inputs(self, node: fx.Node, why: str) -> None:
        """Let a node run on all tokens."""
        shared = [one for one in node.all_input_nodes if one in self.here.values]
        if any(one in shared for one in written_by(node, node.args, node.kwargs)):
            raise CannotShareError(f"{_name_of(node)} writes to tokens, and {why}")
        with self.graph.inserting_before(node):
            for one in shared:
                node.replace_input_with(one, self._gathered(one, why, node))

    def _gathered(self, node: fx.Node, why: str, user: fx.Node | None = None) -> fx.Node:
        """A node for all tokens of a node; the node itself if it has all."""
        if node not in self.here.values:
            return node
        if node in self.gathers:
            return self.gathers[node]
        whole, ranks = self.whole[node], self.ranks
        place = self.local.place(whole) if isinstance(whole, Tensor) else None
        if place is None:
            raise CannotShareError(
                f"{_name_of(user or node)} needs all tokens, which cannot be gathered: {why}"
            )
        dim, repeats, parts = place
        x, at = node, dim + (repeats > 1)
        if repeats > 1:
            x = self.graph.call_method("unflatten", (x, dim, (repeats, -1)))
        place_of_rank = *ranks.fields, _name_of(user or node)
        (new,) = self._communicate(GATHER_TOKENS, [x], (at, flat(parts), *place_of_rank))
        if repeats > 1:
            new = self.graph.call_method("flatten", (new, dim, at))
        self.whole[new] = whole
        new.meta["example_value"] = whole
        self.gathers[node] = new
        self.gathered.append((_name_of(user or node), why))
        return new

    def _communicate(self, op: Any, tensors: Sequence[fx.Node], others: tuple[Any, ...]) -> list[fx.Node]:
        """The results of an op in which ranks take part, after the op before it."""
        call = self.graph.call_function(op, ([*tensors, self._first_order()], *others))
        *results, self.order = (
            self.graph.call_function(operator.getitem, (call, i)) for i in range(len(tensors) + 1)
        )
        return results

    def _first_order(self) -> fx.Node:
        """The order that the next op gets."""
        if self.order is None:
            with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
                self.order = self._constant("sparsify_order", torch.zeros((), dtype=torch.float32))
        return self.order

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        """A constant of the graph, before all other nodes."""
        if name not in self.constants:
            self.gm.register_buffer(name, value, persistent=False)
            with self.graph.inserting_before(self.first):
                self.constants[name] = self.graph.get_attr(name)
        return self.constants[name]

    def _replace_by_numbers(self, node: fx.Node, whole: Any) -> None:
        """Give users of a node the numbers that it has in one process."""
        for user in list(node.users):
            user.args, user.kwargs = fx.node.map_arg(
                (user.args, user.kwargs), lambda one: whole if one is node else one
            )
        if node.op != "placeholder":
            self.graph.erase_node(node)

    def _erase(self, node: fx.Node) -> None:
        """Erase a node that no other reads, and nodes that only it reads, as far as they only compute."""
        if node.users or node.op == "placeholder" or written_by(node, node.args, node.kwargs):
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        for source in sources:
            self._erase(source)


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _lies_by_tokens(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised [B, H, S, D] with the memory of [B, S, H, D]."""
    batch, heads, tokens, dim = shape
    return like.new_empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def _in_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor whose dimensions lie in memory in the order of other strides."""
    found, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (strides[dim], -dim)):
        found[dim] = step
        step *= max(shape[dim], 1)
    return tuple(found)


def _name_of(node: fx.Node) -> str:
    """An operator and the module that it was traced in."""
    target = (
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    )
    path = module_path(node)
    return f"{target} in {path}" if path else target
