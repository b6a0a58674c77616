"""The candidates of best-of-n: n responses to each prompt, a batch at a time, each batch written when it is drawn."""

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm import atomic
from jaxrm.algorithms.best_of_n import Best, Score, best_of_n
from jaxrm.algorithms.reward_config import naming_source, weights_of
from jaxrm.algorithms.rollout import BatchSampler
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError, flag
from jaxrm.inference.weights import is_recorded_as
from jaxrm.models.sampling import prompt_keys
from jaxrm.runtime.metrics import read_rows
from jaxrm.runtime.preemption import StoppedError, StopRequest, agree, catch_signals
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.run_folder import RunFolder, from_writer
from jaxrm.stages.best_of_n.report import candidate_rows, lines_of
from jaxrm.stages.inputs.prompts import fixed_batches
from jaxrm.stages.rewards.calibration import calibration_as_numbers, calibration_from_numbers, not_finite
from jaxrm.stages.stage import Stage, judge_of

CANDIDATES = "candidates.jsonl"
_START = "best_of_n.json"  # calibration, and what the candidates were drawn from


@dataclass(frozen=True)
class Draws:
    """What is drawn, by whom, and what it earns.

    Attributes:
      stage: the stage.
      folder: of the run.
      examples: the prompts.
      prompt_length: tokens that they are padded to.
      prompts_at_once: in a batch, from `jaxrm.inference.rollout_model.divide_responses`.
      sample: so many responses at once to each.
      params: of the policy.
      score: token rewards of responses, calibrated.
      key: of all draws.
    """

    stage: Stage
    folder: RunFolder
    examples: Sequence[PromptExample]
    prompt_length: int
    prompts_at_once: int
    sample: BatchSampler
    params: Any
    score: Score
    key: jax.Array


def draw(draws: Draws, first_batch: int) -> bool:
    """Draw the batches from ``first_batch`` on, each into ``candidates.jsonl``.

    Returns:
      Whether all were drawn; False where it was asked to stop.

    Raises:
      UserError: where a reward is not finite.
    """
    config = draws.stage.config
    n, batch_size = config.best_of_n.n, draws.prompts_at_once
    num_batches = -(-len(draws.examples) // batch_size)
    total, done = num_batches * batch_size * n, first_batch * batch_size * n
    with (
        Progress("best of n", total, unit="responses", done=done, enabled=draws.stage.show_progress) as progress,
        catch_signals(has_progress=False) as stop,  # every batch that is done is written
    ):
        for number in range(first_batch, num_batches):
            if agree(stop.requested):
                return False
            examples = draws.examples[number * batch_size : (number + 1) * batch_size]
            try:
                best = _draw_batch(draws, number, examples, stop, progress)
            except StoppedError:
                return False
            rewards = best.candidate_rewards[: len(examples)]
            for name, sums in (best.candidate_parts or {"reward": rewards}).items():
                if not np.isfinite(sums).all():
                    with naming_source(config, name):
                        raise not_finite(f"a response to the prompts from {examples[0].source} on")
            if draws.folder.is_writer:
                _append(draws.folder.path / CANDIDATES, lines_of(_rows(draws.stage, number, examples, best)))
            progress.update(
                (number + 1) * batch_size * n,
                reward=float(rewards.mean()),
                best=float(best.rewards[: len(examples)].mean()),
            )
    return True


def load_progress(folder: RunFolder, identity: str, num_prompts: int, batch_size: int) -> tuple[int, Any]:
    """Batches that are drawn, and the calibration that they were scored with; None before there is one.

    Args:
      folder: of the run.
      identity: what the candidates are drawn from, as `save_start` wrote it.
      num_prompts: in all.
      batch_size: prompts in a batch.

    Raises:
      UserError: where prompts, policy or reward model are others than before.
    """
    path, done, calibration = folder.path / CANDIDATES, 0, None
    start = folder.path / _START
    if start.exists():
        saved = json.loads(start.read_text(encoding="utf-8"))
        if not is_recorded_as(saved["identity"], identity):
            raise UserError(
                f"prompts, policy, reward model or function are no longer those that {path} was drawn with "
                f"({saved['identity']}, now {identity}), so it cannot be continued as it was; give the same ones, or "
                f"put the run aside with {flag('on_existing')}=restart"
            )
        calibration = calibration_from_numbers(saved["calibration"])
    if folder.is_writer:
        rows = read_rows(path)
        done = -(-num_prompts // batch_size) if len(rows) >= num_prompts else len(rows) // batch_size
        if path.exists():  # without rows of a batch that was cut short
            atomic.write_text(path, lines_of(rows[: done * batch_size]))
    if jax.process_count() > 1:
        done = from_writer(done, folder.is_writer)
    return done, calibration


def save_start(folder: RunFolder, identity: str, calibration: Any) -> None:
    """Write down what the candidates are drawn from, and their calibration."""
    numbers = calibration_as_numbers(calibration)
    atomic.write_json(folder.path / _START, {"identity": identity, "calibration": numbers})


def _draw_batch(
    draws: Draws, number: int, examples: Sequence[PromptExample], stop: StopRequest, progress: Progress
) -> Best:
    """The winners of one batch, on the host."""
    mesh, n, batch_size = draws.stage.mesh, draws.stage.config.best_of_n.n, draws.prompts_at_once
    (prompts,) = fixed_batches(examples, batch_size, draws.prompt_length, mesh)
    watch = functools.partial(_watch, stop, progress, number * batch_size * n, batch_size)
    at_once = draws.sample.responses_per_prompt
    select = best_of_n(
        draws.sample, lambda batch: draws.score(prompts.with_records(batch)), n, at_once=at_once, drawn=watch
    )
    gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))  # whole for every process
    keys = prompt_keys(draws.key, number * batch_size, batch_size)
    return jax.device_get(gather(select(draws.params, prompts.tokens, prompts.mask, keys)))


def _rows(stage: Stage, number: int, examples: Sequence[PromptExample], best: Best) -> list[dict[str, Any]]:
    judge = judge_of(stage.config)
    task = None if judge is None else judge.removeprefix(tasks.PREFIX)
    weights = weights_of(stage.config)
    return candidate_rows(number, examples, best, stage.response_text, stage.end_ids, task, weights)


def _watch(stop: StopRequest, progress: Progress, before: int, batch_size: int, num_draws: int) -> None:
    progress.update(before + num_draws * batch_size)
    stop.check()


def _append(path: Path, lines: str) -> None:
    """Append the rows of a batch; a kill may cut them short, and then the batch is drawn again."""
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
