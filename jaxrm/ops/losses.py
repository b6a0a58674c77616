"""Losses, unreduced: the caller sums them under a mask and divides once over microbatches and devices."""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxrm.ops.masking import masked_mean, masked_sum

AGGREGATIONS = ("token", "sequence", "constant")


class PolicyLoss(NamedTuple):
    """The clipped surrogate, token by token.

    Attributes:
      loss: ``[...]`` float32.
      ratio: ``[...]`` float32, ``pi(y_t) / pi_old(y_t)``, without a gradient.
      is_clipped: ``[...]`` bool, True where the clipped ratio counts; such a token has no gradient.
    """

    loss: jax.Array
    ratio: jax.Array
    is_clipped: jax.Array


class ValueLoss(NamedTuple):
    """The clipped value loss, token by token.

    Attributes:
      loss: ``[...]`` float32.
      is_clipped: ``[...]`` bool, True where the clipped value counts; such a token has no gradient.
    """

    loss: jax.Array
    is_clipped: jax.Array


def next_token_targets(tokens: jax.Array, segment_ids: jax.Array, loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The token that each hidden state is trained to predict: ``z_{t+1}`` given ``z_<=t``.

    The mask is indexed by the token produced (``jaxrm.types``), while hidden state ``i`` scores token ``i + 1``. This
    is the one place that aligns the two. No target crosses from one packed segment into the next, whatever the mask.

    Args:
      tokens: ``[B, T]`` int token ids.
      segment_ids: ``[B, T]`` int, 0 for padding; tokens of one packed example share an id.
      loss_mask: ``[B, T]`` bool, True where the token itself is a trained target.

    Returns:
      ``targets [B, T]`` int and ``mask [B, T]`` bool, both indexed by the position that predicts. The last
      position of a row predicts nothing, so its mask is False.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_equal_shape([tokens, segment_ids, loss_mask])
    chex.assert_type(loss_mask, bool)
    targets = jnp.roll(tokens, -1, axis=1)
    same_segment = jnp.roll(segment_ids, -1, axis=1) == segment_ids
    mask = jnp.roll(loss_mask, -1, axis=1) & same_segment & (segment_ids > 0)
    return targets, mask.at[:, -1].set(False)


def bradley_terry_loss(
    chosen_rewards: jax.Array,
    rejected_rewards: jax.Array,
    *,
    margin: float | jax.Array = 0.0,
) -> jax.Array:
    """The loss of a scalar reward model: ``-log sigmoid(chosen - rejected - margin)``.

    Bradley & Terry, 1952, as in InstructGPT, arXiv 2203.02155. The margin is that of Llama 2, arXiv 2307.09288: the
    difference should be at least so large.

    Args:
      chosen_rewards: ``[...]`` float rewards of the chosen responses.
      rejected_rewards: ``[...]`` float rewards of the rejected ones, of the same shape.
      margin: a number, or ``[...]`` of the same shape.

    Returns:
      ``[...]`` float32 losses in nats, unreduced.
    """
    chex.assert_equal_shape([chosen_rewards, rejected_rewards])
    chex.assert_type([chosen_rewards, rejected_rewards], float)
    difference = chosen_rewards.astype(jnp.float32) - rejected_rewards.astype(jnp.float32)
    # softplus(-z) is -log sigmoid(z) without the log of an underflowed sigmoid.
    return jax.nn.softplus(margin - difference)


def dpo_loss(
    chosen_log_ratios: jax.Array,
    rejected_log_ratios: jax.Array,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
) -> jax.Array:
    """Direct preference optimization of pairs, from the log-ratios of policy and reference on both responses.

    With ``h = log pi(y+|x) / pi_ref(y+|x) - log pi(y-|x) / pi_ref(y-|x)``:

        sigmoid: -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)      arXiv 2305.18290, equation 7
        ipo:     (h - 1 / (2 beta))^2                                       arXiv 2310.12036, equation 17

    ``eps`` is the probability that the labels of a pair are swapped (conservative DPO).

    Args:
      chosen_log_ratios: ``[...]`` float log-ratios, in nats, of the chosen responses.
      rejected_log_ratios: ``[...]`` float, of the rejected ones.
      beta: strength of the regularization toward the reference.
      label_smoothing: eps; for ``sigmoid`` only.
      kind: the loss.

    Returns:
      ``[...]`` float32 losses, unreduced. Where both log-ratios are 0 they are log 2, or 1 / (4 beta^2).
    """
    chex.assert_equal_shape([chosen_log_ratios, rejected_log_ratios])
    chex.assert_type([chosen_log_ratios, rejected_log_ratios], float)
    assert kind in ("sigmoid", "ipo"), kind
    h = chosen_log_ratios.astype(jnp.float32) - rejected_log_ratios.astype(jnp.float32)
    if kind == "ipo":
        assert label_smoothing == 0, "the squared loss has no label smoothing"
        return jnp.square(h - 1.0 / (2.0 * beta))
    loss = jax.nn.softplus(-beta * h)  # -log sigmoid without the log of an underflowed sigmoid
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * jax.nn.softplus(beta * h)
    return loss


def clipped_policy_loss(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip: float,
    clip_high: float | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate, ``-min(rho A, clip(rho, 1 - clip, 1 + clip_high) A)`` with ``rho = pi / pi_old``.

    "Proximal Policy Optimization Algorithms", arXiv 1707.06347, equation 7. A higher ``clip_high`` lets rare tokens
    grow more, arXiv 2503.14476.

    A mask over the result protects the loss, but not its gradient: where the inputs are not finite, 0 x inf is NaN.
    So replace the inputs outside the mask first.

    Args:
      log_probs: ``[...]`` float log-probs of the tokens under the policy in training.
      old_log_probs: ``[...]`` float, under the policy that sampled them; constants.
      advantages: ``[...]`` float; constants.
      clip: clip range of the ratio around 1, e.g. 0.2.
      clip_high: the range above 1; None is ``clip``.

    Returns:
      ``PolicyLoss``, unreduced. Its gradient where the ratio is 1 is ``-A`` times that of ``log_probs``.
    """
    chex.assert_equal_shape([log_probs, old_log_probs, advantages])
    chex.assert_type([log_probs, old_log_probs, advantages], float)
    advantages = jax.lax.stop_gradient(advantages.astype(jnp.float32))
    log_ratio = log_probs.astype(jnp.float32) - jax.lax.stop_gradient(old_log_probs.astype(jnp.float32))
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    lowest, highest = 1.0 - clip, 1.0 + (clip if clip_high is None else clip_high)
    is_clipped = ((advantages > 0) & (ratio > highest)) | ((advantages < 0) & (ratio < lowest))
    # The exponential sees no clipped token: a ratio that overflows would turn the gradient 0 of its token into NaN.
    counted = jnp.where(is_clipped, jnp.clip(ratio, lowest, highest), jnp.exp(jnp.where(is_clipped, 0.0, log_ratio)))
    return PolicyLoss(-counted * advantages, ratio, is_clipped)


def importance_weights(log_probs: jax.Array, sampler_log_probs: jax.Array, cap: float) -> jax.Array:
    """Truncated importance weights ``min(pi_old / pi_sampler, cap)`` of tokens, without a gradient.

    Tokens come from the sampler, whose rounding differs from that of the training forward. The weights make the policy
    gradient that of the policy again; the cap bounds its variance at the cost of a bias (Ionides 2008, "Truncated
    Importance Sampling"; for the sampler of a rollout Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training").

    Args:
      log_probs: ``[...]`` float log-probs of the tokens under the policy before the update, by the training forward.
      sampler_log_probs: ``[...]`` float, as the sampler computed them.
      cap: largest weight.

    Returns:
      ``[...]`` float32.
    """
    chex.assert_equal_shape([log_probs, sampler_log_probs])
    log_ratio = log_probs.astype(jnp.float32) - sampler_log_probs.astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.minimum(log_ratio, 80.0)), cap))  # below overflow


def clipped_value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    *,
    clip: float,
) -> ValueLoss:
    """The clipped value loss, ``1/2 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) - G)^2)``.

    As in OpenAI's implementations of PPO, and in PPO for language models since arXiv 1909.08593.

    Args:
      values: ``[...]`` float values of the critic in training.
      old_values: ``[...]`` float values at the time of the rollout; constants.
      returns: ``[...]`` float targets; constants.
      clip: clip range around the old value, in units of the return.

    Returns:
      ``ValueLoss``, unreduced.
    """
    chex.assert_equal_shape([values, old_values, returns])
    chex.assert_type([values, old_values, returns], float)
    values = values.astype(jnp.float32)
    old_values = old_values.astype(jnp.float32)
    returns = jax.lax.stop_gradient(returns.astype(jnp.float32))
    clipped = jax.lax.stop_gradient(jnp.clip(values, old_values - clip, old_values + clip))
    error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
    # Inside the clip range the two errors are equal, so the first is taken, with its gradient.
    is_clipped = clipped_error > error
    return ValueLoss(0.5 * jnp.where(is_clipped, clipped_error, error), is_clipped)


def aggregate(loss: jax.Array, mask: jax.Array, aggregation: str) -> tuple[jax.Array, jax.Array]:
    """The losses of tokens as a sum and its weight; both are added over microbatches and devices and divided once.

        token     sum over all tokens / tokens
        sequence  sum over responses of the mean over their tokens / responses            GRPO, arXiv 2402.03300
        constant  sum over all tokens / (responses x T)                                   Dr. GRPO, arXiv 2503.20783

    Args:
      loss: ``[B, T]`` float losses of tokens; T is the most tokens that a response may have.
      mask: ``[B, T]`` bool. A response without a token is not counted.
      aggregation: one of ``AGGREGATIONS``.

    Returns:
      The sum and `aggregation_weight`, float32 scalars.
    """
    chex.assert_equal_shape([loss, mask])
    if aggregation == "sequence":
        return jnp.sum(masked_mean(loss, mask, axis=1)), aggregation_weight(mask, aggregation)
    return masked_sum(loss, mask), aggregation_weight(mask, aggregation)


def aggregation_weight(mask: jax.Array, aggregation: str) -> jax.Array:
    """What the sum of `aggregate` is divided by, a float32 scalar.

    Args:
      mask: ``[B, T]`` bool.
      aggregation: one of ``AGGREGATIONS``.
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    assert aggregation in AGGREGATIONS, aggregation
    if aggregation == "token":
        return jnp.sum(mask, dtype=jnp.float32)
    responses = jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)
    return responses if aggregation == "sequence" else responses * mask.shape[1]
