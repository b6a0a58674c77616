"""Attention over a ragged cache on TPU: a Pallas kernel that reads the blocks that a row sees, and no others.

Tiling. The grid is rows by blocks of slots. A step brings one block of all key heads into the chip: keys
``[K, H, block]`` and values ``[K, block, H]``. So they lie in the cache, as the two matrix products want them, and
nothing is transposed. ``block`` is as long as 2 MiB allow, in whole lanes of 128 slots. The softmax runs along the
blocks (Milakov & Gimelshein, arXiv 1805.02867): the largest logit, the sum and the mixed values stay on the chip until
the row's last block.

int8. Codes are converted on the chip, and their scales multiply the logits, and the weights of the values.

Raggedness. The blocks that each row sees are listed before the kernel starts, and the list says which block a step
brings. Steps past its end name the last block again, which the pipeline then does not copy, and compute nothing. So a
row moves the bytes of the blocks that it sees; a step that has nothing to do costs the time of a step, about 0.3
microseconds. A row that sees no key, since its response has ended, names the last block of the row before it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrm.models.cached_attention import (
    HIDDEN_LOGIT,
    CachedKeys,
    Part,
    mask_of_queries,
    read_in_xla,
    seen_blocks,
    stored,
)

_LANES, _SUBLANES = 128, 8
_BLOCKS = (1024, 512, 256, 128)
_BLOCK_BYTES = 2 * 2**20  # of keys; the same of values, and both twice since the next block comes meanwhile


def read(query: jax.Array, past: CachedKeys, *, scale: float, softcap: float | None, interpret: bool = False) -> Part:
    """``Read`` of ``jaxrm.models.cached_attention``; with ``interpret`` on any platform.

    A cache that is no whole number of lanes is read in XLA, which would copy it for the kernel at every token.
    """
    B, K, g, H = query.shape
    S = past.mask.shape[1]
    if S % _LANES:
        return read_in_xla(query, past, scale=scale, softcap=softcap)
    block = block_size(K, H, S, query.dtype.itemsize)
    rows = g + -g % _SUBLANES
    query = jnp.pad(query, ((0, 0), (0, 0), (0, rows - g), (0, 0)))
    mask = mask_of_queries(past, g)
    seen, count = seen_blocks(mask, block)
    is_over = ~jnp.any(mask, axis=(1, 2))
    source = jax.lax.cummax(jnp.where(is_over, 0, jnp.arange(B, dtype=jnp.int32)))
    if mask.shape[1] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, rows - g), (0, 0)))

    arrays, scales = stored(past)

    def by_slot(size: int) -> pl.BlockSpec:
        def index(b: Any, j: Any, *lists: Any) -> tuple[Any, ...]:
            row, number = _place(b, j, *lists)
            return row, 0, number

        return pl.BlockSpec((1, size, block), index)

    def keys_at(b: Any, j: Any, *lists: Any) -> tuple[Any, ...]:
        row, number = _place(b, j, *lists)
        return row, 0, 0, number

    def values_at(b: Any, j: Any, *lists: Any) -> tuple[Any, ...]:
        row, number = _place(b, j, *lists)
        return row, 0, number, 0

    def at_row(b: Any, j: Any, *lists: Any) -> tuple[Any, ...]:
        del j, lists
        return b, 0, 0, 0

    mixed, sums = pl.pallas_call(
        functools.partial(_kernel, scale=scale, softcap=softcap, slots=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, pl.cdiv(S, block)),
            in_specs=[
                pl.BlockSpec((1, K, rows, H), at_row),
                by_slot(mask.shape[1]),
                pl.BlockSpec((1, K, H, block), keys_at),
                pl.BlockSpec((1, K, block, H), values_at),
                *(by_slot(K) for _ in scales),
            ],
            out_specs=[pl.BlockSpec((1, K, rows, H), at_row), pl.BlockSpec((1, K, rows, _LANES), at_row)],
            scratch_shapes=[
                pltpu.VMEM((K, rows, H), jnp.float32),
                pltpu.VMEM((K, rows, _LANES), jnp.float32),
                pltpu.VMEM((K, rows, _LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, rows, _LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * K * g * H * S,
            bytes_accessed=past.nbytes,
            transcendentals=B * K * g * S,
        ),
        name="cached_attention",
        interpret=interpret,
    )(seen, count, source, query, mask.astype(jnp.int32), *arrays, *scales)
    return Part(mixed[:, :, :g], sums[:, :, :g, 0], sums[:, :, :g, 1])


def block_size(heads: int, head_dim: int, slots: int, itemsize: int) -> int:
    """Slots that a step brings of ``heads`` key heads."""
    fitting = (size for size in _BLOCKS if heads * head_dim * size * itemsize <= _BLOCK_BYTES)
    block = next(fitting, _BLOCKS[-1])
    return block if slots > block else slots + -slots % _LANES


def _place(b: Any, j: Any, seen: Any, count: Any, source: Any) -> tuple[Any, Any]:
    """Row and number of the block that step ``j`` of row ``b`` brings: of its own, or the last of the row before."""
    row = source[b]
    last = count[row] - 1
    return row, seen[row, jnp.where(row == b, jnp.minimum(j, last), last)]


def _kernel(
    seen_ref: Any,
    count_ref: Any,
    source_ref: Any,
    query_ref: Any,
    mask_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    *refs: Any,
    scale: float,
    softcap: float | None,
    slots: int,
) -> None:
    *scale_refs, mixed_out, sums_out, mixed_ref, top_ref, total_ref = refs
    b, j = pl.program_id(0), pl.program_id(1)
    block = keys_ref.shape[3]
    row, number = _place(b, j, seen_ref, count_ref, source_ref)

    @pl.when(j == 0)
    def _() -> None:
        mixed_ref[...] = jnp.zeros_like(mixed_ref)
        top_ref[...] = jnp.full_like(top_ref, HIDDEN_LOGIT)
        total_ref[...] = jnp.zeros_like(total_ref)

    @pl.when(j < count_ref[b])
    def _() -> None:
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        query = query_ref[0]
        logits = product(query, keys_ref[0].astype(query.dtype), (((2,), (1,)), ((0,), (0,)))) * scale
        if scale_refs:
            logits *= scale_refs[0][0][:, None]
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        visible, values = mask_ref[...] != 0, values_ref[0].astype(query.dtype)
        if slots % block:  # behind the cache lies anything, and 0 times NaN is NaN
            visible &= number * block + jax.lax.broadcasted_iota(jnp.int32, visible.shape, 2) < slots
            inside = number * block + jax.lax.broadcasted_iota(jnp.int32, (1, block, 1), 1) < slots
            values = jnp.where(inside, values, jnp.zeros_like(values))
        logits = jnp.where(visible & (row == b), logits, HIDDEN_LOGIT)
        before = top_ref[:, :, :1]
        top = jnp.maximum(before, jnp.max(logits, axis=2, keepdims=True))
        shrink, weights = jnp.exp(before - top), jnp.exp(logits - top)
        total = total_ref[:, :, :1] * shrink + jnp.sum(weights, axis=2, keepdims=True)
        if scale_refs:
            weights = jnp.where(visible, weights * scale_refs[1][0][:, None], 0.0)
        mixed = product(weights.astype(query.dtype), values, (((2,), (1,)), ((0,), (0,))))
        mixed_ref[...] = mixed_ref[...] * shrink + mixed
        top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
        total_ref[...] = jnp.broadcast_to(total, total_ref.shape)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        mixed_out[0] = mixed_ref[...]
        lane = jax.lax.broadcasted_iota(jnp.int32, top_ref.shape, 2)
        sums_out[0] = jnp.where(lane == 0, top_ref[...], total_ref[...])
