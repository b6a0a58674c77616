"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated as Hugging Face stores weights."""

import math

import chex
import jax
import jax.numpy as jnp

from jaxrm.models.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Angle per position ``[H / 2]`` in radians, float32.

    Args:
      head_dim: ``H``, even.
      theta: base of the geometric series.
      scaling: ``linear`` divides every angle by ``factor``; ``llama3`` divides the slow ones, keeps the fast ones
        and blends between (Llama 3.1's ``rope_type``), or None.
    """
    angles = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return angles
    if scaling.kind == "linear":
        return angles / scaling.factor
    turns = scaling.original_max_position * angles / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - keep) * angles / scaling.factor + keep * angles


def rotations(positions: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines ``[B, T, 1, H / 2]`` of ``positions [B, T]`` times ``angles [H / 2]``, float32."""
    phase = positions.astype(jnp.float32)[:, :, None, None] * angles[None, None, None, :]
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate ``x [B, T, N, H]`` by ``cos, sin [B, T, 1, H / 2]``, in float32, back in the dtype of ``x``."""
    chex.assert_rank([x, cos, sin], 4)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
