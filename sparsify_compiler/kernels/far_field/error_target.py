"""Reading until the estimated error of a site's output is below a target.

The gain of a block (`virtual_keys.gains`) times its share of the keys estimates the squared error of the output
that the block causes where it is not read. The estimates of all unread blocks add up to that of the site. They rank
blocks well, but their sum may be wrong by a factor of ten, which differs by head and by sharpness of the attention.
So each call also measures the error of the rows that are computed exactly. Later calls multiply the estimates of a
head by the ratio of measured and estimated error: a correction. A call uses measurements of earlier calls only.
Their rows lie elsewhere at every call, so in time they reach all parts of a sequence.

Where attention is very sharp, a few keys of a row have all its attention, and the means of their blocks do not show
it: gains of 1e-8 and less, whose sum says nothing. So a correction has a largest value (`MOST_CORRECTION`). The
measured error above it is the surprise of a head. It is distributed over the unread blocks by `SLOW`, a small power
of their gains: almost evenly, and still in their order. The corrected gain of a block is the sum of both,

    correction * gain + surprise * gain ** SLOW

All heads of a site share one threshold of the corrected gain, the largest that keeps the sum of the corrected
gains, times their shares, below the target. So keys are read where they save most error.

Errors here are relative and squared: parts of |out - dense|² / |dense|², summed over the tokens and heads of one
batch element. Nothing reads a value back from the device.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AllHeads = Callable[[Tensor], Tensor]
"""Makes numbers of all heads of a site, [B, H, n], of those of some."""

STATE = 4
"""Numbers of a head in the state: number of calls, and the sums of measured errors, of estimated ones, and of those
with gains to the power `SLOW`. In the sums older calls count less. All zero: no call yet."""
KEPT = 0.7
"""Weight of the sums of all earlier calls, against 1 of the last call."""
FIRST = 0.008
"""Correction before the first measurement, times the target, as on the evaluation model."""
MOST_CORRECTION = 10.0
"""Largest correction, in units of the first one."""
SLOW = 1 / 16
"""Power of gains by which a surprise is distributed. On very sharp attention the squared error falls by a factor of
five where the sum of gains falls by one of 1e14."""
LEAST_GAIN = 2.0**-126
"""Smallest gain of a block with keys. A smaller share of attention is 0 in fp32."""
TRUSTED = 1.0
"""Weight of the first correction, as an estimated squared error in units of the squared target. It decays like the
sums."""
POWER = 0.7
"""Power of the estimate with which the true error grows, where the threshold of gains changes. Estimates of blocks
with large gains are too large, those of blocks with small ones too small."""
MOST_STEP = 16.0
"""Largest factor of a squared error by which `POWER` counts."""
MOST_COUNTED = 2.0
"""Error of a call, in units of the target, above which it counts no more than a call with this error."""
POOLED = 0.5
"""Weight of the ratio of the site in the correction of a head, against 1 of its own measurements."""
AIM = 0.78
"""Error that is aimed at, in units of the target: few rows measure too low an error more often than too high."""

BINS = 192
"""Bins of gains, four for each factor of two."""
LOWEST = -32
"""Logarithm to base 2 of the gains of the lowest bin. Smaller gains are in it too."""
UNIT = 2.0**-24
"""Unit of errors in a bin, in units of the squared target. Sums of whole numbers do not depend on their order."""
TURN = (math.sqrt(5) - 1) / 2
"""Step, in units of the distance of sampled rows, by which they move from call to call: no two calls come near."""
ROW_TURN = math.sqrt(2) - 1
"""The same from row to row of a call. Rows at equal distances would all be the same corner of their cubes."""


class Reading(NamedTuple):
    """The blocks to read, and the estimates of the errors that remain."""

    more: Tensor
    """[B, H, Nq, N] bool, blocks to read too. Those whose gain is not finite are among them."""
    remains: Tensor
    """[2, B, H], sums over the blocks that remain unread: gains times shares, and the same with gains to the power
    `SLOW`."""
    estimated: Tensor
    """[B, H], the sum of corrected gains times shares: the squared error of each head."""


class ErrorTarget(NamedTuple):
    """The largest relative error of a site's output, and the measurements so far."""

    most: float
    """Root mean square over tokens, relative to the output: above 0, below 1."""
    state: Tensor
    """[B, H, STATE] fp32."""

    def offsets(self, rows: int) -> Tensor:
        """[B, H, rows] fp32 in [0, 1): the places of the sampled rows of this call, each in its part of the
        sequence."""
        numbers = torch.arange(rows, device=self.state.device)
        return (0.5 + self.state[..., :1] * TURN + numbers * ROW_TURN) % 1.0

    def corrections(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(correction, surprise) of each head, by earlier calls; [B, H].

        Args:
            sums: the states of the heads of all ranks.
        """
        of_site, heads, most = sums.sum(1), sums.shape[1], MOST_CORRECTION * FIRST / self.most
        trusted = TRUSTED * self.most**2 * KEPT ** sums[..., 0].amax(1)
        measured, estimated = of_site[:, 1] + FIRST / self.most * trusted, of_site[:, 2] + trusted
        pooled, weight = measured / estimated, POOLED * estimated / heads

        def ratio(state: Tensor) -> Tensor:
            """[B, H], with some weight on the ratio of the site, since a head has few rows."""
            return (state[..., 1] + (pooled * weight)[:, None]) / (state[..., 2] + weight[:, None])

        # Heads with few errors must not hide those of one head: the sum of the site stays the measured one.
        of_ratios = (ratio(sums) * sums[..., 2]).sum(1) + pooled * trusted
        correction = ratio(self.state) * (measured / of_ratios)[:, None]
        _, of_head, by_gain, slow = self.state.unbind(-1)
        excess = (of_head - most * by_gain).clamp(min=0)
        return correction.clamp(max=most), torch.where(slow > 0, excess / slow, 0.0)

    def aim(self, sums: Tensor) -> Tensor:
        """[B]: the sum of corrected estimates that is aimed at. `sums`: the states of the heads of all ranks.

        The corrections hold for errors as large as those of earlier calls. Others are on a curve through them.
        """
        calls, measured = sums[..., 0].amax(1), sums[..., 1].sum(1)
        weight = (1 - KEPT**calls) / (1 - KEPT)
        aim = (AIM * self.most) ** 2
        step = torch.where(measured > 0, aim * weight / measured, 1.0).clamp(1 / MOST_STEP, MOST_STEP)
        return aim * step ** (1 / POWER - 1)

    def reading(self, gain: Tensor, shares: Tensor, unread: Tensor, all_heads: AllHeads | None) -> Reading:
        """The blocks to read.

        Args:
            gain: [B, H, Nq, N], gains without correction.
            shares: [B|1, H|1, Nq, N], the share of each pair of blocks in the pairs of queries and keys of a head.
            unread: [B, H, Nq, N] bool, the blocks that the table does not list.
        """
        sums = self.state if all_heads is None else all_heads(self.state)
        correction, surprise = (one[..., None, None] for one in self.corrections(sums))
        aim = self.aim(sums)[:, None]
        slow = gain**SLOW
        corrected = gain * correction + slow * surprise
        error = corrected * shares
        place = ((corrected.log2() - LOWEST) * 4).nan_to_num(BINS, BINS, 0).clamp(0, BINS).long()
        parts = (error / (aim[..., None, None] * UNIT)).nan_to_num().masked_fill(~unread, 0)
        # Far above the target a number need not be exact, but its sums must fit.
        units = parts.clamp(max=2.0**34).round().long()
        bins = units.new_zeros(*units.shape[:2], BINS + 1)
        bins.scatter_add_(-1, place.flatten(2), units.flatten(2))
        below = bins.cumsum(-1)[..., :BINS].to(error.dtype) * UNIT
        of_site = (below if all_heads is None else all_heads(below)).sum(1)
        count = (of_site <= 1).sum(-1)[:, None]  # the number of lowest bins that need not be read
        more = (place >= count[..., None, None]) & unread
        left = unread & ~more
        remains = torch.stack([(one * shares).masked_fill(~left, 0).sum((2, 3)) for one in (gain, slow)])
        estimated = remains[0] * correction[..., 0, 0] + remains[1] * surprise[..., 0, 0]
        return Reading(more, remains, estimated)

    def measured(self, remains: Tensor, error: Tensor, of_site: Tensor) -> Tensor:
        """The state after a call: [B, H, STATE].

        Args:
            remains: [2, B, H], as in `Reading`.
            error: [B, H], the measured parts of the relative squared error. Heads with numbers that are not finite
                keep their sums.
            of_site: [B], the sum of `error` over the heads of all ranks.
        """
        count, *sums = self.state.unbind(-1)
        known = error.isfinite() & remains.isfinite().all(0) & of_site.isfinite()[:, None]
        most = (MOST_COUNTED * self.most) ** 2
        weight = (most / of_site.clamp(min=most))[:, None]
        new = (
            torch.where(known, KEPT * old + weight * now, old)
            for old, now in zip(sums, (error, *remains), strict=True)
        )
        return torch.stack([count + 1, *new], -1)
