"""A run's weights as a quantized base: what is restored, what is shared, and what is not trained."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import jaxrm
from jaxrm.errors import UserError
from jaxrm.inference import parameters
from jaxrm.inference.load import load_policy, load_reward_model
from jaxrm.inference.sharded_model import shard_model
from jaxrm.models import lora, quantized, quantized_params
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.sharding.mesh import MeshConfig, build_mesh

ADAPTERS = LoRAConfig(rank=2)


@pytest.fixture(scope="module")
def mesh():
    return build_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])


@pytest.fixture(scope="module")
def wide(small):
    """A shape that blocks of 16 divide."""
    return dataclasses.replace(small, hidden_size=32, intermediate_size=64, head_dim=16)


@pytest.fixture(scope="module")
def base(make_run, wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "sft"
    make_run(folder, config=wide)
    return folder


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_codes_are_those_of_the_restored_kernels(base, mesh, kind):
    whole, stored = load_policy(str(base), mesh=mesh), load_policy(str(base), mesh=mesh, quantize=kind)
    assert quantized_params.kind_of(stored.params) == kind
    expected = quantized_params.quantize_params(whole.params, kind, stored.model.shardings)
    jax.tree.map(np.testing.assert_array_equal, stored.params, expected)


def test_a_policy_and_its_reward_model_share_a_quantized_base(base, make_run, wide, mesh, tmp_path):
    make_run(tmp_path / "rm", "seq2seq_rm", config=wide, base=base, lora=ADAPTERS)
    source = ModelSource(path=str(base), quantize="nf4")
    policy = shard_model(source, mesh, wide, lora=ADAPTERS)
    params = parameters.init_params(policy, jax.random.key(0), 0)
    reward_model = load_reward_model(str(tmp_path / "rm"), mesh=mesh, quantize="nf4")
    mine, theirs = (lora.split(x)[1] for x in (params, reward_model.params))
    assert all(a is b for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True))
    assert quantized_params.kind_of(mine) == "nf4"
    unquantized = load_reward_model(str(tmp_path / "rm"), mesh=mesh)
    assert quantized_params.kind_of(unquantized.params) is None


def test_a_quantized_policy_is_trained_by_adapters_alone(base, mesh):
    policy = load_policy(str(base), mesh=mesh, quantize="int8")
    with pytest.raises(UserError, match=r"are int8, which cannot be trained; train adapters on them, model.with_adap"):
        jaxrm.build_training(policy, jaxrm.losses.sft(policy), optax.sgd(0.1))
    adapted = policy.with_adapters(ADAPTERS)
    state, _ = jaxrm.build_training(adapted, jaxrm.losses.sft(adapted), optax.sgd(0.1))
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)} == {"lora_a", "lora_b"}
