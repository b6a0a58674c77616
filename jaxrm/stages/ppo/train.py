"""Training in a PPO run's folder: the state, its calibration, the evaluation and the metrics around the loop."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxrm.algorithms.optimizer import learning_rate
from jaxrm.algorithms.ppo import Programs
from jaxrm.algorithms.ppo_state import PPOState, steps_of
from jaxrm.algorithms.reward_config import weights_of
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.config import dicts
from jaxrm.inference import sharded_model
from jaxrm.inference.parameters import init_key
from jaxrm.models import lora
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.metrics import open_metrics, read_rows, remove_rows_after
from jaxrm.runtime.preemption import catch_signals
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.inputs.prompts import fixed_batches
from jaxrm.stages.late_evaluation import is_evaluation_pending
from jaxrm.stages.ppo.checkpoints import restore
from jaxrm.stages.ppo.critic import Critic, zero_head
from jaxrm.stages.ppo.data import PPOInputs
from jaxrm.stages.ppo.evaluation import PolicyEvaluation
from jaxrm.stages.ppo.learner import Learner
from jaxrm.stages.ppo.loop import PPORun, fit
from jaxrm.stages.ppo.report import PPOReporter
from jaxrm.stages.rewards.calibration import PolicyRewards, calibration_in_words, calibration_of
from jaxrm.stages.rewards.judges import JudgeCosts
from jaxrm.stages.stage import Stage


@dataclass(frozen=True)
class Opened:
    """What a run needs, opened and checked before its folder is.

    Attributes:
      learner: policy and critic over the devices.
      critic: where the critic starts from; None where it has no trunk of its own.
      source: of token rewards.
      inputs: prompts, and SFT rows where they are mixed in.
      base: frozen parameters under the adapters of all models; ``{}`` where they have none.
    """

    learner: Learner
    critic: Critic | None
    source: RewardSource
    inputs: PPOInputs
    base: Any


@dataclass(frozen=True)
class _Keys:
    """Typed PRNG keys of a run, from its seed."""

    run: jax.Array
    held_out: jax.Array
    calibration: jax.Array
    optimizer: jax.Array


def train(stage: Stage, folder: RunFolder, opened: Opened) -> tuple[int, bool]:
    """Train in ``folder``, from its latest checkpoint if it has one.

    Args:
      stage: whose config says how.
      folder: the opened run.
      opened: models, rewards and data.

    Returns:
      The last step, and whether the run is complete. It is not where it was asked to stop.
    """
    config, learner, num_steps = stage.config, opened.learner, opened.inputs.num_steps
    keys = _Keys(*jax.random.split(jax.random.key(config.seed), 4))
    (reference, _), base = lora.split(stage.init_params(init_key(config.seed))), opened.base
    reference = sharded_model.in_compute_dtype(reference, config.model.dtype)
    programs = plain = learner.programs(opened.source)
    if config.rollout.responses_per_prompt > 1 or config.rollout.is_quantized:  # which are for training alone
        plain = dataclasses.replace(programs, rollout=learner.sampler(config.rollout.sampling))
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if checkpoints.steps():
        state = restore(learner, checkpoints, opened.inputs.data, keys.optimizer)
    else:
        state = _init_state(stage, opened, keys.optimizer)
        state = _calibrated(stage, opened, plain, lora.join(base, reference), base, state, keys)
    first_step = steps_of(state, config.ppo)
    if stage.is_writer:
        numbers = calibration_in_words(state.initial_calibration)
        print(f"Token rewards: {numbers} (from responses of the SFT policy)")
    evaluation_pending = is_evaluation_pending(
        folder, checkpoints, first_step, num_steps, config.evaluation.every, _loss_of_row
    )
    if stage.is_writer:  # an evaluation that was cut short may have written some of its samples
        remove_rows_after(folder.samples, first_step - 1 if evaluation_pending or first_step == 0 else first_step)
    evaluation = _evaluation(stage, folder, opened, plain, base, reference, keys)
    with (
        open_metrics(folder, config.logging, after_step=first_step or None, run_config=dicts.to_dict(config)) as writer,
        Progress("ppo", num_steps, done=first_step, enabled=stage.show_progress) as progress,
        catch_signals(has_progress=False) as stop,
    ):
        rows = read_rows(folder.metrics)
        run = PPORun(
            learner=learner,
            programs=programs,
            base=base,
            reference_params=reference,
            data=opened.inputs.data,
            evaluate=functools.partial(evaluation, stop=stop),
            checkpoints=checkpoints,
            reporter=PPOReporter(
                writer,
                progress,
                every=config.logging.every,
                num_steps=num_steps,
                learning_rate=_learning_rate_of_step(learner),
                seen=[row for row in rows if "entropy" in row],
                judge_costs=JudgeCosts(opened.source, rows[-1] if rows else {}).metrics,
            ),
            stop=stop,
        )
        state, finished = fit(run, state, keys.run, evaluation_pending=evaluation_pending)
    checkpoints.close()
    return steps_of(state, config.ppo), finished


def _init_state(stage: Stage, opened: Opened, key: jax.Array) -> PPOState:
    """The state before the first step, not calibrated yet."""
    params, critic_params = stage.init_params(init_key(stage.config.seed)), None
    if stage.config.ppo.shared_trunk:
        params = {"decoder": params, "scalar_head": zero_head(opened.learner.policy)}
    if opened.critic is not None:
        critic_params, _ = lora.split(opened.critic.init_params(stage, init_key(stage.config.seed)))
    return opened.learner.init_state(lora.split(params)[0], critic_params, key)


def _calibrated(
    stage: Stage, opened: Opened, programs: Programs, reference: Any, base: Any, state: PPOState, keys: _Keys
) -> PPOState:
    """The state with scale and center of the rewards, from responses of the policy that it starts with."""
    learner, inputs = opened.learner, opened.inputs
    calibration = calibration_of(
        stage.config,
        stage.mesh,
        inputs.train.examples,
        inputs.prompt_length,
        functools.partial(programs.rollout, learner.decoder_params(base, state.policy.params)),
        PolicyRewards(stage.config, stage.model, reference, opened.source),
        keys.calibration,
        stage.show_progress,
    )
    state = learner.calibrated(state, calibration)
    if opened.critic is None or state.critic is None:
        return state
    critic = opened.critic.calibrated(state.critic, calibration, weights_of(stage.config))
    return dataclasses.replace(state, critic=critic)


def _evaluation(
    stage: Stage, folder: RunFolder, opened: Opened, programs: Programs, base: Any, reference: Any, keys: _Keys
) -> PolicyEvaluation:
    config, inputs = stage.config, opened.inputs
    if config.evaluation.sampling != config.rollout.sampling:
        programs = dataclasses.replace(programs, rollout=opened.learner.sampler(config.evaluation.sampling))
    return PolicyEvaluation(
        learner=opened.learner,
        programs=programs,
        base=base,
        reference_params=reference,
        prompts=inputs.held_out.examples,
        batches=fixed_batches(inputs.held_out.examples, config.data.batch_size, inputs.prompt_length, stage.mesh),
        key=keys.held_out,
        tokenizer=stage.tokenizer,
        folder=folder,
    )


def _loss_of_row(row: Mapping[str, Any]) -> float | None:
    """What checkpoints are judged by, which is the lower the better."""
    return None if "eval_reward" not in row else -float(row["eval_reward"])


def _learning_rate_of_step(learner: Learner) -> Callable[[int], Any]:
    """The policy's learning rate in the first update of a step counted from 0."""
    schedule = learning_rate(learner.config.optimizer, learner.num_steps * learner.updates_per_step)
    return lambda step: schedule(step * learner.updates_per_step)
