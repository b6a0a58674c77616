"""Next-token targets and losses against hand-worked cases, NumPy loops and optax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrm.ops.losses import (
    aggregate,
    bradley_terry_loss,
    clipped_policy_loss,
    clipped_value_loss,
    dpo_loss,
    next_token_targets,
)
from jaxrm.ops.masking import masked_mean

bradley_terry = jax.jit(bradley_terry_loss)
policy_loss = jax.jit(clipped_policy_loss)
value_loss = jax.jit(clipped_value_loss)


def packed_case(seed=0, B=6, T=12):
    """Rows of packed segments, some of them full, with a mask that also holds where it must not count."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, (B, T)).astype(np.int32)
    segments = np.zeros((B, T), np.int32)
    for row in range(B):
        start = 0
        for segment, length in enumerate(rng.integers(1, 6, 3), 1):
            segments[row, start : start + length] = segment
            start += length
    segments[0] = 1
    return tokens, segments, rng.random((B, T)) < 0.7


def test_targets_by_hand():
    tokens = jnp.asarray([[5, 6, 7, 8, 9, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    loss_mask = jnp.asarray([[False, False, True, True, True, True]])
    targets, mask = next_token_targets(tokens, segments, loss_mask)
    # 6 predicts 7 and 8 predicts 9; 7 does not predict 8, which opens the next example, and 9 predicts no padding
    assert mask.tolist() == [[False, True, False, True, False, False]]
    assert targets[mask].tolist() == [7, 9]


def test_targets_equal_a_numpy_loop():
    tokens, segments, loss_mask = packed_case()
    targets, mask = next_token_targets(*map(jnp.asarray, (tokens, segments, loss_mask)))
    for row in range(tokens.shape[0]):
        for t in range(tokens.shape[1]):
            last = t + 1 == tokens.shape[1]
            counts = not last and segments[row, t] == segments[row, t + 1] != 0 and loss_mask[row, t + 1]
            assert bool(mask[row, t]) == counts, (row, t)
            if not last:
                assert int(targets[row, t]) == tokens[row, t + 1]


def test_trained_tokens_are_targets_once_but_the_first_never():
    """The first token of a segment has nothing before it that could predict it."""
    tokens, segments, loss_mask = packed_case(1)
    first = np.diff(segments, axis=1, prepend=-1) != 0
    _, mask = next_token_targets(*map(jnp.asarray, (tokens, segments, loss_mask)))
    assert int(mask.sum()) == int((loss_mask & ~first & (segments > 0)).sum())


def test_the_last_position_never_wraps_round_to_the_first_token():
    tokens, segments = jnp.asarray([[1, 2, 3]]), jnp.ones((1, 3), jnp.int32)
    _, mask = next_token_targets(tokens, segments, jnp.ones((1, 3), bool))
    assert mask.tolist() == [[True, True, False]]


def test_padding_changes_nothing():
    tokens, segments, loss_mask = map(jnp.asarray, packed_case(2))
    targets, mask = next_token_targets(tokens, segments, loss_mask)
    wide = [
        jnp.pad(x, ((0, 0), (0, 4)), constant_values=fill) for x, fill in ((tokens, 9), (segments, 0), (loss_mask, 1))
    ]
    wide_targets, wide_mask = next_token_targets(*wide)
    np.testing.assert_array_equal(wide_mask[:, :12], mask)
    assert not wide_mask[:, 12:].any()
    np.testing.assert_array_equal(wide_targets[:, :11], targets[:, :11])


def test_jit_agrees():
    case = [jnp.asarray(x) for x in packed_case(3)]
    for a, b in zip(jax.jit(next_token_targets)(*case), next_token_targets(*case), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mask_of_numbers_or_of_another_shape_is_refused():
    tokens, segments, loss_mask = (jnp.asarray(x) for x in packed_case())
    with pytest.raises(AssertionError):
        next_token_targets(tokens, segments, loss_mask.astype(jnp.int32))
    with pytest.raises(AssertionError):
        next_token_targets(tokens, segments[:, :-1], loss_mask)


# --- Bradley-Terry


def pair_rewards(seed=0, shape=(5, 7)):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, shape).astype(np.float32), rng.normal(0, 3, shape).astype(np.float32)


def test_bradley_terry_by_hand():
    chosen, rejected = jnp.asarray([0.7, 0.0, math.log(3)]), jnp.asarray([0.7, math.log(4), 0.0])
    # sigma(0) = 1/2, sigma(-log 4) = 1/5 and sigma(log 3) = 3/4.
    np.testing.assert_allclose(bradley_terry(chosen, rejected), np.log([2, 5, 4 / 3]), rtol=1e-6)
    # A margin of log 3 is met exactly by the last pair.
    with_margin = bradley_terry(chosen, rejected, margin=math.log(3))
    np.testing.assert_allclose(with_margin, np.log([4, 13, 2]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (6,), (3, 4), (2, 0)])
@pytest.mark.parametrize("margin", [0.0, 0.75])
def test_bradley_terry_equals_a_numpy_loop(shape, margin):
    chosen, rejected = pair_rewards(1, shape) if shape else (np.float32(0.3), np.float32(-0.4))
    loss = bradley_terry(jnp.asarray(chosen), jnp.asarray(rejected), margin=margin)
    assert loss.shape == shape and loss.dtype == jnp.float32
    for at in np.ndindex(*shape):
        difference = float(chosen[at]) - float(rejected[at]) - margin
        assert float(loss[at]) == pytest.approx(math.log1p(math.exp(-difference)), rel=1e-5)


def test_bradley_terry_is_optaxs_binary_cross_entropy():
    """The logit is the difference of rewards and the label one."""
    chosen, rejected = map(jnp.asarray, pair_rewards(2))

    def ours(chosen, rejected):
        return bradley_terry_loss(chosen, rejected, margin=0.5).sum()

    def theirs(chosen, rejected):
        logits = chosen - rejected - 0.5
        return optax.sigmoid_binary_cross_entropy(logits, jnp.ones_like(logits)).sum()

    for argument in (0, 1):
        mine = jax.jit(jax.value_and_grad(ours, argument))(chosen, rejected)
        published = jax.jit(jax.value_and_grad(theirs, argument))(chosen, rejected)
        np.testing.assert_allclose(mine[0], published[0], rtol=1e-5)
        np.testing.assert_allclose(mine[1], published[1], rtol=1e-5, atol=1e-7)


def test_bradley_terry_depends_on_the_difference_alone():
    chosen, rejected = map(jnp.asarray, pair_rewards(3))
    moved = bradley_terry(chosen + 4, rejected + 4)
    np.testing.assert_allclose(moved, bradley_terry(chosen, rejected), rtol=1e-4, atol=1e-6)


def test_bradley_terry_takes_a_margin_for_each_pair():
    chosen, rejected = map(jnp.asarray, pair_rewards(4))
    margins = jnp.asarray(np.random.default_rng(5).random((5, 7)), jnp.float32)
    loss = bradley_terry(chosen, rejected, margin=margins)
    for at in ((0, 0), (4, 6)):
        alone = bradley_terry(chosen[at], rejected[at], margin=float(margins[at]))
        assert float(loss[at]) == pytest.approx(float(alone), rel=1e-5)


def test_bradley_terry_of_rewards_far_apart_stays_finite():
    chosen, rejected = jnp.asarray([500.0, -500.0, 1e30]), jnp.asarray([-500.0, 500.0, -1e30])
    loss, gradient = jax.jit(jax.value_and_grad(lambda c: bradley_terry_loss(c, rejected).sum()))(chosen)
    np.testing.assert_allclose(bradley_terry(chosen, rejected), [0.0, 1000.0, 0.0])
    assert float(loss) == 1000.0
    np.testing.assert_allclose(gradient, [0.0, -1.0, 0.0])


def test_bradley_terry_of_half_precision_rewards_is_float32():
    chosen, rejected = jnp.asarray([100.0], jnp.bfloat16), jnp.asarray([99.5], jnp.bfloat16)
    loss = bradley_terry(chosen, rejected, margin=0.001)
    # In bfloat16 the margin would vanish beside 100.
    assert loss.dtype == jnp.float32
    assert float(loss[0]) == pytest.approx(math.log1p(math.exp(-0.499)), rel=1e-5)


def test_bradley_terry_jit_agrees():
    chosen, rejected = map(jnp.asarray, pair_rewards(6))
    eager = bradley_terry_loss(chosen, rejected, margin=0.3)
    np.testing.assert_allclose(bradley_terry(chosen, rejected, margin=0.3), eager, rtol=1e-6)


def test_bradley_terry_refuses_unlike_shapes_and_whole_numbers():
    with pytest.raises(AssertionError):
        bradley_terry_loss(jnp.ones(3), jnp.ones(4))
    with pytest.raises(AssertionError):
        bradley_terry_loss(jnp.ones(3, jnp.int32), jnp.ones(3, jnp.int32))


# --- the clipped policy loss


def policy_case(seed=0, shape=(5, 8)):
    """Log-probs, old ones about a fifth away, and fractional advantages of both signs."""
    rng = np.random.default_rng(seed)
    old = np.log(rng.uniform(0.05, 1.0, shape))
    arrays = old + rng.normal(0, 0.25, shape), old, rng.normal(0, 0.7, shape)
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_the_policy_loss_by_hand():
    """Ratios 1.5, 1.1, 0.5 with an advantage and with a disadvantage."""
    ratio = jnp.asarray([1.5, 1.1, 0.5, 1.5, 1.1, 0.5])
    advantages = jnp.asarray([0.5, 0.5, 0.5, -0.5, -0.5, -0.5])
    old = jnp.full((6,), math.log(0.3))
    got = policy_loss(old + jnp.log(ratio), old, advantages, clip=0.2)
    # A good token helps up to 1.2, a bad one down to 0.8; what has gone the wrong way counts in full.
    np.testing.assert_allclose(got.loss, [-0.6, -0.55, -0.25, 0.75, 0.55, 0.4], rtol=1e-5)
    np.testing.assert_allclose(got.ratio, ratio, rtol=1e-5)
    assert got.is_clipped.tolist() == [True, False, False, False, False, True]


def test_the_policy_loss_equals_a_numpy_loop():
    log_probs, old, advantages = policy_case(1)
    got = policy_loss(log_probs, old, advantages, clip=0.2)
    assert {x.shape for x in got} == {(5, 8)}
    assert got.loss.dtype == got.ratio.dtype == jnp.float32 and got.is_clipped.dtype == bool
    for at in np.ndindex(5, 8):
        ratio, a = math.exp(float(log_probs[at]) - float(old[at])), float(advantages[at])
        whole, clipped = ratio * a, min(max(ratio, 0.8), 1.2) * a
        assert float(got.loss[at]) == pytest.approx(-min(whole, clipped), abs=1e-5), at
        assert bool(got.is_clipped[at]) == (clipped < whole), at
    assert 0 < int(got.is_clipped.sum()) < 40


def test_clipped_tokens_have_no_gradient():
    """The others have minus ratio times advantage."""
    log_probs, old, advantages = policy_case(2)
    result = policy_loss(log_probs, old, advantages, clip=0.2)
    gradient = jax.jit(jax.grad(lambda x: clipped_policy_loss(x, old, advantages, clip=0.2).loss.sum()))(log_probs)
    want = np.where(result.is_clipped, 0.0, -np.exp(np.asarray(log_probs) - np.asarray(old)) * np.asarray(advantages))
    np.testing.assert_allclose(gradient, want, atol=1e-5)


def test_before_the_first_update_nothing_is_clipped():
    """The ratio is one."""
    log_probs, _, advantages = policy_case(3)
    got = policy_loss(log_probs, log_probs, advantages, clip=0.2)
    assert (got.ratio == 1).all() and not got.is_clipped.any()
    np.testing.assert_array_equal(got.loss, -advantages)


def test_old_log_probs_and_advantages_get_no_gradient():
    log_probs, old, advantages = policy_case(4)
    gradients = jax.jit(jax.grad(lambda *x: clipped_policy_loss(*x, clip=0.2).loss.sum(), (0, 1, 2)))(
        log_probs, old, advantages
    )
    assert (gradients[0] != 0).any()
    assert (gradients[1] == 0).all() and (gradients[2] == 0).all()


def test_a_clipped_ratio_that_overflows_gives_no_nan():
    """A log-ratio of 200 is inf as a ratio; clipped, it has a loss of 1.2 A and a gradient of 0."""
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda x: clipped_policy_loss(x, jnp.asarray([-201.0]), jnp.ones(1), clip=0.2).loss.sum())
    )(jnp.asarray([-1.0]))
    assert float(loss) == pytest.approx(-1.2)
    assert gradient.tolist() == [0.0]


def test_masked_means_of_both_losses_ignore_padding_even_nan():
    mask = jnp.asarray(np.random.default_rng(5).random((5, 8)) < 0.7)
    for loss, case in ((policy_loss, policy_case(5)), (value_loss, value_case(5))):
        clean = loss(*case, clip=0.2)
        dirty = loss(*(jnp.where(mask, x, jnp.nan) for x in case), clip=0.2)
        assert float(masked_mean(dirty.loss, mask)) == float(masked_mean(clean.loss, mask))
        np.testing.assert_array_equal(dirty.is_clipped & mask, clean.is_clipped & mask)
        assert not (dirty.is_clipped & ~mask).any()


def test_padding_of_zeros_has_no_gradient_in_either_loss():
    """As a rollout holds it: what is known beforehand is 0, what the model says there is anything finite."""
    mask = jnp.asarray(np.random.default_rng(6).random((5, 8)) < 0.7)
    for loss, case in ((clipped_policy_loss, policy_case(6)), (clipped_value_loss, value_case(6))):
        known = [jnp.where(mask, x, 0.0) for x in case[1:]]
        mean = jax.jit(jax.grad(lambda x, loss=loss, known=known: masked_mean(loss(x, *known, clip=0.2).loss, mask)))
        gradient = mean(jnp.where(mask, case[0], -80.0))
        np.testing.assert_array_equal(gradient, jnp.where(mask, mean(case[0]), 0.0))
        assert (gradient != 0).any() and jnp.isfinite(gradient).all()


def test_the_policy_loss_is_float32_and_jit_agrees():
    log_probs, old, advantages = policy_case(7)
    halves = [x.astype(jnp.bfloat16) for x in (log_probs, old, advantages)]
    assert policy_loss(*halves, clip=0.2).loss.dtype == jnp.float32
    eager = clipped_policy_loss(log_probs, old, advantages, clip=0.2)
    for a, b in zip(policy_loss(log_probs, old, advantages, clip=0.2), eager, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


# --- the clipped value loss


def value_case(seed=0, shape=(5, 8)):
    """Values, old ones about a fifth away, and returns."""
    rng = np.random.default_rng(seed)
    old = rng.normal(0, 0.6, shape)
    arrays = old + rng.normal(0, 0.25, shape), old, rng.normal(0, 0.8, shape)
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_the_value_loss_by_hand():
    values, old = jnp.asarray([0.75, 0.25, -0.5, 0.5]), jnp.asarray([0.25, 0.25, 0.25, 0.25])
    returns = jnp.asarray([1.25, 1.25, 1.25, 0.25])
    got = value_loss(values, old, returns, clip=0.125)
    # 0.75 counts as 0.375; 0.25 has not moved; -0.5 went the wrong way; 0.5 went past a return that the old value met
    np.testing.assert_allclose(got.loss, [0.875**2 / 2, 0.5, 1.75**2 / 2, 0.25**2 / 2], rtol=1e-6)
    assert got.is_clipped.tolist() == [True, False, False, False]


def test_the_value_loss_equals_a_numpy_loop():
    values, old, returns = value_case(1)
    got = value_loss(values, old, returns, clip=0.2)
    assert got.loss.shape == (5, 8) and got.loss.dtype == jnp.float32 and got.is_clipped.dtype == bool
    for at in np.ndindex(5, 8):
        v, o, g = float(values[at]), float(old[at]), float(returns[at])
        whole, clipped = (v - g) ** 2, (min(max(v, o - 0.2), o + 0.2) - g) ** 2
        assert float(got.loss[at]) == pytest.approx(max(whole, clipped) / 2, abs=1e-5), at
        assert bool(got.is_clipped[at]) == (abs(v - o) > 0.2 and clipped > whole), at
    assert 0 < int(got.is_clipped.sum()) < 40


def test_clipped_values_have_no_gradient_the_others_their_error():
    values, old, returns = value_case(2)
    is_clipped = value_loss(values, old, returns, clip=0.2).is_clipped
    gradients = jax.jit(jax.grad(lambda *x: clipped_value_loss(*x, clip=0.2).loss.sum(), (0, 1, 2)))(
        values, old, returns
    )
    np.testing.assert_allclose(gradients[0], jnp.where(is_clipped, 0.0, values - returns), atol=1e-6)
    assert (gradients[1] == 0).all() and (gradients[2] == 0).all()


def test_an_unreached_value_clip_leaves_half_the_squared_error():
    values, old, returns = value_case(3)
    got = value_loss(values, old, returns, clip=50.0)
    np.testing.assert_allclose(got.loss, 0.5 * (values - returns) ** 2, atol=1e-6)
    assert not got.is_clipped.any()


def test_the_value_loss_is_float32_and_jit_agrees():
    case = value_case(4)
    assert value_loss(*(x.astype(jnp.bfloat16) for x in case), clip=0.2).loss.dtype == jnp.float32
    for a, b in zip(value_loss(*case, clip=0.2), clipped_value_loss(*case, clip=0.2), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_the_clipped_losses_refuse_unlike_shapes_and_integers(loss):
    with pytest.raises(AssertionError):
        loss(jnp.ones(3), jnp.ones(4), jnp.ones(3), clip=0.2)
    with pytest.raises(AssertionError):
        loss(jnp.ones(3), jnp.ones(3), jnp.ones(3, jnp.int32), clip=0.2)


# --- direct preference optimization

dpo = jax.jit(dpo_loss, static_argnames=("beta", "label_smoothing", "kind"))
CHOSEN = jnp.asarray([0.0, 3.2, -7.5, 0.4, 41.0], jnp.float32)  # log-ratios of responses
REJECTED = jnp.asarray([0.0, -1.1, 2.25, 0.9, -63.0], jnp.float32)
TRL = {  # float32, beta 0.1, label smoothing 0.2
    "sigmoid": [0.6931471824645996, 0.5010837316513062, 1.2950469255447388, 0.7184596657752991, 3.043200194952078e-05],
    "smoothed": [0.6931471824645996, 0.5870837569236755, 1.100046992301941, 0.708459734916687, 2.080030679702759],
    "ipo": [25.0, 13.322500228881836, 39.48027801513672, 24.290813446044922, 0.4011109471321106],
}


def test_dpo_by_hand():
    # beta h is 0, log 3 and -log 4: sigma is 1/2, 3/4 and 1/5.
    chosen, rejected = jnp.asarray([2.0, 0.0, -math.log(16)]), jnp.asarray([2.0, -2 * math.log(3), 0.0])
    np.testing.assert_allclose(dpo(chosen, rejected, beta=0.5), np.log([2, 4 / 3, 5]), rtol=1e-6)
    smoothed = 0.75 * np.log([2, 4 / 3, 5]) + 0.25 * np.log([2, 4, 5 / 4])
    np.testing.assert_allclose(dpo(chosen, rejected, beta=0.5, label_smoothing=0.25), smoothed, rtol=1e-6)
    # It aims at a difference of 1 / (2 beta) = 1, from 0, 2 log 3 and -4 log 2.
    squared = [1.0, (2 * math.log(3) - 1) ** 2, (4 * math.log(2) + 1) ** 2]
    np.testing.assert_allclose(dpo(chosen, rejected, beta=0.5, kind="ipo"), squared, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"kind": "ipo"}], ids=["sigmoid", "smoothed", "ipo"])
def test_dpo_equals_a_numpy_loop(options):
    chosen, rejected = pair_rewards(7)
    loss = dpo(jnp.asarray(chosen), jnp.asarray(rejected), beta=0.4, **options)
    assert loss.shape == chosen.shape and loss.dtype == jnp.float32
    eps = options.get("label_smoothing", 0.0)
    for at in np.ndindex(*chosen.shape):
        h = float(chosen[at]) - float(rejected[at])
        p = 1 / (1 + math.exp(-0.4 * h))
        want = (h - 1.25) ** 2 if "kind" in options else -(1 - eps) * math.log(p) - eps * math.log(1 - p)
        assert float(loss[at]) == pytest.approx(want, rel=2e-5, abs=1e-6)
    eager = dpo_loss(jnp.asarray(chosen), jnp.asarray(rejected), beta=0.4, **options)
    np.testing.assert_allclose(loss, eager, rtol=1e-6)


def test_dpo_is_that_of_trl():
    """TRL 1.12.0's expressions in torch: ``sigmoid``, the two terms of its smoothed one, and ``ipo`` by length."""
    lengths = jnp.asarray([1, 4, 9, 2, 30], jnp.float32), jnp.asarray([3, 2, 5, 7, 21], jnp.float32)
    np.testing.assert_allclose(dpo(CHOSEN, REJECTED, beta=0.1), TRL["sigmoid"], rtol=1e-5)
    np.testing.assert_allclose(dpo(CHOSEN, REJECTED, beta=0.1, label_smoothing=0.2), TRL["smoothed"], rtol=1e-5)
    squared = dpo(CHOSEN / lengths[0], REJECTED / lengths[1], beta=0.1, kind="ipo")
    np.testing.assert_allclose(squared, TRL["ipo"], rtol=1e-5)


def test_dpo_stays_finite_however_far_the_policy_has_gone():
    chosen, rejected = jnp.asarray([5e3, -5e3]), jnp.asarray([-5e3, 5e3])
    loss, gradient = jax.jit(jax.value_and_grad(lambda c: dpo_loss(c, rejected, beta=0.1).sum()))(chosen)
    assert float(loss) == 1000.0
    np.testing.assert_allclose(gradient, [0.0, -0.1])


def test_dpo_refuses_unlike_shapes_integers_and_smoothed_squares():
    with pytest.raises(AssertionError):
        dpo_loss(jnp.ones(3), jnp.ones(4), beta=0.1)
    with pytest.raises(AssertionError):
        dpo_loss(jnp.ones(3, jnp.int32), jnp.ones(3, jnp.int32), beta=0.1)
    with pytest.raises(AssertionError):
        dpo_loss(jnp.ones(3), jnp.ones(3), beta=0.1, label_smoothing=0.1, kind="ipo")


# --- sums over tokens


def test_aggregations_by_hand():
    """Losses 1, 2, 3 and 5 of responses of three, one and no token, of four at most."""
    loss = jnp.asarray([[1.0, 2.0, 3.0, jnp.nan], [5.0, jnp.inf, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0]])
    mask = jnp.asarray([[True, True, True, False], [True, False, False, False], [False] * 4])
    assert [tuple(map(float, aggregate(loss, mask, name))) for name in ("token", "sequence", "constant")] == [
        (11.0, 4.0),
        (7.0, 2.0),
        (11.0, 8.0),
    ]


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_sums_and_weights_of_microbatches_add_up(aggregation):
    rng = np.random.default_rng(12)
    loss = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    mask = jnp.asarray(np.arange(5) < rng.integers(0, 6, 8)[:, None])
    parts = [aggregate(loss[i::4], mask[i::4], aggregation) for i in range(4)]
    np.testing.assert_allclose(np.sum(parts, axis=0), aggregate(loss, mask, aggregation), rtol=1e-5)


def test_rare_tokens_may_grow_by_another_clip():
    """Ratios 1.25 and 0.75 at clips 0.2 and 0.3: the one that grows is within its clip, the other is not."""
    log_probs = jnp.log(jnp.asarray([1.25, 1.35, 0.75]))
    got = clipped_policy_loss(log_probs, jnp.zeros(3), jnp.asarray([1.0, 1.0, -1.0]), clip=0.2, clip_high=0.3)
    np.testing.assert_allclose(got.loss, [-1.25, -1.3, 0.8], rtol=1e-6)
    assert got.is_clipped.tolist() == [False, True, True]
