"""The cost of attention and of whole models, on one rank and on several: numbers in, numbers out.

Nothing here measures or runs anything; `rates.py` measures this machine, `clusters/counting.py` counts a model.

A mesh has `heads * sequence` ranks. Between attentions every rank has its own tokens. Around an attention, the
`heads` ranks of a group exchange tokens for heads; then each has the tokens of its group, of its own heads. It
fetches the keys that these tokens read from the same heads of the other groups. A mesh of `heads` x 1 is the form
`hcp`, one of 1 x `sequence` is `scp`, and any other is `hybrid`. Neighbouring ranks share heads.

Every message is a product: a rank gives one number of rows, and a peer takes a number of bytes of each row.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.methods.selection import BlockMethod
from sparsify_compiler.parallel.shares import UNITS, Owners, even_owners, head_runs, heads_of, share
from sparsify_compiler.plan import AttentionPlan


class HeadCost(NamedTuple):
    """The cost of a head that reads a share of the video's keys. The cost of a dense head is 1."""

    fixed: float
    by_share: float

    def of(self, share: Tensor) -> Tensor:
        """The cost of heads that read these shares. Below 1, sparse is faster than dense."""
        return self.fixed + self.by_share * share


MARGIN = 0.97
"""A site runs dense if dense attention takes less than this share of the time of sparse attention."""


class Times(NamedTuple):
    """Seconds of one attention call."""

    dense: float
    sparse: float
    """With the selection and the far field."""

    @property
    def dense_wins(self) -> bool:
        """Whether the site runs dense."""
        return self.dense < MARGIN * self.sparse

    def __str__(self) -> str:
        return f"dense: {_milliseconds(self.dense)} here, {_milliseconds(self.sparse)} sparse"


class Speeds(NamedTuple):
    """FLOP/s of attention on one device."""

    dense: float
    sparse: float
    """It counts the pairs that are read, without a selection."""


def predicted_times(plan: AttentionPlan, speeds: Speeds) -> str:
    """The times of a site, in words; the density at which they are equal where each call decides what it reads."""
    flops = sum(attention_of(replace(plan, density=1.0), plan.site.q_tokens).flops)
    dense, least = flops / speeds.dense, flops / speeds.sparse
    if plan.density is not None:
        return str(Times(dense, plan.density * least))
    share = f"{min(1.0, dense / least):.2g}, without its selection"
    return f"dense: {_milliseconds(dense)} here, sparse takes less below a density of {share}"


def _milliseconds(seconds: float) -> str:
    """Three significant digits, without an exponent."""
    number = 1e3 * seconds
    return f"{number:.0f} ms" if number >= 1000 else f"{number:.3g} ms"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Hosts that run a model together, all alike. Rates are those that programs reach."""

    hosts: int = 1
    gpus: int
    """GPUs of a host, or processes on a CPU."""
    memory: float
    """Bytes of a GPU that a program may use."""
    products: float
    """FLOP/s of matrix products outside of attention."""
    attention: float
    """FLOP/s of dense attention."""
    sparse: float
    """FLOP/s of sparse attention, of the pairs that it reads, with its selection."""
    traffic: float
    """Bytes/s that other operators read and write in the memory of a GPU."""
    inside: float
    """Bytes/s that a GPU sends to the others of its host, while it receives as many."""
    between: float
    """Bytes/s that a GPU sends to other hosts, while it receives as many."""
    latency: float
    """Seconds of an exchange without content."""

    @property
    def size(self) -> int:
        """The number of ranks, one for each GPU."""
        return self.hosts * self.gpus


class Mesh(NamedTuple):
    """Ranks in two dimensions: neighbours share heads, the others share the sequence."""

    heads: int
    sequence: int

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.heads * self.sequence

    @property
    def form(self) -> str:
        """`one`, `hcp`, `scp` or `hybrid`."""
        if self.sequence == 1:
            return "hcp" if self.heads > 1 else "one"
        return "hybrid" if self.heads > 1 else "scp"

    def __str__(self) -> str:
        return f"{self.heads}x{self.sequence}"


PASSES = 7
"""Times that an exchange reads or writes the bytes that it packs or unpacks; counted in `parallel/ops.py`."""


class Split(NamedTuple):
    """A quantity of a model: a part that is proportional to a rank's tokens, and a part that every rank has."""

    shared: float = 0.0
    every: float = 0.0

    def on(self, part: float) -> float:
        """The quantity on a rank that has this part of the tokens."""
        return self.shared * part + self.every


