"""Advantages and returns of responses with a reward on every token.

Arrays are ``[B, T]`` and indexed by the response token: ``rewards[:, t]`` arrives on emitting token ``t``, and
``values[:, t]`` is the value of the state before it. ``mask`` is the mask of the response, contiguous from the left; a
row may be empty. Outside the mask every output is 0, whatever the inputs are there.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrm.ops.masking import masked_mean


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    discount: float | jax.Array,
    gae_lambda: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation, arXiv 1506.02438. A response that was cut off counts as one that ends there.

        delta_t = R_t + discount V_{t+1} - V_t,    V = 0 after the last response token
        A_t = sum_l (discount gae_lambda)^l delta_{t+l}
        G_t = A_t + V_t

    Args:
      rewards: ``[B, T]`` float token rewards. Integers are refused: a buffer with the dtype of token ids has already
        truncated every reward.
      values: ``[B, T]`` float values of the critic.
      mask: ``[B, T]`` bool.
      discount: in [0, 1], per token.
      gae_lambda: in [0, 1]; 1 gives the discounted return less the value, 0 the one-step error.

    Returns:
      ``advantages [B, T]`` and ``returns [B, T]``, float32. ``returns`` is the critic's target.
    """
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type(mask, bool)
    chex.assert_type([rewards, values], float)
    values = jnp.where(mask, values.astype(jnp.float32), 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    # Right of a response every delta is 0, so the sum that arrives from there is 0 as well.
    deltas = jnp.where(mask, rewards.astype(jnp.float32) + discount * next_values - values, 0.0)

    def one_token(later: jax.Array, delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        advantage = delta + discount * gae_lambda * later
        return advantage, advantage

    _, advantages = jax.lax.scan(one_token, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    return advantages.T, advantages.T + values


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """The share of the returns' variance that the critic explains: ``1 - Var(G - V) / Var(G)`` over the masked tokens.

    1 is a perfect critic; 0 is as good as a constant; below 0 is worse than a constant.

    Args:
      values: ``[B, T]`` float values of the critic.
      returns: ``[B, T]`` float.
      mask: ``[B, T]`` bool.

    Returns:
      A float32 scalar. It is 0 where the returns do not vary, as with one token or none.
    """
    chex.assert_equal_shape([values, returns, mask])
    chex.assert_type([values, returns], float)
    returns = returns.astype(jnp.float32)
    variance = _variance(returns, mask)
    # The mean of equal numbers need not be exactly that number, so equality is decided by their order.
    highest = jnp.max(returns, where=mask, initial=-jnp.inf)
    lowest = jnp.min(returns, where=mask, initial=jnp.inf)
    is_constant = (highest <= lowest) | (variance == 0)
    unexplained = _variance(returns - values.astype(jnp.float32), mask) / jnp.where(is_constant, 1.0, variance)
    return jnp.where(is_constant, 0.0, 1.0 - unexplained)


def _variance(values: jax.Array, mask: jax.Array) -> jax.Array:
    return masked_mean(jnp.square(values - masked_mean(values, mask)), mask)
