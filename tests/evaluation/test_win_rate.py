"""Win rates: outcomes, means over seeds of means over prompts, and intervals that count both."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from jaxrm.evaluation.win_rate import difference_interval, mean_interval, outcomes, win_rate


def drawn(seeds, prompts, *, of_seed, of_prompt=0.0, rest=1.0, number=0, mean=0.0):
    """``[S, P]`` values whose seeds, and whose shared prompts, each have an effect of their own."""
    rng = np.random.default_rng(number)
    return (
        mean
        + of_seed * rng.normal(size=(seeds, 1))
        + of_prompt * rng.normal(size=(1, prompts))
        + rest * rng.normal(size=(seeds, prompts))
    )


# --- outcomes


def test_the_higher_mark_wins_and_a_tie_counts_half():
    np.testing.assert_array_equal(outcomes([0.2, 0.5, 1.0, np.nan], [0.1, 0.5, 1.5, 0.3]), [1.0, 0.5, 0.0, np.nan])


def test_what_one_side_wins_the_other_loses():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 4, (2, 5, 30))
    np.testing.assert_array_equal(outcomes(first, second) + outcomes(second, first), np.ones((5, 30)))


# --- the interval, by hand


def test_three_seeds_by_hand():
    # means of the seeds 0.5, 0.75, 1; their deviation 0.25; t(2, 0.975) = 4.302653
    found = win_rate([[0, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert (found.rate, found.seeds, found.prompts, found.note) == (0.75, 3, 4, "")
    assert found.low == pytest.approx(0.75 - 4.302653 * 0.25 / math.sqrt(3), abs=1e-6)
    assert found.high == 1.0  # clipped: 1.371
    of_mean = mean_interval([[0, 1, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert of_mean.high == pytest.approx(0.75 + 4.302653 * 0.25 / math.sqrt(3), abs=1e-6)


def test_a_loop_over_seeds_and_prompts_gives_the_same_rate():
    rng = np.random.default_rng(1)
    rows = [rng.choice([0.0, 0.5, 1.0], size) for size in (3, 7, 5, 2)]
    total = 0.0
    for row in rows:
        won = 0.0
        for value in row:
            won += value
        total += won / len(row)
    found = win_rate(rows)
    assert found.rate == pytest.approx(total / 4)
    assert found.prompts == 7
    means = [row.mean() for row in rows]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(means), scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx((max(low, 0), min(high, 1)))


@pytest.mark.parametrize(("seeds", "words"), [(1, "1 seed: "), (2, "2 seeds: ")])
def test_too_few_seeds_have_a_rate_and_no_interval(seeds, words):
    found = win_rate(np.full((seeds, 4), 0.5))
    assert (found.rate, found.low, found.high) == (0.5, None, None)
    assert found.note == f"{words}too few for an interval"
    assert found.verdict == ""


def test_values_that_are_missing_count_nowhere():
    nan = math.nan
    found = mean_interval([[1.0, nan, 3.0], [nan, nan, nan], [4.0, 4.0, nan], [6.0, nan, nan]])
    same = mean_interval([[1.0, 3.0], [4.0, 4.0], [6.0]])
    assert found == same
    assert (found.mean, found.seeds, found.prompts) == (4.0, 3, 2)


def test_no_values_are_no_mean():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mean_interval([[math.nan], [math.nan]])
    assert math.isnan(found.mean) and found.low is None and found.seeds == 0


def test_the_verdict_needs_an_interval_beside_one_half():
    assert win_rate([[0.9], [0.91], [0.92]]).verdict == "wins"
    assert win_rate([[0.1], [0.11], [0.12]]).verdict == "loses"
    assert win_rate([[0.1], [0.9], [0.95]]).verdict == ""


@pytest.mark.parametrize("crossed", [False, True])
def test_seeds_that_agree_leave_a_variance(crossed):
    """All won at two prompts is four of six with two wins and two losses added; t(2, 0.975) is 4.302653."""
    rate = win_rate(np.ones((3, 2)), crossed=crossed)
    assert rate.error == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 6))
    assert (rate.low, rate.high) == (pytest.approx(1 - 4.302653 * rate.error), 1.0)
    assert rate.verdict == "" and win_rate(np.ones((3, 100)), crossed=crossed).verdict == "wins"
    balanced = win_rate([[1, 0], [0, 1], [1, 0]], crossed=crossed)
    assert balanced.rate == 0.5 and balanced.low < balanced.high


# --- what the interval counts


def test_more_prompts_do_not_narrow_what_few_seeds_leave_wide():
    few, many = (drawn(5, size, of_seed=1.0, rest=0.0) for size in (10, 5000))
    widths = [found.high - found.low for found in map(mean_interval, (few, many))]
    assert widths[0] == pytest.approx(widths[1])


def test_the_order_of_seeds_and_prompts_changes_nothing():
    values = drawn(4, 9, of_seed=0.5, of_prompt=0.5)
    shuffled = values[[2, 0, 3, 1]][:, np.random.default_rng(0).permutation(9)]
    for crossed in (False, True):
        first, second = mean_interval(values, crossed=crossed), mean_interval(shuffled, crossed=crossed)
        assert (first.mean, first.low, first.high) == pytest.approx((second.mean, second.low, second.high))


@pytest.mark.parametrize("number", range(3))
def test_nested_prompts_give_the_interval_of_a_mixed_model(number):
    mixed = pytest.importorskip("statsmodels.regression.mixed_linear_model")
    seeds, prompts = 6, 40
    values = drawn(seeds, prompts, of_seed=0.7, mean=2.0, number=number)
    groups = np.repeat(np.arange(seeds), prompts)
    fitted = mixed.MixedLM(values.ravel(), np.ones((values.size, 1)), groups=groups).fit(reml=True)
    found = mean_interval(values)
    assert found.mean == pytest.approx(fitted.params[0], abs=1e-6)
    # the model's own interval takes the normal quantile; with that of Student's t it is ours
    reach = stats.t.ppf(0.975, seeds - 1) * fitted.bse[0]
    assert found.high - found.mean == pytest.approx(reach, rel=1e-3)
    assert found.mean - found.low == pytest.approx(reach, rel=1e-3)


@pytest.mark.parametrize("crossed", [False, True])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(crossed):
    covered = 0
    for number in range(400):
        values = drawn(5, 20, of_seed=0.5, of_prompt=1.0 if crossed else 0.0, number=number)
        found = mean_interval(values, crossed=crossed)
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 400 <= 0.985


def test_shared_prompts_that_differ_widen_the_interval():
    """Where all prompts are alike, sharing them changes nothing."""
    apart = drawn(5, 20, of_seed=0.05, of_prompt=1.0, rest=0.1)
    widths = [found.high - found.low for found in (mean_interval(apart, crossed=crossed) for crossed in (False, True))]
    assert widths[1] > 3 * widths[0]
    alike = drawn(5, 20, of_seed=1.0, rest=0.0)
    assert mean_interval(alike, crossed=True) == mean_interval(alike)


def test_shared_prompts_by_hand():
    # Means of the seeds 2.5, 3, 5.5 and of the prompts 7/3, 5: mean squares 31/6 and 32/3, and 1/6 for the rest.
    found = mean_interval([[1.0, 4.0], [2.0, 4.0], [4.0, 7.0]], crossed=True)
    seeds, prompts, rest = 31 / 6, 32 / 3, 1 / 6
    variance = (seeds + prompts - rest) / 6
    freedom = (seeds + prompts - rest) ** 2 / (seeds**2 / 2 + prompts**2 / 1 + rest**2 / 2)
    assert found.mean == pytest.approx(11 / 3)
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(variance), rel=1e-6)


# --- pooling and differences


def test_pooled_worlds_count_alike_and_their_variances_add_up():
    first, second = drawn(3, 4, of_seed=0.1, mean=0.6), drawn(5, 100, of_seed=0.1, mean=0.2, number=1)
    found, parts = mean_interval(first, second), [mean_interval(first), mean_interval(second)]
    assert found.mean == pytest.approx((parts[0].mean + parts[1].mean) / 2)
    errors = [stats.sem(values.mean(1)) / 2 for values in (first, second)]
    variance = errors[0] ** 2 + errors[1] ** 2
    freedom = variance**2 / (errors[0] ** 4 / 2 + errors[1] ** 4 / 4)  # Welch and Satterthwaite
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(variance))
    assert found.seeds == 3


def test_a_world_of_too_few_seeds_leaves_the_pool_no_interval():
    found = win_rate(np.full((5, 3), 0.5), np.full((2, 3), 1.0))
    assert (found.rate, found.low, found.note) == (0.75, None, "2 seeds: too few for an interval")


def test_a_difference_is_paired_by_seed():
    base = drawn(4, 6, of_seed=10.0)
    found = difference_interval(base + 0.5, base)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    apart = difference_interval(base[[1, 2, 3, 0]] + 0.5, base)
    assert apart.high - apart.low > 5


def test_seeds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="argument 2 is"):
        difference_interval(np.zeros((3, 2)), np.zeros((4, 2)))
