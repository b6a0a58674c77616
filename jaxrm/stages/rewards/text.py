"""Token rewards from what scores text: a function, a judge behind an endpoint, or a classifier of its own tokenizer."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import scoring
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.errors import UserError
from jaxrm.inference.text_scorer import TextSample, TextScorer
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.ops.token_rewards import Kind
from jaxrm.sharding import partition
from jaxrm.types import ResponseBatch, TokenRewards

_MESSAGE_BYTES = 4096  # of an error that process 0 sends to the others


class TextRewards:
    """Reward source of a scorer of text. A number for a response becomes the reward of its last token.

    A call raises the scorer's `UserError`, in every process of the job.

    Args:
      scorer: samples to scores.
      kind: of the scores, e.g. ``scalar`` or ``scalar_length_residual``.
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
        self._scorer, self._text = scorer, text
        self._examples = {example.tokens.tobytes(): example for example in examples}
        self._rows = partition.batch_sharding(mesh)
        self._replicate = jax.jit(lambda batch: batch, out_shardings=NamedSharding(mesh, PartitionSpec()))

        def as_rewards(calibration: Calibration, batch: ResponseBatch, scores: jax.Array) -> TokenRewards:
            values = kind.values(scores, batch.responses, batch.response_mask, None)
            return scoring.as_token_rewards(calibration, kind, values, batch.response_mask, batch, end_ids)

        self._as_rewards = jax.jit(as_rewards, in_shardings=(None, self._rows, self._rows), out_shardings=self._rows)

    def __call__(
        self, calibration: Calibration, batch: ResponseBatch, reference_log_probs: jax.Array | None
    ) -> TokenRewards:
        """Score responses; the reference's log-probs are not read."""
        del reference_log_probs
        host = jax.device_get(self._replicate(batch))
        scores = self._score(host) if self._scorer.is_collective else _once_a_job(self._score, host)
        on_devices = jax.make_array_from_callback(scores.shape, self._rows, scores.__getitem__)
        return self._as_rewards(calibration, batch, on_devices)

    def _score(self, batch: ResponseBatch) -> np.ndarray:
        """Scores ``[B]`` of a batch on the host."""
        samples = []
        for ids, mask, response, response_mask in zip(
            batch.prompts, batch.prompt_mask, batch.responses, batch.response_mask, strict=True
        ):
            example = self._examples[ids[mask].astype(np.int32).tobytes()]
            samples.append(TextSample(example.messages, self._text(response[response_mask]), example.fields))
        return np.asarray(self._scorer(samples), np.float32)


def _once_a_job(score: Callable[[ResponseBatch], np.ndarray], batch: ResponseBatch) -> np.ndarray:
    """The scores of process 0 in every process, or its error: so all of them stop at the same place."""
    if jax.process_count() == 1:
        return score(batch)
    scores, failure = np.zeros(batch.responses.shape[0], np.float32), None
    if jax.process_index() == 0:
        try:
            scores = score(batch)
        except Exception as error:  # whatever it is, the others must not wait for scores
            failure = error
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    if failure is not None:
        text = str(failure) if isinstance(failure, UserError) else f"process 0 raised {type(failure).__name__}"
        encoded = np.frombuffer((text or "process 0 failed").encode()[:_MESSAGE_BYTES], np.uint8)
        message[: len(encoded)] = encoded
    scores, message = multihost_utils.broadcast_one_to_all((scores, message))
    if failure is not None:
        raise failure
    text = np.asarray(message).tobytes().rstrip(b"\0").decode(errors="replace")
    if text:
        raise UserError(text)
    return np.asarray(scores)
