"""Checkpoints of a PPO run: what is saved, and how a run goes on from it.

A checkpoint depends on the step alone, so a run that was killed and started again ends with the same bits as one that
was not.
"""

from typing import Any

import jax
import numpy as np

from jaxrm.algorithms.ppo_state import PPOState
from jaxrm.algorithms.rollout import Networks
from jaxrm.algorithms.state import TrainState
from jaxrm.errors import UserError, flag
from jaxrm.inference.weights import is_recorded_as
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.stages.ppo.data import PPOData
from jaxrm.stages.ppo.learner import Learner
from jaxrm.stages.rewards.function_call import without_files


def saved_arrays(state: PPOState, networks: Networks) -> dict[str, Any]:
    """Pytrees of a checkpoint; ``params`` is the decoder alone, as in a run of SFT, so that any reader finds it."""
    arrays = {
        "params": networks.decoder_params(state.policy.params),
        "opt_state": state.policy.opt_state,
        "feedback": {"now": state.feedback, "initial_calibration": state.initial_calibration},
    }
    if networks.is_shared:
        arrays["value_head"] = state.policy.params["scalar_head"]
    if state.critic is None:
        return arrays
    return arrays | {"critic_params": state.critic.params, "critic_opt_state": state.critic.opt_state}


def save(
    checkpoints: Checkpoints,
    step: int,
    state: PPOState,
    networks: Networks,
    data: PPOData,
    eval_reward: float | None,
    *,
    is_passing: bool,
) -> None:
    """Save a state, unless its step has been saved already.

    Args:
      checkpoints: where.
      step: that the state is of.
      state: after that step.
      networks: that its parameters belong to.
      data: at the position that belongs to the state.
      eval_reward: held-out reward of the state, by which the best checkpoint is chosen; None where it has none.
      is_passing: whether it is saved only to be continued.
    """
    if step not in checkpoints.steps():
        loss = None if eval_reward is None else -eval_reward
        progress = {**data.get_state(), "data": data.fingerprint}
        checkpoints.save(step, saved_arrays(state, networks), progress, loss, is_passing=is_passing)


def restore(learner: Learner, checkpoints: Checkpoints, data: PPOData, key: jax.Array) -> PPOState:
    """State of the latest checkpoint, and the data moved to where they were.

    A function whose file has changed is said and goes on: it may have been mended, since one that fails stops the run.

    Args:
      learner: shapes and shardings of the state.
      checkpoints: at least one of them is there.
      data: moved to the position that belongs to the state.
      key: of the optimizer steps.

    Raises:
      UserError: where the data are not those of the checkpoint.
    """

    def check_progress(step: int, progress: dict[str, Any]) -> None:
        before, now = progress["data"], data.fingerprint
        if not is_recorded_as(without_files(before), without_files(now)):
            raise UserError(
                f"prompts, SFT policy or reward model are no longer those that {checkpoints.folder / str(step)} was "
                f"trained with ({before}, now {now}), so it cannot be continued as it was; give the same ones, or "
                f"put the run aside with {flag('on_existing')}=restart"
            )
        pairs = zip(before.split("; "), now.split("; "), strict=True)
        edited = [f"{one}, now {other}" for one, other in pairs if not is_recorded_as(one, other)]
        if edited and jax.process_index() == 0:
            print(
                f"The file of a reward function is another than {checkpoints.folder / str(step)} was trained with "
                f"({'; '.join(edited)}); the run goes on with the new one. If that is not meant, put the run aside "
                f"with {flag('on_existing')}=restart"
            )

    abstract_arrays = saved_arrays(learner.abstract, learner.networks)
    latest, progress, arrays = checkpoints.restore_latest(abstract_arrays, check_progress)
    data.set_state(progress)
    config = learner.config.ppo
    return _restored(arrays, latest * config.num_epochs * config.num_minibatches, learner.abstract, key)


def _restored(arrays: dict[str, Any], updates: int, abstract: PPOState, key: jax.Array) -> PPOState:
    """The state again.

    Args:
      arrays: as `saved_arrays` made them.
      updates: made so far.
      abstract: shapes and shardings of the state.
      key: of the run, which follows from its seed.
    """
    # Through jit, since device_put refuses a sharding over the devices of other processes.
    to_devices = jax.jit(lambda *x: x, out_shardings=(abstract.policy.step.sharding, abstract.policy.key.sharding))
    step, key = to_devices(np.int32(updates), key)
    params, critic = arrays["params"], None
    if "value_head" in arrays:
        params = {"decoder": params, "scalar_head": arrays["value_head"]}
    if abstract.critic is not None:
        critic_step, critic_key = to_devices(np.int32(updates), key)
        critic = TrainState(critic_step, arrays["critic_params"], arrays["critic_opt_state"], critic_key)
    policy = TrainState(step, params, arrays["opt_state"], key)
    return PPOState(policy, critic, arrays["feedback"]["now"], arrays["feedback"]["initial_calibration"])
