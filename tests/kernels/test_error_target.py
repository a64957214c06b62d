"""Reading until an estimated error is below a target."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels.far_field import attention_with_far_field
from sparsify_compiler.kernels.far_field.error_target import AIM, BINS, FIRST, SLOW, STATE, ErrorTarget
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


@pytest.mark.parametrize("surprised", [False, True])
@pytest.mark.parametrize("target", [0.02, 0.1, 0.5])
def test_it_reads_the_blocks_that_save_most_and_no_more_than_needed(target: float, surprised: bool) -> None:
    gain, shares, unread = problem(0)
    generator = torch.Generator().manual_seed(1)
    measured = target**2 * torch.rand(BATCH, HEADS, generator=generator)
    estimated = target**2 * torch.rand(BATCH, HEADS, generator=generator)
    if surprised:  # far more than the estimates explain
        measured[:, 1] = 200 * estimated[:, 1] / target
    sums = torch.stack([torch.ones(BATCH, HEADS), measured, estimated, torch.full((BATCH, HEADS), 0.5)], -1)
    one = ErrorTarget(target, sums)
    more, remains, by_head = one.reading(gain, shares, unread, None)
    assert not (more & ~unread).any()
    (correction, surprise), aim = one.corrections(one.state), one.aim(one.state)
    assert not surprised or (surprise[:, 1] > 0).all()
    for batch in range(BATCH):
        slow = gain[batch].double() ** SLOW
        corrected = gain[batch].double() * correction[batch, :, None, None]
        corrected += slow * surprise[batch, :, None, None]
        error, left = corrected * shares[0], unread[batch] & ~more[batch]
        assert error[left].sum() <= aim[batch] * 1.001
        torch.testing.assert_close(
            remains[:, batch].double(),
            torch.stack([(one * shares[0] * left).sum((1, 2)) for one in (gain[batch].double(), slow)]),
            rtol=1e-4,
            atol=1e-9,
        )
        torch.testing.assert_close(by_head[batch].double(), (error * left).sum((1, 2)), rtol=1e-4, atol=1e-9)
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
        true = remains[0] * factors
        errors.append((true.sum(1).sqrt() / 0.1).tolist())
        one = ErrorTarget(0.1, one.measured(remains, true, true.sum(1)))
    for error in errors[-1]:
        assert AIM * 0.85 <= error <= AIM * 1.1


def test_before_any_measurement_the_correction_is_the_first_one() -> None:
    correction, surprise = blank(0.1).corrections(blank(0.1).state)
    torch.testing.assert_close(correction, torch.full((BATCH, HEADS), FIRST / 0.1))
    assert not surprise.any()


def test_corrections_keep_the_measured_error_of_a_site() -> None:
    """One head has all errors, the others all estimates."""
    measured, estimated = torch.tensor([1.0, 0.1, 0.1, 0.1]), torch.tensor([10.0, 30.0, 30.0, 30.0])
    sums = torch.stack([torch.full((4,), 40.0), measured, estimated, torch.ones(4)], -1)
    one = ErrorTarget(0.1, sums.expand(BATCH, -1, -1))
    correction, surprise = one.corrections(one.state)
    torch.testing.assert_close((correction * estimated).sum(1), torch.full((BATCH,), 1.3))
    assert (correction[:, 0] > 5 * correction[:, 1]).all()
    assert not surprise.any()


def test_an_error_with_no_unread_block_is_no_surprise() -> None:
    """Only rounding is left where everything was read."""
    sums = torch.tensor([1.0, 1e-13, 0.0, 0.0]).expand(BATCH, HEADS, -1)
    one = ErrorTarget(0.1, sums)
    correction, surprise = one.corrections(one.state)
    assert not surprise.any()
    assert correction.isfinite().all()


def test_what_is_not_finite_is_not_remembered() -> None:
    one = ErrorTarget(0.1, torch.full((BATCH, HEADS, STATE), 0.5))
    error = torch.full((BATCH, HEADS), 0.01)
    error[0, 1] = math.nan
    state = one.measured(torch.full((2, BATCH, HEADS), 0.02), error, error.sum(1))
    assert state[0].tolist() == [[1.5, 0.5, 0.5, 0.5]] * HEADS
    assert state[1].isfinite().all()
    assert not (state[1, :, 1:] == 0.5).any()


def test_sampled_rows_move() -> None:
    """In a part of the sequence from call to call, and in a call from part to part."""
    one, offsets = blank(0.1), []
    for _ in range(20):
        offsets.append(one.offsets(32)[0, 0])
        one = ErrorTarget(
            0.1, one.measured(torch.zeros(2, BATCH, HEADS), torch.zeros(BATCH, HEADS), torch.zeros(BATCH))
        )
    of_calls = torch.stack(offsets)
    assert ((of_calls >= 0) & (of_calls < 1)).all()
    for places in (*of_calls[:, ::7].T, *of_calls[:, :20]):
        ends = sorted(places.tolist())
        assert min(b - a for a, b in pairwise(ends)) > 0.01


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


def sharp(call: int) -> tuple[Tensor, Tensor, Tensor]:
    """Planted clusters with queries eight times as long: a few keys of a row have all its attention."""
    return far_fields.planted_clusters(512, 2, 16, sharpness=8.0)


def one_sharp_head(call: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one head, next to diffuse attention."""
    smooth, hard = far_fields.diffuse(512, 2, 16), sharp(call)
    query, key, value = (torch.cat([a[:, :1], b[:, 1:]], 1) for a, b in zip(hard, smooth, strict=True))
    return query, key, value


