"""Answers of a policy: drawn by the batch, then measured, one row an answer."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import reading
from jaxrm.algorithms.best_of_n import best_of_n
from jaxrm.algorithms.reward_config import source_fields
from jaxrm.algorithms.rollout import BatchSampler
from jaxrm.algorithms.summed_rewards import metrics_of_rows
from jaxrm.data import tasks
from jaxrm.data.prompts import PromptExample, transcript
from jaxrm.data.tokenizer import token_texts
from jaxrm.inference import sharded_model
from jaxrm.models.sampling import prompt_keys
from jaxrm.stages.inputs.prompts import PlacedPrompts
from jaxrm.types import ResponseBatch, TokenRewards

Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """Answers to a list of prompts, as NumPy arrays ``[N, T]`` and ``[N]``.

    ``parts`` are the rewards ``[N, T]`` of each source of a sum, before its weight.
    """

    tokens: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray | None
    log_ratio: np.ndarray | None
    parts: dict[str, np.ndarray]


def draw_answers(
    respond: BatchSampler,
    score: Callable[[ResponseBatch], TokenRewards] | None,
    params: Any,
    batches: Sequence[PlacedPrompts],
    mesh: Mesh,
    key: jax.Array,
    *,
    best_of: int,
    read: Callable[[ResponseBatch], jax.Array] | None,
) -> Answers:
    """Answer every prompt.

    Args:
      respond: one response to each prompt, or several of the ``best_of`` at once.
      score: token rewards of responses, or None.
      params: of the policy.
      batches: prompts, all of one shape.
      mesh: the devices.
      key: of all answers.
      best_of: responses drawn to each prompt, of which ``score`` chooses the best.
      read: the log-ratio ``[B]`` of responses, from `log_ratio`, or None.
    """
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
    parts: list[tuple[Any, ...]] = []
    scored: TokenRewards | None
    for number, prompts in enumerate(batches):
        keys = prompt_keys(key, number * len(prompts.tokens), len(prompts.tokens))
        if best_of > 1:
            assert score is not None
            at_once = respond.responses_per_prompt
            select = best_of_n(respond, functools.partial(_score, score, prompts), best_of, at_once=at_once)
            best = select(params, prompts.tokens, prompts.mask, keys)
            batch, scored = best.responses, best.token_rewards
        else:
            batch = respond(params, prompts.tokens, prompts.mask, keys).responses
            scored = None if score is None else _score(score, prompts, batch)
        ratio = None if read is None else read(batch)
        rewards = None if scored is None else scored.rewards
        by_source = {} if scored is None else {name: part.rewards for name, part in scored.parts.items()}
        parts.append(jax.device_get(whole((batch.responses, batch.response_mask, rewards, ratio, by_source))))

    def joined(column: int) -> np.ndarray | None:
        return None if parts[0][column] is None else np.concatenate([part[column] for part in parts])

    tokens, mask = joined(0), joined(1)
    assert tokens is not None and mask is not None
    sources = {name: np.concatenate([part[4][name] for part in parts]) for name in parts[0][4]}
    return Answers(tokens, mask, joined(2), joined(3), sources)


def _score(
    score: Callable[[ResponseBatch], TokenRewards], prompts: PlacedPrompts, batch: ResponseBatch
) -> TokenRewards:
    return score(prompts.with_records(batch))


def log_ratio(graphdef: Any, mesh: Mesh, temperature: float) -> Callable[[Any, Any, ResponseBatch], jax.Array]:
    """``(params, reference_params, batch) -> [B]``: log-ratio of a response, nats, at the sampling temperature."""
    multiple = sharded_model.pad_to_multiple_of(mesh)

    @jax.jit
    def log_probs(params: Any, batch: ResponseBatch) -> jax.Array:
        return reading.response_statistics(
            graphdef, params, batch, None, pad_to_multiple_of=multiple, temperature=temperature
        ).log_probs

    @jax.jit
    def difference(ours: jax.Array, theirs: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, ours - theirs, 0.0), axis=1)

    def read(params: Any, reference: Any, batch: ResponseBatch) -> jax.Array:
        # One program for both, so that they round alike: the KL of a policy to itself is 0 and not nearly 0.
        return difference(log_probs(params, batch), log_probs(reference, batch), batch.response_mask)

    return read


def answer_rows(
    split: str,
    decoding: str,
    examples: Sequence[PromptExample],
    answers: Answers,
    text: Callable[[np.ndarray], str],
    tokenizer: Any,
    judge: str | None,
    *,
    token_rewards: int,
) -> list[Row]:
    """A row for each answer: its text, length in tokens, KL in nats, judge's mark, behavior and reward.

    Args:
      split: of the prompts.
      decoding: how they were answered.
      examples: the prompts.
      answers: to them, and to what filled up the last batch.
      text: a response's ids as text.
      tokenizer: of the policy.
      judge: embedded task whose judge marks them, or None.
      token_rewards: number of answers whose single tokens are saved with their rewards.
    """
    task, rows = None if judge is None else judge.removeprefix(tasks.PREFIX), []
    for i, example in enumerate(examples):  # the last batch is filled up
        ids = answers.tokens[i][answers.mask[i]]
        response = text(ids)
        row: Row = {"split": split, "decoding": decoding, "index": i, "prompt": transcript(example.messages)}
        row |= {"response": response, "length": len(ids)}
        row["kl"] = None if answers.log_ratio is None else float(answers.log_ratio[i])
        if task is not None:
            row["judge"] = tasks.judge(task, example.messages, response)
            row["behaviour"] = tasks.behavior(task, example.messages, response)
        row["reward"] = None if answers.rewards is None else float(answers.rewards[i].sum())
        if answers.rewards is not None and i < token_rewards:
            row["tokens"] = token_texts(tokenizer, [int(token) for token in ids])
            row["rewards"] = [float(x) for x in answers.rewards[i][answers.mask[i]]]
        rows.append(row)
    return rows


def add_sources(rows: Sequence[Row], answers: Answers, weights: Mapping[str, float]) -> None:
    """Add to rows of answers what each source of a sum of rewards gave: its weight, and its reward before it.

    Rows with the rewards of single tokens get those of each source too.

    Args:
      rows: from `answer_rows`.
      answers: the same.
      weights: of the sources, by name; none for rewards of one source.
    """
    for i, row in enumerate(rows):
        by_source = {name: answers.parts[name][i][answers.mask[i]] for name in weights}
        if by_source:
            row["sources"] = source_fields(weights, by_source, tokens="rewards" in row)


def summary(rows: Sequence[Row], judge: str | None) -> dict[str, dict[str, float]]:
    """`means_of` each split and decoding."""
    report: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(f"{row['split']}, {row['decoding']}" for row in rows):
        report[name] = means_of([row for row in rows if f"{row['split']}, {row['decoding']}" == name], judge)
    return report


def means_of(rows: Sequence[Row], judge: str | None) -> dict[str, float]:
    """Mean mark, reward, KL, length and behavior, of what was measured; and `metrics_of_rows` of a sum of rewards."""
    means = {}
    for column in ("judge", "reward", "kl", "length"):
        values = [float(row[column]) for row in rows if row.get(column) is not None]
        if values:
            means[column] = float(np.mean(values))
    means |= metrics_of_rows(rows)
    if judge is not None:
        means |= tasks.mean_behavior(judge.removeprefix(tasks.PREFIX), [row["behaviour"] for row in rows])
    return means
