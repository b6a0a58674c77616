"""A reward model with its parameters, ready to score responses and, a seq2seq one, to correct them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrm.data.pairs import correction_request
from jaxrm.data.templates import bos_id
from jaxrm.data.tokenizer import Vocabulary
from jaxrm.errors import UserError, arguments
from jaxrm.inference.prompts import Prompt, check_count, read_prompts, read_responses
from jaxrm.inference.reference import check_reference, check_reference_template
from jaxrm.inference.reward_kind import check_needs_reference, choose_kind
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import lora
from jaxrm.ops.reward_kinds import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxrm.data.readers import ReadReport
    from jaxrm.data.records import Record
    from jaxrm.inference.encoded_records import EncodedRecord
    from jaxrm.inference.policy import Policy
    from jaxrm.inference.scores import Scores


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A reward model with its parameters.

    Attributes:
      model: the decoder, or the decoder with a scalar head, and where its parameters lie.
      params: its parameters, float32, on the devices.
      tokenizer: of the model.
      template: chat template that it was trained with.
      name: where it came from, for people.
      sort: ``seq2seq``, which answers in language, ``scalar``, which gives a number, or ``dpo``: a policy that DPO
        trained, whose log-probs are rewards beside those of the policy that it began with.
      instruction: what a seq2seq one is told after a response, see `jaxrm.data.pairs.MappingConfig`.
      kind: of token reward that it was trained to be read by.
    """

    model: ShardedModel
    params: Any = dataclasses.field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = dataclasses.field(repr=False)
    template: str
    name: str
    sort: Source
    instruction: str
    kind: str

    @property
    def is_seq2seq(self) -> bool:
        """Whether it answers in language."""
        return self.sort == "seq2seq"

    @cached_property
    def request(self) -> tuple[int, ...]:
        """Ids that ask for a correction of the response before them."""
        return tuple(correction_request(self.tokenizer, self.template, self.instruction))

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self.model.end_ids(self.tokenizer, self.template)

    @cached_property
    def bos_id(self) -> int | None:
        """The template's first id, which stays where a prompt is cut."""
        return bos_id(self.tokenizer, self.template)

    @cached_property
    def score_steps(self) -> dict[Any, Any]:
        """Programs that score, by what decides them, so that they are compiled once and not by every call."""
        return {}

    @arguments()
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        kind: str | None = None,
        batch_size: int = 16,
        reference: "Policy | None" = None,
    ) -> "Scores":
        """Score every token of responses.

        A response is scored with its end token, as if the policy had finished it; an empty one is its end token
        alone. Of a prompt that is too long the beginning goes, but for its system text and first header.

        Args:
          prompts: texts, or lists of messages.
          responses: a text to each prompt.
          kind: of token reward, one of `jaxrm.ops.reward_kinds.KINDS` or one's own, ``package.module:function``; by
            default that of the model.
          batch_size: responses scored at once.
          reference: policy that ``contrast`` and ``dpo`` compare with, and no other kind.

        Returns:
          Token rewards before scale and center, which belong to a run of PPO.

        Raises:
          UserError: naming the prompt, response or argument that is wrong.
        """
        from jaxrm.inference import encoded_records
        from jaxrm.inference.scores import Scores

        check_count("batch_size", batch_size)
        kind = kind or self.kind
        self.check_kind(kind, "kind")
        check_needs_reference(kind, reference)
        if reference is not None:
            self.check_reference(reference)
        messages = read_prompts(prompts)
        records = encoded_records.encode_all(messages, read_responses(responses, len(messages)), self, reference)
        rows = self.score_records(records, kind, batch_size=batch_size, reference=reference, show_progress=False)
        return Scores(rows, self.name)

    @arguments()
    def sums(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        kinds: Sequence[str],
        *,
        batch_size: int,
        show_progress: bool = True,
    ) -> dict[str, np.ndarray]:
        """Sums ``[N]`` float32 of token rewards over each response, by kind, from one reading of all.

        Arguments and errors are those of `score`, for kinds that need no reference.
        """
        from jaxrm.inference import encoded_records, token_scores

        check_count("batch_size", batch_size)
        for kind in kinds:
            self.check_kind(kind, "kind")
            check_needs_reference(kind, None)
        messages = read_prompts(prompts)
        records = encoded_records.encode_all(messages, read_responses(responses, len(messages)), self)
        scores = token_scores.score_kinds(self, records, kinds, batch_size=batch_size, show_progress=show_progress)
        return {kind: np.array([one.values.sum() for (one,) in scores[kind]], np.float32) for kind in kinds}

    @arguments()
    def correct(self, prompts: Sequence[Prompt], responses: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
        """Write what a seq2seq reward model would have responded, greedily.

        Args:
          prompts: texts, or lists of messages.
          responses: a text to each prompt.
          max_new_tokens: longest correction in tokens.

        Returns:
          A correction of each response, in their order.

        Raises:
          UserError: naming the prompt, response or argument that is wrong; or where the model is a scalar one.
        """
        from jaxrm.inference import encoded_records, token_scores

        check_count("max_new_tokens", max_new_tokens)
        if not self.is_seq2seq:
            raise UserError(
                f"{self.name} is a {self.sort} reward model, which writes no corrections; use a seq2seq one"
            )
        messages = read_prompts(prompts)
        records = encoded_records.encode_all(messages, read_responses(responses, len(messages)), self)
        written = token_scores.correct(self, records, max_new_tokens=max_new_tokens, show_progress=False)
        return [token_scores.text_of(self, token_ids) for (token_ids,) in written]

    def check_kind(self, kind: str, field: str) -> None:
        """Refuse a kind of token reward that this reward model cannot give; ``field`` says it.

        Raises:
          UserError: with the kinds that it can give.
        """
        choose_kind(self.name, self.sort, kind, field)

    def check_reference(self, reference: "Policy") -> None:
        """Refuse a reference policy that reads other token ids or templates.

        Raises:
          UserError: naming what differs.
        """
        check_reference(self.vocabulary, reference.name, vocabulary_of(reference))
        theirs = (reference.tokenizer, reference.template)
        check_reference_template((self.tokenizer, self.template), self.name, theirs, reference.name)

    def encode_records(
        self, records: "Sequence[Record]", report: "ReadReport", *, reference: "Policy | None" = None
    ) -> "list[EncodedRecord]":
        """Records to score; see `jaxrm.inference.encoded_records.encode`."""
        from jaxrm.inference import encoded_records

        return encoded_records.encode(records, self, report, reference=reference)

    def score_records(
        self,
        records: "Sequence[EncodedRecord]",
        kind: str,
        *,
        batch_size: int,
        reference: "Policy | None" = None,
        max_new_tokens: int | None = None,
        show_progress: bool = True,
    ) -> list[dict[str, Any]]:
        """Records as `jaxrm.inference.token_scores.as_record` makes them, with their scores.

        Args:
          records: from `encode_records`.
          kind: of token reward.
          batch_size: responses scored at once.
          reference: policy that ``contrast`` and ``dpo`` compare with.
          max_new_tokens: longest correction; None for no corrections.
          show_progress: draw a bar.

        Raises:
          UserError: corrections have no room, or a reward is no finite number.
        """
        from jaxrm.inference import token_scores

        if max_new_tokens is not None:
            token_scores.check_corrections(self, records, max_new_tokens)
        scores = token_scores.score(
            self, records, kind, batch_size=batch_size, reference=reference, show_progress=show_progress
        )
        corrections: Sequence[Any] = [None] * len(records)
        if max_new_tokens is not None:
            corrections = token_scores.correct(self, records, max_new_tokens=max_new_tokens)
        return [
            token_scores.as_record(self, record, values, written, kind)
            for record, values, written in zip(records, scores, corrections, strict=True)
        ]

    def with_params(self, params: Any) -> "RewardModel":
        """The same model with other parameters, such as those of a training state: its adapters, where it has any."""
        return dataclasses.replace(self, params=lora.join(lora.split(self.params)[1], params))

    @property
    def vocabulary(self) -> Vocabulary:
        """What its token ids mean."""
        return vocabulary_of(self)


def vocabulary_of(model: "RewardModel | Policy") -> Vocabulary:
    """What the token ids of a model mean."""
    return Vocabulary(model.tokenizer, model.model.config.vocab_size, model.name)
