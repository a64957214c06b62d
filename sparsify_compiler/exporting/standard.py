"""Sparse attention in standard operators: gathers, matrix products and softmax.

A site is a selection, one node that attends under a table, and the far field:

    table      = constants, or chosen by the means of blocks
    out, lse   = sparsify::BlockSparseAttention(query, key, value, *table, key_bias)
    out        = out, merged with a virtual key for each block that is not read (`mean`)

The node has a body in standard operators (`RowsBody`, `CubesBody`), so a runtime needs nothing of ours. A library
may run a kernel in its place: the table says all that it needs. All sizes are constants, except that of the batch.
Shape letters: B batch, H heads, S tokens, D head dim, N blocks, K blocks of keys that a block of queries reads.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sparsify_compiler.errors import OptionError
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.grid import cut
from sparsify_compiler.methods.selection import Blocks, floor_blocks
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.runtime.site import GUARD_ROWS
from sparsify_compiler.table import BlockTable

_LEAST = -1e30
"""A bias that hides a key."""
_HIDDEN = -1e29

FIXED = "'top_p': None, 'min_gain': None, 'min_kv_ratio': share"
"""The options that give cubes a fixed number of blocks."""

OPERATOR = "sparsify::BlockSparseAttention"


def check(plan: AttentionPlan) -> None:
    """Raise OptionError unless a site can be written in standard operators of constant sizes."""
    method, name = plan.settings, plan.site.name
    if method is None or isinstance(method, StaticMethod):
        if plan.far_field != "drop":
            raise OptionError(
                f"attention {name} has far_field={plan.far_field!r} with method {plan.method!r}, which ONNX does "
                "not have: take 'drop'"
            )
        return
    if not isinstance(method, Cubes):
        clusters = plan.method in ("svg2", "keys")
        slower = (
            " its k-means takes longer in standard operators than it saves"
            if clusters
            else " its choice of single keys has no constant sizes"
        )
        raise OptionError(
            f"attention {name} has method {plan.method!r}, which ONNX does not have:{slower}. Take 'tile', 'sta', "
            f"or 'cubes' with {{{FIXED}}}; or format='aoti', which has every method"
        )
    if method.top_p is not None or method.min_gain is not None:
        raise OptionError(
            f"attention {name} has method 'cubes' without a fixed number of blocks, and all sizes in ONNX are "
            f"fixed: give options={{'method': 'cubes', {FIXED}}}"
        )
    if plan.far_field not in ("drop", "mean"):
        raise OptionError(
            f"attention {name} has far_field={plan.far_field!r}, which ONNX does not have: take "
            f"{' or '.join(repr(one) for one in FAR_FIELDS[:2])}"
        )


class Kind(NamedTuple):
    """An input of a node."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    """None for the size of the batch."""

    def example(self) -> Tensor:
        """A tensor of this kind, with a batch of 2."""
        return torch.zeros([2 if size is None else size for size in self.shape], dtype=self.dtype)


class Bodies:
    """The distinct bodies of the nodes of a model."""

    def __init__(self) -> None:
        self.found: dict[Hashable, tuple[AttentionPlan, list[Kind | None]]] = {}
        """Plan and inputs of a node with this body, by number."""

    def number(self, plan: AttentionPlan, inputs: Sequence[Tensor | None]) -> int:
        """The number of the body of a node. `inputs`: those of the node."""
        kinds = [
            one
            if one is None
            else Kind(one.dtype, tuple(size if isinstance(size, int) else None for size in one.shape))
            for one in inputs
        ]
        key = plan.settings, plan.layout, plan.site.scale, tuple(kinds)
        self.found.setdefault(key, (plan, kinds))
        return [*self.found].index(key)


class Attend(nn.Module):
    """One node that attends under a table."""

    def __init__(self, plan: AttentionPlan, bodies: Bodies | None = None) -> None:
        """Args:
        bodies: gets the body of the node when it is exported.
        """
        super().__init__()
        self.plan, self.bodies = plan, bodies

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Sequence[Tensor | None],
        key_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(out [B, H, S, Dv], lse [B, H, S] fp32)."""
        inputs = [query, key, value, *table, key_bias]
        if self.bodies is None:
            return body_of(self.plan)(*inputs)
        outputs = torch.onnx.ops.symbolic_multi_out(
            OPERATOR,
            inputs,
            {"scale": self.plan.site.scale, "body": self.bodies.number(self.plan, inputs)},
            dtypes=[query.dtype, torch.float32],
            shapes=[[*query.shape[:3], value.shape[3]], query.shape[:3]],
            version=1,
        )
        return outputs[0], outputs[1]


