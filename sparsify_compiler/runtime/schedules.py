"""The number of steps of a denoising schedule, estimated from its first time steps.

A schedule is a straight line in a coordinate of its own. A flow schedule is linear before its shift is applied, a
Karras schedule is linear in the seventh root of the noise level, and so on. For each coordinate, the time steps so
far allow an interval of slopes, and a slope gives a number of steps. Time steps may be rounded, to integers, to
bfloat16 or to float16; each is then an interval of noise levels. Where several coordinates and numbers of steps are
possible, usual ones count more, and the estimate is a little above their median: a step that ran dense by mistake
is followed by a better estimate, a sparse one ends the dense phase.

Flow schedules that begin at pure noise are the usual case. For each number of steps, those that agree with the time
steps so far are an interval of shifts, which the next time step narrows.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

MOST_STEPS = 150
"""Schedules of more steps are not estimated."""

LOOKED_AT = 32
"""The first time steps of a video that an estimate looks at."""

_FULL = 0.995
"""A first time step of at least this share of the scale begins at pure noise."""
_USUAL_SHIFT = 1.8
"""The shift that is assumed while two time steps cannot show it. With it a schedule of at most 12 steps counts as
one of a few steps, whatever its shift is; a longer one that is not shifted never does."""

_USUAL_SHIFTS = {float(n): 0.4 for n in range(1, 13)} | {
    1.0: 6.0, 3.0: 2.0, 5.0: 2.0, 7.0: 2.0, 8.0: 2.0, 12.0: 3.0
}  # fmt: skip
"""Shift -> how usual it is."""
_SHIFTS = sorted(_USUAL_SHIFTS)
_SHIFT_SUMS = [0.0, *accumulate(_USUAL_SHIFTS[shift] for shift in _SHIFTS)]
_BETWEEN_SHIFTS = 0.5
"""How usual all other shifts are, for each factor of e."""
_SECOND_ORDER = 0.15
"""How usual two calls at each rounded time step are."""
_CERTAINTY = 0.55
"""Share of the possible numbers of steps that are at most the estimate, by weight."""
_UNSHIFTED = 4.0
"""How usual integers without a shift are, rounded to the nearest one."""
_LARGEST_SHIFT = 16.0
_BETWEEN = 12
"""Shifts that are tried between the usual ones."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Coordinate:
    """A coordinate in which some schedules are straight lines."""

    of: Callable[[float], float]
    """The coordinate of a noise level in [0, 1]; it rises with the level."""
    end: float
    """The coordinate where a schedule ends."""
    weight: float
    """How usual such schedules are."""
    tolerance: float = 0.0
    """The error of `of`, in noise levels."""
    shifted: bool = False
    """Whether it undoes the shift of a flow schedule, so that pure noise is 1."""


def precision(times: Sequence[float]) -> int | None:
    """The bits of the significands of these numbers: 8 for bfloat16, 11 for float16, None for more."""
    for bits in (8, 11):
        if all((math.frexp(time)[0] * 2**bits).is_integer() for time in times):
            return bits
    return None


def resolution(times: Sequence[float]) -> float:
    """The distance of neighbouring values near the last two of these time steps; 0 if they are not rounded."""
    whole = 1.0 if max(times) >= 100 and all(float(time).is_integer() for time in times) else 0.0
    bits = precision(times)
    return max(whole, 2.0 ** (math.frexp(max(times[-2:]))[1] - bits)) if bits else whole


