"""Tables that point outside of their tensors: every op refuses them before it touches memory, and says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import BlockTable
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import (  # noqa: F401, which registers their ops
    block_sparse_attention,
    clustering,
    far_field,
    prediction,
)
from sparsify_compiler.testing.oracles import assert_close_to_float64
from sparsify_compiler.testing.strategies import qkv, tables

OPS = torch.ops.sparsify
TOKENS, HEADS, DIM = 12, 2, 8
PROVIDERS = ["reference", "cpu"]
Q, K, V = qkv(1, HEADS, HEADS, TOKENS, TOKENS, DIM, DIM, torch.float32)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)[None, None]


GOOD = {
    "q_bounds": ints(0, 5, 12),
    "kv_bounds": ints(0, 4, 8, 12),
    "kv_num_blocks": ints(2, 1),
    "kv_indices": ints([0, 2], [1, 0]),
    "q_order": torch.arange(TOKENS - 1, -1, -1, dtype=torch.int32)[None, None],
    "kv_order": torch.arange(TOKENS, dtype=torch.int32).roll(3)[None, None],
}


def order(**changes: int) -> Tensor:
    """A permutation with some places written over."""
    wrong = torch.arange(TOKENS, dtype=torch.int32)
    for place, token in changes.items():
        wrong[int(place[1:])] = token
    return wrong[None, None]


BROKEN = [
    ("q_bounds", ints(0, 5, 60), "q_bounds must go from 0 to 12 and never fall, got 60"),
    ("q_bounds", ints(0, 13, 12), "q_bounds must go from 0 to 12 and never fall, got 13"),
    ("q_bounds", ints(0, 5, 11), "q_bounds must go from 0 to 12 and never fall, got 11"),
    ("q_bounds", ints(-1, 5, 12), "q_bounds must go from 0 to 12 and never fall, got -1"),
    ("kv_bounds", ints(0, 8, 4, 12), "kv_bounds must go from 0 to 12 and never fall, got 4"),
    ("kv_bounds", ints(0, 4, 8, 2**30), "kv_bounds must go from 0 to 12"),
    ("kv_bounds", ints(3, 4, 8, 12), "kv_bounds must go from 0 to 12 and never fall, got 3"),
    ("kv_num_blocks", ints(3, 1), r"kv_num_blocks must lie in 0\.\.2, got 3"),
    ("kv_num_blocks", ints(2, -1), r"kv_num_blocks must lie in 0\.\.2, got -1"),
    ("kv_indices", ints([0, 3], [1, 0]), r"kv_indices must lie in 0\.\.2, got 3 at \[0, 0, 0, 1\]"),
    ("kv_indices", ints([0, 2], [-1, 0]), r"kv_indices must lie in 0\.\.2, got -1 at \[0, 0, 1, 0\]"),
    ("kv_indices", ints([2**31 - 1, 2], [1, 0]), r"kv_indices must lie in 0\.\.2"),
    ("q_order", order(_3=5), "q_order must hold each of the tokens 0..11 once"),
    ("q_order", order(_3=TOKENS), "q_order must hold each of the tokens 0..11 once, got 12"),
    ("kv_order", order(_0=-1), "kv_order must hold each of the tokens 0..11 once, got -1"),
    ("kv_order", order(_0=2**31 - 1), "kv_order must hold each of the tokens 0..11 once"),
    ("kv_indices", GOOD["kv_indices"].float() * torch.nan, "kv_indices must be int32"),
    ("kv_bounds", GOOD["kv_bounds"].long(), "kv_bounds must be int32"),
    ("kv_order", GOOD["kv_order"].to("meta"), "kv_order must be int32 on cpu, got torch.int32 on meta"),
    ("kv_bounds", ints(), "kv_bounds must end with"),
    ("q_order", GOOD["q_order"][..., :-1], "q_order must end with"),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("field", "value", "words"), BROKEN)
def test_attention_refuses(field: str, value: Tensor, words: str, provider: str) -> None:
    """Forward, backward and with virtual keys, handed to the ops themselves."""
    table = [*(GOOD | {field: value}).values()]
    out, lse = torch.zeros_like(Q), torch.zeros(1, HEADS, TOKENS)
    far = torch.zeros(1, HEADS, 3, DIM)
    calls: list[Callable[[], Any]] = [
        lambda: OPS.block_sparse_attention(Q, K, V, *table, None, 0.3, provider),
        lambda: OPS.block_sparse_attention_backward(out, lse, out, lse, Q, K, V, *table, None, 0.3, provider),
        lambda: OPS.near_and_far(Q, K, V, *table, None, far, far, far[..., 0], None, None, 0.3, provider),
    ]
    for call in calls:
        with pytest.raises(OperandError, match=words):
            call()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("field", "value"), [one[:2] for one in BROKEN if one[0][-5:] in ("ounds", "order")])
def test_blocks_of_one_side_are_refused(field: str, value: Tensor, provider: str) -> None:
    """By the statistics of blocks, and by the merge of near and far field."""
    side, _, kind = field.partition("_")
    broken = GOOD | {field: value}
    bounds, tokens = broken[f"{side}_bounds"], broken[f"{side}_order"]
    lse = torch.zeros(1, HEADS, TOKENS)
    for call in (
        lambda: OPS.block_means(Q, bounds, tokens, provider),
        lambda: OPS.block_statistics(K, V, bounds, tokens, None, True, provider),
        lambda: OPS.merge_far_field(Q, V, lse, V, lse, None, None, bounds, tokens, 0.3, provider),
    ):
        with pytest.raises(OperandError, match=kind):
            call()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_choices_refuse(provider: str) -> None:
    budget = torch.full((1, 1), 3, dtype=torch.int32)
    for bounds in ([0, 60], [0, 9, 3, 12], [1, 12], [0, -5, 12], [0, 11]):
        with pytest.raises(OperandError, match="q_bounds must go from 0 to 12 and never fall"):
            OPS.top_k_keys(Q, K, budget, torch.tensor(bounds, dtype=torch.int32), None, 4, 1.0, provider)
    for label in (-1, 5, 2**31 - 1):
        labels = torch.zeros(1, HEADS, TOKENS, dtype=torch.int32)
        labels[0, 1, 7] = label
        for strided in (labels, labels.mT.contiguous().mT):
            with pytest.raises(OperandError, match=rf"labels must lie in 0\.\.4, got {label} at \[0, 1, 7\]"):
                OPS.sort_by_label(strided, 5, provider)
    for start in (-1, TOKENS):
        with pytest.raises(OperandError, match=rf"start must lie in 0\.\.11, got {start}"):
            OPS.kmeans(
                Q,
                torch.zeros(1, HEADS, 2, DIM),
                torch.tensor([0, start]),
                torch.tensor(False),
                1,
                1,
                provider,
            )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_tensors_beside_a_table_are_refused(provider: str) -> None:
    """A kernel reads memory by the types and shapes of the query."""
    table = [*GOOD.values()]
    out, lse = torch.zeros_like(Q), torch.zeros(1, HEADS, TOKENS)
    for grads in ((out.double(), lse), (out[:, :, :-1], lse), (out, lse.double()), (out, lse[..., :-1])):
        with pytest.raises(OperandError, match="grad_"):
            OPS.block_sparse_attention_backward(*grads, out, lse, Q, K, V, *table, None, 0.3, provider)
    far = torch.zeros(1, HEADS, 3, DIM)
    for change, words in (
        ((far[:, :, :2], far, far[..., 0]), "far.key"),
        ((far, far.double(), far[..., 0]), "far.value"),
        ((far, far, far[..., 0, :2]), "far.bias"),
    ):
        with pytest.raises(OperandError, match=words):
            OPS.near_and_far(Q, K, V, *table, None, *change, None, None, 0.3, provider)


def is_valid(table: BlockTable, q_tokens: int, kv_tokens: int) -> bool:
    """By the docstring of `BlockTable`, number by number."""
    rows = {name: None if t is None else t.flatten(0, 1).tolist() for name, t in table.tensors().items()}
    for side, tokens in (("q", q_tokens), ("kv", kv_tokens)):
        for bounds in rows[f"{side}_bounds"]:
            if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
                return False
        if any(sorted(one) != list(range(tokens)) for one in rows[f"{side}_order"] or ()):
            return False
    blocks, width = table.kv_bounds.shape[-1] - 1, table.kv_indices.shape[-1]
    if not all(0 <= count <= width for counts in rows["kv_num_blocks"] for count in counts):
        return False
    return all(
        0 <= index < blocks
        for indices, counts in zip(rows["kv_indices"], rows["kv_num_blocks"], strict=True)
        for row, count in zip(indices, counts, strict=True)
        for index in row[:count]
    )


@given(st.data(), st.sampled_from(PROVIDERS), st.integers(1, 20), st.integers(1, 20))
def test_one_wrong_number_is_refused_or_does_not_matter(
    data: st.DataObject, provider: str, q_tokens: int, kv_tokens: int
) -> None:
    table = data.draw(tables(batch=2, heads=2, q_tokens=q_tokens, kv_tokens=kv_tokens))
    name, tensor = data.draw(st.sampled_from([(n, t) for n, t in table.tensors().items() if t is not None]))
    changed = tensor.clone()
    place = data.draw(st.integers(0, changed.numel() - 1))
    changed.view(-1)[place] = data.draw(st.sampled_from([-(2**31), -1, 0, 1, 2, 19, 20, 21, 2**31 - 1]))
    table = BlockTable(**(table.tensors() | {name: changed}))
    q, k, v = qkv(2, 2, 2, q_tokens, kv_tokens, 8, 8, torch.float32)
    if not is_valid(table, q_tokens, kv_tokens):
        with pytest.raises(OperandError, match=f"table.{name} must"):
            block_sparse_attention(q, k, v, table, provider=provider)
        return
    listed = [row[:n] for row, n in zip(
        table.kv_indices.flatten(0, -2).tolist(), table.kv_num_blocks.flatten().tolist(), strict=True
    )]  # fmt: skip
    if all(len(set(row)) == len(row) for row in listed):  # a block that is listed twice counts twice
        out, lse = block_sparse_attention(q, k, v, table, provider=provider)
        assert_close_to_float64(out, lse, q, k, v, table.mask())
