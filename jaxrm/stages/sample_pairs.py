"""The stage that makes preference pairs of an embedded task out of a policy's own responses.

Two responses to a prompt are sampled and the task's annotator, who is noisy and biased on purpose, says which one it
prefers. So the pairs hold the errors that this policy makes, which is what a reward model has to learn about.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm import atomic
from jaxrm.data import tasks
from jaxrm.data.config import DataConfig
from jaxrm.data.readers import ReadReport, read_records
from jaxrm.data.records import Message, PreferenceRecord
from jaxrm.data.tasks.prompts import prompt_field
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.inference.load import load_policy
from jaxrm.inference.run_checkpoint import find_checkpoint
from jaxrm.inference.sampler import Sampler, prompt_room
from jaxrm.inference.weights import lora_of, peft_path, read_shape, trained_place
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import LANGUAGE_MODELS
from jaxrm.stages.inspection import Inspection
from jaxrm.stages.stage import check_run_folder, open_run_folder, task_files

PAIRS = "pairs.jsonl"
_FIELDS = {"batch_size": "batch_size", "max_new_tokens": "sampling.max_new_tokens"}  # of `Sampler`, in the config
_ATTEMPTS = 4  # draws of a second response that differs from the first


def run(config: Any) -> int:
    """Write ``pairs.jsonl`` in the run's folder, unless it is there.

    Returns:
      Exit status 0.

    Raises:
      UserError: where there is no embedded task or no policy to sample from.
    """
    records, task = _open_inputs(config), config.data.path.removeprefix(tasks.PREFIX)
    source = config.model
    with naming({"path": option("model.path")}):
        policy = load_policy(
            source.path,
            adapter=source.adapter,
            mesh=build_mesh(config.mesh),
            dtype=source.dtype,
            quantize=source.quantize,
        )
    folder = open_run_folder(config)
    target = folder.path / PAIRS
    if not target.exists():
        sampler = Sampler(policy.model, policy.params, policy.tokenizer, policy.template, config.pairs.sampling)
        names = {name: option(f"pairs.{field}") for name, field in _FIELDS.items()}
        with naming(names):
            rows = _sample(config, sampler, task, records)
        _write(target, rows)
    _print(_read_pairs(str(target)), task, len(records))
    print(f"The pairs are in {target}")
    return 0


def inspect(config: Any) -> Inspection:
    """What `run` would do; errors are the same, no weights are read and nothing is written."""
    records = _open_inputs(config)
    reading = ReadReport(total=len(records), used=len(records))
    rows = [_row(record.prompt, record.chosen, record.rejected) for record in records]
    facts = {"pairs": f"up to {len(records):,}, sampled from {trained_place(config.model)[1]}"}
    return Inspection({f"Prompts of {config.data.path}": reading}, facts=facts, outputs={PAIRS: rows})


def _open_inputs(config: Any) -> list[PreferenceRecord]:
    """The task's own pairs, whose prompts are answered; refuses what cannot be sampled from."""
    _check(config)
    check_run_folder(config)
    records = _prompt_records(config)
    if peft_path(config.model) is None:
        field, path = trained_place(config.model)
        shape = find_checkpoint(path, field, LANGUAGE_MODELS).shape
    else:
        lora_of(config.model)  # refuses what does not stand on the policy
        shape = read_shape(config.model)
    prompt_room(shape, config.pairs.sampling, "pairs.sampling.max_new_tokens")
    return records


def _check(config: Any) -> None:
    """What the config alone shows to be wrong."""
    if not config.data.path.startswith(tasks.PREFIX):
        raise UserError(
            f"{option('data.path')} is {config.data.path!r}, but pairs are labeled by the annotator of an embedded "
            f"task; e.g. {flag('data.path')}={tasks.PREFIX}{tasks.TASKS[0]}"
        )
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None; pairs are sampled from a policy, so give the folder of a run, "
            f"e.g. {flag('model.path')}=runs/quickstart/sft"
        )
    if jax.process_count() > 1:
        raise UserError("sampling pairs of an embedded task is the work of one process; run it on one host")


def _prompt_records(config: Any) -> list[PreferenceRecord]:
    """The task's own pairs, whose prompts are answered and whose chosen responses are ideal."""
    records = _task_pairs(config.data, config.seed)
    if config.pairs.count > len(records):
        raise UserError(
            f"{option('pairs.count')} is {config.pairs.count}, but {config.data.path} has {len(records)} prompts "
            f"for pairs; e.g. {flag('pairs.count')}={len(records)}"
        )
    return records[: config.pairs.count]


