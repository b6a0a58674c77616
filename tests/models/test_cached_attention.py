"""Attention over a cache: kernels against plain XLA and a NumPy loop, and compiled for accelerators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.planning import compiled_for, gpu, tpu

from jaxrm.errors import UserError
from jaxrm.models import cached_attention, cached_attention_gpu, cached_attention_tpu
from jaxrm.models.cached_attention import CachedKeys
from jaxrm.models.quantized import Int8Array, to_int8
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh

KERNELS = {
    "tpu": functools.partial(cached_attention_tpu.read, interpret=True),
    "gpu": functools.partial(cached_attention_gpu.read, interpret=True),
}


def random_case(B=4, K=2, g=3, H=64, S=300, G=2, P=150):
    """Queries, the keys of each row, ragged at both ends, and those of the prompts, which one row's window has left.

    The first row sees both ends of its cache and not the middle, as of a ring.
    """
    rng = np.random.default_rng(0)

    def past(rows, slots):
        keys, values = rng.normal(size=(2, rows, K, slots, H)).astype(np.float32)
        first, last = rng.integers(0, slots // 3, (rows, 1)), rng.integers(slots // 3, slots, (rows, 1))
        mask = (np.arange(slots) >= first) & (np.arange(slots) <= last)
        return CachedKeys(jnp.asarray(keys.swapaxes(2, 3)), jnp.asarray(values), jnp.asarray(mask))

    own, prompts = past(B, S), past(G, P)
    own = own._replace(mask=own.mask.at[0].set((jnp.arange(S) < 2) | (jnp.arange(S) >= S - 3)))
    prompts = prompts._replace(mask=jnp.repeat(prompts.mask, B // G, axis=0).at[0].set(False))
    return jnp.asarray(rng.normal(size=(B, K * g, H)), jnp.float32), own, prompts


def by_loop(query, own, prompts, scale, softcap):
    B, N, H = query.shape
    out = np.zeros((B, N, H))
    for b in range(B):
        for n in range(N):
            parts = [(own, b)] if prompts is None else [(own, b), (prompts, b * prompts.keys.shape[0] // B)]
            logits, values = [], []
            for past, row in parts:
                k = n * past.keys.shape[1] // N
                for s in np.flatnonzero(past.mask[b * past.mask.shape[0] // B]):
                    logit = scale * float(np.dot(query[b, n], past.keys[row, k, :, s]))
                    logits.append(logit if softcap is None else softcap * np.tanh(logit / softcap))
                    values.append(np.asarray(past.values[row, k, s]))
            weights = np.exp(np.asarray(logits) - max(logits))
            out[b, n] = weights @ np.asarray(values) / weights.sum()
    return out


def test_a_cache_is_read_as_by_a_loop():
    query, own, prompts = random_case(K=1, g=2, H=4, S=9, P=7)
    for shared in (None, prompts, prompts._replace(mask=prompts.mask[1::2])):
        got = cached_attention.attend(query, own, shared, scale=0.5, softcap=2.0)
        np.testing.assert_allclose(got, by_loop(query, own, shared, 0.5, 2.0), atol=1e-5)


@pytest.mark.parametrize("platform", KERNELS)
def test_kernels_read_a_ragged_cache_as_xla_does(platform):
    """Grouped heads, shared prompts, ends inside blocks, a cache that is no whole number of blocks, a soft cap."""
    query, own, prompts = random_case(**{"tpu": {"K": 8, "S": 1152, "P": 256}, "gpu": {}}[platform])
    attend = functools.partial(cached_attention.attend, scale=64**-0.5, softcap=5.0)
    got = jax.jit(functools.partial(attend, read=KERNELS[platform]))(query, own, prompts)
    np.testing.assert_allclose(got, attend(query, own, prompts), atol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", *KERNELS])
def test_int8_keys_are_read_as_those_they_stand_for(kernel):
    """By XLA and both kernels; the codes are converted, and the scales come after the products."""
    query, *pair = random_case(**{"K": 8, "S": 1152, "P": 256} if kernel == "tpu" else {})
    codes = [past._replace(keys=to_int8(past.keys, 2), values=to_int8(past.values, 3)) for past in pair]
    wide = [past._replace(keys=_wide(past.keys), values=_wide(past.values)) for past in codes]
    attend = functools.partial(cached_attention.attend, scale=64**-0.5, softcap=5.0)
    got = jax.jit(functools.partial(attend, read=KERNELS.get(kernel)))(query, *codes)
    np.testing.assert_allclose(got, attend(query, *wide), atol=1e-5)


def _wide(stored):
    return stored.codes * stored.scales


@pytest.mark.parametrize("platform", KERNELS)
def test_blocks_that_a_row_does_not_see_are_not_read(platform):
    """They hold NaN, before and between those that it sees; read and masked, it would be in the sum of the values."""
    heads = {"tpu": {"K": 16, "H": 256}, "gpu": {"K": 1, "H": 128}}[platform]  # so that blocks are of 128 slots, of 64
    query, own, _ = random_case(B=2, g=1, S=512, **heads)
    slots = jnp.arange(512)[None]
    sees = jnp.asarray([0, 1])[:, None]
    mask = (sees == 0) | ((slots >= 130) & (slots < 250)) | (slots >= 400)
    beyond = (sees == 1) & ((slots < 128) | ((slots >= 256) & (slots < 384)))
    clean = own._replace(mask=mask)
    keys = jnp.where(beyond[:, None, None], jnp.nan, own.keys)
    values = jnp.where(beyond[:, None, :, None], jnp.nan, own.values)
    attend = functools.partial(cached_attention.attend, scale=0.1, softcap=None)
    got = jax.jit(functools.partial(attend, read=KERNELS[platform]))(query, CachedKeys(keys, values, mask))
    np.testing.assert_allclose(got, attend(query, clean), atol=1e-5)


@pytest.mark.parametrize("platform", KERNELS)
def test_a_row_that_is_over_disturbs_no_other(platform):
    """Two in the middle see no key. On TPU nothing of theirs is read, so what they hold is not in their results."""
    query, own, _ = random_case(g=1, S=256)
    mask = own.mask.at[1:3].set(False)
    over = (jnp.arange(4) == 1) | (jnp.arange(4) == 2)
    keys, values = (jnp.where(over[:, None, None, None], jnp.nan, x) for x in (own.keys, own.values))
    attend = functools.partial(cached_attention.attend, scale=0.1, softcap=None)
    got = jax.jit(functools.partial(attend, read=KERNELS[platform]))(query, CachedKeys(keys, values, mask))
    np.testing.assert_allclose(got[::3], attend(query, own)[::3], atol=1e-5)
    assert platform == "gpu" or np.all(np.isfinite(got))


@pytest.mark.parametrize(("K", "g", "tensor"), [(2, 3, 2), (1, 4, 2), (1, 3, 2)])
def test_each_device_reads_its_own_rows_and_heads(K, g, tensor):
    """Key heads that tensor divides, queries of one key head that it divides, and neither."""
    query, own, prompts = random_case(K=K, g=g, H=4, S=9, P=7)
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=tensor), jax.devices())
    attend = functools.partial(cached_attention.attend, scale=0.5, softcap=None)
    read = partition.read_per_device(cached_attention.read_in_xla, mesh)
    got = jax.jit(functools.partial(attend, read=read))(query, own, prompts)
    np.testing.assert_allclose(got, attend(query, own, prompts), atol=1e-5)


def test_a_kernel_is_taken_where_it_can_be():
    f32, bf16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
    xla, choose = cached_attention.read_in_xla, cached_attention.choose
    assert choose("auto", "cpu", f32, 128) is choose("xla", "tpu", f32, 128) is xla
    assert choose("auto", "tpu", bf16, 64) is choose("auto", "gpu", f32, 128) is choose("auto", "gpu", bf16, 80) is xla
    assert choose("auto", "tpu", f32, 256) is choose("pallas", "tpu", bf16, 128) is cached_attention_tpu.read
    assert choose("auto", "gpu", bf16, 64) is cached_attention_gpu.read


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("pallas", "cpu", "float32", 128), "which runs on TPU and GPU, but the devices are of platform cpu"),
        (("pallas", "tpu", "float32", 64), "which needs heads of 128 or 256 on TPU, but the model's have 64"),
        (("pallas", "gpu", "float32", 64), "which needs 16 bits on GPU, but config.model.dtype is float32"),
        (("paged", "gpu", "float32", 64), "is 'paged'; use one of auto, xla, pallas"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(given, words):
    with pytest.raises(UserError, match=words):
        cached_attention.choose(given[0], given[1], jnp.dtype(given[2]), given[3])


CASES = {  # B, K, g, H, S and the soft cap of published models
    "gemma-2b": (16, 1, 8, 256, 1024, None),
    "llama-2-7b": (16, 32, 1, 128, 1024, None),
    "gemma-2-9b": (8, 8, 2, 256, 640, 50.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("topology", [pytest.param("v5e:2x2", marks=tpu), pytest.param("h100:1", marks=gpu)])
def test_kernels_compile_for_accelerators(topology, case, stored):
    """And take little memory beside the cache."""
    B, K, g, H, S, softcap = CASES[case]
    read = {"v5e:2x2": cached_attention_tpu, "h100:1": cached_attention_gpu}[topology].read
    attend = functools.partial(cached_attention.attend, scale=H**-0.5, softcap=softcap, read=read)
    shapes = ((B, K * g, H), CachedKeys((B, K, H, S), (B, K, S, H), (B, S)))
    dtypes = (jnp.bfloat16, CachedKeys(jnp.bfloat16, jnp.bfloat16, jnp.bool_))
    if stored == "int8":
        both = Int8Array((B, K, H, S), (B, K, 1, S)), Int8Array((B, K, S, H), (B, K, S, 1))
        shapes = (shapes[0], CachedKeys(*both, (B, S)))
        dtypes = (jnp.bfloat16, CachedKeys(*[Int8Array(jnp.int8, jnp.float32)] * 2, jnp.bool_))
    compiled = compiled_for(topology, attend, shapes, dtypes)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * 4 * B * K * H * S
    assert "custom-call" in compiled.as_text()
