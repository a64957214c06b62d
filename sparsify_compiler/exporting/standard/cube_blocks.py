"""The blocks of method `cubes` as places in the sequence, all of one size."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.grid import cut
from sparsify_compiler.methods.selection import Blocks, floor_blocks
from sparsify_compiler.plan import AttentionPlan


class CubeBlocks(nn.Module):
    """The blocks of method `cubes` as places in the sequence, filled up to one size where the grid's edges cut."""

    q_tokens: Tensor
    """[N, tokens] int64; and so on for keys."""
    kv_tokens: Tensor
    q_real: Tensor
    """[N, tokens] bool: whether it is a token of the block."""
    kv_real: Tensor
    q_order: Tensor
    """As in `BlockTable`, of the whole sequence."""
    kv_order: Tensor
    q_bounds: Tensor
    kv_bounds: Tensor
    sizes: Tensor
    """[number of blocks of keys, with those of other tokens] fp32, the number of keys of each."""
    places: Tensor
    """The place of each token of the video among those of all blocks of queries."""
    other_columns: Tensor
    """The blocks of keys of other tokens."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        method, layout = plan.settings, plan.layout
        assert isinstance(method, Cubes)
        assert layout.grid is not None
        self.layout = layout
        for side, cube in (("q", method.query_cube), ("kv", method.cube)):
            blocks = cut(layout.grid, cube)
            members = tokens_of_blocks(blocks.order, blocks.bounds, 0)
            size = max(map(len, members))
            tokens = torch.stack([pad(one, (0, size - len(one))) for one in members]) + layout.before
            real = torch.stack([torch.arange(size) < len(one) for one in members])
            self.register_buffer(f"{side}_tokens", tokens, persistent=False)
            self.register_buffer(f"{side}_real", real, persistent=False)
            around = Blocks(blocks.order, blocks.bounds).among(layout, plan.site.heads)
            self.register_buffer(f"{side}_order", around.order, persistent=False)
            self.register_buffer(f"{side}_bounds", around.bounds, persistent=False)
        places, full = torch.zeros(layout.tokens, dtype=torch.long), self.q_real.flatten()
        places[self.q_tokens.flatten()[full]] = full.nonzero()[:, 0]
        last = layout.tokens - layout.after
        self.register_buffer("places", places[layout.before : last], persistent=False)
        self.read = floor_blocks(method.min_kv_ratio, len(self.kv_tokens))
        """K"""
        self.others = int(layout.before > 0) + int(layout.after > 0)
        """The number of blocks of other tokens."""
        self.is_cut = not bool(self.kv_real.all())
        """Whether a block of keys is filled up."""
        runs = {
            "before": torch.arange(layout.before),
            "after": torch.arange(layout.tokens - layout.after, layout.tokens),
        }
        self.other_runs = {where: run for where, run in runs.items() if len(run)}
        """The other tokens before and after the video, where there are any."""
        self.register_buffer("sizes", self.kv_bounds[0, 0].diff().float(), persistent=False)
        first, last = int(layout.before > 0), len(self.kv_tokens) + self.others - 1
        columns = torch.tensor([0] * first + [last] * int(layout.after > 0), dtype=torch.int64)
        self.register_buffer("other_columns", columns, persistent=False)

    def in_sequence(self, rows: Tensor) -> Tensor:
        """[B, H, V, ...], the tokens of the video, from [B, H, Nq, tokens, ...]."""
        return rows.flatten(2, 3).index_select(2, self.places)

    def table(self, chosen: Tensor) -> list[Tensor | None]:
        """The tensors of the table, in the order of the op's arguments.

        Args:
            chosen: [B, H, Nq, K] int64, the blocks of video keys that each block of video queries reads.
        """
        before, after = int(self.layout.before > 0), int(self.layout.after > 0)
        columns = len(self.kv_tokens) + self.others
        lead = chosen.shape[:3]
        rows = torch.cat([self.other_columns.expand(*lead, -1), chosen + before], -1)
        counts = torch.full((1, 1, lead[2]), rows.shape[-1], dtype=torch.int32)
        if self.others:  # other tokens read all blocks
            every = torch.arange(columns).expand(*lead[:2], 1, -1)
            rows = pad(rows, (0, columns - rows.shape[-1]))
            rows = torch.cat([every] * before + [rows] + [every] * after, 2)
            counts = pad(counts, (before, after), value=columns)
        return [self.q_bounds, self.kv_bounds, counts, rows.int(), self.q_order, self.kv_order]


def tokens_of_blocks(order: Tensor | None, bounds: Tensor, head: int) -> list[Tensor]:
    """The tokens of each block of a head."""
    own = bounds[0, head % bounds.shape[1]].tolist()
    tokens = torch.arange(own[-1]) if order is None else order[0, head % order.shape[1]].long()
    return [tokens[first:last] for first, last in pairwise(own)]