def _task_pairs(data: DataConfig, seed: int) -> list[PreferenceRecord]:
    """The task's own pairs, for their prompts and for their chosen responses, which are ideal."""
    with task_files(data, seed, records="pairs") as files:
        return _read_pairs(files.path)


def _read_pairs(path: str) -> list[PreferenceRecord]:
    """Every pair of a file."""
    records, _ = read_records(DataConfig(path=path, eval_path=path, max_eval_records=None), held_out=True)
    return [record for record in records if isinstance(record, PreferenceRecord)]


def _sample(config: Any, sampler: Sampler, task: str, records: Sequence[PreferenceRecord]) -> list[dict[str, Any]]:
    """Pairs of two different responses to each prompt; a prompt whose draws are all the same gives none."""
    settings, key, fold_in = config.pairs, jax.random.key(config.seed), jax.vmap(jax.random.fold_in)
    annotator = tasks.Annotator(settings.annotator_bias, settings.annotator_noise)
    rng = random.Random(f"pairs {config.seed}")
    show = config.logging.progress
    # Every prompt twice, and again those whose answers were all the same.
    waiting = [i for i in range(len(records)) for _ in range(2)]
    draws: list[list[str]] = [[] for _ in records]
    with Progress("sample pairs", len(waiting), unit="responses", enabled=show) as progress:
        total = 0
        while waiting:
            numbers = [len(draws[i]) + (place > 0 and waiting[place - 1] == i) for place, i in enumerate(waiting)]
            keys = fold_in(fold_in(jnp.broadcast_to(key, len(waiting)), jnp.asarray(waiting)), jnp.asarray(numbers))
            answered: dict[int, str] = {}
            prompts = [records[i].prompt for i in waiting]
            for place, response in sampler.answers(prompts, keys[:, None], settings.batch_size):
                answered[place] = response
                total += 1
                progress.update(min(total, 2 * len(records)))
            for place, i in enumerate(waiting):
                draws[i].append(answered[place])
            waiting = [i for i in dict.fromkeys(waiting) if len(draws[i]) <= _ATTEMPTS and len(set(draws[i])) == 1]
    rows: list[dict[str, Any]] = []
    for record, drawn in zip(records, draws, strict=True):
        first = drawn[0]
        if rng.random() < settings.ideal_share:
            first = record.chosen
        second = next((response for response in drawn if response != first), None)
        if second is None or not first or not second:
            continue
        preferred = tasks.annotate(task, record.prompt, first, second, rng, annotator)
        chosen, rejected = (first, second)[:: 1 - 2 * preferred]
        rows.append(_row(record.prompt, chosen, rejected))
    if not rows:
        raise UserError(
            f"{option('model.path')} is {config.model.path!r}, whose responses to a prompt are all the same; sample "
            f"hotter, "
            f"e.g. {flag('pairs.sampling.temperature')}=1.0"
        )
    return rows


def _row(prompt: Sequence[Message], chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt_field(prompt), "chosen": chosen, "rejected": rejected}


def _write(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    atomic.write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _print(rows: Sequence[PreferenceRecord], task: str, num_prompts: int) -> None:
    sides = [[(row.prompt, text) for row, text in zip(rows, texts, strict=True)] for texts in _sides(rows)]
    gold = [[tasks.judge(task, *sample) for sample in side] for side in sides]
    shown = [tasks.mean_behavior(task, [tasks.behavior(task, *sample) for sample in side]) for side in sides]
    keys = [key for key in tasks.BEHAVIORS[task] if key in shown[0]]  # both sides have the same prompts
    print_table(
        f"{len(rows):,} pairs of {num_prompts:,} prompts",
        ["", "chosen", "rejected"],
        [
            ["exact judge", *(sum(marks) / len(rows) for marks in gold)],
            *([key.replace("_", " "), *(means[key] for means in shown)] for key in keys),
        ],
    )
    gaps = [chosen - rejected for chosen, rejected in zip(*gold, strict=True) if chosen != rejected]
    agree = sum(gap > 0 for gap in gaps) / max(len(gaps), 1)
    print(f"Where the judge sees a difference ({len(gaps):,} pairs), the annotator agrees in {100 * agree:.1f} %.")


def _sides(rows: Sequence[PreferenceRecord]) -> tuple[list[str], list[str]]:
    return [row.chosen for row in rows], [row.rejected for row in rows]
