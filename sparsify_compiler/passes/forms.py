"""The part of one attention that ranks share: its heads, or its queries.

A site cannot do with a rank's queries what needs all queries of a head; there ranks share heads in every form.
Heads that need different numbers of keys are placed by what they need.
"""

from collections.abc import Sequence

import torch

from sparsify_compiler.methods import DynamicMethod, LearningMethod, StaticMethod
from sparsify_compiler.parallel.shares import Part, whole_length
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.cost import needs_all_queries


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
