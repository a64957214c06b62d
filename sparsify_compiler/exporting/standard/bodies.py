"""The computation of a node in standard operators."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify_compiler.exporting.standard.cube_blocks import CubeBlocks, tokens_of_blocks
from sparsify_compiler.exporting.standard.operations import attention, of_heads, take
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.table import BlockTable


def merges(plan: AttentionPlan) -> bool:
    """Whether a far field is merged with the output of the node, for which the node has a second output, lse."""
    return plan.far_field != "drop"


class Body(nn.Module):
    """The computation of a node in standard operators."""

    def __init__(self, scale: float, lse: bool) -> None:
        """Args:
        lse: whether to compute it: no runtime removes it from a function whose caller does not read it.
        """
        super().__init__()
        self.scale, self.lse = scale, lse

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`operations.attention` with the scale of the site, and with lse where it is computed."""
        return attention(query, key, value, bias, self.scale, lse=self.lse)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        q_bounds: Tensor,
        kv_bounds: Tensor,
        kv_num_blocks: Tensor,
        kv_indices: Tensor,
        q_order: Tensor | None,
        kv_order: Tensor | None,
        key_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, lse), as `kernels.attention` returns them; lse is None unless it is computed."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Rows:
    """Blocks of queries of one size that read one number of keys, as places in a sequence."""

    queries: Tensor
    """[n, tokens] int64"""
    keys: Tensor
    """[n, tokens] int64"""


