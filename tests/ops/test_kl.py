"""KL: the three estimators by exact expectations, the penalty in the reward, the adaptive controller."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.ops import kl

estimate = jax.jit(kl.kl_estimate, static_argnums=0)
penalized = jax.jit(kl.penalized_rewards, static_argnames="estimator")
next_coefficient = jax.jit(kl.next_coefficient)


def random_case(seed=0, B=6, T=8):
    """Rewards, log-probs, reference log-probs and the mask of responses of 0 to T tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T + 1, B)
    lengths[:3] = 0, 1, T
    rewards = rng.normal(0, 0.7, (B, T))
    log_probs, reference = np.log(rng.uniform(0.05, 1.0, (2, B, T)))
    arrays = [jnp.asarray(x, jnp.float32) for x in (rewards, log_probs, reference)]
    return *arrays, jnp.asarray(np.arange(T) < lengths[:, None])


# --- estimators


def test_estimates_by_hand():
    log_probs, reference = jnp.log(jnp.asarray([0.5, 0.2, 0.3])), jnp.log(jnp.asarray([0.25, 0.4, 0.3]))
    ln2 = math.log(2)
    np.testing.assert_allclose(estimate("k1", log_probs, reference), [ln2, -ln2, 0], atol=1e-6)
    np.testing.assert_allclose(estimate("k2", log_probs, reference), [ln2**2 / 2, ln2**2 / 2, 0], atol=1e-6)
    np.testing.assert_allclose(estimate("k3", log_probs, reference), [ln2 - 0.5, 1 - ln2, 0], atol=1e-6)


