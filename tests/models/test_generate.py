"""Sampling: greedy equals the argmax loop, endings, filters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from support.decoders import TINY, abstract_decoder, random_decoder

from jaxrm.algorithms import reading
from jaxrm.errors import UserError
from jaxrm.inference.sharded_model import shard_model
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.generate import generate
from jaxrm.models.sampling import GenerateOptions, SamplingConfig, check_on_policy, response_keys, sample
from jaxrm.models.transformer import positions_from_mask
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import ResponseBatch


def model_and_prompts():
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, 6)), jnp.int32)
    mask = jnp.arange(6)[None] >= jnp.asarray([0, 3, 5])[:, None]
    return *random_decoder(), prompts, mask


def keys_of(seed, count):
    return jax.random.split(jax.random.key(seed), count)


def test_greedy_tokens_are_the_argmax_of_the_full_forward():
    """An independent loop without a cache, each row alone and without padding."""
    graphdef, params, prompts, mask = model_and_prompts()
    sampling = SamplingConfig(max_new_tokens=5, temperature=0.0)
    got = generate(graphdef, params, prompts, mask, jax.random.key(0), options=GenerateOptions(sampling, ()))
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
    free = generate(graphdef, params, prompts, mask, jax.random.key(0), options=GenerateOptions(sampling, ()))
    end = int(free.tokens[0, 3])
    got = generate(graphdef, params, prompts, mask, jax.random.key(0), options=GenerateOptions(sampling, (end,)))
    for row in range(3):
        ids = free.tokens[row].tolist()
        length = ids.index(end) + 1 if end in ids else 12
        assert got.mask[row].tolist() == [True] * length + [False] * (12 - length)
        assert got.tokens[row, :length].tolist() == ids[:length]


def test_the_loop_stops_once_every_row_has_ended():
    graphdef, params, prompts, mask = model_and_prompts()
    sampling = SamplingConfig(max_new_tokens=12, temperature=0.0)
    every = tuple(range(TINY.vocab_size))
    got = generate(graphdef, params, prompts, mask, jax.random.key(0), options=GenerateOptions(sampling, every))
    assert got.mask.sum(axis=1).tolist() == [1, 1, 1]
    assert got.tokens[:, 0].all() and not got.tokens[:, 1:].any()  # nothing was written after them


def test_samples_depend_on_the_key_alone():
    """Not on the longest response allowed, nor on what lies under the padding, be it an end token."""
    graphdef, params, prompts, mask = model_and_prompts()
    end = 7
    sampled = functools.partial(generate, graphdef, params)
    short, long = SamplingConfig(max_new_tokens=4), SamplingConfig(max_new_tokens=9)
    got = sampled(prompts, mask, jax.random.key(3), options=GenerateOptions(long, (end,)))
    padded = jnp.where(mask, prompts, end)
    again = sampled(padded, mask, jax.random.key(3), options=GenerateOptions(long, (end,)))
    np.testing.assert_array_equal(again.tokens, got.tokens)
    np.testing.assert_array_equal(again.mask, got.mask)
    cut = sampled(prompts, mask, jax.random.key(3), options=GenerateOptions(short, (end,)))
    np.testing.assert_array_equal(cut.tokens, got.tokens[:, :4])
    other = sampled(prompts, mask, jax.random.key(4), options=GenerateOptions(short, (end,)))
    assert (other.tokens != cut.tokens).any()


def test_a_response_depends_on_no_neighbor():
    """One row of a batch alone, by its key and by that of its prompt; log-probs are those of the training forward."""
    graphdef, params, prompts, mask = model_and_prompts()
    options = GenerateOptions(SamplingConfig(9, temperature=0.7), (7,))
    sampled = functools.partial(generate, graphdef, params, options=options)
    got, keys = sampled(prompts, mask, jax.random.key(3)), response_keys(jax.random.key(3), 3, 1)
    alone = sampled(prompts[1:2], mask[1:2], keys[1:2])
    np.testing.assert_array_equal(alone.tokens[0][alone.mask[0]], got.tokens[1][got.mask[1]])
    responses = ResponseBatch(prompts, mask, jnp.where(got.mask, got.tokens, 0), got.mask)
    expected = reading.response_statistics(graphdef, params, responses, None, temperature=0.7).log_probs
    np.testing.assert_allclose(got.log_probs, jnp.where(got.mask, expected, 0), atol=1e-5)


def test_bfloat16_decoding_reads_no_float32_weights():
    graphdef, params = abstract_decoder(dtype=jnp.bfloat16)
    ids, mask = jax.ShapeDtypeStruct((3, 6), jnp.int32), jax.ShapeDtypeStruct((3, 6), bool)
    sampling = SamplingConfig(max_new_tokens=5)
    traced = generate.trace(graphdef, params, ids, mask, jax.random.key(0), options=GenerateOptions(sampling, ()))
    (loop,) = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "while"]
    read = [v.aval for v in loop.invars if jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.ndim > 1]
    assert sum(x.dtype == jnp.bfloat16 for x in read) == 2 * (6 + 4) + 1  # products and keys of 2 layers, head
    weights = [x.shape for x in read if x.dtype == jnp.float32 and x.shape != (3, 5)]  # log-probs apart
    assert weights == [(61, 32)]  # rows are looked up in it


def test_no_kernel_of_gate_and_up_is_copied_on_cpu():
    """Joined, XLA lays both out anew at every token there."""
    prompts, mask = model_and_prompts()[2:]
    options = GenerateOptions(SamplingConfig(max_new_tokens=5), ())
    source, results = ModelSource(), {}
    params = random_decoder()[1]
    for on_cpu in (False, True):
        graphdef, *_ = build.abstract_decoder(TINY, source, on_cpu=on_cpu)
        program = generate.lower(graphdef, params, prompts, mask, jax.random.key(0), options=options).compile()
        joined = f"f32[{TINY.hidden_size},{2 * TINY.intermediate_size}]"
        assert on_cpu == (joined not in program.as_text())  # the joined form shows that the name is right
        results[on_cpu] = program(params, prompts, mask, jax.random.key(0))
    np.testing.assert_array_equal(results[True].tokens, results[False].tokens)
    np.testing.assert_allclose(results[True].log_probs, results[False].log_probs, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3], ids=["a response a prompt", "three"])
def test_eight_devices_sample_as_one(n):
    """Rows over data and fsdp, heads over tensor."""
    config = dataclasses.replace(TINY, vocab_size=64, num_layers=1)
    sampling = SamplingConfig(max_new_tokens=4)
    prompts, mask = (jnp.tile(x, (4, 1))[:8] for x in model_and_prompts()[2:])
    params = random_decoder(config)[1]

    def drawn(devices, mesh):
        model = shard_model(ModelSource(), build_mesh(mesh, devices), config)
        given = (jax.device_put(params, model.shardings), prompts, mask, jax.random.key(0))
        traced = generate.trace(model.graphdef, *given, options=GenerateOptions(sampling, (5,), n))
        constraints = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "sharding_constraint"]
        return traced.lower().compile()(*given), [eqn.params["sharding"].spec for eqn in constraints]

    one, _ = drawn(jax.devices()[:1], MeshConfig())
    eight, specs = drawn(jax.devices(), MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    np.testing.assert_array_equal(eight.mask, one.mask)
    assert (
        specs.count(PartitionSpec(("data", "fsdp"), "tensor", None, None)) == 4
    )  # keys and values of prompts and responses


# --- slots


SLOTS = {1: [(8, "one"), (32, "one"), (64, "one"), (32, "eight")], 4: [(8, "eight")]}


@pytest.mark.slow
@pytest.mark.parametrize("n", SLOTS, ids=["a response a prompt", "four"])
def test_tokens_depend_on_no_slot_and_no_device(n):
    """All rows at once or in slots, on one device and on eight; each prompt has a limit of its own."""
    config = dataclasses.replace(TINY, vocab_size=64, num_layers=1, sliding_window=3, layer_is_sliding=(True,))
    rng, G, T = np.random.default_rng(1), 72 // n, 12
    prompts = rng.integers(0, 61, (G, 6)).astype(np.int32)
    mask = np.arange(6)[None] >= rng.integers(0, 6, (G, 1))
    limits = np.minimum(rng.geometric(1 / 5, G), T).astype(np.int32)
    params = random_decoder(config)[1]
    devices = {"one": (MeshConfig(), jax.devices()[:1]), "eight": (MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())}
    models = {name: shard_model(ModelSource(), build_mesh(*mesh), config) for name, mesh in devices.items()}

    def drawn(slots, devices="one"):
        model = models[devices]
        given = jax.device_put(params, model.shardings), prompts, mask, jax.random.key(3), limits
        options = GenerateOptions(SamplingConfig(T), (5,), n, slots)
        return jax.device_get(generate(model.graphdef, *given, options=options))

    whole = drawn(None)
    lengths = whole.mask.sum(axis=1)
    assert lengths.min() < lengths.max() and (lengths <= np.repeat(limits, n)).all()
    assert whole.capacity == 72 * lengths.max()
    for slots, devices in SLOTS[n]:
        few = drawn(slots, devices)
        np.testing.assert_array_equal(few.mask, whole.mask)
        np.testing.assert_array_equal(few.tokens[few.mask], whole.tokens[whole.mask])
        np.testing.assert_allclose(few.log_probs, whole.log_probs, atol=1e-5)
        assert few.mask.sum() <= few.capacity and (slots == 64 or few.capacity < whole.capacity)


# --- several responses to a prompt


def windowed():
    """A model whose layers see two tokens and all of them in turn."""
    return dataclasses.replace(TINY, sliding_window=2, layer_is_sliding=(True, False))


@pytest.mark.parametrize("config", [TINY, windowed()], ids=["all see all", "a window"])
def test_responses_that_share_a_prompt_are_as_with_their_own(config):
    """The same draws from the same keys, as the prompts were written n times; greedily, what the prompt alone gets."""
    _, _, prompts, mask = model_and_prompts()
    draw = functools.partial(generate, *random_decoder(config))
    keys = response_keys(jax.random.key(3), 3, 4)
    sampled, greedy = (GenerateOptions(SamplingConfig(8, temperature), (7,)) for temperature in (1.0, 0.0))
    shared = draw(prompts, mask, jax.random.key(3), options=dataclasses.replace(sampled, responses_per_prompt=4))
    repeated = draw(*(jnp.repeat(x, 4, axis=0) for x in (prompts, mask)), keys.reshape(-1, 1), options=sampled)
    np.testing.assert_array_equal(shared.tokens, repeated.tokens)
    np.testing.assert_array_equal(shared.mask, repeated.mask)
    np.testing.assert_allclose(shared.log_probs, repeated.log_probs, atol=1e-5)
    assert all(len({tuple(row) for row in group.tolist()}) == 4 for group in shared.tokens.reshape(3, 4, 8))

    alone = draw(prompts, mask, keys[:, 0], options=greedy)
    together = draw(prompts, mask, keys[:, 0], options=dataclasses.replace(greedy, responses_per_prompt=2))
    np.testing.assert_array_equal(together.tokens, jnp.repeat(alone.tokens, 2, axis=0))
    np.testing.assert_array_equal(together.mask, jnp.repeat(alone.mask, 2, axis=0))


def test_a_shared_prompt_has_one_set_of_keys_in_memory():
    """The loop over tokens has the prompt's slots once, and for each response only those of its own tokens."""
    graphdef, params = abstract_decoder()
    ids, mask = jax.ShapeDtypeStruct((3, 6), jnp.int32), jax.ShapeDtypeStruct((3, 6), bool)
    options = GenerateOptions(SamplingConfig(max_new_tokens=5), (), 4)
    traced = generate.trace(graphdef, params, ids, mask, jax.random.key(0), options=options)
    (loop,) = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "while"]
    shapes = [v.aval.shape for v in loop.invars if v.aval.ndim == 4]
    K, H = TINY.num_kv_heads, TINY.head_dim
    for rows, slots in ((3, 6), (12, 5)):
        assert shapes.count((rows, K, H, slots)) == shapes.count((rows, K, slots, H)) == 2
    assert len(shapes) == 8


