"""The evaluation stage: a policy answers prompts, sampled and greedily, and its answers are measured.

In the run's folder are ``answers.jsonl``, one row an answer, written whole when all are there, and
``evaluation.json``, the means of each split and decoding; with ``config.answers.along`` also ``along.jsonl``, the means
of each checkpoint.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrm import atomic
from jaxrm.config import dicts
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.data.templates import end_ids
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError, flag, option
from jaxrm.experiment import RESUMABLE_FIELDS, Experiment
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.rollout_model import build_sampler, shard_rollout_model
from jaxrm.inference.sampler import response_text
from jaxrm.models import build
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.metrics import json_line, read_rows
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.runtime.run_folder import check_run, open_run
from jaxrm.sharding.mesh import build_mesh, check_batch
from jaxrm.stages.evaluate.answers import Row, answer_rows, draw_answers, log_ratio, means_of, summary
from jaxrm.stages.inputs.prompts import check_judgeable, fixed_batches, load_prompts, prompt_width
from jaxrm.stages.judge import check_judge
from jaxrm.stages.rewards.calibration import calibration_of, open_rewards, scorer
from jaxrm.stages.stage import task_files

ANSWERS, ALONG = "answers.jsonl", "along.jsonl"
_ASKED = "asked.json"  # which policy answered, by which rewards: a folder may come to hold another run


def run(config: Experiment) -> int:
    """Run the stage, unless its answers are there.

    Returns:
      Exit status 0.

    Raises:
      UserError: for what the user can mend, before anything is written.
    """
    mesh = build_mesh(config.mesh)
    _check(config, mesh)
    resolved = dicts.as_dict(config)
    check_run(config.run_dir, resolved, on_existing=config.on_existing, may_differ=RESUMABLE_FIELDS)
    policy = sharded_model.shard_model(config.model, mesh)
    rollout_model = shard_rollout_model(config, mesh, policy)
    build.check_length(policy.config, "data.max_length", config.data.max_length)
    judge = config.evaluation.judge or (config.data.path if config.data.path.startswith(tasks.PREFIX) else None)
    sampling, show = config.rollout.sampling, config.logging.progress

    asked: dict[str, Sequence[PromptExample]] = {}
    for split in config.answers.splits:
        named = dataclasses.replace(config.data, eval_split=split) if split != "heldout" else config.data
        with task_files(named, config.seed, records="prompts") as data:
            path = sharded_model.tokenizer_path(data, config.model)
            tokenizer = load_tokenizer(path)
            load = functools.partial(load_prompts, data, tokenizer, max_new_tokens=sampling.max_new_tokens)
            asked[split] = load(held_out=True, show_progress=show).examples
            if split == config.answers.splits[0] and _has_rewards(config):
                to_calibrate = load(held_out=False, show_progress=show).examples
    sharded_model.check_tokenizer(tokenizer, path, config.model, policy.config)
    everyone = [example for examples in asked.values() for example in examples]
    if _has_rewards(config):
        everyone += to_calibrate
    if judge is not None:
        check_judgeable(everyone, judge, "evaluation.judge")
    ends = tuple(sorted(end_ids(tokenizer, config.data.template)))
    text = functools.partial(response_text, tokenizer, ends)
    room = config.data.max_length - sampling.max_new_tokens
    width = prompt_width(everyone, room, max(16, sharded_model.pad_to_multiple_of(mesh)))
    weights.check_weights(policy.config, config.model)

    folder = open_run(config.run_dir, resolved, on_existing=config.on_existing, may_differ=RESUMABLE_FIELDS)
    print(folder.message)
    target = folder.path / ANSWERS
    _check_asked(folder.path / _ASKED, config, has_answers=target.exists())
    if not target.exists():
        first = functools.partial(
            weights.load_or_init_params, policy.config, shapes=policy.shapes, shardings=policy.shardings
        )
        params, reference = first(config.model, key=jax.random.key(0)), None
        if config.answers.reference is not None:
            of_reference = dataclasses.replace(config.model, path=config.answers.reference)
            reference = first(of_reference, key=jax.random.key(0))
        respond = functools.partial(build_sampler, policy, rollout_model, dtype=config.model.dtype, end_ids=ends)
        programs = {"sampled": respond(sampling=sampling)}
        programs["greedy"] = respond(sampling=dataclasses.replace(sampling, temperature=0.0, top_k=0, top_p=1.0))
        calibration_key, key = jax.random.split(jax.random.key(config.seed))
        key = jax.random.fold_in(key, config.answers.draw)
        score = None
        if _has_rewards(config):
            source, _ = open_rewards(config, mesh, tokenizer, everyone, text)
            paid = scorer(config, mesh, policy, params if reference is None else reference, source)
            draw = functools.partial(programs["sampled"], params if reference is None else reference)
            calibration = calibration_of(config, mesh, to_calibrate, width, draw, paid, calibration_key, show)
            score = functools.partial(paid, calibration)
        read = log_ratio(policy.graphdef, mesh, sampling.temperature or 1.0) if reference is not None else None

        def answered(params: Any, split: str, decoding: str) -> list[Row]:
            of_split = jax.random.fold_in(key, tuple(asked).index(split))
            answers = draw_answers(
                programs[decoding],
                score,
                params,
                fixed_batches(asked[split], config.data.batch_size, width, mesh),
                mesh,
                jax.random.fold_in(of_split, config.answers.decodings.index(decoding)),
                best_of=config.answers.best_of if decoding == "sampled" else 1,
                read=None
                if read is None or decoding == "greedy" or config.answers.best_of > 1
                else functools.partial(read, params, reference),
            )
            return answer_rows(
                split,
                decoding,
                asked[split],
                answers,
                text,
                tokenizer,
                judge,
                token_rewards=config.answers.token_rewards,
            )

        found: list[Row] = []
        steps = _steps(config)
        first_split = config.answers.splits[0]
        total = len(config.answers.decodings) * sum(map(len, asked.values())) + len(steps) * len(asked[first_split])
        with Progress("evaluate", total, unit="answers", enabled=show) as progress:
            for split in asked:
                for decoding in config.answers.decodings:
                    found += answered(params, split, decoding)
                    progress.update(len(found))
            if config.answers.along:
                means = []
                for number, (step, path) in enumerate(steps.items(), 1):
                    then = first(dataclasses.replace(config.model, path=path), key=jax.random.key(0))
                    rows_then = answered(then, first_split, "sampled")
                    means.append({"step": step, **means_of(rows_then, judge)})
                    progress.update(len(found) + number * len(rows_then))
                atomic.write_text(folder.path / ALONG, "".join(map(json_line, means)))
        atomic.write_text(target, "".join(map(json_line, found)))
    found = read_rows(target)
    report = summary(found, judge)
    atomic.write_json(folder.path / "evaluation.json", report)
    names = list(dict.fromkeys(name for means in report.values() for name in means))
    print_table(
        f"Answers of {weights.name_of(config.model)}",
        ["", *names],
        [[name, *(means.get(column) for column in names)] for name, means in report.items()],
    )
    print(f"The answers are in {target}")
    return 0


def _steps(config: Experiment) -> dict[int, str]:
    """The checkpoints that are asked on the way, by step, each as a path of weights; the reference is step 0."""
    if not config.answers.along:
        return {}
    assert config.model.path is not None and config.answers.reference is not None
    latest = weights.find_checkpoint(config.model.path, "model.path", weights.POLICIES)
    checkpoints = Checkpoints(latest.folder.checkpoints, read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    return {0: config.answers.reference} | {step: str(latest.folder.checkpoints / str(step)) for step in steps}


def _check_asked(file: Path, config: Experiment, *, has_answers: bool) -> None:
    """Refuse answers of what a path named before and names no more; keep what is asked now."""
    paths = {"model.path": config.model.path, "reward.model": config.reward.model}
    asked = {field: weights.identity_of(path) for field, path in paths.items() if path is not None}
    if has_answers and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        for field, now in asked.items():
            if before.get(field, now) != now:
                raise UserError(
                    f"{file.parent} holds the answers for {field} as it was, {before[field]}, which now is {now}; "
                    f"use {flag('on_existing')}=restart to put them aside and ask anew, or another {flag('run_dir')}"
                )
    elif not has_answers:
        atomic.write_json(file, asked)


def _has_rewards(config: Experiment) -> bool:
    return config.reward.model is not None or config.reward.function is not None


def _check(config: Experiment, mesh: Mesh) -> None:
    """What can be said of the config alone."""
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None; give the policy that is to answer, the folder of a run or published "
            f"weights, "
            f"e.g. {flag('model.path')}=runs/quickstart/sft"
        )
    if jax.process_count() > 1:
        raise UserError("evaluating a policy is the work of one process; run it on one host")
    known = tasks.SPLITS if config.data.path.startswith(tasks.PREFIX) else ("heldout",)
    for split in config.answers.splits:
        if split not in known:
            raise UserError(
                f"{option('answers.splits')} has {split!r}; the prompts of {config.data.path} are {', '.join(known)}, "
                f"e.g. {flag('answers.splits')}=heldout"
            )
    if config.answers.best_of > 1 and not _has_rewards(config):
        raise UserError(
            f"{option('answers.best_of')} is {config.answers.best_of}, but {option('reward')} has neither model nor "
            f"function "
            f"that would say which is best; e.g. {flag('reward.model')}=runs/quickstart/rm_seq2seq"
        )
    if config.answers.along and (config.answers.reference is None or "sampled" not in config.answers.decodings):
        raise UserError(
            f"{option('answers.along')} is True, which needs a {option('answers.reference')}, where training began, "
            f"and sampled "
            f"answers; e.g. {flag('answers.reference')}=runs/quickstart/sft"
        )
    if config.answers.along and not weights.is_run(config.model.path):
        raise UserError(
            f"{option('answers.along')} is True, but {option('model.path')} is {config.model.path!r}, which is no "
            f"run and has no "
            f"checkpoints; use {flag('answers.along')}=False"
        )
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    check_judge(config.evaluation.judge)
    if weights.is_run(config.model.path):
        weights.find_checkpoint(config.model.path, "model.path", weights.POLICIES)
