"""Win rates, length control and agreement, against hand-worked cases and an independent computation."""

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from jaxrm.evaluation import comparison
from jaxrm.evaluation.ranking import wilson_interval

NAN = float("nan")


def test_a_judge_of_places_has_a_bias_and_ties_all():
    """Always "first" gives a position bias of 1 and 50 %; never gives -1."""
    ones, zeros = np.ones(6), np.zeros(6)
    assert comparison.position_bias(ones, ones) == 1 and comparison.position_bias(zeros, zeros) == -1
    outcomes = comparison.pair_outcomes(ones, ones)
    assert comparison.win_share(outcomes).rate == 0.5 and (outcomes == 0.5).all()


def test_verdicts_agree_over_both_orders_or_tie():
    first, second = np.array([0.9, 0.2, 0.8, 0.5, NAN]), np.array([0.1, 0.7, 0.9, 0.1, 0.3])
    np.testing.assert_array_equal(comparison.pair_outcomes(first, second), [1, 0, 0.5, 0.5, NAN])
    assert comparison.position_bias(first, second) == pytest.approx((0 + 0 + 1 - 0.5) / 4)


def test_a_judge_of_length_is_even_at_equal_length():
    """The first policy writes more in 80 of 100 prompts and wins just these; 50 % with length removed."""
    rng = np.random.default_rng(0)
    difference = np.where(np.arange(100) < 80, 1, -1) * rng.integers(5, 60, 100)
    outcomes = (difference > 0).astype(float)
    rate = comparison.length_controlled(outcomes, 100 + difference, np.full(100, 100.0))
    assert comparison.win_share(outcomes).rate == 0.8
    assert rate.rate == pytest.approx(0.5, abs=0.02) and rate.low < 0.5 < rate.high


def test_length_control_is_a_penalized_logistic_regression():
    """The same minimum found by another optimizer; ties count half to each side."""
    rng = np.random.default_rng(1)
    lengths, other = rng.integers(10, 90, 60).astype(float), rng.integers(10, 90, 60).astype(float)
    outcomes = rng.choice([0.0, 0.5, 1.0], 60, p=[0.3, 0.2, 0.5])
    x = comparison.SLOPE_SCALE * np.tanh((lengths - other) / (lengths - other).std())

    def loss(theta):
        logits = theta[0] + theta[1] * x
        return np.sum(np.logaddexp(0, logits) - outcomes * logits) + theta @ theta / (2 * comparison.RIDGE)

    options = {"xatol": 1e-11, "fatol": 1e-13, "maxiter": 4000}
    constant = minimize(loss, np.zeros(2), method="Nelder-Mead", options=options).x[0]
    found = comparison.length_controlled(outcomes, lengths, other)
    assert found.rate == pytest.approx(1 / (1 + np.exp(-constant)), abs=1e-5) and found.low < found.rate < found.high


def test_few_verdicts_have_no_regression():
    assert np.isnan(comparison.length_controlled([1, 0, 1], [1, 2, 3], [3, 2, 1]).rate)
    assert np.isnan(comparison.length_controlled([0, 1] * 5, np.full(10, 9), np.full(10, 7)).rate)
    assert comparison.length_controlled(np.ones(9), np.arange(9), np.zeros(9)).rate == 1  # nothing to explain
    assert comparison.length_controlled(np.full(9, 0.5), np.arange(9), np.zeros(9)).rate == pytest.approx(0.5)


def test_a_win_share_counts_seeds_where_there_are_three():
    table = np.array([[1, 0.5, 1, 0], [1, 1, 1, 0.5], [1, 0.5, 0.5, 0]])
    several, one = comparison.win_share(table), comparison.win_share(table[0])
    assert several.rate == pytest.approx(table.mean()) and several.n == 12
    assert one.rate == pytest.approx(0.625) and 0 < one.low < 0.625 < one.high < 1
    assert comparison.win_share([[NAN, NAN]]).text == "–"
    assert comparison.win_share([[1.0, NAN], [0.0, 1.0]]).rate == 0.75  # of each prompt first


