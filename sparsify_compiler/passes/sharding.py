"""Share the tokens of a planned graph among ranks.

    before   tokens = patches(video)                         [B, S, C]
             out = attention(q, k, v, m, scale)              [B, H, S, D]
             video = unpatchify(linear(tokens))

    after    tokens = patches(video).narrow(1, first, s)     the tokens of this rank
             q, k, v = to_heads([q, k, v], owners)           [B, slots, S, D]: all tokens of the rank's heads
             out = attention(q, k, v, m, scale)              its site and plan have `slots` heads
             out = to_tokens([out], owners)                  [B, H, s, D]
             video = unpatchify(gather_tokens(linear(tokens)))

Two runs of the labels (`token_axis.py`) show where the tokens are. The first finds the sequences of the captured
sites. The second has one axis for the tokens, which begins at every value that first lies along such a sequence.
Then each node is decided in order. A node whose operators keep tokens apart works on the rank's tokens: its literal
sizes become local ones, and operands that every rank has are cut where they meet tokens. Any other node gets its
tokens gathered and runs on all ranks alike. All ranks decide the same, since each decision is tried with the shapes
of every rank. Tokens of text stay on all ranks.

Nothing here runs a collective; the ops are in `parallel/ops.py`.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from sparsify_compiler._torch import quiet_fakes
from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods import DynamicMethod, LearningMethod, StaticMethod
from sparsify_compiler.parallel.balance import balanced, capacity
from sparsify_compiler.parallel.ops import GATHER_TOKENS, TO_HEADS, TO_TOKENS
from sparsify_compiler.parallel.shares import (
    Owners,
    Part,
    even_owners,
    flat,
    heads_of,
    local_length,
    pieces,
    share,
)
from sparsify_compiler.passes.axes import (
    Atom,
    Label,
    atoms,
    length,
)
from sparsify_compiler.passes.capture import attention, attention_nodes
from sparsify_compiler.passes.following import Unknown, follow
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
from sparsify_compiler.passes.meeting import implies
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.passes.strides import AUTOCAST
from sparsify_compiler.passes.token_axis import CannotShareError, TokenTracker, find_tokens
from sparsify_compiler.plan import AttentionPlan, AttentionSite, Balance, Ranks, SharedHeads
from sparsify_compiler.runtime import site as _ops_of_sites  # noqa: F401


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """The way in which ranks share a graph."""

    size: int
    """The number of ranks."""
    tokens: int = 0
    """The number of tokens that they share; 0 where every rank runs the whole graph."""
    sites: tuple[str, ...] = ()
    """Names of the attention calls whose heads they share."""
    gathered: tuple[tuple[str, str], ...] = ()
    """(operator and its module, the reason why it runs on all tokens), in order."""
    reason: str = ""
    """The reason why every rank runs the whole graph; empty where they share it."""

    def __str__(self) -> str:
        if self.reason:
            return f"every one of {self.size} ranks runs the whole graph: {self.reason}"
        places = "; ".join(f"{name}: {why}" for name, why in self.gathered)
        return (
            f"{self.size} ranks share {self.tokens} tokens, and the heads of {len(self.sites)} attention calls; "
            f"all tokens are gathered {len(self.gathered)} times ({places})"
        )


def shard(gm: fx.GraphModule, *, ranks: Ranks, balance: Balance = "off") -> fx.GraphModule:
    """Share the tokens of a planned graph; see the module's picture. `meta["sharding"]` is then a `Sharding`.

    Args:
        ranks: the ranks, and the one that the graph is for.
        balance: when heads may move between ranks; the graph needs room for them.

    Raises:
        OptionError: the graph has something that ranks cannot share and must not repeat.
    """
    for module in modules(gm):
        if module is not gm and attention_nodes(module):
            raise OptionError(
                "parallel needs attention outside of higher-order operators: turn activation checkpointing and "
                "nested compile regions off"
            )
    if trained := [one.site.name for one in graph_plan(gm) if isinstance(one.settings, LearningMethod)]:
        raise OptionError(
            f"parallel does not share the predictors of method 'dsv' yet, which {trained[0]!r} has"
        )
    twin = copy_graph(gm)
    try:
        found = _Sharder(twin, ranks, balance).run()
    except CannotShareError as why:
        gm.meta["sharding"] = Sharding(size=ranks.size, reason=str(why))
        return gm
    twin.meta["sharding"] = found
    return twin


@dataclass(slots=True)
class _View:
    """One rank's side of the graph: the local values of nodes that have tokens."""

    rank: int
    values: dict[fx.Node, Any] = field(default_factory=dict)


