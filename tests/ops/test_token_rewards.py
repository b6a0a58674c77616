"""Token rewards: tags, every kind against hand-worked cases and NumPy loops, calibration."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.errors import UserError
from jaxrm.ops import reward_scaling, token_rewards
from jaxrm.ops.reward_kinds import KINDS, find_kind, names_for, reward_kind
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.ops.vocab import TokenStatistics

TAG_KINDS = ("literal", "signed", "prefix")
TOKEN_KINDS = (*TAG_KINDS, "soft", "margin", "contrast", "edit_aligned")
CENTERED = ("literal", "signed", "prefix", "soft", "edit_aligned")

divergence = jax.jit(token_rewards.divergence)


def apply(calibration, kind, values, mask):
    return _apply(calibration, KINDS[kind], values, mask)


def calibrate(kind, values, mask, **options):
    return _calibrate(KINDS[kind], values, mask, **options)


def update_center(calibration, kind, values, mask, *, momentum):
    return _update_center(calibration, KINDS[kind], values, mask, momentum=momentum)


_apply = jax.jit(reward_scaling.apply, static_argnames="kind")
_calibrate = jax.jit(reward_scaling.calibrate, static_argnames=("kind", "scale", "center"))
_update_center = jax.jit(reward_scaling.update_center, static_argnames=("kind", "momentum"))


@functools.partial(jax.jit, static_argnames="kind")
def values_of(kind, case):
    """A kind's values by its row of the table, from what a reward model says; token 0 is the one that it writes."""
    mask, reading = case["mask"], case.get("scores")
    if KINDS[kind].reads == "prefixes":
        reading = jnp.concatenate([case["prompt_scores"][:, None], case["prefix_scores"]], axis=1)
    if KINDS[kind].reads == "spans":
        reading = case["span_numbers"]
    if KINDS[kind].reads == "alignment":
        reading = case["tags"]
    responses = jnp.zeros(mask.shape, jnp.int32)
    if KINDS[kind].reads == "tokens":
        tags = case.get("tags", mask)
        argmax = jnp.where(tags, 0, 1)
        reading = TokenStatistics(case.get("log_probs"), None, argmax, case.get("max_log_probs"))
    return KINDS[kind].values(reading, responses, mask, case.get("reference_log_probs"))


