"""The frozen data that the passes hand on: a site, the layout of its tokens, an entry (a method with a far field),
the plan, and the parts of a whole model. `Method` and `FittedMethod` say what planning needs of a method.

Nothing here holds a tensor or a device: a plan can be hashed, compared, printed and stored.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

SiteKind = Literal["self", "joint", "cross", "unknown"]
Spelling = Literal["sdpa", "flex", "unfused"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """One attention call found in a graph."""

    name: str
    """Its place in the model, e.g. `blocks.0.attn1`: the same in every compilation."""
    known_as: str = ""
    """Its name in the file of trained tensors, if that is another: paths of wrappers differ."""
    index: int
    """Its place among the attention calls of the graph, from 0."""
    module: str = ""
    """Class of the module that contains it, e.g. `WanAttention`; empty for the model itself."""
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
    """Data type in which the attention computes, e.g. `bfloat16` (the autocast type where autocast is on)."""
    device: str
    """Device type, e.g. `cuda`."""
    scale: float
    """Factor on the scores; 1/sqrt(head_dim) unless the model gives one."""
    mask: Literal["none", "key", "query"] = "none"
    """`key`: a padding mask or additive bias that depends on the key alone. `query`: one with a row for each query;
    where all queries of the video have equal rows, these are a mask of keys."""
    rows: tuple[tuple[int, str], ...] = ()
    """The rows of a mask of kind `query`: (number of neighbouring rows, cause of a difference between them, empty
    where all of them are equal). Neighbouring entries differ."""
    spelling: Spelling = "sdpa"
    """The model's spelling: a call of SDPA, a call of FlexAttention, or softmax(q kᵀ) v by hand."""
    kind: SiteKind = "unknown"
    """`self`: video to video. `joint`: video and other tokens in one sequence. `cross`: keys are other tokens
    than the queries. `unknown`: the analysis lost the tokens."""
    refusal: str = ""
    """The reason why capture leaves this call as it is; empty if it may be rewritten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLayout:
    """The tokens of a site, in order: `before` other tokens, the video grid, `after` other tokens.

    The grid's tokens lie row-major: token `before + (t * height + y) * width + x` shows frame t, row y,
    column x. The other tokens are text, conditioning, reference or padding tokens.
    """

    tokens: int
    """All tokens of the sequence, S."""
    grid: tuple[int, int, int] | None = None
    """(frames, height, width) in latent tokens; None where the grid is unknown."""
    before: int = 0
    after: int = 0
    reason: str = field(default="", compare=False)
    """The source of the grid, or the reason why it is unknown."""

    def __post_init__(self) -> None:
        if self.grid is not None and self.before + math.prod(self.grid) + self.after != self.tokens:
            raise ValueError(f"the parts of the layout must add up to {self.tokens} tokens, got {self}")

    @property
    def video_tokens(self) -> int:
        """The number of the video's tokens."""
        return self.tokens - self.before - self.after

    @property
    def frames(self) -> int:
        """The number of frames of the grid."""
        assert self.grid is not None
        return self.grid[0]

    @property
    def tokens_per_frame(self) -> int:
        """height * width of the grid."""
        assert self.grid is not None
        return self.grid[1] * self.grid[2]


Balance = Literal["video", "off"] | int
"""When heads move between ranks: at each new video, never, or also every so many steps."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks that run one model together, and the place of one of them."""

    rank: int
    size: int
    group: str = ""
    """Name of the process group."""
    timeout: float = 60.0
    """Seconds after which an op gives up on a rank that does not take part."""
    sequence: "Ranks | None" = None
    """The ranks among which attention shares its queries, each for the keys that it reads; None where ranks share
    heads alone."""
    heads: "Ranks | None" = None
    """With `sequence`: the neighbours that share heads inside of it; None where a rank has all heads."""

    @property
    def fields(self) -> tuple[int, int, str, float]:
        """The ranks as an op takes them: rank, size, group, timeout."""
        return self.rank, self.size, self.group, self.timeout

    @property
    def form(self) -> str:
        """The form of the option `parallel`."""
        return "hcp" if self.sequence is None else "scp" if self.heads is None else "hybrid"


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedSequence:
    """The ranks that share the queries of a site. The site then has the queries of one rank."""

    ranks: Ranks
    parts: tuple[int, ...]
    """The parts of the whole sequence, see `parallel.shares.flat`."""
    each: int = 1
    """The number of neighbouring shares of tokens that one of these ranks has here."""
    asks: bool = False
    """Whether the site asks other ranks for keys itself. Then ranks share the work for queries of other tokens too:
    each reads its own keys for them. Otherwise the graph fetches keys, and each rank has these queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedHeads:
    """The ranks that share the heads of a site. The site is then that of one rank, with room for its heads."""

    ranks: Ranks
    heads: int
    """Query heads of all ranks."""
    kv_heads: int
    """Key heads of all ranks."""
    balance: Balance = "off"
    """When heads move between ranks, as in `config.Parallel`."""
    own_tables: bool = False
    """Whether each head has a table of its own, before it runs. Then owners are balanced once."""


class FittedMethod(Protocol):
    """A method whose numbers hold for one site: a frozen dataclass. `methods/__init__.py` has its kinds."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]

    def __hash__(self) -> int:
        """Plans and caches are keyed by methods."""


