"""Prompts answered one after another: the same tokens as all at once, and nothing compiled twice."""

import dataclasses

import jax
import numpy as np
import pytest
from support.decoders import TINY, abstract_decoder, random_decoder

from jaxrm.models import prefill, stream
from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig, response_keys

CONFIG = dataclasses.replace(TINY, num_layers=1, sliding_window=3, layer_is_sliding=(True,))
PROGRAMS = ("_begin", "_chunk_read", "_unread", "_burst", "_grown", "_picked", "_empty", "_unstack")


@pytest.mark.slow
def test_answers_in_a_stream_are_those_of_one_batch(monkeypatch):
    """Slots that become sixteen and eight, a cache that grows twice, prompts of two widths, a limit for each.

    Those of the larger width are read in two chunks, and in three where all are written at once.
    """
    monkeypatch.setattr(stream, "_FIRST_WIDTH", 4)
    monkeypatch.setattr(stream, "_LENGTH_BUCKET", 4)
    monkeypatch.setattr(stream, "_BURST", 5)
    graphdef, params = random_decoder(CONFIG)
    sampling, rng, G = SamplingConfig(12), np.random.default_rng(0), 70
    prompts = rng.integers(0, 61, (G, 8)).astype(np.int32)
    mask = np.arange(8)[None] >= 8 - rng.integers(1, 9, (G, 1))
    limits, keys = np.minimum(rng.geometric(1 / 6, G), 12).astype(np.int32), response_keys(jax.random.key(3), G, 1)
    monkeypatch.setattr(prefill, "_MULTIPLE", 1)
    options = GenerateOptions(sampling, (7,), prefill_chunk=3)
    whole = jax.device_get(generate(graphdef, params, prompts, mask, keys, limits, options=options))

    options = dataclasses.replace(options, slots=32, prefill_chunk=6)
    answers = stream.Stream(graphdef, params, options=options)
    rows = zip(prompts, mask, np.asarray(jax.random.key_data(keys[:, 0])), limits, strict=True)
    waiting = [stream.Prompt(ids[real].tolist(), key, int(limit)) for ids, real, key, limit in rows]
    compiled = []
    for _ in range(2):
        places = []
        for answer in answers.answer(waiting):
            real = whole.mask[answer.place]
            np.testing.assert_array_equal(answer.tokens, whole.tokens[answer.place][real])
            np.testing.assert_allclose(answer.log_probs, whole.log_probs[answer.place][real], atol=1e-5)
            places.append(answer.place)
        assert sorted(places) == list(range(G)) != places  # as they end
        assert whole.mask.sum() <= answers.capacity < whole.capacity
        compiled.append([getattr(stream, name)._cache_size() for name in PROGRAMS])
    assert compiled[0] == compiled[1]


def test_a_burst_writes_into_the_cache_that_it_is_given():
    """Beside the cache, which is donated, it needs no more than the keys of one layer."""
    config = dataclasses.replace(CONFIG, num_layers=4, sliding_window=None, layer_is_sliding=())
    graphdef, params = abstract_decoder(config)
    weights = stream.Weights(params, *jax.eval_shape(lambda params: stream._unstack(graphdef, params), params))
    state = jax.eval_shape(lambda params: stream._empty(params, 32, 512, 512, graphdef=graphdef), params)
    options = GenerateOptions(SamplingConfig(512), (7,))
    compiled = stream._burst.lower(state, weights, 4, graphdef=graphdef, options=options).compile()
    one = 4 * state.past.keys[0].size  # bytes of the keys of one layer; it has values too, and so have the prompts
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 16 * one and memory.temp_size_in_bytes < 2 * one
