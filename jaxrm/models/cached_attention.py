"""Attention of one query a row over its cached keys, by the best kernel of the platform.

Every kernel is a function of the same arguments, a ``Read``: it reads one set of cached keys and leaves its softmax
unnormalized. ``attend`` puts the parts of a prompt that rows share and of each row's own tokens together.
"""

import functools
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from jaxrm.models.quantized import Int8Array, codes_beside
from jaxrm.ops import pallas_kernels

KERNELS = pallas_kernels.KERNELS
HIDDEN_LOGIT = float(jnp.finfo(jnp.float32).min)
_HEAD_DIMS = {"tpu": (128, 256), "gpu": (64, 128, 256)}  # of each platform's kernel: whole lanes, and powers of two


class CachedKeys(NamedTuple):
    """Keys and values of one layer, laid out as in ``jaxrm.models.cache.Cache``.

    Attributes:
      keys: ``[B, K, H, S]``, as they are or int8 with a scale for each token and head.
      values: ``[B, K, S, H]``, alike.
      mask: ``[B, S]`` bool, True on those that a query sees. Of shared prompts ``[G, S]``, or ``[B, S]`` where the
        rows of a prompt do not see the same of it. Kernels read the blocks in which it is True somewhere, and no
        others, wherever these lie.
    """

    keys: jax.Array | Int8Array
    values: jax.Array | Int8Array
    mask: jax.Array

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(x.nbytes for x in jax.tree.leaves((self.keys, self.values)))


class Part(NamedTuple):
    """A softmax over some of the keys, not yet divided by its sum; float32.

    Attributes:
      mixed: ``[B, K, g, H]`` sum of ``exp(logit - top) value``.
      top: ``[B, K, g]`` the largest logit.
      total: ``[B, K, g]`` sum of ``exp(logit - top)``. Where a row sees no key, this and ``mixed`` mean nothing, and
        ``top`` is so low that neither has a share beside a part that sees one.
    """

    mixed: jax.Array
    top: jax.Array
    total: jax.Array


class Read(Protocol):
    """Read one set of cached keys.

    Args:
      query: ``[B, K, g, H]``, the ``g`` queries that share each key.
      past: of the same B rows; its mask is ``[B, S]``, or ``[B n, S]`` for n parts of the queries of each row.
      scale: factor on the logits.
      softcap: bound on the absolute logit, or None.
    """

    def __call__(self, query: jax.Array, past: CachedKeys, *, scale: float, softcap: float | None) -> Part:
        """Read."""
        ...


def choose(kernel: str, platform: str, dtype: jnp.dtype, head_dim: int) -> Read:
    """The kernel that ``resolve`` names."""
    if resolve(kernel, platform, dtype, head_dim) == "xla":
        return read_in_xla
    from jaxrm.models import cached_attention_gpu, cached_attention_tpu

    return {"tpu": cached_attention_tpu.read, "gpu": cached_attention_gpu.read}[platform]


def resolve(kernel: str, platform: str, dtype: jnp.dtype, head_dim: int) -> str:
    """Name of the kernel for a platform, ``xla`` or ``pallas``.

    Args:
      kernel: one of ``KERNELS``; ``auto`` takes Pallas wherever ``pallas`` is not refused.
      platform: ``cpu``, ``gpu`` or ``tpu``, of the devices that will run it.
      dtype: of queries and cache.
      head_dim: ``H``.

    Raises:
      UserError: for an unknown name, and for ``pallas`` where it has no kernel.
    """
    obstacles = dict.fromkeys(_HEAD_DIMS, "") | {"gpu": pallas_kernels.obstacle_of_dtype(dtype)}
    for home, sizes in _HEAD_DIMS.items():
        if head_dim not in sizes:
            these = " or ".join(map(str, sizes))
            obstacles[home] = f"needs heads of {these} on {home.upper()}, but the model's have {head_dim}"
    return pallas_kernels.resolve("model.cached_attention", kernel, platform, obstacles)


def block_size(platform: str, heads: int, head_dim: int, slots: int, itemsize: int) -> int:
    """Slots that the kernel of a platform reads at once; all of them where it has none.

    Args:
      platform: of the devices.
      heads: key heads on a device.
      head_dim: ``H``.
      slots: of the cache.
      itemsize: bytes of a number in the compute dtype.
    """
    from jaxrm.models import cached_attention_gpu, cached_attention_tpu

    if platform == "gpu":
        return cached_attention_gpu.block_size(head_dim)
    return cached_attention_tpu.block_size(heads, head_dim, slots, itemsize) if platform == "tpu" else slots


