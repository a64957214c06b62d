"""Share the tokens of a planned graph among ranks.

    before   tokens = patches(video)                         [B, S, C]
             out = attention(q, k, v, m, scale)              [B, H, S, D]
             video = unpatchify(linear(tokens))

    after    tokens = patches(video).narrow(1, first, s)     the tokens of this rank
             q, k, v = to_heads([q, k, v], owners)           [B, slots, S, D]: all tokens of the rank's heads
             out = attention(q, k, v, m, scale)              its site and plan have `slots` heads
             out = to_tokens([out], owners)                  [B, H, s, D]
             video = unpatchify(gather_tokens(linear(tokens)))

Two runs of the labels (`following.py`) show where the tokens are. The first finds the sequences of the captured
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
from sparsify_compiler.parallel.ops import GATHER_TOKENS, TO_HEADS, TO_TOKENS
from sparsify_compiler.parallel.shares import (
    Part,
    Ranks,
    even_owners,
    flat,
    local_length,
    pieces,
    share,
    start,
)
from sparsify_compiler.passes.axes import (
    Atom,
    Cat,
    Label,
    Source,
    atoms,
    fresh,
    implies,
    joined,
    length,
)
from sparsify_compiler.passes.axis_rules import RULES, is_pointwise, tensors_in
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.axis_writes import Known
from sparsify_compiler.passes.capture import attention, attention_nodes
from sparsify_compiler.passes.following import Unknown, follow
from sparsify_compiler.passes.fx import (
    body_of,
    copy_graph,
    module_path,
    modules,
    run_call,
    strides_of,
    tensor_of,
    value_of,
    written_by,
)
from sparsify_compiler.passes.strides import AUTOCAST
from sparsify_compiler.plan import AttentionPlan, AttentionSite
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


class _CannotShareError(Exception):
    """The graph cannot be shared; the message is the reason."""


def shard(gm: fx.GraphModule, *, ranks: Ranks) -> fx.GraphModule:
    """Share the tokens of a planned graph; see the module's picture. `meta["sharding"]` is then a `Sharding`.

    Args:
        ranks: the ranks, and the one that the graph is for.

    Raises:
        OptionError: the graph has something that ranks cannot share and must not repeat.
    """
    for module in modules(gm):
        if module is not gm and attention_nodes(module):
            raise OptionError(
                "parallel needs attention outside of higher-order operators: turn activation checkpointing and "
                "nested compile regions off"
            )
    twin = copy_graph(gm)
    try:
        found = _Sharder(twin, ranks).run()
    except _CannotShareError as why:
        gm.meta["sharding"] = Sharding(size=ranks.size, reason=str(why))
        return gm
    twin.meta["sharding"] = found
    return twin


# The labels


def _keeps_apart(
    tracker: "_Tokens", func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> bool:
    """Whether no element of an ATen operator's result depends on several tokens, nor on a token's place."""
    if name in _STRUCTURE or is_pointwise(func.overloadpacket):
        mixed: Iterable[tuple[Tensor, Iterable[int]]] = ()
        if name in _ALONG:
            mixed = [(args[0], [kwargs.get("dim", args[1] if len(args) > 1 else 0)])]
    elif name in _ALONG:
        mixed = [(args[0], [kwargs.get("dim", args[1] if len(args) > 1 else 0)])]
    elif name in _REDUCTIONS:
        dims = kwargs.get("dim", args[_REDUCTIONS[name]] if len(args) > _REDUCTIONS[name] else None)
        dims = [dims] if isinstance(dims, int) else dims or range(args[0].dim())
        mixed = [(args[0], dims)]
    elif name in ("mm", "bmm", "matmul"):
        mixed = [(args[0], [-1]), (args[1], [-2 if args[1].dim() > 1 else -1])]
    elif name in ("addmm", "baddbmm"):
        mixed = [(args[1], [-1]), (args[2], [-2])]
    elif name == "linear":
        mixed = [(args[0], [-1]), *((one, range(one.dim())) for one in args[1:] if isinstance(one, Tensor))]
    elif name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
        mixed = [(args[0], range(-len(args[1]), 0))]
    elif name == "embedding":
        mixed = [(args[0], range(2))]
    elif name.startswith("_scaled_dot_product"):
        mixed = [(args[0], [-1]), (args[1], [-1, -2]), (args[2], [-1, -2])]
    else:
        mixed = [(one, range(one.dim())) for one in tensors_in(args, kwargs)]
    return not any(tracker.has(tracker.of(one)[dim]) for one, dims in mixed for dim in dims)


_STRUCTURE = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten",
    "permute", "transpose", "t", "expand", "slice", "unbind", "split", "split_with_sizes", "cat", "stack",
    "repeat", "select", "constant_pad_nd", "alias", "detach", "clone", "_to_copy", "lift_fresh", "contiguous",
    "copy_", "fill_", "zero_", "view_as_real", "view_as_complex", "empty_like", "zeros_like", "ones_like",
    "full_like", "empty", "zeros", "ones", "full", "arange", "scalar_tensor", "new_zeros", "new_ones",
    "new_empty", "new_full",
}  # fmt: skip
"""ATen operators that only place elements, or make constants."""
_ALONG = {
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "cumsum",
    "cumprod",
    "unbind",
    "select",
    "sort",
    "flip",
}
"""ATen operators that work along the dimension that is their first argument after the tensor."""
_REDUCTIONS = dict.fromkeys(
    ("sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "all", "any", "var_mean", "argmax",
     "argmin"), 1,
) | {"linalg_vector_norm": 2, "norm": 2}  # fmt: skip
"""ATen reductions, and the place of their dimensions among the arguments."""


class _Tokens(AxisTracker):
    """Labels in which the tokens have an axis of their own; notes operators that do not keep tokens apart."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.axis = Source("tokens", (tokens,))
        self.mixing: list[str] = []
        """The operators of the current node that mix tokens."""
        self.pointwise = True
        """Whether all operators of the current node compute element by element."""

    def has(self, label: Label) -> bool:
        """Whether a dimension has tokens."""
        return any(atom.source is self.axis for atom in atoms(label))

    def parts(self, label: Label) -> tuple[int, list[Part]] | None:
        """(how often the parts repeat, outside of them; the parts) of a dimension with tokens.

        None where it does not run over all tokens in their order.
        """
        label = joined(
            replace(one, also=frozenset()) if isinstance(one, Atom) and one.source is self.axis else one
            for one in label
        )
        places = [i for i, factor in enumerate(label) if self.has((factor,))]
        if len(places) != 1:
            return None
        (place,) = places
        factor = label[place]
        outer, inner = length(label[:place]), length(label[place + 1 :])
        if isinstance(factor, Atom):
            return (outer, [Part(self.tokens, inner)]) if factor.whole and not factor.base else None
        found: list[Part] = []
        for one in factor.parts:
            if not self.has(one):
                found.append(Part(0, length(one) * inner))
                continue
            within = self.parts(one)
            if within is None or within[0] > 1:
                return None
            found += [Part(tokens, width * inner) for tokens, width in within[1]]
        return outer, found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func.overloadpacket.__name__)
        aten = func.namespace == "aten"
        if aten and name not in RULES and func._can_decompose():
            return super().__torch_dispatch__(func, types, args, kwargs)
        touched = [one for one in tensors_in(args, kwargs or {}) if any(map(self.has, self.of(one)))]
        if touched and torch.Tag.nondeterministic_seeded in func.tags:
            raise OptionError(
                f"parallel needs a model that draws no random numbers for its tokens, got {name}: every rank "
                "would draw others. Set dropout to 0"
            )
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if tensors_in(result):
            self.pointwise &= aten and is_pointwise(func.overloadpacket)
            if touched and not (aten and _keeps_apart(self, func, name, args, kwargs or {})):
                self.mixing.append(name)
        if name.endswith("_like") and isinstance(args[0], Tensor):
            labels = [
                label if self.has(label) else fresh(length(label), "blank") for label in self.of(args[0])
            ]
            self.put(result, Known(labels, constant=True))
        return result


