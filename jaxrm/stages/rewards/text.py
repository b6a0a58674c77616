"""Token rewards from what scores text: a function, a judge behind an endpoint, or a classifier of its own tokenizer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import scoring
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.errors import UserError
from jaxrm.inference.text_scorer import TextSample, TextScorer
from jaxrm.ops.reward_kinds import Kind
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.sharding import partition
from jaxrm.types import ResponseBatch, TokenRewards

_MESSAGE_BYTES = 4096  # of an error that process 0 sends to the others


class TextRewards:
    """Reward source of a scorer of text. A number for a response becomes the reward of its last token.

    Numbers of tokens, of the kind ``spans``, stay where they are.

    A call raises the scorer's `UserError`, in every process of the job.

    Args:
      scorer: samples to scores.
      kind: of the scores: ``scalar``, ``scalar_length_residual`` or ``spans``.
      examples: every prompt whose responses will be scored.
      text: a response's ids as text.
      end_ids: ids that end a response.
      mesh: the devices.
    """

    def __init__(
        self,
        scorer: TextScorer,
        kind: Kind,
        *,
        examples: Sequence[PromptExample],
        text: Callable[[np.ndarray], Response],
        end_ids: tuple[int, ...],
        mesh: Mesh,
    ) -> None:
        self.scorer, self._text, self._is_of_tokens = scorer, text, kind.reads == "spans"
        self._examples = {example.tokens.tobytes(): example for example in examples}
        self._rows = partition.batch_sharding(mesh)
        self._replicate = jax.jit(lambda batch: batch, out_shardings=NamedSharding(mesh, PartitionSpec()))

        def as_rewards(calibration: Calibration, batch: ResponseBatch, scores: jax.Array) -> TokenRewards:
            values = kind.values(scores, batch.responses, batch.response_mask, None)
            return scoring.as_token_rewards(calibration, kind, values, batch.response_mask, batch, end_ids)

        self._as_rewards = jax.jit(as_rewards, in_shardings=(None, self._rows, self._rows), out_shardings=self._rows)

    @property
    def needs_reference(self) -> bool:
        """What scores text reads nothing else."""
        return False

    def __call__(
        self, calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> TokenRewards:
        """Score responses; the reference's log-probs are not read."""
        del reference_log_probs
        host = jax.device_get(self._replicate(batch))
        if self.scorer.is_collective:
            scores = self._score(host)
        else:
            shape = host.responses.shape if self._is_of_tokens else host.responses.shape[:1]
            scores = _once_a_job(lambda: self._score(host), shape)
        on_devices = jax.make_array_from_callback(scores.shape, self._rows, scores.__getitem__)
        return self._as_rewards(calibration, batch, on_devices)

    def _score(self, batch: ResponseBatch) -> np.ndarray:
        """Scores of a batch on the host, ``[B]``; of a kind of tokens ``[B, T]``."""
        samples = []
        for ids, mask, response, response_mask in zip(
            batch.prompts, batch.prompt_mask, batch.responses, batch.response_mask, strict=True
        ):
            example = self._examples[ids[mask].astype(np.int32).tobytes()]
            samples.append(TextSample(example.messages, self._text(response[response_mask]), example.fields))
        scores = self.scorer(samples)
        if not self._is_of_tokens:
            return np.asarray(scores, np.float32)
        numbers = np.zeros(batch.responses.shape, np.float32)
        for row, mask, values in zip(numbers, batch.response_mask, scores, strict=True):
            row[mask] = values
        return numbers


def check_fields_agree(reader: str, examples: Sequence[PromptExample], column: str | None = None) -> None:
    """Refuse records with one prompt and other fields: a response is known by its prompt, so it would get either's.

    Args:
      reader: what reads the fields, for the message.
      examples: prompts with the fields of their records.
      column: the only one that is read; None for all.

    Raises:
      UserError: naming two such records.
    """
    by_prompt: dict[bytes, PromptExample] = {}
    for example in examples:
        first = by_prompt.setdefault(example.tokens.tobytes(), example)
        if first is example:
            continue
        columns = [column] if column is not None else list({**first.fields, **example.fields})
        unlike = [name for name in columns if not _are_equal(example.fields.get(name), first.fields.get(name))]
        if unlike:
            raise UserError(
                f"{reader} reads fields of records, but {first.source} and {example.source} have one prompt and differ "
                f"in {', '.join(unlike)}; leave one of the records out, or the field"
            )


def _are_equal(first: Any, second: Any) -> bool:
    """Whether two cells of a table are one; a cell without a number, NaN, equals another."""
    are_nan = all(isinstance(cell, float) and math.isnan(cell) for cell in (first, second))
    return are_nan or bool(first == second)


def _once_a_job(score: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The scores of process 0 in every process, or its error: so all of them stop at the same place.

    Args:
      score: float32 scores.
      shape: of them.
    """
    if jax.process_count() == 1:
        return score()
    scores, failure = np.zeros(shape, np.float32), None
    if jax.process_index() == 0:
        try:
            scores = score()
        except Exception as error:  # whatever it is, the others must not wait for scores
            failure = error
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    if failure is not None:
        text = str(failure) if isinstance(failure, UserError) else f"process 0 raised {type(failure).__name__}"
        encoded = np.frombuffer((text or "process 0 failed").encode(errors="replace")[:_MESSAGE_BYTES], np.uint8)
        message[: len(encoded)] = encoded
    scores, message = multihost_utils.broadcast_one_to_all((scores, message))
    if failure is not None:
        raise failure
    text = np.asarray(message).tobytes().rstrip(b"\0").decode(errors="replace")
    if text:
        raise UserError(text)
    return np.asarray(scores)
