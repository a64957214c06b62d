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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.parallel.exchange import Transfer, transfer
from sparsify_compiler.parallel.shares import (
    HeadRun,
    Part,
    Piece,
    alike,
    flat,
    head_runs,
    heads_of,
    local_length,
    owners_of,
    parts_of,
    pieces,
    queries_of,
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
    owned, peers = owners.tolist(), range(size)
    most = len(heads_of(owned, rank))
    assert most <= slots, f"rank {rank} owns {most} heads and has room for {slots}"
    places = [_pieces(parts, peer, size) for peer in peers]
    tokens = [[one for one in each if one.shared] for each in places]
    text = [[one for one in places[rank] if not one.shared and (sums or peer == rank)] for peer in peers]
    results, transfers = [], []
    for x in given:
        runs = [head_runs(owned, x.shape[1], peer) for peer in peers]
        mine = [run.slots for run in runs[rank]]
        out = x.new_empty(x.shape[0], slots, whole_length(parts_of(parts)), x.shape[3])
        out = _for_sums(out, sums)
        for adds, sent, received in ((False, [tokens[rank]] * size, tokens), (sums, text, text)):
            transfers.append(
                Transfer(
                    x.dtype,
                    [_at(x, _heads(runs[peer]), [one.local for one in sent[peer]]) for peer in peers],
                    [_at(out, mine, [one.whole for one in received[peer]]) for peer in peers],
                    adds,
                )
            )
        for one in text[rank] if sums else ():
            out[:, :, one.whole] = 0
        out[:, most:] = 0
        results.append(out)
    transfer(transfers, Ranks(rank, size, group, timeout), f"to_heads of attention {site!r}")
    for x, out in zip(given, results, strict=True):
        for run in head_runs(owned, x.shape[1], rank):
            out[:, run.more] = out[:, run.slots.stop - 1 : run.slots.stop]
        for at, rows in alike(owned, rank, out.shape[2]) if sums else ():
            out[:, at, : rows.start] = 0
            out[:, at, rows.stop :] = 0
    return [*(out.to(x.dtype) for x, out in zip(given, results, strict=True)), order.clone()]


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
    owned, peers, total = owners.tolist(), range(size), whole_length(parts_of(parts))
    of_peer = [_pieces(parts, peer, size) for peer in peers]

    def rows(run: HeadRun, owner: int, to: int, computed: bool) -> list[Piece]:
        """The rows of a run of heads that a rank sends to another: all, or those that it computed."""
        found = [one for one in of_peer[to] if one.shared or sends or owner == to]
        return _within(found, queries_of(owned, run.heads.start, owner, total)) if computed else found

    results, transfers = [], []
    for x, number in zip(given, heads, strict=True):
        runs, folds = [head_runs(owned, number, peer) for peer in peers], number < len(owned)
        source, computed = _fold(x, runs[rank]) if folds else x, sends and not folds
        # In a gradient, all that ranks computed of one head adds up.
        adds = folds or (not sends and any(len(owners_of(owned, head)) > 1 for head in range(number)))
        out = _for_sums(_blank_tokens(x, parts, number, rank, size), adds)
        if adds or not sends:
            out.zero_()
        transfers.append(
            Transfer(
                x.dtype,
                [
                    [
                        source[:, run.slots, one.whole]
                        for run in runs[rank]
                        for one in rows(run, rank, peer, computed)
                    ]
                    for peer in peers
                ],
                [
                    [
                        out[:, run.heads, one.local]
                        for run in runs[peer]
                        for one in rows(run, peer, rank, computed)
                    ]
                    for peer in peers
                ],
                adds,
            )
        )
        results.append(out)
    transfer(transfers, Ranks(rank, size, group, timeout), f"to_tokens of attention {site!r}")
    return [*(out.to(x.dtype) for x, out in zip(given, results, strict=True)), order.clone()]


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
    shape = list(x.shape)
    shape[dim] = whole_length(parts_of(parts))
    out = x.new_empty(shape)
    own, peers = _pieces(parts, rank, size), range(size)
    one = Transfer(
        x.dtype,
        [_along(x, dim, [one.local for one in own if one.shared or peer == rank]) for peer in peers],
        [
            _along(out, dim, [one.whole for one in _pieces(parts, peer, size) if one.shared or peer == rank])
            for peer in peers
        ],
    )
    transfer([one], Ranks(rank, size, group, timeout), f"gather_tokens for {site}")
    return [out, order.clone()]


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
    shape = list(x.shape)
    shape[dim] = local_length(parts_of(parts), rank, size)
    out = _for_sums(x.new_zeros(shape))
    own, peers = _pieces(parts, rank, size), range(size)
    one = Transfer(
        x.dtype,
        [
            _along(x, dim, [one.whole for one in _pieces(parts, peer, size) if one.shared or peer == rank])
            for peer in peers
        ],
        [_along(out, dim, [one.local for one in own if one.shared or peer == rank]) for peer in peers],
        adds=True,
    )
    transfer([one], Ranks(rank, size, group, timeout), f"the gradient of gather_tokens for {site}")
    return [out.to(x.dtype), order.clone()]


def _pieces(parts: Sequence[int], rank: int, size: int) -> list[Piece]:
    return list(pieces(parts_of(parts), rank, size))


def _heads(runs: Sequence[HeadRun]) -> list[slice]:
    return [run.heads for run in runs]


def _at(x: Tensor, heads: Sequence[slice], tokens: Sequence[slice]) -> list[Tensor]:
    """Views of [B, H, S, D]."""
    return [x[:, some, run] for some in heads for run in tokens]


def _along(x: Tensor, dim: int, runs: Sequence[slice]) -> list[Tensor]:
    """Views along one dimension."""
    return [x.narrow(dim, run.start, run.stop - run.start) for run in runs]


def _within(runs: Sequence[Piece], rows: slice) -> list[Piece]:
    """The part of each run that lies in `rows` of the whole dimension."""
    found = []
    for one in runs:
        first, last = max(one.whole.start, rows.start), min(one.whole.stop, rows.stop)
        if first < last:
            to_local = one.local.start - one.whole.start
            found.append(Piece(one.shared, slice(first, last), slice(first + to_local, last + to_local)))
    return found


def _for_sums(x: Tensor, adds: bool = True) -> Tensor:
    """A tensor in the type in which sums over ranks and heads are taken."""
    return x.float() if adds and x.dtype in (torch.float16, torch.bfloat16) else x


def _fold(x: Tensor, runs: Sequence[HeadRun]) -> Tensor:
    """[B, slots, S, D], where the first slot of each key head has the sum of all slots of that head."""
    total = _for_sums(x).clone()
    for run in runs:
        total[:, run.slots.start] += total[:, run.more].sum(1)
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
    order = torch.zeros((), dtype=torch.float32, device="cpu")
    place = *ranks.fields, f"{site} (numbers of its heads)"
    # Like one position of a sequence that all ranks have.
    given = [numbers[:, :, None].contiguous(), order]
    found, _ = torch.ops.sparsify.to_tokens(given, owners, flat([Part(0, 1)]), [len(owners)], True, *place)
    return found[:, :, 0]
