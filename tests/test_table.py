"""BlockTable: its mask, written out token by token from the definition."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify_compiler import BlockTable
from sparsify_compiler.testing.strategies import tables


def by_hand(table: BlockTable, b: int, h: int, q_tokens: int, kv_tokens: int) -> torch.Tensor:
    """The mask of one batch entry and head, by following the docstring of BlockTable."""

    def one(tensor: torch.Tensor) -> list[int]:
        return tensor[b % tensor.shape[0], h % tensor.shape[1]].tolist()

    mask = torch.zeros(q_tokens, kv_tokens, dtype=torch.bool)
    q_bounds, kv_bounds, counts = one(table.q_bounds), one(table.kv_bounds), one(table.kv_num_blocks)
    q_order = list(range(q_tokens)) if table.q_order is None else one(table.q_order)
    kv_order = list(range(kv_tokens)) if table.kv_order is None else one(table.kv_order)
    for i, row in enumerate(one(table.kv_indices)):
        for j in row[: counts[i]]:
            for p in range(q_bounds[i], q_bounds[i + 1]):
                for r in range(kv_bounds[j], kv_bounds[j + 1]):
                    mask[q_order[p], kv_order[r]] = True
    return mask


@given(st.data(), st.integers(1, 12), st.integers(1, 12))
def test_mask_and_density(data: st.DataObject, q_tokens: int, kv_tokens: int) -> None:
    table = data.draw(tables(batch=2, heads=3, q_tokens=q_tokens, kv_tokens=kv_tokens))
    mask = table.mask()
    for b, h in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        assert torch.equal(mask[b, h], by_hand(table, b, h, q_tokens, kv_tokens))
    assert abs(table.density() - mask.double().mean().item()) < 1e-9


@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_from_block_mask_keeps_the_blocks(data: st.DataObject, rows: int, columns: int) -> None:
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    blocks = kept.view(1, 1, rows, columns)
    table = BlockTable.from_block_mask(blocks, torch.ones(1, 1, rows), torch.ones(1, 1, columns))
    assert torch.equal(table.block_mask(), blocks)
    capacity = table.kv_indices.shape[-1]
    assert capacity & (capacity - 1) == 0
    assert capacity >= table.kv_num_blocks.max()
