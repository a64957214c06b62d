"""Costs: bytes against exchanges written out row by row, shares that add up, and numbers worked out by hand."""

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_compiler.parallel.shares import whole_owners
from sparsify_compiler.runtime.cost import (
    Attention,
    Cluster,
    Mesh,
    Split,
    Traffic,
    Work,
    attention_loads,
    attention_memory,
    attention_traffic,
    choose_form,
    meshes,
    predict,
)

CLUSTER = Cluster(
    hosts=2, gpus=2, memory=1e9, products=100.0, attention=50.0, sparse=25.0, traffic=10.0, inside=8.0,
    between=2.0, latency=0.5,
)  # fmt: skip
"""Slow enough that a few numbers take seconds."""


def attention(heads: int = 2, tokens: int = 8, **others: object) -> Attention:
    fields: dict[str, object] = {
        "heads": heads, "kv_heads": heads, "tokens": tokens, "head_dim": 3, "value_dim": 3, "bytes": 2,
        "densities": (1.0,) * heads,
    }  # fmt: skip
    return Attention(**{**fields, **others})  # type: ignore[arg-type]


def runs(total: int, parts: int) -> list[list[int]]:
    """Even runs of numbers, the first ones longer."""
    return [one.tolist() for one in torch.arange(total).tensor_split(parts)]


