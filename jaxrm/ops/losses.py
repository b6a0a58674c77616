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
