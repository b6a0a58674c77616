"""The best-of-n stage: a policy answers every prompt n times, and the best answers become demonstrations.

In the run's folder are ``winners.jsonl``, one demonstration a line, which SFT takes as its ``config.data.path``;
``candidates.jsonl``, what was drawn for each prompt (``config.num_steps`` bounds the batches of them; without it every
prompt is answered once); and ``evaluation.json``, the closing table. A batch that is in ``candidates.jsonl`` is not
drawn again.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm import atomic
from jaxrm.algorithms.best_of_n import Respond, Score, best_of_n
from jaxrm.config import dicts
from jaxrm.data import tasks
from jaxrm.data.loader import fingerprint
from jaxrm.data.prompts import PromptExample
from jaxrm.data.templates import end_ids
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError, flag, option
from jaxrm.experiment import RESUMABLE_FIELDS, Experiment
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.rollout_model import build_sampler, shard_rollout_model
from jaxrm.inference.sampler import response_text
from jaxrm.models import build
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.runtime.metrics import read_rows, remove_rows_after
from jaxrm.runtime.preemption import EXIT_PREEMPTED, StopRequest, agree, catch_signals
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.runtime.run_folder import RunFolder, check_run, from_writer, open_run
from jaxrm.sharding.mesh import build_mesh, check_batch
from jaxrm.stages.best_of_n import report
from jaxrm.stages.inputs.prompts import check_judgeable, fixed_batches, load_prompts, prompt_width
from jaxrm.stages.judge import check_judge
from jaxrm.stages.rewards.calibration import calibration_of, not_finite, open_rewards, scorer
from jaxrm.stages.rewards.sources import open_function
from jaxrm.stages.stage import task_files

WINNERS = "winners.jsonl"
_CANDIDATES = "candidates.jsonl"
_START = "best_of_n.json"  # calibration, and what the candidates were drawn from


class _StoppedError(Exception):
    """Asked to stop in the middle of a batch."""


def run(config: Experiment) -> int:
    """Run the stage, or what is left of it.

    Returns:
      Exit status: 0 when the run is complete, `EXIT_PREEMPTED` when it was asked to stop and saved.

    Raises:
      UserError: for what the user can mend, before anything is written wherever it can be known by then.
    """
    mesh = build_mesh(config.mesh)
    check(config, mesh)
    resolved = dicts.as_dict(config)
    opened: dict[str, Any] = {"on_existing": config.on_existing, "may_differ": RESUMABLE_FIELDS}
    if jax.process_count() == 1:  # several must refuse together, which only `open_run` sees to
        check_run(config.run_dir, resolved, **opened)
        if config.on_existing == "resume" and (Path(config.run_dir).expanduser() / WINNERS).exists():
            return _close(open_run(config.run_dir, resolved, **opened), config)
    policy = sharded_model.shard_model(config.model, mesh)
    rollout_model = shard_rollout_model(config, mesh, policy)
    build.check_length(policy.config, "data.max_length", config.data.max_length)
    is_writer = jax.process_index() == 0
    show = is_writer and config.logging.progress
    judge = config.evaluation.judge or (config.data.path if config.data.path.startswith(tasks.PREFIX) else None)
    sampling, rows = config.rollout.sampling, config.data.batch_size

    with task_files(config.data, config.seed, records="prompts") as data:
        tokenizer_path = sharded_model.tokenizer_path(data, config.model)
        tokenizer = load_tokenizer(tokenizer_path)
        sharded_model.check_tokenizer(tokenizer, tokenizer_path, config.model, policy.config)
        load = functools.partial(load_prompts, data, tokenizer, max_new_tokens=sampling.max_new_tokens)
        prompts = load(held_out=False, show_progress=show)
    every = prompts.examples
    asked = every if config.num_steps is None else every[: config.num_steps * rows]
    if judge is not None:
        check_judgeable(asked, judge, "evaluation.judge")
    ends = tuple(sorted(end_ids(tokenizer, config.data.template)))
    text = functools.partial(response_text, tokenizer, ends)
    width = prompt_width(
        every, config.data.max_length - sampling.max_new_tokens, max(16, sharded_model.pad_to_multiple_of(mesh))
    )
    source, reward_name = open_rewards(config, mesh, tokenizer, every, text)
    weights.check_weights(policy.config, config.model)  # last, since a hub model is fetched for it
    models = (config.model.path, config.reward.model or config.reward.function)
    of_models = "; ".join(weights.identity_of(path) for path in models if path)
    identity = f"prompts {fingerprint(asked, config.data)[:12]}; {of_models}"

    folder = open_run(config.run_dir, resolved, **opened, is_writer=is_writer, process_count=jax.process_count())
    if is_writer:
        print(folder.message)
        print_table(f"Prompts in {config.data.path}", ["records", "number", "first at"], prompts.report.rows())
        print(
            f"{len(asked):,} prompts of up to {width} tokens, {config.best_of_n.n} responses of up to "
            f"{sampling.max_new_tokens} tokens to each; policy from {weights.name_of(config.model)}, "
            f"{config.reward.kind} rewards from {reward_name}"
        )

    run_key, _, calibration_key, _ = jax.random.split(jax.random.key(config.seed), 4)  # as those of PPO
    first_key = jax.random.key(config.seed)
    params = weights.load_or_init_params(policy.config, config.model, first_key, policy.shapes, policy.shardings)
    params = sharded_model.in_compute_dtype(params, config.model.dtype)
    respond = build_sampler(policy, rollout_model, dtype=config.model.dtype, sampling=sampling, end_ids=ends)
    score = scorer(config, mesh, policy, params, source)
    done, calibration = _progress(folder, identity, len(asked), rows)
    if calibration is None:
        draw = functools.partial(respond, params)
        calibration = calibration_of(config, mesh, every, width, draw, score, calibration_key, show)
        if is_writer:
            held = {name: float(x) for name, x in dataclasses.asdict(jax.device_get(calibration)).items()}
            atomic.write_json(folder.path / _START, {"identity": identity, "calibration": held})
    if is_writer:
        found = jax.device_get(calibration)
        print(f"Token rewards: scale {found.scale:.4g}, centre {found.center:.4g} (from responses of the policy)")
    batch_rows = functools.partial(
        report.candidate_rows,
        text=text,
        end_ids=ends,
        task=None if judge is None else judge.removeprefix(tasks.PREFIX),
    )
    paid = functools.partial(score, calibration)
    if not _draw(config, mesh, folder, asked, width, params, respond, paid, run_key, batch_rows, done, show):
        if is_writer:
            print("Stopped and saved; the same command continues from there.")
        return EXIT_PREEMPTED
    return _close(folder, config) if is_writer else 0


def check(config: Experiment, mesh: Mesh) -> None:
    """What can be said of the config alone.

    Raises:
      UserError: no policy, no reward, responses that are all the same, or a batch that does not fit the mesh.
    """
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None; best-of-n draws from a policy, so give the folder of a run or published "
            f"weights, e.g. {flag('model.path')}=runs/quickstart/sft"
        )
    if config.reward.model is None and config.reward.function is None:
        raise UserError(
            f"{option('reward')} has neither model nor function, so no response is the best; give the run of a reward "
            f"model, e.g. {flag('reward.model')}=runs/quickstart/rm_seq2seq"
        )
    n, sampling = config.best_of_n.n, config.rollout.sampling
    if n > 1 and (sampling.temperature == 0 or sampling.top_k == 1):
        name = "temperature" if sampling.temperature == 0 else "top_k"
        raise UserError(
            f"{option(f'rollout.sampling.{name}')} is {getattr(sampling, name)}, with which all {n} responses to a "
            f"prompt "
            f"are the same; e.g. {flag(f'rollout.sampling.{name}')}={1.0 if name == 'temperature' else 0}, or "
            f"{flag('best_of_n.n')}=1"
        )
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    check_judge(config.evaluation.judge)
    if config.reward.function is not None:
        open_function(config.reward.function)
    if weights.is_run(config.model.path):
        weights.find_checkpoint(config.model.path, "model.path", weights.POLICIES)


def _draw(
    config: Experiment,
    mesh: Mesh,
    folder: RunFolder,
    examples: Sequence[PromptExample],
    width: int,
    params: Any,
    respond: Respond,
    score: Score,
    key: jax.Array,
    batch_rows: Callable[..., list[report.Row]],
    done: int,
    show: bool,
) -> bool:
    """Draw the batches from the ``done``-th on, each into ``candidates.jsonl``; False where it was asked to stop."""
    n, rows = config.best_of_n.n, config.data.batch_size
    batches = -(-len(examples) // rows)
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    with (
        Progress("best of n", batches * rows * n, unit="responses", done=done * rows * n, enabled=show) as progress,
        catch_signals() as stop,
    ):
        for number in range(done, batches):
            if agree(stop.requested):
                return False
            now = examples[number * rows : (number + 1) * rows]
            prompts, mask = fixed_batches(now, rows, width, mesh)[0]
            watch = functools.partial(_watch, stop, progress, number * rows * n, rows)
            try:
                select = best_of_n(respond, score, n, drawn=watch)
                best = jax.device_get(whole(select(params, prompts, mask, jax.random.fold_in(key, number))))
            except _StoppedError:
                return False
            if not all(map(math.isfinite, best.candidate_rewards[: len(now)].ravel().tolist())):
                raise not_finite(f"responses to prompts from {now[0].source} on")
            if folder.is_writer:
                _append(folder.path / _CANDIDATES, report.lines_of(batch_rows(number, now, best)))
            mean = float(best.candidate_rewards[: len(now)].mean())
            progress.update((number + 1) * rows * n, reward=mean, best=float(best.rewards[: len(now)].mean()))
    return True


def _watch(stop: StopRequest, progress: Progress, before: int, rows: int, drawn: int) -> None:
    progress.update(before + drawn * rows)
    if stop.requested and jax.process_count() == 1:  # several must stop together, between batches
        raise _StoppedError


def _progress(folder: RunFolder, identity: str, prompts: int, rows: int) -> tuple[int, Calibration | None]:
    """Batches that are drawn, and the calibration that they were paid with."""
    path, done, calibration = folder.path / _CANDIDATES, 0, None
    start = folder.path / _START
    if start.exists():
        found = json.loads(start.read_text(encoding="utf-8"))
        if found["identity"] != identity:
            raise UserError(
                f"prompts, policy or reward model are no longer those that {path} was drawn with "
                f"({found['identity']}, now {identity}), so it cannot be continued as it was; give the same ones, or "
                f"put the run aside with {flag('on_existing')}=restart"
            )
        calibration = Calibration(**{name: jnp.float32(x) for name, x in found["calibration"].items()})
    if folder.is_writer:
        drawn = len(read_rows(path))
        done = -(-prompts // rows) if drawn >= prompts else drawn // rows
        remove_rows_after(path, done - 1)
    if jax.process_count() > 1:
        done = from_writer(done, folder.is_writer)
    return done, calibration


def _append(path: Path, lines: str) -> None:
    """Append the rows of a batch; a kill may cut them short, and then the batch is drawn again."""
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def _close(folder: RunFolder, config: Experiment) -> int:
    """Write the winners unless they are there, and say what came of it."""
    rows = read_rows(folder.path / _CANDIDATES)
    target = folder.path / WINNERS
    found = report.summary(rows, config)
    report.print_summary(found, config.rollout.sampling.max_new_tokens)
    if not target.exists():
        atomic.write_json(folder.path / "evaluation.json", found)
        report.write_winners(target, rows, config)
    print(f"The {found['winners']:,} winners are in {target}")
    return 0
