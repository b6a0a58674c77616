"""Log-probs, entropy and argmax over a vocabulary, chunk by chunk.

The logits ``[..., V]`` of a 256,000-token vocabulary are by far the largest array of a training step, and most often
the one that does not fit. They need not exist: all that a loss or a reward needs of them is a running sum over the
vocabulary. One pass over chunks of the head computes it forward; a second pass recomputes each chunk backward. This is
the online softmax of Milakov & Gimelshein, arXiv 1805.02867, and the chunked cross-entropy of Wijmans et al., "Cut Your
Losses", arXiv 2411.09009.

Chunk ``c`` of ``n`` takes rows ``c, c + n, c + 2n, ...`` of the head. So a head sharded over its rows stays sharded in
every chunk, and no device ever gathers it.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxrm.ops.vocab_chunks import Ranges, Softmax, SumChunk, Sums, chunk_logits, sum_in_xla, together

DEFAULT_CHUNK = 4096


class TokenStatistics(NamedTuple):
    """Statistics of each token from one pass over the vocabulary, in float32 except ``argmax``.

    Attributes:
      log_probs: ``[...]`` log-prob of the target token.
      entropy: ``[...]`` entropy of the distribution, in nats.
      argmax: ``[...]`` int32 most likely token (the lowest id among equals); has no gradient.
      max_log_prob: ``[...]`` log-prob of that token; has no gradient.
    """

    log_probs: jax.Array
    entropy: jax.Array
    argmax: jax.Array
    max_log_prob: jax.Array


class Chunks(NamedTuple):
    """How the vocabulary is gone through forward; backward it is always in plain XLA.

    Attributes:
      sum_chunk: kernel, see ``jaxrm.ops.vocab_kernels``; None for plain XLA.
      size: most rows of the head in one chunk of the kernel.
    """

    sum_chunk: SumChunk | None = None
    size: int = DEFAULT_CHUNK


def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    drawable: Ranges = (),
    chunk_size: int = DEFAULT_CHUNK,
    forward: Chunks | None = None,
) -> TokenStatistics:
    """Statistics of ``softmax(cap(hidden . head^T) / temperature)`` without the ``[..., V]`` array.

        cap(z) = softcap * tanh(z / softcap), the identity when softcap is None

    Args:
      hidden: ``[..., D]`` hidden states; their dtype is that of the matrix products, which add up in float32.
      head: ``[V, D]`` output embedding.
      targets: ``[...]`` int token ids in ``[0, V)``.
      softcap: bound on the absolute logit (Gemma 2), or None.
      temperature: divides the capped logits. It is the same for every log-prob of a run.
      drawable: the ids that the softmax is over, see ``jaxrm.ops.vocab_chunks.is_drawable``.
      chunk_size: most rows of the head in one chunk. Memory is ``[..., chunk_size]`` in float32.
      forward: a kernel for the pass forward, and its chunks; None for plain XLA with ``chunk_size``.

    Returns:
      ``TokenStatistics``; ``log_probs`` and ``entropy`` are differentiable in ``hidden`` and ``head``.
    """
    chex.assert_rank(head, 2)
    chex.assert_equal_shape_prefix([hidden, targets], targets.ndim)
    chex.assert_axis_dimension(hidden, -1, head.shape[1])
    softmax = Softmax(head.shape[0], softcap, temperature, drawable)
    return TokenStatistics(
        *_statistics(hidden, head, targets, softmax, chunk_size, forward or Chunks(None, chunk_size))
    )


def linear_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    chunk_size: int = DEFAULT_CHUNK,
) -> jax.Array:
    """Cross-entropy ``[...]`` in nats of the targets, unreduced: ``-log softmax(cap(hidden . head^T))[target]``.

    Shapes as in ``token_statistics``.
    """
    return -token_statistics(hidden, head, targets, softcap=softcap, chunk_size=chunk_size).log_probs


def number_of_chunks(vocab_size: int, chunk_size: int) -> int:
    """Fewest chunks of at most ``chunk_size`` rows, where possible a number that divides the vocabulary.

    A number that does not divide it costs a padded copy of the head. Up to four times as many chunks cost less.
    """
    fewest = -(-vocab_size // chunk_size)
    return next((n for n in range(fewest, 4 * fewest + 1) if vocab_size % n == 0), fewest)


def _chunked_head(head: jax.Array, chunk_size: int) -> jax.Array:
    """A view ``[rows, n, D]`` of the head, padded where necessary. ``[:, c]`` is chunk ``c``."""
    n = number_of_chunks(head.shape[0], chunk_size)
    padded = jnp.pad(head, ((0, -head.shape[0] % n), (0, 0)))
    return padded.reshape(-1, n, head.shape[1])


def _head_gradient(hidden: jax.Array, d_logits: jax.Array) -> jax.Array:
    """Gradient ``[rows, D]``, float32, of the rows of the head that made the logits ``[..., rows]``."""
    axes = tuple(range(hidden.ndim - 1))
    if hidden.dtype != jnp.float32:
        # XLA on CPU has no product of two 16-bit arrays whose result is transposed.
        return jax.lax.dot_general(d_logits, hidden, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)
    # hidden^T d_logits, since XLA on CPU would otherwise transpose the far larger logits.
    contraction = ((tuple(axis + 1 for axis in axes), axes), ((), ()))
    return jax.lax.dot_general(jnp.moveaxis(hidden, -1, 0), d_logits, contraction).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _statistics(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, softmax: Softmax, chunk_size: int, forward: Chunks
) -> tuple[jax.Array, ...]:
    del chunk_size
    return _forward(hidden, head, targets, softmax, forward)[0]


def _forward_to_train(
    hidden: Any, head: Any, targets: Any, softmax: Softmax, chunk_size: int, forward: Chunks
) -> tuple[tuple[jax.Array, ...], tuple[Any, ...]]:
    del chunk_size
    outputs, residuals = _forward(hidden.value, head.value, targets.value, softmax, forward)
    return outputs, (*residuals, () if head.perturbed else None)


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, softmax: Softmax, forward: Chunks
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    chunks = _chunked_head(head, forward.size)
    n = chunks.shape[1]
    sum_chunk = forward.sum_chunk or sum_in_xla

    def one_chunk(sums: Sums, chunk: jax.Array) -> tuple[Sums, None]:
        weights = jax.lax.dynamic_index_in_dim(chunks, chunk, axis=1, keepdims=False)
        return together(sums, sum_chunk(hidden, weights, targets, chunk, n, softmax)), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = Sums(
        zeros + jnp.finfo(jnp.float32).min, jnp.full(targets.shape, head.shape[0], jnp.int32), zeros, zeros, zeros
    )
    sums, _ = jax.lax.scan(one_chunk, start, jnp.arange(n, dtype=jnp.int32))
    top, top_id, total, weighted, target_logit = sums
    log_normalizer = top + jnp.log(total)
    entropy = log_normalizer - weighted / total
    outputs = (target_logit - log_normalizer, entropy, top_id, top - log_normalizer)
    return outputs, (hidden, head, targets, log_normalizer, entropy)


def _backward(
    softmax: Softmax,
    chunk_size: int,
    forward: Chunks,
    residuals: tuple[jax.Array, ...],
    cotangents: tuple[Any, ...],
) -> tuple[jax.Array, jax.Array | None, None]:
    del forward
    # The last is () or None, since a flag would come back as an array.
    hidden, head, targets, log_normalizer, entropy, is_trained = residuals
    d_log_prob, d_entropy = (None if isinstance(x, SymbolicZero) else x for x in cotangents[:2])
    chunks = _chunked_head(head, chunk_size)

    def one_chunk(carry: tuple[Any, ...], chunk: jax.Array) -> tuple[tuple[Any, ...], None]:
        d_hidden, d_chunks = carry
        weights = jax.lax.dynamic_index_in_dim(chunks, chunk, axis=1, keepdims=False).astype(hidden.dtype)
        logits, ids = chunk_logits(hidden, weights, chunk, chunks.shape[1], softmax)
        ids = jnp.expand_dims(ids, range(targets.ndim))
        log_p = logits - log_normalizer[..., None]
        p = jnp.exp(log_p)
        # d log p_y / d l_v = 1[v = y] - p_v    and    d H / d l_v = -p_v (log p_v + H)
        d_logits = (
            jnp.zeros_like(p) if d_log_prob is None else d_log_prob[..., None] * ((ids == targets[..., None]) - p)
        )
        if d_entropy is not None:  # most losses have no part of it
            d_logits -= d_entropy[..., None] * jnp.where(p > 0, p * (log_p + entropy[..., None]), 0.0)
        d_logits /= softmax.temperature
        if softmax.softcap is not None:
            capped = jnp.where(logits > -jnp.inf, logits * softmax.temperature / softmax.softcap, 0.0)
            d_logits *= 1.0 - capped**2
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += jnp.einsum("...v,vd->...d", d_logits, weights, preferred_element_type=jnp.float32)
        if d_chunks is None:
            return (d_hidden, None), None
        d_weights = _head_gradient(hidden, d_logits)
        d_chunks = jax.lax.dynamic_update_index_in_dim(d_chunks, d_weights.astype(head.dtype), chunk, axis=1)
        return (d_hidden, d_chunks), None

    # A head that is not trained needs no gradient, which is as large as the head.
    d_head = None if is_trained is None else jnp.zeros(chunks.shape, head.dtype)
    start: tuple[Any, ...] = (jnp.zeros(hidden.shape, jnp.float32), d_head)
    (d_hidden, d_chunks), _ = jax.lax.scan(one_chunk, start, jnp.arange(chunks.shape[1], dtype=jnp.int32))
    if d_chunks is None:
        return d_hidden.astype(hidden.dtype), None, None
    d_head = d_chunks.reshape(-1, head.shape[1])[: head.shape[0]]
    return d_hidden.astype(hidden.dtype), d_head, None


_statistics.defvjp(_forward_to_train, _backward, symbolic_zeros=True)
