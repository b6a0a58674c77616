"""The PPO stage: a policy learns from token rewards."""

from dataclasses import dataclass
from typing import Any

from jaxrm import atomic
from jaxrm.algorithms.reward_config import in_words
from jaxrm.data.readers import ReadReport
from jaxrm.inference import weights
from jaxrm.inference.rollout_model import check_cache, layout_in_words, layout_of
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stages.inspection import Inspection, inspect_prompts
from jaxrm.stages.ppo.checks import check
from jaxrm.stages.ppo.critic import Critic, open_critic
from jaxrm.stages.ppo.data import PPOInputs, open_inputs, with_models
from jaxrm.stages.ppo.evaluation import print_samples
from jaxrm.stages.ppo.learner import Learner, open_learner
from jaxrm.stages.ppo.report import closing_report
from jaxrm.stages.ppo.train import Opened, train
from jaxrm.stages.report import adapters_in_words, print_held_out, print_quantized, print_reading
from jaxrm.stages.rewards.function_call import without_files
from jaxrm.stages.rewards.judges import check_reachable, judges_in_words
from jaxrm.stages.rewards.sources import check_rewards, open_rewards
from jaxrm.stages.stage import Stage, open_stage


def run(config: Any) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    inputs = _open_inputs(config)
    stage = inputs.stage
    check_reachable(config)
    if inputs.critic is not None:
        inputs.critic.check_base(stage)
    base = stage.load_base()  # before the reward model, which may have only a part of it
    source, reward_name = open_rewards(
        config, stage.mesh, stage.vocabulary, inputs.data.every_prompt, stage.response_text, stage.end_ids
    )
    opened = Opened(inputs.learner, inputs.critic, source, with_models(inputs.data, config), base)

    read = without_files(opened.inputs.data.fingerprint)  # one process calls functions for all
    folder = stage.open_run([read, inputs.data.held_out.examples], layout=layout_of(inputs.learner.rollout_model))
    policy_name = weights.name_of(config.model)  # by every process, since they look into the checkpoints together
    if stage.is_writer:
        _print_inputs(stage, opened, policy_name, reward_name)
    step, finished = train(stage, folder, opened)
    if not finished:
        if stage.is_writer:
            print(
                f"Stopped and saved at step {step} of {inputs.data.num_steps}; the same command continues from there."
            )
        return EXIT_PREEMPTED
    if stage.is_writer:
        _report(config, folder, len(inputs.data.held_out.examples))
    return 0


def inspect(config: Any) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is written."""
    inputs = _open_inputs(config)
    data, ppo = inputs.data, config.ppo
    passes = data.num_steps * data.prompts_per_step / len(data.train.examples)
    facts = {
        "responses": f"{config.data.batch_size:,} a step{_to_each_prompt(config)}, of up to "
        f"{config.rollout.sampling.max_new_tokens:,} tokens",
        "steps": f"{data.num_steps:,}, {passes:.3g} passes over the prompts",
        "updates a step": f"{ppo.num_epochs * ppo.num_minibatches:,}",
        "responses are written on": _written(inputs.learner),
        "rewards": inputs.reward_name,
        **judges_in_words(config),
        "critic": _critic_name(config, inputs.critic),
    }
    return inspect_prompts(inputs.stage, _reading(inputs.stage, data), data.train.examples, facts)


@dataclass(frozen=True)
class _Inputs:
    """What a run needs, opened and checked before any weights are read and its folder is made."""

    stage: Stage
    data: PPOInputs
    reward_name: str
    critic: Critic | None
    learner: Learner


def _open_inputs(config: Any) -> _Inputs:
    mesh = build_mesh(config.mesh)
    check(config, mesh)
    with open_stage(config, mesh, records="prompts") as stage:
        data = open_inputs(stage)
        reward_name = check_rewards(config, mesh, stage.vocabulary, data.every_prompt)
        critic = open_critic(stage) if config.ppo.has_values and not config.ppo.shared_trunk else None
        learner = open_learner(
            config,
            mesh,
            stage.model,
            None if critic is None else critic.model,
            num_steps=data.num_steps,
            end_ids=stage.end_ids,
        )
        check_cache(config, learner.rollout_model, data.prompt_length)
    return _Inputs(stage, data, reward_name, critic, learner)


def _reading(stage: Stage, data: PPOInputs) -> dict[str, ReadReport]:
    return {f"Prompts in {stage.config.data.path}": data.train.report, "Held-out prompts": data.held_out.report}


def _critic_name(config: Any, critic: Critic | None) -> str:
    if not config.ppo.has_values:
        return f"none, since advantages are those of {config.ppo.advantage}"
    return "the policy, on one trunk" if critic is None else critic.name


def _written(learner: Learner) -> str:
    """The devices that write, and what the loop over tokens reads."""
    codes = [name for name in ("weights", "cache") if getattr(learner.config.rollout, name) == "int8"]
    return f"{layout_in_words(learner.rollout_model)}{', int8 ' if codes else ''}{' and '.join(codes)}"


def _to_each_prompt(config: Any) -> str:
    n = config.rollout.responses_per_prompt
    return "" if n == 1 else f" ({n:,} to each prompt)"


def _print_inputs(stage: Stage, opened: Opened, policy_name: str, reward_name: str) -> None:
    config, inputs = stage.config, opened.inputs
    critic = f"critic from {_critic_name(config, opened.critic)}" if config.ppo.has_values else "no critic"
    print_reading(_reading(stage, inputs))
    if stage.model.lora.is_on:
        print(f"{adapters_in_words(stage)}, in memory once for all models on it")
    print_quantized(stage.model)
    print(
        f"{inputs.num_steps:,} steps of {config.data.batch_size} responses{_to_each_prompt(config)} of up to "
        f"{config.rollout.sampling.max_new_tokens} tokens to prompts of up to {inputs.prompt_length}; policy from "
        f"{policy_name}, {critic}, rewards: {reward_name}"
    )
    if stage.mesh.size > 1 or config.rollout.is_quantized:
        print(f"Responses are written on {_written(opened.learner)}")


def _report(config: Any, folder: RunFolder, num_prompts: int) -> None:
    print_held_out(folder)
    atomic.write_json(folder.path / "evaluation.json", closing_report(folder, in_words(config), num_prompts))
    print_samples(folder)
    print(f"The run is in {folder.path}; samples are in {folder.samples}")