@dataclass(slots=True)
class _Traced:
    """The values of a graph's nodes in a run with labels."""

    tracker: AxisTracker
    values: dict[fx.Node, Any]


def _sequences(gm: fx.GraphModule) -> tuple[list[Label], _Traced]:
    """(the labels of the video's tokens at the sites, the run that found them)."""
    tracker, values = AxisTracker(), dict[fx.Node, Any]()
    followed = follow(gm, tracker=tracker, see=values.__setitem__)
    found: list[tuple[bool, Label]] = []
    for node, site in followed.sites.items():
        layout, kind = node.meta["layout"], node.meta["site"].kind
        label = site.query.labels[2]
        if kind not in ("self", "joint"):
            continue
        parts = label[0].parts if len(label) == 1 and isinstance(label[0], Cat) else (label,)
        if layout.grid is None:
            found.append((False, max(parts, key=length)))
            continue
        at = 0
        for part in parts:
            if at == layout.before and length(part) == layout.video_tokens:
                found.append((True, part))
            at += length(part)
    if not found:
        raise _CannotShareError("no attention over its own tokens could be followed")
    best = max((gridded, length(label)) for gridded, label in found)
    labels = [label for gridded, label in found if (gridded, length(label)) == best]
    return list(dict.fromkeys(labels)), _Traced(tracker, values)


