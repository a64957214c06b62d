"""Sparse attention in standard operators: gathers, matrix products and softmax.

A site is a selection, one node that attends under a table, and the far field:

    table      = constants, or chosen by the means of blocks
    out, lse   = sparsify::BlockSparseAttention(query, key, value, *table, key_bias)
    out        = out, merged with a virtual key for each block that is not read (`mean`, `linear`)

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
from sparsify_compiler.kernels.far_field.virtual_keys import MOST_SECOND_ORDER
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.grid import cut
from sparsify_compiler.methods.selection import Blocks, floor_blocks
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.runtime.site import JUDGED_ROWS
from sparsify_compiler.table import BlockTable

_LEAST = -1e30
"""A bias that hides a key."""
_HIDDEN = -1e29

FIXED = "'kv_budget': share"
"""The option that gives cubes a fixed number of blocks."""

REFUSED = {
    "svg2": "its k-means takes longer in standard operators than it saves",
    "keys": "its clusters of queries have no constant sizes, and to choose keys takes longer than all of 'cubes'",
}
"""Methods that have no form, with the reason."""

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
        why = REFUSED.get(plan.method, "its choice of single keys has no constant sizes")
        raise OptionError(
            f"attention {name} has method {plan.method!r}, which ONNX does not have: {why}. Take 'tile', 'sta', "
            f"or 'cubes' with {{{FIXED}}}; or format='aoti', which has every method"
        )
    if any(one is not None for one in (method.top_p, method.min_gain, method.max_error)):
        raise OptionError(
            f"attention {name} has method 'cubes' without a fixed number of blocks, and all sizes in ONNX are "
            f"fixed: give options={{'method': 'cubes', {FIXED}}}"
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
        key = plan.settings, plan.layout, plan.site.scale, merges(plan), tuple(kinds)
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
    ) -> tuple[Tensor, Tensor | None]:
        """(out [B, H, S, Dv], lse [B, H, S] fp32); lse is None if nothing is merged with the output."""
        inputs = [query, key, value, *table, key_bias]
        if self.bodies is None:
            return body_of(self.plan)(*inputs)
        kinds = [(query.dtype, [*query.shape[:3], value.shape[3]]), (torch.float32, [*query.shape[:3]])]
        kinds = kinds if merges(self.plan) else kinds[:1]
        outputs = torch.onnx.ops.symbolic_multi_out(
            OPERATOR,
            inputs,
            {"scale": self.plan.site.scale, "body": self.bodies.number(self.plan, inputs)},
            dtypes=[dtype for dtype, _ in kinds],
            shapes=[shape for _, shape in kinds],
            version=1,
        )
        return outputs[0], outputs[1] if merges(self.plan) else None


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
        """`_attend`."""
        return _attend(query, key, value, bias, self.scale, lse=self.lse)

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
        key, value = (_of_heads(tensor, heads) for tensor in (key, value))
        if self._per_head:
            query, key, value = (t.flatten(1, 2).unsqueeze(1) for t in (query, key, value))
            key_bias = (
                key_bias if key_bias is None else key_bias.expand(-1, heads, -1).flatten(1).unsqueeze(1)
            )
        outs = []
        for place in range(self._groups):
            rows, keys = _take(query, getattr(self, f"queries_{place}")), getattr(self, f"keys_{place}")
            bias = None if key_bias is None else _take(key_bias, keys).unsqueeze(3)
            # All keys are taken too: a copy is faster than the transpose that runtimes make of keys as they lie.
            out, _ = self.attend(rows, _take(key, keys), _take(value, keys), bias)
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
    return [_Rows(torch.stack(asks), torch.stack(read)) for asks, read in found.values()]


def _members(order: Tensor | None, bounds: Tensor, head: int) -> list[Tensor]:
    """The tokens of each block of a head."""
    own = bounds[0, head % bounds.shape[1]].tolist()
    tokens = torch.arange(own[-1]) if order is None else order[0, head % order.shape[1]].long()
    return [tokens[first:last] for first, last in pairwise(own)]


def body_of(plan: AttentionPlan) -> Body:
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
    places: Tensor
    """The place of each token of the video among those of all blocks of queries."""

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

    def in_sequence(self, rows: Tensor) -> Tensor:
        """[B, H, V, ...], the tokens of the video, from [B, H, Nq, tokens, ...]."""
        return rows.flatten(2, 3).index_select(2, self.places)


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
        key, value = (_of_heads(tensor, query.shape[1]) for tensor in (key, value))
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
        out, lse = self.attend(_take(query, blocks.q_tokens), gathered(key), gathered(value), bias)
        return blocks.in_sequence(out), None if lse is None else blocks.in_sequence(lse)


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


class Statistics(NamedTuple):
    """Statistics of N blocks of keys in fp32, as `kernels.statistics` has them."""

    log_weight: Tensor
    """[B|1, G|1, N]; a large negative number for blocks without visible keys."""
    key_mean: Tensor
    """[B, G, N, D]; values have Dv."""
    value_mean: Tensor
    key_variance: Tensor
    """[B, G, N, D]; empty without the linear far field, as the rest."""
    value_variance: Tensor
    covariance: Tensor
    """[B, G, N, D * Dv]"""


class CubesSite(nn.Module):
    """A site of method `cubes` with a fixed number of blocks."""

    sample: Tensor
    """The tokens of the video that are computed exactly, to decide whether the far field is used."""
    sample_places: Tensor
    """Their places among those of all blocks of queries."""
    other_columns: Tensor
    """The blocks of tokens that are none of the video's."""
    sizes: Tensor
    """The number of keys of each block that `_columns` has, fp32."""

    def __init__(self, attend: Attend, plan: AttentionPlan) -> None:
        super().__init__()
        self.attend, self.blocks, layout = attend, CubeBlocks(plan), plan.layout
        assert isinstance(plan.settings, Cubes)
        self.scale, self.far_field = plan.site.scale, plan.far_field
        self.by_gain = plan.settings.reads_by_gain(plan.far_field)
        rows, tokens = min(JUDGED_ROWS, layout.tokens), layout.tokens
        positions = (torch.arange(rows) * 2 + 1) * tokens // (2 * rows)
        sample = self.blocks.q_order[0, 0, positions].long() - layout.before
        sample = sample[
            (sample >= 0) & (sample < layout.video_tokens)
        ]  # no far field changes the other tokens
        self.register_buffer("sample", sample + layout.before, persistent=False)
        self.register_buffer("sample_places", self.blocks.places[sample], persistent=False)
        first, last = int(layout.before > 0), len(self.blocks.kv_tokens) + self.blocks.others - 1
        columns = torch.tensor([0] * first + [last] * int(layout.after > 0), dtype=torch.int64)
        self.register_buffer("other_columns", columns, persistent=False)
        runs = {"before": torch.arange(layout.before), "after": torch.arange(tokens - layout.after, tokens)}
        self._other_runs = {where: run for where, run in runs.items() if len(run)}
        sizes = self.blocks.kv_bounds[0, 0].diff().float()
        self.register_buffer("sizes", sizes, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
        rows, heads = _take(query, self.blocks.q_tokens), query.shape[1]
        if self.far_field == "drop":
            chosen = self._by_mass(rows, key, key_bias)
            return _laid_out(self.attend(query, key, value, self._table(chosen), key_bias)[0])
        found = self._statistics(key, value, key_bias, self.blocks.kv_tokens, self.blocks.kv_real)
        found = Statistics(*(_of_heads(one, heads) for one in found))
        bias = found.log_weight
        if self.far_field == "linear":
            mean_of_all = query.float().square().mean(2, keepdim=True)
            bias = bias + self._second_order(mean_of_all, found)
            scores = self._scores(rows, found, bias)
        if self.by_gain:
            chosen = self._by_gain(rows, found, scores, mean_of_all, key, value, key_bias)
        else:
            chosen = self._by_mass(rows, key, key_bias)
        out, lse = self.attend(query, key, value, self._table(chosen), key_bias)
        assert lse is not None
        near = out, lse

        bias = bias.unsqueeze(2).expand(*chosen.shape[:2], chosen.shape[2], -1)
        bias = bias.scatter(-1, chosen, _LEAST)
        scaled = rows * self.scale
        key_mean, value_mean = (one.to(query.dtype) for one in (found.key_mean, found.value_mean))
        far, far_lse = self._far(scaled, key_mean, value_mean, bias)
        term = None
        if self.far_field == "linear":
            shares = scores.scatter(-1, chosen, _LEAST).softmax(-1)
            narrow = (shares.to(query.dtype), _narrow(found.covariance, query.dtype))
            matrices = (narrow[0] @ narrow[1]).unflatten(-1, (query.shape[3], -1))
            tiny = torch.finfo(torch.float32).tiny
            limits = (shares @ found.value_variance).clamp(min=tiny).sqrt().unsqueeze(3)
            term = torch.minimum(torch.maximum((scaled @ matrices).float(), -limits), limits)
        return _laid_out(self._merged(query, key, value, key_bias, near, far, far_lse, term))

    def _by_mass(self, rows: Tensor, key: Tensor, key_bias: Tensor | None) -> Tensor:
        """[B, H, Nq, K] int64, the blocks with the largest mass, as `BlockMethod` defines it."""
        blocks = self.blocks
        means = _mean(_take(key, blocks.kv_tokens), blocks.kv_real)
        counts = blocks.kv_real.sum(-1).float()
        if key_bias is not None:
            layout = blocks.layout
            video = key_bias[..., layout.before : layout.tokens - layout.after].float().clamp(min=_LEAST)
            whole = pad((video - video.amax(-1, keepdim=True)).exp(), (layout.before, layout.after))
            counts = (_take(whole, blocks.kv_tokens) * blocks.kv_real).sum(-1).round().unsqueeze(2)
        products = _mean(rows, blocks.q_real) @ _of_heads(means, rows.shape[1]).transpose(2, 3)
        # Equal counts add nothing, so they round nothing either.
        return (
            (self.scale * products + (counts / counts.amax(-1, keepdim=True)).log())
            .topk(blocks.read, -1, sorted=False)
            .indices
        )

    def _by_gain(
        self,
        rows: Tensor,
        found: Statistics,
        scores: Tensor,
        mean_of_all: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
    ) -> Tensor:
        """[B, H, Nq, K] int64, the blocks with the largest gain, as `kernels.far_field.virtual_keys.gains`.

        The power of the output, by which gains are divided, is the same for all blocks of a row.
        """
        heads, layout = rows.shape[1], self.blocks.layout
        parts, every = [found], [scores]
        for where, run in self._other_runs.items():
            one = self._statistics(
                key, value, key_bias, run[None], torch.ones_like(run[None], dtype=torch.bool)
            )
            other = Statistics(*(_of_heads(tensor, heads) for tensor in one))
            place = 0 if where == "before" else len(parts)
            parts.insert(place, other)
            bias = other.log_weight + self._second_order(mean_of_all, other)
            every.insert(place, self._scores(rows, other, bias))
        _, _, value_mean, key_variance, value_variance, _ = (
            torch.cat(tensors, 2) for tensors in zip(*(one for one in parts), strict=True)
        )
        shares = torch.cat(every, 3).softmax(-1)
        spread = _mean(rows.float().square(), self.blocks.q_real) @ key_variance.transpose(2, 3)
        out = shares @ value_mean
        of_values = (value_mean.square() + value_variance).sum(-1).unsqueeze(2)
        apart = out.square().sum(-1, keepdim=True) - 2 * (out @ value_mean.transpose(2, 3)) + of_values
        gain = (shares * spread * self.scale**2).square() * apart.clamp(min=0) / self.sizes
        first = int(layout.before > 0)
        gain = gain[..., first : first + len(self.blocks.kv_tokens)]
        return gain.topk(self.blocks.read, -1, sorted=False).indices

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

    def _statistics(
        self, key: Tensor, value: Tensor, key_bias: Tensor | None, tokens: Tensor, real: Tensor
    ) -> Statistics:
        """Statistics of blocks of keys.

        Args:
            tokens: [N, n] int64, the keys of each block, filled up to one number.
            real: [N, n] bool, whether it is a key of the block.
        """
        weights, log_weight = real.float(), real.sum(-1).float().log()[None, None]
        if key_bias is not None:
            bias = torch.where(real, _take(key_bias.float().clamp(min=_LEAST), tokens), _LEAST)
            top = bias.amax(-1, keepdim=True)
            weights = torch.where(bias > _HIDDEN, (bias - top).exp(), 0.0)
            total = weights.sum(-1)
            log_weight = torch.where(total > 0, total.log() + top.squeeze(-1), _LEAST)
        keys, values = (_take(one, tokens).float() for one in (key, value))
        key_mean, value_mean = (_mean(one, weights) for one in (keys, values))
        if self.far_field != "linear":
            none = key_mean.new_zeros(*key_mean.shape[:3], 0)
            return Statistics(log_weight, key_mean, value_mean, none, none, none)
        keys, values = keys - key_mean.unsqueeze(3), values - value_mean.unsqueeze(3)
        share = (
            weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        ).unsqueeze(-1)
        covariance = (share * keys).transpose(3, 4) @ values
        key_variance, value_variance = (_mean(one.square(), weights) for one in (keys, values))
        return Statistics(
            log_weight, key_mean, value_mean, key_variance, value_variance, covariance.flatten(3)
        )

    def _second_order(self, mean_of_all: Tensor, found: Statistics) -> Tensor:
        """[B, H, N], the second order of the scores of virtual keys."""
        products = mean_of_all @ found.key_variance.transpose(2, 3)
        return (self.scale**2 / 2 * products.squeeze(2)).clamp(max=MOST_SECOND_ORDER)

    def _scores(self, rows: Tensor, found: Statistics, bias: Tensor) -> Tensor:
        """[B, H, Nq, N], the scores of the mean of each block of queries."""
        products = _mean(rows, self.blocks.q_real) @ found.key_mean.transpose(2, 3)
        return self.scale * products + bias.unsqueeze(2)

    def _far(self, scaled: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(out [B, H, Nq, tokens, Dv], lse [B, H, Nq, tokens]) of the virtual keys, fp32.

        Args:
            scaled: [B, H, Nq, tokens, D], the queries times the scale.
            bias: [B, H, Nq, N]
        """
        sizes = scaled.shape[2:4]
        products = scaled.flatten(2, 3) @ key.transpose(2, 3)
        scores = products.float().unflatten(2, sizes) + bias.unsqueeze(3)
        shares = scores.softmax(-1)
        out = shares.to(value.dtype).flatten(2, 3) @ value
        return out.float().unflatten(2, sizes), _lse(scores, shares)

    def _merged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        near: tuple[Tensor, Tensor],
        far: Tensor,
        far_lse: Tensor,
        term: Tensor | None,
    ) -> Tensor:
        """The output of the node, merged with the far field where that helps the head; `term`: its first order."""
        blocks, layout, heads = self.blocks, self.blocks.layout, query.shape[1]
        first, last = layout.before, layout.tokens - layout.after
        gate = None
        if len(self.sample):
            exact, _ = _attend(
                query.index_select(2, self.sample),
                _of_heads(key, heads),
                _of_heads(value, heads),
                None if key_bias is None else key_bias.unsqueeze(2),
                self.scale,
                lse=False,
            )

            def error(out: Tensor) -> Tensor:
                return (out.float() - exact.float()).square().sum((2, 3), keepdim=True)

            def sampled(rows: Tensor) -> Tensor:
                return rows.flatten(2, 3).index_select(2, self.sample_places)

            out, lse = (one.index_select(2, self.sample) for one in near)
            least = error(_merge(out, lse, sampled(far), sampled(far_lse)))
            if term is not None:
                whole = error(_merge(out, lse, sampled(far) + sampled(term), sampled(far_lse)))
                term = torch.where((whole <= least).unsqueeze(4), term, 0.0)
                least = torch.minimum(whole, least)
            gate = least <= error(out)
        far = far if term is None else far + term
        out, lse = near
        video = out[:, :, first:last]
        merged = _merge(video, lse[:, :, first:last], blocks.in_sequence(far), blocks.in_sequence(far_lse))
        merged = merged if gate is None else torch.where(gate, merged, video)
        return torch.cat([out[:, :, :first], merged, out[:, :, last:]], 2) if blocks.others else merged


def _merge(out: Tensor, lse: Tensor, far: Tensor, far_lse: Tensor) -> Tensor:
    """Near and far field, by their lse, in the dtype of `out`."""
    share = (far_lse - lse).sigmoid().unsqueeze(-1)
    return (out.float() + share * (far - out.float())).to(out.dtype)


def _mean(rows: Tensor, weights: Tensor) -> Tensor:
    """[..., N, D] fp32 means of [..., N, tokens, D], weighted by [..., N, tokens]; 0 where all weights are 0."""
    weights = weights.float()
    sums = (weights.unsqueeze(-2) @ rows.float()).squeeze(-2)
    return sums / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, clamped to its range."""
    most = torch.finfo(dtype).max
    return tensor.clamp(-most, most).to(dtype) if dtype == torch.float16 else tensor.to(dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, *, lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse fp32) of [..., queries, D] and [..., keys, D]; `bias` [..., 1, keys] is added to the scores.

    Where all keys are hidden, out is 0 and lse is -inf. Without `lse` it is None.
    """
    scores = (query * scale) @ key.transpose(-1, -2)
    if bias is not None:
        least = torch.finfo(query.dtype).min / 2
        bias = bias.to(query.dtype).clamp(min=least)
        scores = scores + bias
    shares = scores.softmax(-1)
    out = shares @ value
    weight = _lse(scores, shares) if lse else None
    if bias is not None:
        hidden = bias.amax(-1, keepdim=True) <= least
        out = torch.where(hidden, 0.0, out)
        weight = weight if weight is None else torch.where(hidden.squeeze(-1), -torch.inf, weight)
    return out, weight


def _lse(scores: Tensor, shares: Tensor) -> Tensor:
    """The log of the sum of exp(scores) over the last dimension, fp32, by their softmax."""
    return scores.amax(-1).float() - shares.amax(-1).float().log()


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """[B, H, N, n, ...] from [B, H, S, ...], for places [N, n]."""
    return tensor.index_select(2, places.flatten()).unflatten(2, places.shape)


def _of_heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, G, ...] repeated to `heads`."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _laid_out(out: Tensor) -> Tensor:
    """The output in memory as [B, S, H, D], as sites return it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