class Body(nn.Module):
    """The computation of a node in standard operators."""

    scale: float

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
    ) -> tuple[Tensor, Tensor]:
        """(out, lse), as `kernels.attention` returns them."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Rows:
    """Blocks of queries of one size that read one number of keys, as places in a sequence."""

    queries: Tensor
    """[n, tokens] int64"""
    keys: Tensor | None
    """[n, tokens] int64; None for all keys in order."""


class RowsBody(Body):
    """Attention under a table that is known beforehand. Rows of the table of equal sizes are one batched product.

    Where each head has a table of its own, the heads' sequences are one long sequence.
    """

    places: Tensor

    def __init__(self, table: BlockTable, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self._per_head = table.kv_indices.shape[1] > 1
        rows = _rows(table)
        self._all_keys = [one.keys is None for one in rows]
        for place, one in enumerate(rows):
            self.register_buffer(f"queries_{place}", one.queries, persistent=False)
            self.register_buffer(f"keys_{place}", one.keys, persistent=False)
        order = torch.cat([one.queries.flatten() for one in rows])
        self.register_buffer("places", order.argsort(), persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        key_bias, heads = rest[-1], query.shape[1]
        key, value = (_of_heads(tensor, heads) for tensor in (key, value))
        if self._per_head:
            query, key, value = (t.flatten(1, 2).unsqueeze(1) for t in (query, key, value))
            key_bias = (
                key_bias if key_bias is None else key_bias.expand(-1, heads, -1).flatten(1).unsqueeze(1)
            )
        outs, lses = [], []
        for place, all_keys in enumerate(self._all_keys):
            rows = _take(query, getattr(self, f"queries_{place}"))
            keys = getattr(self, f"keys_{place}")
            k, v = (t.unsqueeze(2) if all_keys else _take(t, keys) for t in (key, value))
            bias = None
            if key_bias is not None:
                bias = (key_bias.unsqueeze(2) if all_keys else _take(key_bias, keys)).unsqueeze(3)
            out, lse = _attend(rows, k, v, bias, self.scale)
            outs.append(out.flatten(2, 3))
            lses.append(lse.flatten(2))
        out, lse = (torch.cat(parts, 2).index_select(2, self.places) for parts in (outs, lses))
        if self._per_head:
            out, lse = (t.squeeze(1).unflatten(1, (heads, -1)) for t in (out, lse))
        return out, lse


def _rows(table: BlockTable) -> list[_Rows]:
    """The rows of a table of one batch, by size; queries that read the same keys are one row."""
    heads = table.kv_indices.shape[1]
    found: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
    tokens = int(table.kv_bounds[0, 0, -1])
    for head in range(heads):
        queries, keys = (
            _members(order, bounds, head)
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
    every = torch.arange(tokens)
    return [
        _Rows(torch.stack(asks), None if heads == 1 and read[0].equal(every) else torch.stack(read))
        for asks, read in found.values()
    ]


def _members(order: Tensor | None, bounds: Tensor, head: int) -> list[Tensor]:
    """The tokens of each block of a head."""
    own = bounds[0, head % bounds.shape[1]].tolist()
    tokens = torch.arange(own[-1]) if order is None else order[0, head % order.shape[1]].long()
    return [tokens[first:last] for first, last in pairwise(own)]


def body_of(plan: AttentionPlan) -> "Body":
    """The body of the node of a site."""
    method = plan.settings
    if isinstance(method, StaticMethod):
        return RowsBody(method.table(plan.layout), plan.site.scale)
    return CubesBody(plan)


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

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        method, layout = plan.settings, plan.layout
        assert isinstance(method, Cubes)
        assert layout.grid is not None
        self.layout = layout
        for side, cube in (("q", method.query_cube), ("kv", method.cube)):
            blocks = cut(layout.grid, cube)
            members = _members(blocks.order, blocks.bounds, 0)
            size = max(map(len, members))
            tokens = torch.stack([pad(one, (0, size - len(one))) for one in members]) + layout.before
            real = torch.stack([torch.arange(size) < len(one) for one in members])
            self.register_buffer(f"{side}_tokens", tokens, persistent=False)
            self.register_buffer(f"{side}_real", real, persistent=False)
            around = Blocks(blocks.order, blocks.bounds).among(layout, plan.site.heads)
            self.register_buffer(f"{side}_order", around.order, persistent=False)
            self.register_buffer(f"{side}_bounds", around.bounds, persistent=False)
        self.read = floor_blocks(method.min_kv_ratio, len(self.kv_tokens))
        """K"""
        self.others = int(layout.before > 0) + int(layout.after > 0)
        """The number of blocks of other tokens."""
        self.is_cut = not bool(self.kv_real.all())
        """Whether a block of keys is filled up."""

    def means(self, tensor: Tensor, side: str, weights: Tensor | None = None) -> Tensor:
        """[B, H, N, D] fp32 means of the tokens of each block, weighted by [B|1, H|1, N, tokens] if given."""
        real = getattr(self, f"{side}_real").float()
        weights = real if weights is None else weights
        rows = _take(tensor, getattr(self, f"{side}_tokens")).float()
        sums = (weights.unsqueeze(-2) @ rows).squeeze(-2)
        return sums / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def weights(self, key_bias: Tensor) -> tuple[Tensor, Tensor]:
        """exp(bias - b) of each key, 0 for those that fill up; and b [B|1, H|1, N, 1], the largest of a block."""
        bias = _take(key_bias.float().clamp(min=_LEAST), self.kv_tokens)
        bias = torch.where(self.kv_real, bias, _LEAST)
        top = bias.amax(-1, keepdim=True)
        return torch.where(bias > _HIDDEN, (bias - top).exp(), 0.0), top


class CubesBody(Body):
    """Attention in which blocks of video queries read K blocks of video keys, which the table lists, and all other
    tokens; other queries read everything."""

    others: Tensor
    """The tokens that are none of the video's."""
    places: Tensor
    """The place of each token of the video among those of all blocks."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        self.scale, self.blocks, layout = plan.site.scale, CubeBlocks(plan), plan.layout
        tokens = torch.arange(layout.tokens)
        last = layout.tokens - layout.after
        self.before = layout.before
        self.register_buffer("others", torch.cat([tokens[: layout.before], tokens[last:]]), persistent=False)
        real = self.blocks.q_real.flatten()
        places = torch.zeros(layout.tokens, dtype=torch.long)
        places[self.blocks.q_tokens.flatten()[real]] = real.nonzero()[:, 0]
        self.register_buffer("places", places[layout.before : last], persistent=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        blocks, key_bias, indices = self.blocks, rest[-1], rest[3]
        assert indices is not None
        key, value = (_of_heads(tensor, query.shape[1]) for tensor in (key, value))
        row, column = int(blocks.layout.before > 0), blocks.others
        chosen = indices[:, :, row : row + len(blocks.q_tokens), column : column + blocks.read].long() - row
        out, lse = self._video(query, key, value, key_bias, chosen)
        if not len(self.others):
            return out, lse
        bias = None if key_bias is None else key_bias.unsqueeze(2)
        more, more_lse = _attend(query.index_select(2, self.others), key, value, bias, self.scale)
        return (
            torch.cat([more[:, :, : self.before], out, more[:, :, self.before :]], 2),
            torch.cat([more_lse[:, :, : self.before], lse, more_lse[:, :, self.before :]], 2),
        )

    def _video(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the video's queries. `chosen`: [B, H, Nq, K] int64, the blocks of keys that they read."""
        blocks = self.blocks
        batch, heads, rows, _ = chosen.shape
        first = torch.arange(batch * heads).reshape(batch, heads, 1, 1) * len(blocks.kv_tokens)
        places = (chosen + first).flatten()

        def gathered(tensor: Tensor) -> Tensor:
            """[B, H, Nq, keys, D] from [B, H, S, D]."""
            width = tensor.shape[-1]
            near = _take(tensor, blocks.kv_tokens).reshape(-1, blocks.kv_tokens.shape[1] * width)
            near = near.index_select(0, places).reshape(batch, heads, rows, -1, width)
            if not len(self.others):
                return near
            others = tensor.index_select(2, self.others).unsqueeze(2).expand(-1, -1, rows, -1, -1)
            return torch.cat([others, near], 3)

        bias = None
        if key_bias is not None or blocks.is_cut:
            least = query.new_full((1, 1, 1), torch.finfo(query.dtype).min)
            of_key = query.new_zeros(1, 1, key.shape[2]) if key_bias is None else key_bias.to(query.dtype)
            of_block = torch.where(blocks.kv_real, _take(of_key, blocks.kv_tokens), least)
            of_block = of_block.expand(batch, heads, -1, -1).reshape(-1, blocks.kv_tokens.shape[1])
            bias = of_block.index_select(0, places).reshape(batch, heads, rows, 1, -1)
            if len(self.others):
                of_others = of_key.index_select(2, self.others).expand(batch, heads, -1)
                bias = torch.cat([of_others[:, :, None, None].expand(-1, -1, rows, -1, -1), bias], 4)
        out, lse = _attend(_take(query, blocks.q_tokens), gathered(key), gathered(value), bias, self.scale)
        return (
            out.flatten(2, 3).index_select(2, self.places),
            lse.flatten(2).index_select(2, self.places),
        )


