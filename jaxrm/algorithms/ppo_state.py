"""What PPO carries from step to step, and how it is saved and read again."""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.rollout import Networks
from jaxrm.algorithms.state import TrainState
from jaxrm.data.loader import BatchIterator
from jaxrm.errors import UserError, flag
from jaxrm.ops import reward_scaling
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.types import Rollout, TokenBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardAndKLState:
    """How rewards are scaled and charged; it moves from step to step.

    Attributes:
      calibration: scale and (running) centre of the token rewards.
      kl_coef: ``[]`` float32, beta.
    """

    calibration: reward_scaling.Calibration
    kl_coef: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOState:
    """All that a run is, between two steps.

    Attributes:
      policy: of the decoder, or of both heads on one trunk.
      critic: None where the trunk is shared.
      feedback: as it is now.
      initial_calibration: as it was before the first step; evaluations use it, so that they can be compared.
    """

    policy: TrainState
    critic: TrainState | None
    feedback: RewardAndKLState
    initial_calibration: reward_scaling.Calibration


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOBatch:
    """What one update sees.

    Attributes:
      rollout: responses ``[B, T]``.
      ptx: rows of SFT data, or None.
      ptx_weight: ``[rows]`` float32, response tokens over SFT tokens, the same in every row: it makes of the sum over
        SFT tokens response tokens times their mean, so that both losses are divided by the same number; None without
        ``ptx``.
    """

    rollout: Rollout
    ptx: TokenBatch | None = None
    ptx_weight: jax.Array | None = None


def saved_arrays(state: PPOState, networks: Networks) -> dict[str, Any]:
    """Pytrees of a checkpoint; ``params`` is the decoder alone, as in a run of SFT, so that any reader finds it."""
    arrays = {
        "params": networks.decoder_params(state.policy.params),
        "opt_state": state.policy.opt_state,
        "feedback": {"now": state.feedback, "initial_calibration": state.initial_calibration},
    }
    if state.critic is None:
        return arrays | {"value_head": state.policy.params["scalar_head"]}
    return arrays | {"critic_params": state.critic.params, "critic_opt_state": state.critic.opt_state}


def restore(
    abstract: PPOState,
    checkpoints: Checkpoints,
    networks: Networks,
    config: PPOConfig,
    prompts: BatchIterator,
    ptx: BatchIterator | None,
    data_fingerprint: str,
    key: jax.Array,
) -> PPOState:
    """State of the latest checkpoint, and the loaders moved to where they were.

    Args:
      abstract: shapes and shardings of the state, each leaf a `jax.ShapeDtypeStruct`.
      checkpoints: at least one of them is there.
      networks: what its parameters belong to.
      config: options of PPO.
      prompts: moved to the position that belongs to the state.
      ptx: the same.
      data_fingerprint: of the prompts, the SFT data and the models, as it was saved.
      key: of the optimizer steps.

    Raises:
      UserError: where the data are not those of the checkpoint.
    """
    latest = checkpoints.steps()[-1]
    progress = checkpoints.progress(latest)
    if progress["data"] != data_fingerprint:
        raise UserError(
            f"prompts, SFT policy or reward model are no longer those that {checkpoints.folder / str(latest)} was "
            f"trained with ({progress['data']}, now {data_fingerprint}), so it cannot be continued as it was; give the "
            f"same ones, or put the run aside with {flag('on_existing')}=restart"
        )
    arrays = checkpoints.restore(latest, saved_arrays(abstract, networks))
    prompts.set_state(progress["prompts"])
    if ptx is not None:
        ptx.set_state(progress["ptx"])
    return _restored(arrays, latest * config.num_epochs * config.num_minibatches, abstract, key)


def steps_of(state: PPOState, config: PPOConfig) -> int:
    """Rollouts that a state has been updated on."""
    return int(state.policy.step) // (config.num_epochs * config.num_minibatches)


def _restored(arrays: dict[str, Any], updates: int, abstract: PPOState, key: jax.Array) -> PPOState:
    """The state again.

    Args:
      arrays: as `saved_arrays` made them.
      updates: made so far.
      abstract: shapes and shardings of the state.
      key: of the run, which follows from its seed.
    """
    # Through jit, since device_put refuses a sharding over the devices of other processes.
    place = jax.jit(lambda *x: x, out_shardings=(abstract.policy.step.sharding, abstract.policy.key.sharding))
    step, key = place(np.int32(updates), key)
    params, critic = arrays["params"], None
    if abstract.critic is None:
        params = {"decoder": params, "scalar_head": arrays["value_head"]}
    else:
        critic_step, critic_key = place(np.int32(updates), key)
        critic = TrainState(critic_step, arrays["critic_params"], arrays["critic_opt_state"], critic_key)
    policy = TrainState(step, params, arrays["opt_state"], key)
    return PPOState(policy, critic, arrays["feedback"]["now"], arrays["feedback"]["initial_calibration"])
