"""Ranks that keep their queries in attention and get the keys that these read: equal to one process."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh

import sparsify_compiler
from sparsify_compiler.backend import configure
from sparsify_compiler.parallel import sequence as sequences
from sparsify_compiler.passes import pipeline
from sparsify_compiler.plan import Ranks, SharedSequence
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.dits import Attend, Recipe
from sparsify_compiler.testing.models import CASES
from sparsify_compiler.testing.oracles import tile_mask
from sparsify_compiler.testing.parallel import (
    Graph,
    Outcome,
    all_ranks,
    compare,
    compare_graph,
    graphs_of,
    ranks_of_threads,
)
from sparsify_compiler.testing.ranks import Pool

PLAIN = Recipe(
    grid=(3, 3, 5), batch=1, patch="conv3d", frames_first=False, position="rope halves", text="none",
    text_tokens=3, extra_tokens=0, streams=False, mask="none", heads=3, kv_heads=3, head_dim=8, split="linears",
    view="view", norm=True, spelling="keywords", scale=None, trap="", trapped=0,
)  # fmt: skip
"""45 tokens: no number of ranks here divides them."""
JOINT = replace(
    PLAIN, heads=4, kv_heads=2, spelling="gqa", batch=3, text="first", text_tokens=5, streams=True,
    mask="additive", split="chunks", view="unflatten",
)  # fmt: skip
MASKED = replace(
    PLAIN, mask="per head", text="last", extra_tokens=2, position="rope complex", split="permute"
)
BY_HAND = replace(
    PLAIN, spelling="matmul", mask="bool", text="cross", patch="linear", position="added", batch=2
)
FEW = {"far_field": "drop", "top_p": 0.5, "min_kv_ratio": 0.1, "min_gain": None}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "cubes": {**FEW, "cube": (1, 2, 2), "query_cube": (1, 2, 3)},
    "svg2": {**FEW, "q_clusters": 5, "kv_clusters": 8},
    "tile": {"reference_frames": 1},
}
"""Options with which a rank reads some keys of others only."""
BOUND = 1e-5
"""Rounding in float32: matrix products of fewer rows may add in another order."""


@functools.cache
def graph_of(model: Recipe | str, trains: bool) -> Graph:
    module, inputs = model.build() if isinstance(model, Recipe) else CASES[model].build()
    return graphs_of(module, inputs, trains=trains)[0]


def outcome(model: Recipe | str, method: str, size: int, trains: bool = False, **others: Any) -> Outcome:
    options = {"method": method, "provider": "reference", **OPTIONS.get(method, {})}
    return compare_graph(graph_of(model, trains), options, size, trains=trains, **others)


def case(
    model: Recipe | str, method: str, size: int, form: str, trains: bool, name: str, **marks: Any
) -> Any:
    return pytest.param(model, method, size, form, trains, id=f"{name}-{method}-{form}{size}", **marks)


NIGHTLY: Any = {"marks": pytest.mark.nightly}


@pytest.mark.parametrize(
    ("model", "method", "size", "form", "trains"),
    [
        case(PLAIN, "dense", 4, "scp", True, "3-heads"),
        case(JOINT, "tile", 3, "scp", True, "joint-gqa-mask-batch-3"),
        case(MASKED, "cubes", 2, "scp", False, "mask-of-each-head"),
        case(PLAIN, "tile", 4, "hybrid", True, "3-heads"),
        case(JOINT, "tile", 2, "scp", False, "joint-gqa-mask-batch-3"),
        case(JOINT, "svg2", 4, "hybrid", False, "joint-gqa-mask-batch-3"),
        case(BY_HAND, "dense", 3, "scp", True, "by-hand-cross", **NIGHTLY),
        case(MASKED, "dense", 2, "scp", True, "mask-of-each-head", **NIGHTLY),
        case(PLAIN, "svg2", 4, "scp", False, "3-heads", **NIGHTLY),
        case(PLAIN, "cubes", 4, "hybrid", False, "3-heads", **NIGHTLY),
        case(JOINT, "dense", 4, "hybrid", True, "joint-gqa-mask-batch-3", **NIGHTLY),
        *(
            case(family, method, size, form, form == "scp", family, **NIGHTLY)
            for family in ("wan", "hunyuan_video", "cogvideox", "ltx")
            for form, method, size in (("scp", "tile", 3), ("hybrid", "cubes", 4))
        ),
    ],
)
def test_ranks_compute_what_one_process_computes(
    model: Recipe | str, method: str, size: int, form: str, trains: bool
) -> None:
    found = outcome(model, method, size, trains, form=form)
    assert found.output <= BOUND
    assert found.gradient <= BOUND
    assert found.sharding.form == form
    assert len(found.sharding.sites) == (4 if model == "hunyuan_video" else 2)
    assert found.sharding.by_heads == ()


def test_dense_steps_are_observed() -> None:
    assert outcome(JOINT, "svg2", 2, form="scp", phase="dense").output <= BOUND


def move_a_cut(graph: fx.GraphModule, ranks: Ranks) -> None:
    """On the last rank, take the positions of the tokens from one place too early."""
    if ranks.rank == ranks.size - 1:
        cut = next(
            node
            for node in graph.graph.nodes
            if node.target == "narrow" and node.args[1] == node.args[0].meta["example_value"].dim() - 2
        )
        source, dim, first, length = cut.args
        cut.args = source, dim, first - 1, length
        graph.recompile()


def ask_for_fewer(graph: fx.GraphModule, ranks: Ranks) -> None:
    """On the first rank, leave out one key that its queries read, on both sides."""
    for name, tensor in graph.named_buffers():
        if name.startswith("sparsify_read") and ranks.rank == 0:
            tensor[..., -1] = False
        if name.startswith("sparsify_asked") and ranks.rank == ranks.size - 1:
            tensor[0, ..., -1] = False


@pytest.mark.parametrize("change", [move_a_cut, ask_for_fewer])
def test_a_wrong_position_or_a_missing_key_shows(change: Any) -> None:
    assert outcome(PLAIN, "dense", 2, form="scp", change=change).output > 1e-3


@pytest.mark.parametrize(
    ("method", "options", "trains", "why"),
    [
        ("cubes", {"far_field": "linear"}, False, "its far field 'linear' reads all keys"),
        ("tile", {"far_field": "mean"}, False, "its far field 'mean' reads all keys"),
        ("keys", {"far_field": "drop"}, False, "method 'keys' compares its queries with all keys"),
        ("cubes", {**FEW, "measure_recall": 0.5}, False, "its recall is measured over all keys"),
        ("cubes", FEW, True, "method 'cubes' has no gradient across ranks"),
    ],
)
def test_sites_that_need_all_queries_share_heads_with_the_reason(
    method: str, options: Any, trains: bool, why: str
) -> None:
    given = {"method": method, "provider": "reference", "dense_steps": 0, "dense_layers": 0, **options}
    config = configure(given)
    analysed = pipeline.analyse(graph_of(PLAIN, False)[0], config)
    shared = pipeline.share(analysed, config, ranks_of_threads(0, 2, "scp"), trains=trains)
    found = shared.meta["sharding"]
    assert found.by_heads == tuple((name, why) for name in found.sites)
    assert f"and the heads of 2 (layers.0: {why}; " in str(found)


def test_a_site_that_shares_heads_in_a_hybrid_is_equal_to_one_process() -> None:
    options = {"method": "cubes", "provider": "reference", "far_field": "linear"}
    found = compare_graph(graph_of(PLAIN, False), options, 4, form="hybrid")
    assert len(found.sharding.by_heads) == 2
    assert found.output <= BOUND


def random_table(generator: torch.Generator, heads: int, ordered: bool) -> BlockTable:
    """Blocks of random sizes over 23 queries and 45 keys; some are empty."""

    def sizes(blocks: int, tokens: int) -> Tensor:
        cuts = torch.randint(0, tokens + 1, (1, heads, blocks - 1), generator=generator).sort(-1).values
        ends = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=tokens)
        return ends.diff(dim=-1)

    def order(tokens: int) -> Tensor:
        return torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])[None].int()

    return BlockTable.from_block_mask(
        torch.rand(1, heads, 6, 9, generator=generator) < 0.3,
        sizes(6, 23),
        sizes(9, 45),
        q_order=order(23) if ordered else None,
        kv_order=order(45) if ordered else None,
    )


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_table_of_some_queries_has_their_rows_of_the_mask(heads: int, ordered: bool) -> None:
    generator = torch.Generator().manual_seed(heads)
    for _ in range(20):
        table = random_table(generator, heads, ordered)
        places = torch.randperm(23, generator=generator)[: int(torch.randint(1, 23, (), generator=generator))]
        places = places.sort().values
        some = table.of_queries(places)
        some.check(len(places), 45)
        rows = table.mask()[:, :, places]
        assert torch.equal(some.mask(), rows)
        assert torch.equal(some.keys_read(), rows.any(2))


def fetched(rank: int, size: int, tables: list[BlockTable], key: Tensor) -> Tensor:
    """The keys that a rank gets, where ranks ask for what their own tables read."""
    ranks = ranks_of_threads(rank, size)
    sequence = SharedSequence(ranks=ranks, parts=(0, 4, 19, 2, 0, 3))
    place = [*sequence.parts], 1, ranks.rank, ranks.size, ranks.group, 5.0, "attention"
    read = sequences.of_key_heads(tables[rank].keys_read(), key.shape[1])
    asked = torch.ops.sparsify.ask_keys(read, *place)
    own = key[:, :, sequences.places_of(sequence, rank)]
    found, _ = torch.ops.sparsify.fetch_keys([own, torch.zeros(())], read, asked, *place)
    return found


@pytest.mark.parametrize("heads", [1, 4])
def test_a_rank_gets_the_keys_that_its_rows_read_and_no_others(heads: int) -> None:
    generator, size = torch.Generator().manual_seed(heads), 3
    tables = [random_table(generator, heads, True) for _ in range(size)]
    key = torch.randn(2, 2, 45, 8, generator=generator)
    sent: dict[tuple[int, int], int] = {}
    exchange = sequences.exchange

    def counting(messages: Any, shapes: Any, ranks: Ranks, what: str) -> Any:
        if what.startswith("fetch_keys"):
            for peer in range(size):
                sent[ranks.rank, peer] = sum(one[peer].numel() * one[peer].element_size() for one in messages)
        return exchange(messages, shapes, ranks, what)

    with patch.object(sequences, "exchange", counting):
        results = all_ranks([partial(fetched, rank, size, tables, key) for rank in range(size)])
    # 19 tokens of two positions each, between four positions and three that all ranks have.
    owner = torch.tensor([-1] * 4 + [0] * 14 + [1] * 12 + [2] * 12 + [-1] * 3)
    reads = []
    for rank, found in enumerate(results):
        read = tables[rank].mask().any(2)
        reads.append(read)
        read = read.expand(2, 2, -1) if heads == 1 else read.view(1, 2, 2, 45).any(2).expand(2, -1, -1)
        here = (owner == rank) | (owner == -1)
        wanted = key.masked_fill(~(read | here)[..., None], 0)
        assert torch.equal(found, wanted)
        for peer in range(size):
            count = 0 if peer == rank else int((read & (owner == peer)).sum())
            assert sent[peer, rank] == count * 8 * 4
    sequence = SharedSequence(ranks=Ranks(0, size), parts=(0, 4, 19, 2, 0, 3))
    counted = sequences.bytes_sent(reads, sequence, batch=2, kv_heads=2, head_dim=5, value_dim=3, itemsize=4)
    assert counted == [[sent[sender, receiver] for receiver in range(size)] for sender in range(size)]


@pytest.mark.parametrize("model", [PLAIN, JOINT], ids=["video", "joint"])
def test_ranks_send_what_the_mask_of_tile_names(model: Recipe) -> None:
    sent = torch.zeros(3, 3, dtype=torch.int64)
    exchange = sequences.exchange

    def counting(messages: Any, shapes: Any, ranks: Ranks, what: str) -> Any:
        if what.startswith("fetch_keys"):
            for peer in range(3):
                sent[ranks.rank, peer] += sum(one[peer].numel() for one in messages)
        return exchange(messages, shapes, ranks, what)

    with patch.object(sequences, "exchange", counting):
        outcome(model, "tile", 3, form="scp")
    # Each rank has one frame of the video. Text reads everything, but ranks attend in parts for it.
    frames = tile_mask(3, 1, 15).view(3, 15, 3, 15).any(1)
    counts = frames.sum(-1).mT * (1 - torch.eye(3, dtype=torch.int64))
    # Two sites, keys and values of eight numbers, three heads, or two in three batches.
    each = 2 * 2 * 8 * model.batch * model.kv_heads
    assert counts.tolist() == [[0, 15, 15], [15, 0, 0], [15, 0, 0]]
    assert torch.equal(sent, each * counts)


def attend() -> tuple[nn.Module, Mapping[str, Any]]:
    torch.manual_seed(0)
    return Attend(), {"video": torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("form", [pytest.param("scp", marks=pytest.mark.nightly), "hybrid"])
def test_clusters_stay_warm_on_real_ranks(pool: Pool, form: str) -> None:
    options = {"method": "svg2", "inner_backend": "eager", "provider": "reference", **OPTIONS["svg2"]}
    call = partial(compare, build=attend, options=options, calls=3, form=form)
    for found, programs in pool.run(4, call):
        assert found.output <= BOUND
        assert found.sharding.form == form
        assert found.sharding.by_heads == ()
        assert programs == 1


def test_inductor_trains_with_the_gradients_of_one_process(pool: Pool) -> None:
    options = {"method": "tile", "provider": "reference", **OPTIONS["tile"]}
    call = partial(compare, build=attend, options=options, trains=True, form="scp")
    for found, _ in pool.run(2, call):
        assert found.output <= BOUND
        assert found.gradient <= BOUND


def explained(ranks: Ranks) -> tuple[str, str, Tensor, Tensor]:
    """(the explanation, that of training, the density of each head that stats knows on this rank, and in one
    process)."""
    model, inputs = attend()
    options: dict[str, Any] = {"method": "cubes", "inner_backend": "eager", "dense_steps": 0}
    options |= {"dense_layers": 0, **OPTIONS["cubes"]}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("hosts", "ranks"))
    shared = {**options, "parallel": {"form": "auto", "mesh": mesh, "timeout": ranks.timeout}}
    torch._dynamo.reset()
    text, of_training = (
        str(sparsify_compiler.explain(model.train(trains), **inputs, options=shared))
        for trains in (False, True)
    )
    found = []
    for given in (shared, options):
        torch._dynamo.reset()
        again, inputs = attend()
        with torch.no_grad():
            torch.compile(again, backend="sparsify", options=given, dynamic=False)(**inputs)
        found.append(torch.as_tensor(sparsify_compiler.stats(again).measurements[0].density))
    return text, of_training, found[0], found[1]


def test_explain_names_the_form_and_stats_show_all_heads(pool: Pool) -> None:
    for text, of_training, shared, alone in pool.run(4, explained):
        assert "method 'cubes' has no gradient across ranks" in " ".join(of_training.split())
        assert "4 ranks share 18 tokens, and the queries of 1 attention calls (form 'hybrid')" in text
        assert shared.numel() == 2
        assert torch.equal(shared, alone)