def estimated_steps(times: Sequence[float]) -> int | None:
    """The number of steps of a schedule.

    Args:
        times: the time steps of the first steps, one for each step, falling or rising, in 0..1 or 0..1000. Steps
            whose time steps were rounded to one number repeat it.

    Returns:
        None if the time steps do not show it: there are not two of them, or their scale is not known.
    """
    times = times[:LOOKED_AT]
    if len(set(times)) < 2 or min(times) < -1e-6:  # 0 may be rounded
        return None
    falls = times[-1] < times[0]
    # A first rise by most of the scale 1 is one by a thousandth of the scale 1000.
    scale = 1.0 if max(times) <= (1 if falls or len(times) > 2 else 0.6) else 1000.0
    first = times[0] / scale if falls else 1 - times[0] / scale
    if not 0.1 < first <= 1.001:
        return None
    levels = tuple(_levels(times, scale, falls))
    if len(times) == 2:
        shift = _USUAL_SHIFT if first >= _FULL else 1.0
        weights = _on_lines([_Coordinate(_unshift(shift), 0.0, 1.0, shifted=True)], levels)
        return _quantile(weights) or (MOST_STEPS if first >= _FULL else None)
    weights = {}
    exact = all(high - low < 1e-5 for low, high in levels[1:])
    if first >= _FULL:
        whole = all(float(time).is_integer() for time in times) and max(times) < scale
        weights = _from_noise(levels, whole)
        direct = tuple(_levels(times, scale, falls, truncated=False))
        if direct != levels:
            _add(weights, _from_noise(direct, whole=False))
    if not exact or not weights:
        others = [*_OTHERS, *(_TRAINED if levels[0][0] < 1 - 1e-6 else ())]
        if not weights:
            others += _shifts(levels)
        if first < _FULL:  # integers of a schedule that is not shifted, or a video that begins late
            others.append(_Coordinate(_unshift(1.0), 0.0, 60.0, shifted=True))
        _add(weights, _on_lines(others, levels))
    if not weights and len(times) >= 6:  # two calls in turn may belong to different parts of a step
        half = estimated_steps(times[::2])
        return None if half is None else 2 * half
    return _quantile(weights)


def _add(weights: dict[int, float], others: Mapping[int, float]) -> None:
    for steps, weight in others.items():
        weights[steps] = weights.get(steps, 0.0) + weight


def _levels(
    times: Sequence[float], scale: float, falls: bool, *, truncated: bool = True
) -> Iterator[Interval]:
    """The noise levels that each time step may have had before it was rounded.

    Args:
        truncated: whether time steps may have lost a fraction before they were rounded to few bits.
    """
    bits = precision(times)
    whole = scale > 1 and all(float(time).is_integer() for time in times)
    # Integers are the numbers of the steps of training, from 0, or noise levels without their fraction.
    below, above = (0.5, 0.5) if max(times) >= scale and not bits else (0.0, 1.0 if scale > 1 else 0.0)
    if bits and not truncated:
        below = above = 0.0
    for time in times:
        half = 2.0 ** (math.frexp(time)[1] - bits) / 2 if bits else 0.0
        low = time - max(half, below if whole else 0.0, 3e-7 * scale)
        high = time + max(half + (above if half else 0.0), above if whole else 0.0, 3e-7 * scale)
        low, high = low / scale, high / scale
        low, high = (low, high) if falls else (1 - high, 1 - low)
        yield max(low, 0.0), min(high, 1.0)


def _on_lines(coordinates: Iterable[_Coordinate], levels: Sequence[Interval]) -> dict[int, float]:
    """Number of steps -> weight, for schedules that are straight lines in these coordinates."""
    weights: dict[int, float] = {}
    for coordinate in coordinates:
        fewest, most = _numbers(coordinate, levels)
        for steps in range(max(fewest, len(levels)), min(most, MOST_STEPS) + 1):
            weight = coordinate.weight * _usual(steps) / (most - fewest + 1)
            weights[steps] = weights.get(steps, 0.0) + weight
    return weights


def _quantile(weights: Mapping[int, float]) -> int | None:
    """The number of steps that is enough with the probability `_CERTAINTY`; None if no number is possible."""
    enough, total = _CERTAINTY * sum(weights.values()), 0.0
    for steps in sorted(weights):
        total += weights[steps]
        if total >= enough:
            return steps
    return None


class _Flow(NamedTuple):
    """The flow schedules of one number of steps that begin at pure noise and agree with the time steps so far."""

    steps: int
    layout: int
    """How steps are laid out before the shift: from 1 to 0, from 0.999 to 0, from 1 to the least level of training
    0.001, or from 1 to this level after a shift of its own."""
    least: float
    """The least shift."""
    most: float


