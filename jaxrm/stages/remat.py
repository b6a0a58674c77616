"""What ``config.model.remat=auto`` comes to: the most of each layer that the devices have room to keep.

It is decided before a run, from shapes and the memory of a device alone, and recorded as the run's ``model.remat``. So
a run that goes on, on whatever devices, computes as it did.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrm.algorithms.optimizer import build_optimizer
from jaxrm.algorithms.ppo_config import is_one_pass
from jaxrm.algorithms.reward_config import sources_of
from jaxrm.algorithms.state import create
from jaxrm.errors import flag
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.activations import activation_bytes
from jaxrm.models.build import AUTO_REMAT
from jaxrm.models.transformer import REMAT_POLICIES
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.runtime.hardware import GIB, device_limit
from jaxrm.runtime.run_folder import from_writer
from jaxrm.sharding.mesh import batch_shards, build_mesh
from jaxrm.sharding.partition import device_bytes
from jaxrm.stage_config import PLANNED, PPO, TrainingConfig

# Shares of a device's memory that a run may fill by this reckoning, which is rough (jaxrm choice). The memory of a CPU
# is other programs' too.
_SHARE, _SHARE_OF_CPU = 0.85, 0.5
_FASTEST_FIRST = ("dots", "attention", "full")


class Decision(NamedTuple):
    """A config that says what is kept.

    Attributes:
      config: of the stage, whose ``model.remat`` is not ``auto`` where it trains.
      line: what was decided and why, for people; empty where nothing was to be decided.
    """

    config: Any
    line: str


def decide(config: Any) -> Decision:
    """Decide for the devices of this process, or as the run in ``config.run_dir`` did; all processes decide alike.

    Raises:
      UserError: where there is no such model, or it does not fit the mesh.
    """
    if config.algorithm not in PLANNED or config.model.remat != AUTO_REMAT:
        return Decision(config, "")
    recorded = None if config.on_existing == "restart" else _recorded(config.run_dir)
    is_writer = jax.process_index() == 0
    if recorded is not None and is_writer:
        decision = _decided(config, recorded, f"as in {config.run_dir}")
    else:
        decision = decide_for(config, build_mesh(config.mesh), _memory_to_fill())
    if jax.process_count() > 1:
        remat = REMAT_POLICIES[from_writer(REMAT_POLICIES.index(decision.config.model.remat), is_writer)]
        decision = _decided(config, remat, "as the first process decided")._replace(line=decision.line)
    return decision


def decide_for(config: TrainingConfig, mesh: Mesh, memory: float | None) -> Decision:
    """Decide for devices that need not exist.

    Args:
      config: of a stage that trains.
      mesh: the devices.
      memory: bytes that a run may fill on one of them; None where that is unknown, and the least is kept.
    """
    if config.algorithm not in PLANNED or config.model.remat != AUTO_REMAT:
        return Decision(config, "")
    needs = _bytes_needed(config, mesh)
    if memory is None:
        return _decided(config, "full", "the memory of the devices is unknown")
    remat = next((name for name, need in needs.items() if need <= memory), "full")
    fitting = f"about {needs[remat] / GIB:.3g} of {memory / GIB:.3g} GiB that a run may fill"
    more = "".join(
        f"; {name} needs {need / GIB:.3g}" for name, need in needs.items() if need > memory and name != remat
    )
    return _decided(config, remat, fitting + more)


def for_chip(memory: float) -> float:
    """Bytes that a run may fill of a device's ``memory``."""
    return memory * _SHARE


def _decided(config: Any, remat: str, why: str) -> Decision:
    decided = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    return Decision(decided, f"{flag('model.remat')}={AUTO_REMAT} is {remat}: {why}")


def _memory_to_fill() -> float | None:
    limit = device_limit()
    if limit is None:
        return None
    return limit * (_SHARE_OF_CPU if jax.local_devices()[0].platform == "cpu" else _SHARE)


def _recorded(run_dir: str) -> str | None:
    """What the run in a folder was decided to keep; None where there is no such run."""
    try:
        record = json.loads((Path(run_dir).expanduser() / "run.json").read_text(encoding="utf-8"))
        remat = record["config"]["model"]["remat"]
    except (OSError, ValueError, TypeError, KeyError):  # what is wrong with it is said when the run is opened
        return None
    return remat if remat in REMAT_POLICIES else None


def _bytes_needed(config: TrainingConfig, mesh: Mesh) -> dict[str, float]:
    """Bytes on one device by what is kept, the fastest first: what stays there, gradients and activations."""
    source = weights.as_stored(config.model) if config.lora.is_on else config.model
    decoder = sharded_model.shard_model(source, mesh, lora=config.lora)
    state, gradients = _state_bytes(decoder, config, config.optimizer)
    others = device_bytes(with_shardings(decoder.frozen_shapes, decoder.frozen_shardings))
    share, num_models = 1 / (batch_shards(mesh) * config.num_microbatches), 1
    tokens = share * config.data.batch_size * config.data.max_length
    if isinstance(config, PPO):
        paths = {source.model for source in sources_of(config).values() if source.model is not None}
        others += _read_only_bytes(decoder) * (1 + len(paths))  # the reference, and reward models as large as it
        in_one_pass = is_one_pass(config.ppo, config.num_microbatches)
        tokens /= 1 if in_one_pass else config.ppo.num_minibatches
        tokens += 0 if config.ptx is None else share * config.ptx.batch_size * config.ptx.max_length
        if config.ppo.has_values and not config.ppo.shared_trunk:
            critic, critic_gradients = _state_bytes(decoder, config, config.critic.optimizer)
            state += critic
            if in_one_pass:  # policy and critic have one backward pass
                gradients, num_models = gradients + critic_gradients, 2
    itemsize, axes = jnp.dtype(config.model.dtype).itemsize, dict(mesh.shape)
    return {
        remat: state + others + gradients + num_models * activation_bytes(decoder.config, tokens, itemsize, remat, axes)
        for remat in _FASTEST_FIRST
    }


def _state_bytes(model: ShardedModel, config: TrainingConfig, options: Any) -> tuple[float, float]:
    """Bytes of a training state, and of the gradients of what it trains."""
    optimizer, shapes = build_optimizer(options, config.num_steps or 1000), model.trained_shapes
    sharding = sharded_model.state_shardings(model, optimizer, model.mesh, offload=options.offload)
    state = jax.eval_shape(lambda params: create(params, optimizer, jax.random.key(0)), shapes)
    return device_bytes(with_shardings(state, sharding)), device_bytes(with_shardings(shapes, model.trained_shardings))


def _read_only_bytes(model: ShardedModel) -> float:
    """Bytes of a model like it that is not trained; of its adapters where there is a base, which they share."""
    if model.lora.is_on:
        return device_bytes(with_shardings(model.trained_shapes, model.trained_shardings))
    return device_bytes(with_shardings(model.read_only_shapes, model.shardings))
