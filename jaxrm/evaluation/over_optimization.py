"""Over-optimisation: what a policy gives at a distance from the policy that it started from.

Policies that went different distances are compared at the same KL, along their training runs, as in "Scaling Laws for
Reward Model Overoptimization" (arXiv 2210.10760): a policy that moved less has less of everything, good or bad.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Path(NamedTuple):
    """One quantity along one training run, in the order of its steps.

    Attributes:
      steps: of each measurement, ascending.
      kl: from the policy that training started from, nats a response.
      values: what was measured there.
    """

    steps: Sequence[int]
    kl: Sequence[float]
    values: Sequence[float]


def at_kl(kl: ArrayLike, values: ArrayLike, level: float) -> float | None:
    """The value where a training run first came to a KL, interpolated linearly between the measurements around it.

    The first time counts (jaxrm choice): the KL of a run may come back to the same number later, with a policy that
    has been optimised for longer.

    Args:
      kl: ``[N]`` KL along training, nats a response; need not be monotone.
      values: ``[N]`` values measured at the same steps.
      level: KL, at least 0.

    Returns:
      The value, or None where the run never came there, or began beyond it. Measurements that are NaN are passed over.
    """
    x, y = np.asarray(kl, np.float64), np.asarray(values, np.float64)
    assert x.ndim == 1 and x.shape == y.shape, (x.shape, y.shape)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    beyond = np.flatnonzero(x >= level)
    if not len(beyond):
        return None
    at = int(beyond[0])
    if x[at] == level:
        return float(y[at])
    if at == 0:
        return None
    share = (level - x[at - 1]) / (x[at] - x[at - 1])
    return float(y[at - 1] + share * (y[at] - y[at - 1]))


def reach(kls: Sequence[ArrayLike]) -> float:
    """The largest KL that every one of these training runs came to: the least of their maxima, or 0 of no run."""
    largest = [np.asarray(kl, np.float64) for kl in kls]
    return min((float(np.nanmax(kl)) for kl in largest if np.isfinite(kl).any()), default=0.0)


def mean_path(paths: Sequence[Path]) -> Path:
    """Mean KL and mean value of several runs at each step that all of them measured."""
    if not paths:
        return Path((), (), ())
    shared = sorted(set.intersection(*(set(path.steps) for path in paths)))
    at = [{step: n for n, step in enumerate(path.steps)} for path in paths]
    kl = [_mean([path.kl[where[step]] for path, where in zip(paths, at, strict=True)]) for step in shared]
    values = [_mean([path.values[where[step]] for path, where in zip(paths, at, strict=True)]) for step in shared]
    return Path(shared, kl, values)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
