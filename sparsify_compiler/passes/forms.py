"""The part of one attention that ranks share: its heads, or its queries.

A site cannot do with a rank's queries what needs all queries of a head; there ranks share heads in every form.
Heads that need different numbers of keys are placed by what they need.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sparsify_compiler.methods import DynamicMethod, LearningMethod, StaticMethod
from sparsify_compiler.parallel.balance import balanced, capacity
from sparsify_compiler.parallel.shares import (
    Owners,
    Part,
    even_owners,
    flat,
    heads_of,
    local_length,
    whole_length,
)
from sparsify_compiler.plan import AttentionPlan, Balance, Ranks, SharedHeads, SharedSequence, TokenLayout
from sparsify_compiler.runtime.cost import needs_all_queries


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSite:
    """The part of an attention call that one rank computes."""

    plan: AttentionPlan
    """The plan of the rank: with `sharing` where ranks share heads, with `sequence` where they share queries, with
    both in a hybrid."""
    parts: Sequence[Part]
    """The parts of the sequence of all ranks."""
    rows: Sequence[Part]
    """The parts of the sequence that the ranks which share heads have together."""
    owners: Owners = ()
    """The owners of heads, where ranks share them."""
    why_heads: str = ""
    """The reason why ranks share its heads in a form in which they share queries; else empty."""

    @property
    def queries(self) -> int:
        """The number of queries of a rank's heads."""
        return self.plan.site.q_tokens

    @property
    def keys(self) -> int:
        """The number of keys that full attention reads."""
        return whole_length(self.rows if self.plan.sequence is None else self.parts)

    @property
    def moves(self) -> bool:
        """Whether heads move between ranks."""
        return self.plan.sharing is not None and self.plan.sharing.balance != "off"


def share_site(
    plan: AttentionPlan, parts: Sequence[Part], ranks: Ranks, *, balance: Balance, recall: bool, trains: bool
) -> SharedSite:
    """The part of a rank in an attention call, in the form of the ranks, or by heads if the call needs it.

    Args:
        parts: the parts of the sequence.
        balance: when heads may move.
        recall, trains: as in `shares_heads`.
    """
    plan = replace(plan, site=replace(plan.site, spelling="sdpa"))  # the call of the rank
    why, sequence, heads = "", ranks.sequence, ranks.heads
    if sequence is not None:
        why = shares_heads(plan, parts, hybrid=heads is not None, recall=recall, trains=trains)
    if sequence is None or why:
        shared, owners = _by_heads(plan, ranks, balance)
        return SharedSite(plan=shared, parts=parts, rows=parts, owners=owners, why_heads=why)
    each = 1 if heads is None else heads.size
    rows = [one.of_rank(sequence.rank, sequence.size, each) for one in parts]
    shared, owners = _by_queries(plan, parts, sequence, each, trains), []
    if heads is not None:
        shared, owners = _by_heads(shared, heads, "off")
    return SharedSite(plan=shared, parts=parts, rows=rows, owners=owners)


def _by_heads(plan: AttentionPlan, ranks: Ranks, balance: Balance) -> tuple[AttentionPlan, Owners]:
    """(plan of a rank that has all tokens of its heads, owners of heads)."""
    site, known = plan.site, densities_of_heads(plan)
    room = capacity(site.heads, ranks.size)
    if known is None or balance == "off":
        owners = even_owners(site.heads, ranks.size)
    else:
        owners = balanced(known, ranks.size, room)
    moves = balance != "off" and heads_differ(plan)
    slots = room if moves else max(len(heads_of(owners, rank)) for rank in range(ranks.size))
    sharing = SharedHeads(
        ranks=ranks,
        heads=site.heads,
        kv_heads=site.kv_heads,
        balance=balance if moves else "off",
        own_tables=known is not None,
    )
    return replace(plan, site=replace(site, heads=slots, kv_heads=slots), sharing=sharing), owners


def _by_queries(
    plan: AttentionPlan, parts: Sequence[Part], ranks: Ranks, each: int, trains: bool
) -> AttentionPlan:
    """The plan of a rank that has the queries of its tokens. `each`: the neighbours that have them together."""
    asked = asks(plan, parts, trains=trains)
    queries = local_length(parts, ranks.rank, ranks.size, each)
    site = replace(plan.site, q_tokens=queries, kv_tokens=queries if asked else whole_length(parts))
    shared = SharedSequence(ranks=ranks, parts=tuple(flat(parts)), each=each, asks=asked)
    return replace(plan, site=site, sequence=shared)


def shares_heads(
    plan: AttentionPlan, parts: Sequence[Part], *, hybrid: bool, recall: bool, trains: bool
) -> str:
    """The reason why ranks share the heads of a site in a form in which they share queries; else empty.

    Args:
        parts: the parts of the sequence.
        hybrid: whether neighbours share heads.
        recall: as in `needs_all_queries`.
        trains: whether the graph runs in training.
    """
    if why := needs_all_queries(plan, recall=recall):
        return why
    if plan.method == "dense":
        return ""
    if isinstance(plan.settings, StaticMethod):
        own = hybrid and densities_of_heads(plan) is not None
        return "each of its heads has a table of its own" if own else ""
    if trains:
        return f"method {plan.method!r} has no gradient across ranks"
    if not _share_video(parts, plan.layout):
        return f"ranks share other tokens than the video's {plan.layout.video_tokens}"
    return ""


def asks(plan: AttentionPlan, parts: Sequence[Part], *, trains: bool) -> bool:
    """Whether a site that has a rank's queries asks other ranks for keys itself, as `SharedSequence.asks` says.

    Text reads all keys, so a static site asks where text is in the sequence: it then attends for text in parts. In
    training it would need an order for its gradients; there the graph fetches all keys.
    """
    if plan.method == "dense":
        return False
    if not isinstance(plan.settings, StaticMethod):
        return True
    text = plan.layout.tokens > plan.layout.video_tokens
    return text and not trains and _share_video(parts, plan.layout)


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


def _share_video(parts: Sequence[Part], layout: TokenLayout) -> bool:
    """Whether the tokens that ranks share are those of the video."""
    video = [at for at, one in enumerate(parts) if one.tokens]
    return (
        layout.grid is not None
        and len(video) == 1
        and whole_length(parts[: video[0]]) == layout.before
        and parts[video[0]].whole == layout.video_tokens
    )