def test_samples_follow_the_tempered_distribution():
    logits = jnp.tile(jnp.log(jnp.asarray([[0.6, 0.3, 0.1]])), (20_000, 1))
    drawn, log_probs = sample(logits, keys_of(1, 20_000), SamplingConfig(temperature=0.5))
    want = np.asarray([0.36, 0.09, 0.01]) / 0.46
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20_000, want, atol=0.015)
    np.testing.assert_allclose(np.exp(log_probs), want[drawn], rtol=1e-5)


def test_top_k_and_top_p_keep_the_likeliest():
    logits = jnp.tile(jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25]])), (2000, 1))
    keys = keys_of(2, 2000)
    assert set(np.unique(sample(logits, keys, SamplingConfig(top_k=2))[0])) == {1, 3}
    assert set(np.unique(sample(logits, keys, SamplingConfig(top_p=0.6))[0])) == {1, 3}
    assert set(np.unique(sample(logits, keys, SamplingConfig(top_p=0.05))[0])) == {1}
    assert set(np.unique(sample(logits, keys, SamplingConfig())[0])) == {0, 1, 2, 3}


def test_every_part_of_a_vocabulary_is_drawn_by_its_probability():
    """300 tokens: more than are drawn from at once, and no multiple of it."""
    logits = np.random.default_rng(5).normal(size=300).astype(np.float32) * 2
    logits[128:256] = -np.inf
    rows = jnp.tile(jnp.asarray(logits)[None], (50_000, 1))
    drawn = np.bincount(sample(rows, keys_of(1, 50_000), SamplingConfig())[0], minlength=300) / 50_000
    want = np.exp(logits) / np.exp(logits).sum()
    assert drawn.shape == (300,) and not drawn[128:256].any()
    # a frequency's standard error is sqrt(p (1 - p) / n)
    assert (np.abs(drawn - want) <= 5 * np.sqrt(want / 50_000)).all()


