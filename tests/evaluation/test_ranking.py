"""Intervals against published tables and a root search, pair accuracy by hand, correlation against the definition."""

import math

import numpy as np
import pytest

from jaxrm.evaluation.ranking import PairAccuracy, length_correlation, pair_accuracy, wilson_interval


# Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, score method
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_is_the_published_one(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_by_hand():
    # 5 of 10 at z² = 3.841459: ½ ± 1.959964 · √(¼/10 + 3.841459/400) / 1.3841459
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    # one standard error (68.27 %): z = 1, and 1 of 1 gives (1 + ½ ± ½) / 2
    assert wilson_interval(1, 1, math.erf(1 / math.sqrt(2))) == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize(("successes", "n"), [(3, 7), (2.5, 6), (40, 41), (500, 1000), (1, 1000)])
def test_interval_ends_are_shares_that_a_score_test_just_accepts(successes, n):
    z = 1.959963984540054

    def rejects(share):
        return abs(successes / n - share) > z * math.sqrt(share * (1 - share) / n)

    for end, outside in zip(wilson_interval(successes, n), (0.0, 1.0), strict=True):
        inside = successes / n
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if rejects(middle) else (middle, outside)
        assert end == pytest.approx(inside, abs=1e-9)


def test_the_interval_stays_a_share_and_shrinks_with_more_trials():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for n in (1, 10, 1000):
        assert wilson_interval(0, n)[0] == 0.0
        assert wilson_interval(n, n)[1] == 1.0
        low, high = wilson_interval(0.3 * n, n)
        flipped = wilson_interval(0.7 * n, n)
        assert (1 - high, 1 - low) == pytest.approx(flipped)
    widths = [high - low for low, high in (wilson_interval(n / 2, n) for n in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert np.diff(wilson_interval(30, 100, 0.99)) > np.diff(wilson_interval(30, 100, 0.9))


@pytest.mark.parametrize("call", [(3, 2), (-1, 2), (1, 2, 1.0)])
def test_impossible_counts_are_refused(call):
    with pytest.raises(AssertionError):
        wilson_interval(*call)


def test_a_tie_counts_half():
    found = pair_accuracy([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, -math.inf])
    assert found.accuracy == 2.5 / 4
    assert (found.low, found.high) == wilson_interval(2.5, 4)
    assert found.n == 4


@pytest.mark.parametrize(
    ("right", "verdict"), [(60, "ranks pairs"), (55, "cannot rank pairs"), (40, "ranks them the wrong way round")]
)
def test_verdict_follows_the_interval_and_not_the_share(right, verdict):
    margins = [1.0] * right + [-1.0] * (100 - right)
    assert pair_accuracy(margins, [0.0] * 100).verdict == verdict


def test_an_interval_that_touches_chance_ranks_nothing():
    assert PairAccuracy(0.6, 0.5, 0.7, 10).verdict == "cannot rank pairs"
    assert PairAccuracy(0.4, 0.3, 0.5, 10).verdict == "cannot rank pairs"


@pytest.mark.parametrize("call", [([math.nan], [0.0]), ([0.0], [math.nan]), ([], []), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_ranked_is_refused(call):
    with pytest.raises(AssertionError):
        pair_accuracy(*call)


def test_correlation_with_length_by_hand():
    # deviations (-1, 0, 1) and (-1, 1, 0): their product sums to 1, and each has a squared norm of 2
    assert length_correlation([0, 1, 2], [10, 12, 11]) == pytest.approx(0.5)
    assert length_correlation([3, 2, 1], [10, 20, 30]) == pytest.approx(-1.0)


def test_correlation_equals_the_covariance_over_the_deviations():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 300, 50)
    values = 0.02 * lengths + rng.normal(size=50)
    covariance = sum((v - values.mean()) * (n - lengths.mean()) for v, n in zip(values, lengths, strict=True)) / 50
    assert length_correlation(values, lengths) == pytest.approx(covariance / (values.std() * lengths.std()))


@pytest.mark.parametrize(("values", "lengths"), [([1, 1, 1], [1, 2, 3]), ([1, 2], [4, 4]), ([1.0], [3]), ([], [])])
def test_without_variance_there_is_no_correlation(values, lengths):
    assert length_correlation(values, lengths) is None
