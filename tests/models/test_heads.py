"""Scalar heads, and decoders that carry one in place of their language head."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrm.models import build, heads
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.models.transformer import Decoder
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh

TINY = dataclasses.replace(
    PRESETS["tiny"], vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, head_dim=8
)
UNTIED = dataclasses.replace(TINY, tie_embeddings=False)
SOURCE = ModelSource(preset="tiny")


def scalar_params(config):
    decoder = build.init_params(config, SOURCE, jax.random.key(0), None)
    return decoder, heads.from_decoder_params(decoder, build.init_scalar_head(config, jax.random.key(1), None))


@pytest.fixture(scope="module")
def untied():
    return scalar_params(UNTIED)


def read(graphdef, params, tokens, segment_ids=None, positions=None):
    B, T = tokens.shape
    segment_ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T)) if positions is None else positions

    @jax.jit
    def forward(params):
        return nnx.merge(graphdef, params)(tokens, positions=positions, segment_ids=segment_ids)

    return forward(params)


def test_a_head_is_a_scalar_product():
    head = heads.ScalarHead(3, rngs=nnx.Rngs(0))
    head.kernel[...] = jnp.asarray([1.0, -2.0, 0.5])
    hidden = jnp.asarray([[[1.0, 1.0, 1.0], [2.0, 0.0, 4.0]]])
    np.testing.assert_allclose(head(hidden), [[-0.5, 4.0]])


def test_a_head_adds_up_in_float32():
    """In bfloat16, 256 + 1 would be 256."""
    head = heads.ScalarHead(2, rngs=nnx.Rngs(0))
    head.kernel[...] = jnp.ones(2)
    got = head(jnp.asarray([256.0, 1.0], jnp.bfloat16))
    assert got.dtype == jnp.float32 and float(got) == 257.0


def test_first_kernels_have_the_variance_that_is_said():
    config = dataclasses.replace(TINY, hidden_size=4096)
    kernel = np.asarray(build.init_scalar_head(config, jax.random.key(0), None)["kernel"])
    assert kernel.shape == (4096,) and kernel.dtype == np.float32
    np.testing.assert_allclose(kernel.std(), 4097**-0.5, rtol=0.05)
    assert abs(kernel.mean()) < 4 * 4097**-0.5 / 64
    again, other = (build.init_scalar_head(config, jax.random.key(seed), None)["kernel"] for seed in (0, 1))
    assert (kernel == again).all() and not (kernel == other).any()


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_parameters_from_a_decoder_are_those_of_the_model(config):
    """Name by name and shape by shape: the trunk as it is, without a language head."""
    _, shapes, axes = build.abstract_scalar_model(config, SOURCE)
    _, decoder_shapes, _ = build.abstract_decoder(config, SOURCE)
    head = {"kernel": jax.ShapeDtypeStruct((32,), jnp.float32)}
    chex.assert_trees_all_equal_shapes_and_dtypes(heads.from_decoder_params(decoder_shapes, head), shapes)
    assert "head" not in shapes["decoder"] and set(shapes) == {"decoder", "scalar_head"}
    assert axes["scalar_head"] == {"kernel": ("norm",)}


def test_a_trunk_with_a_language_head_is_refused():
    with pytest.raises(AssertionError, match="language head"):
        nnx.eval_shape(lambda: heads.ScalarModel(Decoder(UNTIED, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)))


def test_numbers_are_the_head_on_the_decoders_states(untied):
    decoder, params = untied
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 7)), jnp.int32)
    hidden = read(build.abstract_decoder(UNTIED, SOURCE)[0], decoder, tokens)
    got = read(build.abstract_scalar_model(UNTIED, SOURCE)[0], params, tokens)
    np.testing.assert_allclose(got, np.asarray(hidden) @ np.asarray(params["scalar_head"]["kernel"]), atol=1e-5)


def test_numbers_are_float32_whatever_the_decoder_computes_in(untied):
    graphdef = build.abstract_scalar_model(UNTIED, ModelSource(preset="tiny", dtype="bfloat16"))[0]
    assert read(graphdef, untied[1], jnp.zeros((1, 4), jnp.int32)).dtype == jnp.float32


def test_segments_of_a_row_are_numbered_apart(untied):
    graphdef = build.abstract_scalar_model(UNTIED, SOURCE)[0]
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (1, 9)), jnp.int32)
    segments, positions = jnp.asarray([[1] * 4 + [2] * 5]), jnp.asarray([[*range(4), *range(5)]])
    packed = read(graphdef, untied[1], tokens, segments, positions)
    apart = [read(graphdef, untied[1], part) for part in (tokens[:, :4], tokens[:, 4:])]
    np.testing.assert_allclose(packed, np.concatenate(apart, axis=1), atol=1e-5)


def test_a_first_head_lies_where_it_is_told():
    mesh = build_mesh(MeshConfig(2, 2, 2))
    _, shapes, axes = build.abstract_scalar_model(TINY, SOURCE)
    shardings = partition.parameter_shardings(shapes, axes, mesh)["scalar_head"]
    placed = build.init_scalar_head(TINY, jax.random.key(1), shardings)
    assert placed["kernel"].sharding == shardings["kernel"] and placed["kernel"].sharding.is_fully_replicated
    whole = build.init_scalar_head(TINY, jax.random.key(1), None)
    np.testing.assert_array_equal(placed["kernel"], whole["kernel"])
