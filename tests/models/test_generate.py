"""Sampling: greedy equals the argmax loop, endings, filters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrm.errors import UserError
from jaxrm.models.config import PRESETS
from jaxrm.models.generate import SamplingConfig, generate, sample
from jaxrm.models.transformer import Decoder, positions_from_mask

TINY = dataclasses.replace(
    PRESETS["tiny"], vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, head_dim=8
)


def model_and_prompts():
    graphdef, params = jax.jit(lambda: nnx.split(Decoder(TINY, rngs=nnx.Rngs(0))))()
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, 6)), jnp.int32)
    mask = jnp.arange(6)[None] >= jnp.asarray([0, 3, 5])[:, None]
    return graphdef, nnx.to_pure_dict(params), prompts, mask


def test_greedy_tokens_are_the_argmax_of_the_full_forward():
    """An independent loop without a cache, each row alone and without padding."""
    graphdef, params, prompts, mask = model_and_prompts()
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.0)
    got = generate(graphdef, params, prompts, mask, jax.random.key(0), sampling=sampling, end_ids=())
    assert got.mask.all()

    @jax.jit
    def logits(ids):  # padded on the right, which no earlier token sees
        model = nnx.merge(graphdef, params)
        return model.logits(model(ids, positions=jnp.arange(11)[None], segment_ids=jnp.ones_like(ids)))[0]

    for row in range(3):
        tokens = [int(t) for t in prompts[row][mask[row]]]
        for _ in range(5):
            padded = jnp.asarray([tokens + [0] * (11 - len(tokens))])
            tokens.append(int(jnp.argmax(logits(padded)[len(tokens) - 1])))
        assert got.tokens[row].tolist() == tokens[-5:]


def test_a_response_ends_with_its_end_token():
    graphdef, params, prompts, mask = model_and_prompts()
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
    free = generate(graphdef, params, prompts, mask, jax.random.key(0), sampling=sampling, end_ids=())
    end = int(free.tokens[0, 3])
    got = generate(graphdef, params, prompts, mask, jax.random.key(0), sampling=sampling, end_ids=(end,))
    for row in range(3):
        ids = free.tokens[row].tolist()
        length = ids.index(end) + 1 if end in ids else 12
        assert got.mask[row].tolist() == [True] * length + [False] * (12 - length)
        assert got.tokens[row, :length].tolist() == ids[:length]


def test_samples_follow_the_tempered_distribution():
    logits = jnp.tile(jnp.log(jnp.asarray([[0.6, 0.3, 0.1]])), (20_000, 1))
    drawn = sample(logits, jax.random.key(1), SamplingConfig(temperature=0.5))
    want = np.asarray([0.36, 0.09, 0.01]) / 0.46
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20_000, want, atol=0.015)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = jnp.tile(jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25]])), (2000, 1))
    key = jax.random.key(2)
    assert set(np.unique(sample(logits, key, SamplingConfig(top_k=2)))) == {1, 3}
    assert set(np.unique(sample(logits, key, SamplingConfig(top_p=0.6)))) == {1, 3}
    assert set(np.unique(sample(logits, key, SamplingConfig(top_p=0.05)))) == {1}
    assert set(np.unique(sample(logits, key, SamplingConfig()))) == {0, 1, 2, 3}


def test_positions_count_real_tokens_only():
    mask = jnp.asarray([[False, False, True, True, True], [True, True, True, False, False]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("field", [{"top_p": 0.0}, {"temperature": -1.0}, {"max_new_tokens": 0}, {"top_k": -1}])
def test_impossible_sampling_is_refused(field):
    with pytest.raises(UserError, match=next(iter(field))):
        SamplingConfig(**field)
