"""Method `dsv`: dynamic sparsity that is learned while the model trains, DSV (arXiv 2502.07590, ASPLOS '26).

The queries of a small cube of the video attend alike, so they share one choice of keys. A low-rank predictor
(`predictor.py`) predicts their attention, and the K keys with the largest predicted attention are read, key by key:
blocks of one token. In the paper the query in the middle of a cube chooses. In sharp heads each query attends to
places of its own, and that choice loses them; so here all queries of a cube choose. K differs by head.

Training has two stages (`training/dsv.py`): attention is dense while the predictor learns from queries and keys;
then heads become sparse where that saves time. Tokens outside the grid (text, references) see everything and are
seen by everything.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sparsify_compiler.errors import OptionError
from sparsify_compiler.kernels.prediction import top_k_keys
from sparsify_compiler.methods import predictor
from sparsify_compiler.methods.grid import Cube, check_cube, cut, middle_of_token
from sparsify_compiler.methods.selection import Selection, State, Tokens, check_count, check_share
from sparsify_compiler.methods.single_keys import (
    SingleKeyMethod,
    check_budget,
    check_fits,
    density_of,
    far_cubes,
    keys_of,
    others,
    room,
    share_of,
    single_key_table,
    unread,
)
from sparsify_compiler.plan import AttentionSite, TokenLayout

GROUPS: tuple[Cube, ...] = ((2, 4, 4), (2, 2, 2), (1, 2, 2), (1, 1, 1))
"""The candidate cubes of queries, largest first; each divides the previous one."""

RANK = 16
"""The rank where neither an option nor a file sets one."""

LOSS_ROWS = 64
"""The predictor learns from one query in 64, and from at most 256 queries."""

OBSERVED = ("learned", "loss", "profiled", "critical")
"""The first rows of a site's observations, for each head: the number of calls that the predictor learned from, the
sum of their losses, the number of calls that were profiled, the sum of critical shares. Then come sums for the
candidate groups: `missed`, a row for each of the predictor's `SHARES`; then `overlap`, then `kept`."""
CHOSEN_BY = ("all", "middle")
"""The queries of a group that can choose its keys; the first where neither an option nor a file sets them."""


