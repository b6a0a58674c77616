"""Answers of the policies that are compared: generated once, kept, and read again when a comparison goes on.

In the run's folder ``answers/`` has a file for each policy, run, set of prompts and decoding. Its name ends with a hash
of all that decides what is in it, so answers of other weights or other prompts are never taken for these.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxrm.comparison_config import ComparedPolicyConfig
from jaxrm.data.config import DataConfig
from jaxrm.data.prompts import transcript
from jaxrm.data.readers import read_records
from jaxrm.data.records import DemonstrationRecord, Message
from jaxrm.data.responses import Response
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.inference import run_checkpoint, weights
from jaxrm.inference.load import load_policy
from jaxrm.inference.policy import Policy
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig, prompt_keys
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.row_log import RowLog
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import LANGUAGE_MODELS, Compare
from jaxrm.stages.compare.log_probs import identity_of_kl, kl_temperature, log_prob_sums, vocabulary_digest
from jaxrm.stages.compare.prompts import PromptSet


@dataclass(frozen=True)
class AnswerKey:
    """Whose answers to what.

    Attributes:
      policy: name of the policy.
      run: 0 for its path, and from 1 its further seeds.
      prompts: name of the set.
      decoding: ``sampled`` or ``greedy``.
    """

    policy: str
    run: int
    prompts: str
    decoding: str


# Rows in the order of the prompts: response, token_ids (None where another program answered), ended.
Answers = Mapping[AnswerKey, Sequence[dict[str, Any]]]


def answer_keys(config: Compare) -> list[AnswerKey]:
    """All that is answered. Answers that another program wrote are of one decoding."""
    keys = []
    for name, policy in config.policies.items():
        for run in range(1 + len(policy.seeds)):
            for prompts in config.prompts:
                keys += [AnswerKey(name, run, prompts, decoding) for decoding in config.compare.decodings]
    return keys


def check_policies(config: Compare) -> None:
    """Refuse policies, and a reference, that are not there, before anything is made; nothing is loaded.

    Raises:
      UserError: naming the policy.
    """
    for name, policy in config.policies.items():
        for run, path in enumerate(_paths(policy)):
            with _named(name, run):
                if run_checkpoint.is_run(policy.adapter or path):
                    run_checkpoint.find_checkpoint(policy.adapter or path, "path", algorithms=LANGUAGE_MODELS)
                else:
                    weights.read_shape(ModelSource(path=path, adapter=policy.adapter))
        if policy.answers is not None and not Path(policy.answers).expanduser().is_file():
            raise UserError(
                f"{option(f'policies.{name}.answers')} is {policy.answers!r}, which is no file; give a JSONL file with "
                f"prompt and response, e.g. {flag(f'policies.{name}.answers')}=answers.jsonl"
            )
    reference = config.compare.reference
    if reference is not None:
        with naming({"path": "config.compare.reference", "model.path": "config.compare.reference"}):
            if run_checkpoint.is_run(reference):
                run_checkpoint.find_checkpoint(reference, "path", algorithms=LANGUAGE_MODELS)
            else:
                weights.read_shape(ModelSource(path=reference))


def check_answer_files(config: Compare, sets: Mapping[str, PromptSet]) -> None:
    """Refuse answers of other programs that do not match the prompts, before any policy answers.

    Raises:
      UserError: naming the policy, and the prompt that has no answer, or two that differ.
    """
    for name, policy in config.policies.items():
        if policy.answers is not None:
            for prompts in sets.values():
                _read_answers(name, policy.answers, prompts)


def find_answers(config: Compare, folder: Path, sets: Mapping[str, PromptSet], *, show_progress: bool) -> Answers:
    """The answers of all policies; what is missing is generated, a batch at a time.

    Args:
      config: of the stage.
      folder: of the run.
      sets: of prompts, by name.
      show_progress: draw a bar.

    Raises:
      UserError: a policy cannot answer a prompt, or a file lacks an answer.
    """
    keys = answer_keys(config)
    logs = {key: RowLog(folder / "answers" / _file_name(config, key, sets[key.prompts])) for key in keys}
    total = sum(len(sets[key.prompts].prompts) for key in keys)
    with Progress("answer", total, unit="answers", done=_count(logs), enabled=show_progress) as progress:
        for name, policy in config.policies.items():
            for run, path in enumerate(_paths(policy)):
                missing = [
                    key for key in keys
                    if (key.policy, key.run) == (name, run) and len(logs[key].rows) < len(sets[key.prompts].prompts)
                ]  # fmt: skip
                if missing:
                    with _named(name, run):
                        opened = _open_policy(config, policy, path)
                        for key in missing:
                            for num_waiting in _generate(config, opened, key, sets[key.prompts], logs[key]):
                                progress.update(_count(logs) + num_waiting)
                        del opened
            if policy.answers is not None:
                for key in keys:
                    if key.policy == name and not logs[key].rows:
                        logs[key].append(_read_answers(name, policy.answers, sets[key.prompts]))
                        progress.update(_count(logs))
    return {key: log.rows for key, log in logs.items()}


def _count(logs: Mapping[AnswerKey, RowLog]) -> int:
    return sum(len(log.rows) for log in logs.values())


def _paths(policy: ComparedPolicyConfig) -> tuple[str, ...]:
    return () if policy.path is None else (policy.path, *policy.seeds)


def _named(name: str, run: int) -> Any:
    field = f"config.policies.{name}"
    place = f"{field}.path" if run == 0 else f"{field}.seeds[{run - 1}]"
    return naming(
        {"path": place, "model.path": place, "model.adapter": f"{field}.adapter"}
        | {"max_new_tokens": "config.compare.sampling.max_new_tokens"}
        | {f"data.{key}": f"{field}.{key}" for key in ("tokenizer", "template")}
        | {"batch_size": "config.compare.batch_size", "max_new_tokens": "config.compare.sampling.max_new_tokens"}
    )


def _open_policy(config: Compare, policy: ComparedPolicyConfig, path: str) -> Policy:
    return load_policy(
        path,
        adapter=policy.adapter,
        mesh=build_mesh(config.mesh),
        dtype=policy.dtype,
        tokenizer=policy.tokenizer,
        template=policy.template,
    )


def _file_name(config: Compare, key: AnswerKey, prompts: PromptSet) -> str:
    """A name that tells for people what is in the file, with a hash of what decides it."""
    policy, compare = config.policies[key.policy], config.compare
    decisive: list[Any] = [[[message.role, message.content] for message in prompt] for prompt in prompts.prompts]
    if policy.answers is not None:
        decisive += [hashlib.sha256(Path(policy.answers).expanduser().read_bytes()).hexdigest()]
    else:
        source = ModelSource(path=_paths(policy)[key.run], adapter=policy.adapter)
        sampling = _sampling(config, key.decoding)
        decisive += [weights.identity_of_source(source), weights.contents_of(source), policy.tokenizer, policy.template]
        decisive += [policy.dtype, repr(sampling), config.seed, compare.batch_size, key.run, key.policy]
        decisive += identity_of_kl(config, key.decoding)
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]
    return f"{key.policy}-{key.run}-{key.prompts}-{key.decoding}-{digest}.jsonl"


def _sampling(config: Compare, decoding: str) -> SamplingConfig:
    sampling = config.compare.sampling
    return sampling if decoding == "sampled" else SamplingConfig(sampling.max_new_tokens, temperature=0.0)


def _generate(config: Compare, policy: Policy, key: AnswerKey, prompts: PromptSet, log: RowLog) -> Iterator[int]:
    """Generate the answers that are missing, and keep them in the order of the prompts, a batch at a time.

    Yields:
      How many there are that are not yet kept.
    """
    sampler, rows = policy.sampler(_sampling(config, key.decoding)), config.compare.batch_size
    start, total = len(log.rows), len(prompts.prompts)
    # Policies that are compared draw different numbers, lest they share their luck.
    seed = int.from_bytes(hashlib.sha256(f"{config.seed} {key}".encode()).digest()[:4], "big")
    keys = prompt_keys(jax.random.key(seed), 0, total)
    with_log_probs = key.decoding == "sampled" and config.compare.reference is not None
    temperature = kl_temperature(config) if with_log_probs else None
    try:
        stream = sampler.answers(prompts.prompts[start:], keys[start:], rows)
    except UserError as error:
        raise UserError(f"the prompts {key.prompts} do not fit {policy.name}: {error}") from error
    waiting: dict[int, Response] = {}  # answered, while an earlier prompt is not
    for place, response in stream:
        waiting[start + place] = response
        # One response may be the last of a batch behind which others are whole.
        while (batch := range(len(log.rows), min(len(log.rows) + rows, total))) and all(i in waiting for i in batch):
            responses = [waiting.pop(i) for i in batch]
            log.append(_rows_of(policy, prompts.prompts[batch.start : batch.stop], responses, rows, temperature))
        yield len(waiting)


def _rows_of(
    policy: Policy,
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[Response],
    batch_size: int,
    temperature: float | None,
) -> list[dict[str, Any]]:
    ids = [[int(token) for token in response.token_ids] for response in responses]
    sums: Sequence[float | None] = [None] * len(ids)
    if temperature is not None:
        sums = log_prob_sums(policy, prompts, ids, batch_size, temperature=temperature)
    vocabulary = vocabulary_digest(policy)
    return [
        {
            "response": str(response),
            "token_ids": tokens,
            "ended": response.ended,
            "log_prob": log_prob,
            "vocabulary": vocabulary,
        }
        for response, tokens, log_prob in zip(responses, ids, sums, strict=True)
    ]


def _read_answers(name: str, path: str, prompts: PromptSet) -> list[dict[str, Any]]:
    """Answers of another program to these prompts, in their order.

    Raises:
      UserError: a prompt has no answer, or two that differ.
    """
    field = f"policies.{name}.answers"
    with naming({"data.path": f"config.{field}", "data.eval_path": f"config.{field}"}):
        data = DataConfig(path=path, eval_path=path, max_eval_records=None, max_bad_share=1.0)
        records, _ = read_records(data, held_out=True)
    by_prompt: dict[str, DemonstrationRecord] = {}
    for record in records:
        if isinstance(record, DemonstrationRecord):
            first = by_prompt.setdefault(transcript(record.prompt), record)
            if first.response != record.response:
                raise UserError(
                    f"{option(field)} is {path!r}, where {first.source} and {record.source} answer one prompt "
                    "differently; leave one of them out"
                )
    rows = []
    for number, prompt in enumerate(prompts.prompts, 1):
        answer = by_prompt.get(transcript(prompt))
        if answer is None:
            raise UserError(
                f"{option(field)} is {path!r}, which has no answer to prompt {number} of {prompts.name}, "
                f"{transcript(prompt)[:60]!r}; each row must have a prompt, word for word, and a response; or compare "
                f"on other prompts, {flag(f'prompts.{prompts.name}.path')}=…"
            )
        rows.append({"response": answer.response, "token_ids": None, "ended": None, "log_prob": None})
    return rows
