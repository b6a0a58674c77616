"""Two policies' answers to the same prompts compared: win rates, also with length controlled, and agreement of judges.

An outcome is 1 where the first answer wins, 0 where the second does, and 0.5 for a tie. NaN is no verdict, and is left
out.

**Intervals** are over the prompts, with verdicts of several seeds counted by their effective number: seeds that always
agree count once (L. Kish, Survey Sampling, 1965). With three seeds or more there is an interval over the seeds too, and
what is given reaches as far as either (jaxrm choice). So seeds that repeat each other never narrow an interval, and it
is never of width 0.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from jaxrm.evaluation.ranking import wilson_interval
from jaxrm.evaluation.win_rate import MIN_SEEDS, win_rate

QUARTILES = 4
_FEWEST = 8  # verdicts for a regression
RIDGE = 10.0  # inverse strength of the penalty of the constant, in logits
SLOPE_SCALE = 300.0  # of the length's feature, so that its slope has next to no penalty


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval.

    Attributes:
      rate: the share; NaN without a verdict.
      low: lower end; None where there is none.
      high: upper end.
      n: verdicts.
    """

    rate: float
    low: float | None
    high: float | None
    n: int

    @property
    def text(self) -> str:
        """``62.0 [51.5, 71.5]``, in percent."""
        if np.isnan(self.rate):
            return "–"
        bounds = "" if self.low is None or self.high is None else f" [{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{100 * self.rate:.1f}{bounds}"


def pair_outcomes(share_of_first: ArrayLike, share_of_second: ArrayLike) -> np.ndarray:
    """Outcomes of pairs that a judge saw in both orders.

    Args:
      share_of_first: ``[N]`` share of the place A, in which the first answer stood.
      share_of_second: ``[N]`` share of the place A, in which the second answer stood.

    Returns:
      ``[N]``; a tie where the two verdicts contradict each other, or one is exactly undecided.
    """
    a, b = np.asarray(share_of_first, np.float64), np.asarray(share_of_second, np.float64)
    outcome = np.full(a.shape, 0.5)
    outcome[(a > 0.5) & (b < 0.5)] = 1.0
    outcome[(a < 0.5) & (b > 0.5)] = 0.0
    return np.where(np.isnan(a) | np.isnan(b), np.nan, outcome)


def position_bias(share_of_first: ArrayLike, share_of_second: ArrayLike) -> float:
    """Mean preference for the place A: 1 where a judge always takes it, −1 where it never does, 0 where it sees none.

    Arguments are those of `pair_outcomes`. A pair whose verdicts agree counts 0. NaN without a pair.
    """
    a, b = np.asarray(share_of_first, np.float64), np.asarray(share_of_second, np.float64)
    places = (np.sign(a - 0.5) + np.sign(b - 0.5)) / 2
    return float(np.nanmean(places)) if places.size and not np.isnan(places).all() else float("nan")


def win_share(outcomes: ArrayLike) -> Rate:
    """The win rate of the first policy, a tie counting half; of flags their share.

    The interval over the prompts is Wilson's, that over the seeds of `jaxrm.evaluation.win_rate`. With fewer than three
    seeds there is the first alone, and it says nothing of another training.

    Args:
      outcomes: ``[S, N]`` of S seeds and N prompts, the same in each; or ``[N]``.
    """
    table = np.atleast_2d(np.asarray(outcomes, np.float64))
    verdicts = int((~np.isnan(table)).sum())
    if verdicts == 0:
        return Rate(float("nan"), None, None, 0)
    over_seeds = win_rate(table, crossed=True) if len(table) >= MIN_SEEDS else None
    if over_seeds is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a prompt without a verdict has no mean
            rate = float(np.nanmean(np.nanmean(table, axis=0)))
    else:
        rate = over_seeds.rate
    count = verdicts / _design_effect(table)
    low, high = wilson_interval(min(rate * count, count), count)
    if over_seeds is not None and over_seeds.low is not None and over_seeds.high is not None:
        low, high = min(low, over_seeds.low), max(high, over_seeds.high)
    return Rate(rate, low, high, verdicts)


def _design_effect(table: np.ndarray) -> float:
    """Kish's design effect ``1 + (m - 1) ρ`` of prompts with m verdicts each, the mean; from 1 to m.

    ρ is the correlation of the seeds at a prompt: 1 less their variance at a prompt over that of all verdicts. It is 1
    where all verdicts are equal, since then nothing shows that seeds differ.
    """
    counts = (~np.isnan(table)).sum(axis=0)
    table, counts = table[:, counts > 0], counts[counts > 0]
    verdicts, repeats = int(counts.sum()), int((counts - 1).sum())
    if not repeats:
        return 1.0
    within = float(np.nansum((table - np.nanmean(table, axis=0, keepdims=True)) ** 2)) / repeats
    total = float(np.nanvar(table))
    correlation = min(max(1 - within / total, 0.0), 1.0) if total else 1.0
    return 1 + (verdicts / len(counts) - 1) * correlation