class _Sharder:
    """Rewrites one graph in place."""

    def __init__(self, gm: fx.GraphModule, ranks: Ranks, balance: Balance) -> None:
        self.gm, self.graph, self.ranks, self.balance = gm, gm.graph, ranks, balance
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
        counts = {share(self.tokens, rank, ranks.size): rank for rank in (*range(ranks.size), ranks.rank)}
        self.views = [_View(counts[count]) for count in sorted(counts)]
        """A rank for every number of tokens, this one among them."""
        self.here = next(view for view in self.views if view.rank == ranks.rank)
        self.written = {
            _memory(one)
            for node in gm.graph.nodes
            for to in written_by(node, node.args, node.kwargs)
            for one in self._leaves(self.whole.get(to) if isinstance(to, fx.Node) else None)
        }
        """Memory that some node writes to."""
        self.gathers: dict[fx.Node, fx.Node] = {}
        self.gathered: list[tuple[str, str]] = []
        self.sites: list[str] = []
        self.contexts: dict[fx.Node, Any] = {}
        self.order: fx.Node | None = None
        self.constants: dict[str, fx.Node] = {}
        self.first = next(node for node in gm.graph.nodes if node.op != "placeholder")

    def run(self) -> Sharding:
        """Rewrite the graph."""
        shared = self._prepare()
        mode = next(
            one.fake_mode for one in self._leaves(list(self.whole.values())) if isinstance(one, FakeTensor)
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
        """Whether query, key and value have all tokens in their sequence, in order, and in no other dimension."""
        found = [self._place(self.whole[node_of(one)]) for one in node.args[:3]]
        return found[0] is not None and found[0][:2] == (2, 1) and found[0] == found[1] == found[2]

    def _place(self, value: Any) -> tuple[int, int, list[Part]] | None:
        """(dimension, repeats, parts) of a tensor that has tokens in one dimension, all and in order."""
        labels = self.tracker.of(value)
        dims = [dim for dim, label in enumerate(labels) if self.tracker.has(label)]
        if len(dims) != 1 or (parts := self.tracker.parts(labels[dims[0]])) is None:
            return None
        return dims[0], *parts

    def _attention(self, node: fx.Node) -> None:
        """Share the heads of a site."""
        tensors: list[Any] = [*node.args[:3]]
        mask, scale = node.args[3:]
        site, plan, ranks = node.meta["site"], node.meta["plan"], self.ranks
        wholes = [self.whole[one] for one in tensors]
        place = self._place(wholes[0])
        assert place is not None
        moves = self.balance != "off" and heads_differ(plan)
        known = densities_of_heads(plan)
        sharing = SharedHeads(
            ranks=ranks,
            heads=site.heads,
            balance=self.balance if moves else "off",
            own_tables=known is not None,
        )
        own, room = even_owners(site.heads, ranks.size), capacity(site.heads, ranks.size)
        if known is not None and self.balance != "off":
            own = balanced(known, ranks.size, room)
        parts, slots = (
            place[2],
            room if moves else max(len(heads_of(own, rank)) for rank in range(ranks.size)),
        )
        of_rank = (ranks.rank, ranks.size, ranks.group, ranks.timeout, site.name)
        with self.graph.inserting_before(node):
            owners = self._owners(site, own)
            tensors = [one if one in self.here.values else self._cut(one, place) for one in tensors]
            if isinstance(mask, fx.Node):
                mask = self._mask(site, mask, owners, slots)
            by_heads = self._communicate(TO_HEADS, tensors, (owners, flat(parts), slots, False, *of_rank))
        with self.graph.inserting_after(
            node
        ):  # an observer of the call reads the bias, which is made at the node
            if not moves:
                call = self.graph.call_function(
                    F.scaled_dot_product_attention, tuple(by_heads), {"attn_mask": mask, "scale": scale}
                )
            else:
                call = self.graph.call_function(
                    torch.ops.sparsify.attend_owned.default, (*by_heads, mask, owners, ranks.rank, scale)
                )
        for one, whole in zip(by_heads, wholes, strict=True):
            one.meta["example_value"] = whole.new_empty(whole.shape[0], slots, *whole.shape[2:])
        local = replace(
            plan,
            site=replace(site, heads=slots, kv_heads=slots, spelling="sdpa"),
            sharing=sharing,
        )
        recorded, users = tensor_of(node), list(node.users)
        dtype = getattr(torch, site.dtype)
        attended = _lies_by_tokens(wholes[0], (site.batch, slots, site.q_tokens, site.value_dim), dtype)
        call.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        call.meta["example_value"] = node.meta["example_value"] = attended
        node.meta |= {"site": local.site, "plan": local, "original": call, "result": node, "owners": owners}
        node.args = (*by_heads, mask, scale)
        with self.graph.inserting_before(call.next):
            (out,) = self._communicate(
                TO_TOKENS,
                [node],
                (owners, flat(parts), [site.heads], True, *of_rank),
            )
            for view in self.views:
                rows = local_length(parts, view.rank, ranks.size)
                shape = site.batch, site.heads, rows, site.value_dim
                view.values[out] = _lies_by_tokens(wholes[0], shape, dtype)
            if recorded is not None:
                out = self._laid_as(out, recorded)
        self._take_over(node, out, users)
        self.sites.append(site.name)

    def _owners(self, site: AttentionSite, owners: Owners) -> fx.Node:
        """The owners of the heads of a site, in the graph."""
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
            return self._constant(f"sparsify_owners{site.index}", torch.tensor(owners))

    def _mask(self, site: AttentionSite, mask: fx.Node, owners: fx.Node, slots: int) -> fx.Node:
        """The mask of a site, which is constant along queries, for one query and this rank's heads."""
        value = self.whole[mask]
        new = self._gathered(mask, "it is the mask of an attention")
        if value.dim() > 1:
            new, value = self.graph.call_method("narrow", (new, -2, 0, 1)), value.narrow(-2, 0, 1)
        if value.dim() > 2 and value.shape[-3] > 1:
            op = torch.ops.sparsify.heads_in_slots.default
            places = self.graph.call_function(op, (owners, self.ranks.rank, slots))
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
        shared = [one for one in node.all_input_nodes if one in self.here.values]
        tensors = self._leaves(whole)
        into = [one for of in node.all_input_nodes for one in self._leaves(self.whole.get(of))]
        if not into and node.op != "placeholder" and node not in self.starts:
            shared += [node for one in tensors if self._has_tokens(one)]  # tokens are written to it later
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
        if any(self._has_tokens(one) and self._place(one) is None for one in tensors):
            return "its result has only some tokens, or tokens in another order"
        return ""

    def _run_here(self, node: fx.Node, whole: Any) -> str:
        """Let a node work on this rank's tokens if every rank can; else the reason."""
        try:
            cuts = self._cuts(node, whole)
            tried = [self._tried(node, whole, cuts, view) for view in self.views]
        except LookupError as why:
            return str(why.args[0])
        args, kwargs, _ = tried[self.views.index(self.here)]
        with self.graph.inserting_before(node):
            new = {one: self._cut(one, place) for one, place in cuts.items()}
        node.args, node.kwargs = fx.node.map_arg((args, kwargs), lambda one: new.get(one, one))
        if written_by(node, node.args, node.kwargs):
            self.gathers.clear()
        if any(map(self._has_tokens, self._leaves(whole))):
            for view, (_, _, result) in zip(self.views, tried, strict=True):
                view.values[node] = result
            node.meta["example_value"] = self.here.values[node]
        return ""

    def _tried(
        self, node: fx.Node, whole: Any, cuts: dict[fx.Node, "_Place"], view: _View
    ) -> tuple[Any, Any, Any]:
        """(args, kwargs, result) of a node on a rank's tokens; raises LookupError where it is not that rank's share
        of the result."""
        args, kwargs = self._local_arguments(node, whole, view)

        def value(one: fx.Node) -> Any:
            if one in view.values:
                return view.values[one]
            return self._share_of(self.whole[one], cuts[one], view.rank) if one in cuts else self.whole[one]

        try:
            with quiet_fakes():
                result = run_call(node, *fx.node.map_arg((args, kwargs), value))
        except Exception as error:
            raise LookupError(f"it fails on a share of the tokens: {error}") from None
        got, wanted = tree_leaves(result), tree_leaves(whole)
        fits = len(got) == len(wanted) and all(
            tuple(one.shape) == self._local_shape(of, view.rank) and one.dtype == of.dtype
            for one, of in zip(got, wanted, strict=True)
            if isinstance(of, Tensor)
        )
        if not fits:
            raise LookupError("its sizes do not follow the tokens")
        return args, kwargs, result

    def _cuts(self, node: fx.Node, whole: Any) -> dict[fx.Node, "_Place"]:
        """The operands that every rank has and of which this node needs a share, with the place of the tokens."""
        if node.target is operator.setitem:
            if not isinstance(node.args[2], fx.Node) or not isinstance(self.whole[node.args[2]], Tensor):
                return {}
            target, index = self.whole[node_of(node.args[0])], node.args[1]
            if any(isinstance(one, fx.Node) for one in tree_leaves(index)):
                raise LookupError("it writes at places that are computed")
            with self.tracker:
                labels, operands = self.tracker.of(target[index]), [node.args[2]]
            along = None
        else:
            joins = node.target in (torch.cat, torch.concat)
            if not isinstance(whole, Tensor) or not (node in self.pointwise or joins):
                return {}
            labels, operands = self.tracker.of(whole), node.all_input_nodes
            along = _dim_of(node) % whole.dim() if joins else None
        written = written_by(node, node.args, node.kwargs)
        cuts: dict[fx.Node, _Place] = {}
        for one in operands:
            x = self.whole[one]
            if one in self.here.values or not isinstance(x, Tensor):
                continue
            for dim in range(x.dim()):
                at = dim + len(labels) - x.dim()
                if at < 0 or at == along or not self.tracker.has(labels[at]) or x.shape[dim] == 1:
                    continue
                parts = self.tracker.parts(labels[at])
                if parts is None or x.shape[dim] != length(labels[at]) or one in cuts or one in written:
                    raise LookupError("an operand of all tokens cannot be cut")
                cuts[one] = dim, *parts
        return cuts

    # Arguments

    def _local_arguments(
        self, node: fx.Node, whole: Any, view: _View
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, with the literal sizes and places that a rank's share has."""
        args: tuple[Any, ...] = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        name = getattr(node.target, "__name__", node.target)
        shapes = [self._local_shape(one, view.rank) for one in self._leaves(whole)]
        if name in ("getitem", "setitem") and isinstance(x := self.whole[args[0]], Tensor):
            return (args[0], self._local_index(x, args[1], view), *args[2:]), kwargs
        if name in ("view", "reshape", "expand") and len(args) > 1 and not isinstance(args[1], torch.dtype):
            return (args[0], *_sizes_like(args[1:], shapes[0])), kwargs
        if name in ("new_zeros", "new_ones", "new_empty"):
            return (args[0], *_sizes_like(args[1:], shapes[0])), kwargs
        if node.target in (torch.zeros, torch.ones, torch.empty):
            return _sizes_like(args, shapes[0]), kwargs
        if node.target is torch.full or name == "new_full":
            before = args[:-2]
            return (*before, shapes[0], args[-1]), kwargs
        if name == "unflatten":
            x, dim, sizes = args
            dim %= self.whole[x].dim()
            return (x, dim, shapes[0][dim : dim + len(sizes)]), kwargs
        if name in ("split", "split_with_sizes", "narrow"):
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) if name != "narrow" else args[1]
            label = self.tracker.of(self.whole[args[0]])[dim]
            if self.tracker.has(label):
                if name != "narrow":
                    return (args[0], [shape[dim] for shape in shapes], *args[2:]), kwargs
                first, last = (self._boundary(label, at, view) for at in (args[2], args[2] + args[3]))
                return (args[0], dim, first, last - first), kwargs
        return args, kwargs

    def _local_index(self, x: Tensor, index: Any, view: _View) -> Any:
        """An index of a tensor, with places among the tokens as a rank has them."""
        items = index if isinstance(index, tuple) else (index,)
        if any(isinstance(one, fx.Node) for one in tree_leaves(items)):
            if self._has_tokens(x):
                raise LookupError("it takes tokens at places that are computed")
            return index
        labels, dim, local = self.tracker.of(x), 0, []
        used = sum(one is not None and one is not Ellipsis for one in items)
        for one in items:
            if one is Ellipsis:
                dim += x.dim() - used
            elif one is not None:
                if isinstance(one, slice) and one != slice(None) and self.tracker.has(labels[dim]):
                    first, last, step = one.indices(x.shape[dim])
                    if step != 1:
                        raise LookupError("it takes every n-th token")
                    one = slice(*(self._boundary(labels[dim], at, view) for at in (first, max(first, last))))
                dim += 1
            local.append(one)
        return tuple(local) if isinstance(index, tuple) else local[0]

    def _boundary(self, label: Label, position: int, view: _View) -> int:
        """A position of the whole dimension as one of a rank's share."""
        found = self.tracker.parts(label)
        if found is None or found[0] > 1:
            raise LookupError("a slice cuts repeated tokens")
        whole = local = 0
        for part in found[1]:
            if position == whole or (not part.tokens and whole <= position < whole + part.whole):
                return local + position - whole
            whole += part.whole
            local += part.local(view.rank, self.ranks.size)
        if position == whole:
            return local
        raise LookupError("a slice cuts the tokens")

    # Values

    @staticmethod
    def _leaves(whole: Any) -> list[Tensor]:
        """The tensors in a value."""
        return [one for one in tree_leaves(whole) if isinstance(one, Tensor)]

    def _has_tokens(self, value: Tensor) -> bool:
        return any(map(self.tracker.has, self.tracker.of(value)))

    def _local_shape(self, value: Tensor, rank: int) -> tuple[int, ...]:
        """The sizes of a rank's share of a tensor."""
        sizes = []
        for label, size in zip(self.tracker.of(value), value.shape, strict=True):
            found = self.tracker.parts(label) if self.tracker.has(label) else None
            sizes.append(size if found is None else found[0] * local_length(found[1], rank, self.ranks.size))
        return tuple(sizes)

    def _share_of(self, value: Tensor, place: "_Place", rank: int) -> Tensor:
        """A rank's share of a tensor of all tokens."""
        dim, repeats, parts = place
        split = value.unflatten(dim, (repeats, -1)) if repeats > 1 else value
        at = dim + (repeats > 1)
        runs = [one.whole for one in pieces(parts, rank, self.ranks.size)]
        cut = [split.narrow(at, run.start, run.stop - run.start) for run in runs]
        joined_ = torch.cat(cut, at) if len(cut) > 1 else cut[0]
        return joined_.flatten(dim, at) if repeats > 1 else joined_

    # Nodes

    def _cut(self, node: fx.Node, place: "_Place") -> fx.Node:
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
            view.values[new] = self._share_of(self.whole[node], place, view.rank)
        return new

    def _begin(self, node: fx.Node) -> None:
        """Cut the result of a node that runs on all tokens, if it has them: its users get this rank's share."""
        whole, users = self.whole.get(node), list(node.users)
        place = self._place(whole) if isinstance(whole, Tensor) else None
        if place is None or not users or _memory(self._leaves(whole)[0]) in self.written:
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
        place = self._place(whole) if isinstance(whole, Tensor) else None
        if place is None:
            raise CannotShareError(
                f"{_name_of(user or node)} needs all tokens, which cannot be gathered: {why}"
            )
        dim, repeats, parts = place
        x, at = node, dim + (repeats > 1)
        if repeats > 1:
            x = self.graph.call_method("unflatten", (x, dim, (repeats, -1)))
        of_rank = (ranks.rank, ranks.size, ranks.group, ranks.timeout, _name_of(user or node))
        (new,) = self._communicate(GATHER_TOKENS, [x], (at, flat(parts), *of_rank))
        if repeats > 1:
            new = self.graph.call_method("flatten", (new, dim, at))
        self.whole[new] = whole
        new.meta["example_value"] = whole
        self.gathers[node] = new
        self.gathered.append((_name_of(user or node), why))
        return new

    def _communicate(self, op: Any, tensors: Sequence[fx.Node], others: tuple[Any, ...]) -> list[fx.Node]:
        """The results of an op in which ranks take part, after the op before it."""
        if self.order is None:
            with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
                self.order = self._constant("sparsify_order", torch.zeros((), dtype=torch.float32))
        call = self.graph.call_function(op, ([*tensors, self.order], *others))
        *results, self.order = (
            self.graph.call_function(operator.getitem, (call, i)) for i in range(len(tensors) + 1)
        )
        return results

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        """A constant of the graph, before all other nodes."""
        if name not in self.constants:
            self.gm.register_buffer(name, value, persistent=False)
            with self.graph.inserting_before(self.first):
                self.constants[name] = self.graph.get_attr(name)
        return self.constants[name]

    def _replace_by_numbers(self, node: fx.Node, whole: Any) -> None:
        """Give users of a node the sizes that it has in one process."""
        for user in list(node.users):
            user.args, user.kwargs = fx.node.map_arg(
                (user.args, user.kwargs), lambda one: whole if one is node else one
            )
        self.graph.erase_node(node)

    def _erase(self, node: fx.Node) -> None:
        """Erase a node that no other reads, and nodes that only it reads, as far as they only compute."""
        if node.users or node.op == "placeholder" or written_by(node, node.args, node.kwargs):
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        for source in sources:
            self._erase(source)


def heads_differ(plan: AttentionPlan) -> bool:
    """Whether the heads of a site may need different numbers of keys, so that they may move between ranks."""
    return isinstance(plan.settings, DynamicMethod) and not isinstance(plan.settings, LearningMethod)


def densities_of_heads(plan: AttentionPlan) -> list[float] | None:
    """The density of each head of a site whose heads have tables of their own before it runs; else None."""
    if not isinstance(plan.settings, StaticMethod):
        return None
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
        densities = plan.settings.table(plan.layout).densities()
        return densities[0].tolist() if densities.shape[1] > 1 else None


_Place = tuple[int, int, list[Part]]
"""(dimension, repeats outside of the parts, parts) of the tokens of a tensor."""


def _memory(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _dim_of(node: fx.Node) -> int:
    """The dimension along which a call joins tensors."""
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(dim, int)
    return dim


def _sizes_like(args: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
    """Sizes in the form in which a call gets them: as one argument, or one for each."""
    return (tuple(shape),) if len(args) == 1 and isinstance(args[0], (tuple, list)) else tuple(shape)


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
