"""The records of a file scored by a sum of sources, for `jaxrm.score`.

There is no SFT policy to sample from, so each source is calibrated on the responses of the file themselves: with
``scale=unit`` their sums have standard deviation 1.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms.reward_config import in_words, naming_source, source_fields, weights_of
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.algorithms.summed_rewards import metrics_of_rows
from jaxrm.data import templates
from jaxrm.data.prompts import PromptExample
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import Record
from jaxrm.errors import UserError, flag, option
from jaxrm.evaluation.ranking import pair_accuracy
from jaxrm.inference.encoded_records import EncodedRecord, responses_of
from jaxrm.inference.load import load_policy
from jaxrm.inference.policy import Policy
from jaxrm.inference.response_batches import response_batches
from jaxrm.inference.reward_model import vocabulary_of
from jaxrm.inference.sampler import response_text
from jaxrm.inference.token_scores import TokenScores, as_record, policy_log_probs
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import find_kind
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards
from jaxrm.stage_config import PPO, BestOfN, Evaluate
from jaxrm.stages.rewards.calibration import not_finite, uncalibrated_of
from jaxrm.stages.rewards.judges import JudgeCosts, check_reachable
from jaxrm.stages.rewards.sources import check_origins, open_rewards
from jaxrm.types import RecordedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Tokens:
    """How the policy's tokens are shown."""

    tokenizer: "PreTrainedTokenizerBase"
    end_ids: tuple[int, ...]