class StaticSite(nn.Module):
    """A site whose table is known beforehand."""

    def __init__(self, attend: Attend, plan: AttentionPlan) -> None:
        super().__init__()
        self.attend = attend
        assert isinstance(plan.settings, StaticMethod)
        for name, tensor in plan.settings.table(plan.layout).tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
        table = [getattr(self, name) for name in BlockTable.__slots__]
        return _laid_out(self.attend(query, key, value, table, key_bias)[0])


class CubesSite(nn.Module):
    """A site of method `cubes` with a fixed number of blocks."""

    sample: Tensor
    """The tokens that are computed exactly, to decide whether the far field is used."""
    row_of_token: Tensor
    """The block of queries of each token."""
    other_columns: Tensor
    """The blocks of tokens that are none of the video's."""

    def __init__(self, attend: Attend, plan: AttentionPlan) -> None:
        super().__init__()
        self.attend, self.blocks = attend, CubeBlocks(plan)
        self.scale, self.far_field = plan.site.scale, plan.far_field
        rows = min(GUARD_ROWS, plan.layout.tokens)
        positions = (torch.arange(rows) * 2 + 1) * plan.layout.tokens // (2 * rows)
        self.register_buffer("sample", self.blocks.q_order[0, 0, positions].long(), persistent=False)
        block = (
            torch.searchsorted(self.blocks.q_bounds[0, 0], torch.arange(plan.layout.tokens), right=True) - 1
        )
        first = int(plan.layout.before > 0)
        of_token = torch.zeros(plan.layout.tokens, dtype=torch.long)
        of_token[self.blocks.q_order[0, 0].long()] = (block - first).clamp(0, len(self.blocks.q_tokens) - 1)
        self.register_buffer("row_of_token", of_token, persistent=False)
        last = len(self.blocks.kv_tokens) + self.blocks.others - 1
        columns = torch.tensor([0] * first + [last] * int(plan.layout.after > 0), dtype=torch.int64)
        self.register_buffer("other_columns", columns, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
        heads = query.shape[1]
        scores, chosen = self._choose(query, key, key_bias)
        out, lse = self.attend(query, key, value, self._table(chosen), key_bias)
        if self.far_field == "mean":
            far = self._far(query, key, value, key_bias, torch.zeros_like(scores).scatter(-1, chosen, 1.0))
            merged = self._merge(query, out, lse, *far)
            exact, _ = _attend(
                query.index_select(2, self.sample),
                _of_heads(key, heads),
                _of_heads(value, heads),
                None if key_bias is None else key_bias.unsqueeze(2),
                self.scale,
            )
            with_far, without = (
                (one.index_select(2, self.sample).float() - exact.float()).square().sum((2, 3), keepdim=True)
                for one in (merged, out)
            )
            out = torch.where(with_far <= without, merged, out)
        return _laid_out(out)

    def _choose(self, query: Tensor, key: Tensor, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """(scores [B, H, Nq, Nk], the K largest as [B, H, Nq, K] int64)."""
        blocks, heads = self.blocks, query.shape[1]
        means = blocks.means(query, "q"), _of_heads(blocks.means(key, "kv"), heads)
        counts = blocks.kv_real.sum(-1).float()
        if key_bias is not None:
            layout = blocks.layout
            video = key_bias[..., layout.before : layout.tokens - layout.after].float().clamp(min=_LEAST)
            whole = pad((video - video.amax(-1, keepdim=True)).exp(), (layout.before, layout.after))
            counts = (_take(whole, blocks.kv_tokens) * blocks.kv_real).sum(-1).round().unsqueeze(2)
        scores = self.scale * (means[0] @ means[1].transpose(2, 3)) + counts.log()
        return scores, scores.topk(blocks.read, -1, sorted=False).indices

    def _table(self, chosen: Tensor) -> list[Tensor | None]:
        """The tensors of the table, in the order of the op's arguments."""
        blocks, layout = self.blocks, self.blocks.layout
        before, after = int(layout.before > 0), int(layout.after > 0)
        columns = len(blocks.kv_tokens) + blocks.others
        lead = chosen.shape[:3]
        rows = torch.cat([self.other_columns.expand(*lead, -1), chosen + before], -1)
        counts = torch.full((1, 1, lead[2]), rows.shape[-1], dtype=torch.int32)
        if blocks.others:  # other tokens read all blocks
            every = torch.arange(columns).expand(*lead[:2], 1, -1)
            rows = pad(rows, (0, columns - rows.shape[-1]))
            rows = torch.cat([every] * before + [rows] + [every] * after, 2)
            counts = pad(counts, (before, after), value=columns)
        return [blocks.q_bounds, blocks.kv_bounds, counts, rows.int(), blocks.q_order, blocks.kv_order]

    def _far(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, listed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(keys [B, H, N, D], values [B, H, N, Dv], biases [B, H, Nq, N]) of the virtual keys."""
        blocks, heads = self.blocks, query.shape[1]
        weights, log_weight = None, blocks.kv_real.sum(-1).float().log()
        if key_bias is not None:
            weights, top = blocks.weights(key_bias)
            total = weights.sum(-1)
            log_weight = torch.where(total > 0, total.log() + top.squeeze(-1), _LEAST).unsqueeze(2)
        means = (_of_heads(blocks.means(one, "kv", weights), heads).to(query.dtype) for one in (key, value))
        return *means, torch.where(listed > 0, _LEAST, log_weight)  # type: ignore[return-value]

    def _merge(
        self, query: Tensor, out: Tensor, lse: Tensor, far_key: Tensor, far_value: Tensor, far_bias: Tensor
    ) -> Tensor:
        """`out` with the virtual keys: the near field counts as one key of score `lse` and value `out`."""
        scores = ((query * self.scale) @ far_key.transpose(2, 3)).float() + far_bias.index_select(
            2, self.row_of_token
        )
        shares = torch.cat([lse.unsqueeze(-1), scores], -1).softmax(-1)
        layout = self.blocks.layout
        far = (shares[..., 1:].to(out.dtype) @ far_value).float()
        merged = (shares[..., :1] * out.float() + far).to(out.dtype)
        last = layout.tokens - layout.after
        return torch.cat(
            [out[:, :, : layout.before], merged[:, :, layout.before : last], out[:, :, last:]], 2
        )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse fp32) of [..., queries, D] and [..., keys, D]; `bias` [..., 1, keys] is added to the scores.

    Where all keys are hidden, out is 0 and lse is -inf.
    """
    scores = (query * scale) @ key.transpose(-1, -2)
    if bias is not None:
        least = torch.finfo(query.dtype).min / 2
        bias = bias.to(query.dtype).clamp(min=least)
        scores = scores + bias
    shares = scores.softmax(-1)
    out = shares @ value
    lse = scores.amax(-1).float() - shares.amax(-1).float().log()
    if bias is not None:
        hidden = bias.amax(-1, keepdim=True) <= least
        out = torch.where(hidden, 0.0, out)
        lse = torch.where(hidden.squeeze(-1), -torch.inf, lse)
    return out, lse


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """[B, H, N, n, ...] from [B, H, S, ...], for places [N, n]."""
    return tensor.index_select(2, places.flatten()).unflatten(2, places.shape)


def _of_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, G, ...] repeated to `heads`."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _laid_out(out: Tensor) -> Tensor:
    """The output in memory as [B, S, H, D], as sites return it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
