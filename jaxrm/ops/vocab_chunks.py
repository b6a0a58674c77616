"""What one chunk of the vocabulary adds to the statistics of each token, and how chunks add up."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

Ranges = tuple[tuple[int, int], ...]


class Softmax(NamedTuple):
    """How logits become a distribution.

    Attributes:
      vocab_size: ``V``; rows of a chunk whose id is no less are padding.
      softcap: bound on the absolute logit, or None.
      temperature: divides the capped logits.
      drawable: the ids that the softmax is over, see `is_drawable`.
    """

    vocab_size: int
    softcap: float | None
    temperature: float
    drawable: Ranges


class Sums(NamedTuple):
    """What one chunk of the vocabulary, or several, add to the statistics of each token; float32 but for ``top_id``.

    Attributes:
      top: ``[...]`` the largest logit, finite also where no id of the chunk can be drawn.
      top_id: ``[...]`` int32 its id, the lowest among equals.
      total: ``[...]`` sum of ``exp(logit - top)``.
      weighted: ``[...]`` sum of ``exp(logit - top) logit``.
      target_logit: ``[...]`` logit of the target; 0 where it is in another chunk.
    """

    top: jax.Array
    top_id: jax.Array
    total: jax.Array
    weighted: jax.Array
    target_logit: jax.Array


class SumChunk(Protocol):
    """Sum one chunk of the vocabulary.

    Args:
      hidden: ``[..., D]``.
      weights: ``[rows, D]`` of the head, in any float dtype; row ``i`` is that of id ``first + i * step``.
      targets: ``[...]`` int32.
      first: ``[]`` int32.
      step: the number of chunks.
      softmax: how logits become a distribution.
    """

    def __call__(
        self,
        hidden: jax.Array,
        weights: jax.Array,
        targets: jax.Array,
        first: jax.Array,
        step: int,
        softmax: Softmax,
    ) -> Sums:
        """Sum."""
        ...


def is_drawable(ids: jax.Array, drawable: Ranges) -> jax.Array:
    """Which ``ids [N]`` lie in one of the ranges ``(first, last + 1)``; all of them where there is none."""
    if not drawable:
        return jnp.ones(ids.shape, bool)
    first, end = (jnp.asarray(bounds, jnp.int32)[None] for bounds in zip(*drawable, strict=True))
    return jnp.any((ids[:, None] >= first) & (ids[:, None] < end), axis=1)


def chunk_logits(
    hidden: jax.Array, weights: jax.Array, first: jax.Array, step: int, softmax: Softmax
) -> tuple[jax.Array, jax.Array]:
    """Logits ``[..., rows]`` of one chunk, and the ids of its tokens ``[rows]``; arguments as for `SumChunk`."""
    logits = jnp.einsum("...d,vd->...v", hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softmax.softcap is not None:
        logits = softmax.softcap * jnp.tanh(logits / softmax.softcap)
    logits = logits / softmax.temperature
    ids = jnp.arange(weights.shape[0], dtype=jnp.int32) * step + first
    if weights.shape[0] * step > softmax.vocab_size or softmax.drawable:
        is_token = (ids < softmax.vocab_size) & is_drawable(ids, softmax.drawable)
        logits = jnp.where(jnp.expand_dims(is_token, range(logits.ndim - 1)), logits, -jnp.inf)
    return logits, ids


def sum_in_xla(
    hidden: jax.Array, weights: jax.Array, targets: jax.Array, first: jax.Array, step: int, softmax: Softmax
) -> Sums:
    """`SumChunk` in plain XLA."""
    logits, ids = chunk_logits(hidden, weights, first, step, softmax)
    ids = jnp.expand_dims(ids, range(targets.ndim))
    # A chunk may have no token that can be drawn, and -inf less itself is NaN.
    top = jnp.maximum(jnp.max(logits, axis=-1), jnp.finfo(jnp.float32).min)
    top_id = jnp.min(jnp.where(logits == top[..., None], ids, softmax.vocab_size), axis=-1)
    weight = jnp.exp(logits - top[..., None])
    # A padded row has weight 0 and logit -inf, whose product would be NaN.
    product = jnp.where(weight > 0, weight * logits, 0.0)
    target_logit = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    return Sums(top, top_id, jnp.sum(weight, axis=-1), jnp.sum(product, axis=-1), target_logit)


def together(one: Sums, other: Sums) -> Sums:
    """The sums of two chunks, or of several, as one."""
    top = jnp.maximum(one.top, other.top)
    lowest = jnp.minimum(one.top_id, other.top_id)
    top_id = jnp.where(one.top == other.top, lowest, jnp.where(one.top > other.top, one.top_id, other.top_id))
    shrink, shrink_other = jnp.exp(one.top - top), jnp.exp(other.top - top)
    return Sums(
        top,
        top_id,
        one.total * shrink + other.total * shrink_other,
        one.weighted * shrink + other.weighted * shrink_other,
        one.target_logit + other.target_logit,
    )
