"""Calibration of pairs by hand, and on outcomes drawn from the probabilities themselves."""

import math

import numpy as np
import pytest

from jaxrm.evaluation.reliability import measure_reliability


def test_reliability_by_hand():
    log_3, log_9 = math.log(3), math.log(9)  # σ is ¾ and 0.9
    result = measure_reliability([log_3, log_3, -log_3, log_9], bins=2)
    # [½, ¾) holds nothing; [¾, 1] holds all four: stated (3·¾ + 0.9) / 4 = 0.7875, right 3 of 4
    assert result.rows == [(pytest.approx(0.7875), 0.75, 4)]
    assert result.expected_calibration_error == pytest.approx(0.0375)
    assert result.brier == pytest.approx((2 * 0.25**2 + 0.75**2 + 0.1**2) / 4)
    assert result.log_loss == pytest.approx(-(2 * math.log(0.75) + math.log(0.25) + math.log(0.9)) / 4)


def test_bins_weigh_by_their_pairs():
    result = measure_reliability([0.1, -0.1, -0.1, 20.0], bins=10)
    stated = 1 / (1 + math.exp(-0.1))
    assert [row[2] for row in result.rows] == [3, 1]
    assert result.expected_calibration_error == pytest.approx(0.75 * (stated - 1 / 3), abs=1e-6)


def test_a_model_that_cannot_tell_says_so():
    result = measure_reliability([0.0, 0.0])
    assert result.rows == [(0.5, 0.5, 2)]
    assert (result.expected_calibration_error, result.brier) == (0.0, 0.0)
    assert result.log_loss == pytest.approx(math.log(2))


def test_outcomes_of_the_stated_probabilities_are_calibrated():
    """With doubled margins the same outcomes are not."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 1.5, 20_000))
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-size)), size, -size)
    honest, loud = measure_reliability(margins), measure_reliability(2 * margins)
    assert honest.expected_calibration_error < 0.02 < 0.08 < loud.expected_calibration_error
    assert honest.brier < loud.brier
    assert honest.log_loss < loud.log_loss
    assert sum(row[2] for row in honest.rows) == 20_000
    assert [row[0] for row in honest.rows] == sorted(row[0] for row in honest.rows)


def test_swapping_every_pair_turns_right_into_wrong():
    margins = np.asarray([2.0, -1.0, 0.3, 4.0])
    for (p, share, count), swapped in zip(
        measure_reliability(margins).rows, measure_reliability(-margins).rows, strict=True
    ):
        assert swapped == (p, pytest.approx(1 - share), count)


def test_huge_margins_overflow_nothing():
    result = measure_reliability([1e4, -1e4])
    assert result.rows == [(1.0, 0.5, 2)]
    assert result.log_loss == pytest.approx(5e3)


@pytest.mark.parametrize("margins", [[], [math.nan], [math.inf], [[1.0]]])
def test_margins_that_are_no_finite_row_are_refused(margins):
    with pytest.raises(AssertionError):
        measure_reliability(margins)
