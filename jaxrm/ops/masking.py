"""Sums and means under a mask.

A mask is a bool array of its own (``jaxrm.types``). It is never derived from a pad id, since pad may equal EOS. Values
outside the mask are replaced, not multiplied, since NaN x 0 is NaN.
"""

import chex
import jax
import jax.numpy as jnp


def masked_sum(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Sum of ``values`` where ``mask`` is True, in float32.

    Args:
      values: ``[...]`` numbers.
      mask: ``[...]`` bool, of the same shape.
      axis: axis to sum over; all of them when None.

    Returns:
      float32, a scalar when ``axis`` is None. NaN and inf outside the mask have no effect.
    """
    chex.assert_equal_shape([values, mask])
    chex.assert_type(mask, bool)
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0), axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of ``values`` where ``mask`` is True, in float32; 0 under an empty mask.

    Args:
      values: ``[...]`` numbers.
      mask: ``[...]`` bool, of the same shape.
      axis: axis to average over; all of them when None.

    Returns:
      float32; a scalar when ``axis`` is None.
    """
    count = jnp.sum(mask, axis=axis, dtype=jnp.float32)
    return masked_sum(values, mask, axis) / jnp.maximum(count, 1.0)


def masked_whiten(values: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """``(x - mean) / sqrt(variance + 1e-8)`` over the tokens where ``mask`` is True, in float32.

    Mean and (population) variance are taken over all masked tokens of the batch; each token counts once.

    Args:
      values: ``[B, T]`` numbers.
      mask: ``[B, T]`` bool.
      shift_mean: whether the mean becomes 0; if not, values are only scaled about their mean.

    Returns:
      ``[B, T]`` float32, 0 outside the mask. A single masked token is its own mean and becomes 0.
    """
    mean = masked_mean(values, mask)
    # Replaced before the root: values outside the mask would otherwise reach the gradient.
    from_mean = jnp.where(mask, values.astype(jnp.float32) - mean, 0.0)
    whitened = from_mean * jax.lax.rsqrt(masked_mean(jnp.square(from_mean), mask) + 1e-8)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def last_token(mask: jax.Array) -> jax.Array:
    """The last token of each row: ``[B, T]`` bool, True on the last token of ``mask [B, T]`` and nowhere else.

    A row without a token has no True.
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, bool)
    return mask & (jax.lax.cumsum(mask.astype(jnp.int32), axis=1, reverse=True) == 1)