@lru_cache(maxsize=8 * LOOKED_AT)
def _flows(levels: tuple[Interval, ...], order: int) -> tuple[_Flow, ...]:
    """The flow schedules with these noise levels at the first calls. Those of all calls but the last are kept.

    Args:
        order: calls of each step but the first one.
    """
    place = len(levels) - 1
    if place == 0:
        return tuple(
            _Flow(steps, layout, 1.0, _LARGEST_SHIFT)
            for steps in range(2, MOST_STEPS // order + 1)
            for layout in range(4)
        )
    low, high = (level / (1 - level) if level < 1 else math.inf for level in levels[-1])
    found = []
    step = (place + order - 1) // order
    for steps, layout, least, most in _flows(levels[:-1], order):
        if step >= steps:
            continue
        fall = step / steps if layout < 2 else 0.999 * step / (steps - 1)
        if layout < 3:
            unshifted = 0.999 * (1 - fall) if layout == 1 else 1 - fall
            odds = (1 - unshifted) / unshifted
            lowest, highest = low * odds, high * odds
        else:
            lowest, highest = _shift_to(low, fall), _shift_to(high, fall)
        least, most = max(least, lowest), min(most, highest)
        if least <= most * (1 + 1e-7):
            found.append(_Flow(steps, layout, least, most))
    return tuple(found)


def _shift_to(odds: float, fall: float) -> float:
    """The shift that gives a level with these odds, where the schedule ends at the shifted level 0.001.

    Its unshifted fall is `fall` / (0.999 + 0.001 shift), so the shift solves a quadratic equation.
    """
    if odds in (0.0, math.inf):
        return odds
    linear, constant = 0.999 - fall, fall * odds
    return 2 * constant / (linear + math.sqrt(linear * linear + 0.004 * constant))


def _from_noise(levels: tuple[Interval, ...], whole: bool) -> dict[int, float]:
    """Number of steps -> weight, for flow schedules that begin at pure noise, with any shift.

    Where calls repeat a rounded time step and each step but the first may have two calls, calls count as steps.
    """
    found: dict[int, float] = {}
    for steps, layout, least, most in _flows(levels, 1):
        weight = _likely_shift(least, most)
        if whole and layout == 0 and _is_straight(steps, levels):
            weight += _UNSHIFTED
        found[steps] = found.get(steps, 0.0) + weight * _usual(steps)
    if any(level == later for level, later in pairwise(levels)):
        for steps, _, least, most in _flows(levels, 2):
            weight = _SECOND_ORDER * _likely_shift(least, most) * _usual(steps)
            found[2 * steps - 1] = found.get(2 * steps - 1, 0.0) + weight
    return found


def _is_straight(steps: int, levels: Sequence[Interval]) -> bool:
    """Whether the levels may fall by one part of `steps` at each step."""
    return all(low <= 1 - place / steps <= high + 5e-4 for place, (low, high) in enumerate(levels))


def _likely_shift(least: float, most: float) -> float:
    """How usual the shifts between two are."""
    points = bisect_left(_SHIFTS, least * 0.9999), bisect_right(_SHIFTS, most * 1.0001)
    usual = _SHIFT_SUMS[points[1]] - _SHIFT_SUMS[points[0]] if points[0] < points[1] else 0.0
    return usual + _BETWEEN_SHIFTS * math.log(max(most / least, 1 + 1e-9))


@lru_cache(maxsize=2 * MOST_STEPS)
def _usual(steps: int) -> float:
    """How usual a number of steps is."""
    usual = 16.0 if steps % 10 == 0 else 5.0 if steps % 5 == 0 or steps % 4 == 0 or steps < 10 else 1.0
    return usual * (0.3 if steps > 100 else 1.0) / steps**0.25


def _numbers(coordinate: _Coordinate, levels: Sequence[Interval]) -> tuple[int, int]:
    """The fewest and the most steps that a straight line through these levels may have; an empty range if none."""
    error = coordinate.tolerance
    line = [
        (coordinate.of(max(low - error, 0.0)), coordinate.of(min(high + error, 1.0))) for low, high in levels
    ]
    first, last = levels[0]
    if coordinate.shifted and last >= _FULL and last - first > 1e-5:
        line[0] = max(line[0][0], 0.9985), 1.0
    slowest, fastest = 0.0, math.inf
    for i, (low, high) in enumerate(line):
        for distance, (later_low, later_high) in enumerate(line[i + 1 :], 1):
            slowest = max(slowest, (low - later_high) / distance)
            fastest = min(fastest, (high - later_low) / distance)
    if fastest <= 0 or slowest > fastest * (1 + 1e-6):
        return 1, 0
    way = (line[0][0] + line[0][1]) / 2 - coordinate.end
    fewest = way / fastest
    most = way / slowest if slowest > 0 else math.inf
    return math.ceil(fewest - 0.002), math.ceil(min(most, 2.0 * MOST_STEPS) - 0.002)


def _unshift(shift: float) -> Callable[[float], float]:
    return lambda level: level / (shift - (shift - 1) * level)


def _shifts(levels: Sequence[Interval]) -> Iterator[_Coordinate]:
    """Shifts with which the first, middle and last level can lie on a line: usual ones, and some between."""
    last = len(levels) - 1
    middle = (last + 1) // 2
    bounds = levels[0], levels[middle], levels[last]
    distances = last - middle, middle
    least = _straightening((bounds[0][1], bounds[1][0], bounds[2][1]), distances)
    most = _straightening((bounds[0][0], bounds[1][1], bounds[2][0]), distances)
    least, most = max(min(least, most), 1.0), min(max(least, most), _LARGEST_SHIFT)
    if least > most * (1 + 1e-6):
        return
    for shift, weight in _USUAL_SHIFTS.items():
        if least * 0.999 <= shift <= most * 1.001:
            yield _Coordinate(_unshift(shift), 0.0, weight, shifted=True)
    for part in range(_BETWEEN):
        shift = least * (most / least) ** ((part + 0.5) / _BETWEEN)
        weight = max(math.log(most / least), 0.6) / _BETWEEN
        yield _Coordinate(_unshift(shift), 0.0, weight, tolerance=2e-7, shifted=True)


def _straightening(levels: tuple[float, float, float], distances: tuple[int, int]) -> float:
    """The shift that lays three levels on a line; the distances are those to the last and from the first."""

    def bends(shift: float) -> bool:
        a, b, c = map(_unshift(shift), levels)
        return (a - b) * distances[0] < (b - c) * distances[1]

    low, high = 0.5, 2 * _LARGEST_SHIFT
    for _ in range(40):
        shift = math.sqrt(low * high)
        low, high = (shift, high) if bends(shift) else (low, shift)
    return low


def _karras(level: float) -> float:
    return float(level ** (1 / 7))


def _exponential(level: float) -> float:
    return math.log(max(level, 1e-9))


def _linear_quadratic(level: float) -> float:
    """Half of the steps go over 0.025 of the noise, the others over the rest, faster and faster (Mochi, LTX)."""
    gone = 1 - level
    if gone <= 0.025:
        return 1 - 20 * gone
    return 1 - (3.75 + math.sqrt(3.75**2 - 4 * 3.8 * (0.95 - gone))) / 7.6


@lru_cache(maxsize=16 * LOOKED_AT)
def _beta(level: float) -> float:
    """The cumulative beta distribution of parameters 0.6 and 0.6, whose quantiles are the schedule."""

    def below(x: float) -> float:  # the integral of t^-0.4 (1 - t)^-0.4 for x <= 0.5, with t = z^(1/0.6)
        top, count = x**0.6, 40
        values = ((1 - ((i + 0.5) * top / count) ** (1 / 0.6)) ** -0.4 for i in range(count))
        return sum(values) * top / count / 0.6

    whole = 2 * below(0.5)
    return below(level) / whole if level <= 0.5 else 1 - below(1 - level) / whole


def _trained(start: float, end: float, root: bool) -> Callable[[float], float]:
    """log sigma of a noise level, for a model trained with 1,000 noise levels of variance-preserving diffusion."""

    def log_sigma(level: float) -> float:
        t = max(level, 1e-3)
        if root:
            a, b = math.sqrt(start), math.sqrt(end) - math.sqrt(start)
            total = a * a * t + a * b * t**2 + b * b * t**3 / 3
        else:
            total = start * t + (end - start) * t**2 / 2
        return 0.5 * math.log(math.expm1(1000 * total))

    return log_sigma


def _trained_coordinates() -> Iterator[_Coordinate]:
    for start, end, root in ((0.0001, 0.02, False), (0.00085, 0.012, True)):
        log_sigma = _trained(start, end, root)

        def karras(level: float, log_sigma: Callable[[float], float] = log_sigma) -> float:
            return math.exp(log_sigma(level) / 7)

        yield _Coordinate(karras, karras(0.0), 0.002, tolerance=7e-4)
        yield _Coordinate(log_sigma, log_sigma(0.0), 0.002, tolerance=7e-4)


_TRAINED = tuple(_trained_coordinates())
_OTHERS = (
    _Coordinate(_karras, _karras(0.004), 0.002),
    _Coordinate(_exponential, _exponential(0.004), 0.002),
    _Coordinate(_linear_quadratic, 0.0, 0.01),
    _Coordinate(_beta, 0.0, 0.002, tolerance=2e-4),
)
