"""Sums and means over the tokens that count.

A mask is a bool array of its own (`jaxrm.types`): it is never derived from a pad id, since pad may
equal EOS. Values outside the mask are replaced, not multiplied: NaN x 0 is NaN.
"""

import chex
import jax
import jax.numpy as jnp


def masked_sum(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Sum of ``values`` where ``mask`` holds, in float32.

    Args:
      values: ``[...]`` numbers.
      mask: ``[...]`` bool, of the same shape.
      axis: axis to sum over; all of them when None.

    Returns:
      float32; a scalar when ``axis`` is None. NaN and inf outside the mask do not reach it.
    """
    chex.assert_equal_shape([values, mask])
    chex.assert_type(mask, bool)
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0), axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | None = None) -> jax.Array:
    """Mean of ``values`` where ``mask`` holds, in float32; 0 where nothing does.

    Args:
      values: ``[...]`` numbers.
      mask: ``[...]`` bool, of the same shape.
      axis: axis to average over; all of them when None.

    Returns:
      float32; a scalar when ``axis`` is None.
    """
    count = jnp.sum(mask, axis=axis, dtype=jnp.float32)
    return masked_sum(values, mask, axis) / jnp.maximum(count, 1.0)