class RowsBody(Body):
    """Attention under a table that is known beforehand. Rows of the table of equal sizes are one batched product.

    Where each head has a table of its own, the heads' sequences are one long sequence.
    """

    places: Tensor

    def __init__(self, table: BlockTable, scale: float) -> None:
        super().__init__(scale, lse=False)
        self._per_head = table.kv_indices.shape[1] > 1
        rows = _rows(table)
        self._groups = len(rows)
        for place, one in enumerate(rows):
            self.register_buffer(f"queries_{place}", one.queries, persistent=False)
            self.register_buffer(f"keys_{place}", one.keys, persistent=False)
        order = torch.cat([one.queries.flatten() for one in rows])
        self.register_buffer("places", order.argsort(), persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        key_bias, heads = rest[-1], query.shape[1]
        key, value = (of_heads(tensor, heads) for tensor in (key, value))
        if self._per_head:
            query, key, value = (t.flatten(1, 2).unsqueeze(1) for t in (query, key, value))
            key_bias = (
                key_bias if key_bias is None else key_bias.expand(-1, heads, -1).flatten(1).unsqueeze(1)
            )
        outs = []
        for place in range(self._groups):
            rows, keys = take(query, getattr(self, f"queries_{place}")), getattr(self, f"keys_{place}")
            bias = None if key_bias is None else take(key_bias, keys).unsqueeze(3)
            # All keys are taken too: a copy is faster than the transpose that runtimes make of keys as they lie.
            out, _ = self.attend(rows, take(key, keys), take(value, keys), bias)
            outs.append(out.flatten(2, 3))
        out = torch.cat(outs, 2).index_select(2, self.places)
        return out.squeeze(1).unflatten(1, (heads, -1)) if self._per_head else out, None


def _rows(table: BlockTable) -> list[_Rows]:
    """The rows of a table of one batch, by size; queries that read the same keys are one row."""
    heads = table.kv_indices.shape[1]
    found: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
    tokens = int(table.kv_bounds[0, 0, -1])
    for head in range(heads):
        queries, keys = (
            tokens_of_blocks(order, bounds, head)
            for order, bounds in ((table.q_order, table.q_bounds), (table.kv_order, table.kv_bounds))
        )
        merged: dict[tuple[int, ...], list[Tensor]] = {}
        for row, members in enumerate(queries):
            count = int(table.kv_num_blocks[0, head, row])
            listed = tuple(sorted(table.kv_indices[0, head, row, :count].tolist()))
            merged.setdefault(listed, []).append(members)
        for listed, parts in merged.items():
            read = torch.cat([keys[block] for block in listed]).sort().values + head * tokens
            asks = torch.cat(parts) + head * tokens
            if len(asks):
                group = found.setdefault((len(asks), len(read)), ([], []))
                group[0].append(asks)
                group[1].append(read)
    return [_Rows(torch.stack(asks), torch.stack(read)) for asks, read in found.values()]


class CubesBody(Body):
    """Attention in which blocks of video queries read K blocks of video keys, which the table lists, and all other
    tokens; other queries read everything."""

    others: Tensor
    """The tokens that are none of the video's."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__(plan.site.scale, merges(plan))
        self.blocks, layout = CubeBlocks(plan), plan.layout
        tokens = torch.arange(layout.tokens)
        last = layout.tokens - layout.after
        self.before = layout.before
        self.register_buffer("others", torch.cat([tokens[: layout.before], tokens[last:]]), persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        blocks, key_bias, indices = self.blocks, rest[-1], rest[3]
        assert indices is not None
        key, value = (of_heads(tensor, query.shape[1]) for tensor in (key, value))
        row, column = int(blocks.layout.before > 0), blocks.others
        chosen = indices[:, :, row : row + len(blocks.q_tokens), column : column + blocks.read].long() - row
        out, lse = self._video(query, key, value, key_bias, chosen)
        if not len(self.others):
            return out, lse
        bias = None if key_bias is None else key_bias.unsqueeze(2)
        more, more_lse = self.attend(query.index_select(2, self.others), key, value, bias)
        out = torch.cat([more[:, :, : self.before], out, more[:, :, self.before :]], 2)
        if lse is None or more_lse is None:
            return out, None
        return out, torch.cat([more_lse[:, :, : self.before], lse, more_lse[:, :, self.before :]], 2)

    def _video(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, chosen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """(out, lse) of the video's queries. `chosen`: [B, H, Nq, K] int64, the blocks of keys that they read."""
        blocks = self.blocks
        batch, heads, rows, _ = chosen.shape
        first = torch.arange(batch * heads).reshape(batch, heads, 1, 1) * len(blocks.kv_tokens)
        places = (chosen + first).flatten()

        def gathered(tensor: Tensor) -> Tensor:
            """[B, H, Nq, keys, D] from [B, H, S, D]."""
            width = tensor.shape[-1]
            near = take(tensor, blocks.kv_tokens).reshape(-1, blocks.kv_tokens.shape[1] * width)
            near = near.index_select(0, places).reshape(batch, heads, rows, -1, width)
            if not len(self.others):
                return near
            others = tensor.index_select(2, self.others).unsqueeze(2).expand(-1, -1, rows, -1, -1)
            return torch.cat([others, near], 3)

        bias = None
        if key_bias is not None or blocks.is_cut:
            least = query.new_full((1, 1, 1), torch.finfo(query.dtype).min)
            of_key = query.new_zeros(1, 1, key.shape[2]) if key_bias is None else key_bias.to(query.dtype)
            of_block = torch.where(blocks.kv_real, take(of_key, blocks.kv_tokens), least)
            of_block = of_block.expand(batch, heads, -1, -1).reshape(-1, blocks.kv_tokens.shape[1])
            bias = of_block.index_select(0, places).reshape(batch, heads, rows, 1, -1)
            if len(self.others):
                of_others = of_key.index_select(2, self.others).expand(batch, heads, -1)
                bias = torch.cat([of_others[:, :, None, None].expand(-1, -1, rows, -1, -1), bias], 4)
        out, lse = self.attend(take(query, blocks.q_tokens), gathered(key), gathered(value), bias)
        return blocks.in_sequence(out), None if lse is None else blocks.in_sequence(lse)


def body_of(plan: AttentionPlan) -> Body:
    """The body of the node of a site."""
    method = plan.settings
    if isinstance(method, StaticMethod):
        return RowsBody(method.table(plan.layout), plan.site.scale)
    return CubesBody(plan)
