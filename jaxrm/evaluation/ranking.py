"""How well a reward model ranks pairs, with intervals."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def wilson_interval(successes: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share: every p that a score test on ``successes`` out of ``n`` does not reject.

    With ``z`` the two-sided normal quantile, ``(p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n)``. It stays
    inside [0, 1] and holds for small n and for shares near 0 and 1, where p̂ ± z·se does not.

    Args:
      successes: 0 to `n`; may be a fraction, since a tie counts half.
      n: trials; 0 gives ``(0, 1)``. May be a fraction, an effective number.
      confidence: between 0 and 1.

    Returns:
      Its lower and its upper end, as shares.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    assert 0 <= successes <= n, (successes, n)
    assert 0 < confidence < 1, confidence
    if n == 0:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    center = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At a share of 0 or 1 that end is the share itself; rounding must not move it.
    low = (center - reach) / scale if successes > 0 else 0.0
    high = (center + reach) / scale if successes < n else 1.0
    return low, high


@dataclass(frozen=True)
class PairAccuracy:
    """The share of pairs whose chosen response has the higher value.

    Attributes:
      accuracy: the share; a tie counts half.
      low: lower end of its 95 % Wilson interval.
      high: upper end of the interval.
      n: pairs.
    """

    accuracy: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """The conclusion that the interval allows; an interval that holds 0.5 may be chance."""
        if self.low > 0.5:
            return "ranks pairs"
        if self.high < 0.5:
            return "ranks them the wrong way round"
        return "cannot rank pairs"


def pair_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> PairAccuracy:
    """How often the chosen response of a pair has a higher value than the rejected one.

    Args:
      chosen: ``[N]`` values of the chosen responses, e.g. their summed token rewards; N > 0, none of them NaN.
      rejected: ``[N]`` values of the rejected responses of the same pairs.

    Returns:
      The share, a tie counting half, with its 95 % Wilson interval.
    """
    better, worse = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    assert better.ndim == 1 and better.shape == worse.shape, (better.shape, worse.shape)
    assert len(better) > 0, "no pairs"
    assert not np.isnan(better).any() and not np.isnan(worse).any(), "a value is NaN"
    right = float((better > worse).sum() + 0.5 * (better == worse).sum())
    return PairAccuracy(right / len(better), *wilson_interval(right, len(better)), len(better))


def length_correlation(values: ArrayLike, lengths: ArrayLike) -> float | None:
    """Pearson's correlation of a response's value with its length; near 1 the model rewards length.

    Args:
      values: ``[N]`` one value a response.
      lengths: ``[N]`` response lengths in tokens.

    Returns:
      −1 to 1, or None where either of them does not vary (fewer than two responses, too).
    """
    x, y = np.asarray(values, np.float64), np.asarray(lengths, np.float64)
    assert x.ndim == 1 and x.shape == y.shape, (x.shape, y.shape)
    assert not np.isnan(x).any(), "a value is NaN"
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1.0, 1.0))
