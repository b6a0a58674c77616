"""Vocabulary-chunked statistics against hand-worked cases, a NumPy loop and the plain computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.ops import vocab

token_statistics = jax.jit(vocab.token_statistics, static_argnames=("softcap", "temperature", "chunk_size"))


def plain_statistics(hidden, head, targets, softcap=None, temperature=1.0):
    logits = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_p = jax.nn.log_softmax(logits / temperature)
    log_prob = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return log_prob, entropy, jnp.argmax(log_p, axis=-1), jnp.max(log_p, axis=-1)


def random_case(seed, V, shape=(3, 5), D=8, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(*shape, D)) * scale, jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, size=shape), jnp.int32)
    return hidden, head, targets


def test_two_word_vocabulary_by_hand():
    hidden, head = jnp.array([[1.0]]), jnp.array([[0.0], [np.log(3.0)]])
    got = token_statistics(hidden, head, jnp.array([1]), chunk_size=1)
    np.testing.assert_allclose(got.log_probs, [np.log(0.75)], atol=1e-6)
    np.testing.assert_allclose(got.entropy, [-0.75 * np.log(0.75) - 0.25 * np.log(0.25)], atol=1e-6)
    assert got.argmax.tolist() == [1]
    np.testing.assert_allclose(got.max_log_prob, [np.log(0.75)], atol=1e-6)


def test_values_equal_a_numpy_loop():
    hidden, head, targets = random_case(0, V=37, shape=(4,))
    got = token_statistics(hidden, head, targets, softcap=3.0, temperature=0.7, chunk_size=5)
    for i in range(4):
        logits = [3.0 * np.tanh(float(np.dot(hidden[i], row)) / 3.0) / 0.7 for row in np.asarray(head, np.float64)]
        log_z = np.log(sum(np.exp(x) for x in logits))
        log_p = [x - log_z for x in logits]
        np.testing.assert_allclose(got.log_probs[i], log_p[int(targets[i])], atol=1e-5)
        np.testing.assert_allclose(got.entropy[i], -sum(np.exp(x) * x for x in log_p), atol=1e-5)
        assert int(got.argmax[i]) == int(np.argmax(log_p))


@pytest.mark.parametrize("V", [64, 61, 48])  # divides, does not divide (padded), divides into more chunks
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_plain_computation(V, softcap, temperature):
    hidden, head, targets = random_case(1, V, scale=2.0)
    key = jax.random.key(0)
    weights = jax.random.normal(key, (2, *targets.shape))

    def chunked(hidden, head):
        s = vocab.token_statistics(hidden, head, targets, softcap=softcap, temperature=temperature, chunk_size=10)
        return jnp.sum(weights[0] * s.log_probs + weights[1] * s.entropy), s

    def plain(hidden, head):
        s = plain_statistics(hidden, head, targets, softcap, temperature)
        return jnp.sum(weights[0] * s[0] + weights[1] * s[1]), s

    (_, got), got_grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(hidden, head)
    (_, want), want_grads = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(hidden, head)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_chunk_size_changes_nothing():
    hidden, head, targets = random_case(2, V=96)
    whole = token_statistics(hidden, head, targets, chunk_size=96)
    for chunk_size in (1, 7, 32, 95):
        part = token_statistics(hidden, head, targets, chunk_size=chunk_size)
        np.testing.assert_array_equal(part.argmax, whole.argmax)
        np.testing.assert_allclose(part.log_probs, whole.log_probs, atol=1e-5)


def test_ties_go_to_the_lowest_id_in_any_chunk():
    hidden = jnp.ones((1, 1))
    head = jnp.array([[0.0], [2.0], [1.0], [2.0], [2.0], [0.0]])
    for chunk_size in (1, 2, 3, 4, 6):
        assert token_statistics(hidden, head, jnp.array([0]), chunk_size=chunk_size).argmax.tolist() == [1]


def test_large_logits_stay_finite():
    hidden, head, targets = random_case(3, V=50, scale=300.0)
    loss = jax.value_and_grad(
        lambda h, w: vocab.linear_cross_entropy(h, w, targets, chunk_size=7).sum(), argnums=(0, 1)
    )
    value, grads = jax.jit(loss)(hidden, head)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


def test_bfloat16_hidden_gives_float32_statistics():
    hidden, head, targets = random_case(4, V=64)
    got = token_statistics(hidden.astype(jnp.bfloat16), head, targets, chunk_size=16)
    want = plain_statistics(
        hidden.astype(jnp.bfloat16).astype(jnp.float32),
        head.astype(jnp.bfloat16).astype(jnp.float32),
        targets,
    )
    assert got.log_probs.dtype == got.entropy.dtype == jnp.float32
    np.testing.assert_allclose(got.log_probs, want[0], atol=1e-4)


@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 3, 2)])
def test_bfloat16_gradients_are_those_of_the_rounded_inputs(leading):
    hidden, head, targets = random_case(6, V=64, shape=leading)
    hidden = hidden.astype(jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(7), leading)

    def chunked(hidden, head):
        return jnp.sum(weights * token_statistics(hidden, head, targets, chunk_size=16).log_probs)

    def plain(hidden, head):
        return jnp.sum(weights * plain_statistics(hidden, head, targets)[0])

    got = jax.jit(jax.grad(chunked, argnums=(0, 1)))(hidden, head)
    rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
    want = jax.grad(plain, argnums=(0, 1))(hidden.astype(jnp.float32), rounded)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.max(jnp.abs(b))))


def test_a_sharded_head_is_never_gathered():
    """Compiled for a vocabulary split over four devices, no all-gather and no all-to-all appears."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def on(*spec):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    hidden, head, targets = random_case(5, V=256, shape=(4, 8))
    args = (
        jax.device_put(hidden, on("data")),
        jax.device_put(head, on("tensor")),
        jax.device_put(targets, on("data")),
    )
    step = jax.jit(
        jax.grad(lambda h, w, y: vocab.linear_cross_entropy(h, w, y, chunk_size=32).sum(), argnums=(0, 1)),
        out_shardings=(on("data"), on("tensor")),
    )
    text = step.lower(*args).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    for a, b in zip(
        step(*args),
        jax.jit(jax.grad(lambda h, w: -plain_statistics(h, w, targets)[0].sum(), (0, 1)))(hidden, head),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_step_at_256000_words_takes_a_tenth_of_plain_memory():
    """Compiled only, at 4,096 tokens: the temporary memory of value and gradients."""
    V, N, D = 256_000, 4096, 256
    abstract = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((N, D), jnp.float32), ((V, D), jnp.float32), ((N,), jnp.int32))
    ]

    def temporary(loss):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return step.lower(*abstract).compile().memory_analysis().temp_size_in_bytes

    chunked = temporary(lambda h, w, y: vocab.linear_cross_entropy(h, w, y).mean())
    plain = temporary(lambda h, w, y: -plain_statistics(h, w, y)[0].mean())
    assert chunked * 10 <= plain, (chunked, plain)


