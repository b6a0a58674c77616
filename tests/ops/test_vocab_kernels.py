"""Kernels that go through the vocabulary, against plain XLA, and compiled for accelerators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.planning import compiled_for, gpu, tpu

from jaxrm.errors import UserError
from jaxrm.ops import vocab, vocab_gpu, vocab_kernels, vocab_tpu
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh

KERNELS = {
    "tpu": functools.partial(vocab_tpu.sum_chunk, interpret=True),
    "gpu": functools.partial(vocab_gpu.sum_chunk, interpret=True),
}
OPTIONS = {"softcap": 5.0, "temperature": 0.7, "drawable": ((0, 7), (9, 690))}


def random_case(V=700, shape=(2, 70), D=640):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(*shape, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(V, D)) * 0.1, jnp.float32).at[jnp.array([300, 650])].set(0.5)
    hidden = hidden.at[0, 0].set(1.0)  # its most likely ids are two equal ones, of different blocks
    return hidden, head, jnp.asarray(rng.integers(9, 690, shape), jnp.int32)


def read(hidden, head, targets, forward):
    """Statistics, and the gradients of a sum of log-probs and entropies."""
    weights = jax.random.normal(jax.random.key(0), (2, *targets.shape))

    def weighted(hidden, head):
        token = vocab.token_statistics(hidden, head, targets, forward=forward, **OPTIONS)
        return jnp.sum(weights[0] * token.log_probs + weights[1] * token.entropy), token

    (_, token), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(hidden, head)
    return (*token, *gradients)


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("size", [1000, 250])  # the whole vocabulary, and three chunks of which one has a row too many
def test_kernels_say_of_words_what_xla_says(platform, size):
    """Blocks that neither tokens nor ids fill, ties, ids that cannot be drawn, a soft cap and a temperature."""
    case = random_case()
    got, want = read(*case, vocab.Chunks(KERNELS[platform], size)), read(*case, None)
    assert int(got[2][0, 0]) == 300
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 4}, {"fsdp": 2, "context": 2, "tensor": 2}])
def test_each_device_sums_its_own_tokens_and_ids(axes):
    """With a head that lies whole or split over channels; the interpreted kernel of one device is its reference."""
    case = random_case()
    mesh = build_mesh(MeshConfig(**axes), jax.devices())
    got, want = read(*case, partition.sum_per_device(KERNELS["gpu"], mesh)), read(*case, None)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_a_kernel_for_words_is_taken_where_it_can_be():
    f32, bf16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    choose = vocab_kernels.choose
    assert choose("auto", "cpu", f32, 64) is choose("auto", "gpu", bf16, 2048) is choose("xla", "tpu", f32, 64) is None
    assert choose("auto", "tpu", f32, 2304) is choose("pallas", "tpu", bf16, 640) is vocab_tpu.sum_chunk
    assert choose("auto", "tpu", f32, 1100) is None
    assert choose("pallas", "gpu", bf16, 1100) is vocab_gpu.sum_chunk
    channels = [vocab_kernels.channels_of_a_step(size) for size in (576, 2048, 2304, 3584)]
    assert channels == [None, 512, 384, 512]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("pallas", "cpu", "float32", 128), "which runs on TPU and GPU, but the devices are of platform cpu"),
        (("pallas", "tpu", "float32", 1100), "which on TPU needs a multiple of 128 channels, but the model has 1100"),
        (("pallas", "gpu", "float32", 64), "which needs 16 bits on GPU, but config.model.dtype is float32"),
        (("fused", "gpu", "float32", 64), "is 'fused'; use one of auto, xla, pallas"),
    ],
)
def test_a_kernel_for_words_that_cannot_run_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        vocab_kernels.choose(given[0], given[1], jnp.dtype(given[2]), given[3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "V", "D"),
    [
        pytest.param("v5e:2x2", 256_000, 2048, marks=tpu),
        pytest.param("v5e:2x2", 32_000, 4096, marks=tpu),
        pytest.param("h100:1", 32_000, 4096, marks=gpu),
    ],
)
def test_logits_stay_on_the_chip(topology, V, D):
    """Compiled for it: the temporary memory of 4,096 tokens is less than their logits over 128 ids."""
    sum_chunk = {"v5e:2x2": vocab_tpu, "h100:1": vocab_gpu}[topology].sum_chunk
    statistics = functools.partial(vocab.token_statistics, forward=vocab.Chunks(sum_chunk, V), softcap=30.0)
    shapes = ((4096, D), (V, D), (4096,))
    compiled = compiled_for(topology, statistics, shapes, (jnp.bfloat16, jnp.float32, jnp.int32))
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 128 * 4 * 2
