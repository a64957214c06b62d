"""The ops through which a rank gets the keys that its queries read, and numbers over the tokens of all ranks.

    ask_keys       [.., all tokens] of this rank  ->  [ranks, .., tokens of this rank], what each rank reads of them
    fetch_keys     [B, H, tokens of this rank, D]  ->  [B, H, all tokens, D]; keys that no query reads are zero
    return_keys    the adjoint: the gradient of this rank's keys, summed over the ranks that read them

Each rank keeps its queries. It sends the keys and values that other ranks' queries read, and no others: the union
over the rows of a rank's table. With full attention these are all keys. Where the table is known before a run, all
ranks know what each of them reads; otherwise they ask at every call.

Ops take and return an order, as those in `parallel/ops.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.parallel.exchange import exchange
from sparsify_compiler.parallel.shares import local_length, parts_of, pieces, whole_length
from sparsify_compiler.plan import Ranks, SharedSequence
from sparsify_compiler.table import BlockTable

_TAGS = (torch.Tag.cudagraph_unsafe,)


def places_of(sequence: SharedSequence, rank: int, *, shared: bool = False) -> Tensor:
    """[n] int64: the places in the whole sequence of the tokens that a rank has, rising.

    Args:
        shared: whether to leave out tokens that every rank has.
    """
    found = pieces(parts_of(sequence.parts), rank, sequence.ranks.size, sequence.each)
    runs = (one.whole for one in found if one.shared or not shared)
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])


def queries_of(sequence: SharedSequence, rank: int) -> Tensor:
    """[n] int64: the places of the queries that read keys of other ranks."""
    return places_of(sequence, rank, shared=sequence.asks)


def keys_read(table: BlockTable | None, sequence: SharedSequence) -> list[Tensor]:
    """[B|1, H|1, S] bool for each rank: the keys that its queries read.

    Args:
        table: the table of the whole sequence, on the CPU; None for full attention.
    """
    if table is None:
        every = torch.ones(1, 1, whole_length(parts_of(sequence.parts)), dtype=torch.bool)
        return [every] * sequence.ranks.size
    return [table.of_queries(queries_of(sequence, rank)).keys_read() for rank in range(sequence.ranks.size)]


def asked_of(read: Sequence[Tensor], sequence: SharedSequence) -> Tensor:
    """[ranks, B|1, H|1, n] bool: what each rank reads of this rank's tokens, from the result of `keys_read`."""
    return torch.stack(list(read))[..., places_of(sequence, sequence.ranks.rank)]


def keys_sent(read: Sequence[Tensor], sequence: SharedSequence) -> list[list[int]]:
    """[sender][receiver]: the number of keys that ranks send, added over the batches and heads of `read`.

    A key has `head_dim + value_dim` numbers, with its value. Where `read` has one batch or one head for all, a rank
    sends this number for each batch and key head.

    Args:
        read: the result of `keys_read`.
    """
    size = sequence.ranks.size
    shared = [_shared(sequence.parts, rank, size, sequence.each) for rank in range(size)]
    return [
        [
            0 if sender == receiver else int((read[receiver] & shared[sender]).sum())
            for receiver in range(size)
        ]
        for sender in range(size)
    ]