def test_seeds_that_repeat_each_other_narrow_nothing():
    """One vector of outcomes, as one seed and as five."""
    rng = np.random.default_rng(0)
    outcomes = rng.choice([0.0, 0.5, 1.0], 40, p=[0.2, 0.1, 0.7])
    lengths, other = rng.permutation(200)[:40].astype(float), np.full(40, 100.0)
    for y in (outcomes, np.ones(40)):
        for rates in (
            [comparison.win_share(np.tile(y, (seeds, 1))) for seeds in (1, 5)],
            [comparison.length_controlled(*(np.tile(x, (n, 1)) for x in (y, lengths, other))) for n in (1, 5)],
            *zip(
                *(
                    [rate for *_, rate in comparison.by_length_quartile(*(np.tile(x, (n, 1)) for x in (y, lengths)))]
                    for n in (1, 5)
                ),
                strict=True,
            ),
        ):
            one, five = rates
            assert five.rate == pytest.approx(one.rate, abs=1e-6)
            assert five.low <= one.low + 1e-6 and five.high >= one.high - 1e-6 and one.low < one.high


def test_seeds_that_agree_leave_an_interval():
    """All won in three runs of two prompts is Wilson's interval of two; balanced runs are not sure of one half."""
    z = 1.959964
    several, two = (comparison.win_share(np.ones((seeds, 2))) for seeds in (3, 2))
    assert two.low == pytest.approx(2 / (2 + z**2), abs=1e-6) and two.high == 1
    assert several.low <= two.low and several.high == 1
    balanced = comparison.win_share([[1, 0], [0, 1], [1, 0]])
    # The seeds do not correlate at a prompt, so Wilson's interval is of six.
    assert balanced.rate == 0.5 and balanced.high - 0.5 >= z / 2 / np.sqrt(6 + z**2) - 1e-6


def test_the_interval_over_prompts_counts_seeds_in_part():
    """By hand: at one of four prompts two seeds differ, so ρ is 1 - (1/8) / (15/64), the design effect 1 + 7/15."""
    n = 8 / (1 + 7 / 15)
    low, high = wilson_interval(5 / 8 * n, n)
    rate = comparison.win_share([[1, 1, 0, 1], [1, 1, 0, 0]])
    assert (rate.rate, rate.low, rate.high) == pytest.approx((5 / 8, low, high))


def test_length_control_counts_seeds_that_differ():
    """Standard errors that are robust to clusters, against those of statsmodels, whose fit has no penalty."""
    glm = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(2)
    seeds, prompts = 4, 500
    d = rng.normal(0, 20, (seeds, prompts))
    truth = np.array([-1.5, 0.2, 0.9, 1.5])[:, None] + np.tanh(d / d.std())
    y = (rng.random((seeds, prompts)) < 1 / (1 + np.exp(-truth))).astype(float)
    design = glm.add_constant(np.tanh(d / d.std()).ravel())
    groups = np.repeat(np.arange(seeds), prompts)
    fit = glm.GLM(y.ravel(), design, family=glm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": groups}
    )
    rate, reach = comparison.length_controlled(y, d, np.zeros_like(d)), stats.t.ppf(0.975, seeds - 1) * fit.bse[0]
    logits = np.array([fit.params[0], fit.params[0] - reach, fit.params[0] + reach])
    assert (rate.rate, rate.low, rate.high) == pytest.approx(tuple(1 / (1 + np.exp(-logits))), rel=5e-3)
    alone = comparison.length_controlled(y[0], d[0], np.zeros(prompts))
    assert rate.high - rate.low > 3 * (alone.high - alone.low)


def test_quarters_of_length_are_of_equal_size():
    rows = comparison.by_length_quartile([0, 0, 0.5, 1, 1, 1, 1, NAN], [-9, -5, -2, 0, 1, 3, 8, 99])
    assert [(low, high, rate.rate) for low, high, rate in rows] == [(-9, -5, 0), (-2, 0, 0.75), (1, 3, 1), (8, 8, 1)]


def test_kappa_is_cohens():
    """Of ten pairs seven are equal; by chance 0.5 x 0.4 + 0.3 x 0.4 + 0.2 x 0.2 would be."""
    first = [1, 1, 1, 1, 1, 0, 0, 0, 0.5, 0.5]
    second = [1, 1, 1, 1, 0, 0, 0, 0.5, 0.5, 0]
    share, kappa, pairs = comparison.agreement([*first, NAN], [*second, 1.0])
    chance = 0.5 * 0.4 + 0.3 * 0.4 + 0.2 * 0.2
    assert (share, pairs) == (0.7, 10) and kappa == pytest.approx((0.7 - chance) / (1 - chance))
    assert np.isnan(comparison.agreement([1, 1], [1, 1])[1])


def test_repetition_is_counted_in_words():
    assert comparison.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert np.isnan(comparison.distinct(["one"], 2))
    assert [comparison.longest_repeat(text) for text in ("a b c a b d", "a a a a", "a b", "")] == [2, 3, 0, 0]
