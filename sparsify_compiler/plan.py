"""The three frozen things the compiler passes along: a site, the layout of its tokens, and the plan for it.

Nothing here holds a tensor or a device: a plan can be hashed, compared, printed and stored.
"""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Literal

SiteKind = Literal["self", "joint", "cross", "unknown"]
Spelling = Literal["sdpa", "flex", "unfused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """One attention call found in a graph."""

    name: str
    """Where it stands in the model, e.g. `blocks.0.attn1`: stable from compile to compile."""
    known_as: str = ""
    """Its name where something was learnt for it, if that is another: paths of wrappers differ."""
    index: int
    """Its place among the attention calls of the graph, from 0."""
    module: str = ""
    """Class of the module that it stands in, e.g. `WanAttention`; empty for the model itself."""
    batch: int
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; a divisor of `heads` (grouped-query attention)."""
    q_tokens: int
    kv_tokens: int
    head_dim: int
    value_dim: int
    dtype: str
    """Data type the attention computes in, e.g. `bfloat16` (the autocast type where autocast is on)."""
    device: str
    """Device type, e.g. `cuda`."""
    scale: float
    """Factor on the scores; 1/sqrt(head_dim) unless the model gave one."""
    mask: Literal["none", "key"] = "none"
    """`key`: a padding mask or additive bias that depends on the key alone."""
    spelling: Spelling = "sdpa"
    """How the model wrote it: a call of SDPA, a call of FlexAttention, or softmax(q kᵀ) v by hand."""
    kind: SiteKind = "unknown"
    """`self`: video to video. `joint`: video and other tokens in one sequence. `cross`: keys are other tokens
    than the queries. `unknown`: the tokens could not be followed."""
    refusal: str = ""
    """Why capture leaves this call as it is; empty if it may be rewritten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """What the tokens of a site are, in order: `before` other tokens, the video grid, `after` other tokens.

    The grid's tokens lie row-major: token `before + (t * height + y) * width + x` shows frame t, row y,
    column x. The other tokens are text, conditioning, reference or padding tokens.
    """

    tokens: int
    """All tokens of the sequence, S."""
    grid: tuple[int, int, int] | None = None
    """(frames, height, width) in latent tokens; None where it could not be established."""
    before: int = 0
    after: int = 0
    reason: str = field(default="", compare=False)
    """How the grid was established, or why it could not be."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.before + math.prod(self.grid) + self.after != self.tokens:
            raise ValueError(f"the parts of the layout must add up to {self.tokens} tokens, got {self}")

    @property
    def video_tokens(self) -> int:
        """Tokens of the sequence that are the video's."""
        return self.tokens - self.before - self.after

    @property
    def frames(self) -> int:
        """Frames of the grid."""
        assert self.grid is not None
        return self.grid[0]

    @property
    def tokens_per_frame(self) -> int:
        """height * width of the grid."""
        assert self.grid is not None
        return self.grid[1] * self.grid[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """What is done at one site, and why."""

    site: AttentionSite
    layout: TokenLayout
    method: str
    """`dense`, or the name of the method that decides what each query block reads."""
    settings: Hashable = None
    """The method's numbers, every default filled in for this layout; None for `dense`."""
    provider: str = ""
    """Implementation of the attention op; empty for `dense`, which stays the model's own call."""
    far_field: str = "drop"
    """What becomes of the keys that a query block does not read: see `kernels/far_field`."""
    density: float | None = 1.0
    """Share of the query-key token pairs that are computed; None where every call decides."""
    reason: str
    """Why this method, or why dense; and why this provider."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """The plans of all attention calls of one graph, in graph order."""

    plans: tuple[AttentionPlan, ...] = ()
    dense_steps: int | float = 0
    """Steps of a generation, from its first, that run dense: a number, or a share."""

    def runs_dense(self, step: int | None, steps: int) -> bool:
        """Whether a step of a generation does; `steps` may be a guess, which the share 1.0 does not rely on."""
        if isinstance(self.dense_steps, float) and self.dense_steps >= 1:
            return True
        return step is not None and step < count_of(self.dense_steps, steps)

    def __iter__(self) -> Iterator[AttentionPlan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    @property
    def sparse(self) -> tuple[AttentionPlan, ...]:
        """The plans that rewrite their site."""
        return tuple(plan for plan in self.plans if plan.method != "dense")


def count_of(number_or_share: int | float, total: int) -> int:
    """An integer as it is, a float as a share of `total`, rounded to the nearest."""
    return number_or_share if isinstance(number_or_share, int) else round(number_or_share * total)
