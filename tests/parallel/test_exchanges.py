"""The ops that exchange tokens and heads, on one to four ranks, against slices of the whole tensors."""

import random
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler._torch import process_group
from sparsify_compiler.parallel import ops, sequence  # noqa: F401
from sparsify_compiler.parallel.shares import UNITS, Part, even_owners, flat, whole_owners
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.ranks import Pool, received_bytes

OPS = torch.ops.sparsify
ORDER = torch.zeros(())
"""The order that the first op of a chain gets."""


@dataclass(frozen=True)
class Sequence:
    """A sequence of a case: runs of whole positions of each rank, by plain counting."""

    parts: tuple[Part, ...]
    owners: tuple[tuple[int, ...], ...]
    """The units of each head that each rank computes."""
    slots: int
    key_heads: int
    batch: int

    def tokens(self, rank: int, size: int) -> list[int]:
        """The positions that a rank has, one by one."""
        found, at = [], 0
        for tokens, width in self.parts:
            if not tokens:
                found += range(at, at + width)
                at += width
                continue
            counts = [tokens // size + (1 if other < tokens % size else 0) for other in range(size)]
            first = sum(counts[:rank])
            found += range(at + first * width, at + (first + counts[rank]) * width)
            at += tokens * width
        return found

    @property
    def length(self) -> int:
        return sum((tokens or 1) * width for tokens, width in self.parts)

    def text(self) -> list[bool]:
        """Whether every rank has a position."""
        return [not tokens for tokens, width in self.parts for _ in range((tokens or 1) * width)]

    def heads(self, rank: int) -> list[int]:
        return [head for head, units in enumerate(self.owners) if units[rank]]

    def rows(self, head: int, rank: int) -> slice:
        """The queries of a head that a rank computes."""
        units = self.owners[head]
        first, last = (sum(units[:end]) * self.length // UNITS for end in (rank, rank + 1))
        return slice(first, last)

    @property
    def tensor(self) -> Tensor:
        """The owners as an op gets them."""
        return torch.tensor([[0, *accumulate(units)] for units in self.owners])


def draw(seed: int, size: int) -> Sequence:
    """A random case for `size` ranks."""
    rng = random.Random(f"{seed} {size}")
    tokens = rng.choice([size, 7, 13, 21])
    shapes = [
        [Part(tokens, 1)],
        [Part(0, 5), Part(tokens, 1)],
        [Part(0, 2), Part(tokens, 1), Part(0, 3)],
        [Part(tokens, 1), Part(0, 4), Part(tokens, 2)],
    ]
    queries = rng.choice([1, 1, 2, 3])
    key_heads = rng.randint(1, 3)
    owners = []
    for _ in range(key_heads * queries):
        ends = sorted(rng.choice([0, UNITS, UNITS, rng.randint(0, UNITS)]) for _ in range(size - 1))
        owners.append(tuple(b - a for a, b in pairwise([0, *ends, UNITS])))
    most = max(sum(units[rank] > 0 for units in owners) for rank in range(size))
    return Sequence(
        tuple(rng.choice(shapes)), tuple(owners), most + rng.randint(0, 1), key_heads, rng.choice([1, 3])
    )


def tensors(case: Sequence, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Whole query, key and value."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(len(case.owners), 4), (case.key_heads, 4), (case.key_heads, 6)]
    return [
        torch.randn(case.batch, heads, case.length, dim, generator=generator).to(dtype)
        for heads, dim in sizes
    ]


def exchange(ranks: Ranks, case: Sequence, seed: int, dtype: torch.dtype) -> Any:
    """Query, key and value by heads, the query by tokens again, and all gradients of a weighted sum."""
    mine = case.tokens(ranks.rank, ranks.size)
    whole = tensors(case, seed, dtype)
    given = [x[:, :, mine].requires_grad_() for x in whole]
    place = (ranks.rank, ranks.size, ranks.group, ranks.timeout, "a site")
    owners = case.tensor
    *by_heads, order = OPS.to_heads([*given, ORDER], owners, flat(case.parts), case.slots, False, *place)
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(9 + i)).to(dtype)
        for i, x in enumerate(by_heads)
    ]
    computed = torch.full_like(by_heads[0], torch.nan)  # rows that other ranks compute never travel
    for slot, head in enumerate(case.heads(ranks.rank)):
        rows = case.rows(head, ranks.rank)
        computed[:, slot, rows] = by_heads[0][:, slot, rows]
    back, _ = OPS.to_tokens([computed, order], owners, flat(case.parts), [len(owners)], True, *place)
    loss = sum((x * w).sum() for x, w in zip(by_heads, weights, strict=True))
    loss = loss + (back * (1 + ranks.rank)).sum()
    return [x.detach() for x in by_heads], back.detach(), weights, torch.autograd.grad(loss, given)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_heads_and_tokens_go_where_they_belong_and_gradients_come_back(pool: Pool, size: int) -> None:
    for seed in range(8):
        dtype = torch.bfloat16 if seed == 7 else torch.float64
        case = draw(seed, size)
        whole, queries = tensors(case, seed, dtype), len(case.owners) // case.key_heads
        results = pool.run(size, exchange, case, seed, dtype)
        wanted = [torch.zeros_like(x) for x in whole]
        for rank, (by_heads, back, weights, _) in enumerate(results):
            mine = case.heads(rank)
            for x, out, weight, gradient in zip(whole, by_heads, weights, wanted, strict=True):
                each = 1 if x is whole[0] else queries
                assert torch.equal(out[:, : len(mine)], x[:, [head // each for head in mine]])
                assert not out[:, len(mine) :].any(), "slots without a head are zero"
                for slot, head in enumerate(mine):
                    gradient[:, head // each] += weight[:, slot]
            assert torch.equal(back, whole[0][:, :, case.tokens(rank, size)])
        # Every rank adds (1 + rank) for the positions that it has, to the rank that computes the row.
        for rank in range(size):
            wanted[0][:, :, case.tokens(rank, size)] += 1 + rank
        for number, gradient in enumerate(wanted):
            found = torch.zeros_like(gradient)
            for rank, (*_, gradients) in enumerate(results):
                found[:, :, case.tokens(rank, size)] += gradients[number]
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
            torch.testing.assert_close(found, gradient, atol=tolerance, rtol=tolerance)


def gather(ranks: Ranks, parts: list[Part], dim: int, places: list[list[int]]) -> Any:
    """(whether the whole came back, gradient of a weighted sum, weights that differ between ranks)."""
    generator = torch.Generator().manual_seed(1)
    length = sum((tokens or 1) * width for tokens, width in parts)
    whole = torch.randn(2, length, length, 3, generator=generator, dtype=torch.float64)
    given = whole.index_select(dim, torch.tensor(places[ranks.rank])).requires_grad_()
    place = (ranks.rank, ranks.size, ranks.group, ranks.timeout, "a node")
    out, _ = OPS.gather_tokens([given, ORDER], dim, flat(parts), *place)
    weight = torch.randn(whole.shape, generator=generator, dtype=torch.float64) * (1 + ranks.rank)
    (gradient,) = torch.autograd.grad((out * weight).sum(), given)
    return torch.equal(out, whole), gradient, weight


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dim", [1, 2])
def test_a_gathered_dimension_is_whole_and_its_gradient_is_the_sum_over_ranks(
    pool: Pool, size: int, dim: int
) -> None:
    for parts in ([Part(9, 1)], [Part(0, 2), Part(5, 2), Part(0, 1)]):
        case = Sequence(tuple(parts), ((UNITS,),), 1, 1, 1)
        places = [case.tokens(rank, size) for rank in range(size)]
        results = pool.run(size, gather, parts, dim, places)
        total = sum(weight for *_, weight in results)
        shared = [not one for one in case.text()]
        for rank, (equal, gradient, weight) in enumerate(results):
            assert equal
            for at, place in enumerate(places[rank]):
                expected = (total if shared[place] else weight).select(dim, place)
                torch.testing.assert_close(gradient.select(dim, at), expected, atol=1e-12, rtol=1e-12)


def count(ranks: Ranks, tokens: int, text: int, owners: list[int], dim: int) -> tuple[int, int]:
    """Bytes that the sockets of this rank receive while query, key and value go to the heads, and a result back."""
    place = (ranks.rank, ranks.size, ranks.group, ranks.timeout, "a site")
    parts = [Part(0, text), Part(tokens, 1)]
    mine = Sequence(tuple(parts), (0,), 1, 1, 1).tokens(ranks.rank, ranks.size)
    x = torch.ones(1, len(owners), len(mine), dim)
    torch.distributed.barrier(process_group(ranks.group))
    before = received_bytes()
    of_heads = torch.tensor(whole_owners(owners, ranks.size))
    q, _, _, order = OPS.to_heads([x, x, x, ORDER], of_heads, flat(parts), 4, False, *place)
    between = received_bytes()
    OPS.to_tokens([q, order], of_heads, flat(parts), [len(owners)], True, *place)
    return between - before, received_bytes() - between


@pytest.mark.parametrize(
    ("size", "tokens", "text", "owners"),
    [(2, 4000, 0, [0, 0, 1, 1]), (4, 4000, 0, [0, 1, 2, 3]), (3, 3001, 7, [2, 0, 0, 0, 2])],
)
def test_the_sockets_carry_what_the_formula_says(
    pool: Pool, size: int, tokens: int, text: int, owners: list[int]
) -> None:
    dim, total = 16, 0
    found = pool.run(size, count, tokens, text, owners, dim)
    for rank, (to_heads, to_tokens) in enumerate(found):
        own = tokens // size + (rank < tokens % size)
        heads = owners.count(rank)
        wanted = 3 * heads * (tokens - own) * dim * 4, (len(owners) - heads) * (own + text) * dim * 4
        if not text:  # the formula of an even share
            assert sum(wanted) == 4 * len(owners) * tokens * dim * 4 * (size - 1) // size**2
        for measured, payload in zip((to_heads, to_tokens), wanted, strict=True):
            # The rest is the first message, of 240 bytes, and what gloo puts around each message.
            assert 0 <= measured - payload <= (size - 1) * 1000
        total += sum(wanted)
    assert total > 1_000_000


def count_keys(ranks: Ranks, parts: list[Part], reads: Tensor, dim: int) -> int:
    """Bytes that the sockets of this rank receive while it gets the keys that it reads."""
    place = (flat(parts), 1, ranks.rank, ranks.size, ranks.group, ranks.timeout, "a site")
    asked = OPS.ask_keys(reads[ranks.rank], *place)
    mine = Sequence(tuple(parts), (0,), 1, 1, 1).tokens(ranks.rank, ranks.size)
    torch.distributed.barrier(process_group(ranks.group))
    before = received_bytes()
    OPS.fetch_keys([torch.ones(1, reads.shape[2], len(mine), dim), ORDER], reads[ranks.rank], asked, *place)
    return received_bytes() - before


def test_the_sockets_carry_the_keys_that_a_rank_reads(pool: Pool) -> None:
    size, dim, parts = 3, 16, [Part(0, 7), Part(3001, 1)]
    case = Sequence(tuple(parts), (0,), 1, 1, 1)
    reads = torch.rand(size, 1, 4, case.length, generator=torch.Generator().manual_seed(3)) < 0.4
    for rank, measured in enumerate(pool.run(size, count_keys, parts, reads, dim)):
        remote = torch.ones(case.length, dtype=torch.bool)
        remote[case.tokens(rank, size)] = False
        payload = int((reads[rank] & remote).sum()) * dim * 4
        assert payload > 100_000
        assert 0 <= measured - payload <= (size - 1) * 1000


def check_ops(ranks: Ranks) -> None:
    place = (ranks.rank, ranks.size, ranks.group, ranks.timeout, "a site")
    owners = torch.tensor(even_owners(4, ranks.size))
    parts = flat([Part(0, 2), Part(5, 1)])
    q, k = (torch.randn(2, heads, 7, 3, requires_grad=True) for heads in (4, 2))
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))  # as models pass them
    for sums in (False, True):
        torch.library.opcheck(OPS.to_heads, ([q, k, ORDER], owners, parts, 4, sums, *place))
        torch.library.opcheck(OPS.to_tokens, ([q, ORDER], owners, parts, [4], sums, *place))
    torch.library.opcheck(OPS.gather_tokens, ([q, ORDER], 2, parts, *place))
    torch.library.opcheck(OPS.sum_tokens, ([q, ORDER], 2, parts, *place))


def test_fakes_strides_and_gradients_are_those_of_the_ops(pool: Pool) -> None:
    pool.run(1, check_ops)


def attend_compiled(ranks: Ranks) -> Any:
    """Attention compiled once, for owners that change between calls; errors of output and gradients."""
    from torch._dynamo.testing import CompileCounterWithBackend

    place = (ranks.rank, ranks.size, ranks.group, ranks.timeout, "a site")
    parts, heads = [Part(9, 1)], 3
    mine = Sequence(tuple(parts), ((UNITS,),), 1, 1, 1).tokens(ranks.rank, ranks.size)
    whole = torch.randn(2, heads, 9, 8, generator=torch.Generator().manual_seed(2))
    weight = torch.full((8, 8), 0.3, requires_grad=True)

    def alone(x: Tensor) -> Tensor:
        q = x @ weight
        return torch.nn.functional.scaled_dot_product_attention(q, x, x)

    def shared(x: Tensor, owners: Tensor) -> Tensor:
        q, k, v, order = OPS.to_heads([x @ weight, x, x, ORDER], owners, flat(parts), heads, False, *place)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return OPS.to_tokens([out, order], owners, flat(parts), [heads], True, *place)[0]

    wanted = alone(whole)
    (gradient,) = torch.autograd.grad(wanted.sin().sum(), weight)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(shared, backend=counter, dynamic=False)
    errors = []
    for owners in ([0, 1, 0], [1, 1, 1], [0, 0, 1]):
        out = compiled(whole[:, :, mine], torch.tensor(whole_owners(owners, ranks.size)))
        (found,) = torch.autograd.grad(out.sin().sum(), weight)
        torch.distributed.all_reduce(found, group=process_group(ranks.group))
        errors += [float((out - wanted[:, :, mine]).abs().max()), float((found - gradient).abs().max())]
    return counter.frame_count, max(errors)


def test_heads_move_without_a_new_program(pool: Pool) -> None:
    for compiled, error in pool.run(2, attend_compiled):
        assert compiled == 1
        assert error < 1e-4
