"""The KL of a policy along its own samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.evaluate.answers import log_ratio
from jaxrm.types import ResponseBatch


def test_the_kl_of_a_policy_to_itself_is_exactly_zero(small):
    mesh = build_mesh(dataclasses.replace(MeshConfig(), fsdp=1, data=8))
    graphdef, shapes, _ = build.abstract_decoder(small, ModelSource(preset="tiny"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)
    copy = jax.tree.map(jnp.array, params)
    tokens = jnp.asarray(rng.integers(2, 60, (8, 6)))
    mask = jnp.asarray(np.arange(6) < rng.integers(1, 7, (8, 1)))
    batch = ResponseBatch(tokens, jnp.ones((8, 6), bool), tokens, mask)
    read = log_ratio(graphdef, mesh, 1.0)
    np.testing.assert_array_equal(read(params, copy, batch), np.zeros(8))
    other = jax.tree.map(lambda x: x * 1.1, params)
    assert np.all(np.asarray(read(params, other, batch)) != 0)