NOTHING = Split()


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """An attention whose tokens and heads ranks share."""

    batch: int = 1
    heads: int
    kv_heads: int
    tokens: int
    """Tokens that ranks share."""
    others: int = 0
    """Tokens that every rank has, in the same sequence."""
    head_dim: int
    value_dim: int
    bytes: int
    """Bytes of an element."""
    densities: tuple[float, ...]
    """Share of the pairs that are computed, of each head."""
    remote: float = 1.0
    """Where the sequence is shared: the share of the other groups' keys that the tokens of a group read."""

    @property
    def dense_flops(self) -> float:
        """The products of a dense head, with all tokens."""
        return 2.0 * (self.head_dim + self.value_dim) * self.batch * (self.tokens + self.others) ** 2

    @property
    def flops(self) -> tuple[float, ...]:
        """The products of each head, with all tokens."""
        return tuple(self.dense_flops * density for density in self.densities)


def attention_of(plan: AttentionPlan, tokens: int, remote: float = 1.0) -> Attention:
    """The attention of a plan of one process, whose sequence has this number of tokens that ranks share.

    A density that only a call knows counts as 1.
    """
    site = plan.site
    density = 1.0 if plan.density is None else plan.density
    return Attention(
        batch=site.batch,
        heads=site.heads,
        kv_heads=site.kv_heads,
        tokens=tokens,
        others=site.q_tokens - tokens,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        bytes=getattr(torch, site.dtype).itemsize,
        densities=(density,) * site.heads,
        remote=remote,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one call of a model in one process. Where ranks share nothing, all of it is for every rank."""

    tokens: int
    """Tokens that ranks share."""
    attentions: tuple[Attention, ...]
    """Those that ranks share; all other work is below."""
    flops: Split = NOTHING
    """Operations of products."""
    traffic: Split = NOTHING
    """Bytes that operators without products read and write."""
    gathered: tuple[float, ...] = ()
    """Bytes of all tokens, for each time that they are gathered on every rank."""
    weights: float = 0.0
    """Bytes of the weights, which every rank has."""
    live: tuple[Split, ...] = (NOTHING,)
    """Bytes of values that live at one time; the largest counts."""

    @property
    def total(self) -> float:
        """Operations of products in one process."""
        return self.flops.on(1.0) + sum(sum(one.flops) for one in self.attentions)


def work_of(plans: Iterable[AttentionPlan]) -> Work:
    """The work that the form changes: attention over the video's own tokens, in a graph of one process."""
    own = [one for one in plans if one.site.kind in ("self", "joint") and not one.site.refusal]
    attentions = tuple(attention_of(one, one.layout.video_tokens) for one in own)
    return Work(tokens=max((one.tokens for one in attentions), default=0), attentions=attentions)


class Traffic(NamedTuple):
    """The bytes that a rank exchanges with the ranks of its host, and with those of other hosts."""

    sent_inside: float = 0.0
    sent_between: float = 0.0
    received_inside: float = 0.0
    received_between: float = 0.0
    packed: float = 0.0
    """The bytes that the rank packs and unpacks, with those that stay on it."""

    @property
    def inside(self) -> float:
        """The larger direction: a rank sends and receives at the same time."""
        return max(self.sent_inside, self.received_inside)

    @property
    def between(self) -> float:
        """The larger direction to and from other hosts."""
        return max(self.sent_between, self.received_between)

    @property
    def sent(self) -> float:
        """All bytes that the rank sends."""
        return self.sent_inside + self.sent_between


def exchange(
    gives: Sequence[float], takes: Sequence[float], groups: Iterable[Sequence[int]], gpus: int
) -> list[Traffic]:
    """The traffic of each rank, where ranks of a group send each other `gives[from] * takes[to]` bytes.

    Args:
        groups: the ranks of each group; every rank is in one.
        gpus: ranks of a host.
    """
    found = [Traffic()] * len(gives)
    for group in groups:
        hosts: dict[int, tuple[float, float]] = {}
        for rank in group:
            given, taken = hosts.get(rank // gpus, (0.0, 0.0))
            hosts[rank // gpus] = given + gives[rank], taken + takes[rank]
        all_given, all_taken = (sum(each) for each in zip(*hosts.values(), strict=True))
        for rank in group:
            given, taken = hosts[rank // gpus]
            found[rank] = Traffic(
                sent_inside=gives[rank] * (taken - takes[rank]),
                sent_between=gives[rank] * (all_taken - taken),
                received_inside=takes[rank] * (given - gives[rank]),
                received_between=takes[rank] * (all_given - given),
                packed=gives[rank] * all_taken + takes[rank] * all_given,
            )
    return found


def attention_traffic(
    attention: Attention, mesh: Mesh, gpus: int, owners: Owners | None = None
) -> list[list[Traffic]]:
    """The exchanges around an attention, each with the traffic of every rank, in the order of ranks.

    Args:
        owners: the owners of heads in a group; None shares heads evenly.
    """
    one, size = attention, mesh.size
    owned = even_owners(one.heads, mesh.heads) if owners is None else owners
    own = [len(heads_of(owned, place)) for place in range(mesh.heads)]
    keys = [
        sum(run.heads.stop - run.heads.start for run in head_runs(owned, one.kv_heads, place))
        for place in range(mesh.heads)
    ]
    width = one.batch * one.bytes
    key_width = one.head_dim + one.value_dim
    tokens = [share(one.tokens, rank, size) for rank in range(size)]
    places = [rank % mesh.heads for rank in range(size)]
    found = []
    if mesh.heads > 1:
        groups = [range(first, first + mesh.heads) for first in range(0, size, mesh.heads)]
        there = [width * (own[place] * one.head_dim + keys[place] * key_width) for place in places]
        back = [width * own[place] * one.value_dim for place in places]
        found.append(exchange(tokens, there, groups, gpus))
        found.append(exchange(back, [number + one.others for number in tokens], groups, gpus))
    if mesh.sequence > 1:
        across = [range(place, size, mesh.heads) for place in range(mesh.heads)]
        rows = [one.remote * number for number in _tokens_of_groups(one.tokens, mesh)]
        bytes_of_a_row = [width * keys[place] * key_width for place in places]
        found.append(
            exchange([rows[rank // mesh.heads] for rank in range(size)], bytes_of_a_row, across, gpus)
        )
    return found


def attention_loads(attention: Attention, mesh: Mesh, owners: Owners | None = None) -> list[float]:
    """The products of an attention on every rank, in the order of ranks; arguments as in `attention_traffic`."""
    owned = even_owners(attention.heads, mesh.heads) if owners is None else owners
    of_heads = [0.0] * mesh.heads
    for units, flops in zip(owned, attention.flops, strict=True):
        for place, (first, last) in enumerate(pairwise(units)):
            of_heads[place] += flops * (last - first) / UNITS
    rows = _tokens_of_groups(attention.tokens, mesh)
    others = attention.others
    return [
        of_heads[i] * (own + others) / (attention.tokens + others) for own in rows for i in range(mesh.heads)
    ]


def attention_memory(attention: Attention, mesh: Mesh) -> float:
    """The bytes that the exchanged tensors of an attention take on the rank that has most of them."""
    one = attention
    own, keys = share(one.heads, 0, mesh.heads), min(one.kv_heads, share(one.heads, 0, mesh.heads))
    rows = _tokens_of_groups(one.tokens, mesh)[0] + one.others
    fetched = one.remote * (one.tokens + one.others - rows)
    of_keys = keys * (one.head_dim + one.value_dim)
    total = rows * (own * (one.head_dim + one.value_dim) + of_keys) * (mesh.heads > 1) + fetched * of_keys
    return one.batch * one.bytes * total


def _tokens_of_groups(tokens: int, mesh: Mesh) -> list[int]:
    """The tokens of every group of ranks that share heads."""
    counts = [share(tokens, rank, mesh.size) for rank in range(mesh.size)]
    return [sum(counts[first : first + mesh.heads]) for first in range(0, mesh.size, mesh.heads)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The predicted cost of one call of a model on a mesh, on the rank that is last at every step."""

    mesh: Mesh
    products: float
    """Seconds of products outside of attention."""
    attention: float
    """Seconds of attention."""
    traffic: float
    """Seconds of other operators, and of packing and unpacking exchanges."""
    inside: float
    """Seconds of exchanges that wait for the connections inside of hosts."""
    between: float
    """Seconds of exchanges that wait for the connections between hosts."""
    latency: float
    """Seconds of exchanges without their content."""
    sent: float
    """Bytes that a rank sends, at most."""
    memory: float
    """Bytes of a rank, at most."""
    balance: float
    """The largest load of attention on a rank, relative to the mean."""
    fits: bool
    """Whether the memory is enough."""

    @property
    def seconds(self) -> float:
        """Seconds of the call: ranks exchange while they compute nothing."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        """Name -> seconds of a part of the call."""
        names = ("products", "attention", "traffic", "inside", "between", "latency")
        return {name: getattr(self, name) for name in names}

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def predict(work: Work, mesh: Mesh, cluster: Cluster) -> Prediction:
    """The cost of one call on a mesh of ranks, which fill the cluster's hosts in order."""
    size = mesh.size
    part = share(work.tokens, 0, size) / work.tokens if work.tokens else 1.0
    attention = mean = inside = between = latency = packed = 0.0
    memory = 0.0
    sent = [0.0] * size

    def add(exchanged: Sequence[Traffic], count: int) -> None:
        nonlocal inside, between, latency, packed
        waits = [(one.inside / cluster.inside, one.between / cluster.between) for one in exchanged]
        in_hosts, out = max(waits, key=max)
        inside += count * in_hosts * (in_hosts >= out)
        between += count * out * (in_hosts < out)
        latency += count * cluster.latency
        packed += count * max(one.packed for one in exchanged)
        for rank, one in enumerate(exchanged):
            sent[rank] += count * one.sent

    for one, count in Counter(work.attentions).items():
        loads = attention_loads(one, mesh)
        rate = cluster.attention if min(one.densities) == 1 else cluster.sparse
        attention += count * max(loads) / rate
        mean += count * sum(loads) / size / rate
        memory = max(memory, attention_memory(one, mesh))
        for exchanged in attention_traffic(one, mesh, cluster.gpus):
            add(exchanged, count)
    if size > 1:
        tokens = [share(work.tokens, rank, size) for rank in range(size)]
        for whole, count in Counter(work.gathered).items():
            row = [whole / work.tokens] * size
            add(exchange(tokens, row, [range(size)], cluster.gpus), count)
    memory += work.weights + max(one.on(part) for one in work.live)
    return Prediction(
        mesh=mesh,
        products=work.flops.on(part) / cluster.products,
        attention=attention,
        traffic=(work.traffic.on(part) + PASSES * packed) / cluster.traffic,
        inside=inside,
        between=between,
        latency=latency,
        sent=max(sent),
        memory=memory,
        balance=attention / mean if mean else 1.0,
        fits=memory <= cluster.memory,
    )


def meshes(size: int) -> Iterator[Mesh]:
    """Every mesh of a number of ranks, most heads first."""
    for sequence in range(1, size + 1):
        if size % sequence == 0:
            yield Mesh(size // sequence, sequence)


OF_ONE_GROUP = ("hcp", "scp")
"""The forms that need no more than one group of ranks."""


class Choice(NamedTuple):
    """A form, with its mesh and the reason for it."""

    mesh: Mesh
    reason: str
    predictions: tuple[Prediction, ...] = ()
    """One for each form that was compared, the chosen one first."""

    @property
    def form(self) -> str:
        """`hcp`, `scp` or `hybrid`."""
        return self.mesh.form


def choose_form(work: Work, cluster: Cluster, size: int, executable: Collection[str]) -> Choice:
    """The form in which a call takes least time, of those whose memory is enough.

    It depends on its arguments alone: ranks that agree about them choose alike.

    Args:
        size: the number of ranks, at least 2.
        executable: the forms among which to choose.

    Raises:
        ValueError: no mesh of this size has such a form.
    """
    best: dict[str, Prediction] = {}
    for mesh in meshes(size):
        if mesh.form in executable:
            found = predict(work, mesh, cluster)
            if mesh.form not in best or _order(found) < _order(best[mesh.form]):
                best[mesh.form] = found
    if not best:
        raise ValueError(f"{size} ranks have no mesh of a form of {', '.join(executable)}")
    first, *others = sorted(best.values(), key=_order)
    text = f"{first.mesh.form} {first.mesh}: {_text(first)}, predicted"
    if others:
        text += f", against {'; '.join(f'{one.mesh.form} {one.mesh}: {_text(one)}' for one in others)}"
    return Choice(first.mesh, text, (first, *others))


def needs_all_queries(plan: AttentionPlan, *, recall: bool) -> str:
    """The reason why a rank must have all queries of a head, in inference; else empty.

    Args:
        recall: whether the recall of dynamic methods is measured.
    """
    if plan.site.mask == "query":
        return "its mask depends on the query"
    if plan.method == "dense":
        return ""
    if plan.far_field != "drop":
        return f"its far field {plan.far_field!r} reads all keys"
    if isinstance(plan.settings, StaticMethod):
        return ""
    if recall:
        return "its recall is measured over all keys"
    if not isinstance(plan.settings, BlockMethod):
        return f"method {plan.method!r} compares its queries with all keys"
    return ""


def heads_suffice(work: Work, size: int) -> bool:
    """Whether ranks that share heads send no more around attention, and compute no more, than ranks that share
    queries."""
    by_heads, by_queries = Mesh(size, 1), Mesh(1, size)

    def most(mesh: Mesh) -> float:
        loads = zip(*(attention_loads(one, mesh) for one in work.attentions), strict=True)
        return max(map(sum, loads), default=0.0)

    sends_more = sent_for_attention(work, by_heads) > sent_for_attention(work, by_queries)
    return not sends_more and most(by_heads) <= most(by_queries) * 1.01  # tokens do not divide evenly


def form_text(work: Work, mesh: Mesh, forms: Sequence[str], cluster: Cluster | None, only: str) -> str:
    """The form of a mesh, with the reason for it and predicted numbers.

    Args:
        mesh: the mesh on which ranks run the work.
        forms: the forms among which they choose.
        cluster: None where no rates were measured; then bytes and loads are predicted, but no times.
        only: the reason why there is one form to choose from.
    """
    if len(forms) == 1:
        why = only
    elif heads_suffice(work, mesh.size):
        why = "no other form sends less or computes less"
    elif cluster is None:
        return f"{' or '.join(forms)}: chosen at the first call, by rates that ranks measure then"
    else:
        return choose_form(work, cluster, mesh.size, forms).reason
    loads = [sum(each) for each in zip(*(attention_loads(one, mesh) for one in work.attentions), strict=True)]
    mean = sum(loads) / mesh.size
    return (
        f"{mesh.form} {mesh}: {why}. Predicted: for attention a rank sends at most "
        f"{sent_for_attention(work, mesh) / 1e6:.3g} MB in a call, and computes at most "
        f"{max(loads) / mean if mean else 1.0:.3g} times the mean"
    )


def sent_for_attention(work: Work, mesh: Mesh) -> float:
    """The bytes that a rank sends around all attention of a call, at most. It needs no rates."""
    sent = [0.0] * mesh.size
    for one, count in Counter(work.attentions).items():
        for exchanged in attention_traffic(one, mesh, mesh.size):
            for rank, traffic in enumerate(exchanged):
                sent[rank] += count * traffic.sent
    return max(sent)


def _order(one: Prediction) -> tuple[bool, float, float]:
    """Those that fit first, by time; then those that do not, by memory."""
    return not one.fits, one.seconds if one.fits else one.memory, one.seconds


def _text(one: Prediction) -> str:
    lacks = "" if one.fits else f", which lacks memory: {one.memory / 1e9:.3g} GB"
    return f"{1e3 * one.seconds:.3g} ms a call, bound by {BOUNDS[one.bound]}{lacks}"


BOUNDS = {
    "products": "products",
    "attention": "attention",
    "traffic": "memory traffic",
    "inside": "links in hosts",
    "between": "links of hosts",
    "latency": "latency",
}
"""Part of a prediction -> its name in texts."""