def random_case(seed=0, B=9, T=11):
    """Responses of 0 to T tokens; the scores have an effect of length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T + 1, B)
    lengths[:3] = 0, 1, T
    mask = np.arange(T) < lengths[:, None]
    max_log_probs = np.log(rng.uniform(0.3, 1.0, (B, T)))
    tags = rng.random((B, T)) < 0.75
    log_probs = np.where(tags, max_log_probs, max_log_probs - rng.exponential(1.0, (B, T)))
    case = {
        "tags": tags & mask,
        "log_probs": log_probs.astype(np.float32),
        "max_log_probs": max_log_probs.astype(np.float32),
        "reference_log_probs": np.log(rng.uniform(0.05, 1.0, (B, T))).astype(np.float32),
        "scores": (rng.normal(size=B) + 0.37 * lengths - 1.5).astype(np.float32),
        "prompt_scores": rng.normal(size=B).astype(np.float32),
        "prefix_scores": rng.normal(size=(B, T)).cumsum(axis=1).astype(np.float32),  # after token t
        "span_numbers": rng.normal(size=(B, T)).astype(np.float32),
    }
    return {name: jnp.asarray(array) for name, array in {**case, "mask": mask}.items()}


def numpy_values(kind, case):
    """The table of kinds, token by token."""
    case = {name: np.asarray(array) for name, array in case.items()}
    B, T = case["mask"].shape
    values = np.zeros((B, T))
    for b in range(B):
        diverged = False
        for t in range(T):
            if not case["mask"][b, t]:
                continue
            plus = case["tags"][b, t]
            diverged = diverged or not plus
            q = float(case["log_probs"][b, t])
            if kind == "literal":
                values[b, t] = 1 if not diverged else 0 if plus else -1
            elif kind in ("signed", "edit_aligned"):
                values[b, t] = 1 if plus else -1
            elif kind == "prefix":
                values[b, t] = -1 if diverged else 1
            elif kind == "soft":
                values[b, t] = min(1, max(-1, 2 * math.exp(q) - 1))
            elif kind == "margin":
                values[b, t] = max(-1, q - float(case["max_log_probs"][b, t]))
            elif kind in ("contrast", "dpo"):
                values[b, t] = min(1, max(-1, q - float(case["reference_log_probs"][b, t])))
            elif kind == "value_difference":
                before = case["prefix_scores"][b, t - 1] if t else case["prompt_scores"][b]
                values[b, t] = float(case["prefix_scores"][b, t]) - float(before)
            elif kind == "spans":
                values[b, t] = float(case["span_numbers"][b, t])
            elif not case["mask"][b, t + 1 :].any():
                values[b, t] = float(case["scores"][b])
    return values


def sums(rewards, mask):
    """Of the responses that have a token."""
    return np.asarray(rewards, np.float64).sum(axis=1)[np.asarray(mask).any(axis=1)]


# --- tags


def test_tags_and_divergence_by_hand():
    responses = jnp.asarray([[5, 6, 7, 2, 0], [5, 6, 7, 8, 9], [4, 6, 2, 0, 0], [0, 0, 0, 0, 0]])
    argmax = jnp.asarray([[5, 6, 8, 2, 0], [5, 6, 7, 8, 9], [5, 5, 2, 0, 0], [0, 0, 0, 0, 0]])
    mask = jnp.asarray([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    tags = jax.jit(token_rewards.token_tags)(responses, argmax, mask)
    # Padding is never tagged +, though its ids agree.
    expected = [[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(tags, np.asarray(expected, bool))
    assert tags.dtype == bool
    where = divergence(tags, mask)
    assert where.tolist() == [2, 5, 0, 0] and where.dtype == jnp.int32


def test_divergence_counts_response_tokens_only():
    """A response that does not start at column 0: padding before it is neither a - tag nor a token."""
    mask = jnp.asarray([[False, False, True, True, True]])
    assert divergence(jnp.asarray([[False, False, True, False, True]]), mask).tolist() == [1]
    assert divergence(jnp.asarray([[False, False, True, True, True]]), mask).tolist() == [3]


def test_divergence_equals_a_numpy_loop():
    case = random_case(1, B=40)
    where = divergence(case["tags"], case["mask"])
    for tags, mask, found in zip(*map(np.asarray, (case["tags"], case["mask"], where)), strict=True):
        tokens = tags[mask].tolist()
        assert found == (tokens.index(False) if False in tokens else len(tokens))


# --- kinds


TAGS = jnp.asarray([[True, True, False, True, False, False]])
MASK = jnp.asarray([[True, True, True, True, True, False]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("literal", [1, 1, -1, 0, -1, 0]),
        ("signed", [1, 1, -1, 1, -1, 0]),
        ("prefix", [1, 1, -1, -1, -1, 0]),
        ("edit_aligned", [1, 1, -1, 1, -1, 0]),
    ],
)
def test_tag_kinds_by_hand(kind, expected):
    values = values_of(kind, {"tags": TAGS, "mask": MASK})
    assert values.tolist() == [expected] and values.dtype == jnp.float32


@pytest.mark.parametrize("kind", TAG_KINDS)
def test_a_response_that_never_diverges_earns_one_a_token(kind):
    assert values_of(kind, {"tags": MASK, "mask": MASK}).tolist() == [[1, 1, 1, 1, 1, 0]]


def test_soft_by_hand():
    probabilities = jnp.asarray([[1.0, 0.85, 0.5, 0.1, 0.0, 0.9]])
    values = values_of("soft", {"log_probs": jnp.log(probabilities), "mask": MASK})
    np.testing.assert_allclose(values, [[1.0, 0.7, 0.0, -0.8, -1.0, 0.0]], atol=1e-6)


def test_margin_by_hand():
    log_probs = jnp.log(jnp.asarray([[0.6, 0.2, 0.3, 0.01, 0.0, 0.5]]))
    max_log_probs = jnp.log(jnp.asarray([[0.6, 0.4, 0.4, 0.9, 0.5, 0.1]]))
    values = values_of("margin", {"log_probs": log_probs, "max_log_probs": max_log_probs, "mask": MASK})
    np.testing.assert_allclose(values, [[0.0, math.log(0.5), math.log(0.75), -1.0, -1.0, 0.0]], atol=1e-6)


def test_margin_is_never_positive_even_by_rounding():
    log_probs = jnp.asarray([[-0.5, -0.25]])
    values = values_of("margin", {"log_probs": log_probs, "max_log_probs": log_probs - 1e-3, "mask": log_probs < 0})
    assert values.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", ["contrast", "dpo"])
def test_a_clipped_log_ratio_by_hand(kind):
    log_probs = jnp.log(jnp.asarray([[0.5, 0.4, 0.9, 0.001, 0.3, 0.5]]))
    reference = jnp.log(jnp.asarray([[0.5, 0.2, 0.1, 0.9, 0.4, 0.1]]))
    values = values_of(kind, {"log_probs": log_probs, "reference_log_probs": reference, "mask": MASK})
    np.testing.assert_allclose(values, [[0.0, math.log(2), 1.0, -1.0, math.log(0.75), 0.0]], atol=1e-6)


def test_a_score_sits_whole_on_the_last_response_token():
    """A fraction stays a fraction, padding gets none of it, and a response of no token loses even a NaN score."""
    mask = jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    scores = jnp.asarray([0.7, -1.25, 2.5, jnp.nan, 0.1])
    values = values_of("scalar", {"scores": scores, "mask": mask})
    expected = [[0, 0, 0.7, 0], [0, 0, 0, -1.25], [2.5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0.1, 0]]
    np.testing.assert_array_equal(values, np.asarray(expected, np.float32))


def test_value_difference_by_hand():
    """What a token adds; the sum over a response is the whole score less that of no response, -0.5."""
    case = {
        "prompt_scores": jnp.asarray([0.5, 1.0]),
        "prefix_scores": jnp.asarray([[0.75, 0.25, 1.0, 0.0, 0.0, 9.0], [jnp.nan] * 6]),
        "mask": jnp.concatenate([MASK, jnp.zeros_like(MASK)]),
    }
    values = values_of("value_difference", case)
    assert values.tolist() == [[0.25, -0.5, 0.75, -1.0, 0.0, 0.0], [0.0] * 6] and values.dtype == jnp.float32
    assert float(values[0].sum()) == -0.5


def test_value_differences_add_up_to_the_whole_score():
    """Less the score of the prompt alone, whatever lies between; a response of no token earns 0."""
    case = random_case(12, B=30)
    values, lengths = np.asarray(values_of("value_difference", case), np.float64), np.asarray(case["mask"]).sum(axis=1)
    prefixes = np.concatenate([case["prompt_scores"][:, None], case["prefix_scores"]], axis=1)
    want = prefixes[np.arange(30), lengths] - prefixes[:, 0]
    np.testing.assert_allclose(values.sum(axis=1), want, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_a_numpy_loop(kind):
    case = random_case(2)
    values = values_of(kind, case)
    assert values.dtype == jnp.float32
    assert not values.weak_type and (values + jnp.zeros((), jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(values, numpy_values(kind, case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*TOKEN_KINDS, "dpo"])
def test_values_of_a_token_lie_between_minus_one_and_one(kind):
    values = values_of(kind, random_case(3, B=50))
    assert float(jnp.abs(values).max()) <= 1.0
    assert float(values.max()) == 0.0 if kind == "margin" else float(values.max()) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_outside_the_mask_changes_nothing(kind):
    """Not even NaN and inf, + tags, or more padding."""
    case = random_case(4)
    values = values_of(kind, case)
    assert (np.asarray(values)[~np.asarray(case["mask"])] == 0).all()
    for poison in (jnp.nan, jnp.inf):
        poisoned = {
            name: jnp.where(case["mask"], x, poison)
            for name, x in case.items()
            if x.dtype == jnp.float32 and x.ndim == 2
        }
        poisoned |= {"tags": case["tags"] | ~case["mask"], "mask": case["mask"]}
        poisoned["prompt_scores"] = case["prompt_scores"]
        poisoned["scores"] = jnp.where(case["mask"].any(axis=1), case["scores"], poison)
        np.testing.assert_array_equal(values_of(kind, poisoned), values)
    wide = {name: jnp.pad(x, ((0, 2), (0, 3))[: x.ndim]) for name, x in case.items()}
    np.testing.assert_array_equal(values_of(kind, wide)[:9, :11], values)
    assert not values_of(kind, wide)[9:].any() and not values_of(kind, wide)[:, 11:].any()


@pytest.mark.parametrize("kind", [*TOKEN_KINDS, "value_difference", "dpo"])
def test_what_comes_later_changes_no_earlier_value(kind):
    case = random_case(5)
    changed = {
        name: x.at[:, 6:].set(~x[:, 6:] if x.dtype == bool else x[:, 6:] - 0.5)
        for name, x in case.items()
        if x.ndim == 2 and name != "mask"
    }
    changed["tags"] &= case["mask"]
    before, after = values_of(kind, case), values_of(kind, {**case, **changed})
    np.testing.assert_array_equal(before[:, :6], after[:, :6])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_log_probs_and_scores_give_float32_values(kind):
    case = {name: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for name, x in random_case(6).items()}
    values = values_of(kind, case)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, numpy_values(kind, case), rtol=1e-5, atol=1e-6)


# --- scale and centre


def calibration_of(scale, center, slope=0.0, intercept=0.0):
    return Calibration(*(jnp.float32(x) for x in (scale, center, slope, intercept)))


def test_the_uncalibrated_reward_is_the_value():
    for kind in KINDS:
        case = random_case(7)
        values = values_of(kind, case)
        np.testing.assert_array_equal(apply(reward_scaling.uncalibrated(), kind, values, case["mask"]), values)


def test_rewards_by_hand():
    mask = jnp.asarray([[True, True, False], [True, True, True]])
    values = jnp.asarray([[1.0, -1.0, 9.0], [0.5, 0.0, 0.25]])
    calibration = calibration_of(2.0, 0.25, slope=0.5, intercept=-1.0)
    for kind in CENTERED:
        rewards = apply(calibration, kind, values, mask)
        np.testing.assert_allclose(rewards, [[1.5, -2.5, 0.0], [0.5, -0.5, 0.0]])
    for kind in ("margin", "contrast", "scalar"):
        rewards = apply(calibration, kind, values, mask)
        np.testing.assert_allclose(rewards, [[2.0, -2.0, 0.0], [1.0, 0.0, 0.5]])
    scores = values_of("scalar", {"scores": jnp.asarray([0.7, -0.2]), "mask": mask})
    # Expected of 2 and 3 tokens on the line: 0.5 * 2 - 1 = 0 and 0.5 * 3 - 1 = 0.5.
    rewards = apply(calibration, "scalar_length_residual", scores, mask)
    np.testing.assert_allclose(rewards, [[0.0, 1.4, 0.0], [0.0, 0.0, -1.4]], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_equal_a_numpy_loop(kind):
    case = random_case(8)
    values, mask = np.asarray(values_of(kind, case)), np.asarray(case["mask"])
    rewards = apply(calibration_of(1.75, 0.3, slope=0.2, intercept=-0.6), kind, values, case["mask"])
    for b, t in np.ndindex(*mask.shape):
        u = float(values[b, t])
        if kind in CENTERED:
            u -= 0.3
        if kind == "scalar_length_residual" and not mask[b, t + 1 :].any():
            u -= 0.2 * mask[b].sum() - 0.6
        assert float(rewards[b, t]) == pytest.approx(1.75 * u if mask[b, t] else 0.0, abs=1e-5), (b, t)


def test_calibration_by_hand():
    mask = jnp.asarray([[True, True, False], [True, True, True]])
    values = values_of("signed", {"tags": jnp.asarray([[True, False, False], [True, True, True]]), "mask": mask})
    # Mean tag: (1 - 1 + 1 + 1 + 1) / 5 = 0.6. Centred sums: 0 - 1.2 and 3 - 1.8, both 1.2 from their mean 0.
    found = calibrate("signed", values, mask, scale="unit", center="fixed")
    assert float(found.center) == pytest.approx(0.6) and float(found.scale) == pytest.approx(1 / 1.2)
    # Without a centre the sums are 0 and 3.
    found = calibrate("signed", values, mask, scale="unit", center="none")
    assert float(found.center) == 0.0 and float(found.scale) == pytest.approx(1 / 1.5)
    found = calibrate("signed", values, mask, scale=0.25, center="running")
    assert float(found.center) == pytest.approx(0.6) and float(found.scale) == 0.25


@pytest.mark.parametrize("center", ["running", "fixed", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_sums_have_unit_standard_deviation(kind, center):
    case = random_case(9, B=64)
    values = values_of(kind, case)
    calibration = calibrate(kind, values, case["mask"], scale="unit", center=center)
    assert not any(x.weak_type for x in jax.tree.leaves(calibration))
    rewards = apply(calibration, kind, values, case["mask"])
    assert sums(values, case["mask"]).std() != pytest.approx(1.0, abs=0.02)
    assert sums(rewards, case["mask"]).std() == pytest.approx(1.0, abs=1e-4)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in jax.tree.leaves(calibration))
    assert len(jax.tree.leaves(calibration)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_only_tags_and_soft_values_are_centered(kind):
    case = random_case(10, B=32)
    values, mask = values_of(kind, case), case["mask"]
    center = float(calibrate(kind, values, mask, scale="unit", center="fixed").center)
    assert center == pytest.approx(np.asarray(values)[np.asarray(mask)].mean() if kind in CENTERED else 0.0, abs=1e-6)


@pytest.mark.parametrize("kind", CENTERED)
def test_a_centered_reward_does_not_pay_for_length_on_average(kind):
    case = random_case(11, B=64)
    values, mask = values_of(kind, case), case["mask"]
    assert abs(float(values.sum())) > 10
    rewards = apply(calibrate(kind, values, mask, scale="unit", center="fixed"), kind, values, mask)
    assert float(rewards.sum()) == pytest.approx(0.0, abs=1e-3)


def test_the_linear_effect_of_length_is_really_taken_out():
    case = random_case(12, B=64)
    values, mask = values_of("scalar_length_residual", case), case["mask"]
    counted = np.asarray(mask).any(axis=1)
    lengths, scores = np.asarray(mask).sum(axis=1)[counted], np.asarray(case["scores"])[counted]
    assert np.corrcoef(scores, lengths)[0, 1] > 0.5
    calibration = calibrate("scalar_length_residual", values, mask, scale="unit", center="running")
    slope, intercept = np.polyfit(lengths, scores, 1)
    assert float(calibration.length_slope) == pytest.approx(slope, abs=1e-5)
    assert float(calibration.length_intercept) == pytest.approx(intercept, abs=1e-4)
    rewards = sums(apply(calibration, "scalar_length_residual", values, mask), mask)
    assert abs(np.corrcoef(rewards, lengths)[0, 1]) < 1e-5
    assert rewards.mean() == pytest.approx(0.0, abs=1e-5)
    # What is not linear in length stays: the residuals are those of NumPy's line, scaled.
    residuals = scores - (slope * lengths + intercept)
    np.testing.assert_allclose(rewards, residuals / residuals.std(), atol=1e-4)


def test_the_scalar_kind_keeps_the_effect_of_length():
    case = random_case(12, B=64)
    calibration = calibrate("scalar", values_of("scalar", case), case["mask"], scale="unit", center="running")
    assert float(calibration.length_slope) == float(calibration.length_intercept) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_columns_of_padding_change_no_calibration(kind):
    """Nor do NaN and inf in them."""
    case = random_case(13)
    values, mask = values_of(kind, case), case["mask"]
    expected = calibrate(kind, values, mask, scale="unit", center="fixed")
    wide_mask = jnp.pad(mask, ((0, 5), (0, 4)))
    for poison in (0.0, jnp.nan, jnp.inf):
        wide = jnp.where(wide_mask, jnp.pad(values, ((0, 5), (0, 4))), poison)
        found = calibrate(kind, wide, wide_mask, scale="unit", center="fixed")
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        assert jnp.isfinite(apply(expected, kind, wide, wide_mask)).all()
        moved = update_center(expected, kind, wide, wide_mask, momentum=0.5)
        assert float(moved.center) == pytest.approx(
            float(update_center(expected, kind, values, mask, momentum=0.5).center)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_are_all_the_same_are_not_blown_up(kind):
    """Rounding alone differs between them: 0.1 is no float32, and 7 of them add up in several ways."""
    mask = jnp.ones((6, 7), bool)
    values = (
        jnp.full((6, 7), 0.1)
        if not kind.startswith("scalar")
        else values_of("scalar", {"scores": jnp.full(6, 0.1), "mask": mask})
    )
    for center in ("fixed", "none"):
        calibration = calibrate(kind, values, mask, scale="unit", center=center)
        assert float(calibration.scale) == 1.0
        assert float(calibration.length_slope) == 0.0
        assert np.abs(apply(calibration, kind, values, mask)).max() < 0.11


def test_scores_on_a_straight_line_leave_no_residual_to_blow_up():
    mask = jnp.asarray(np.arange(9) < np.arange(1, 10)[:, None])
    values = values_of("scalar", {"scores": jnp.asarray(0.3 * np.arange(1, 10) + 0.7, jnp.float32), "mask": mask})
    calibration = calibrate("scalar_length_residual", values, mask, scale="unit", center="none")
    assert float(calibration.scale) == 1.0
    assert float(calibration.length_slope) == pytest.approx(0.3, abs=1e-5)
    assert np.abs(apply(calibration, "scalar_length_residual", values, mask)).max() < 1e-5


def test_small_differences_between_large_scores_still_count():
    mask = jnp.ones((4, 3), bool)
    values = values_of("scalar", {"scores": jnp.asarray([20.0, 20.01, 20.02, 20.03]), "mask": mask})
    calibration = calibrate("scalar", values, mask, scale="unit", center="none")
    assert float(calibration.scale) == pytest.approx(1 / np.std([0.0, 0.01, 0.02, 0.03]), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_one_response_or_none_is_a_calibration(kind):
    one = random_case(14)
    one = {name: x[2:3] for name, x in one.items()}
    for mask in (one["mask"], jnp.zeros_like(one["mask"])):
        values = values_of(kind, {**one, "mask": mask, "tags": one["tags"] & mask})
        calibration = calibrate(kind, values, mask, scale="unit", center="fixed")
        assert float(calibration.scale) == 1.0
        assert all(jnp.isfinite(x) for x in jax.tree.leaves(calibration))
    assert [float(x) for x in jax.tree.leaves(calibration)] == [1.0, 0.0, 0.0, 0.0]
    rewards = apply(calibration, kind, values, mask)
    assert not rewards.any()


@pytest.mark.parametrize("kind", ["signed", "scalar_length_residual"])
def test_a_sick_value_is_seen_in_the_calibration(kind):
    mask = jnp.ones((4, 3), bool)
    calibration = calibrate(kind, jnp.ones((4, 3)).at[1, 2].set(jnp.nan), mask, scale="unit", center="fixed")
    assert bool(jnp.isnan(calibration.scale))


def test_a_running_center_moves_by_its_momentum():
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    values = jnp.asarray([[1.0, -1.0, jnp.nan], [0.75, jnp.inf, 5.0]])
    calibration = calibration_of(3.0, 0.5)
    # Mean of 1, -1 and 0.75: 0.25. 0.9 * 0.5 + 0.1 * 0.25 = 0.475.
    for kind in CENTERED:
        moved = update_center(calibration, kind, values, mask, momentum=0.9)
        assert float(moved.center) == pytest.approx(0.475) and float(moved.scale) == 3.0
    for kind in set(KINDS) - set(CENTERED):
        assert float(update_center(calibration, kind, values, mask, momentum=0.9).center) == 0.5


def test_a_running_center_nears_the_mean_and_skips_empty_batches():
    case = random_case(15)
    values, mask = values_of("soft", case), case["mask"]
    calibration = reward_scaling.uncalibrated()
    for _ in range(60):
        calibration = update_center(calibration, "soft", values, mask, momentum=0.8)
    assert float(calibration.center) == pytest.approx(np.asarray(values)[np.asarray(mask)].mean(), abs=1e-4)
    same = update_center(calibration, "soft", jnp.full_like(values, jnp.nan), jnp.zeros_like(mask), momentum=0.8)
    assert float(same.center) == float(calibration.center)


# --- jit and refusals


@pytest.mark.parametrize("kind", KINDS)
def test_jit_agrees(kind):
    """NaN in the padding too: a compiler may turn a product with the mask into the choice that it must be."""
    case = random_case(16, B=4, T=5)
    mask = case["mask"]
    poisoned = {
        name: jnp.where(mask, x, jnp.nan) if x.dtype == jnp.float32 and x.ndim == 2 else x for name, x in case.items()
    }
    jitted = values_of(kind, case)
    with jax.disable_jit():
        np.testing.assert_allclose(values_of(kind, poisoned), jitted, rtol=1e-6)
        values = jnp.where(mask, jitted, jnp.nan)
        calibration = reward_scaling.calibrate(KINDS[kind], values, mask, scale="unit", center="running")
        rewards = reward_scaling.apply(calibration, KINDS[kind], values, mask)
        moved = reward_scaling.update_center(calibration, KINDS[kind], values, mask, momentum=0.5)
        where = token_rewards.divergence(case["tags"], mask)
    compiled = calibrate(kind, jitted, mask, scale="unit", center="running")
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(calibration), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(calibration, kind, jitted, mask), rewards, rtol=1e-5, atol=1e-6)
    center = update_center(calibration, kind, jitted, mask, momentum=0.5).center
    assert float(center) == pytest.approx(float(moved.center), abs=1e-6)
    np.testing.assert_array_equal(divergence(case["tags"], mask), where)


def test_arrays_of_another_type_or_shape_are_refused():
    case = random_case(17)
    tags, mask, log_probs = case["tags"], case["mask"], case["log_probs"]
    for wrong in (
        lambda: token_rewards.literal(tags.astype(jnp.float32), mask),
        lambda: token_rewards.signed(tags, mask.astype(jnp.int32)),
        lambda: token_rewards.prefix(tags[:, 1:], mask),
        lambda: token_rewards.soft(tags, mask),
        lambda: token_rewards.soft(log_probs[0], mask[0]),
        lambda: token_rewards.margin(log_probs, log_probs[:2], mask),
        lambda: token_rewards.scalar(log_probs, mask),
        lambda: token_rewards.scalar(jnp.ones(9, jnp.int32), mask),
        lambda: token_rewards.token_tags(log_probs, log_probs, mask),
        lambda: reward_scaling.apply(
            reward_scaling.uncalibrated(), KINDS["literal"], jnp.ones((9, 11), jnp.int32), mask
        ),
        lambda: reward_scaling.calibrate(KINDS["soft"], log_probs, mask, scale=0.0, center="none"),
        lambda: reward_scaling.calibrate(KINDS["soft"], log_probs, mask, scale="unit", center="median"),
    ):
        with pytest.raises(AssertionError):
            wrong()


# --- the table


def test_kinds_belong_to_one_of_two_sorts_of_reward_model():
    assert names_for("seq2seq") == TOKEN_KINDS
    assert names_for("scalar") == ("scalar", "scalar_length_residual", "value_difference")
    assert names_for("text") == ("spans",)
    assert names_for("scalar", "response") == ("scalar", "scalar_length_residual")  # a function's too
    assert [name for name, kind in KINDS.items() if kind.needs_reference] == ["contrast", "dpo"]
    assert [find_kind(name).name for name in KINDS] == list(KINDS)
    with pytest.raises(UserError, match=r"config.reward.kind is 'literally'; it must be one of literal, .*=literal$"):
        find_kind("literally")


@pytest.fixture
def my_kinds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_kinds.py").write_text(
        """from jaxrm.ops.reward_kinds import reward_kind

