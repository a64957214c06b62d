"""Reading until an estimated error is below a target."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels.far_field import attention_with_far_field
from sparsify_compiler.kernels.far_field.error_target import AIM, BINS, FIRST, STATE, ErrorTarget
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import far_fields, oracles

BATCH, HEADS, ROWS, COLUMNS = 2, 4, 6, 30
WIDTH = 2**0.25
"""Quotient of the gains at both ends of a bin."""


def blank(target: float) -> ErrorTarget:
    return ErrorTarget(target, torch.zeros(BATCH, HEADS, STATE))


def problem(seed: int, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    """(gains over seven orders of magnitude, shares, unread blocks)."""
    generator = torch.Generator().manual_seed(seed)
    gain = 10 ** (torch.rand(BATCH, HEADS, ROWS, columns, generator=generator) * 7 - 5)
    sizes = (torch.rand(1, HEADS, n, generator=generator) + 0.1 for n in (ROWS, columns))
    of_rows, of_columns = (part / part.sum(-1, keepdim=True) for part in sizes)
    unread = torch.rand(BATCH, HEADS, ROWS, columns, generator=generator) > 0.1
    return gain, of_rows[..., None] * of_columns[:, :, None], unread


@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
def test_it_reads_the_blocks_that_save_most_and_no_more_than_needed(target: float) -> None:
    gain, shares, unread = problem(0)
    generator = torch.Generator().manual_seed(1)
    measured = target**2 * torch.rand(BATCH, HEADS, generator=generator)
    estimated = target**2 * torch.rand(BATCH, HEADS, generator=generator)
    one = ErrorTarget(target, torch.stack([torch.ones(BATCH, HEADS), measured, estimated], -1))
    more, remains, _ = one.reading(gain, shares, unread, None)
    assert not (more & ~unread).any()
    correction, aim = one.corrections(one.state), one.aim(one.state)
    for batch in range(BATCH):
        corrected = (gain[batch] * correction[batch, :, None, None]).double()
        error, left = corrected * shares[0], unread[batch] & ~more[batch]
        assert error[left].sum() <= aim[batch] * 1.001
        torch.testing.assert_close(
            remains[batch].double(),
            (error * left).sum((1, 2)) / correction[batch].double(),
            rtol=2e-3,
            atol=1e-9,
        )
        threshold = corrected[more[batch]].min()
        assert corrected[left].max() <= threshold * 1.001  # one threshold for all heads
        next_bin = more[batch] & (corrected <= threshold * WIDTH)
        assert error[left].sum() + error[next_bin].sum() > aim[batch]


def test_the_ends_of_the_bins() -> None:
    gain, shares, unread = problem(2)
    gain[0, 0, 0, 0], gain[0, 0, 0, 1], gain[0, 0, 0, 2] = math.nan, math.inf, 0.0
    unread[0, 0, 0, :3] = True
    more, remains, _ = blank(0.1).reading(gain, shares, unread, None)
    assert more[0, 0, 0, :2].all()
    assert not more[0, 0, 0, 2]
    assert remains.isfinite().all()
    nothing, *_ = blank(0.1).reading(gain.nan_to_num() * 1e-20, shares, unread, None)
    assert not nothing.flatten(2)[:, 1:].any()
    more, remains, _ = blank(0.1).reading(torch.full_like(gain, 1e30), shares, unread, None)
    assert torch.equal(more, unread)
    assert not remains.any()


def test_heads_on_several_ranks_read_what_they_read_on_one() -> None:
    gain, shares, unread = problem(3)
    state = torch.rand(BATCH, HEADS, STATE, generator=torch.Generator().manual_seed(4)) * 0.01
    whole = ErrorTarget(0.1, state)
    expected, *_ = whole.reading(gain, shares, unread, None)
    of_all = {STATE: state, BINS: sums_by_bin(whole, gain, shares, unread)}
    for part in (slice(0, 1), slice(1, HEADS)):

        def all_heads(numbers: Tensor, part: slice = part) -> Tensor:
            found = of_all[numbers.shape[-1]]
            torch.testing.assert_close(found[:, part], numbers)
            return found

        one = ErrorTarget(0.1, state[:, part])
        more, *_ = one.reading(gain[:, part], shares[:, part], unread[:, part], all_heads)
        assert torch.equal(more, expected[:, part])


def sums_by_bin(one: ErrorTarget, gain: Tensor, shares: Tensor, unread: Tensor) -> Tensor:
    """[B, H, BINS]: what a rank gives the others."""
    given = []

    def keep(numbers: Tensor) -> Tensor:
        given.append(numbers)
        return numbers

    one.reading(gain, shares, unread, keep)
    (found,) = (numbers for numbers in given if numbers.shape[-1] == BINS)
    return found


@pytest.mark.parametrize("factor", [0.01, 0.3, 20.0])
def test_corrections_find_the_target(factor: float) -> None:
    """True errors that follow the estimates by a constant factor, and by another one in each head."""
    gain, shares, unread = problem(5, 500)
    factors = factor * torch.tensor([0.2, 1.0, 3.0, 1.0])
    one, errors = blank(0.1), []
    for _ in range(12):
        _, remains, _ = one.reading(gain, shares, unread, None)
        true = remains * factors
        errors.append((true.sum(1).sqrt() / 0.1).tolist())
        one = ErrorTarget(0.1, one.measured(remains, true, true.sum(1)))
    for error in errors[-1]:
        assert AIM * 0.85 <= error <= AIM * 1.1


def test_before_any_measurement_the_correction_is_the_first_one() -> None:
    torch.testing.assert_close(
        blank(0.1).corrections(blank(0.1).state), torch.full((BATCH, HEADS), FIRST / 0.1)
    )


def test_what_is_not_finite_is_not_remembered() -> None:
    one = ErrorTarget(0.1, torch.full((BATCH, HEADS, STATE), 0.5))
    error = torch.full((BATCH, HEADS), 0.01)
    error[0, 1] = math.nan
    state = one.measured(torch.full((BATCH, HEADS), 0.02), error, error.sum(1))
    assert state[0].tolist() == [[1.5, 0.5, 0.5]] * HEADS
    assert state[1].isfinite().all()
    assert not (state[1, :, 1:] == 0.5).any()


def test_sampled_rows_move() -> None:
    one, offsets = blank(0.1), []
    for _ in range(20):
        offsets.append(float(one.offset()[0, 0]))
        one = ErrorTarget(0.1, one.measured(*torch.zeros(2, BATCH, HEADS), torch.zeros(BATCH)))
    assert all(0 <= offset < 1 for offset in offsets)
    ends = sorted(offsets)
    assert min(b - a for a, b in pairwise(ends)) > 0.02


def drifting(call: int) -> tuple[Tensor, Tensor, Tensor, BlockTable]:
    """Attention of planted clusters, changed a little from call to call; blocks of neighbouring tokens."""
    query, key, value = far_fields.planted_clusters(256, 3, 16)
    query = query * (1 + 0.02 * call)
    table = far_fields.nearest_blocks(query, key, 16, 8, 0.01)
    return query, key, value, table


@pytest.mark.parametrize("target", [0.01, 0.03])
def test_the_true_error_comes_near_the_target(target: float) -> None:
    state, errors = torch.zeros(1, 3, STATE), []
    for call in range(8):
        *tensors, table = drifting(call)
        out, _, report = attention_with_far_field(
            *tensors, table, far_field="linear", target=ErrorTarget(target, state), provider="cpu"
        )
        exact, _ = oracles.masked_attention(*tensors, torch.ones(256, 256, dtype=torch.bool))
        errors.append(far_fields.relative_error(out, exact) / target)
        assert report.target is not None
        state = report.target.state
    assert all(0.4 <= error <= 1.25 for error in errors[3:]), errors


def test_what_a_target_needs() -> None:
    *tensors, table = drifting(0)
    target = ErrorTarget(0.1, torch.zeros(1, 3, STATE))
    for options in (
        {"far_field": "mean"},
        {"far_field": "drop"},
        {"far_field": "linear", "min_gain": 0.1},
        {"far_field": "linear", "sampled_rows": 0},
    ):
        with pytest.raises(OperandError, match="a target needs far_field='linear' and sampled rows"):
            attention_with_far_field(*tensors, table, target=target, **options)
