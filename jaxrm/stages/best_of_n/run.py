"""The best-of-n stage: a policy answers every prompt n times, and the best answers become demonstrations.

In the run's folder are ``winners.jsonl``, one demonstration a line, which SFT takes as its ``config.data.path``;
``candidates.jsonl``, the draws for each prompt; and ``evaluation.json``, the closing table. ``config.num_steps`` bounds
the batches of prompts; without it every prompt is answered once. A batch in ``candidates.jsonl`` is not drawn again.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxrm import atomic
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.data.loader import fingerprint
from jaxrm.data.prompts import PromptExample
from jaxrm.data.readers import ReadReport
from jaxrm.data.tasks.prompts import prompt_field
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.rollout_model import build_sampler, check_cache, divide_responses, layout_of, shard_rollout_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models.sampling import GenerateOptions
from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.preemption import EXIT_PREEMPTED
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stages.best_of_n import report
from jaxrm.stages.best_of_n.candidates import CANDIDATES, Draws, draw, load_progress, save_start
from jaxrm.stages.best_of_n.checks import check
from jaxrm.stages.inputs.prompts import Prompts, numbered, stage_prompt_length, stage_prompts
from jaxrm.stages.inspection import Inspection, inspect_prompts
from jaxrm.stages.judge import check_judgeable
from jaxrm.stages.report import print_reading
from jaxrm.stages.rewards.calibration import PolicyRewards, calibration_in_words, calibration_of
from jaxrm.stages.rewards.judges import JudgeCosts, check_reachable, judges_in_words, print_costs
from jaxrm.stages.rewards.sources import check_rewards, identities_of, open_rewards
from jaxrm.stages.stage import Stage, check_run_folder, judge_of, open_run_folder, open_stage

WINNERS = "winners.jsonl"


def run(config: Any) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, 75 when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    if _is_complete(config):
        check(config, build_mesh(config.mesh))
        check_run_folder(config)
        return _close(open_run_folder(config), config)
    inputs = _open_inputs(config)
    stage, prompts, examples = inputs.stage, inputs.prompts, inputs.examples
    check_reachable(config)
    base = stage.load_base()  # before the reward model, which may have only a part of it
    source, reward_name = open_rewards(
        config, stage.mesh, stage.vocabulary, prompts.examples, stage.response_text, stage.end_ids
    )

    folder = stage.open_run([examples], keeps_model=False, layout=layout_of(inputs.rollout_model))
    policy_name = weights.name_of(config.model)  # by every process, since they look into the checkpoints together
    if stage.is_writer:
        print_reading(inputs.reading)
        print(
            f"{len(examples):,} prompts of up to {inputs.prompt_length} tokens, {config.best_of_n.n} responses of up "
            f"to {config.rollout.sampling.max_new_tokens} tokens to each; policy from {policy_name}, "
            f"rewards: {reward_name}"
        )
    draws, num_drawn = _open_draws(inputs, folder, source)
    del base  # the policy has it now
    if not draw(draws, num_drawn):
        if stage.is_writer:
            print("Stopped and saved; the same command continues from there.")
        return EXIT_PREEMPTED
    if not stage.is_writer:
        return 0
    print_costs(JudgeCosts(source).metrics())
    return _close(folder, config)


def inspect(config: Any) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is written."""
    inputs = _open_inputs(config)
    prompts_at_once, at_once = inputs.division
    facts = {
        "responses": f"{config.best_of_n.n:,} to each of {len(inputs.examples):,} prompts, of up to "
        f"{config.rollout.sampling.max_new_tokens:,} tokens",
        "at once": f"{at_once:,} responses to each of {prompts_at_once:,} prompts, which are read once for them",
        "rewards": inputs.reward_name,
        **judges_in_words(config),
    }
    winners = [{"prompt": prompt_field(example.messages), "response": "(the best)"} for example in inputs.examples]
    return inspect_prompts(inputs.stage, inputs.reading, inputs.examples, facts, {WINNERS: winners})


