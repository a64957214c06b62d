"""Types and functions of dynamic methods: tokens, state, the selection of blocks, tables with the tokens around the
video."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.config import integer, share
from sparsify_compiler.errors import OptionError
from sparsify_compiler.kernels import providers
from sparsify_compiler.kernels.clustering import (
    Side,
    cluster,
    kmeans,
    kmeans_of_both,
    sort_by_label,
    top_p_blocks,
)
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks
from sparsify_compiler.kernels.statistics import block_means
from sparsify_compiler.methods.base import VideoMethod
from sparsify_compiler.methods.shared_tokens import SharedTokens
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.table import BlockTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The inputs of an attention call that a dynamic method looks at, detached."""

    query: Tensor
    """[B, H, S, D], any strides."""
    key: Tensor
    """[B, Hkv, S, D]."""
    layout: TokenLayout
    scale: float
    provider: str
    key_bias: Tensor | None = None
    """[B|1, H|1, S] added to the scaled scores; -inf hides a key."""
    far_field: str = "drop"
    """The approximation of the keys that are not read."""
    shared: SharedTokens | None = None
    """The video's tokens, where `query` and `key` have a rank's share of them; otherwise None."""

    def video(self) -> tuple[Tensor, Tensor]:
        """The query and key of the video tokens alone."""
        start, stop = self.layout.before, self.query.shape[2] - self.layout.after
        return self.query[:, :, start:stop], self.key[:, :, start:stop]

    def block_means(self, points: Tensor, blocks: "Blocks") -> Tensor:
        """[B, H, N, D] fp32: the means of blocks of all ranks' tokens, from a part of what `video` returns."""
        if self.shared is not None:
            return self.shared.block_means(points, blocks.order, blocks.bounds)
        return block_means(points, blocks.bounds, blocks.order, provider=self.provider)[0]

    def centroids(
        self, state: "State", starts: tuple[Tensor, Tensor], *, first: int, later: int
    ) -> tuple[Tensor, Tensor]:
        """The centroids of the video's queries and of its keys, after this call's iterations."""
        warm, video = state.initialised, self.video()
        if self._clusters_together:
            return kmeans_of_both(
                *(*video, *state.tensors, *starts, warm), first=first, later=later, provider=self.provider
            )
        of_queries, of_keys = (
            self.kmeans(points, centroids, start, warm, first=first, later=later)[0]
            for points, centroids, start in zip(video, state.tensors, starts, strict=True)
        )
        return of_queries, of_keys

    def clusters(
        self, state: "State", starts: tuple[Tensor, Tensor], *, first: int, later: int
    ) -> tuple[Side, Side]:
        """The clusters of the video's queries and of its keys, after this call's iterations."""
        layout, heads, warm = self.layout, self.query.shape[1], state.initialised
        if self._clusters_together:
            inputs = *self.video(), *state.tensors, *starts, warm
            return cluster(
                *inputs,
                first=first,
                later=later,
                before=layout.before,
                after=layout.after,
                provider=self.provider,
            )

        def side(points: Tensor, centroids: Tensor, start: Tensor) -> Side:
            centroids, labels = self.kmeans(points, centroids, start, warm, first=first, later=later)
            blocks = Blocks(*sort_by_label(labels, centroids.shape[2], provider=self.provider))
            return Side(centroids, *blocks.among(layout, heads), blocks.bounds.diff(dim=-1))

        of_queries, of_keys = map(side, self.video(), state.tensors, starts)
        return of_queries, of_keys

    @property
    def _clusters_together(self) -> bool:
        # The library of exported programs lacks the op.
        in_file = torch.compiler.is_exporting() and not providers.fuses(self.provider)
        return self.shared is None and not in_file

    def kmeans(
        self, points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor, *, first: int, later: int
    ) -> tuple[Tensor, Tensor]:
        """(centroids, labels) of all ranks' tokens, from a part of what `video` returns, as `clustering.kmeans`."""
        if self.shared is not None:
            return self.shared.kmeans(points, centroids, start, warm, first=first, later=later)
        return kmeans(points, centroids, start, warm, first=first, later=later, provider=self.provider)


class State(NamedTuple):
    """Tensors that a method keeps from call to call."""

    initialised: Tensor
    """0-d bool on the CPU: whether a call has written `tensors`."""
    tensors: tuple[Tensor, ...]
    """fp32, with the shapes of the method's `state`."""


