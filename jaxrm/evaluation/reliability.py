"""Whether a scalar reward model is as sure as it is right."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Reliability:
    """How stated probabilities compare with what happened.

    Attributes:
      expected_calibration_error: mean distance between stated probability and share right over the bins, weighted
        by their counts; 0 is perfect.
      brier: mean squared distance between stated probability and outcome; 0.25 is a coin that says so.
      log_loss: mean negative log-probability of the outcome in nats, which is the Bradley–Terry loss; log 2 is a coin.
      rows: the reliability diagram: ``(mean stated probability, share right, pairs)`` of each bin that holds a pair,
        from the least to the most sure.
    """

    expected_calibration_error: float
    brier: float
    log_loss: float
    rows: list[tuple[float, float, int]]


def calibration(margins: ArrayLike, bins: int = 10) -> Reliability:
    """Calibration of the Bradley–Terry reading of a reward, ``P(y⁺ is better) = σ(r⁺ − r⁻)``.

    Every pair names its better side first, so seen from that side the outcome is always 1 and a bin of it says
    nothing. Each pair is therefore seen from the side that the model prefers: it states ``p = σ(|r⁺ − r⁻|) ≥ ½``
    and is right when ``r⁺ > r⁻``; a tie states ½ and counts half.

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
        held = bin_of == index
        if held.any():
            rows.append((float(stated[held].mean()), float(right[held].mean()), int(held.sum())))
    return Reliability(
        expected_calibration_error=sum(count * abs(p - share) for p, share, count in rows) / len(margins),
        brier=float(np.mean((stated - right) ** 2)),
        log_loss=float(np.mean(np.logaddexp(0, -margins))),
        rows=rows,
    )
