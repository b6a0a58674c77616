"""Reliability of a scalar reward model: whether its stated probabilities match how often it is right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Reliability:
    """How stated probabilities compare with outcomes.

    Attributes:
      expected_calibration_error: mean distance between stated probability and share right over the bins, weighted
        by their counts; 0 is perfect.
      brier: mean squared distance between stated probability and outcome; 0.25 for a constant one half.
      log_loss: mean negative log-prob of the outcome in nats, which is the Bradley–Terry loss; log 2 for a constant
        one half.
      rows: the reliability diagram: ``(mean stated probability, share right, pairs)`` of each bin that holds a pair,
        from the least to the most sure.
    """

    expected_calibration_error: float
    brier: float
    log_loss: float
    rows: list[tuple[float, float, int]]


def measure_reliability(margins: ArrayLike, bins: int = 10) -> Reliability:
    """Reliability of a reward's Bradley–Terry probabilities, ``P(y⁺ is better) = σ(r⁺ − r⁻)``.

    Every pair names its better side first, so from that side the outcome is always 1, and no bin would show an error.
    Each pair is therefore taken from the side that the model prefers: it states ``p = σ(|r⁺ − r⁻|) ≥ ½`` and is right
    when ``r⁺ > r⁻``. A tie states ½ and counts half.

    Args:
      margins: ``[N]`` values of ``r⁺ − r⁻``, before any scaling of rewards; N > 0, all finite.
      bins: number of equal bins that [½, 1] is cut into.

    Returns:
      The three numbers and the rows of the reliability diagram.

    Source: C. Guo et al., "On calibration of modern neural networks" (2017) for the expected calibration error;
    the confidence-sided view of pairs is a jaxrm choice.
    """
    margins = np.asarray(margins, np.float64)
    assert margins.ndim == 1 and len(margins) > 0, margins.shape
    assert np.isfinite(margins).all(), "a margin is not finite"
    assert bins > 0, bins
    stated = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    bin_of = np.minimum(((stated - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for index in range(bins):
        in_bin = bin_of == index
        if in_bin.any():
            rows.append((float(stated[in_bin].mean()), float(right[in_bin].mean()), int(in_bin.sum())))
    return Reliability(
        expected_calibration_error=sum(count * abs(p - share) for p, share, count in rows) / len(margins),
        brier=float(np.mean((stated - right) ** 2)),
        log_loss=float(np.mean(np.logaddexp(0, -margins))),
        rows=rows,
    )
