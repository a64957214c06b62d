"""The ops through which ranks exchange tokens, heads and gradients.

    to_heads       [B, H, tokens of this rank, D]  ->  [B, slots, all tokens, D] of this rank's heads
    to_tokens      the way back
    gather_tokens  this rank's share of a dimension  ->  the whole dimension, on every rank
    sum_tokens     the whole dimension  ->  this rank's share of the sum over all ranks

The first two are each other's adjoint, and so are the last two: the backward pass of an op is the other op. So the
gradients of all ranks are those of the sum of their losses. The mean of a gradient over ranks, which data
parallelism takes anyway, is then the gradient of one process.

The owners of heads are a small CPU tensor (`shares.Owners`), so heads move without a new program, and no device is
waited for. Slots that hold no head are zero. Ranks may share the queries of a head: each gets all its tokens, and
`to_tokens` takes from each rank the rows that it computes.

Ranks must run their ops in one order, but a compiler may order ops that do not depend on each other differently on
each rank. So every op takes an *order*, a tensor without dimensions, as the last tensor of its list, and returns
another one for the next op. The gradients of orders chain the backward pass.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.parallel.exchange import exchange
from sparsify_compiler.parallel.shares import (
    Part,
    Piece,
    alike,
    flat,
    heads_of,
    key_heads_of,
    local_length,
    owners_of,
    parts_of,
    pieces,
    whole_length,
)
from sparsify_compiler.plan import Ranks

_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("sparsify::to_heads", mutates_args=(), tags=_TAGS)
def to_heads(
    tensors: Sequence[Tensor],
    owners: Tensor,
    parts: Sequence[int],
    slots: int,
    sums: bool,
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
) -> list[Tensor]:
    """All tokens of this rank's heads, from this rank's tokens of all heads; one message for all tensors of a type.

    Args:
        tensors: [B, Hi, local tokens, Di] each, then the order. Hi divides the number of query heads H.
        owners: [H, size + 1] int64 on the CPU, see `shares.Owners`; H query heads.
        parts: the parts of the sequence, see `shares.flat`.
        slots: number of heads of each result; no rank may own more query heads.
        sums: whether tokens that every rank has are summed over ranks, and rows that others compute are zero;
            otherwise a rank takes its own, and all rows.
        rank, size, group, timeout: the fields of `Ranks`.
        site: name of the attention, for errors.

    Returns:
        [B, slots, all tokens, Di] each, then the order. Slot i has the head that query head i of this rank reads.

    Raises:
        RankError: another rank failed, left, or runs another op.
    """
    *given, order = tensors
    own, owned = _pieces(parts, rank, size), owners.tolist()
    mine = heads_of(owned, rank)
    assert len(mine) <= slots, f"rank {rank} owns {len(mine)} heads and has room for {slots}"
    read = [[key_heads_of(owned, x.shape[1], peer) for peer in range(size)] for x in given]
    messages = [
        [_rows(x[:, heads], [one.local for one in own if one.shared or sums]) for heads in each]
        for x, each in zip(given, read, strict=True)
    ]
    lengths = [
        sum(_length(one.local) for one in _pieces(parts, peer, size) if one.shared or sums)
        for peer in range(size)
    ]
    shapes = [
        [(x.shape[0], len(each[rank]), length, x.shape[3]) for length in lengths]
        for x, each in zip(given, read, strict=True)
    ]
    results = []
    received = exchange(
        messages, shapes, Ranks(rank, size, group, timeout), f"to_heads of attention {site!r}"
    )
    for x, each, blocks in zip(given, read, received, strict=True):
        keys = each[rank]
        whole = x.new_zeros(x.shape[0], len(keys), whole_length(parts_of(parts)), x.shape[3])
        whole = _for_sums(whole) if sums else whole
        for peer, block in enumerate(blocks):
            at = 0
            for one in _pieces(parts, peer, size):
                if one.shared or sums:
                    whole[:, :, one.whole] += block[:, :, at : at + _length(one.local)]
                    at += _length(one.local)
                elif peer == rank:
                    whole[:, :, one.whole] = x[:, keys, one.local]
        out = x.new_zeros(x.shape[0], slots, *whole.shape[2:])
        queries = len(owned) // x.shape[1]
        out[:, : len(mine)] = whole[:, [keys.index(head // queries) for head in mine]]
        if sums:
            for slots_alike, run in alike(owned, rank, out.shape[2]):
                out[:, slots_alike, : run.start] = 0
                out[:, slots_alike, run.stop :] = 0
        results.append(out)
    return [*results, order.clone()]


@torch.library.custom_op("sparsify::to_tokens", mutates_args=(), tags=_TAGS)
def to_tokens(
    tensors: Sequence[Tensor],
    owners: Tensor,
    parts: Sequence[int],
    heads: Sequence[int],
    sends: bool,
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
) -> list[Tensor]:
    """This rank's tokens of all heads, from all tokens of this rank's heads; one message for all tensors of a type.

    Args:
        tensors: [B, slots, all tokens, Di] each, then the order.
        heads: number of heads of each result. Where it is below that of the query heads, slots of one head add up.
        sends: whether tokens that every rank has go to all ranks; otherwise a rank keeps those of its heads, and
            has zeros for the heads of others.
        owners, parts, rank, size, group, timeout, site: as in `to_heads`.

    Returns:
        [B, heads, local tokens, Di] each, which lie in memory as [B, local tokens, heads, Di]; then the order.

    Raises:
        RankError: as in `to_heads`.
    """
    *given, order = tensors
    own, owned = _pieces(parts, rank, size), owners.tolist()
    read = [[key_heads_of(owned, number, peer) for peer in range(size)] for number in heads]
    folded = [
        _fold(x, heads_of(owned, rank), each[rank], len(owned) // number)
        for x, each, number in zip(given, read, heads, strict=True)
    ]
    total = whole_length(parts_of(parts))

    def blocks_of(owner: int, number: int, to: int) -> list[tuple[slice, list[Piece]]]:
        """(places among the heads of `owner`, runs of the rows that go to a rank), for each block of a message."""
        runs = [one for one in _pieces(parts, to, size) if one.shared or sends]
        if not sends or number < len(owned):  # gradients: all that ranks computed of one head adds up
            return [(slice(0, len(key_heads_of(owned, number, owner))), runs)]
        return [(slots, _within(runs, rows)) for slots, rows in alike(owned, owner, total)]

    def elements(x: Tensor, owner: int, number: int) -> int:
        rows = sum((at.stop - at.start) * _rows_in(runs) for at, runs in blocks_of(owner, number, rank))
        return x.shape[0] * rows * x.shape[3]

    messages = [
        [
            _flat(x, [_rows(x[:, at], [one.whole for one in runs]) for at, runs in blocks if runs])
            for blocks in (blocks_of(rank, number, peer) for peer in range(size))
        ]
        for x, number in zip(folded, heads, strict=True)
    ]
    shapes = [
        [(elements(x, peer, number),) for peer in range(size)] for x, number in zip(given, heads, strict=True)
    ]
    received = exchange(
        messages, shapes, Ranks(rank, size, group, timeout), f"to_tokens of attention {site!r}"
    )
    results = []
    for x, mine, each, blocks, number in zip(given, folded, read, received, heads, strict=True):
        adds = number < len(owned) or (not sends and any(len(owners_of(owned, i)) > 1 for i in range(number)))
        out = _for_sums(_blank_tokens(x, parts, number, rank, size).zero_(), adds)
        for peer, (keys, message) in enumerate(zip(each, blocks, strict=True)):
            for slots, runs in blocks_of(peer, number, rank):
                shape = x.shape[0], slots.stop - slots.start, _rows_in(runs), x.shape[3]
                block, message = message[: math.prod(shape)].view(shape), message[math.prod(shape) :]
                at = 0
                for one in runs:
                    out[:, keys[slots], one.local] += block[:, :, at : at + _length(one.local)]
                    at += _length(one.local)
        for one in own:
            if not (one.shared or sends):
                out[:, each[rank], one.local] = mine[:, :, one.whole].to(out.dtype)
        results.append(out.to(x.dtype))
    return [*results, order.clone()]


@torch.library.custom_op("sparsify::gather_tokens", mutates_args=(), tags=_TAGS)
def gather_tokens(
    tensors: Sequence[Tensor],
    dim: int,
    parts: Sequence[int],
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
) -> list[Tensor]:
    """The whole of a dimension, from every rank's share of it.

    Args:
        tensors: [..., local, ...], then the order.
        dim: the dimension that ranks share.
        parts, rank, size, group, timeout, site: as in `to_heads`; parts that every rank has are a rank's own.

    Returns:
        [..., whole, ...], then the order.

    Raises:
        RankError: as in `to_heads`.
    """
    x, order = tensors
    share = x.movedim(dim, 0)
    mine = torch.cat([share[one.local] for one in _pieces(parts, rank, size) if one.shared])
    lengths = [
        sum(_length(one.local) for one in _pieces(parts, peer, size) if one.shared) for peer in range(size)
    ]
    shapes = [[(length, *share.shape[1:]) for length in lengths]]
    ranks = Ranks(rank, size, group, timeout)
    (blocks,) = exchange([[mine] * size], shapes, ranks, f"gather_tokens for {site}")
    out = share.new_empty(whole_length(parts_of(parts)), *share.shape[1:])
    for peer, block in enumerate(blocks):
        at = 0
        for one in _pieces(parts, peer, size):
            if one.shared:
                out[one.whole] = block[at : at + _length(one.local)]
                at += _length(one.local)
            elif peer == rank:
                out[one.whole] = share[one.local]
    return [out.movedim(0, dim).contiguous(), order.clone()]


@torch.library.custom_op("sparsify::sum_tokens", mutates_args=(), tags=_TAGS)
def sum_tokens(
    tensors: Sequence[Tensor],
    dim: int,
    parts: Sequence[int],
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
) -> list[Tensor]:
    """This rank's share of the sum of a dimension over all ranks, added in the order of ranks.

    Args:
        tensors: [..., whole, ...], then the order.
        dim, parts, rank, size, group, timeout, site: as in `gather_tokens`.

    Returns:
        [..., local, ...], then the order.

    Raises:
        RankError: as in `to_heads`.
    """
    x, order = tensors
    whole = x.movedim(dim, 0)
    own = _pieces(parts, rank, size)
    messages = [
        torch.cat([whole[one.whole] for one in _pieces(parts, peer, size) if one.shared])
        for peer in range(size)
    ]
    ranks, shapes = Ranks(rank, size, group, timeout), [[tuple(messages[rank].shape)] * size]
    (blocks,) = exchange([messages], shapes, ranks, f"the gradient of gather_tokens for {site}")
    total = sum(map(_for_sums, blocks[1:]), start=_for_sums(blocks[0])).to(x.dtype)
    out, at = whole.new_empty(local_length(parts_of(parts), rank, size), *whole.shape[1:]), 0
    for one in own:
        if one.shared:
            out[one.local] = total[at : at + _length(one.local)]
            at += _length(one.local)
        else:
            out[one.local] = whole[one.whole]
    return [out.movedim(0, dim).contiguous(), order.clone()]


def _pieces(parts: Sequence[int], rank: int, size: int) -> list[Piece]:
    return list(pieces(parts_of(parts), rank, size))


def _length(run: slice) -> int:
    return int(run.stop - run.start)


def _flat(like: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """All elements of tensors, one after the other."""
    flat = [one.flatten() for one in tensors]
    return flat[0] if len(flat) == 1 else torch.cat([like.new_empty(0), *flat])


def _rows_in(runs: Sequence[Piece]) -> int:
    return sum(_length(one.local) for one in runs)


def _within(runs: Sequence[Piece], rows: slice) -> list[Piece]:
    """The part of each run that lies in `rows` of the whole dimension."""
    found = []
    for one in runs:
        first, last = max(one.whole.start, rows.start), min(one.whole.stop, rows.stop)
        if first < last:
            to_local = one.local.start - one.whole.start
            found.append(Piece(one.shared, slice(first, last), slice(first + to_local, last + to_local)))
    return found


def _rows(x: Tensor, runs: Sequence[slice]) -> Tensor:
    """The positions in `runs` of [B, h, S, D]."""
    return torch.cat([x[:, :, run] for run in runs], 2)


def _for_sums(x: Tensor, adds: bool = True) -> Tensor:
    """A tensor in the type in which sums over ranks and heads are taken."""
    return x.float() if adds and x.dtype in (torch.float16, torch.bfloat16) else x


def _fold(x: Tensor, mine: Sequence[int], keys: Sequence[int], queries: int) -> Tensor:
    """[B, slots, S, D], a slot for each head of `mine` -> [B, len(keys), S, D]; slots of one key head add up."""
    if queries == 1:
        return x[:, : len(mine)]
    total = _for_sums(x.new_zeros(x.shape[0], len(keys), *x.shape[2:]))
    for slot, head in enumerate(mine):
        total[:, keys.index(head // queries)] += x[:, slot]
    return total.to(x.dtype)


def _blank_tokens(x: Tensor, parts: Sequence[int], heads: int, rank: int, size: int) -> Tensor:
    """An uninitialised result of `to_tokens`."""
    length = local_length(parts_of(parts), rank, size)
    return x.new_empty(x.shape[0], length, heads, x.shape[3]).transpose(1, 2)


@to_heads.register_fake
def _to_heads_fake(
    tensors: Sequence[Tensor], owners: Tensor, parts: Sequence[int], slots: int, *_: Any
) -> list[Tensor]:
    *given, order = tensors
    length = whole_length(parts_of(parts))
    return [*(x.new_empty(x.shape[0], slots, length, x.shape[3]) for x in given), torch.empty_like(order)]


@to_tokens.register_fake
def _to_tokens_fake(
    tensors: Sequence[Tensor],
    owners: Tensor,
    parts: Sequence[int],
    heads: Sequence[int],
    sends: bool,
    rank: int,
    size: int,
    *_: Any,
) -> list[Tensor]:
    *given, order = tensors
    blank = [_blank_tokens(x, parts, number, rank, size) for x, number in zip(given, heads, strict=True)]
    return [*blank, torch.empty_like(order)]


@gather_tokens.register_fake
def _gather_fake(tensors: Sequence[Tensor], dim: int, parts: Sequence[int], *_: Any) -> list[Tensor]:
    x, order = tensors
    shape = list(x.shape)
    shape[dim] = whole_length(parts_of(parts))
    return [x.new_empty(shape), torch.empty_like(order)]


@sum_tokens.register_fake
def _sum_fake(
    tensors: Sequence[Tensor], dim: int, parts: Sequence[int], rank: int, size: int, *_: Any
) -> list[Tensor]:
    x, order = tensors
    shape = list(x.shape)
    shape[dim] = local_length(parts_of(parts), rank, size)
    return [x.new_empty(shape), torch.empty_like(order)]


def _to_heads_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, owners, *ctx.others = inputs
    ctx.heads = [x.shape[1] for x in tensors[:-1]]
    ctx.save_for_backward(owners)


def _to_heads_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    (owners,) = ctx.saved_tensors
    parts, _, sums, *others = ctx.others
    back = torch.ops.sparsify.to_tokens(grads, owners, parts, ctx.heads, sums, *others)
    return (back, *[None] * 9)


def _to_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, owners, *ctx.others = inputs
    ctx.slots = tensors[0].shape[1]
    ctx.save_for_backward(owners)


def _to_tokens_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    (owners,) = ctx.saved_tensors
    parts, _, sends, *others = ctx.others
    back = torch.ops.sparsify.to_heads(grads, owners, parts, ctx.slots, sends, *others)
    return (back, *[None] * 9)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.others = inputs[1:]


to_heads.register_autograd(_to_heads_backward, setup_context=_to_heads_setup)
to_tokens.register_autograd(_to_tokens_backward, setup_context=_to_tokens_setup)
gather_tokens.register_autograd(
    lambda ctx, grads: (torch.ops.sparsify.sum_tokens(grads, *ctx.others), *[None] * 7), setup_context=_keep
)
sum_tokens.register_autograd(
    lambda ctx, grads: (torch.ops.sparsify.gather_tokens(grads, *ctx.others), *[None] * 7),
    setup_context=_keep,
)


@torch.library.custom_op("sparsify::heads_in_slots", mutates_args=())
def heads_in_slots(owners: Tensor, rank: int, slots: int) -> Tensor:
    """[slots] int64 on the CPU: the head in each slot of a rank; any head where a slot has none.

    Args:
        owners, rank: as in `to_heads`.
    """
    mine = heads_of(owners.tolist(), rank)
    return torch.tensor([*mine, *[0] * (slots - len(mine))], device="cpu")


@heads_in_slots.register_fake
def _heads_in_slots_fake(owners: Tensor, rank: int, slots: int) -> Tensor:
    return owners.new_empty(slots)


TO_HEADS = torch.ops.sparsify.to_heads.default
TO_TOKENS = torch.ops.sparsify.to_tokens.default
GATHER_TOKENS = torch.ops.sparsify.gather_tokens.default


def numbers_of_all_heads(numbers: Tensor, *, owners: Tensor, ranks: Ranks, site: str) -> Tensor:
    """The numbers of every head, on every rank.

    Args:
        numbers: [B, slots, n] of this rank's heads.
        owners, site: as in `to_heads`.

    Returns:
        [B, H, n], in the order of heads.

    Raises:
        RankError: as in `to_heads`.
    """
    order = torch.zeros((), device="cpu")
    place = ranks.rank, ranks.size, ranks.group, ranks.timeout, site
    # Like one position of a sequence that all ranks have.
    given = [numbers[:, :, None].contiguous(), order]
    found, _ = torch.ops.sparsify.to_tokens(given, owners, flat([Part(0, 1)]), [len(owners)], True, *place)
    return found[:, :, 0]