def row_by_row(one: Attention, mesh: Mesh, gpus: int) -> list[dict[int, list[int]]]:
    """The bytes that each rank sends to hosts and gets from them: exchange -> rank -> [in, out, from in, from out].

    Every row of every head of query, key, value and output is a step of a loop.
    """
    size = mesh.size
    own = runs(one.tokens, size)
    heads = runs(one.heads, mesh.heads)
    group_of = one.heads // one.kv_heads
    found: list[dict[int, list[int]]] = []

    def send(source: int, target: int, width: int) -> None:
        if source != target:
            far = source // gpus != target // gpus
            found[-1][source][far] += width * one.bytes
            found[-1][target][2 + far] += width * one.bytes

    def begin() -> None:
        found.append(defaultdict(lambda: [0, 0, 0, 0]))

    def ranks_of_a_group(first: int) -> range:
        return range(first * mesh.heads, (first + 1) * mesh.heads)

    for _ in range(1 if mesh.heads > 1 else 0):
        begin()
        for _batch, source in itertools.product(range(one.batch), range(size)):
            for _token, target in itertools.product(own[source], ranks_of_a_group(source // mesh.heads)):
                mine = heads[target % mesh.heads]
                for _head in mine:
                    send(source, target, one.head_dim)
                for _key in {head // group_of for head in mine}:
                    send(source, target, one.head_dim + one.value_dim)
        begin()
        for _batch, source in itertools.product(range(one.batch), range(size)):
            for target in ranks_of_a_group(source // mesh.heads):
                for _row in [*own[target], *range(one.others)]:
                    for _head in heads[source % mesh.heads]:
                        send(source, target, one.value_dim)
    if mesh.sequence > 1:
        begin()
        for _batch, target, source in itertools.product(range(one.batch), range(size), range(size)):
            if target % mesh.heads == source % mesh.heads and target != source:
                keys = {head // group_of for head in heads[target % mesh.heads]}
                for there in ranks_of_a_group(source // mesh.heads):
                    for _token, _key in itertools.product(own[there], keys):
                        send(source, target, one.head_dim + one.value_dim)
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 13), st.integers(0, 3),
    st.integers(1, 5), st.sampled_from([1, 2]),
)  # fmt: skip
def test_bytes_are_those_of_every_row_that_is_sent(
    heads: int, sequence: int, kv_heads: int, tokens: int, others: int, gpus: int, queries: int
) -> None:
    mesh = Mesh(heads, sequence)
    one = attention(
        kv_heads * queries, tokens, kv_heads=kv_heads, others=others, batch=2, value_dim=5
    )  # fmt: skip
    expected = row_by_row(one, mesh, gpus)
    found = attention_traffic(one, mesh, gpus)
    assert len(found) == len(expected)
    for traffic, wanted in zip(found, expected, strict=True):
        assert [list(each[:4]) for each in traffic] == [wanted[rank] for rank in range(mesh.size)]


def test_the_formula_of_one_message_by_hand() -> None:
    """3 heads on 2 ranks, 7 tokens: rank 0 has 2 heads and 4 tokens, rank 1 one head and 3 tokens."""
    there, back = attention_traffic(attention(3, 7), Mesh(2, 1), gpus=2)
    # A rank packs all its rows, those for itself too, and unpacks all rows of its heads.
    assert there == [
        Traffic(4 * 1 * 9 * 2, 0, 3 * 2 * 9 * 2, 0, (4 * 3 + 7 * 2) * 9 * 2),
        Traffic(3 * 2 * 9 * 2, 0, 4 * 1 * 9 * 2, 0, (3 * 3 + 7 * 1) * 9 * 2),
    ]
    assert [each[:4] for each in back] == [
        (2 * 3 * 3 * 2, 0, 1 * 4 * 3 * 2, 0),
        (1 * 4 * 3 * 2, 0, 2 * 3 * 3 * 2, 0),
    ]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 20), st.data())
def test_loads_of_ranks_add_up_to_one_process(
    heads: int, mesh_heads: int, sequence: int, tokens: int, data: st.DataObject
) -> None:
    densities = tuple(data.draw(st.lists(st.floats(0, 1), min_size=heads, max_size=heads)))
    owners = data.draw(st.lists(st.integers(0, mesh_heads - 1), min_size=heads, max_size=heads))
    one = attention(heads, tokens + 1, densities=densities)
    whole = sum(4 * 3 * (tokens + 1) ** 2 * density for density in densities)
    for given_owners in (None, whole_owners(owners, mesh_heads)):
        loads = attention_loads(one, Mesh(mesh_heads, sequence), given_owners)
        assert len(loads) == mesh_heads * sequence
        assert sum(loads) == pytest.approx(whole)


def test_sharing_the_sequence_sends_less_where_less_than_two_of_ranks_keys_are_read() -> None:
    for size in (2, 4, 8):
        for remote, better in ((1.9 / size, True), (2.1 / size, False)):
            one = attention(8, 64, remote=remote)
            sent = [
                max(
                    sum(each[rank].sent for each in attention_traffic(one, mesh, size))
                    for rank in range(size)
                )
                for mesh in (Mesh(1, size), Mesh(size, 1))
            ]
            assert (sent[0] < sent[1]) == better


def test_a_prediction_by_hand() -> None:
    work = Work(
        tokens=8,
        attentions=(attention(), attention()),
        flops=Split(400.0, 100.0),
        traffic=Split(80.0, 20.0),
        gathered=(64.0,),
        weights=1000.0,
        live=(Split(160.0, 0.0), Split(0.0, 50.0)),
    )
    alone = predict(work, Mesh(1, 1), CLUSTER)
    dense = 2 * 2 * 4 * 3 * 64  # two attentions of two heads
    assert alone.parts == pytest.approx(
        {"products": 5, "attention": dense / 50, "traffic": 10, "inside": 0, "between": 0, "latency": 0}
    )
    assert (alone.sent, alone.memory, alone.balance, alone.bound) == (0, 1160, 1, "attention")

    # On 2 ranks of a host: 4 tokens and a head each. 4 rows of 9 elements there and of 3 back, for each attention;
    # 4 tokens of 8 bytes to the other rank in the end.
    two = predict(work, Mesh(2, 1), CLUSTER)
    sent = 2 * (4 * 9 * 2 + 4 * 3 * 2) + 32
    packed = 2 * ((4 * 2 + 8) * 9 * 2 + (8 + 4 * 2) * 3 * 2) + (4 * 2 + 8) * 8
    assert two.parts == pytest.approx(
        {
            "products": 3, "attention": dense / 100, "traffic": 6 + 7 * packed / 10, "inside": sent / 8,
            "between": 0, "latency": 5 * 0.5,
        }
    )  # fmt: skip
    assert two.sent == sent
    # Query, key, value and output by heads: 8 rows of 12 elements.
    assert two.memory == 1000 + 80 + 8 * 12 * 2
    # The same ranks on two hosts wait for the links between them.
    apart = predict(work, Mesh(2, 1), replace(CLUSTER, gpus=1))
    assert (apart.inside, apart.between) == pytest.approx((0, sent / 2))
    sparse = replace(work, attentions=(attention(densities=(0.5, 0.25)),) * 2)
    uneven = predict(sparse, Mesh(2, 1), CLUSTER)
    assert uneven.balance == pytest.approx(0.5 / 0.375)
    assert uneven.attention == pytest.approx(2 * 0.5 * 4 * 3 * 64 / 25)
    assert not predict(work, Mesh(1, 1), replace(CLUSTER, memory=1159)).fits


def test_meshes_hold_every_rank_once() -> None:
    assert [*meshes(6)] == [(6, 1), (3, 2), (2, 3), (1, 6)]
    assert [mesh.form for mesh in meshes(6)] == ["hcp", "hybrid", "hybrid", "scp"]
    assert Mesh(1, 1).form == "one"


def test_a_form_is_chosen_by_time_under_the_memory_limit() -> None:
    work = Work(tokens=64, attentions=(attention(4, 64, remote=0.1),))
    fast = replace(CLUSTER, latency=0.0)
    assert choose_form(work, fast, 4, ("hcp", "scp")).form == "scp"
    read_all = replace(work, attentions=(attention(4, 64),))
    chosen = choose_form(read_all, fast, 4, ("hcp", "scp"))
    assert chosen.form == "hcp"
    assert chosen.reason.startswith("hcp 4x1: ")
    assert ", predicted, against scp 1x4: " in chosen.reason
    assert choose_form(read_all, fast, 4, ("scp",)).mesh == (1, 4)
    # Fewer heads than ranks: with heads alone, half of the ranks would idle.
    few = replace(work, attentions=(attention(2, 64),))
    assert choose_form(few, fast, 4, ("hcp", "scp", "hybrid")).mesh == (2, 2)
    limit = attention_memory(attention(4, 64), Mesh(1, 4)) - 1
    assert attention_memory(attention(4, 64), Mesh(4, 1)) <= limit
    costly = replace(fast, memory=limit, inside=1e9, between=1e9)
    assert choose_form(read_all, costly, 4, ("hcp", "scp")).form == "hcp"
    lacking = choose_form(read_all, replace(costly, memory=0.0), 4, ("hcp", "scp"))
    assert lacking.form == "hcp"
    assert "which lacks memory" in lacking.reason
    with pytest.raises(ValueError, match="3 ranks have no mesh of a form of hybrid"):
        choose_form(work, fast, 3, ("hybrid",))