def length_controlled(outcomes: ArrayLike, lengths: ArrayLike, other_lengths: ArrayLike) -> Rate:
    """The win rate that is left when both answers are equally long.

    A logistic regression explains the outcomes by ``tanh(d / std(d))``, where d is the difference of lengths, and by a
    constant, the difference in quality. The rate is the prediction at d = 0. Ties count half to each side. So does
    AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475), which also has a term for each instruction. The constant has a
    weak ridge penalty and the slope next to none, so where length decides all it explains all (jaxrm choice).

    The interval over the prompts is from the curvature of the likelihood, in which verdicts weigh by their effective
    number. That over the seeds is from standard errors that are robust to clusters, the seeds (K.-Y. Liang and
    S. L. Zeger, Biometrika 73, 1986), times S / (S - 1), with Student's t.

    Args:
      outcomes: ``[S, N]`` outcomes of S seeds and N prompts, or ``[N]``.
      lengths: lengths of the first policy's answers, of that shape, in any unit.
      other_lengths: those of the second one's.

    Returns:
      The rate with its interval; NaN for fewer than eight verdicts, or where all answers differ by the same length.
    """
    from sklearn.linear_model import LogisticRegression  # here, since it takes a second to load

    table = np.atleast_2d(np.asarray(outcomes, np.float64))
    differences = np.atleast_2d(np.asarray(lengths, np.float64) - np.asarray(other_lengths, np.float64))
    assert table.shape == differences.shape, (table.shape, differences.shape)
    known = ~np.isnan(table)
    difference, y, seeds = differences[known], table[known], np.nonzero(known)[0]
    if len(y) < _FEWEST or (np.ptp(difference) == 0 and difference[0] != 0):
        return Rate(float("nan"), None, None, len(y))
    feature = np.tanh(difference / (difference.std() or 1.0))
    design = np.stack([np.ones_like(feature), SLOPE_SCALE * feature], axis=1)
    # Every verdict is two weighted ones, so that a tie counts half to each side.
    effective = 1 / _design_effect(table)
    weights = effective * np.concatenate([y, 1 - y])
    model = LogisticRegression(C=RIDGE, fit_intercept=False, solver="newton-cholesky", tol=1e-8, max_iter=1000)
    if np.ptp(y) == 0 and y[0] != 0.5:  # all won or all lost: one class, which the library does not fit
        return win_share(table)
    used = weights > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the solver, which takes another one by itself
        model.fit(np.concatenate([design, design])[used], np.repeat([1, 0], len(y))[used], sample_weight=weights[used])
    share = model.predict_proba(design)[:, 1]
    curvature = effective * design.T @ (design * (share * (1 - share))[:, None]) + np.eye(2) / RIDGE
    inverse = np.linalg.inv(curvature)
    constant, spread = float(model.coef_[0, 0]), 1.96 * float(np.sqrt(inverse[0, 0]))
    num_seeds = len(np.unique(seeds))
    if num_seeds >= MIN_SEEDS:
        scores = effective * design * (y - share)[:, None]
        by_seed = np.stack([scores[seeds == seed].sum(axis=0) for seed in np.unique(seeds)])
        robust = inverse @ (by_seed.T @ by_seed) @ inverse * num_seeds / (num_seeds - 1)
        spread = max(spread, float(stdtrit(num_seeds - 1, 0.975)) * float(np.sqrt(robust[0, 0])))
    rate, low, high = (1 / (1 + np.exp(-logit)) for logit in (constant, constant - spread, constant + spread))
    return Rate(float(rate), float(low), float(high), len(y))


def by_length_quartile(outcomes: ArrayLike, differences: ArrayLike) -> list[tuple[float, float, Rate]]:
    """Win rates where the first answer is much shorter, shorter, longer, much longer than the second.

    Args:
      outcomes: ``[S, N]`` of S seeds and N prompts, or ``[N]``.
      differences: of the lengths, first less second, of that shape.

    Returns:
      For each quarter of the verdicts its least and largest difference, and the win rate, see `win_share`.
    """
    y, d = (np.atleast_2d(np.asarray(values, np.float64)) for values in (outcomes, differences))
    prompts, seeds = np.nonzero(~np.isnan(y.T))  # prompt by prompt, so that its equal differences are side by side
    order = np.argsort(d[seeds, prompts], kind="stable")
    quarters = []
    for part in np.array_split(order, QUARTILES):
        if len(part):
            at = seeds[part], prompts[part]
            table = np.full(y.shape, np.nan)
            table[at] = y[at]
            quarters.append((float(d[at].min()), float(d[at].max()), win_share(table)))
    return quarters


def agreement(outcomes: ArrayLike, other: ArrayLike) -> tuple[float, float, int]:
    """How far two judges agree on win, tie and loss.

    Returns:
      The share of equal verdicts, Cohen's kappa (J. Cohen, Educational and Psychological Measurement 20, 1960), and the
      number of pairs that both judged. Kappa is NaN where one verdict is all that was given.
    """
    from sklearn.metrics import cohen_kappa_score

    a, b = np.asarray(outcomes, np.float64).ravel(), np.asarray(other, np.float64).ravel()
    both = ~np.isnan(a) & ~np.isnan(b)
    a, b = (2 * a[both]).astype(int), (2 * b[both]).astype(int)
    if not len(a):
        return float("nan"), float("nan"), 0
    if len(np.unique(np.concatenate([a, b]))) < 2:
        return float((a == b).mean()), float("nan"), len(a)
    return float((a == b).mean()), float(cohen_kappa_score(a, b)), len(a)


def distinct(texts: list[str], n: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams of words over all n-grams; NaN without any."""
    words = [text.split() for text in texts]
    grams = [tuple(each[i : i + n]) for each in words for i in range(len(each) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def longest_repeat(text: str) -> int:
    """Words of the longest span that a text has twice, which may overlap itself."""
    words = text.split()
    low, high = 0, len(words) - 1 if words else 0
    while low < high:  # a span that is repeated has parts that are
        middle = (low + high + 1) // 2
        spans = [tuple(words[i : i + middle]) for i in range(len(words) - middle + 1)]
        low, high = (middle, high) if len(set(spans)) < len(spans) else (low, middle - 1)
    return low
