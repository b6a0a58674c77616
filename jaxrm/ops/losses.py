"""Losses, unreduced: the caller sums them under a mask and divides once over microbatches and devices."""

import chex
import jax
import jax.numpy as jnp


def next_token_targets(tokens: jax.Array, segment_ids: jax.Array, loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the hidden state at each position is trained to predict: ``z_{t+1}`` given ``z_<=t``.

    The mask is indexed by the token produced (`jaxrm.types`), while hidden state ``i`` scores token
    ``i + 1``; this is the one place where the two are lined up. No target crosses from one packed segment into
    the next, whatever the mask says.

    Args:
      tokens: ``[B, T]`` int token ids.
      segment_ids: ``[B, T]`` int, 0 for padding; tokens of one packed example share an id.
      loss_mask: ``[B, T]`` bool, True where the token itself is a trained target.

    Returns:
      ``targets [B, T]`` int and ``mask [B, T]`` bool, both indexed by the position that predicts. The last
      position of a row predicts nothing: its mask is False.
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
    """How surprising it is that the chosen response won: ``-log sigmoid(chosen - rejected - margin)``.

    The scalar reward model's loss (Bradley & Terry, 1952, as in InstructGPT, arXiv 2203.02155); a margin as in
    Llama 2, arXiv 2307.09288, asks for a difference of at least so much.

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