class Selection(NamedTuple):
    """The decisions of a dynamic method in one call."""

    table: BlockTable
    kept: Tensor
    """[B, H, Nq] fp32: the estimated attention mass that each block of video queries keeps."""
    whole: bool = True
    """Whether `table` has the queries of the whole sequence. If not, it has those of the video; others read all."""
    min_gain: float | None = None
    """With the linear far field: blocks of a larger gain are read too (`kernels.far_field.virtual_keys.gains`)."""
    far_blocks: FarBlocks | None = None
    """With a far field, where the table reads single keys: the blocks that approximate the other keys."""
    best: int = 0
    """With `min_gain`, the number of other blocks, those with the largest gains, that each row reads too."""
    density: Tensor | None = None
    """`table.densities()` in fp32, where the method knows it, [B, H]."""


class Blocks(NamedTuple):
    """The video's queries or keys in blocks; int32."""

    order: Tensor
    """[B|1, H|1, V], the tokens of the video, counted from 0."""
    bounds: Tensor
    """[B|1, H|1, N+1]."""

    def among(self, layout: TokenLayout, heads: int) -> "Blocks":
        """The blocks of the whole sequence, with a block for the tokens before the video and one for those after.

        Args:
            heads: the number of query heads. Where several share a key head, the blocks of its keys are repeated.
        """
        order, bounds = self
        if order.shape[1] > 1:
            order, bounds = (t.repeat_interleave(heads // t.shape[1], 1) for t in self)
        before, after, tokens = layout.before, layout.after, layout.tokens
        if not before and not after:
            return Blocks(order, bounds)

        def run(first: int, last: int) -> Tensor:
            return torch.arange(first, last, dtype=torch.int32, device=order.device).expand(
                *order.shape[:2], -1
            )

        order = torch.cat([run(0, before), order + before, run(tokens - after, tokens)], -1)
        bounds = pad(bounds + before, (1 if before else 0, 0), value=0)
        return Blocks(order, pad(bounds, (0, 1 if after else 0), value=tokens))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMethod(VideoMethod):
    """A method that cuts queries and keys into blocks, and selects blocks of keys at every call.

    With the mean query q_i and the mean key k_j of blocks, and |K_j| keys in block j, it estimates the attention as

        P_ij = |K_j| exp(s q_i . k_j) / sum over j' of |K_j'| exp(s q_i . k_j')

    A block of queries reads the blocks of keys with the largest P until their sum passes `top_p`, never fewer than
    the share `min_kv_ratio` of them. With the linear far field it also reads every block with a gain above
    `min_gain` (`kernels.far_field.virtual_keys.gains`), or as many blocks as `max_error` needs
    (`kernels.far_field.error_target`).
    """

    top_p: float | None = None
    """The estimated attention mass, in (0, 1], that every block of queries keeps at least. 1 keeps
    everything, None sets no limit."""
    min_kv_ratio: float = 0.03
    """The share of the key blocks, in [0, 1], that every block of queries keeps at least."""
    max_error: float | None = None
    """With the linear far field, the largest relative error of an attention's output, in (0, 1): the root mean
    square over all tokens and heads. Every call reads as much as it needs, by the gain of blocks and by the error
    of a few rows that earlier calls computed exactly. It takes the place of `min_gain` and `top_p`. None sets
    no limit."""
    min_gain: float | None = 0.02
    """With the linear far field, a block of queries also keeps every block of keys with a larger gain. The
    gain is the relative squared error of the output that reading the block saves, as estimated, divided by
    the block's share of the keys. A smaller value reads more: 0.003, 0.02 and 0.1 read some 27, 18 and 13 %
    in a small trained model. Random weights make attention sharp without structure; there it reads nearly
    everything. None sets no limit."""

    dense_steps: ClassVar[int | float] = 0.2
    dense_layers: ClassVar[int | float] = 0.03
    far_field: ClassVar[str] = "linear"
    otherwise: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "drop": {"top_p": 0.9, "min_kv_ratio": 0.1, "min_gain": None},
        "mean": {"top_p": 0.5, "min_kv_ratio": 0.1, "min_gain": None},
    }

    def __post_init__(self) -> None:
        top_p = None if self.top_p is None else check_share("top_p", self.top_p, zero=False)
        object.__setattr__(self, "top_p", top_p)
        object.__setattr__(self, "min_kv_ratio", check_share("min_kv_ratio", self.min_kv_ratio, zero=True))
        object.__setattr__(self, "min_gain", check_gain(self.min_gain))
        if self.max_error is not None:
            object.__setattr__(self, "max_error", check_error(self.max_error))
            object.__setattr__(self, "min_gain", None)
            if self.top_p is not None:
                raise OptionError(
                    f"max_error takes the place of top_p, got both: leave out top_p={self.top_p}"
                )

    def choose(self, tokens: Tokens, query: Side, key: Side) -> "Selection":
        """Select among these blocks of the sequence."""
        sizes = key.sizes if tokens.key_bias is None else key_counts(tokens, key)
        counts, indices, kept = top_p_blocks(
            query.centroids.float(),
            key.centroids.float(),
            sizes,
            scale=tokens.scale,
            top_p=self.top_p or 0.0,
            min_blocks=floor_blocks(self.min_kv_ratio, key.centroids.shape[2]),
            provider=tokens.provider,
        )
        return Selection(
            table_around(tokens.layout, query, key, counts, indices), kept, min_gain=self.min_gain
        )


def table_around(layout: TokenLayout, query: Side, key: Side, counts: Tensor, indices: Tensor) -> BlockTable:
    """The table in which video queries read listed blocks of video keys, and other tokens see and are seen by
    everything.

    Args:
        counts: [B, H, Nq] int32, the number of blocks that each block of video queries reads.
        indices: [B, H, Nq, Nk] int32, a permutation of all blocks; those that are read come first.
    """
    before, after = int(layout.before > 0), int(layout.after > 0)
    columns = indices.shape[-1] + before + after
    if before or after:
        others = [0] * before + [columns - 1] * after
        first = [torch.full_like(indices[..., :1], other) for other in others]
        indices = torch.cat([*first, indices + before], -1)
        every = torch.arange(columns, dtype=torch.int32, device=indices.device)
        every = every.expand(*indices.shape[:2], 1, -1)
        indices = torch.cat([*[every] * before, indices, *[every] * after], 2)
        counts = pad(counts + before + after, (before, after), value=columns)
    return BlockTable(
        q_order=query.order,
        q_bounds=query.bounds,
        kv_order=key.order,
        kv_bounds=key.bounds,
        kv_num_blocks=counts,
        kv_indices=indices,
    )


def key_counts(tokens: Tokens, key: Side) -> Tensor:
    """[B|1, Hkv|1, Nk] int32: the keys in each block of the video. A key with a bias counts as
    exp(bias - largest bias)."""
    assert tokens.key_bias is not None
    layout, heads = tokens.layout, tokens.key.shape[1]
    before, after = layout.before, layout.after
    bias = tokens.key_bias[..., before : layout.tokens - after].float()
    weight = (bias - bias.amax(-1, keepdim=True)).exp().nan_to_num()
    if weight.shape[1] > 1:  # a bias for each query head
        weight = weight.unflatten(1, (heads, -1)).amax(2)
    # Query heads that share a key head have its blocks.
    order, bounds = (t[:, :: max(1, t.shape[1] // heads)].long() for t in (key.order, key.bounds))
    order = order[..., before : layout.tokens - after] - before
    first = int(before > 0)
    bounds = bounds[..., first : bounds.shape[-1] - int(after > 0)] - before
    lead = torch.broadcast_shapes(weight.shape[:2], order.shape[:2])
    order, bounds = (t.expand(*lead, -1) for t in (order, bounds))
    sums = pad(weight.expand(*lead, -1).gather(-1, order).cumsum(-1, dtype=torch.float64), (1, 0))
    return sums.gather(-1, bounds).diff(dim=-1).round().int()


def check_share(name: str, value: object, *, zero: bool) -> float:
    """`value` as a float in (0, 1], or in [0, 1] where zero is allowed; raises OptionError if it is not."""
    number = share(value)
    if number is None or (number == 0 and not zero):
        raise OptionError(f"{name} must be a number in {'[' if zero else '('}0, 1], got {value!r}")
    return number


def check_gain(value: object) -> float | None:
    """`value` as a float of at least 0, or None; raises OptionError if it is neither."""
    if value is None:
        return None
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 <= number < math.inf:
        raise OptionError(f"min_gain must be a number of at least 0, or None, got {value!r}")
    return number


def check_error(value: object) -> float:
    """`value` as a float above 0 and below 1; raises OptionError if it is not."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 < number < 1:
        raise OptionError(
            f"max_error must be a number above 0 and below 1, or None, got {value!r}: 0.1 allows the output of "
            "an attention a tenth of its own size; for exact attention take method='dense'"
        )
    return number


def check_count(name: str, value: object, least: int = 1) -> int:
    """`value` as an int of at least `least`; raises OptionError if it is not."""
    count = integer(value)
    if count is None or count < least:
        raise OptionError(f"{name} must be an integer of at least {least}, got {value!r}")
    return count


def check_seed(value: object) -> int:
    """`value` as a seed of torch's generators; raises OptionError if it is not."""
    seed = check_count("seed", value, 0)
    if seed >= 2**64:
        raise OptionError(f"seed must be below 2**64, got {seed}")
    return seed


def floor_blocks(min_kv_ratio: float, blocks: int) -> int:
    """The fewest blocks that a row may keep: `min_kv_ratio * blocks`, rounded up; at least one."""
    return max(1, math.ceil(min_kv_ratio * blocks - 1e-9))
