"""KL between policy and reference: estimates from single tokens, the penalty in the reward, its coefficient.

``KL(pi || pi_ref) = E_pi[log pi(y) - log pi_ref(y)]`` in nats, estimated on tokens that the policy itself sampled.
"""

import chex
import jax
import jax.numpy as jnp

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(estimator: str, log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """Estimate of the KL from each token, after Schulman's "Approximating KL Divergence" (2020).

    With ``d = log_probs - reference_log_probs``:

        k1 = d                  unbiased; may be negative
        k2 = d^2 / 2            biased, of low variance; never negative
        k3 = exp(-d) - 1 + d    unbiased; never negative

    As a number, in the reward or in a log, k1 and k3 are right. As a loss, differentiated through ``log_probs``, only
    k2 has the expected gradient of the KL: with tokens sampled from pi, grad KL = E[d grad log pi] = E[grad k2].
    The gradient of k1 is E[grad log pi] = 0, so it has no effect. The gradient of k3 is
    E[(1 - pi_ref / pi) grad log pi], which belongs to the reverse KL, ``KL(pi_ref || pi)``.

    Args:
      estimator: one of ``ESTIMATORS``.
      log_probs: ``[...]`` float, of the sampled tokens under the policy.
      reference_log_probs: ``[...]`` float, of the same tokens under the reference.

    Returns:
      ``[...]`` float32, in nats a token.
    """
    assert estimator in ESTIMATORS, estimator
    chex.assert_equal_shape([log_probs, reference_log_probs])
    chex.assert_type([log_probs, reference_log_probs], float)
    difference = log_probs.astype(jnp.float32) - reference_log_probs.astype(jnp.float32)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * jnp.square(difference)
    # expm1 keeps the small difference of two numbers near 1 that a policy close to its reference has.
    return jnp.expm1(-difference) + difference


def penalized_rewards(
    rewards: jax.Array,
    log_probs: jax.Array,
    reference_log_probs: jax.Array,
    mask: jax.Array,
    *,
    coefficient: float | jax.Array,
    limit: float,
    estimator: str = "k1",
) -> jax.Array:
    """The rewards that PPO maximizes: ``R_t = clamp(r_t - coefficient KL_t, -limit, limit)``.

    KL_t is the ``kl_estimate`` of the token.

    The penalty per token is that of arXiv 1909.08593 and InstructGPT, arXiv 2203.02155.

    Args:
      rewards: ``[B, T]`` float token rewards; whole numbers are refused, as in ``jaxrm.ops.advantages.gae``.
      log_probs: ``[B, T]`` float, of the response's tokens under the policy that sampled them.
      reference_log_probs: ``[B, T]`` float, under the reference.
      mask: ``[B, T]`` bool, the response's.
      coefficient: the weight of the KL, in rewards a nat; a number or a float scalar.
      limit: bound of ``|R_t|``.
      estimator: one of ``ESTIMATORS``.

    Returns:
      ``[B, T]`` float32, 0 outside the mask whatever the inputs hold there.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([rewards, log_probs, reference_log_probs, mask])
    chex.assert_type(mask, bool)
    chex.assert_type(rewards, float)
    chex.assert_rank(coefficient, 0)
    penalty = coefficient * kl_estimate(estimator, log_probs, reference_log_probs)
    return jnp.where(mask, jnp.clip(rewards.astype(jnp.float32) - penalty, -limit, limit), 0.0)


def next_coefficient(
    coefficient: float | jax.Array,
    kl: float | jax.Array,
    *,
    target: float,
    horizon: float,
    count: int | jax.Array,
) -> jax.Array:
    """The adaptive controller of arXiv 1909.08593, section 2.2: a KL above its target raises the coefficient.

        coefficient (1 + clip(kl / target - 1, -0.2, 0.2) count / horizon)

    The gain, a constant in the paper, is ``count / horizon`` as in its published code, so that it follows the batch.

    Args:
      coefficient: scalar, the current coefficient.
      kl: scalar, the batch's mean KL in nats a response.
      target: the target KL in nats a response, above 0.
      horizon: above 0; after so many responses, an error of one fifth has changed the coefficient by one fifth.
      count: number of responses in the batch.

    Returns:
      The next coefficient, a float32 scalar.
    """
    chex.assert_rank([coefficient, kl, count], 0)
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(coefficient, jnp.float32) * (1.0 + error * count / horizon)