class Choice(NamedTuple):
    """The choices of training for a site."""

    group: Cube
    most: float
    """The largest share of its sparse heads, rounded up to a power of two: programs differ by it."""
    chosen_by: str
    """The option, for the file that the trainer writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dsv(SingleKeyMethod):
    """Options of the method."""

    rank: int | None = None
    """The dimension in which the predictor compares queries and keys, from 1 to the head dim, where it is
    exact. None takes 16, at most the head dim, or the rank in the predictor's file."""
    mass: float = 0.9
    """The attention mass that a head keeps, in (0, 1]. The mass that it misses, 1 - `mass`, is a root mean
    square over the queries."""
    query_group: Cube | None = None
    """(frames, rows, columns) of the queries that share a choice of keys. None takes the cube that training
    found."""
    chosen_by: str | None = None
    """The queries whose predicted attention chooses the keys of a group. `all` adds up the attention of all
    its queries. `middle` takes the query in the middle, as in the paper; it costs less and loses keys that
    sharp heads need. None takes `all`, or the choice in the predictor's file."""
    kv_budget: int | float | None = None
    """The keys that every head reads: an integer, or a share of the video tokens. None gives each head as
    many as it needs for `mass`. With a predictor's file it limits its sparse heads."""
    predictor: Path | None = None
    """The file of a trained predictor, for inference. `DSVTrainer.save_predictor` writes it."""

    name: ClassVar[str] = "dsv"

    def __post_init__(self) -> None:
        if self.rank is not None:
            object.__setattr__(self, "rank", check_count("rank", self.rank))
        object.__setattr__(self, "mass", check_share("mass", self.mass, zero=False))
        if self.query_group is not None:
            object.__setattr__(self, "query_group", check_cube("query_group", self.query_group))
        if self.chosen_by not in (None, *CHOSEN_BY):
            raise OptionError(f"chosen_by must be one of {', '.join(CHOSEN_BY)}, got {self.chosen_by!r}")
        if self.chosen_by is None and self.predictor is None:
            object.__setattr__(self, "chosen_by", CHOSEN_BY[0])
        if (budget := self.kv_budget) is not None:
            object.__setattr__(self, "kv_budget", check_budget(budget))
        if self.predictor is not None:
            if not isinstance(self.predictor, (str, Path)):
                raise OptionError(f"predictor must be the path of a file, got {self.predictor!r}")
            object.__setattr__(self, "predictor", Path(self.predictor))

    def fit(self, site: AttentionSite, layout: TokenLayout) -> "FittedDsv":
        """Fill in a rank, and the values in the predictor's file where there is one."""
        check_fits(self.kv_budget, layout)
        if self.predictor is None:
            rank = self.rank or min(RANK, site.head_dim)
            if rank > site.head_dim:
                raise OptionError(f"rank must be at most the head dim {site.head_dim}, got {rank}")
            return self.filled(FittedDsv, rank=rank)
        trained = predictor.load_predictor(self.predictor, site)
        if self.rank not in (None, trained.weights.shape[-1]):
            raise OptionError(
                f"rank must be that of the predictor's file, {trained.weights.shape[-1]}, or left out, "
                f"got {self.rank}: for another rank train another predictor with DSVTrainer"
            )
        sparse = trained.shares[trained.shares < 1]
        most = float(sparse.max()) if sparse.numel() else 0.0
        return self.filled(
            FittedDsv,
            rank=trained.weights.shape[-1],
            query_group=self.query_group or trained.group,
            chosen_by=self.chosen_by or trained.chosen_by,
            kv_budget=self.kv_budget or most_share(most),
        )

    @property
    def learns(self) -> bool:
        """Whether training still writes the predictor; false with a predictor's file."""
        return self.predictor is None

    def known_as(self, names: Sequence[str]) -> Mapping[str, str]:
        """Site -> its name in the predictor's file; empty without a file."""
        return {} if self.predictor is None else predictor.names_in(self.predictor, names)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedDsv(Dsv):
    """The options, with a rank and the queries that choose. `settle` adds the choices of training."""

    rank: int
    chosen_by: str

    @property
    def groups(self) -> tuple[Cube, ...]:
        """The candidate cubes of queries."""
        return GROUPS if self.query_group is None else (self.query_group,)

    def settle(self, choice: Choice | None) -> "FittedDsv":
        """Fill in the choices of training for a site."""
        if choice is None:
            return replace(self, query_group=self.groups[0])
        return replace(self, query_group=choice.group, kv_budget=choice.most)

    def constants(self, layout: TokenLayout) -> dict[str, Tensor]:
        """Order and bounds of the cubes of queries, [1, 1, V] and [1, 1, N+1] int32; `voters`, the tokens that
        choose, [Q] int64: one for each cube, or all, and then `voter_bounds`, [N+1] int32, the first of each cube;
        and `far_cubes`."""
        assert layout.grid is not None
        group = self.groups[0]
        order, bounds = cut(layout.grid, group)
        voters, begins = order[0, 0].long(), bounds[0, 0]
        if self.chosen_by == "all" and math.prod(group) > 1:
            chosen_by = {"voters": voters, "voter_bounds": begins}
        else:
            chosen_by = {"voters": middle_of_token(layout.grid, group)[voters[begins[:-1].long()]]}
        return {"q_order": order, "q_bounds": bounds} | chosen_by | far_cubes(layout)

    def state(self, site: AttentionSite, layout: TokenLayout) -> dict[str, tuple[int, ...]]:
        """Empty: nothing that belongs to one video is kept."""
        return {}

    def trained(self, site: AttentionSite, layout: TokenLayout) -> dict[str, Tensor]:
        """The predictor weights and the shares of all heads, as training starts, or as in the predictor's file."""
        if self.predictor is not None:
            trained = predictor.load_predictor(self.predictor, site)
            weights, shares = trained.weights, trained.shares
            if self.kv_budget is not None:
                # The option; or the value from `fit`, which is at least the share of every sparse head.
                most = share_of(self.kv_budget, layout.video_tokens)
                shares = torch.where(shares < 1, shares.clamp(max=most), shares)
        else:
            weights = predictor.initial_weights(site.heads + site.kv_heads, site.head_dim, self.rank)
            shares = torch.ones(site.heads, dtype=torch.float32)
        return {"weights": weights, "shares": shares}

    def observed(self, site: AttentionSite) -> dict[str, Tensor]:
        """The tensors that `learn` writes, as zeros."""
        rows = len(OBSERVED) + (len(predictor.SHARES) + 2) * len(self.groups)
        shapes = {
            "gradients": (site.heads + site.kv_heads, site.head_dim, self.rank),
            "observed": (rows, site.heads),
        }
        return {name: torch.zeros(shape, dtype=torch.float32) for name, shape in shapes.items()}

    def rows_of(self, name: str, heads: Tensor, site: AttentionSite) -> tuple[int, Tensor]:
        """As `LearningMethod` says: weights and gradients have rows for query heads, then for key heads."""
        if name in ("weights", "gradients"):
            key_heads = heads // (site.heads // site.kv_heads)
            return 0, torch.cat([heads, site.heads + key_heads])
        return ("shares", "observed").index(name), heads

    def observe(self, tokens: Tokens, state: State, **tensors: Tensor) -> tuple[Tensor, ...]:
        """Empty: a dense step changes no state."""
        return ()

    def learn(
        self,
        tokens: Tokens,
        weights: Tensor,
        shares: Tensor,
        gradients: Tensor,
        observed: Tensor,
        signal: Tensor,
        **constants: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the predictor and the observations, with those of this call added.

        Args:
            signal: [3] int64 on the CPU: whether to learn, whether to profile, and a number that differs by call.
        """
        learns, profiles, turn = signal.tolist()
        gradients, observed = gradients.clone(), observed.clone()
        layout = tokens.layout
        if learns:
            query, key = tokens.video()
            stride = max(LOSS_ROWS, -(-layout.video_tokens // (4 * LOSS_ROWS)))
            rows = query[:, :, turn % min(stride, layout.video_tokens) :: stride]
            loss, step = predictor.loss_and_gradients(rows.float(), key.float(), weights)
            gradients += step
            observed[0] += 1
            observed[1] += loss
        if profiles:
            one = turn % tokens.query.shape[0]
            bias = (
                None if tokens.key_bias is None else tokens.key_bias[one % tokens.key_bias.shape[0]].float()
            )
            seen = predictor.profile(
                tokens.query[one].float(),
                tokens.key[one].float(),
                bias,
                weights,
                shares,
                layout,
                self.groups,
                chosen_by=self.chosen_by,
                mass=self.mass,
                scale=tokens.scale,
                turn=turn,
            )
            observed[2] += 1
            observed[3] += seen.critical
            observed[4:] += torch.cat([seen.missed.flatten(0, 1), seen.overlap, seen.kept])
        return gradients, observed

    def select(
        self,
        tokens: Tokens,
        state: State,
        q_order: Tensor,
        q_bounds: Tensor,
        voters: Tensor,
        weights: Tensor,
        shares: Tensor,
        voter_bounds: Tensor | None = None,
        **far: Tensor,
    ) -> tuple[Selection, tuple[Tensor, ...]]:
        """The selection of this call, and no state. A head with a share of 1 reads everything, as one block."""
        layout = tokens.layout
        query, key = tokens.video()
        heads, video = query.shape[1], layout.video_tokens
        w_query, w_key = weights.split([heads, key.shape[1]])
        is_dense = shares >= 1
        budget = predictor.key_counts(shares, video).int().masked_fill(is_dense, 0)
        bias = tokens.key_bias
        counts, indices = top_k_keys(
            query[:, :, voters].float() @ w_query,
            key.float() @ w_key,
            budget[None],
            q_bounds=voter_bounds,
            width=self.rows(layout)[1],
            scale=tokens.scale,
            key_bias=None if bias is None else bias[..., layout.before : layout.tokens - layout.after],
            provider=tokens.provider,
        )
        left = unread(tokens, counts, indices, is_dense, **far)
        density = density_of(layout, q_bounds, counts, is_dense)
        table = single_key_table(layout, q_order, q_bounds, counts, indices, is_dense)
        kept = tokens.query.new_full((1, 1, 1), torch.nan)
        return Selection(table, kept, whole=False, far_blocks=left, density=density), ()

    def width(self, video: int, others: int = 0) -> int:
        """The capacity of a row of the table, with `others` more blocks than the video's keys."""
        return room(keys_of(self.kv_budget or 1, video) + others)

    def rows(self, layout: TokenLayout) -> tuple[int, int]:
        """See `SingleKeyMethod`."""
        assert layout.grid is not None
        groups = math.prod(-(-size // edge) for size, edge in zip(layout.grid, self.groups[0], strict=True))
        return groups, self.width(layout.video_tokens, others(layout))


def most_share(most: float) -> float:
    """A share rounded up to a power of two."""
    return 2.0 ** math.ceil(math.log2(most)) if most > 0 else 2.0**-20
