"""`BlockTable`: the blocks of keys that each block of queries reads.

It is the only data structure between methods, which fill it, and kernels, which read it. Shape letters: B batch,
H query heads, S tokens, N blocks, W capacity of a row. Every leading B or H may be 1, which means shared.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockTable:
    """Blocks of any size over (optionally permuted) tokens, and a list of key blocks for each query block.

    All tensors are int32. Positions `q_bounds[i] : q_bounds[i+1]` form query block i; the token at position p
    is `q_order[p]`, or p itself if there is no order. The same holds for keys. Query block i reads the key blocks
    `kv_indices[i, : kv_num_blocks[i]]`; the rest of the row is ignored. A block may be empty. A row may list no
    block (the output of its queries is 0, with lse -inf), and must not list a block twice, except an empty one.
    """

    q_bounds: Tensor
    """[B|1, H|1, Nq+1], from 0 to Sq, never falling."""
    kv_bounds: Tensor
    """[B|1, H|1, Nk+1], from 0 to Sk, never falling."""
    kv_num_blocks: Tensor
    """[B|1, H|1, Nq], each in 0..W."""
    kv_indices: Tensor
    """[B|1, H|1, Nq, W], each used entry in 0..Nk-1. W is a capacity, by convention a power of two."""
    q_order: Tensor | None = None
    """[B|1, H|1, Sq], a permutation of the tokens, or None for the identity."""
    kv_order: Tensor | None = None
    """[B|1, H|1, Sk], a permutation of the tokens, or None for the identity."""

    @classmethod
    def from_block_mask(
        cls,
        blocks: Tensor,
        q_sizes: Tensor,
        kv_sizes: Tensor,
        *,
        q_order: Tensor | None = None,
        kv_order: Tensor | None = None,
    ) -> "BlockTable":
        """The table that keeps the block pairs of a boolean mask.

        Args:
            blocks: [B|1, H|1, Nq, Nk] bool, True where the query block reads the key block.
            q_sizes: [B|1, H|1, Nq] tokens in each query block.
            kv_sizes: [B|1, H|1, Nk] tokens in each key block.
        """
        counts = blocks.sum(-1, dtype=torch.int32)
        most = max(1, int(counts.max())) if counts.numel() else 1
        capacity = 1 << (most - 1).bit_length()
        # A stable sort of "not kept" brings the kept columns to the front in rising order.
        indices = torch.argsort((~blocks).to(torch.int8), dim=-1, stable=True)[..., :capacity]
        padded = torch.zeros(*indices.shape[:-1], capacity, dtype=torch.int32, device=blocks.device)
        padded[..., : indices.shape[-1]] = indices
        return cls(
            q_bounds=_bounds(q_sizes),
            kv_bounds=_bounds(kv_sizes),
            kv_num_blocks=counts,
            kv_indices=padded,
            q_order=q_order,
            kv_order=kv_order,
        )

    @classmethod
    def of(cls, *tensors: Any) -> "BlockTable":
        """The table with these tensors, in the order of the fields, as `tensors` returns them."""
        q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order = tensors
        return cls(
            q_bounds=q_bounds,
            kv_bounds=kv_bounds,
            kv_num_blocks=kv_num_blocks,
            kv_indices=kv_indices,
            q_order=q_order,
            kv_order=kv_order,
        )

    def of_heads(self, heads: slice | Tensor) -> "BlockTable":
        """The table of some of its heads, a run of them or their numbers."""
        tensors = self.tensors().values()
        return self.of(*(t if t is None or t.shape[1] == 1 else t[:, heads] for t in tensors))

    def of_queries(self, places: Tensor) -> "BlockTable":
        """The table of some of its queries. Rows without a query read nothing.

        Args:
            places: [n] int64, the tokens of these queries, rising.
        """
        order, bounds = blocks_of_places(self.q_order, self.q_bounds, places)
        read = torch.where(bounds.diff(dim=-1) > 0, self.kv_num_blocks, 0)
        return replace(self, q_bounds=bounds, q_order=order, kv_num_blocks=read)

    def keys_read(self) -> Tensor:
        """[B|1, H|1, Sk] bool: whether a query reads each key."""
        block = self.block_of_token("kv")
        read = self.block_mask() & (self.q_bounds.diff(dim=-1) > 0)[..., None]
        lead = torch.broadcast_shapes(read.shape[:2], block.shape[:2])
        return read.any(-2).expand(*lead, -1).gather(-1, block.expand(*lead, -1))

    def row_of(self, query: int) -> tuple[Tensor, Tensor]:
        """[Sq] and [Sk] bool: the queries in the block of a query, and the keys that they read, in the first batch
        element and head.

        Args:
            query: the token, counted from 0.
        """
        first = self.of(*(t if t is None else t[:1, :1] for t in self.tensors().values()))
        q_block, kv_block = first.block_of_token("q")[0, 0], first.block_of_token("kv")[0, 0]
        row = q_block[query]
        listed = torch.arange(first.kv_indices.shape[-1], device=row.device) < first.kv_num_blocks[0, 0, row]
        read = torch.zeros(first.kv_bounds.shape[-1] - 1, dtype=torch.int32, device=row.device)
        read.scatter_add_(0, first.kv_indices[0, 0, row].long() * listed, listed.int())
        return q_block == row, read[kv_block] > 0

    def to(self, device: torch.device | str) -> "BlockTable":
        """The same table on another device."""
        return self.of(*(t if t is None else t.to(device) for t in self.tensors().values()))

    def tensors(self) -> dict[str, Any]:
        """Field name -> tensor (or None), in the order of the attention op's arguments."""
        return {name: getattr(self, name) for name in self.__slots__}

    def check(self, q_tokens: int, kv_tokens: int) -> None:
        """Raise OperandError unless the table is for exactly these numbers of tokens. Waits for the device.

        `kernels.attention.check` has checked shapes and types before. A block that a row lists twice is not found.
        """
        check_blocks("table.q_", self.q_bounds, self.q_order, q_tokens)
        check_blocks("table.kv_", self.kv_bounds, self.kv_order, kv_tokens)
        names, blocks = ("table.kv_num_blocks", "table.kv_indices"), self.kv_bounds.shape[-1] - 1
        check_lists(*names, self.kv_num_blocks, self.kv_indices, blocks)

    def block_mask(self) -> Tensor:
        """[B|1, H|1, Nq, Nk] bool: whether each query block reads each key block."""
        columns = torch.arange(self.kv_indices.shape[-1], device=self.kv_indices.device)
        used = columns < self.kv_num_blocks.unsqueeze(-1)
        lead = torch.broadcast_shapes(
            *(t.shape[:2] for t in (self.kv_indices, self.kv_num_blocks, self.kv_bounds))
        )
        blocks = torch.zeros(
            *lead, used.shape[-2], self.kv_bounds.shape[-1] - 1, dtype=torch.int32, device=used.device
        )
        index = self.kv_indices.long().clamp(0, max(blocks.shape[-1] - 1, 0)).expand(*lead, -1, -1)
        if blocks.shape[-1]:
            blocks.scatter_add_(-1, index, used.to(torch.int32).expand(*lead, -1, -1))
        return blocks > 0

    def listing(self, blocks: Tensor) -> "BlockTable":
        """The same blocks, with rows that list, by rising index, those that `blocks`, bool [B, H, Nq, Nk], has."""
        columns = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device)
        # Each listed block moves to its place in the count, all others to an extra column that is cut off.
        place = torch.where(blocks, blocks.cumsum(-1) - 1, len(columns))
        indices = torch.zeros(*blocks.shape[:-1], len(columns) + 1, dtype=torch.int32, device=blocks.device)
        indices = indices.scatter(-1, place, columns.expand_as(place))[..., : max(len(columns), 1)]
        return replace(self, kv_num_blocks=blocks.sum(-1, dtype=torch.int32), kv_indices=indices)

    def mask(self) -> Tensor:
        """[B|1, H|1, Sq, Sk] bool: the dense mask of this table. It is the oracle of every test."""
        q_block, kv_block = self.block_of_token("q"), self.block_of_token("kv")
        blocks = self.block_mask()
        lead = torch.broadcast_shapes(blocks.shape[:2], q_block.shape[:2], kv_block.shape[:2])
        blocks = blocks.expand(*lead, -1, -1)
        rows = q_block.expand(*lead, -1)[..., None].expand(-1, -1, -1, blocks.shape[-1])
        columns = kv_block.expand(*lead, -1)[..., None, :].expand(-1, -1, q_block.shape[-1], -1)
        return blocks.gather(-2, rows).gather(-1, columns)

    def density(self) -> float:
        """Share of the token pairs that are kept: the mean of `mask()`, computed without building it."""
        return float(self.densities().mean())

    def densities(self, pairs: Any = None) -> Tensor:
        """[B|1, H|1] fp64: the density of each batch and head. Reads nothing back from the device.

        Args:
            pairs: the result of `pairs_read`, where it is known.
        """
        pairs = self.pairs_read() if pairs is None else pairs
        q_tokens, kv_tokens = (bounds[..., -1].double() for bounds in (self.q_bounds, self.kv_bounds))
        return pairs.sum(-1) / (q_tokens * kv_tokens)

    def pairs_read(self) -> Tensor:
        """[B|1, H|1, Nq] int64: the number of query-key pairs that each row reads."""
        q_sizes, kv_sizes = (bounds.diff(dim=-1) for bounds in (self.q_bounds, self.kv_bounds))
        lead = torch.broadcast_shapes(
            *(t.shape[:2] for t in (q_sizes, kv_sizes, self.kv_indices, self.kv_num_blocks))
        )
        kept = torch.zeros(*lead, self.kv_indices.shape[2], dtype=torch.int64, device=q_sizes.device)
        if kv_sizes.shape[-1]:
            for some, listed, used in listed_of_rows(self.kv_num_blocks, self.kv_indices):
                rows = kv_sizes.unsqueeze(-2).expand(*lead, listed.shape[-2], -1)
                sizes = rows.gather(-1, listed.expand(*lead, -1, -1))
                kept[:, :, some] = (sizes * used).sum(-1)
        return kept * q_sizes

    def block_of_token(self, side: str) -> Tensor:
        """[B|1, H|1, S] int64: the block of each token."""
        bounds = getattr(self, f"{side}_bounds").long()
        order = getattr(self, f"{side}_order")
        positions = torch.arange(int(bounds[0, 0, -1]), device=bounds.device)
        positions = positions.expand(*bounds.shape[:2], -1).contiguous()
        block = torch.searchsorted(bounds[..., 1:].contiguous(), positions, right=True)
        if order is None:
            return block
        lead = torch.broadcast_shapes(block.shape[:2], order.shape[:2])
        order = order.long().expand(*lead, -1)
        return torch.empty_like(order).scatter_(-1, order, block.expand(*lead, -1))


