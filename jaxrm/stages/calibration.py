"""The calibration pass before PPO: how large rewards are, and around what centre, on responses of the SFT policy."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxrm.algorithms import ppo
from jaxrm.algorithms.ppo_state import PPOState
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError
from jaxrm.ops.token_rewards import Calibration
from jaxrm.runtime.progress import Progress
from jaxrm.stages.ppo_learner import Learner
from jaxrm.stages.prompts import fixed_batches
from jaxrm.stages.rewards import calibrate


def calibration_of(
    learner: Learner,
    programs: ppo.Programs,
    state: PPOState,
    reference: Any,
    examples: Sequence[PromptExample],
    width: int,
    key: jax.Array,
    show: bool,
) -> Calibration:
    """Scale and centre of the rewards, from responses of the policy before it has learnt anything.

    Args:
      learner: policy and critic over the devices.
      programs: the jitted parts of a step.
      state: before the first step.
      reference: parameters of the SFT policy.
      examples: prompts to answer.
      width: that prompts are padded to.
      key: typed PRNG key.
      show: draw a bar.

    Raises:
      UserError: where the rewards are not finite.
    """
    config, rows = learner.config, learner.config.data.batch_size
    critic_params = None if state.critic is None else state.critic.params
    decoder_params = learner.networks.decoder_params(state.policy.params)
    rewards = []
    with Progress("calibrate", len(examples), unit="responses", enabled=show) as progress:
        for number, (prompts, mask) in enumerate(fixed_batches(examples, rows, width, learner.mesh)):
            batch = programs.respond(decoder_params, prompts, mask, jax.random.fold_in(key, number))
            readings = programs.read(state.policy.params, critic_params, reference, batch)
            rewards.append(programs.reward(state.first_calibration, batch, readings.reference_log_probs))
            jax.block_until_ready(rewards)
            progress.update((number + 1) * rows)
    found = calibrate(
        config.reward.kind, rewards, scale=config.reward.scale, center=config.reward.center, mesh=learner.mesh
    )
    if not all(map(math.isfinite, jax.tree.leaves(jax.device_get(found)))):
        raise UserError(
            "the rewards of the SFT policy's responses are not finite; the reward model is spoiled, give another, e.g. "
            "--config.reward.model=RUN_DIR/checkpoints/best"
        )
    if config.reward.scale == "unit" and float(found.scale) == 1.0:
        print("warning: all responses of the SFT policy have the same reward, so there is nothing to scale or to learn")
    return found
