"""One PPO step from responses and rewards that are given, on the CPU or the accelerator."""

import dataclasses
from typing import Any

import jax
import numpy as np
from support.ppo import EOS, KEY, batch_of, experiment, rewarded

from jaxrm.algorithms import ppo
from jaxrm.algorithms.ppo_one_pass import OnePassBatch
from jaxrm.inference import sharded_model
from jaxrm.models import heads
from jaxrm.models.build import ModelSource, init_params, init_scalar_head
from jaxrm.models.config import ModelConfig
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.ppo.learner import open_learner


def step(shape: ModelConfig, device: jax.Device, dtype: str, attention: str) -> dict[str, Any]:
    """Log-probs of the reference, losses, and the moments of Adam, which follow the gradients."""
    config = dataclasses.replace(experiment(), model=ModelSource(preset="tiny", dtype=dtype, attention=attention))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        drawn = [init_params(shape, config.model, jax.random.key(seed), None) for seed in range(3)]
        head = init_scalar_head(shape, jax.random.key(3), None)
        batch = batch_of()
        scores = np.linspace(-1, 1, batch.responses.shape[0], dtype=np.float32)
        rewards = rewarded(batch, scores)
    mesh = build_mesh(MeshConfig(1, 1, 1), [device])
    decoder = sharded_model.shard_model(config.model, mesh, shape)
    scalar = sharded_model.shard_scalar_model(config.model, mesh, shape)
    learner = open_learner(config, mesh, decoder, scalar, num_steps=100, end_ids=(EOS,))
    programs = learner.programs(lambda *_: None)
    policy, reference = (jax.device_put(drawn[i], decoder.shardings) for i in (0, 2))
    critic = jax.device_put(heads.from_decoder_params(drawn[1], head), scalar.shardings)
    batch, rewards = jax.device_put(jax.device_get((batch, rewards)), partition.batch_sharding(mesh))
    state = learner.init_state(policy, critic, KEY)
    log_probs = programs.reference_log_probs({}, reference, batch)
    inputs = OnePassBatch(batch, log_probs, rewards)
    state, estimated, updates = ppo.update_in_one_pass(programs, state, {}, inputs)
    metrics = {**jax.device_get(estimated), **jax.device_get(updates)[0]}
    return {
        "log-probs of the reference": np.asarray(log_probs),
        "losses": [np.asarray(metrics[name]) for name in ("value_loss", "kl", "advantage_std")],
        "norms of the gradients": [np.asarray(metrics[name]) for name in ("grad_norm", "critic_grad_norm")],
        "moments of the policy": _floats(state.policy.opt_state),
        "moments of the critic": _floats(state.critic.opt_state),
    }


def _floats(tree: Any) -> list[np.ndarray]:
    leaves = jax.device_get(jax.tree.leaves(tree))
    return [leaf for leaf in leaves if np.issubdtype(leaf.dtype, np.floating)]
