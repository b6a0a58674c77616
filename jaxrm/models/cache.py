"""Keys and values of the tokens already read, laid out for decoding."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrm.models.config import ModelConfig
from jaxrm.models.quantized import Int8Array, to_int8

ENDED = -1  # in place of the length of a row that is over
CachedArray = jax.Array | Int8Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedPrompts:
    """Keys and values of G prompts, each of which begins ``n`` rows that lie next to each other.

    Attributes:
      keys: one ``[G, K, H, P]`` for each layer, rotated; as they are, or int8 with a scale for each token and head.
        Tokens are last, those of the values are not: both products of attention then read the cache along its memory.
      values: one ``[G, K, P, H]`` for each layer.
      occupied: ``[G, P]`` bool, False on padding, which is on the left.
      next_position: ``[G]`` int32, position of the token after the prompt.
    """

    keys: tuple[CachedArray, ...]
    values: tuple[CachedArray, ...]
    occupied: jax.Array
    next_position: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens after the prompts: one pair of buffers a layer, so that a step writes in place.

    It is a ring of W columns: every row writes its token into the same column, and then into the next, however long it
    is. So rows that began at different steps need no column of their own to write into, which would be a scatter; a
    row sees the last of its own tokens alone. A row of W tokens fills the ring, and is over.

    Attributes:
      keys: one ``[B, K, H, W]`` for each layer, as in `SharedPrompts`.
      values: one ``[B, K, W, H]`` for each layer.
      cursor: ``[]`` int32, column of the next token.
      lengths: ``[B]`` int32, tokens of each row before it: those in the columns up to the cursor. ``ENDED`` where a row
        is over: it sees no key any more, and what is computed for it means nothing.
      next_position: ``[B]`` int32, position of each row's next token.
    """

    keys: tuple[CachedArray, ...]
    values: tuple[CachedArray, ...]
    cursor: jax.Array
    lengths: jax.Array
    next_position: jax.Array

    @property
    def width(self) -> int:
        """Columns of the ring."""
        return self.keys[0].shape[3]


def bytes_of_a_token(shape: ModelConfig, itemsize: int, stored: str) -> int:
    """Bytes of the keys and values of a token in all layers.

    Args:
      shape: of the model.
      itemsize: bytes of a number in the compute dtype.
      stored: ``compute`` or ``int8``, see ``jaxrm.models.transformer.DecodingStorage``.
    """
    head_bytes = shape.head_dim + 4 if stored == "int8" else shape.head_dim * itemsize
    return 2 * shape.num_layers * shape.num_kv_heads * head_bytes


def empty(prompts: SharedPrompts, n: int, size: int) -> Cache:
    """A ring of ``size`` columns for each of the ``n`` rows that begin with each prompt."""
    rows = prompts.occupied.shape[0] * n

    def zeros(x: jax.Array, columns: int) -> jax.Array:
        shape = list(x.shape)
        shape[0], shape[columns] = rows, size
        return jnp.zeros(shape, x.dtype)

    return Cache(
        keys=jax.tree.map(lambda x: zeros(x, 3), prompts.keys),
        values=jax.tree.map(lambda x: zeros(x, 2), prompts.values),
        cursor=jnp.zeros((), jnp.int32),
        lengths=jnp.zeros((rows,), jnp.int32),
        next_position=jnp.repeat(prompts.next_position, n),
    )


def from_prompts(keys: jax.Array, values: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> SharedPrompts:
    """Prompts as they were read.

    Args:
      keys: ``[L, G, P, K, H]``, rotated.
      values: ``[L, G, P, K, H]``.
      segment_ids: ``[G, P]`` int, 0 for (left) padding.
      positions: ``[G, P]`` int.
    """
    return SharedPrompts(
        keys=tuple(x.transpose(0, 2, 3, 1) for x in keys),
        values=tuple(x.transpose(0, 2, 1, 3) for x in values),
        occupied=segment_ids > 0,
        next_position=jnp.max(jnp.where(segment_ids > 0, positions, -1), axis=1) + 1,
    )


def in_int8(prompts: SharedPrompts) -> SharedPrompts:
    """The prompts with int8 keys and values in place of those in the compute dtype."""
    return dataclasses.replace(
        prompts,
        keys=jax.tree.map(lambda x: to_int8(x, axis=2), prompts.keys),
        values=jax.tree.map(lambda x: to_int8(x, axis=3), prompts.values),
    )


def written(cached: CachedArray, new: jax.Array, index: jax.Array, *, column: int, head_dim: int) -> CachedArray:
    """Keys or values with those of a new token of each row.

    Args:
      cached: of one layer.
      new: ``[B, K, H]``.
      index: ``[]`` int32, the column to write.
      column: which axis the columns are.
      head_dim: which axis H is.
    """
    fresh = jnp.expand_dims(new, column)
    stored = to_int8(fresh, head_dim) if isinstance(cached, Int8Array) else fresh
    return jax.tree.map(lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, index, column), cached, stored)


def widened(prompts: SharedPrompts, width: int) -> SharedPrompts:
    """The prompts with padding up to ``width`` on their left."""
    more, none = (width - prompts.occupied.shape[1], 0), (0, 0)
    return dataclasses.replace(
        prompts,
        keys=jax.tree.map(lambda x: jnp.pad(x, (none, none, none, more)), prompts.keys),
        values=jax.tree.map(lambda x: jnp.pad(x, (none, none, more, none)), prompts.values),
        occupied=jnp.pad(prompts.occupied, (none, more)),
    )


def grown(past: Cache, size: int) -> Cache:
    """The cache as a ring of ``size`` columns, whose first are those of the old one from its oldest token on."""
    width = past.width

    def wider(x: jax.Array, columns: int) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[columns] = (0, size - width)
        return jnp.pad(jnp.roll(x, -past.cursor - 1, axis=columns), padding)

    return dataclasses.replace(
        past,
        keys=jax.tree.map(lambda x: wider(x, 3), past.keys),
        values=jax.tree.map(lambda x: wider(x, 2), past.values),
        cursor=jnp.full_like(past.cursor, width - 1),
    )