def score_records(
    config: PPO | BestOfN | Evaluate, records: Sequence[Record], report: ReadReport, mesh: Mesh, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Scored records as JSON objects, as those of `jaxrm.inference.score_file.score_records`, and what judges cost.

    The rewards of a response are those of the sum; ``sources`` has each source's own, before its weight.

    Args:
      config: with ``rewards``; tokens are those of its policy.
      records: pairs, or prompts with one response.
      report: counts those that cannot be scored.
      mesh: the devices.
      batch_size: responses scored at once.

    Returns:
      The records, and the costs as `jaxrm.stages.rewards.judges.JudgeCosts.metrics` names them.

    Raises:
      UserError: where a source cannot score them, a judge cannot be asked, or no record can be scored.
    """
    if config.model.path is None:
        raise UserError(
            f"{option('model.path')} is None, but sources are added on the tokens of a policy; give one, e.g. "
            f"{flag('model.path')}=runs/quickstart/sft"
        )
    check_origins(config)
    check_reachable(config)
    policy = load_policy(config.model.path, adapter=config.model.adapter, mesh=mesh, dtype=config.model.dtype)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, template=policy.template))
    encoded = _encoded(config, policy, records, report)
    if not encoded:
        reason, count = next(iter(report.bad.items()))
        raise UserError(f"--input has no record that can be scored: {reason} (first at {count.first})")
    tokens = _Tokens(policy.tokenizer, policy.model.end_ids(policy.tokenizer, policy.template))
    source, _ = open_rewards(
        config,
        mesh,
        vocabulary_of(policy),
        [example for example, _ in encoded],
        lambda ids: response_text(policy.tokenizer, tokens.end_ids, ids),
        tokens.end_ids,
    )
    responses = [(example, ids) for example, record in encoded for _, _, ids in record.responses]
    rewards = _calibrated(config, _values(config, policy, source, responses, mesh, batch_size), responses)
    weights, rows, done = weights_of(config), [], 0
    for _, record in encoded:
        own = [{name: each[done + i] for name, each in rewards.items()} for i in range(len(record.responses))]
        summed = [np.sum([weights[name] * np.asarray(x) for name, x in parts.items()], axis=0) for parts in own]
        scores = [TokenScores(np.asarray(values, np.float32), None) for values in summed]
        row = as_record(tokens, record, scores, None, f"sum of {in_words(config)}")
        for response, parts in zip(row["responses"], own, strict=True):
            response["sources"] = source_fields(weights, parts)
        rows.append(row)
        done += len(own)
    return rows, JudgeCosts(source).metrics()


def print_sources(rows: Sequence[dict[str, Any]]) -> None:
    """Print how often each source ranks the chosen response first, and what its part in the sum is."""
    responses = [response for row in rows for response in row["responses"]]
    metrics = metrics_of_rows([{"length": len(each["tokens"]), "sources": each["sources"]} for each in responses])
    pairs = [row["responses"] for row in rows if len(row["responses"]) == 2]
    table = []
    for name, source in responses[0]["sources"].items():
        sums = [[response["sources"][name]["reward"] for response in pair] for pair in pairs]
        accuracy = 100 * pair_accuracy(*zip(*sums, strict=True)).accuracy if sums else None
        share, by_length = metrics[f"reward_share/{name}"], metrics[f"reward_length_correlation/{name}"]
        table.append([name, source["weight"], accuracy, share, by_length])
    print_table("By source", ["source", "weight", "chosen above rejected, %", "share", "r with length"], table)


def _encoded(
    config: PPO | BestOfN | Evaluate, policy: Policy, records: Sequence[Record], report: ReadReport
) -> list[tuple[PromptExample, EncodedRecord]]:
    """Records as the policy's tokens; those that a step of the config would have no room for are left out."""
    most = config.rollout.sampling.max_new_tokens
    encoded: list[tuple[PromptExample, EncodedRecord]] = []
    for record in records:
        try:
            texts = responses_of(record)
            ids = np.array(templates.encode_prompt(policy.tokenizer, record.prompt, policy.template), np.int32)
            responses = [
                (side, text, np.array(templates.encode_response(policy.tokenizer, text, policy.template), np.int32))
                for side, text in texts
            ]
            if any(len(response) > most for _, _, response in responses):
                raise UserError(f"a response longer than rollout.sampling.max_new_tokens, {most}")
            if len(ids) > config.data.max_length - most:
                raise UserError(
                    f"a prompt longer than data.max_length leaves room for, {config.data.max_length - most}"
                )
        except UserError as error:
            report.add_bad(str(error), record.source)
            continue
        example = PromptExample(ids, tuple(record.prompt), record.source, record.fields, number=len(encoded))
        encoded.append((example, EncodedRecord(record.source, record.prompt, ids, responses)))
    report.used = len(encoded)
    return encoded


def _values(
    config: PPO | BestOfN | Evaluate,
    policy: Policy,
    source: RewardSource,
    responses: Sequence[tuple[PromptExample, np.ndarray]],
    mesh: Mesh,
    batch_size: int,
) -> dict[str, list[np.ndarray]]:
    """Values ``[T]`` of each source for each response, before scale and center."""
    rows = -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)
    # Scorers of text know no empty rows, so the last response fills up the last batch.
    whole = [*responses, *[responses[-1]] * (-len(responses) % rows)]
    log_probs, temperature = None, config.rollout.sampling.temperature or 1.0  # as of the sources
    if source.needs_reference:
        log_probs = policy_log_probs(policy.model, policy.params, mesh, temperature=temperature)
    everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    values = {name: [np.zeros(0, np.float32)] * len(whole) for name in config.rewards}
    prompts, ids, done = [example.tokens for example, _ in whole], [response for _, response in whole], 0
    with Progress("score", len(whole), unit="responses") as progress:
        for batch, indices in response_batches(prompts, ids, rows, mesh, vocab_size=policy.model.config.vocab_size):
            reference = None if log_probs is None else log_probs(batch)
            numbers = np.array([whole[i][0].number for i in indices], np.int32)
            records = jax.make_array_from_callback(numbers.shape, partition.batch_sharding(mesh), numbers.__getitem__)
            parts = source(uncalibrated_of(config), RecordedBatch(**vars(batch), records=records), reference).parts
            own = jax.device_get(everywhere({name: part.values for name, part in parts.items()}))
            for name in values:
                for row, i in enumerate(indices):
                    values[name][i] = own[name][row, : len(ids[i])]
            done += len(indices)
            progress.update(done)
    return {name: each[: len(responses)] for name, each in values.items()}


def _calibrated(
    config: PPO | BestOfN | Evaluate,
    values: dict[str, list[np.ndarray]],
    responses: Sequence[tuple[PromptExample, np.ndarray]],
) -> dict[str, list[np.ndarray]]:
    """Rewards ``[T]`` of each source for each response, with its own scale and center."""
    lengths = [len(ids) for _, ids in responses]
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    rewards = {}
    for name, section in config.rewards.items():
        kind, padded = find_kind(section.kind), np.zeros(mask.shape, np.float32)
        padded[mask] = np.concatenate(values[name])
        if not np.isfinite(padded).all():
            with naming_source(config, name):
                raise not_finite("a response of --input")
        own, shown = jnp.asarray(padded), jnp.asarray(mask)
        calibration = reward_scaling.calibrate(kind, own, shown, scale=section.scale, center=section.center)
        scaled = np.asarray(reward_scaling.apply(calibration, kind, own, shown))
        rewards[name] = [row[:length] for row, length in zip(scaled, lengths, strict=True)]
    return rewards