def test_greedy_takes_the_first_of_the_likeliest():
    logits = np.random.default_rng(6).integers(0, 40, (64, 300)).astype(np.float32)  # many ties
    greedy, _ = sample(jnp.asarray(logits), keys_of(0, 64), SamplingConfig(temperature=0.0))
    np.testing.assert_array_equal(greedy, logits.argmax(axis=1))


def test_positions_count_real_tokens_only():
    mask = jnp.asarray([[False, False, True, True, True], [True, True, True, False, False]])
    assert positions_from_mask(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("field", [{"top_p": 0.0}, {"temperature": -1.0}, {"max_new_tokens": 0}, {"top_k": -1}])
def test_impossible_sampling_is_refused(field):
    with pytest.raises(UserError, match=next(iter(field))):
        SamplingConfig(**field)


@pytest.mark.parametrize("field", [{"top_p": 0.9}, {"temperature": 0.0}, {"top_k": 5}])
def test_sampling_off_the_policy_is_refused(field):
    name = next(iter(field))
    with pytest.raises(UserError, match=rf"config.ppo.sampling.{name} is .* e.g. --config.ppo.sampling.{name}="):
        check_on_policy(SamplingConfig(**field), "ppo.sampling")
    check_on_policy(SamplingConfig(temperature=0.7), "ppo.sampling")


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_new_tokens=40),
        SamplingConfig(max_new_tokens=40, temperature=0.0),
        SamplingConfig(max_new_tokens=40, top_k=50),
        SamplingConfig(max_new_tokens=40, temperature=3.0, top_p=0.99),
    ],
    ids=["sampled", "greedy", "top_k", "top_p"],
)
def test_ids_without_a_token_are_never_drawn(sampling):
    """Of 61 rows 20 have no token, as in models whose vocabulary is padded."""
    _, params, prompts, mask = model_and_prompts()
    config = dataclasses.replace(TINY, drawable=((1, 20), (39, 61)))
    graphdef = abstract_decoder(config)[0]
    got = generate(graphdef, params, prompts, mask, jax.random.key(0), options=GenerateOptions(sampling, ()))
    assert set(np.unique(got.tokens)) <= {*range(1, 20), *range(39, 61)}


def test_log_probs_are_those_that_tokens_are_drawn_with():
    """Shares of 30,000 draws from one state equal the probabilities that training computes."""
    _, params, prompts, mask = model_and_prompts()
    config = dataclasses.replace(TINY, drawable=((0, 12),))
    graphdef = abstract_decoder(config)[0]
    model = nnx.merge(graphdef, params)
    hidden = model(prompts, positions=positions_from_mask(mask), segment_ids=mask.astype(jnp.int32))[:1, -1]
    rows = jnp.broadcast_to(model.logits(hidden), (30_000, 61))
    drawn = np.bincount(sample(rows, keys_of(0, 30_000), SamplingConfig())[0], minlength=61) / 30_000
    responses = ResponseBatch(
        jnp.tile(prompts[:1], (12, 1)), jnp.tile(mask[:1], (12, 1)), jnp.arange(12)[:, None], jnp.ones((12, 1), bool)
    )
    log_probs = reading.response_statistics(graphdef, params, responses, None).log_probs[:, 0]
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(drawn[:12], np.exp(log_probs), atol=0.01)