@reward_kind(is_centered=True)
def agreement(statistics, responses, mask):
    return responses == statistics.argmax

@reward_kind(is_centered=False)
def doubt(statistics, responses, mask):
    return statistics.log_probs - statistics.max_log_prob

@reward_kind(is_centered=False)
def total(statistics, responses, mask):
    return statistics.log_probs.sum(axis=1)

def silent(statistics, responses, mask):
    return statistics.log_probs
"""
    )
    yield
    sys.modules.pop("my_kinds", None)


def test_a_users_kind_says_itself_whether_it_is_centered(my_kinds):
    """By hand: agreement on tokens 1 and 3 of 3; the mean, 2/3, is taken off that kind alone."""
    mask = jnp.asarray([[True, True, True, False]])
    responses, argmax = jnp.asarray([[4, 5, 6, 0]]), jnp.asarray([[4, 9, 6, 0]])
    log_probs = jnp.asarray([[-0.5, -2.0, -1.0, jnp.nan]])
    reading = TokenStatistics(log_probs, None, argmax, jnp.asarray([[-0.5, -0.25, -1.0, jnp.nan]]))
    rewards = {}
    for name in ("my_kinds:agreement", "my_kinds:doubt"):
        kind = find_kind(name)
        assert (kind.name, kind.needs, kind.needs_reference) == (name, "seq2seq", False)
        values = kind.values(reading, responses, mask, None)
        calibration = reward_scaling.calibrate(kind, values, mask, scale=1.0, center="fixed")
        rewards[name] = reward_scaling.apply(calibration, kind, values, mask)
        assert values.dtype == rewards[name].dtype == jnp.float32
    np.testing.assert_allclose(rewards["my_kinds:agreement"], [[1 / 3, -2 / 3, 1 / 3, 0]], rtol=1e-6)
    np.testing.assert_allclose(rewards["my_kinds:doubt"], [[0, -1.75, 0, 0]])


def test_a_users_kind_that_cannot_be_used_is_refused(my_kinds):
    line = r"write @jaxrm.reward_kind\(is_centered=True\) on the line above it, or False"
    with pytest.raises(
        UserError, match=rf"^config.reward.kind is 'my_kinds:silent', a function that does not .*{line}"
    ):
        find_kind("my_kinds:silent")
    with pytest.raises(UserError, match=r"importing it raised AttributeError: .*'none'"):
        find_kind("my_kinds:none")
    mask = jnp.ones((1, 2), bool)
    reading = TokenStatistics(jnp.zeros((1, 2)), None, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2)))
    with pytest.raises(UserError, match=r"whose function returned \(1,\); required .* an array of shape \(1, 2\)"):
        find_kind("my_kinds:total").values(reading, jnp.zeros((1, 2), jnp.int32), mask, None)


def test_the_mark_leaves_the_function_as_it_is():
    @reward_kind(is_centered=True)
    def own(statistics, responses, mask):
        return mask

    assert own(None, None, 3) == 3 and own.is_centered is True
