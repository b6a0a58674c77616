"""Token rewards from what scores text: a function, a judge behind an endpoint, or a classifier of its own tokenizer."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import scoring
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.prompts import PromptExample
from jaxrm.data.responses import Response
from jaxrm.inference.text_scorer import TextSample, TextScorer
from jaxrm.ops.reward_kinds import Kind, find_kind
from jaxrm.ops.reward_scaling import Calibration
from jaxrm.runtime.processes import once_a_job
from jaxrm.sharding import partition
from jaxrm.stages.rewards.scored import Responses
from jaxrm.types import RecordedBatch, ResponseBatch, TokenRewards


class TextRewards:
    """Reward source of a scorer of text. A number for a response becomes the reward of its last token.

    Numbers of tokens, of the kind ``spans``, stay where they are.

    A call raises the scorer's `UserError`, in every process of the job.

    Args:
      scorer: samples to scores.
      kind: of the scores: ``scalar``, ``scalar_length_residual`` or ``spans``.
      examples: every prompt whose responses will be scored. Where the scorer reads their fields they are numbered, and
        batches are `jaxrm.types.RecordedBatch`; else a response is known by its prompt.
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
        self._by_prompt = {example.tokens.tobytes(): example for example in examples}
        self._by_number = {example.number: example for example in examples}
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
            scores = once_a_job(lambda: self._score(host), shape)
        on_devices = jax.make_array_from_callback(scores.shape, self._rows, scores.__getitem__)
        return self._as_rewards(calibration, batch, on_devices)

    def _score(self, batch: ResponseBatch) -> np.ndarray:
        """Scores of a batch on the host, ``[B]``; of a kind of tokens ``[B, T]``."""
        if isinstance(batch, RecordedBatch):
            examples = [self._by_number[int(number)] for number in batch.records]
        else:
            prompts = zip(batch.prompts, batch.prompt_mask, strict=True)
            examples = [self._by_prompt[ids[mask].astype(np.int32).tobytes()] for ids, mask in prompts]
        samples = [
            TextSample(example.messages, self._text(response[mask]), example.fields)
            for example, response, mask in zip(examples, batch.responses, batch.response_mask, strict=True)
        ]
        scores = self.scorer(samples)
        if not self._is_of_tokens:
            return np.asarray(scores, np.float32)
        numbers = np.zeros(batch.responses.shape, np.float32)
        for row, mask, values in zip(numbers, batch.response_mask, scores, strict=True):
            row[mask] = values
        return numbers


def open_text_rewards(scorer: TextScorer, source: RewardConfig, responses: Responses) -> TextRewards:
    """Rewards of a scorer, as the section of a source has them."""
    return TextRewards(
        scorer,
        find_kind(source.kind),
        examples=responses.examples,
        text=responses.text,
        end_ids=responses.end_ids,
        mesh=responses.mesh,
    )
