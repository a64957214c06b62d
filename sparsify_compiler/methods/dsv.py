"""Method `dsv`: dynamic sparsity that is learnt while the model trains, DSV (arXiv 2502.07590, ASPLOS '26).

The queries of a small cube of the video attend alike, so they share one choice of keys. Which keys they will
attend to is foretold by a low-rank predictor (`predictor.py`), and the K keys to which they are foretold to attend
most are read, key by key: blocks of one token. The paper asks the query in the middle of a cube. In sharp heads
each query attends to places of its own, which are lost so: hence here all of them are asked. K differs by head.

Training has two stages (`training/dsv.py`): dense while the predictor learns from what it sees, then sparse where
that pays. Tokens outside the grid (text, references) see everything and are seen by everything.
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
from sparsify_compiler.methods.base import VideoMethod
from sparsify_compiler.methods.grid import Cube, check_cube, cut, middle_of_token
from sparsify_compiler.methods.selection import Selection, State, Tokens, check_count, check_share
from sparsify_compiler.methods.single_keys import (
    check_budget,
    check_fits,
    far_cubes,
    keys_of,
    room,
    share_of,
    single_key_table,
    unread,
)
from sparsify_compiler.plan import AttentionSite, TokenLayout

GROUPS: tuple[Cube, ...] = ((2, 4, 4), (2, 2, 2), (1, 2, 2), (1, 1, 1))
"""Cubes of queries to choose among, largest first; each divides the one before."""

RANK = 16
"""Where neither an option nor a file says otherwise."""

LOSS_ROWS = 64
"""One query in so many is learnt from; at most four times as many queries in all."""

OBSERVED = ("learnt", "loss", "profiled", "critical")
"""Rows of what a site observes, for each head: sums, and over how many calls; then, of each candidate group,
`missed` with each of the predictor's `SHARES`, and `overlap` and `kept` of all."""
CHOSEN_BY = ("all", "middle")
"""The queries of a group that may choose its keys; the first where neither an option nor a file says otherwise."""


class Choice(NamedTuple):
    """What training settles for a site."""

    group: Cube
    most: float
    """Of the shares of its sparse heads, the largest, rounded up to a power of two: programs differ by it."""
    chosen_by: str
    """The option, for the file that the trainer writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dsv(VideoMethod):
    """Options of the method."""

    rank: int | None = None
    """The dimension in which the predictor compares queries and keys, from 1 to the head dim, where it is
    exact. None takes 16, or the rank in the predictor's file."""
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
        """With a rank, and with what the predictor's file says, where there is one."""
        check_fits(self.kv_budget, layout)
        if self.predictor is None:
            rank = self.rank or RANK
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
        """Whether what it reads is still to be learnt."""
        return self.predictor is None

    def known_as(self, names: Sequence[str]) -> Mapping[str, str]:
        """Site -> its name in the predictor's file; empty where it is still to be learnt."""
        return {} if self.predictor is None else predictor.names_in(self.predictor, names)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedDsv(Dsv):
    """The options with a rank, and with a choice of voters. `settle` adds the choices of training."""

    rank: int
    chosen_by: str

    @property
    def groups(self) -> tuple[Cube, ...]:
        """The cubes of queries to choose among."""
        return GROUPS if self.query_group is None else (self.query_group,)

    def settle(self, choice: Choice | None) -> "FittedDsv":
        """With what training chose for a site."""
        if choice is None:
            return replace(self, query_group=self.groups[0])
        return replace(self, query_group=choice.group, kv_budget=choice.most)

    def constants(self, layout: TokenLayout) -> dict[str, Tensor]:
        """Order and bounds of the cubes of queries, [1, 1, V] and [1, 1, N+1] int32; who chooses for them: the
        tokens [Q] int64, one of each cube; or all, and then as [N+1] int32 where those of each begin; and
        `far_cubes`."""
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
        """Nothing is forgotten with a video."""
        return {}

    def trained(self, site: AttentionSite, layout: TokenLayout) -> dict[str, Tensor]:
        """What training changes, and what it starts from."""
        if self.predictor is not None:
            trained = predictor.load_predictor(self.predictor, site)
            weights, shares = trained.weights, trained.shares
            if self.kv_budget is not None:
                # As given; or what `fit` made room for, which is no less than the share of any sparse head.
                most = share_of(self.kv_budget, layout.video_tokens)
                shares = torch.where(shares < 1, shares.clamp(max=most), shares)
        else:
            weights = predictor.initial_weights(site.heads + site.kv_heads, site.head_dim, self.rank)
            shares = torch.ones(site.heads, dtype=torch.float32)
        return {"weights": weights, "shares": shares}

    def observed(self, site: AttentionSite) -> dict[str, Tensor]:
        """What `learn` writes, before anything was seen."""
        rows = len(OBSERVED) + (len(predictor.SHARES) + 2) * len(self.groups)
        shapes = {
            "gradients": (site.heads + site.kv_heads, site.head_dim, self.rank),
            "observed": (rows, site.heads),
        }
        return {name: torch.zeros(shape, dtype=torch.float32) for name, shape in shapes.items()}

    def observe(self, tokens: Tokens, state: State, **tensors: Tensor) -> tuple[Tensor, ...]:
        """Nothing is remembered of a dense step."""
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
        """Gradients of the predictor and observations, with those of this call added.

        Args:
            signal: [3] int64 on the CPU: whether to learn, whether to profile, and a number that changes.
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
        """What this call reads. A head whose share is 1 reads everything, as one block."""
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
            width=self.width(video),
            scale=tokens.scale,
            key_bias=None if bias is None else bias[..., layout.before : layout.tokens - layout.after],
            provider=tokens.provider,
        )
        table = single_key_table(layout, q_order, q_bounds, counts, indices, is_dense)
        kept = tokens.query.new_full((1, 1, 1), torch.nan)
        left = unread(tokens, counts, indices, is_dense, **far)
        return Selection(table, kept, whole=False, far_blocks=left), ()

    def width(self, video: int) -> int:
        """Keys that a row of the table has room for, a power of two where the video allows."""
        return room(keys_of(self.kv_budget or 1, video))


def most_share(most: float) -> float:
    """A share rounded up to a power of two."""
    return 2.0 ** math.ceil(math.log2(most)) if most > 0 else 2.0**-20
