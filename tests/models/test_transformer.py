"""The decoder: causality, segments, remat, cache. Agreement with published models is in test_parity.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.decoders import TINY, random_decoder

from jaxrm.models import attention
from jaxrm.models.config import RopeScaling
from jaxrm.models.transformer import positions_from_mask

PLAIN = dataclasses.replace(TINY, num_layers=3)
SLIDING = dataclasses.replace(
    PLAIN, layer_is_sliding=(True, False, True), sliding_window=3, local_rope_theta=500.0, qk_norm=True
)
CAPPED = dataclasses.replace(
    SLIDING, post_norms=True, unit_offset_norm=True, scale_embedding=True, attention_softcap=5.0, logit_softcap=7.0
)
BIASED = dataclasses.replace(
    PLAIN, qkv_bias=True, output_bias=True, mlp_bias=True, tie_embeddings=False, rope_scaling=RopeScaling("llama3", 4.0)
)
CONFIGS = {"plain": PLAIN, "sliding": SLIDING, "capped": CAPPED, "biased": BIASED}


def tokens_of(config, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens, positions, segment_ids):
    return nnx.merge(graphdef, params)(tokens, positions=positions, segment_ids=segment_ids)


def read(model, tokens, segment_ids=None, positions=None):
    B, T = tokens.shape
    segment_ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
    return forward(*model, tokens, positions, segment_ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_position_sees_the_future(name):
    """By gradient: hidden state t does not change with the embedding of any later token."""
    graphdef, params = random_decoder(CONFIGS[name])
    tokens = jnp.arange(7, dtype=jnp.int32)[None]

    def states(table):
        changed = {**params, "embedder": {"embedding": table}}
        return read((graphdef, changed), tokens)[0].sum(axis=1)

    influence = jnp.abs(jax.jit(jax.jacrev(states))(params["embedder"]["embedding"])).sum(axis=2)[:, :7]
    assert (influence[jnp.triu_indices(7, 1)] == 0).all()
    assert (jnp.diag(influence) > 0).all()


def test_a_window_bounds_what_one_layer_sees():
    config = dataclasses.replace(SLIDING, num_layers=1, layer_is_sliding=(True,))
    model = random_decoder(config)
    tokens = tokens_of(config, (1, 8))
    changed = tokens.at[0, 2].set((tokens[0, 2] + 1) % config.vocab_size)
    moved = np.abs(read(model, tokens) - read(model, changed)).max(axis=-1)[0]
    assert (moved[:2] == 0).all() and (moved[2:5] > 0).all() and (moved[5:] == 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_segments_equal_separate_rows(name):
    model = random_decoder(CONFIGS[name])
    rows = tokens_of(PLAIN, (2, 5), 1)
    packed = read(
        model,
        jnp.concatenate([rows[:1], rows[1:, :4], jnp.zeros((1, 2), jnp.int32)], axis=1),
        jnp.asarray([[1] * 5 + [2] * 4 + [0] * 2]),
        jnp.asarray([[*range(5), *range(4), 0, 0]]),
    )
    separate = read(model, rows)  # the second row's last token is none of the packed ones, and no other sees it
    np.testing.assert_allclose(packed[0, :5], separate[0], atol=2e-5)
    np.testing.assert_allclose(packed[0, 5:9], separate[1, :4], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_equals_the_full_forward(name):
    """Prefill of left-padded prompts and one token at a time give the states of the whole rows."""
    model = random_decoder(CONFIGS[name])
    B, T, P = 3, 11, 5
    tokens = tokens_of(PLAIN, (B, T))
    mask = jnp.arange(T)[None] >= jnp.asarray([0, 2, 4])[:, None]
    segments, positions = mask.astype(jnp.int32), positions_from_mask(mask)
    whole = read(model, tokens, segments, positions)

    @jax.jit
    def prefill(params):
        decoder, first = nnx.merge(model[0], params), slice(None, P)
        hidden, prompts = decoder.prefill(
            tokens[:, first], positions=positions[:, first], segment_ids=segments[:, first]
        )
        return hidden, prompts, decoder.empty_cache(prompts, 1, T - P)

    @jax.jit
    def decode(params, tokens, cache, prompts):
        decoder = nnx.merge(model[0], params)
        return decoder.decode(tokens, decoder.unstack_layers(), cache, prompts)

    hidden, prompts, cache = prefill(model[1])
    states = [hidden]
    for t in range(P, T):
        hidden, cache = decode(model[1], tokens[:, t : t + 1], cache, prompts)
        states.append(hidden)
    cached = np.concatenate(states, axis=1)
    np.testing.assert_allclose(jnp.where(mask[..., None], cached - whole, 0), 0, atol=3e-5)


@pytest.mark.parametrize("name", ["plain", "capped"])
def test_remat_changes_no_gradient(name):
    tokens = tokens_of(PLAIN, (2, 6))

    def gradient(remat):
        graphdef, params = random_decoder(CONFIGS[name], remat=remat)
        return jax.jit(jax.grad(lambda p: (read((graphdef, p), tokens) ** 2).sum()))(params)

    full = gradient("full")
    for remat in ("attention", "dots", "none"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), gradient(remat), full)


def test_bfloat16_compute_stays_near_float32():
    tokens = tokens_of(PLAIN, (2, 9))
    wide, narrow = read(random_decoder(PLAIN), tokens), read(random_decoder(PLAIN, dtype=jnp.bfloat16), tokens)
    assert narrow.dtype == jnp.bfloat16
    assert float(jnp.abs(narrow.astype(jnp.float32) - wide).mean()) < 0.03


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (5.0, None), (None, 100)])
def test_splash_kernel_equals_xla(softcap, window):
    """The TPU kernel, interpreted: grouped heads narrower than a lane, segments and padding."""
    B, T, N, K, H = 1, 384, 4, 2, 16  # three blocks of 128
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))
    segments = jnp.asarray([[1] * 90 + [2] * 240 + [0] * 54])
    options = {"scale": H**-0.5, "softcap": softcap, "window": window}
    splash, xla = (
        jax.jit(functools.partial(kernel, **options))(query, key, value, segments)
        for kernel in (attention.splash_interpreted, attention.xla)
    )
    np.testing.assert_allclose(splash[:, :330], xla[:, :330], atol=2e-5)


def test_every_kernel_name_is_chosen_by_platform():
    f32, bf16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    assert attention.choose("auto", "cpu", f32) is attention.xla
    assert attention.choose("auto", "gpu", f32) is attention.xla
    assert attention.choose("auto", "gpu", bf16) is attention.cudnn
    assert attention.choose("auto", "tpu", f32) is attention.splash
    assert attention.choose("xla", "tpu", bf16) is attention.xla
