"""Prompts read in chunks, so that what is computed of them at once does not grow with their length.

A chunk of every prompt goes through all layers, writes its keys and values, and sees those of the chunks before it. So
beside keys and values the memory is that of a chunk, and between two chunks something else can be done: a stream writes
tokens of other responses (chunked prefill, Agrawal et al. 2023, Sarathi, arXiv 2308.16369). Sums are those of the
whole prompt, in another order.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrm.models import cache
from jaxrm.models.transformer import Decoder, positions_from_mask

_MULTIPLE = 64  # of columns, in a chunk
_HIDDEN_LOGIT = -1e30
_KV = (None, "batch", None, "kv_heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
    """G prompts of which some chunks are read.

    Attributes:
      keys: ``[L, G, P, K, H]``, rotated; those of the chunks to come are 0.
      values: ``[L, G, P, K, H]``.
      hidden: ``[G, D]`` of the last column that is read, after the final norm.
    """

    keys: jax.Array
    values: jax.Array
    hidden: jax.Array


def chunk_size(width: int, longest: int) -> int | None:
    """Columns of a chunk, for prompts of ``width`` columns; None where they are read at once.

    Args:
      width: of the prompts.
      longest: chunk.
    """
    if width <= longest:
        return None
    even = -(-width // -(-width // longest))
    return min(-(-even // _MULTIPLE) * _MULTIPLE, longest)


def in_chunks(model: Decoder, tokens: jax.Array, mask: jax.Array, size: int) -> tuple[jax.Array, cache.SharedPrompts]:
    """Hidden states ``[G, D]`` of the last token of each prompt, and keys and values of all: ``Decoder.prefill``.

    Args:
      model: the decoder.
      tokens: ``[G, P]`` int32, padded on the left.
      mask: ``[G, P]`` bool, False on padding.
      size: columns of a chunk.
    """
    count = -(-tokens.shape[1] // size)

    def read(number: jax.Array, reading: Reading) -> Reading:
        return read_chunk(model, reading, tokens, mask, number, size)

    reading = jax.lax.fori_loop(0, count, read, empty(model, tokens.shape[0], count * size))
    return reading.hidden, read_prompts(model, reading, mask)


def empty(model: Decoder, prompts: int, width: int) -> Reading:
    """So many prompts before the first chunk; ``width`` is a whole number of chunks."""
    config = model.config
    shape = (config.num_layers, prompts, width, config.num_kv_heads, config.head_dim)
    keys, values = (model.constrain(jnp.zeros(shape, model.dtype), _KV) for _ in range(2))
    return Reading(keys, values, jnp.zeros((prompts, config.hidden_size), model.dtype))


def read_chunk(
    model: Decoder, reading: Reading, tokens: jax.Array, mask: jax.Array, number: jax.Array | int, size: int
) -> Reading:
    """The prompts with chunk ``number`` read, from 0; those before it are.

    Args:
      model: the decoder.
      reading: before; its width is a whole number of chunks, the first of which begins with more padding.
      tokens: ``[G, P]`` int32, padded on the left.
      mask: ``[G, P]`` bool, False on padding.
      number: of the chunk.
      size: columns of a chunk.
    """
    config, width = model.config, reading.keys.shape[2]
    more = ((0, 0), (width - tokens.shape[1], 0))
    tokens, mask = jnp.pad(tokens, more), jnp.pad(mask, more)
    chunk = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=number * size, slice_size=size, axis=1)
    full, sliding = model.rotations(chunk(positions_from_mask(mask)))
    graphdef, stacked = nnx.split(model.layers)
    flags = config.layer_is_sliding or (False,) * config.num_layers

    def one_layer(carry: Any, inputs: Any) -> tuple[Any, None]:
        x, keys, values = carry
        state, is_sliding, i = inputs
        layer = nnx.merge(graphdef, state)
        rotation = jax.tree.map(lambda near, far: jnp.where(is_sliding, near, far), sliding, full)
        query, key, value = layer.attention.qkv(layer.attention_norm(x), rotation)
        place = (i, 0, number * size, 0, 0)
        keys, values = (
            model.constrain(jax.lax.dynamic_update_slice(old, new[None], place), _KV)
            for old, new in ((keys, key), (values, value))
        )
        window = jnp.where(is_sliding, config.sliding_window or 0, width)
        attended = _attend(model, query, (keys, values), mask, (i, number), window)
        return (model.constrain(layer.output_and_mlp(x, attended), ("batch", "sequence", None)), keys, values), None

    carry = model.embed(chunk(tokens)), reading.keys, reading.values
    layers = stacked, jnp.asarray(flags), jnp.arange(config.num_layers)
    (x, keys, values), _ = jax.lax.scan(one_layer, carry, layers)
    return Reading(keys, values, model.final_norm(x[:, -1]))


def read_prompts(model: Decoder, reading: Reading, mask: jax.Array) -> cache.SharedPrompts:
    """The cache of prompts that are read whole.

    Args:
      model: the decoder.
      reading: after the last chunk.
      mask: ``[G, P]`` bool, False on padding.
    """
    keys, values = (x[:, :, x.shape[2] - mask.shape[1] :] for x in (reading.keys, reading.values))
    return model.as_prompts((keys, values), mask.astype(jnp.int32), positions_from_mask(mask))


def _attend(
    model: Decoder,
    query: jax.Array,
    kv: tuple[jax.Array, jax.Array],
    mask: jax.Array,
    place: tuple[jax.Array, jax.Array | int],
    window: jax.Array,
) -> jax.Array:
    """Attention of a chunk to itself and those before it, one after another, with a running softmax.

    Args:
      model: the decoder.
      query: ``[G, C, N, H]``.
      kv: keys and values of all layers.
      mask: ``[G, P]`` bool, False on padding.
      place: numbers of the layer and of the chunk.
      window: tokens a token sees, itself included.

    Returns:
      ``[G, C, N, H]``, in the compute dtype.
    """
    G, C, N, H = query.shape
    K, softcap = kv[0].shape[3], model.config.attention_softcap
    layer, number = place
    grouped = query.reshape(G, C, K, N // K, H)
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    column = jnp.arange(C)

    def read(block: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed, top, total = so_far
        start = (layer, 0, block * C, 0, 0)
        keys, values = (jax.lax.dynamic_slice(x, start, (1, G, C, K, H))[0] for x in kv)
        logits = multiply("gckih,gskh->gkics", grouped, keys) * model.scale
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        distance = (number - block) * C + column[:, None] - column[None]
        occupied = jax.lax.dynamic_slice_in_dim(mask, block * C, C, axis=1)
        visible = ((distance >= 0) & (distance < window))[None] & occupied[:, None]
        logits = jnp.where(visible[:, None, None], logits, _HIDDEN_LOGIT)
        highest = jnp.maximum(top, logits.max(axis=-1))
        shrink, weights = jnp.exp(top - highest), jnp.exp(logits - highest[..., None])
        new = multiply("gkics,gskh->gkich", weights.astype(values.dtype), values)
        return mixed * shrink[..., None] + new, highest, total * shrink + weights.sum(axis=-1)

    def one_block(block: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        after: tuple[jax.Array, ...] = jax.lax.cond(block <= number, read, lambda _, same: same, block, so_far)
        return after

    rows = (G, K, N // K, C)
    nothing = (jnp.zeros((*rows, H)), jnp.full(rows, _HIDDEN_LOGIT), jnp.zeros(rows))
    # A fixed number of turns, so that plans can count them.
    mixed, _, total = jax.lax.fori_loop(0, kv[0].shape[2] // C, one_block, nothing)
    return (mixed / total[..., None]).transpose(0, 3, 1, 2, 4).reshape(G, C, N, H).astype(query.dtype)