LISTED_AT_ONCE = 2**20
"""Number of listed blocks that `listed_of_rows` expands at one time; at least a row of each head."""


def listed_of_rows(counts: Tensor, indices: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(some rows, the blocks that they list as int64 [B|1, H|1, n, W], whether each entry is used), run by run.

    Args:
        counts, indices: `kv_num_blocks` and `kv_indices` of a table. Entries that are not used become 0.
    """
    *heads, rows, width = indices.shape
    columns = torch.arange(width, dtype=torch.int32, device=indices.device)
    step = max(1, LISTED_AT_ONCE // max(1, math.prod(heads) * width))
    for first in range(0, rows, step):
        some = slice(first, first + step)
        used = columns < counts[:, :, some, None]
        yield some, torch.where(used, indices[:, :, some], 0).long(), used


def blocks_of_places(order: Any, bounds: Tensor, places: Tensor) -> tuple[Any, Tensor]:
    """(order, bounds) of some tokens in the same blocks, of which some may then be empty.

    Args:
        order, bounds: as `q_order`, or None, and `q_bounds` of a table.
        places: [n] int64, these tokens, rising. In the result they are counted from 0.
    """
    device, lead = bounds.device, bounds.shape[:2]
    places = places.to(device)
    if order is None:
        # A block lies between its first and its last token.
        return None, torch.searchsorted(places, bounds.long()).int()
    number = torch.zeros(order.shape[-1], dtype=torch.int64, device=device)
    number[places] = torch.arange(1, len(places) + 1, device=device)
    local = number[order.long()]  # from 1; 0 for other tokens
    before = torch.nn.functional.pad((local > 0).cumsum(-1), (1, 0))
    lead = torch.broadcast_shapes(local.shape[:2], lead)
    bounds = before.expand(*lead, -1).gather(-1, bounds.long().expand(*lead, -1)).int()
    # The tokens of these places come first, in their order.
    first = (local == 0).to(torch.int8).argsort(dim=-1, stable=True)[..., : len(places)]
    return (local.gather(-1, first) - 1).int(), bounds


def check_blocks(prefix: str, bounds: Tensor, order: Tensor | None, tokens: int) -> None:
    """Raise OperandError unless the blocks of one side of a table hold each token once."""
    check_bounds(f"{prefix}bounds", bounds, tokens)
    if order is not None:
        check_order(f"{prefix}order", order, tokens)


def check_bounds(name: str, bounds: Tensor, tokens: int) -> None:
    """Raise OperandError unless bounds [..., N+1] go from 0 to `tokens` and never fall. Waits for the device."""
    wrong = (bounds < 0) | (bounds > tokens)
    wrong[..., 1:] |= bounds.diff(dim=-1) < 0
    wrong[..., 0] |= bounds[..., 0] != 0
    wrong[..., -1] |= bounds[..., -1] != tokens
    _refuse(name, bounds, wrong, f"go from 0 to {tokens} and never fall")


def check_order(name: str, order: Tensor, tokens: int) -> None:
    """Raise OperandError unless an order [..., S] holds each token once. Waits for the device."""
    place = order.argsort(dim=-1, stable=True)
    wrong = torch.zeros_like(order, dtype=torch.bool)
    wrong.scatter_(-1, place, order.gather(-1, place) != torch.arange(tokens, device=order.device))
    _refuse(name, order, wrong, f"hold each of the tokens 0..{tokens - 1} once")


def check_range(name: str, tensor: Tensor, most: int, used: Tensor | None = None) -> None:
    """Raise OperandError unless all elements, or those where `used`, lie in 0..most. Waits for the device."""
    wrong = (tensor < 0) | (tensor > most)
    _refuse(name, tensor, wrong if used is None else wrong & used, f"lie in 0..{most}")


def check_lists(name: str, indices_name: str, counts: Tensor, indices: Tensor, limit: int) -> None:
    """Raise OperandError unless each row of `indices`, [..., W], begins with the number of indices that `counts`
    has for it, each in 0..limit-1. Waits for the device."""
    check_range(name, counts, indices.shape[-1])
    used = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    check_range(indices_name, indices, limit - 1, used)


def _refuse(name: str, tensor: Tensor, wrong: Tensor, must: str) -> None:
    """Raise OperandError for the first wrong element, if there is one."""
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        got = int(tensor.expand_as(wrong)[tuple(at)])
        raise OperandError(f"{name} must {must}, got {got} at {at}")


def _bounds(sizes: Tensor) -> Tensor:
    """[..., N] sizes -> [..., N+1] int32 running sums from 0."""
    return torch.nn.functional.pad(sizes.cumsum(-1), (1, 0)).to(torch.int32)
