"""The evaluation stage: a policy answers prompts, sampled and greedily, and its answers are measured.

In the run's folder are ``answers.jsonl``, one row an answer, written whole when all are there, and
``evaluation.json``, the means of each split and decoding; with ``config.evaluate.evaluate_checkpoints`` also
``along.jsonl``, the means of each checkpoint. What a stopped launch had answered, in whole splits, is not asked again.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrm import atomic
from jaxrm.algorithms.reward_config import has_rewards, sources_of
from jaxrm.data.loader import fingerprint
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import run_checkpoint, weights
from jaxrm.inference.rollout_model import check_cache, layout_of, shard_rollout_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.metrics import json_line, read_rows
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import POLICIES
from jaxrm.stages.evaluate.answers import means_of, summary
from jaxrm.stages.evaluate.checks import check
from jaxrm.stages.evaluate.generation import AnswerGenerator, open_generator
from jaxrm.stages.inputs.prompts import Prompts, load_prompts, numbered, stage_prompt_length, stage_prompts
from jaxrm.stages.inspection import Inspection, inspect_prompts
from jaxrm.stages.judge import check_judgeable
from jaxrm.stages.rewards.judges import JudgeCosts, check_reachable, judges_in_words, print_costs
from jaxrm.stages.rewards.sources import check_rewards, identity_of_rewards, reads_fields
from jaxrm.stages.stage import Stage, check_run_folder, judge_of, open_stage, task_files

ANSWERS, CHECKPOINT_MEANS = "answers.jsonl", "along.jsonl"
_PARTS = "parts"  # answers of a split in a decoding, and of a checkpoint, while not all are there
_MODELS = "asked.json"  # which policy answered, by which rewards: a folder may come to hold another run


def run(config: Any) -> int:
    """Run the stage, unless its answers are there.

    Returns:
      Exit status 0.

    Raises:
      UserError: for what the user can mend, before anything is written.
    """
    inputs = _open_inputs(config)
    stage, judge = inputs.stage, judge_of(config)
    if not _has_all_answers(config):
        check_reachable(config)
    folder = stage.open_run([inputs.every], keeps_model=False, layout=layout_of(inputs.rollout_model))
    target = folder.path / ANSWERS
    has_answers = target.exists() or (folder.path / _PARTS).exists()
    _check_same_models(folder.path / _MODELS, config, has_answers=has_answers)
    if not target.exists():
        generator = open_generator(
            stage, inputs.rollout_model, inputs.every, inputs.to_calibrate, stage_prompt_length(stage, inputs.every)
        )
        _write_answers(stage, folder, generator, {split: prompts.examples for split, prompts in inputs.prompts.items()})
        print_costs(JudgeCosts(generator.source).metrics())
    shutil.rmtree(folder.path / _PARTS, ignore_errors=True)
    rows = read_rows(target)
    report = summary(rows, judge)
    atomic.write_json(folder.path / "evaluation.json", report)
    names = list(dict.fromkeys(name for means in report.values() for name in means))
    names = [name for name in names if "/" not in name or name.startswith("reward/")]
    print_table(
        f"Answers of {weights.name_of(config.model)}",
        ["", *names],
        [[name, *(means.get(column) for column in names)] for name, means in report.items()],
    )
    print(f"The answers are in {target}")
    return 0


def _has_all_answers(config: Any) -> bool:
    """Whether nothing is to be answered. Several processes look later, together."""
    answers = Path(config.run_dir).expanduser() / ANSWERS
    return jax.process_count() == 1 and config.on_existing == "resume" and answers.exists()


def inspect(config: Any) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is written."""
    inputs = _open_inputs(config)
    answered = [example for prompts in inputs.prompts.values() for example in prompts.examples]
    facts = {
        "answers": f"{len(answered):,} prompts, {' and '.join(config.evaluate.decodings)}, of up to "
        f"{config.rollout.sampling.max_new_tokens:,} tokens",
    }
    if has_rewards(config):
        facts["rewards"] = check_rewards(config, inputs.stage.mesh, inputs.stage.vocabulary, inputs.every)
        facts |= judges_in_words(config)
    reading = {f"Prompts of {split}": prompts.report for split, prompts in inputs.prompts.items()}
    return inspect_prompts(inputs.stage, reading, answered, facts)


@dataclass(frozen=True)
class _Inputs:
    """What is answered, read before the run's folder is made.

    Attributes:
      stage: that was opened.
      rollout_model: the policy on the mesh that it samples on.
      prompts: by split.
      to_calibrate: prompts whose answers the rewards are calibrated on.
    """

    stage: Stage
    rollout_model: ShardedModel
    prompts: Mapping[str, Prompts]
    to_calibrate: Sequence[PromptExample]

    @property
    def every(self) -> list[PromptExample]:
        """All prompts."""
        splits = (prompts.examples for prompts in self.prompts.values())
        return [example for examples in (*splits, self.to_calibrate) for example in examples]


