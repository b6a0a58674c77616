"""Over-optimization: what a policy gains at a KL distance from the policy that it started from.

Policies that went different distances are compared at the same KL, along their training runs, as in "Scaling Laws for
Reward Model Overoptimization" (arXiv 2210.10760): a policy that moved less has less of everything, good or bad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class TrainingCurve(NamedTuple):
    """One quantity along one training run, in the order of its steps.

    Attributes:
      steps: of each measurement, ascending.
      kl: from the policy that training started from, nats a response.
      values: the quantity at these steps.
    """

    steps: Sequence[int]
    kl: Sequence[float]
    values: Sequence[float]


def at_kl(kl: ArrayLike, values: ArrayLike, level: float) -> float | None:
    """The value where a training run first reached a KL, by linear interpolation between its measurements.

    The first time counts (jaxrm choice): the KL of a run may return to the same number later, with a policy that has
    been optimized for longer.

    Args:
      kl: ``[N]`` KL along training, nats a response; need not be monotone.
      values: ``[N]`` values measured at the same steps.
      level: KL, at least 0.

    Returns:
      The value, or None where the run never reached the level, or began above it. Measurements that are NaN are
      skipped.
    """
    x, y = np.asarray(kl, np.float64), np.asarray(values, np.float64)
    assert x.ndim == 1 and x.shape == y.shape, (x.shape, y.shape)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    beyond = np.flatnonzero(x >= level)
    if not len(beyond):
        return None
    first = int(beyond[0])
    if x[first] == level:
        return float(y[first])
    if first == 0:
        return None
    share = (level - x[first - 1]) / (x[first] - x[first - 1])
    return float(y[first - 1] + share * (y[first] - y[first - 1]))


def reach(kls: Sequence[ArrayLike]) -> float:
    """The largest KL that all of these training runs reached: the least of their maxima; 0 without a run."""
    largest = [np.asarray(kl, np.float64) for kl in kls]
    return min((float(np.nanmax(kl)) for kl in largest if np.isfinite(kl).any()), default=0.0)


def mean_curve(curves: Sequence[TrainingCurve]) -> TrainingCurve:
    """Mean KL and mean value of several runs at each step that all of them measured; values that are NaN are left out.

    Args:
      curves: of the same quantity, one a run.
    """
    if not curves:
        return TrainingCurve((), (), ())
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    positions = [[list(curve.steps).index(step) for step in steps] for curve in curves]
    kl = [[curve.kl[i] for i in where] for curve, where in zip(curves, positions, strict=True)]
    values = [[curve.values[i] for i in where] for curve, where in zip(curves, positions, strict=True)]
    return TrainingCurve(
        steps, [_mean(row) for row in zip(*kl, strict=True)], [_mean(row) for row in zip(*values, strict=True)]
    )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
