"""One chunk of the vocabulary on TPU: a Pallas kernel from hidden states to sums, whose logits never leave the chip.

Plain XLA writes the logits of a chunk to memory, if they are too many for the chip's, and reads them for the maximum,
the sums and the target. It copies the head, too, since its chunks are of every n-th row. Of 8,192 tokens and gemma-2b
on one v5e it moves 26 GiB, in 35 ms beside 44 ms of product, and takes 1.1 GiB; this kernel moves 16, none of which
wait for the product, and takes none (both of the compiled programs, with a head of 16 bits).

Tiling. The grid is tokens by ids by channels, the last running fastest. A step multiplies ``[1024, 512]`` hidden states
with ``[1024, 512]`` rows of the head, cast on the chip to the dtype of the hidden states, and adds to ``[1024, 1024]``
logits in float32 there. So each of the two is read once for 1,024 rows of the other, and a byte that is read serves in
340 operations or more (512 where the head has 16 bits): the matrix units of a v5e want 240. The chip's memory holds 10
MiB of it. After the last channels the sums of these ids join those of the ids before (Milakov & Gimelshein, arXiv
1805.02867), 64 tokens at a time. Five numbers a token remain. They are the first lanes of the result.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxrm.ops.vocab_chunks import Softmax, Sums
from jaxrm.ops.vocab_kernels import channels_of_a_step

_LANES = 128
_TOKENS, _IDS = 1024, 1024  # of a step, at most
_STRIP = 64  # tokens whose logits are summed at a time
_LOWEST = float(jnp.finfo(jnp.float32).min)
_MOST_IDS = 2**24  # they are carried as float32


def sum_chunk(
    hidden: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    first: jax.Array,
    step: int,
    softmax: Softmax,
    *,
    interpret: bool = False,
) -> Sums:
    """`SumChunk` of ``jaxrm.ops.vocab_chunks``; with ``interpret`` on any platform."""
    N, D, rows = math.prod(targets.shape), hidden.shape[-1], weights.shape[0]
    assert softmax.vocab_size < _MOST_IDS, softmax.vocab_size
    channels = channels_of_a_step(D)
    assert channels is not None, D
    tokens, ids = min(_TOKENS, N + -N % _STRIP), min(_IDS, rows + -rows % _LANES)
    out = pl.pallas_call(
        functools.partial(_kernel, rows=rows, step=step, softmax=softmax),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(N, tokens), pl.cdiv(rows, ids), D // channels),
            in_specs=[
                pl.BlockSpec((tokens, channels), lambda i, j, k, first: (i, k)),
                pl.BlockSpec((ids, channels), lambda i, j, k, first: (j, k)),
                pl.BlockSpec((tokens, 1), lambda i, j, k, first: (i, 0)),
            ],
            out_specs=pl.BlockSpec((tokens, _LANES), lambda i, j, k, first: (i, 0)),
            scratch_shapes=[pltpu.VMEM((tokens, ids), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((N, _LANES), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * N * rows * D,
            bytes_accessed=pl.cdiv(N, tokens) * weights.nbytes + pl.cdiv(rows, ids) * hidden.nbytes,
            transcendentals=N * rows * (1 if softmax.softcap is None else 2),
        ),
        name="vocabulary_sums",
        interpret=interpret,
    )(first.reshape(1), hidden.reshape(N, D), weights, targets.reshape(N, 1).astype(jnp.int32))
    top, top_id, total, weighted, target_logit = (out[:, i].reshape(targets.shape) for i in range(5))
    return Sums(top, top_id.astype(jnp.int32), total, weighted, target_logit)


def _kernel(
    first_ref: Any,
    hidden_ref: Any,
    weights_ref: Any,
    targets_ref: Any,
    sums_ref: Any,
    logits_ref: Any,
    *,
    rows: int,
    step: int,
    softmax: Softmax,
) -> None:
    j, k = pl.program_id(1), pl.program_id(2)
    tokens, ids_in_step = logits_ref.shape
    product = jax.lax.dot_general(
        hidden_ref[...],
        weights_ref[...].astype(hidden_ref.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(k == 0)
    def _() -> None:
        logits_ref[...] = product

    @pl.when(k > 0)
    def _() -> None:
        logits_ref[...] += product

    @pl.when((j == 0) & (k == 0))
    def _() -> None:
        lane = jax.lax.broadcasted_iota(jnp.int32, sums_ref.shape, 1)
        start = jnp.where(lane == 0, _LOWEST, jnp.where(lane == 1, float(softmax.vocab_size), 0.0))
        sums_ref[...] = start.astype(jnp.float32)

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        row = j * ids_in_step + jax.lax.broadcasted_iota(jnp.int32, (1, ids_in_step), 1)
        ids = first_ref[0] + row * step
        is_token = (row < rows) & (ids < softmax.vocab_size)
        if softmax.drawable:
            in_ranges = [(ids >= start) & (ids < end) for start, end in softmax.drawable]
            is_token &= functools.reduce(jnp.logical_or, in_ranges)

        def one_strip(number: jax.Array, _: None) -> None:
            strip = pl.ds(pl.multiple_of(number * _STRIP, _STRIP), _STRIP)
            _add_strip(logits_ref[strip, :], ids, is_token, targets_ref[strip, :], sums_ref, strip, softmax)

        jax.lax.fori_loop(0, tokens // _STRIP, one_strip, None)


def _add_strip(
    logits: jax.Array, ids: jax.Array, is_token: jax.Array, targets: jax.Array, sums_ref: Any, strip: Any,
    softmax: Softmax,
) -> None:  # fmt: skip
    """Add logits ``[strip, ids]`` to the sums of their tokens."""
    if softmax.softcap is not None:
        logits = softmax.softcap * jnp.tanh(logits / softmax.softcap)
    logits = jnp.where(is_token, logits / softmax.temperature, _LOWEST)
    sums = sums_ref[strip, :]
    before, top_id, total, weighted, target_logit = (sums[:, i : i + 1] for i in range(5))
    best = jnp.max(logits, axis=1, keepdims=True)
    best_id = jnp.min(jnp.where((logits == best) & is_token, ids, softmax.vocab_size), axis=1, keepdims=True)
    top = jnp.maximum(before, best)
    shrink = jnp.exp(before - top)
    weight = jnp.where(is_token, jnp.exp(logits - top), 0.0)
    own_target = jnp.sum(jnp.where((ids == targets) & is_token, logits, 0.0), axis=1, keepdims=True)
    results = (
        top,
        jnp.where(best > before, best_id.astype(jnp.float32), top_id),  # of equals the lowest id, which came first
        total * shrink + jnp.sum(weight, axis=1, keepdims=True),
        weighted * shrink + jnp.sum(weight * logits, axis=1, keepdims=True),
        target_logit + own_target,
    )
    lane = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    for i, result in enumerate(results):
        sums = jnp.where(lane == i, result, sums)
    sums_ref[strip, :] = sums
