"""Attention over a ragged cache on GPU: a Pallas kernel, by Triton, that reads the blocks that a row sees.

Tiling. A program has one key head of one row: its queries, filled up to the 16 rows of a tensor core, and a share of
the row's slots, which it reads in blocks of 64 (128 for heads of 64). Keys ``[H, block]`` and values ``[block, H]`` lie
in the cache as the two matrix products want them. The softmax runs along the blocks (Milakov & Gimelshein, arXiv
1805.02867). Where rows and key heads are fewer than twice the multiprocessors, several programs share the slots of a
row, as in Flash-Decoding (Dao et al. 2023), and XLA puts their parts together.

int8. Codes are converted as they come, and their scales multiply the logits, and the weights of the values.

Raggedness. The loops go through a list of the blocks that each row sees. A block that it does not see is not read.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxrm.models.cached_attention import HIDDEN_LOGIT, CachedKeys, Part, mask_of_queries, seen_blocks, stored

_ROWS = 16  # the fewest of a matrix product
_PROGRAMS = 2 * 132  # of an H100's multiprocessors


def read(query: jax.Array, past: CachedKeys, *, scale: float, softcap: float | None, interpret: bool = False) -> Part:
    """``Read`` of ``jaxrm.models.cached_attention``; with ``interpret`` on any platform."""
    B, K, g, H = query.shape
    S = past.mask.shape[1]
    block = block_size(H)
    rows = max(_ROWS, pl.next_power_of_2(g))
    splits = max(1, min(pl.cdiv(_PROGRAMS, B * K), pl.cdiv(S, block)))
    query = jnp.pad(query, ((0, 0), (0, 0), (0, rows - g), (0, 0)))
    mask = mask_of_queries(past, g)
    seen, count = seen_blocks(mask, block)
    if mask.shape[1] > 1:
        mask = jnp.pad(mask, ((0, 0), (0, rows - g), (0, 0)))

    def head(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, k, i: (b, k, *(0 for _ in shape)))

    def row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, k, i: (b, *(0 for _ in shape)))

    arrays, scales = stored(past)
    share = pl.BlockSpec((None, None, None, rows), lambda b, k, i: (b, k, i, 0))
    mixed, top, total = pl.pallas_call(
        functools.partial(_kernel, scale=scale, softcap=softcap, block=block),
        grid=(B, K, splits),
        in_specs=[
            *(row(seen.shape[1]), row(), head(rows, H), row(*mask.shape[1:]), head(H, S), head(S, H)),
            *(head(S) for _ in scales),
        ],
        out_specs=[pl.BlockSpec((None, None, None, rows, H), lambda b, k, i: (b, k, i, 0, 0)), share, share],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, splits, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, splits, rows), jnp.float32),
            jax.ShapeDtypeStruct((B, K, splits, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * K * g * H * S,
            bytes_accessed=past.nbytes,
            transcendentals=B * K * g * S,
        ),
        name="cached_attention",
        interpret=interpret,
    )(seen, count, query, mask, *arrays, *scales)
    highest = jnp.max(top, axis=2)
    shrink = jnp.exp(top - highest[:, :, None])
    mixed = jnp.sum(mixed * shrink[..., None], axis=2)
    return Part(mixed[:, :, :g], highest[:, :, :g], jnp.sum(total * shrink, axis=2)[:, :, :g])


def block_size(head_dim: int) -> int:
    """Slots that a program reads at once."""
    return 128 if head_dim <= 64 else 64


def _kernel(
    seen_ref: Any,
    count_ref: Any,
    query_ref: Any,
    mask_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    *refs: Any,
    scale: float,
    softcap: float | None,
    block: int,
) -> None:
    *scale_refs, mixed_ref, top_ref, total_ref = refs
    (masks, slots), (rows, head_dim) = mask_ref.shape, query_ref.shape
    # This program's share of the row's blocks, rounded up, so that the last ones may have none.
    count = count_ref[...]
    share = pl.cdiv(count, pl.num_programs(2))
    start = pl.program_id(2) * share
    query = query_ref[...]

    def scales_of(ref: Any, here: Any, inside: jax.Array) -> jax.Array:
        return plgpu.load(ref.at[here], mask=inside, other=0.0)[None, :]

    def one_block(place: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        mixed, before, total = carry
        number = seen_ref[place]
        here = pl.ds(number * block, block)
        inside = number * block + jnp.arange(block) < slots
        keys = plgpu.load(keys_ref.at[:, here], mask=inside[None, :], other=0)
        logits = plgpu.dot(query, keys.astype(query.dtype)) * scale
        if scale_refs:
            logits *= scales_of(scale_refs[0], here, inside)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        visible = plgpu.load(mask_ref.at[:, here], mask=jnp.broadcast_to(inside[None, :], (masks, block)), other=False)
        logits = jnp.where(visible, logits, HIDDEN_LOGIT)
        top = jnp.maximum(before, jnp.max(logits, axis=1))
        shrink, weights = jnp.exp(before - top), jnp.exp(logits - top[:, None])
        values = plgpu.load(values_ref.at[here, :], mask=inside[:, None], other=0).astype(query.dtype)
        total = total * shrink + jnp.sum(weights, axis=1)
        if scale_refs:
            weights *= scales_of(scale_refs[1], here, inside)
        mixed = mixed * shrink[:, None] + plgpu.dot(weights.astype(query.dtype), values)
        return mixed, top, total

    zeros = jnp.zeros((rows,), jnp.float32)
    empty = (jnp.zeros((rows, head_dim), jnp.float32), zeros + HIDDEN_LOGIT, zeros)
    mixed, top, total = jax.lax.fori_loop(start, jnp.minimum(start + share, count), one_block, empty)
    mixed_ref[...], top_ref[...], total_ref[...] = mixed, top, total