# The rewrite


@dataclass(slots=True)
class _View:
    """One rank's side of the graph: the local values of nodes that have tokens."""

    rank: int
    values: dict[fx.Node, Any] = field(default_factory=dict)


class _Sharder:
    """Rewrites one graph in place."""

    def __init__(self, gm: fx.GraphModule, ranks: Ranks) -> None:
        self.gm, self.graph, self.ranks = gm, gm.graph, ranks
        for node in gm.graph.nodes:  # shares of tokens are numbers: every size is
            if isinstance(value := value_of(node), torch.SymInt):
                int(value)
        labels, first = _sequences(gm)
        self.tokens = length(labels[0])
        if self.tokens < ranks.size:
            raise _CannotShareError(f"{self.tokens} tokens are fewer than ranks")
        self.tracker = _Tokens(self.tokens)
        self.starts: dict[fx.Node, int] = {}
        """Node -> dimension of its value that first lies along the tokens."""
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
            tracker, before = self.tracker, first.values[node]
            if isinstance(value, Tensor) and isinstance(before, Tensor):
                now = tracker.of(value)
                if not any(map(tracker.has, now)):
                    dims = [dim for dim, label in enumerate(first.tracker.of(before)) if is_tokens(label)]
                    if dims:
                        now[dims[0]] = (Atom(tracker.axis, 0, self.tokens),)
                        tracker.put(value, replace(tracker.known(value), labels=now))
                        self.starts[node] = dims[0]
            if tracker.mixing:
                self.mixing[node] = tracker.mixing[0]
            if tracker.pointwise:
                self.pointwise.add(node)
            tracker.mixing, tracker.pointwise = [], True
            self.whole[node] = value

        follow(gm, tracker=self.tracker, see=see)
        sizes = {share(self.tokens, rank, ranks.size): rank for rank in range(ranks.size)}
        others = [rank for rank in sizes.values() if rank != ranks.rank]
        self.views = [_View(ranks.rank), *map(_View, others)]
        """This rank first, then a rank for every other number of tokens."""
        self.gathers: dict[fx.Node, fx.Node] = {}
        self.gathered: list[tuple[str, str]] = []
        self.sites: list[str] = []
        self.contexts: dict[fx.Node, Any] = {}
        self.order: fx.Node | None = None
        self.constants: dict[str, fx.Node] = {}
        self.first = next(node for node in gm.graph.nodes if node.op != "placeholder")

    @property
    def here(self) -> _View:
        return self.views[0]

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
            raise _CannotShareError("tokens reach no attention whose heads can be shared")
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
        found = [self._place(self.whole[one]) for one in node.args[:3]]
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
        *tensors, mask, scale = node.args
        site, plan, ranks = node.meta["site"], node.meta["plan"], self.ranks
        assert all(one in self.here.values for one in tensors), f"{site.name} must have its rank's tokens"
        wholes = [self.whole[one] for one in tensors]
        place = self._place(wholes[0])
        assert place is not None
        parts, slots = place[2], share(site.heads, 0, ranks.size)
        of_rank = (ranks.rank, ranks.size, ranks.group, ranks.timeout, site.name)
        with self.graph.inserting_before(node):
            owners = self._owners(site.heads)
            if mask is not None:
                mask = self._mask(site, mask, slots)
            by_heads = self._communicate(TO_HEADS, tensors, (owners, flat(parts), slots, False, *of_rank))
            call = self.graph.call_function(
                F.scaled_dot_product_attention, tuple(by_heads), {"attn_mask": mask, "scale": scale}
            )
        for one, whole in zip(by_heads, wholes, strict=True):
            one.meta["example_value"] = whole.new_empty(whole.shape[0], slots, *whole.shape[2:])
        recorded, users, local = tensor_of(node), list(node.users), _with_heads(plan, slots)
        dtype = getattr(torch, site.dtype)
        attended = _lies_by_tokens(wholes[0], (site.batch, slots, site.q_tokens, site.value_dim), dtype)
        call.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        call.meta["example_value"] = node.meta["example_value"] = attended
        node.meta |= {"site": local.site, "plan": local, "original": call, "result": node}
        node.args = (*by_heads, mask, scale)
        with self.graph.inserting_before(node.next):
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

    def _owners(self, heads: int) -> fx.Node:
        """The owner of each head."""
        name = f"sparsify_owners{heads}"
        with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
            return self._constant(name, torch.tensor(even_owners(heads, self.ranks.size)))

    def _mask(self, site: AttentionSite, mask: fx.Node, slots: int) -> fx.Node:
        """The mask of a site, which is constant along queries, for one query and this rank's heads."""
        shape, ranks = self.whole[mask].shape, self.ranks
        new = self._gathered(mask, "it is the mask of an attention")
        if len(shape) > 1:
            new = self.graph.call_method("narrow", (new, -2, 0, 1))
        if len(shape) > 2 and shape[-3] > 1:
            first, own = start(site.heads, ranks.rank, ranks.size), share(site.heads, ranks.rank, ranks.size)
            runs = [(first, own), (0, slots - own)]  # a slot without a head takes any mask
            cut = [self.graph.call_method("narrow", (new, -3, at, length)) for at, length in runs if length]
            new = self.graph.call_function(torch.cat, (cut, -3)) if len(cut) > 1 else cut[0]
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
        tensors = [one for one in tree_leaves(whole) if isinstance(one, Tensor)]
        makes = not shared and not self._tensors_into(node) and node.op != "placeholder"
        if makes and tensors and self._has_tokens(tensors[0]) and node not in self.starts:
            shared = [node]  # made for tokens that are written to it later
        if not shared:
            if isinstance(whole, Tensor) and self._place(whole) is not None:
                self._begin(node)
            return
        if not tensors and whole is not None and all(isinstance(x, (int, float)) for x in tree_leaves(whole)):
            self._replace_by_numbers(node, whole)
            return
        why = self._refusal(node, whole, tensors) or self._run_here(node, whole)
        if why:
            self._gather_inputs(node, why)
            if isinstance(whole, Tensor) and self._place(whole) is not None:
                self._begin(node)

    def _refusal(self, node: fx.Node, whole: Any, tensors: Sequence[Tensor]) -> str:
        """The reason why a node needs all tokens, as far as labels show it; else empty."""
        if node in self.mixing:
            return f"{self.mixing[node]} mixes tokens"
        if (
            node.op not in ("call_function", "call_method")
            or node.target is attention
            or body_of(self.gm, node)
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
        (args, kwargs, _), *_ = tried
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
            target, index = self.whole[node.args[0]], node.args[1]
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
        args, kwargs, name = node.args, dict(node.kwargs), getattr(node.target, "__name__", node.target)
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
        return [one for one in tree_leaves(whole) if isinstance(one, Tensor)]

    def _tensors_into(self, node: fx.Node) -> bool:
        return any(self._leaves(self.whole.get(one)) for one in node.all_input_nodes)

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
        """Cut the result of a node that runs on all tokens: its users get this rank's share."""
        place = self._place(self.whole[node])
        if place is None:
            return
        users = list(node.users)
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
            raise _CannotShareError(f"{_name_of(node)} writes to tokens, and {why}")
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
            raise _CannotShareError(
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
                self.order = self._constant("sparsify_order", torch.zeros(()))
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


_Place = tuple[int, int, list[Part]]
"""(dimension, repeats outside of the parts, parts) of the tokens of a tensor."""


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


def _with_heads(plan: AttentionPlan, heads: int) -> AttentionPlan:
    """The plan of a site for the heads of one rank."""
    return replace(plan, site=replace(plan.site, heads=heads, kv_heads=heads, spelling="sdpa"))


def _name_of(node: fx.Node) -> str:
    """An operator and the module that it was traced in."""
    target = (
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    )
    path = module_path(node)
    return f"{target} in {path}" if path else target
