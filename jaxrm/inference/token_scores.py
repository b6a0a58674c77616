"""Responses of a file, scored token by token: what `jaxrm.score` writes and draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import scoring
from jaxrm.data import templates
from jaxrm.data.pairs import correction_request, cut_prompt, max_scored_prompt_tokens
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, Record
from jaxrm.data.tokenizer import token_texts
from jaxrm.errors import UserError
from jaxrm.inference import sharded_model
from jaxrm.inference.corrections import Corrector
from jaxrm.inference.load import Trained, TrainedRewardModel
from jaxrm.inference.response_batches import response_batches
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.ops import reward_scaling
from jaxrm.ops.token_rewards import Kind, find_kind
from jaxrm.runtime.progress import Progress
from jaxrm.sharding import partition
from jaxrm.types import ResponseBatch


@dataclass(frozen=True)
class EncodedRecord:
    """One record to score: a prompt and its responses, as text and as tokens.

    Attributes:
      source: where it was read.
      prompt: messages.
      prompt_ids: ``[P]`` int32.
      responses: ``(side, text, ids)`` of each response; sides are ``chosen`` and ``rejected``, or ``response``.
    """

    source: str
    prompt: Sequence[Message]
    prompt_ids: np.ndarray
    responses: Sequence[tuple[str, str, np.ndarray]]


@dataclass(frozen=True)
class TokenScores:
    """What a reward model says of one response of T tokens.

    Attributes:
      values: ``[T]`` float32 token rewards before calibration, which belongs to a run of PPO.
      tags: ``[T]`` bool, or None for a scalar reward model, which has none.
    """

    values: np.ndarray
    tags: np.ndarray | None


def encode(
    records: Sequence[Record], model: TrainedRewardModel, report: ReadReport, *, reference: Trained | None = None
) -> list[EncodedRecord]:
    """Records as tokens; prompts are cut on the left where they must be, and what cannot be scored is reported.

    Args:
      records: pairs or demonstrations.
      model: the reward model.
      report: told of records without a response, with an empty one, with two that are the same, or with one that is
        too long to be read.
      reference: policy that must be able to read them too.
    """
    request = correction_request(model.tokenizer, model.template, model.config.mapping.instruction)
    first_id = templates.bos_id(model.tokenizer, model.template)
    tasks = []
    for record in records:
        if isinstance(record, PreferenceRecord):
            texts = [("chosen", record.chosen), ("rejected", record.rejected)]
        elif isinstance(record, DemonstrationRecord):
            texts = [("response", record.response)]
        else:
            report.add_bad("a prompt without a response", record.source)
            continue
        if not all(text.strip() for _, text in texts):
            report.add_bad("a response is empty", record.source)
            continue
        try:
            prompt = templates.encode_prompt(model.tokenizer, record.prompt, model.template)
        except UserError as error:
            report.add_bad(str(error), record.source)
            continue
        responses = [
            (side, text, np.array(templates.encode_response(model.tokenizer, text, model.template), np.int32))
            for side, text in texts
        ]
        every = [ids for _, _, ids in responses]
        if len(every) == 2 and np.array_equal(every[0], every[1]):
            report.add_bad("both responses are the same", record.source)
            continue
        positions = model.model.config.max_position
        room = max_scored_prompt_tokens(positions, every, request if model.is_seq2seq else None)
        if reference is not None:
            positions = min(positions, reference.model.config.max_position)
            room = min(room, max_scored_prompt_tokens(reference.model.config.max_position, every, None))
        if room < 1:
            report.add_bad(f"a response too long for the {positions} tokens of the model", record.source)
            continue
        report.cut_prompts += len(prompt) > room
        ids = cut_prompt(np.array(prompt, np.int32), room, first_id)
        tasks.append(EncodedRecord(record.source, record.prompt, ids, responses))
    report.used = len(tasks)
    return tasks


def score(
    model: TrainedRewardModel,
    tasks: Sequence[EncodedRecord],
    kind: str,
    *,
    mesh: Mesh,
    rows: int,
    reference: Trained | None = None,
    show_progress: bool = True,
) -> list[list[TokenScores]]:
    """Token rewards of every response of every task, before calibration.

    Args:
      model: the reward model.
      tasks: from `encode`.
      kind: of token reward; the length effect of ``scalar_length_residual`` is fitted on the responses themselves.
      mesh: the devices.
      rows: responses scored at once.
      reference: policy that ``contrast`` compares with.
      show_progress: draw a bar.

    Raises:
      UserError: where a reward is no finite number, which is the parameters' fault.
    """
    prompts = [task.prompt_ids for task in tasks for _ in task.responses]
    responses = [ids for task in tasks for _, _, ids in task.responses]
    sources = [task.source for task in tasks for _ in task.responses]
    step = scoring.build_score_step(
        build_scorer(model, find_kind(kind), mesh),
        params_sharding=model.model.shardings,
        batch_sharding=partition.batch_sharding(mesh),
        output_sharding=NamedSharding(mesh, PartitionSpec()),
    )
    plain = reward_scaling.uncalibrated()
    log_probs = None if reference is None else policy_log_probs(reference.model, reference.params, mesh)
    scored: list[TokenScores] = [TokenScores(np.zeros(0, np.float32), None)] * len(responses)
    V, done = model.model.config.vocab_size, 0
    with Progress("score", len(responses), unit="responses", enabled=show_progress) as progress:
        for batch, indices in response_batches(prompts, responses, rows, mesh, vocab_size=V):
            given = None if log_probs is None else log_probs(batch)
            found = jax.device_get(step(model.params, plain, batch, given))
            values, tags = found.values, found.tags
            for row, i in enumerate(indices):
                length = len(responses[i])
                if not np.isfinite(values[row, :length]).all():
                    raise UserError(
                        f"{model.name} rewards a response of {sources[i]} with {values[row, :length].sum()}, which is "
                        "no finite number: its parameters are spoiled; give an earlier checkpoint, e.g. "
                        "--checkpoint=RUN_DIR/checkpoints/best"
                    )
                scored[i] = TokenScores(values[row, :length], tags[row, :length] if model.is_seq2seq else None)
            done += len(indices)
            progress.update(done)
    if find_kind(kind).removes_length:
        scored = _without_length(scored, find_kind(kind))
    in_order = iter(scored)
    return [[next(in_order) for _ in task.responses] for task in tasks]


def correct(
    model: TrainedRewardModel, tasks: Sequence[EncodedRecord], *, max_new_tokens: int, show_progress: bool = True
) -> list[list[np.ndarray]]:
    """Token ids of the greedy correction of every response of every task."""
    request = tuple(correction_request(model.tokenizer, model.template, model.config.mapping.instruction))
    corrector = Corrector(model.model, model.params, model.tokenizer, model.template, request, max_new_tokens)
    prompts = [task.prompt_ids for task in tasks for _ in task.responses]
    responses = [ids for task in tasks for _, _, ids in task.responses]
    written = iter(corrector.correct(prompts, responses, show_progress=show_progress))
    return [[next(written) for _ in task.responses] for task in tasks]


def as_record(
    model: TrainedRewardModel,
    task: EncodedRecord,
    scored: Sequence[TokenScores],
    corrections: Sequence[np.ndarray] | None,
    kind: str,
) -> dict[str, Any]:
    """One line of the JSONL, which is also one record of `jaxrm.reports.page`."""
    ends = templates.end_ids(model.tokenizer, model.template)
    special = set(model.tokenizer.all_special_ids) | ends

    def shown(ids: np.ndarray) -> dict[str, Any]:
        content = [int(token) for token in ids if int(token) not in special]
        return {
            "text": str(model.tokenizer.decode(content)).strip(),
            "tokens": token_texts(model.tokenizer, [int(token) for token in ids]),
            "token_ids": [int(token) for token in ids],
            "ended": bool(len(ids)) and int(ids[-1]) in ends,
        }

    responses = []
    for i, ((side, text, ids), found) in enumerate(zip(task.responses, scored, strict=True)):
        values = [float(value) for value in found.values]
        wrong = None if found.tags is None else np.flatnonzero(~found.tags)
        responses.append(
            {
                "side": side,
                **shown(ids),
                "text": text,
                "tags": None if found.tags is None else [bool(tag) for tag in found.tags],
                "rewards": values,
                "sum": sum(values),
                "mean": sum(values) / len(values),
                "diverges_at": None if wrong is None or not len(wrong) else int(wrong[0]),
                "correction": None if corrections is None else shown(corrections[i]),
            }
        )
    sums = [response["sum"] for response in responses]
    is_ranked = len(sums) == 2 and sums[0] != sums[1]  # a tie is neither right nor wrong
    return {
        "source": task.source,
        "prompt": [{"role": message.role, "content": message.content} for message in task.prompt],
        "kind": kind,
        "ranked_right": sums[0] > sums[1] if is_ranked else None,
        "responses": responses,
    }


def build_scorer(model: TrainedRewardModel, kind: Kind, mesh: Mesh) -> scoring.Scorer:
    """The scorer of a trained reward model, with its own request and end ids."""
    return scoring.build_scorer(
        kind,
        model.model.graphdef,
        request=tuple(correction_request(model.tokenizer, model.template, model.config.mapping.instruction)),
        end_ids=tuple(sorted(templates.end_ids(model.tokenizer, model.template))),
        pad_to_multiple_of=sharded_model.pad_to_multiple_of(mesh),
    )


def policy_log_probs(
    model: ShardedModel, params: Any, mesh: Mesh, *, whole: bool = False
) -> Callable[[ResponseBatch], jax.Array]:
    """Function to the log-probs ``[B, T]`` that a policy gives to responses: by rows, or ``whole`` on every device."""
    multiple, rows = sharded_model.pad_to_multiple_of(mesh), partition.batch_sharding(mesh)

    def log_probs(params: Any, batch: ResponseBatch) -> jax.Array:
        return scoring.response_statistics(model.graphdef, params, batch, None, pad_to_multiple_of=multiple).log_probs

    out = NamedSharding(mesh, PartitionSpec()) if whole else rows
    jitted = jax.jit(log_probs, in_shardings=(model.shardings, rows), out_shardings=out)
    return lambda batch: jitted(params, batch)


def _without_length(scored: Sequence[TokenScores], kind: Kind) -> list[TokenScores]:
    """The scores, on the last token of each response, less the linear effect of length."""
    T = max(len(response.values) for response in scored)
    values, mask = np.zeros((len(scored), T), np.float32), np.zeros((len(scored), T), bool)
    for row, response in enumerate(scored):
        values[row, : len(response.values)], mask[row, : len(response.values)] = response.values, True
    arrays = jnp.asarray(values), jnp.asarray(mask)
    fitted = reward_scaling.calibrate(kind, *arrays, scale=1.0, center="none")
    rewards = np.asarray(reward_scaling.apply(fitted, kind, *arrays))
    return [TokenScores(rewards[row][mask[row]], None) for row in range(len(scored))]