def policies(seed=0, V=7):
    """The logits of a policy over `V` words, and the log-probs of a reference that is not far away."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.0, V)
    return jnp.asarray(logits, jnp.float32), jax.nn.log_softmax(
        jnp.asarray(logits + rng.normal(0, 0.6, V), jnp.float32)
    )


def numpy_kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))


def test_k1_and_k3_are_the_kl_in_expectation_and_k2_nearly():
    logits, reference = policies()
    log_probs = jax.nn.log_softmax(logits)
    exact = numpy_kl(jnp.exp(log_probs), jnp.exp(reference))
    means = {name: float(jnp.sum(jnp.exp(log_probs) * estimate(name, log_probs, reference))) for name in kl.ESTIMATORS}
    assert exact > 0.05
    assert means["k1"] == pytest.approx(exact, rel=1e-4)
    assert means["k3"] == pytest.approx(exact, rel=1e-4)
    assert means["k2"] == pytest.approx(exact, rel=0.3)


def test_gradients_of_the_kl_estimates_as_losses():
    """Expectations of the gradient over every word that the policy may draw, none of them sampled.

    k2 pulls as the KL does, k1 not at all, and k3 as the KL the other way round.
    """
    logits, reference = policies(1)
    drawn_with = jax.nn.softmax(logits)

    def expected_loss(logits, estimator):
        return jnp.sum(drawn_with * kl.kl_estimate(estimator, jax.nn.log_softmax(logits), reference))

    gradient = jax.jit(jax.grad(expected_loss), static_argnums=1)
    # d KL(p || q) / d logit_v = p_v (log p_v - log q_v - KL), and d KL(q || p) / d logit_v = p_v - q_v
    p, q = (np.asarray(jnp.exp(x), np.float64) for x in (jax.nn.log_softmax(logits), reference))
    of_the_kl = p * (np.log(p) - np.log(q) - numpy_kl(p, q))
    assert np.abs(of_the_kl).max() > 0.05
    np.testing.assert_allclose(gradient(logits, "k2"), of_the_kl, atol=1e-6)
    np.testing.assert_allclose(gradient(logits, "k1"), np.zeros(7), atol=1e-6)
    np.testing.assert_allclose(gradient(logits, "k3"), p - q, atol=1e-6)
    assert np.abs(p - q - of_the_kl).max() > 0.01


def test_k2_k3_are_never_negative_and_k3_keeps_small_differences():
    difference = jnp.asarray([-3.0, -1e-3, -1e-5, 0.0, 1e-5, 1e-3, 3.0])
    for name in ("k2", "k3"):
        got = estimate(name, difference, jnp.zeros(7))
        assert (got >= 0).all()
        np.testing.assert_allclose(got[jnp.asarray([1, 5])], [5e-7, 5e-7], rtol=0.05)


def test_a_policy_that_is_its_reference_has_no_kl():
    _, log_probs, _, _ = random_case(2)
    for name in kl.ESTIMATORS:
        assert (estimate(name, log_probs, log_probs) == 0).all()


def test_estimates_refuse_unknown_names_integers_unlike_shapes():
    with pytest.raises(AssertionError):
        kl.kl_estimate("k4", jnp.ones(3), jnp.ones(3))
    with pytest.raises(AssertionError):
        kl.kl_estimate("k1", jnp.ones(3, jnp.int32), jnp.ones(3))
    with pytest.raises(AssertionError):
        kl.kl_estimate("k1", jnp.ones(3), jnp.ones(4))


def test_estimates_of_bfloat16_log_probs_are_float32():
    got = estimate("k3", jnp.asarray([-1.0], jnp.bfloat16), jnp.asarray([-1.0078125], jnp.bfloat16))
    assert got.dtype == jnp.float32
    assert float(got[0]) == pytest.approx(math.exp(-0.0078125) - 1 + 0.0078125, rel=1e-3)


# --- rewards


def test_penalized_rewards_by_hand():
    rewards = jnp.asarray([[0.7, -0.2, 2.0, 5.0]])
    log_probs, reference = jnp.asarray([[-1.0, -2.0, -1.0, -7.0]]), jnp.asarray([[-1.5, -1.0, -9.0, -1.0]])
    mask = jnp.asarray([[True, True, True, False]])
    got = penalized(rewards, log_probs, reference, mask, coefficient=0.4, limit=1.0)
    # 0.7 - 0.4 x 0.5, -0.2 + 0.4 x 1, 2 - 0.4 x 8 clamped, padding
    np.testing.assert_allclose(got, [[0.5, 0.2, -1.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_penalized_rewards_equal_a_numpy_loop(estimator):
    rewards, log_probs, reference, mask = random_case(3)
    got = penalized(rewards, log_probs, reference, mask, coefficient=0.3, limit=0.6, estimator=estimator)
    assert got.dtype == jnp.float32
    clamped = 0
    for at in np.ndindex(*mask.shape):
        d = float(log_probs[at]) - float(reference[at])
        penalty = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
        unclamped = float(rewards[at]) - 0.3 * penalty
        clamped += bool(mask[at]) and abs(unclamped) > 0.6
        want = max(-0.6, min(0.6, unclamped)) if mask[at] else 0.0
        assert float(got[at]) == pytest.approx(want, abs=1e-5), at
    assert clamped


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_padding_changes_no_penalized_reward(poison):
    rewards, log_probs, reference, mask = random_case(4)
    want = penalized(rewards, log_probs, reference, mask, coefficient=0.3, limit=0.6)
    wide = [
        jnp.pad(jnp.where(mask, x, poison), ((0, 0), (0, 2)), constant_values=poison)
        for x in (rewards, log_probs, reference)
    ]
    got = penalized(*wide, jnp.pad(mask, ((0, 0), (0, 2))), coefficient=0.3, limit=0.6)
    np.testing.assert_array_equal(got[:, :8], want)
    assert (got[:, 8:] == 0).all() and (jnp.where(mask, 0.0, want) == 0).all()


def test_a_coefficient_in_an_array_changes_without_compiling():
    rewards, log_probs, reference, mask = random_case(5)
    traces = []

    @jax.jit
    def ours(coefficient):
        traces.append(coefficient)
        return kl.penalized_rewards(rewards, log_probs, reference, mask, coefficient=coefficient, limit=50.0)

    without = kl.penalized_rewards(rewards, log_probs, reference, mask, coefficient=0.0, limit=50.0)
    for beta in (0.1, 0.25):
        want = jnp.where(mask, without - beta * (log_probs - reference), 0.0)
        np.testing.assert_allclose(ours(jnp.float32(beta)), want, atol=1e-6)
    assert len(traces) == 1


def test_penalized_rewards_refuse_integers_and_numeric_masks():
    rewards, log_probs, reference, mask = random_case(6)
    for kind in (jnp.int32, bool):
        with pytest.raises(AssertionError):
            kl.penalized_rewards(rewards.astype(kind), log_probs, reference, mask, coefficient=0.1, limit=50.0)
    with pytest.raises(AssertionError):
        kl.penalized_rewards(rewards, log_probs, reference, mask.astype(jnp.int32), coefficient=0.1, limit=50.0)


# --- controller


@pytest.mark.parametrize(
    ("seen", "factor"),
    # on target; a tenth above and below; further off than the clip; a negative estimate
    [(6.0, 1.0), (6.6, 1.0256), (5.4, 0.9744), (60.0, 1.0512), (0.5, 0.9488), (-3.0, 0.9488)],
)
def test_the_controller_follows_the_error_up_to_a_fifth(seen, factor):
    got = next_coefficient(0.2, seen, target=6.0, horizon=1000.0, count=256)
    assert got.shape == () and got.dtype == jnp.float32
    assert float(got) == pytest.approx(0.2 * factor, rel=1e-5)


def test_the_controller_finds_the_coefficient_of_the_target():
    """A policy whose KL falls as 1 / coefficient has KL 6 at 0.05."""
    coefficient = jnp.float32(0.4)
    for _ in range(120):
        coefficient = next_coefficient(coefficient, 0.3 / coefficient, target=6.0, horizon=1000.0, count=256)
    assert float(coefficient) == pytest.approx(0.05, rel=1e-3)


def test_the_controller_without_jit_agrees():
    eager = kl.next_coefficient(0.2, 7.0, target=6.0, horizon=1000.0, count=64)
    jitted = next_coefficient(0.2, 7.0, target=6.0, horizon=1000.0, count=64)
    assert float(eager) == pytest.approx(float(jitted), rel=1e-6)
