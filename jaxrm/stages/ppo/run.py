"""The PPO stage: a policy learns from token rewards."""

from typing import Any

from jaxrm import atomic
from jaxrm.inference import weights
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stages.ppo.checks import check
from jaxrm.stages.ppo.critic import open_critic
from jaxrm.stages.ppo.data import open_inputs, with_models
from jaxrm.stages.ppo.evaluation import print_samples
from jaxrm.stages.ppo.learner import open_learner
from jaxrm.stages.ppo.report import closing_report
from jaxrm.stages.ppo.train import Opened, train
from jaxrm.stages.report import print_held_out, print_reading
from jaxrm.stages.rewards.sources import open_rewards
from jaxrm.stages.stage import Stage, open_stage


def run(config: Any) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    mesh = build_mesh(config.mesh)
    check(config, mesh)
    with open_stage(config, mesh, records="prompts") as stage:
        inputs = open_inputs(stage)
        prompts = (*inputs.train.examples, *inputs.held_out.examples)
        source, reward_name = open_rewards(config, mesh, stage.tokenizer, prompts, stage.response_text)
        critic = None if config.ppo.shared_trunk else open_critic(stage)
        learner = open_learner(
            config,
            mesh,
            stage.model,
            None if critic is None else critic.model,
            num_steps=inputs.num_steps,
            end_ids=stage.end_ids,
        )
        opened = Opened(learner, critic, source, with_models(inputs, config))

    folder = stage.open_run()
    policy_name = weights.name_of(config.model)  # by every process, since they look into the checkpoints together
    if stage.is_writer:
        _print_inputs(stage, opened, policy_name, reward_name)
    step, finished = train(stage, folder, opened)
    if not finished:
        if stage.is_writer:
            print(f"Stopped and saved at step {step} of {inputs.num_steps}; the same command continues from there.")
        return EXIT_PREEMPTED
    if stage.is_writer:
        _report(config, folder, len(inputs.held_out.examples))
    return 0


def _print_inputs(stage: Stage, opened: Opened, policy_name: str, reward_name: str) -> None:
    config, inputs = stage.config, opened.inputs
    print_reading({f"Prompts in {config.data.path}": inputs.train.report, "Held-out prompts": inputs.held_out.report})
    critic_name = "the policy, on one trunk" if opened.critic is None else opened.critic.name
    print(
        f"{inputs.num_steps:,} steps of {config.data.batch_size} responses of up to "
        f"{config.rollout.sampling.max_new_tokens} tokens to prompts of up to {inputs.prompt_length}; policy from "
        f"{policy_name}, critic from {critic_name}, {config.reward.kind} rewards from {reward_name}"
    )


def _report(config: Any, folder: RunFolder, num_prompts: int) -> None:
    print_held_out(folder)
    atomic.write_json(folder.path / "evaluation.json", closing_report(folder, config.reward.kind, num_prompts))
    print_samples(folder)
    print(f"The run is in {folder.path}; samples are in {folder.samples}")