@dataclass(frozen=True)
class _Inputs:
    """What a run answers and with what, opened and checked before any weights are read and its folder is made.

    Attributes:
      stage: that was opened.
      rollout_model: the policy on the mesh that it samples on.
      prompts: every prompt; the first ones are answered for the calibration.
      examples: those that are answered n times.
      prompt_length: tokens that prompts are padded to.
      reward_name: of the source of rewards, for people.
    """

    stage: Stage
    rollout_model: ShardedModel
    prompts: Prompts
    examples: Sequence[PromptExample]
    prompt_length: int
    reward_name: str

    @property
    def division(self) -> tuple[int, int]:
        """Prompts of a draw, and responses to each."""
        config = self.stage.config
        return divide_responses(config, self.stage.mesh, self.rollout_model.mesh, config.best_of_n.n)

    @property
    def reading(self) -> dict[str, ReadReport]:
        """What became of the records."""
        return {f"Prompts in {self.stage.config.data.path}": self.prompts.report}


def _open_inputs(config: Any) -> _Inputs:
    mesh = build_mesh(config.mesh)
    check(config, mesh)
    check_run_folder(config)
    with open_stage(config, mesh, records="prompts") as stage:
        rollout_model = shard_rollout_model(config, mesh, stage.model)
        (prompts,) = numbered(config, [stage_prompts(stage, held_out=False)])
        last = None if config.num_steps is None else config.num_steps * config.data.batch_size
        examples = prompts.examples[:last]
        judge = judge_of(config)
        if judge is not None:
            check_judgeable(examples, judge, "evaluation.judge")
        prompt_length = stage_prompt_length(stage, prompts.examples)
        check_cache(config, rollout_model, prompt_length)
        reward_name = check_rewards(config, mesh, stage.vocabulary, prompts.examples)
    return _Inputs(stage, rollout_model, prompts, examples, prompt_length, reward_name)


def _is_complete(config: Any) -> bool:
    """Whether the winners are there, so that nothing has to be opened. Several processes look later, together."""
    winners = Path(config.run_dir).expanduser() / WINNERS
    return jax.process_count() == 1 and config.on_existing == "resume" and winners.exists()


def _open_draws(inputs: _Inputs, folder: RunFolder, source: RewardSource) -> tuple[Draws, int]:
    """The policy, its rewards, calibrated on responses to the first prompts, and how many batches are drawn already."""
    stage, prompts, examples = inputs.stage, inputs.prompts, inputs.examples
    rollout_model, prompt_length = inputs.rollout_model, inputs.prompt_length
    config = stage.config
    params = sharded_model.in_compute_dtype(stage.init_params(jax.random.key(config.seed)), config.model.dtype)
    options = GenerateOptions(config.rollout.sampling, stage.end_ids, slots=config.rollout.slots)
    parts = config.rollout.num_microbatches
    build = functools.partial(
        build_sampler, stage.model, rollout_model, dtype=config.model.dtype, num_microbatches=parts
    )
    prompts_at_once, at_once = inputs.division
    sample = build(options=replace(options, responses_per_prompt=at_once))
    score = PolicyRewards(config, stage.model, params, source)
    run_key, _, calibration_key, _ = jax.random.split(jax.random.key(config.seed), 4)  # as those of PPO
    identity = _identity(config, examples)
    num_drawn, calibration = load_progress(folder, identity, len(examples), prompts_at_once)
    if calibration is None:
        calibration = calibration_of(
            config,
            stage.mesh,
            prompts.examples,
            prompt_length,
            functools.partial(build(options=options), params),
            score,
            calibration_key,
            stage.show_progress,
        )
        if stage.is_writer:
            save_start(folder, identity, calibration)
    if stage.is_writer:
        print(f"Token rewards: {calibration_in_words(calibration)} (from responses of the policy)")
    scored = functools.partial(score, calibration)
    draws = Draws(stage, folder, examples, prompt_length, prompts_at_once, sample, params, scored, run_key)
    return draws, num_drawn


def _identity(config: Any, examples: Sequence[PromptExample]) -> str:
    """What the candidates are drawn from: prompts, policy, source of rewards."""
    models = "; ".join(filter(None, [weights.identity_of_source(config.model), *identities_of(config)]))
    return f"prompts {fingerprint(examples, config.data)[:12]}; {models}"


def _close(folder: RunFolder, config: Any) -> int:
    """Print the closing table, and write the winners unless they are there."""
    rows = read_rows(folder.path / CANDIDATES)
    target = folder.path / WINNERS
    numbers = report.summary(rows, config)
    report.print_summary(numbers, config.rollout.sampling.max_new_tokens)
    if not target.exists():
        atomic.write_json(folder.path / "evaluation.json", numbers)
        report.write_winners(target, rows, config)
    print(f"The {numbers['winners']:,} winners are in {target}")
    return 0
