"""Advantages and returns of responses with a reward on every token.

Arrays are ``[B, T]`` and indexed by the response token: ``rewards[:, t]`` arrives on emitting token ``t``, and
``values[:, t]`` is the value of the state before it. ``mask`` is the mask of the response, contiguous from the left; a
row may be empty. Outside the mask every output is 0, whatever the inputs are there.

`gae` needs a critic. `rloo`, `grpo` and `reinforce_plus_plus` compare the n responses to a prompt with each other.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrm.ops.masking import last_token, masked_mean


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


def rloo(rewards: jax.Array, mask: jax.Array, *, group_size: int, is_terminal: bool = False) -> jax.Array:
    """REINFORCE with a leave-one-out baseline, arXiv 2402.14740, carried to token rewards (jaxrm choice).

        A_i,t = G_i,t - mean_{j != i} G_j,t,    G_i,t = sum_{l >= t} r_i,l

    The baseline of a response does not depend on that response, so the expected gradient is that of plain REINFORCE.

    Args:
      rewards: ``[B, T]`` float token rewards; whole numbers are refused, as in `gae`.
      mask: ``[B, T]`` bool.
      group_size: n, responses to a prompt, at least 2; they lie next to each other.
      is_terminal: whether a response is rewarded as a whole, on its last token. G_j,t after the end of y_j is then that
        reward and not 0, so the baseline is the mean reward of the others at every token, as published.

    Returns:
      ``[B, T]`` float32. A token at which all of the group have the same G has exactly 0.
    """
    assert group_size > 1, "a response alone has no others to compare with"
    returns, is_equal = _group_returns(rewards, mask, group_size, is_terminal)
    others = (jnp.sum(returns, axis=1, keepdims=True) - returns) / (group_size - 1)
    return jnp.where(mask, jnp.where(is_equal, 0.0, returns - others).reshape(mask.shape), 0.0)


def grpo(rewards: jax.Array, mask: jax.Array, *, group_size: int, is_terminal: bool = False) -> jax.Array:
    """Group-relative advantages, arXiv 2402.03300: equation 3, and section 4.1.3 for token rewards.

        r~ = (r - mean) / (std + 1e-4),    A_i,t = sum_{l >= t} r~_i,l

    Mean and standard deviation are over all tokens of the group that carry a reward. The latter has Bessel's
    correction and 1e-4, as in TRL. With a terminal reward every token has the normalized reward of its response.

    Args:
      rewards: ``[B, T]`` float token rewards; whole numbers are refused, as in `gae`.
      mask: ``[B, T]`` bool.
      group_size: n, responses to a prompt, at least 2; they lie next to each other.
      is_terminal: whether only the last token of a response carries a reward; else every token does. One that no span
        of the kind ``spans`` ends on carries 0, and so gets ``-mean / std``.

    Returns:
      ``[B, T]`` float32; exactly 0 in a group of equal rewards.
    """
    assert group_size > 1, "a response alone has no others to compare with"
    _check(rewards, mask)
    carries = _grouped(last_token(mask) if is_terminal else mask, group_size)
    grouped = jnp.where(carries, _grouped(rewards.astype(jnp.float32), group_size), 0.0)
    count = jnp.sum(carries, axis=(1, 2), keepdims=True, dtype=jnp.float32)
    mean = jnp.sum(grouped, axis=(1, 2), keepdims=True) / jnp.maximum(count, 1.0)
    from_mean = jnp.where(carries, grouped - mean, 0.0)
    variance = jnp.sum(jnp.square(from_mean), axis=(1, 2), keepdims=True) / jnp.maximum(count - 1.0, 1.0)
    # The mean of equal numbers need not be exactly that number, so equality is decided by their order.
    highest = jnp.max(grouped, axis=(1, 2), keepdims=True, where=carries, initial=-jnp.inf)
    lowest = jnp.min(grouped, axis=(1, 2), keepdims=True, where=carries, initial=jnp.inf)
    normalized = jnp.where(highest <= lowest, 0.0, from_mean / (jnp.sqrt(variance) + 1e-4))
    return jnp.where(mask, _to_go(normalized.reshape(mask.shape)), 0.0)


def reinforce_plus_plus(
    rewards: jax.Array, mask: jax.Array, *, group_size: int, is_terminal: bool = False
) -> jax.Array:
    """REINFORCE++, arXiv 2501.03262, before it is whitened over the batch: ``G_i,t - mean_j G_j,t``.

    The mean is over the group, the response itself included; a response alone keeps its G. Arguments and result are
    those of `rloo`. Its caller whitens over the batch (`jaxrm.ops.masking.masked_whiten`).
    """
    returns, is_equal = _group_returns(rewards, mask, group_size, is_terminal)
    if group_size > 1:
        returns = jnp.where(is_equal, 0.0, returns - jnp.mean(returns, axis=1, keepdims=True))
    return jnp.where(mask, returns.reshape(mask.shape), 0.0)


def equal_groups(advantages: jax.Array, mask: jax.Array, *, group_size: int) -> jax.Array:
    """The share of groups that say nothing, since all of their advantages are 0; a float32 scalar.

    Args:
      advantages: ``[B, T]`` float, not whitened.
      mask: ``[B, T]`` bool; a group without a token is not counted.
      group_size: n, responses to a prompt.
    """
    is_silent = jnp.all(_grouped((advantages == 0) | ~mask, group_size), axis=(1, 2))
    return masked_mean(is_silent, jnp.any(_grouped(mask, group_size), axis=(1, 2)))


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


def _group_returns(
    rewards: jax.Array, mask: jax.Array, group_size: int, is_terminal: bool
) -> tuple[jax.Array, jax.Array]:
    """``G [B / n, n, T]``, also after the end of each response; ``[B / n, 1, T]`` bool, True where a group has one."""
    _check(rewards, mask)
    inside = jnp.where(mask, rewards.astype(jnp.float32), 0.0)
    returns = _to_go(inside)
    if is_terminal:
        outcome = jnp.sum(jnp.where(last_token(mask), inside, 0.0), axis=1, keepdims=True)
        returns = jnp.where(mask, returns, outcome)
    grouped = _grouped(returns, group_size)
    return grouped, jnp.max(grouped, axis=1, keepdims=True) <= jnp.min(grouped, axis=1, keepdims=True)


def _to_go(rewards: jax.Array) -> jax.Array:
    return jax.lax.cumsum(rewards, axis=1, reverse=True)


def _grouped(rows: jax.Array, group_size: int) -> jax.Array:
    """``[B, T] -> [B / n, n, T]``."""
    return rows.reshape(-1, group_size, rows.shape[1])


def _check(rewards: jax.Array, mask: jax.Array) -> None:
    chex.assert_rank(mask, 2)
    chex.assert_equal_shape([rewards, mask])
    chex.assert_type(mask, bool)
    chex.assert_type(rewards, float)
