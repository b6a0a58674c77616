"""Token rewards: what a reward model says about each token of a response.

The extraction rule of "Sequence to Sequence Reward Modeling" (arXiv 2409.00162, section 3, Figure 2): a token earns a
positive score until the response diverges from what the reward model writes; from there the response is fed token
by token, and the tokens that the reward model would not have written earn a negative one. With the whole response
as its source, one teacher-forced pass gives every tag: up to the first mismatch greedy output and response are the
same, and after it the rule itself feeds the response.

Arrays are ``[B, T]`` and indexed by the response token; ``mask`` is the response's, and outside it every output is 0
whatever the inputs hold there. A response of no token is legal. ``u_t`` is a kind's value (`literal` ... `scalar`);
`jaxrm.ops.reward_kinds` has the table of kinds. `jaxrm.ops.reward_scaling` makes token rewards ``r_t = a (u_t - c)`` of
the values.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrm.ops.masking import last_token

# --- tags


def token_tags(responses: jax.Array, argmax: jax.Array, mask: jax.Array) -> jax.Array:
    """Whether the reward model would have written each token itself: ``s_t = + iff y_t = argmax_v q(v | c, y_<t)``.

    Args:
      responses: ``[B, T]`` int token ids.
      argmax: ``[B, T]`` int, the most likely token at each position with the response fed to it.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` bool: True is +; False is - or padding.
    """
    check_arrays(mask, responses, argmax, dtype=int)
    return (responses == argmax) & mask


def divergence(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """Where a response leaves the reward model's: how many of its tokens come before the first - tag.

    Args:
      tags: ``[B, T]`` bool.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B]`` int32, the index of the first - tag among the response's tokens; its length where there is none.
    """
    check_arrays(mask, tags, dtype=bool)
    return jnp.sum(_before_divergence(tags, mask), axis=1, dtype=jnp.int32)


# --- values, by kind


def literal(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """The paper's rule: +1 before the divergence, -1 on every - tag, 0 on + tags after the divergence.

    Args:
      tags: ``[B, T]`` bool.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    check_arrays(mask, tags, dtype=bool)
    return inside_mask(mask, jnp.where(_before_divergence(tags, mask), 1.0, jnp.where(tags, 0.0, -1.0)))


def signed(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """+1 on + tags and -1 on - tags, wherever they stand (jaxrm choice, an ablation). Shapes as in `literal`."""
    check_arrays(mask, tags, dtype=bool)
    return inside_mask(mask, jnp.where(tags, 1.0, -1.0))


def prefix(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """+1 before the divergence and -1 from it on (jaxrm choice, an ablation). Shapes as in `literal`."""
    check_arrays(mask, tags, dtype=bool)
    return inside_mask(mask, jnp.where(_before_divergence(tags, mask), 1.0, -1.0))


def soft(log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """``clip(2 q(y_t | c, y_<t) - 1, -1, 1)``: a tag by degrees (jaxrm choice, after RLMEC, arXiv 2401.06081).

    Args:
      log_probs: ``[B, T]`` float, log-prob of the response's token under the reward model.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    check_arrays(mask, log_probs, dtype=float)
    return inside_mask(mask, jnp.clip(2.0 * jnp.exp(log_probs.astype(jnp.float32)) - 1.0, -1.0, 1.0))


def margin(log_probs: jax.Array, max_log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """``max(log q(y_t | c, y_<t) - max_v log q(v | c, y_<t), -1)``: never positive, so no length pays (jaxrm choice).

    Args:
      log_probs: ``[B, T]`` float, log-prob of the response's token under the reward model.
      max_log_probs: ``[B, T]`` float, log-prob of the most likely token there.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    check_arrays(mask, log_probs, max_log_probs, dtype=float)
    return inside_mask(mask, jnp.clip(log_probs.astype(jnp.float32) - max_log_probs.astype(jnp.float32), -1.0, 0.0))


def contrast(log_probs: jax.Array, reference_log_probs: jax.Array | None, mask: jax.Array) -> jax.Array:
    """``clip(log q(y_t | c, y_<t) - log pi_ref(y_t | x, y_<t), -1, 1)`` (jaxrm choice, after RTO, arXiv 2404.18922).

    Experimental: it pays for any rare token that the reward model copies from its source.

    Args:
      log_probs: ``[B, T]`` float, log-prob of the response's token under the reward model.
      reference_log_probs: ``[B, T]`` float, its log-prob under the reference policy.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    return _clipped_log_ratio(log_probs, reference_log_probs, mask)


def dpo(log_probs: jax.Array, reference_log_probs: jax.Array | None, mask: jax.Array) -> jax.Array:
    """``clip(log pi_dpo(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t), -1, 1)`` (RTO, arXiv 2404.18922).

    The reward that direct preference optimization learns implicitly, token by token. The paper adds it to a scalar
    reward; the bound is a jaxrm choice.

    Args:
      log_probs: ``[B, T]`` float, log-prob of the response's token under the policy that DPO trained.
      reference_log_probs: ``[B, T]`` float, its log-prob under the policy that DPO began with.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    return _clipped_log_ratio(log_probs, reference_log_probs, mask)


def scalar(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """A scalar reward model's score on the last response token, 0 on the others.

    Args:
      scores: ``[B]`` float; that of a response of no token is not looked at.
      mask: ``[B, T]`` bool.

    Returns:
      ``[B, T]`` float32.
    """
    check_arrays(mask)
    chex.assert_shape(scores, (mask.shape[0],))
    chex.assert_type(scores, float)
    return jnp.where(last_token(mask), scores.astype(jnp.float32)[:, None], 0.0)


def value_difference(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """``r(x, y_<=t) - r(x, y_<t)``: what each token adds to the score of what is written (RED, arXiv 2411.08302).

    The sum over a response is ``r(x, y) - r(x, empty)``, so no length pays by itself.

    Args:
      scores: ``[B, T + 1]`` float, a scalar reward model's score of the first 0, 1, ... T tokens of the response.
      mask: ``[B, T]`` bool; a response begins in column 0.

    Returns:
      ``[B, T]`` float32.
    """
    check_arrays(mask)
    chex.assert_shape(scores, (mask.shape[0], mask.shape[1] + 1))
    chex.assert_type(scores, float)
    scores = scores.astype(jnp.float32)
    return inside_mask(mask, scores[:, 1:] - scores[:, :-1])


# --- the table of kinds


# --- shapes and padding


def check_arrays(mask: jax.Array, *arrays: jax.Array, dtype: type = float) -> None:
    """``mask`` is ``[B, T]`` bool and the others are of its shape and of the one type."""
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    chex.assert_equal_shape([mask, *arrays])
    chex.assert_type(arrays, dtype)


def inside_mask(mask: jax.Array, values: jax.Array) -> jax.Array:
    """The values as float32, and 0 outside the mask."""
    # Python's numbers alone make a weakly typed array, which would turn bfloat16 beside a bfloat16 one.
    return jnp.where(mask, values, 0.0).astype(jnp.float32)


def _clipped_log_ratio(log_probs: jax.Array, reference_log_probs: jax.Array | None, mask: jax.Array) -> jax.Array:
    assert reference_log_probs is not None, "a ratio compares with a reference policy"
    check_arrays(mask, log_probs, reference_log_probs, dtype=float)
    return inside_mask(
        mask, jnp.clip(log_probs.astype(jnp.float32) - reference_log_probs.astype(jnp.float32), -1.0, 1.0)
    )


def _before_divergence(tags: jax.Array, mask: jax.Array) -> jax.Array:
    """``[B, T]`` bool, True on the response tokens that no - tag precedes and that are + themselves."""
    return mask & (jnp.cumsum(mask & ~tags, axis=1) == 0)