def _open_inputs(config: Any) -> _Inputs:
    mesh = build_mesh(config.mesh)
    check(config, mesh)
    check_run_folder(config)
    with open_stage(config, mesh, records="prompts") as stage:
        rollout_model = shard_rollout_model(config, mesh, stage.model)
        sides = [_split_prompts(stage, split) for split in config.evaluate.splits]
        if has_rewards(config):
            sides = numbered(config, [*sides, stage_prompts(stage, held_out=False)])
        prompts = dict(zip(config.evaluate.splits, sides, strict=False))
        to_calibrate = sides[-1].examples if has_rewards(config) else []
        inputs = _Inputs(stage, rollout_model, prompts, to_calibrate)
        check_cache(config, rollout_model, stage_prompt_length(stage, inputs.every))
        judge = judge_of(config)
        if judge is not None:
            check_judgeable(inputs.every, judge, "evaluation.judge")
    return inputs


def _split_prompts(stage: Stage, split: str) -> Prompts:
    """Held-out prompts of a split."""
    if split == "heldout":
        return stage_prompts(stage, held_out=True)
    config = stage.config
    with task_files(dataclasses.replace(config.data, eval_split=split), config.seed, records="prompts") as data:
        max_new_tokens = config.rollout.sampling.max_new_tokens
        return load_prompts(
            data,
            stage.tokenizer,
            max_new_tokens=max_new_tokens,
            held_out=True,
            show_progress=stage.show_progress,
            with_fields=reads_fields(config),
        )


def _write_answers(
    stage: Stage, folder: RunFolder, generator: AnswerGenerator, prompts: Mapping[str, Sequence[PromptExample]]
) -> None:
    """Answer every split in every decoding, and the first split with every checkpoint where that is wanted."""
    section, judge = stage.config.evaluate, judge_of(stage.config)
    checkpoints = _checkpoints(stage.config)
    splits = list(prompts)
    total = len(section.decodings) * sum(map(len, prompts.values())) + len(checkpoints) * len(prompts[splits[0]])
    rows: list[dict[str, Any]] = []
    with Progress("evaluate", total, unit="answers", enabled=stage.show_progress) as progress:
        for number, split in enumerate(splits):
            for decoding in section.decodings:
                answer = functools.partial(generator.rows, generator.params, (number, split), prompts[split], decoding)
                rows += _part(stage, folder, f"{split}-{decoding}", prompts[split], answer)
                progress.update(len(rows))
        means = []
        for count, (step, path) in enumerate(checkpoints.items(), 1):
            answer = functools.partial(_answers_of, generator, path, splits[0], prompts[splits[0]])
            answers = _part(stage, folder, f"checkpoint-{step}", prompts[splits[0]], answer)
            means.append({"step": step, **means_of(answers, judge)})
            progress.update(len(rows) + count * len(answers))
    if checkpoints:
        atomic.write_text(folder.path / CHECKPOINT_MEANS, "".join(map(json_line, means)))
    atomic.write_text(folder.path / ANSWERS, "".join(map(json_line, rows)))


def _answers_of(
    generator: AnswerGenerator, path: str, split: str, prompts: Sequence[PromptExample]
) -> list[dict[str, Any]]:
    """Answers of a checkpoint to the prompts of the first split."""
    return generator.rows(generator.load_params(path), (0, split), prompts, "sampled")


def _part(
    stage: Stage,
    folder: RunFolder,
    name: str,
    prompts: Sequence[PromptExample],
    answer: Callable[[], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Answers to these very prompts, which an earlier launch may have written."""
    file = folder.path / _PARTS / f"{name}-{fingerprint(prompts, stage.config.data)[:16]}.jsonl"
    if not file.exists():
        atomic.write_text(file, "".join(map(json_line, answer())))
    return read_rows(file)


def _checkpoints(config: Any) -> dict[int, str]:
    """The checkpoints that are evaluated too, by step, each as a path of weights; the reference is step 0."""
    if not config.evaluate.evaluate_checkpoints:
        return {}
    field, path = weights.trained_place(config.model)
    latest = run_checkpoint.find_checkpoint(path, field, POLICIES)
    checkpoints = Checkpoints(latest.folder.checkpoints, read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    return {0: config.evaluate.reference} | {step: str(latest.folder.checkpoints / str(step)) for step in steps}


def _check_same_models(file: Path, config: Any, *, has_answers: bool) -> None:
    """Refuse answers of another model than the one that a path names now; write down which ones it names."""
    models = {"model.path": weights.identity_of_source(config.model)}
    for name, source in sources_of(config).items():
        origin = "model" if source.model is not None else "endpoint" if source.function is None else "function"
        if source.is_given:
            place = f"rewards.{name}.{origin}" if config.rewards else f"reward.{origin}"
            models[place] = identity_of_rewards(source)
    if has_answers and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, now in models.items():
            if not weights.is_recorded_as(before.get(name, now), now):
                raise UserError(
                    f"{file.parent} holds the answers for {option(name)} as it was, {before[name]}, which now is "
                    f"{now}; use {flag('on_existing')}=restart to put them aside and ask anew, or another "
                    f"{flag('run_dir')}"
                )
    elif not has_answers:
        atomic.write_json(file, models)
