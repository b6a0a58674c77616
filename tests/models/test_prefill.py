"""Prompts that are read in chunks: the same cache and tokens as read at once, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support.decoders import TINY, abstract_decoder, random_decoder

from jaxrm.models import prefill
from jaxrm.models.transformer import positions_from_mask

CONFIG = dataclasses.replace(
    TINY, num_heads=4, num_kv_heads=2, sliding_window=5, layer_is_sliding=(True, False), attention_softcap=5.0
)


def test_chunks_give_the_cache_of_the_whole_prompt():
    """Nine columns in chunks of four, behind a window and not."""
    graphdef, params = random_decoder(CONFIG)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (3, 9)).astype(np.int32)
    mask = np.arange(9)[None] >= np.array([[0], [3], [8]])

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, params)
        hidden, whole = model.prefill(
            tokens, positions=positions_from_mask(jnp.asarray(mask)), segment_ids=jnp.asarray(mask, jnp.int32)
        )
        return (hidden[:, -1], whole), prefill.in_chunks(model, jnp.asarray(tokens), jnp.asarray(mask), 4)

    (hidden, whole), (last, chunked) = both(params)
    np.testing.assert_allclose(last, hidden, atol=1e-5)
    np.testing.assert_array_equal(chunked.occupied, whole.occupied)
    np.testing.assert_array_equal(chunked.next_position, whole.next_position)
    for ours, theirs in zip(chunked.keys + chunked.values, whole.keys + whole.values, strict=True):
        seen = mask[:, None, None] if ours.shape[3] == 9 else mask[:, None, :, None]
        np.testing.assert_allclose(np.where(seen, ours, 0), np.where(seen, theirs, 0), atol=1e-5)


def test_the_memory_of_chunks_does_not_grow_with_the_prompt():
    """Beside keys and values; four times the columns."""
    graphdef, params = abstract_decoder(CONFIG)

    def beside(width):
        ids, mask = (jax.ShapeDtypeStruct((2, width), dtype) for dtype in (jnp.int32, jnp.bool_))

        def read(params, ids, mask):
            model = nnx.merge(graphdef, params)
            reading = prefill.empty(model, 2, width)
            return prefill.read_chunk(model, reading, ids, mask, jnp.asarray(1), 64)

        memory = jax.jit(read).lower(params, ids, mask).compile().memory_analysis()
        return memory.temp_size_in_bytes

    cache = 2 * 2 * 2 * 8 * 2 * 4  # bytes of a column: keys and values, layers, prompts, head size, heads, float32
    assert beside(1024) - beside(256) <= 768 * (cache + 64)


def test_chunks_are_even_and_no_longer_than_asked_for():
    sizes = [prefill.chunk_size(width, 1024) for width in (64, 1024, 1025, 2048, 3000)]
    assert sizes == [None, None, 576, 1024, 1024]