def test_chunks_prefer_a_divisor_of_the_vocabulary():
    assert vocab.number_of_chunks(256_000, 8192) == 32
    assert vocab.number_of_chunks(49_152, 8192) == 6
    assert vocab.number_of_chunks(151_936, 8192) == 32
    assert vocab.number_of_chunks(8191 * 3 + 1, 8192) <= 16


def test_softcapped_gradients_survive_underflowing_probabilities():
    """At a low temperature the target is e^-140 likely, and its capped logit still has a slope."""
    hidden, head, targets = jnp.ones((1, 1)), jnp.asarray([[4.0], [-3.0]]), jnp.asarray([1])

    def chunked(h, w):
        return vocab.token_statistics(h, w, targets, softcap=9.0, temperature=0.05).log_probs.sum()

    def plain(h, w):
        return plain_statistics(h, w, targets, 9.0, 0.05)[0].sum()

    got, want = (jax.jit(jax.grad(f, (0, 1)))(hidden, head) for f in (chunked, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("drawable", [((0, 11),), ((2, 3), (7, 9), (30, 31))])
@pytest.mark.parametrize("chunk_size", [3, 10, 64])
def test_ids_without_a_token_have_no_share(drawable, chunk_size):
    """Values and gradients are those of the plain computation over the other ids; whole chunks may be left out."""
    hidden, head, _ = random_case(4, V=31, scale=2.0)
    ids = np.concatenate([np.arange(first, end) for first, end in drawable])
    places = jnp.asarray(np.random.default_rng(0).integers(0, len(ids), hidden.shape[:-1]))
    targets = jnp.asarray(ids, jnp.int32)[places]
    weights = jax.random.normal(jax.random.key(0), (2, *targets.shape))

    def chunked(hidden, head):
        s = vocab.token_statistics(
            hidden, head, targets, softcap=5.0, temperature=0.7, drawable=drawable, chunk_size=chunk_size
        )
        return jnp.sum(weights[0] * s.log_probs + weights[1] * s.entropy), s

    def plain(hidden, head):
        s = plain_statistics(hidden, head[ids], places, 5.0, 0.7)
        return jnp.sum(weights[0] * s[0] + weights[1] * s[1]), s

    (_, got), got_grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))(hidden, head)
    (_, want), want_grads = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(hidden, head)
    np.testing.assert_array_equal(got.argmax, ids[want[2]])
    for a, b in zip((*got[:2], got[3], *got_grads), (*want[:2], want[3], *want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))