def bytes_sent(
    read: Sequence[Tensor],
    sequence: SharedSequence,
    *,
    batch: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    itemsize: int,
) -> list[list[int]]:
    """[sender][receiver]: bytes of keys and values that ranks send for one attention, without headers.

    Args:
        read: the result of `keys_read`; a mask of each query head counts as one of its key head.
        itemsize: bytes of an element.
    """
    read = [of_key_heads(one, kv_heads) for one in read]
    lead = read[0].shape[:2]
    each = (batch // lead[0]) * (kv_heads // lead[1]) * (head_dim + value_dim) * itemsize
    return [[count * each for count in row] for row in keys_sent(read, sequence)]


def of_key_heads(read: Tensor, kv_heads: int) -> Tensor:
    """[B|1, Hkv|1, S] bool: the keys that a query head of each key head reads, from [B|1, H|1, S]."""
    return read if read.shape[1] == 1 else read.unflatten(1, (kv_heads, -1)).any(2)


@torch.library.custom_op("sparsify::ask_keys", mutates_args=(), tags=_TAGS)
def ask_keys(
    read: Tensor,
    parts: Sequence[int],
    each: int,
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
) -> Tensor:
    """Exchange masks of the keys that queries read.

    Args:
        read: [B|1, H|1, S] bool, the keys that this rank's queries read.
        parts, each: the fields of `SharedSequence`.
        rank, size, group, timeout: the fields of `Ranks`.
        site: name of the attention, for errors.

    Returns:
        [ranks, B|1, H|1, n] bool, what each rank reads of this rank's tokens.

    Raises:
        RankError: another rank failed, left, or runs another op.
    """
    sequence = SharedSequence(ranks=Ranks(rank, size, group, timeout), parts=tuple(parts), each=each)
    places = [places_of(sequence, peer).to(read.device) for peer in range(size)]
    lead, own = read.shape[:2], len(places[rank])
    messages = [read[..., one].to(torch.uint8) for one in places]
    what = f"ask_keys of attention {site!r}"
    (found,) = exchange([messages], [[(*lead, own)] * size], sequence.ranks, what)
    return torch.stack(found).bool()


@ask_keys.register_fake
def _ask_fake(read: Tensor, parts: Sequence[int], each: int, rank: int, size: int, *_: Any) -> Tensor:
    return read.new_empty(size, *read.shape[:2], local_length(parts_of(parts), rank, size, each))


@torch.library.custom_op("sparsify::fetch_keys", mutates_args=(), tags=_TAGS)
def fetch_keys(
    tensors: Sequence[Tensor],
    read: Tensor,
    asked: Tensor,
    parts: Sequence[int],
    each: int,
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
) -> list[Tensor]:
    """The keys that this rank's queries read; one message for all tensors of a type.

    Args:
        tensors: [B, H, n, Di] each, of this rank's tokens, then the order.
        read: [B|1, H|1, S] bool, the keys that this rank's queries read.
        asked: [ranks, B|1, H|1, n] bool, what each rank reads of this rank's tokens.
        parts, each, rank, size, group, timeout, site: as in `ask_keys`.

    Returns:
        [B, H, S, Di] each, with this rank's tokens, the tokens that `read` has, and zeros; then the order.

    Raises:
        RankError: as in `ask_keys`.
    """
    *given, order = tensors
    wanted, offered = _masks(read, asked, parts, each, rank, size)
    messages = [[_take(x, mask) for mask in offered] for x in given]
    shapes = [[_taken_shape(x, mask) for mask in wanted] for x in given]
    ranks, what = Ranks(rank, size, group, timeout), f"fetch_keys of attention {site!r}"
    received = exchange(messages, shapes, ranks, what)
    results = []
    for x, blocks in zip(given, received, strict=True):
        whole = x.new_zeros(*x.shape[:2], whole_length(parts_of(parts)), x.shape[3])
        for mask, block in zip(wanted, blocks, strict=True):
            _put(whole, mask, block)
        for one in pieces(parts_of(parts), rank, size, each):
            whole[:, :, one.whole] = x[:, :, one.local]
        results.append(whole)
    return [*results, order.clone()]


@torch.library.custom_op("sparsify::return_keys", mutates_args=(), tags=_TAGS)
def return_keys(
    tensors: Sequence[Tensor],
    read: Tensor,
    asked: Tensor,
    parts: Sequence[int],
    each: int,
    rank: int,
    size: int,
    group: str,
    timeout: float,
    site: str,
) -> list[Tensor]:
    """The gradient of this rank's keys, added in the order of ranks, from those of the result of `fetch_keys`.

    Args:
        tensors: [B, H, S, Di] each, then the order.
        read, asked, parts, each, rank, size, group, timeout, site: as in `fetch_keys`.

    Returns:
        [B, H, n, Di] each, then the order.

    Raises:
        RankError: as in `ask_keys`.
    """
    *given, order = tensors
    wanted, offered = _masks(read, asked, parts, each, rank, size)
    own = list(pieces(parts_of(parts), rank, size, each))
    messages = [[_take(x, mask) for mask in wanted] for x in given]
    mine = [torch.cat([x[:, :, one.whole] for one in own], 2) for x in given]
    shapes = [[_taken_shape(x, mask) for mask in offered] for x in mine]
    ranks, what = Ranks(rank, size, group, timeout), f"the gradient of fetch_keys of attention {site!r}"
    received = exchange(messages, shapes, ranks, what)
    results = []
    for x, blocks in zip(mine, received, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(x.shape, dtype=wide)
        for peer, (mask, block) in enumerate(zip(offered, blocks, strict=True)):
            if peer == rank:
                total += x
            else:
                _put(total, mask, block, add=True)
        results.append(total.to(x.dtype))
    return [*results, order.clone()]


def _shared(parts: Sequence[int], rank: int, size: int, each: int) -> Tensor:
    """[S] bool: the tokens of which this rank alone has a share."""
    found = torch.zeros(whole_length(parts_of(parts)), dtype=torch.bool)
    for one in pieces(parts_of(parts), rank, size, each):
        found[one.whole] = one.shared
    return found


def _masks(
    read: Tensor, asked: Tensor, parts: Sequence[int], each: int, rank: int, size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(of all tokens, those that come from each rank; of this rank's tokens, those that go to each), on the CPU."""
    read, asked = read.cpu(), asked.cpu()
    own = torch.cat(
        [
            torch.full((one.local.stop - one.local.start,), one.shared)
            for one in pieces(parts_of(parts), rank, size, each)
        ]
    )
    wanted = [read & _shared(parts, peer, size, each) & (peer != rank) for peer in range(size)]
    return wanted, [asked[peer] & own & (peer != rank) for peer in range(size)]


def _is_common(mask: Tensor) -> bool:
    """Whether a mask holds for all batches and heads."""
    return mask.shape[0] == mask.shape[1] == 1


def _rows(mask: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """The places of a mask: tokens where it is common; otherwise rows of [B * H * n, D]."""
    flat = mask[0, 0] if _is_common(mask) else mask.expand(*shape[:3]).flatten()
    return flat.nonzero()[:, 0].to(device)


def _take(x: Tensor, mask: Tensor) -> Tensor:
    """The tokens of [B, H, n, D] in a mask [B|1, H|1, n], by batch, head and token."""
    rows = _rows(mask, x.shape, x.device)
    return x[:, :, rows] if _is_common(mask) else x.reshape(-1, x.shape[3])[rows]


def _taken_shape(x: Tensor, mask: Tensor) -> tuple[int, ...]:
    """The shape of what `_take` returns for a mask over other tokens."""
    if _is_common(mask):
        return (*x.shape[:2], int(mask.sum()), x.shape[3])
    return int(mask.expand(*x.shape[:2], -1).sum()), x.shape[3]


def _put(x: Tensor, mask: Tensor, block: Tensor, *, add: bool = False) -> None:
    """Write, or add, what `_take` returned to the tokens of a contiguous [B, H, n, D]."""
    rows, dim = _rows(mask, x.shape, x.device), 2 if _is_common(mask) else 0
    target = x if dim else x.view(-1, x.shape[3])
    if add:
        target.index_add_(dim, rows, block.to(x.dtype))
    else:
        target.index_copy_(dim, rows, block)


@fetch_keys.register_fake
def _fetch_fake(
    tensors: Sequence[Tensor], read: Tensor, asked: Tensor, parts: Sequence[int], *_: Any
) -> list[Tensor]:
    *given, order = tensors
    length = whole_length(parts_of(parts))
    return [*(x.new_empty(*x.shape[:2], length, x.shape[3]) for x in given), torch.empty_like(order)]


@return_keys.register_fake
def _return_fake(
    tensors: Sequence[Tensor],
    read: Tensor,
    asked: Tensor,
    parts: Sequence[int],
    each: int,
    rank: int,
    size: int,
    *_: Any,
) -> list[Tensor]:
    *given, order = tensors
    length = local_length(parts_of(parts), rank, size, each)
    return [*(x.new_empty(*x.shape[:2], length, x.shape[3]) for x in given), torch.empty_like(order)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, read, asked, *ctx.others = inputs
    ctx.save_for_backward(read, asked)


def _fetch_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return (torch.ops.sparsify.return_keys(grads, *ctx.saved_tensors, *ctx.others), *[None] * 9)


def _return_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return (torch.ops.sparsify.fetch_keys(grads, *ctx.saved_tensors, *ctx.others), *[None] * 9)


fetch_keys.register_autograd(_fetch_backward, setup_context=_setup)
return_keys.register_autograd(_return_backward, setup_context=_setup)


@torch.library.custom_op("sparsify::after", mutates_args=(), tags=_TAGS)
def after(tensor: Tensor, results: Sequence[Tensor]) -> Tensor:
    """A copy of a tensor, made after `results`: it orders ops whose results do not depend on each other."""
    return tensor.clone()


after.register_fake(lambda tensor, results: torch.empty_like(tensor))

AFTER = torch.ops.sparsify.after.default
FETCH_KEYS = torch.ops.sparsify.fetch_keys.default