def attend(
    query: jax.Array,
    own: CachedKeys,
    prompts: CachedKeys | None = None,
    *,
    scale: float,
    softcap: float | None,
    read: Read | None = None,
) -> jax.Array:
    """Attention of one query a row over its cached keys.

    Args:
      query: ``[B, N, H]``.
      own: keys of each row. What a query that sees none at all attends to means nothing, but is finite.
      prompts: keys of G prompts, each seen by the ``B / G`` rows that lie next to each other; they are read once for
        all of these. None where ``own`` has them.
      scale: factor on the logits.
      softcap: bound on the absolute logit, or None.
      read: kernel; None for ``read_in_xla``.

    Returns:
      ``[B, N, H]`` in the dtype of ``query``.
    """
    B, N, H = query.shape
    K = own.keys.shape[1]
    chex.assert_shape(own.mask, (B, own.keys.shape[3]))
    read = functools.partial(read or read_in_xla, scale=scale, softcap=softcap)
    grouped = query.reshape(B, K, N // K, H)
    part = read(grouped, own)
    if prompts is not None:
        part = _together(part, _read_shared(read, grouped, prompts))
    return (part.mixed / part.total[..., None]).reshape(B, N, H).astype(query.dtype)


def _read_shared(read: functools.partial[Part], query: jax.Array, prompts: CachedKeys) -> Part:
    """The part ``[B, K, g]`` of prompts ``[G, ...]``; each is read once for the queries of all of its rows."""
    B, K, g, _ = query.shape
    G = prompts.keys.shape[0]
    n = B // G
    by_prompt = query.reshape(G, n, K, g, -1).swapaxes(1, 2).reshape(G, K, n * g, -1)

    def by_row(x: jax.Array) -> jax.Array:  # [G, K, n g, ...] -> [B, K, g, ...]
        return x.reshape(G, K, n, g, *x.shape[3:]).swapaxes(1, 2).reshape(B, K, g, *x.shape[3:])

    return Part(*map(by_row, read(by_prompt, prompts)))


def _together(one: Part, other: Part) -> Part:
    """One softmax over the keys of both. Put together are its largest logit and its sums, not the logits, which are
    large."""
    top = jnp.maximum(one.top, other.top)
    shares = [jnp.exp(part.top - top) for part in (one, other)]
    mixed = one.mixed * shares[0][..., None] + other.mixed * shares[1][..., None]
    return Part(mixed, top, one.total * shares[0] + other.total * shares[1])


def read_in_xla(query: jax.Array, past: CachedKeys, *, scale: float, softcap: float | None) -> Part:
    """``Read`` in plain XLA, on any platform: all slots of the cache, whatever the mask."""
    multiply = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    keys, values = past.keys, past.values
    if isinstance(keys, Int8Array):
        logits = multiply("bkgh,bkhs->bkgs", query, codes_beside(keys.codes, query)) * keys.scales * scale
    else:
        logits = multiply("bkgh,bkhs->bkgs", query, keys) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask_of_queries(past, query.shape[2])[:, None], logits, HIDDEN_LOGIT)
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - top[..., None])
    if isinstance(values, Int8Array):
        scaled = (weights * values.scales.swapaxes(2, 3)).astype(query.dtype)
        mixed = multiply("bkgs,bksh->bkgh", scaled, codes_beside(values.codes, scaled))
    else:
        mixed = multiply("bkgs,bksh->bkgh", weights.astype(query.dtype), values)
    return Part(mixed, top, jnp.sum(weights, axis=-1))


def stored(past: CachedKeys) -> tuple[list[jax.Array], list[jax.Array]]:
    """Keys and values as kernels take them, and the scales ``[B, K, S]`` of both; no scales unless they are int8."""
    arrays = [past.keys, past.values]
    codes = [x.codes if isinstance(x, Int8Array) else x for x in arrays]
    B, K, _, S = past.keys.shape
    return codes, [x.scales.reshape(B, K, S) for x in arrays if isinstance(x, Int8Array)]


def mask_of_queries(past: CachedKeys, num_queries: int) -> jax.Array:
    """The mask ``[B, 1, S]``, or ``[B, g, S]`` where it is not the same for all ``g`` queries of a row."""
    (rows, slots), B = past.mask.shape, past.keys.shape[0]
    mask = past.mask.reshape(B, rows // B, slots)
    return mask if rows == B else jnp.repeat(mask, num_queries * B // rows, axis=1)


def seen_blocks(mask: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The blocks of ``block`` slots in which each row of ``mask [B, m, S]`` sees a key.

    Returns:
      ``[B, S / block]`` int32, their numbers, of which the first ``[B]`` int32 mean something. A row that sees no key
      has block 0.
    """
    padded = jnp.pad(jnp.any(mask, axis=1), ((0, 0), (0, -mask.shape[2] % block)))
    is_seen = jnp.any(padded.reshape(mask.shape[0], -1, block), axis=2)
    numbers = jnp.arange(is_seen.shape[1], dtype=jnp.int32)
    place = jnp.cumsum(is_seen, axis=1, dtype=jnp.int32) - 1
    is_at = is_seen[:, None] & (place[:, None] == numbers[None, :, None])  # [B, place, number]
    return jnp.sum(is_at * numbers[None, None], axis=2), jnp.maximum(place[:, -1] + 1, 1)
