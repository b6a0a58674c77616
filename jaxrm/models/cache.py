"""Keys and values of the tokens already read, laid out for decoding."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Key-value cache: one pair of buffers a layer, so that a step writes in place and copies nothing else.

    Slot ``s`` of a row holds its ``s``-th token, padding of the prompt included.

    Attributes:
      keys: one ``[B, K, H, S]`` for each layer, rotated. Slots are last, those of the values are not: both products of
        attention then read the cache along its memory.
      values: one ``[B, K, S, H]`` for each layer.
      occupied: ``[B, S]`` bool, True on slots that hold a token that may be seen (not padding).
      length: ``[]`` int32, number of slots written, the same for every row.
      next_position: ``[B]`` int32, position of each row's next token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    occupied: jax.Array
    length: jax.Array
    next_position: jax.Array


def from_prompt(keys: jax.Array, values: jax.Array, segment_ids: jax.Array, positions: jax.Array, size: int) -> Cache:
    """Cache that holds a prompt and has room for ``size`` slots in all.

    Args:
      keys: ``[L, B, P, K, H]`` of the prompt, rotated.
      values: ``[L, B, P, K, H]``.
      segment_ids: ``[B, P]`` int, 0 for (left) padding.
      positions: ``[B, P]`` int.
      size: slots, at least ``P``.
    """
    padding = size - keys.shape[2]
    assert padding >= 0, (size, keys.shape)

    none = (0, 0)
    return Cache(
        keys=tuple(jnp.pad(x.transpose(0, 2, 3, 1), (none, none, none, (0, padding))) for x in keys),
        values=tuple(jnp.pad(x.transpose(0, 2, 1, 3), (none, none, (0, padding), none)) for x in values),
        occupied=jnp.pad(segment_ids > 0, ((0, 0), (0, padding))),
        length=jnp.asarray(keys.shape[2], jnp.int32),
        next_position=jnp.max(jnp.where(segment_ids > 0, positions, -1), axis=1) + 1,
    )
