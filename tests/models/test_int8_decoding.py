"""Decoding with int8 weights, keys and values: the logits, and that the loop reads the codes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrm.models import build, quantized
from jaxrm.models.build import ModelSource
from jaxrm.models.config import preset
from jaxrm.models.quantized_params import contracted_axes
from jaxrm.models.transformer import COMPUTE_STORAGE, DecodingStorage, positions_from_mask

CONFIG = dataclasses.replace(preset("tiny"), vocab_size=320)
SOURCE = ModelSource(preset="tiny")
INT8, INT8_CACHE = DecodingStorage(weights="int8"), DecodingStorage(cache="int8")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12)), jnp.int32)
ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def model(storage=COMPUTE_STORAGE):
    graphdef, shapes, _ = build.abstract_decoder(CONFIG, SOURCE)
    return build.with_storage(graphdef, shapes, storage), jax.tree.map(lambda _: ONE, shapes)


@functools.partial(jax.jit, static_argnums=0)
def decoded(graphdef, params):
    """Logits of the tokens after one of a prompt, each read by itself."""
    decoder, mask = nnx.merge(graphdef, params), jnp.ones((2, 1), jnp.int32)
    _, prompts = decoder.prefill(TOKENS[:, :1], positions=positions_from_mask(mask), segment_ids=mask)
    unstacked, head = decoder.unstack_layers(), decoder.decode_head()

    def one_token(past, token):
        hidden, past = decoder.decode(token[:, None], unstacked, past, prompts)
        return past, decoder.logits(hidden[:, 0], head)

    return jax.lax.scan(one_token, decoder.empty_cache(prompts, 1, 11), TOKENS[:, 1:].T)[1]


@pytest.fixture(scope="module")
def params():
    return build.init_params(CONFIG, SOURCE, jax.random.key(0), model()[1])


def test_int8_logits_are_near_those_of_plain_weights(params):
    """Within a twentieth of their spread; and they are not the same, so codes were read."""
    plain, ours = (np.asarray(decoded(model(storage)[0], params)) for storage in (COMPUTE_STORAGE, INT8))
    error = np.sqrt(np.mean((ours - plain) ** 2)) / plain.std()
    assert 1e-4 < error < 0.05, error


def test_logits_with_an_int8_cache_are_near_the_plain_ones(params):
    plain, ours = (np.asarray(decoded(model(storage)[0], params)) for storage in (COMPUTE_STORAGE, INT8_CACHE))
    error = np.sqrt(np.mean((ours - plain) ** 2)) / plain.std()
    assert 1e-5 < error < 0.02, error


def rounded(path, kernel):
    """A stack of kernels as its codes stand for it; what is no kernel as it is."""
    place = tuple(step.key for step in path)
    if place[-1] != "kernel":
        return kernel
    inputs = kernel.shape[1 : 1 + contracted_axes(place[:-1])]
    stored = quantized.to_int8(kernel.reshape(len(kernel), math.prod(inputs), -1), axis=1)
    return (stored.codes * stored.scales).reshape(kernel.shape)


def test_int8_logits_are_those_of_dequantized_weights(params):
    """Of the kernels, and of the head, which is the embedding here; the embedding that is looked up is plain."""
    x = jax.random.normal(jax.random.key(1), (3, 64))
    matrix = jax.random.normal(jax.random.key(2), (32, 64)) * jnp.arange(1, 33)[:, None]
    stored = quantized.to_int8(matrix, axis=1)
    expected = x @ (np.asarray(stored.codes, np.float32) * np.asarray(stored.scales)).T
    np.testing.assert_allclose(quantized.int8_product(x, stored), expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(expected, x @ matrix.T, atol=0.02 * np.abs(expected).max())
    exact = jax.tree_util.tree_map_with_path(rounded, params)
    heads = quantized.to_int8(params["embedder"]["embedding"], axis=1)
    ours = np.asarray(decoded(model(INT8)[0], exact))  # whose codes are those that it was made of
    hidden_head = np.asarray(heads.codes, np.float32) * np.asarray(heads.scales)
    untied = dataclasses.replace(CONFIG, tie_embeddings=False)
    graphdef, _, _ = build.abstract_decoder(untied, SOURCE)
    expected = decoded(graphdef, {**exact, "head": {"embedding": jnp.asarray(hidden_head)}})
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_the_loop_over_tokens_reads_codes():
    """The conversion is inside of the compiled loop: no wide copy of a kernel is made before it."""
    graphdef, _ = model(INT8)
    _, shapes, _ = build.abstract_decoder(CONFIG, SOURCE)
    hlo = decoded.lower(graphdef, shapes).compile().as_text()
    wide = f"[2,{CONFIG.intermediate_size},{CONFIG.hidden_size}]"  # gate and up
    loops = [line for line in hlo.splitlines() if " while(" in line]
    (over_tokens,) = (line for line in loops if f"s8{wide}" in line)
    assert f"f32{wide}" not in over_tokens
