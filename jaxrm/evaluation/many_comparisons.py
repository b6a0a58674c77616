"""Many win rates at once: intervals that hold for all of them together, and which of them still differ from one half.

Of twenty comparisons of equal policies, one leaves out one half by chance. An interval at the level ``1 - 0.05 / m``
for each of ``m`` comparisons holds for all of them with 95 % (C. E. Bonferroni 1936). The step-down procedure of
S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979, keeps
the same promise and finds more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit

from jaxrm.evaluation.win_rate import WinRate


@dataclass(frozen=True)
class Adjusted:
    """A win rate as one of many.

    Attributes:
      low: lower end of the interval that holds for all comparisons together, within [0, 1]; None where there is none.
      high: its upper end.
      p: by Holm, the probability of so large a difference from one half, were there none anywhere; None without an
        interval.
      comparisons: how many there are.
    """

    low: float | None
    high: float | None
    p: float | None
    comparisons: int

    @property
    def is_sure(self) -> bool:
        """Whether the rate differs from one half among so many comparisons."""
        return self.p is not None and self.p < 0.05


def adjusted(rates: Sequence[WinRate]) -> list[Adjusted]:
    """Every win rate as one of all; those without an interval do not count.

    Args:
      rates: of the comparisons that are looked at together, such as those of a table.
    """
    single = [_p_value(rate) for rate in rates]
    order = sorted((p, n) for n, p in enumerate(single) if p is not None)
    count = len(order)
    by_holm: dict[int, float] = {}
    largest = 0.0
    for rank, (p, n) in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * p))
        by_holm[n] = largest
    return [_adjusted(rate, by_holm.get(n), count) for n, rate in enumerate(rates)]


def _p_value(rate: WinRate) -> float | None:
    """Two-sided, of Student's t on the seeds' means; 1 where they are one half without any spread."""
    if rate.error is None or rate.freedom is None or math.isnan(rate.rate):
        return None
    distance = abs(rate.rate - 0.5)
    if rate.error == 0:
        return 0.0 if distance else 1.0
    return float(2 * stdtr(rate.freedom, -distance / rate.error))


def _adjusted(rate: WinRate, p: float | None, count: int) -> Adjusted:
    if p is None or rate.error is None or rate.freedom is None:
        return Adjusted(None, None, None, count)
    half_width = float(stdtrit(rate.freedom, 1 - 0.025 / count)) * rate.error
    return Adjusted(max(rate.rate - half_width, 0.0), min(rate.rate + half_width, 1.0), p, count)