def needles(call: int) -> tuple[Tensor, Tensor, Tensor]:
    """Diffuse attention in which all rows attend to eight keys that lie far apart."""
    query, key, value = (tensor.clone() for tensor in far_fields.diffuse(512, 2, 16))
    generator = torch.Generator().manual_seed(5)
    towards = torch.nn.functional.normalize(torch.randn(1, 2, 1, 16, generator=generator), dim=-1)
    key[:, :, torch.randperm(512, generator=generator)[:8]] += 6 * towards
    return query + 4 * towards, key, value


def sharper(call: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention that becomes sharp in the third call."""
    return far_fields.planted_clusters(512, 2, 16, sharpness=1.0 if call < 3 else 8.0)


def structureless(call: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks that have nothing in common: only reading nearly everything helps."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 2, 512, 16, generator=generator) for _ in range(3))
    return 3 * query, key, value


def true_errors(kind: Callable[[int], tuple[Tensor, Tensor, Tensor]], calls: int) -> list[float]:
    """The relative error over all tokens and heads, in units of a target of 0.1, call by call."""
    state, errors = torch.zeros(1, 2, STATE), []
    for call in range(calls):
        tensors = kind(call)
        table = far_fields.nearest_blocks(*tensors[:2], 32, 16, 0.03)
        out, _, report = attention_with_far_field(
            *tensors, table, far_field="linear", target=ErrorTarget(0.1, state), sampled_rows=32
        )
        exact, _ = oracles.masked_attention(*tensors, torch.ones(512, 512, dtype=torch.bool))
        errors.append(float((out - exact).norm() / exact.norm()) / 0.1)
        assert report.target is not None
        state = report.target.state
    return errors


@pytest.mark.parametrize(
    ("kind", "late"), [(sharp, 3), (one_sharp_head, 3), (needles, 3), (sharper, 9), (structureless, 3)]
)
def test_sharp_attention_comes_near_the_target_within_a_few_calls(
    kind: Callable[[int], tuple[Tensor, Tensor, Tensor]], late: int
) -> None:
    errors = true_errors(kind, late + 6)[late:]
    assert sum(errors) / len(errors) <= 1.25, errors
    assert max(errors) <= 2, errors


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
