"""Win rates and means over seeds and prompts, with intervals in which a seed is the unit, not a prompt.

Thousands of answers of one trained policy show much about that policy, and nothing about how the next training run
would end. So the interval comes from the differences between seeds, each of which has its own SFT policy, reward model
and PPO run. The seeds' means already contain the noise of the prompts. With prompts nested in seeds and equally many in
each, it is the interval of the fixed effect in a mixed model with a random intercept for each seed (a test compares
them). Where every seed answers the same prompts, the variance of the prompts is added (two-way random effects, degrees
of freedom by F. E. Satterthwaite, Biometrics Bulletin 2, 1946).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

MIN_SEEDS = 3
"""Fewer seeds get no interval; with two it would be 12.7 standard errors wide each way."""

_ROUNDING = 1e-24  # a variance below it is that of equal means, rounded

Values = ArrayLike | Sequence[ArrayLike]


@dataclass(frozen=True)
class WinRate:
    """How often one policy's response is better than another's to the same prompt.

    Attributes:
      rate: mean over seeds of the means over prompts; a tie counts half.
      low: lower end of the 95 % interval, within [0, 1]; None where there are too few seeds for one.
      high: its upper end.
      seeds: how many were compared.
      prompts: how many were compared for each seed; the most, where seeds differ.
      note: why there is no interval, e.g. ``2 seeds: too few for an interval``.
      error: standard error of the rate; None where there is no interval.
      freedom: degrees of freedom of the standard error.
    """

    rate: float
    low: float | None
    high: float | None
    seeds: int
    prompts: int
    note: str = ""
    error: float | None = None
    freedom: float | None = None

    @property
    def verdict(self) -> str:
        """``wins`` or ``loses`` where the interval leaves out 0.5, else the empty string."""
        if self.low is None or self.high is None:
            return ""
        return "wins" if self.low > 0.5 else "loses" if self.high < 0.5 else ""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and prompts; attributes as in `WinRate`, but the interval has no bounds."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    prompts: int
    note: str = ""


class _Spread(NamedTuple):
    """A mean, its variance and the degrees of freedom of that variance."""

    mean: float
    variance: float
    freedom: float
    seeds: int
    prompts: int


class _Estimate(NamedTuple):
    """A mean with its interval, standard error and degrees of freedom."""

    mean: float
    low: float | None
    high: float | None
    seeds: int
    prompts: int
    note: str
    error: float | None
    freedom: float | None


def outcomes(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Who wins at each prompt.

    Args:
      first: scores of one policy's responses, of any shape, e.g. ``[S, P]``.
      second: scores of the other's responses to the same prompts.

    Returns:
      float64 of that shape: 1 where `first` has the higher score, 0 where `second` has, 0.5 for a tie and NaN where a
      score is NaN.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.where(np.isnan(a) | np.isnan(b), np.nan, np.where(a == b, 0.5, (a > b).astype(np.float64)))


def win_rate(*groups: Values, crossed: bool = False) -> WinRate:
    """The win rate with its 95 % interval (Student's t on the seeds' means).

    Seeds that agree to the last digit show no variance, though few prompts cannot show that there is none. Then the
    variance is that of a share among the prompts of one seed, with two wins and two losses added (A. Agresti and
    B. A. Coull, The American Statistician 52, 1998; jaxrm choice).

    Args:
      *groups: ``[S, P]`` outcomes, or one array of them for each seed; NaN is left out. Of several groups (worlds) the
        mean weights each group alike, and their variances add up, since they share no run.
      crossed: every seed answered the same prompts, in this order; else each seed has its own.

    Returns:
      The rate; NaN without a seed.
    """
    estimate = _estimate(groups, crossed, are_outcomes=True)
    low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (estimate.low, estimate.high))
    return WinRate(
        estimate.mean, low, high, estimate.seeds, estimate.prompts, estimate.note, estimate.error, estimate.freedom
    )


def mean_interval(*groups: Values, crossed: bool = False) -> Mean:
    """Any mean over seeds and prompts with its 95 % interval: as `win_rate`, of values of any size."""
    return Mean(*_estimate(groups, crossed)[:6])


def difference_interval(first: Values, second: Values, *, crossed: bool = False) -> Mean:
    """The mean of `first` minus `second` with its interval, paired by seed and, in a seed, by prompt.

    Args:
      first: ``[S, P]`` values, or one array of them for each seed.
      second: as many, of the same seeds and prompts in the same order.
      crossed: as in `win_rate`.
    """
    sides = ([np.asarray(row, np.float64) for row in _rows(values)] for values in (first, second))
    pairs = list(zip(*sides, strict=True))
    assert all(a.shape == b.shape for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    return mean_interval([a - b for a, b in pairs], crossed=crossed)


def _estimate(groups: Sequence[Values], crossed: bool, *, are_outcomes: bool = False) -> _Estimate:
    spreads = [_spread(group, crossed) for group in groups]
    assert spreads, "no values"
    if are_outcomes:
        spreads = [_with_variance(spread) for spread in spreads]
    mean = sum(spread.mean for spread in spreads) / len(spreads)
    seeds, prompts = min(spread.seeds for spread in spreads), max(spread.prompts for spread in spreads)
    if seeds < MIN_SEEDS:
        note = f"{seeds} seed{'' if seeds == 1 else 's'}: too few for an interval"
        return _Estimate(mean, None, None, seeds, prompts, note, None, None)
    terms = [(spread.variance / len(spreads) ** 2, spread.freedom) for spread in spreads]
    variance = sum(term for term, _ in terms)
    divisor = sum(term**2 / freedom for term, freedom in terms)
    freedom = variance**2 / divisor if divisor else min(freedom for _, freedom in terms)
    half_width = float(stdtrit(freedom, 0.975)) * math.sqrt(variance)
    return _Estimate(mean, mean - half_width, mean + half_width, seeds, prompts, "", math.sqrt(variance), freedom)


def _with_variance(spread: _Spread) -> _Spread:
    """The spread of outcomes, with the variance of Agresti and Coull where the seeds agree."""
    if not spread.variance < _ROUNDING:  # also NaN
        return spread
    trials = spread.prompts + 4
    share = (spread.mean * spread.prompts + 2) / trials
    return spread._replace(variance=share * (1 - share) / trials)


def _rows(values: Values) -> Sequence[ArrayLike]:
    """The values of each seed; an array has them along its first axis."""
    return cast(Sequence[ArrayLike], values)


def _spread(values: Values, crossed: bool) -> _Spread:
    """Mean over seeds of means over prompts, its variance, and the degrees of freedom of the variance."""
    rows = [np.asarray(row, np.float64) for row in _rows(values)]
    assert all(row.ndim == 1 for row in rows), [row.shape for row in rows]
    rows = [row for row in rows if not np.isnan(row).all()]
    if not rows:
        return _Spread(math.nan, math.nan, math.nan, 0, 0)
    means = np.array([np.nanmean(row) for row in rows])
    prompts = max(int((~np.isnan(row)).sum()) for row in rows)
    seeds, mean = len(rows), float(means.mean())
    if seeds < MIN_SEEDS:
        return _Spread(mean, math.nan, math.nan, seeds, prompts)
    variance, freedom = float(means.var(ddof=1)) / seeds, float(seeds - 1)
    if crossed:
        assert len({len(row) for row in rows}) == 1, "the seeds have not the same prompts"
        table = np.stack(rows)
        table = table[:, ~np.isnan(table).any(axis=0)]
        if table.shape[1] > 1:
            variance, freedom = _with_prompts(table, variance, freedom)
    return _Spread(mean, variance, freedom, seeds, prompts)


def _with_prompts(table: np.ndarray, variance: float, freedom: float) -> tuple[float, float]:
    """The variance that the prompts add to that of the seeds: ``(MS_prompt − MS_rest) / (S P)``, at least 0."""
    seeds, prompts = table.shape
    by_prompt = table.mean(axis=0)
    rest = table - table.mean(axis=1, keepdims=True) - by_prompt + table.mean()
    rest_freedom = (seeds - 1) * (prompts - 1)
    prompt_term = float(by_prompt.var(ddof=1)) / prompts
    rest_term = float((rest**2).sum()) / rest_freedom / table.size
    total = variance + prompt_term - rest_term
    if total <= variance:
        return variance, freedom
    divisor = variance**2 / freedom + prompt_term**2 / (prompts - 1) + rest_term**2 / rest_freedom
    return total, total**2 / divisor
