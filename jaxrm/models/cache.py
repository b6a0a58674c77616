"""Keys and values of the tokens already read, laid out for decoding."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Key-value cache: one pair of buffers a layer, so that a step writes in place and copies nothing else.

    Slot ``s`` of a row holds its ``s``-th token, padding of the prompt included. Where rows share prompts, these are
    in `Prompts`, and slot ``s`` holds the ``s``-th token after them.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """Keys and values of G prompts, of which each begins ``n`` rows that lie next to each other.

    Attributes:
      keys: one ``[G, K, H, P]`` for each layer, rotated.
      values: one ``[G, K, P, H]`` for each layer.
      occupied: ``[G, P]`` bool, False on padding.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    occupied: jax.Array


def branch(past: Cache, n: int, size: int) -> tuple[Prompts, Cache]:
    """Prompts as they are, and an empty cache of ``size`` slots for each of the ``n`` rows that begin with each."""
    rows = past.occupied.shape[0] * n

    def empty(x: jax.Array, slots: int) -> jax.Array:
        shape = list(x.shape)
        shape[0], shape[slots] = rows, size
        return jnp.zeros(shape, x.dtype)

    return Prompts(past.keys, past.values, past.occupied), Cache(
        keys=tuple(empty(x, 3) for x in past.keys),
        values=tuple(empty(x, 2) for x in past.values),
        occupied=jnp.zeros((rows, size), bool),
        length=jnp.zeros((), jnp.int32),
        next_position=jnp.repeat(past.next_position, n),
    )


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