class Method(Protocol):
    """The options of a method: a frozen dataclass with a field for each option. `fit` makes them fit a site."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    name: ClassVar[str]
    dense_steps: ClassVar[int | float]
    """Default of the option: steps of a generation that stay dense, a number or a share."""
    dense_layers: ClassVar[int | float]
    """Default of the option: sites of a model that stay dense, a number or a share."""
    far_field: ClassVar[str]
    """Default of the option."""
    otherwise: ClassVar[Mapping[str, Mapping[str, object]]]
    """Far field -> the defaults of the method's options that are different there."""

    def __init__(self, **options: Any) -> None:
        """Check the options; raises OptionError."""

    def refusal(self, layout: TokenLayout) -> str:
        """The reason why sites of this layout must stay dense; empty if they need not."""

    def fit(self, site: AttentionSite, layout: TokenLayout) -> FittedMethod:
        """The method with every number filled in for this site; raises OptionError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A method with its settings, and a far field: one way to run a site."""

    method: Method
    far_field: str
    """The approximation of the keys that are not read."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that `policy.entry_of` takes; defaults that depend on the site are left out."""
        usual = {f.name: f.default for f in fields(self.method)}
        usual |= self.method.otherwise.get(self.far_field, {})
        given = {name: getattr(self.method, name) for name in usual}
        own = {
            name: str(x) if isinstance(x, Path) else x
            for name, x in given.items()
            if x is not None or usual[name] is not None
        }
        return {"method": self.method.name, **own, "far_field": self.far_field}


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """The decision for one site, and its reason."""

    site: AttentionSite
    layout: TokenLayout
    method: str
    """`dense`, or the name of the method that decides what each query block reads."""
    settings: FittedMethod | None = None
    """The method, fitted to the site; None for `dense`."""
    provider: str = ""
    """Implementation of the attention op; empty for `dense`, which stays the model's own call."""
    far_field: str = "drop"
    """The approximation of the keys that a query block does not read: see `kernels/far_field`."""
    density: float | None = 1.0
    """Share of the query-key token pairs that are computed; None where every call decides it."""
    sharing: SharedHeads | None = None
    """The ranks that share its heads; None where one process has all."""
    sequence: SharedSequence | None = None
    """The ranks that share its queries; None where one process has all."""
    guarded: str = ""
    """The times by which the guard runs a sparse site dense; empty for any other site."""
    reason: str
    """The reasons for the method, or for full attention, and for the provider."""

    @property
    def whole_site(self) -> AttentionSite:
        """The site with the heads of all ranks."""
        if self.sharing is None:
            return self.site
        return replace(self.site, heads=self.sharing.heads, kv_heads=self.sharing.kv_heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphPlan:
    """The plans of all attention calls of one graph, in graph order."""

    plans: tuple[AttentionPlan, ...] = ()
    dense_steps: int | float = 0
    """The first steps of a generation that run dense: a number, or a share."""

    def runs_dense(self, step: int | None, steps: int) -> bool:
        """Whether a step of a generation runs dense. `steps` may be a guess; the share 1.0 does not use it."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """An attention that the analysis of the whole model found."""

    name: str
    like: tuple[Any, ...]
    """Heads, tokens, sizes and the kind of mask."""
    kind: SiteKind
    layout: TokenLayout
    entry: Entry | None
    """The entry that the options or the policy give it; None if it stays dense."""
    reason: str
    """Why this entry, or why dense."""

    def as_dense(self, reason: str) -> AttentionPlan:
        """The plan of an attention that ran in no graph."""
        heads, kv_heads, q_tokens, kv_tokens, head_dim, value_dim, mask = self.like
        site = AttentionSite(
            name=self.name, index=0, batch=0, heads=heads, kv_heads=kv_heads, q_tokens=q_tokens,
            kv_tokens=kv_tokens, head_dim=head_dim, value_dim=value_dim, dtype="", device="", scale=0.0,
            kind=self.kind, mask=mask,
        )  # fmt: skip
        return AttentionPlan(site=site, layout=self.layout, method="dense", reason=reason)


class Parts(NamedTuple):
    """The attentions of one graph, as parts of a model. Equal parts share a plan."""

    sites: tuple[Part, ...]
    dense_steps: int | float


@dataclass(frozen=True, slots=True)
class Analysis:
    """The attentions of a whole model, in the order in which a call runs them."""

    parts: tuple[Part, ...] = ()
    dense_steps: int | float = 0
    outside: tuple[AttentionPlan, ...] = ()
    """The plans of attentions outside every graph, which stay dense."""
    by_values: bool = False
    """Whether it depends on values of the arguments, such as the mask of a prompt, and not on shapes alone."""
    captures_sizes: bool = False
    """Whether attention is in graphs only if Dynamo captures sizes that depend on values."""
    failure: str = ""
    """Why the model could not be analysed; empty if it was."""


def count_of(number_or_share: int | float, total: int) -> int:
    """An integer as it is, a float as a share of `total`, rounded to the nearest."""
    return number_or_share if isinstance(number_or_share, int) else round(number_or_share * total)
