"""Heads that move between ranks: the arithmetic of balance, and attention while they move."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, partial
from itertools import accumulate, product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

import sparsify_compiler
from sparsify_compiler._torch import process_group
from sparsify_compiler.backend import configure, sparsify
from sparsify_compiler.parallel.balance import balanced, capacity, exact, lpt
from sparsify_compiler.parallel.shares import UNITS, Owners, even_owners, heads_of, owners_of, whole_owners
from sparsify_compiler.passes import pipeline
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime import program, site
from sparsify_compiler.runtime.moving import move, place_heads
from sparsify_compiler.runtime.program import Variant
from sparsify_compiler.runtime.site import functions_of
from sparsify_compiler.runtime.site_inputs import tensor_of
from sparsify_compiler.runtime.state import blank
from sparsify_compiler.testing.parallel import Graph, all_ranks, compare_graph, graphs_of, ranks_of_threads
from sparsify_compiler.testing.ranks import Pool


def loads_of(loads: Sequence[float], owners: Owners) -> list[Fraction]:
    """The load of each rank."""
    found = [Fraction(0)] * (len(owners[0]) - 1)
    for load, units in zip(loads, owners, strict=True):
        for rank in range(len(found)):
            found[rank] += Fraction(load) * (units[rank + 1] - units[rank]) / UNITS
    return found


def ratio(loads: Sequence[float], owners: Owners) -> float:
    """The largest load of a rank over the mean."""
    found = loads_of(loads, owners)
    return float(max(found) * len(found) / sum(found))


def best_by_trying(loads: Sequence[float], size: int, room: int) -> float:
    """The least largest load among all placements of whole heads."""
    placements = product(range(size), repeat=len(loads))
    return min(
        max(sum(load for load, on in zip(loads, ranks, strict=True) if on == rank) for rank in range(size))
        for ranks in placements
        if max(Counter(ranks).values()) <= room
    )


some_loads = st.lists(st.integers(1, 60).map(lambda n: n / 64), min_size=1, max_size=6)


@given(loads=some_loads, size=st.integers(1, 3), extra=st.integers(0, 2))
def test_few_heads_are_placed_as_well_as_by_trying_all_placements(
    loads: list[float], size: int, extra: int
) -> None:
    room = -(-len(loads) // size) + extra
    best = best_by_trying(loads, size, room)
    first = lpt(loads, size, room)
    found = exact(loads, size, room, first)
    for ranks in (first, found):
        assert max(Counter(ranks).values()) <= room
    largest = [float(max(loads_of(loads, whole_owners(ranks, size)))) for ranks in (first, found)]
    assert largest[1] == pytest.approx(best)
    if room == len(loads):  # Graham's bound, where room does not bind
        assert largest[0] <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


def test_equal_loads_are_placed_by_index() -> None:
    assert lpt([1.0] * 5, 2, 3) == [0, 1, 0, 1, 0]
    assert lpt([0.0] * 4, 2, 2) == [0, 1, 0, 1]
    assert lpt([5.0, 1.0, 1.0, 1.0], 2, 2) == [0, 1, 1, 0], "the second rank has room for two heads only"


@given(
    loads=st.lists(st.floats(1e-3, 1), min_size=1, max_size=48),
    dense=st.integers(0, 3),
    size=st.integers(1, 64),
)
def test_owners_are_balanced_and_have_room(loads: list[float], dense: int, size: int) -> None:
    loads[:dense] = [1.0] * len(loads[:dense])
    room = capacity(len(loads), size)
    owners = balanced(loads, size, room)
    for units in owners:
        assert units[0] == 0
        assert units[-1] == UNITS
        assert units == sorted(units)
    for rank in range(size):
        assert len(heads_of(owners, rank)) == sum(one[rank] < one[rank + 1] for one in owners) <= room
    assert ratio(loads, owners) <= 1.05 + 1e-9
    assert balanced(loads, size, room) == owners


def test_ranks_share_a_head_only_where_whole_heads_leave_more_than_asked() -> None:
    whole = balanced([0.2] * 18, 6, capacity(18, 6))
    assert all(set(units) == {0, UNITS} for units in whole)
    dense = [1.0] + [0.1] * 17
    assert ratio(dense, whole_owners(lpt(dense, 4, 18), 4)) == pytest.approx(4 / 2.7)
    shared = balanced(dense, 4, capacity(18, 4))
    assert len(owners_of(shared, 0)) == 2
    assert ratio(dense, shared) <= 1.05


HEADS, TOKENS = 6, 48


class Grouped(nn.Module):
    """One attention with six query heads, of which some are sharp, three key heads, and a mask for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.q, self.kv = nn.Linear(32, HEADS * 8), nn.Linear(32, 2 * 3 * 8)
        hidden = torch.rand(1, 3, 1, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.2
        # Alike for query heads that share keys: one process estimates by the largest weight of a key among them.
        hidden = hidden.repeat_interleave(2, 1)
        self.register_buffer("mask", torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf))
        self.register_buffer("sharp", torch.linspace(0.3, 6, HEADS)[:, None, None])

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) * self.sharp
        k, v = self.kv(x).unflatten(-1, (2, 3, -1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)


def video(call: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    first, change = (torch.randn(2, 4, 3, 8, 8, generator=generator) for _ in range(2))
    return first + 0.1 * call * change


@cache
def graph() -> Graph:
    torch.manual_seed(0)
    (found,) = graphs_of(Grouped().eval(), {"video": video(0)})
    return found


MOVES = [[0, 0, 0, 1, 1, 2], [2, 2, 1, 0, 2, 1], [1, 1, 0, 0, 1, 0]]
"""The rank of each head, of three ranks; in the end the last rank has none."""
METHODS: dict[str, dict[str, Any]] = {
    "svg2": {"method": "svg2", "q_clusters": 6, "kv_clusters": 12},
    "keys": {"method": "keys", "q_clusters": 6, "kv_budget": 0.2},
    "cubes": {"method": "cubes", "cube": (1, 2, 2), "query_cube": (1, 2, 2), "far_field": "drop"},
    "max_error": {"method": "svg2", "q_clusters": 6, "kv_clusters": 12, "max_error": 0.05},
}


@cache
def lowered(method: str, ranks: Ranks | None) -> dict[str, fx.GraphModule]:
    """Phase -> the graph of a rank, or of one process."""
    options = {"dense_steps": 0, "dense_layers": 0, "provider": "reference", "parallel": "auto"}
    config = configure({**options, **METHODS[method]})
    with torch.no_grad():
        analysed = pipeline.analyse(graph()[0], config)
        shared = analysed if ranks is None else pipeline.share(analysed, config, ranks)
        return {phase: pipeline.rewrite(shared, config, Variant(phase)) for phase in ("dense", "sparse")}


def calls(method: str, owners: Sequence[Owners], ranks: Ranks | None) -> list[Tensor]:
    """The output and the reports of each call of a video, in which heads have these owners. The first is dense."""
    graphs, (_, args) = lowered(method, ranks), graph()
    functions = [functions_of(one) for one in graphs.values()]
    extra = graphs["sparse"].meta["extra"]
    state, found = blank(extra.state), []
    for call, now in enumerate(owners):
        if ranks is not None and call and now != owners[call - 1]:
            move(extra.moving, state, [owners[call - 1]], [now])
        given = extra.bind([], state, initialised=call > 0, owners=[tensor_of(now)] * len(extra.moving))
        latents = [video(call) if one.shape == video(0).shape else one for one in args]
        with torch.no_grad():
            found += graphs["sparse" if call else "dense"](*latents, *given)
        found += extra.reports_in(state).values() if call else []
    assert functions
    return [one.clone() for one in found]


def in_threads(method: str, owners: Sequence[Owners]) -> list[list[Tensor]]:
    """`calls` of three ranks."""
    ranks = [ranks_of_threads(rank, 3) for rank in range(3)]
    for one in ranks:  # threads must not trace at once: PyTorch keeps what it traces in globals
        lowered(method, one)
    return all_ranks([partial(calls, method, owners, one) for one in ranks])


def of_units(*units: Sequence[int]) -> Owners:
    """Owners from the units of each head that each rank computes."""
    assert all(sum(one) == UNITS for one in units)
    return [[0, *accumulate(one)] for one in units]


SHARED = of_units(
    [UNITS // 2, UNITS // 2, 0],
    [UNITS, 0, 0],
    [0, 0, UNITS],
    [6_000, UNITS - 7_000, 1_000],
    [0, UNITS, 0],
    [0, UNITS - 3_000, 3_000],
)
"""Three heads are shared, by all three ranks or by two."""


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_move_give_the_same_bits_and_shared_ones_the_same_output(method: str) -> None:
    still = [even_owners(HEADS, 3)] * 4
    moving = [whole_owners(one, 3) for one in (MOVES[0], *MOVES)]
    alone, wanted, moved, shared = (
        calls(method, still, None),
        *(in_threads(method, owners) for owners in (still, moving, [SHARED] * 3 + still[:1])),
    )
    for rank in range(3):
        for one, a, b, c in zip(alone, wanted[rank], moved[rank], shared[rank], strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)  # no row measures its recall
            for found in (a, c):
                torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_slots_without_a_head_are_not_computed() -> None:
    sparse, dense = list[int](), list[int]()

    def noting(found: list[int], function: Any, query: Tensor, *args: Any, **options: Any) -> Any:
        if not isinstance(query, FakeTensor):
            found.append(query.shape[1])
        return function(query, *args, **options)

    attends = site.attention_with_far_field, torch.nn.functional.scaled_dot_product_attention
    with (
        patch.object(site, "attention_with_far_field", partial(noting, sparse, attends[0])),
        patch.object(site.F, "scaled_dot_product_attention", partial(noting, dense, attends[1])),
    ):
        in_threads("cubes", [whole_owners(MOVES[2], 3)] * 2)
    assert capacity(HEADS, 3) == 5
    assert sorted(dense) == [3, 3]
    assert sorted(sparse) == [1, 3, 3], "a rank without a head takes part with one slot"


def test_heads_with_tables_of_their_own_are_placed_once_by_density() -> None:
    windows = [(1, 1, 1), (3, 1, 1), (1, 3, 1), (3, 3, 3), (1, 1, 3), (3, 3, 1)]
    options = {"method": "sta", "tile": (1, 1, 1), "window": windows, "provider": "reference"}
    found: list[Owners] = []

    def note(graph: fx.GraphModule, ranks: Ranks) -> None:
        found.append(graph.sparsify_owners0.tolist())

    for trains in (False, True):
        parallel = {"form": "hcp", "balance": "video"}
        outcome = compare_graph(graph(), {**options, "parallel": parallel}, 3, trains=trains, change=note)
        assert outcome.output <= 1e-5
        assert outcome.gradient <= 1e-5
    assert found == [found[0]] * 3 + [even_owners(HEADS, 3)] * 3, "in training all heads stay"
    # Tokens in a window of 1 x 1 x 1, and so on, of the 3 x 4 x 4 tokens; a window ends at the edge of the grid.
    assert ratio([1, 3, 3, 27, 3, 9], found[0]) < 1.1 < ratio([1, 3, 3, 27, 3, 9], even_owners(HEADS, 3))


def videos(ranks: Ranks | None) -> tuple[list[Tensor], list[Any], int]:
    """Two videos of six steps, the first dense: (outputs, owners in each call, programs that Dynamo compiled)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    more: dict[str, Any] = {}
    if ranks is not None:
        mesh = DeviceMesh.from_group(process_group(ranks.group), "cpu")
        more = {"parallel": {"form": "hcp", "mesh": mesh, "timeout": ranks.timeout}}
    options = {**METHODS["svg2"], "dense_steps": 1, "dense_layers": 0, "inner_backend": "eager", **more}
    counter = CompileCounterWithBackend(partial(sparsify, options=options))
    compiled = torch.compile(Grouped().eval(), backend=counter, dynamic=False)
    outputs, owners = [], []

    def noting(*args: Any, **options: Any) -> list[Tensor]:
        owners.extend(found := place_heads(*args, **options))
        return found

    with torch.no_grad(), patch.object(program, "place_heads", noting):
        for _ in range(2):
            with sparsify_compiler.generation(6):
                outputs += [compiled(video(call)) for call in range(6)]
    return outputs, [one.tolist() for one in owners], counter.frame_count


def test_heads_move_at_the_same_calls_on_all_ranks_in_one_program(pool: Pool) -> None:
    wanted, _, _ = videos(None)
    (found, owners, programs), (others, owners_of_other, _) = pool.run(2, videos)
    assert owners == owners_of_other
    assert programs == 1
    even, first, second = even_owners(HEADS, 2), owners[:6], owners[6:]
    assert first[:4] == [even] * 4, "the first sparse steps measure"
    assert first[4] != even
    assert first[4:] == [first[4]] * 2, "owners are planned once for each video"
    assert second[0] == even, "in a dense step all heads cost the same"
    assert second[1:] == [second[1]] * 5
    assert second[1] != even
    for a, b, c in zip(found, others, wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
