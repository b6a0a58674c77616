"""A sequence classifier of one label as a reward model: text in, a number out, by its own tokenizer and chat template.

A dialogue and its response are written by ``apply_chat_template`` as the classifier's makers do it, and the score is
read where transformers reads it. So policy and classifier need no vocabulary in common. A special token that is spelled
out in a message stays text (`jaxrm.data.templates`), so that a policy cannot end its turn by spelling it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxrm.data import templates
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import Message, Record
from jaxrm.data.templates import Text
from jaxrm.errors import UserError, arguments, flag, option
from jaxrm.inference.encoded_records import EncodedRecord, encode_each
from jaxrm.inference.prompts import Prompt, check_count, read_prompts, read_responses
from jaxrm.inference.reward_kind import default_kind
from jaxrm.inference.scores import Scores
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.inference.text_batches import build_text_step, text_batches
from jaxrm.inference.text_counts import TextCounts
from jaxrm.inference.text_scorer import TextSample
from jaxrm.inference.token_scores import TokenScores, as_record, without_length
from jaxrm.models import hub
from jaxrm.ops.reward_kinds import find_kind, names_for
from jaxrm.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxrm.inference.policy import Policy


@dataclass(frozen=True, eq=False)
class Classifier:
    """A sequence classifier of one label with its weights: a `jaxrm.inference.text_scorer.TextScorer`.

    Attributes:
      model: decoder and scalar head, and where its parameters lie.
      weights: its parameters; None where they have not been read.
      tokenizer: its own.
      template: its chat template, as in ``config.data.template``.
      max_length: most tokens of a dialogue; a longer one is cut on the side that its tokenizer truncates.
      name: where it came from, for people.
      rows: dialogues that are scored at once.
      counts: what was scored so far.
    """

    model: ShardedModel = dataclasses.field(repr=False)
    weights: hub.ClassifierParams | None = dataclasses.field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = dataclasses.field(repr=False)
    template: str
    max_length: int
    name: str
    rows: int = 16
    counts: TextCounts = dataclasses.field(default_factory=TextCounts, repr=False)

    is_collective: ClassVar[bool] = True
    is_seq2seq: ClassVar[bool] = False
    kind: ClassVar[str] = default_kind("scalar")

    def __call__(self, samples: Sequence[TextSample]) -> np.ndarray:
        """Scores ``[B]`` of responses, float32; of what the template makes of them, as in transformers.

        Raises:
          UserError: the template refuses a dialogue, or a score is no finite number.
        """
        texts, num_changed = [], 0
        for sample in samples:
            try:
                texts.append(self.write(sample.prompt, sample.response))
            except UserError:  # what a policy writes must not end its run, so a text that was changed is counted
                dialogue = [*sample.prompt, Message("assistant", sample.response)]
                texts.append(templates.write_dialogue(self.tokenizer, dialogue, self.template, may_change=True))
                num_changed += 1
        self.counts.add_changed(num_changed, len(texts), self.name)
        return self.score_texts(texts)

    @arguments()
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, kind: str | None = None, batch_size: int = 16
    ) -> Scores:
        """Score responses; the score of a response is the reward of its last token.

        Args:
          prompts: texts, or lists of messages.
          responses: a text to each prompt.
          kind: ``scalar``, or ``scalar_length_residual``, which is fitted on the responses themselves.
          batch_size: responses scored at once.

        Raises:
          UserError: naming the prompt, response or argument that is wrong.
        """
        check_count("batch_size", batch_size)
        kind = kind or self.kind
        self.check_kind(kind, "kind")
        rows = self.score_records(self._write_all(prompts, responses), kind, batch_size=batch_size, show_progress=False)
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
        """Scores ``[N]`` float32 of responses, by kind, from one reading of all; otherwise as `score`."""
        check_count("batch_size", batch_size)
        for kind in kinds:
            self.check_kind(kind, "kind")
        records = self._write_all(prompts, responses)
        by_kind = self._read(records, kinds, batch_size, show_progress)
        return {kind: np.array([one.values.sum() for one in scores], np.float32) for kind, scores in by_kind.items()}

    def _read(
        self, records: Sequence[EncodedRecord], kinds: Sequence[str], batch_size: int, show_progress: bool
    ) -> dict[str, list[TokenScores]]:
        """Scores of all responses of the records, by kind, from one reading."""
        texts = [text for record in records for text in record.texts]
        lengths = [len(ids) for record in records for _, _, ids in record.responses]
        scores = self.score_texts(texts, rows=batch_size, show_progress=show_progress)
        plain = [TokenScores(_on_last(score, length), None) for score, length in zip(scores, lengths, strict=True)]
        return {
            kind: without_length(plain, find_kind(kind)) if plain and find_kind(kind).removes_length else plain
            for kind in kinds
        }

    def _write_all(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[EncodedRecord]:
        """A record of each prompt and response.

        Raises:
          UserError: naming the prompt or response that is wrong.
        """
        messages = read_prompts(prompts)
        records = []
        for i, (prompt, response) in enumerate(zip(messages, read_responses(responses, len(messages)), strict=True)):
            try:
                records.append(self._write_record(f"responses[{i}]", prompt, [("response", response)]))
            except UserError as error:
                raise UserError(f"prompts[{i}]: {error}") from error
        return self._with_ids(records)

    def correct(self, prompts: Sequence[Prompt], responses: Sequence[str], *, max_new_tokens: int = 128) -> list[str]:
        """Refused: a classifier gives a number."""
        raise UserError(f"{self.name} is a classifier, which writes no corrections; use a seq2seq reward model")

    def check_kind(self, kind: str, field: str) -> None:
        """Refuse a kind of token reward that a score of a whole response cannot give; ``field`` says it.

        Raises:
          UserError: with the kinds that it can give.
        """
        kinds = names_for("scalar", "response")
        if kind not in kinds:
            raise UserError(
                f"{option(field)} is {kind!r}, but {self.name} is a classifier, which scores whole responses by its "
                f"own tokens; its kinds are {', '.join(kinds)}, e.g. {flag(field)}={kinds[0]}"
            )

    def write(self, prompt: Sequence[Message], response: str) -> Text:
        """A dialogue with its response as text.

        Raises:
          UserError: the template refuses it, or does not write all of it.
        """
        return templates.write_dialogue(self.tokenizer, [*prompt, Message("assistant", response)], self.template)

    def check_roles(self, prompts: Sequence[Sequence[Message]]) -> None:
        """Refuse prompts that the template cannot write; those of the same roles are looked at once.

        Raises:
          UserError: naming the first.
        """
        seen: set[tuple[str, ...]] = set()
        for prompt in prompts:
            roles = tuple(message.role for message in prompt)
            if roles in seen:
                continue
            seen.add(roles)
            try:
                self.write(prompt, "yes")
            except UserError as error:
                raise UserError(
                    f"{option('reward.model')}, {self.name}, cannot read the prompt {prompt[-1].content[:60]!r} of "
                    f"{', '.join(roles)}: {error}"
                ) from error

    def _readable(self, ids: Sequence[int]) -> np.ndarray:
        """Ids ``[W]`` of a dialogue, cut where there are too many, up to the one that the score is read at.

        They are those of ``apply_chat_template(dialogue, truncation=True, max_length=max_length)``.
        """
        assert self.weights is not None, "the classifier has no weights yet"
        is_left = self.tokenizer.truncation_side == "left"
        short = np.array(ids[-self.max_length :] if is_left else ids[: self.max_length], np.int32)
        if self.weights.pad_id is None:
            return short
        return short[: int(np.max(np.flatnonzero(short != self.weights.pad_id), initial=0)) + 1]

    def score_texts(self, texts: Sequence[Text], *, rows: int | None = None, show_progress: bool = False) -> np.ndarray:
        """Scores ``[N]`` of written dialogues, float32; every process must call it with the same ones.

        Args:
          texts: from `write`.
          rows: scored at once, in place of ``self.rows``.
          show_progress: draw a bar.

        Raises:
          UserError: a score is no finite number.
        """
        assert self.weights is not None, "the classifier has no weights yet"
        whole = templates.encode(self.tokenizer, texts)
        encoded = [self._readable(ids) for ids in whole]
        num_cut = sum(len(ids) > self.max_length for ids in whole)
        self.counts.add_cut(num_cut, len(whole), self.name, self.max_length, self.tokenizer.truncation_side)
        scores, done = np.zeros(len(texts), np.float32), 0
        with Progress("score", len(texts), unit="responses", enabled=show_progress) as progress:
            for tokens, last, indices in text_batches(encoded, rows or self.rows, self.model.mesh):
                scores[indices] = np.asarray(self._step(self.weights.params, tokens, last))[: len(indices)]
                done += len(indices)
                progress.update(done)
        scores += np.float32(self.weights.bias)
        wrong = np.flatnonzero(~np.isfinite(scores))
        if len(wrong):
            raise UserError(
                f"{self.name} scores text {wrong[0]} of {len(texts)}, {''.join(texts[wrong[0]].parts)[-60:]!r}, with "
                f"{scores[wrong[0]]}, which is no finite number: its weights are spoiled, or its dtype is too small, "
                f"e.g. {flag('reward.classifier.dtype')}=float32"
            )
        return scores

    def encode_records(
        self, records: Sequence[Record], report: ReadReport, *, reference: "Policy | None" = None
    ) -> list[EncodedRecord]:
        """Records to score; what cannot be scored is reported. Of their tokens the responses' alone are for people.

        Args:
          records: pairs or demonstrations.
          report: counts also those whose texts the template does not write whole.
          reference: None, since no kind of a classifier compares.
        """
        assert reference is None, reference

        def write(record: Record, texts: Sequence[tuple[str, str]]) -> EncodedRecord:
            return self._write_record(record.source, record.prompt, texts)

        return self._with_ids(encode_each(records, report, write))

    def score_records(
        self,
        records: Sequence[EncodedRecord],
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
          kind: one that a scalar reward model can give.
          batch_size: responses scored at once.
          reference: None, since no kind of a classifier compares.
          max_new_tokens: None, since a classifier writes no corrections.
          show_progress: draw a bar.
        """
        assert reference is None and max_new_tokens is None, (reference, max_new_tokens)
        in_order = iter(self._read(records, [kind], batch_size, show_progress)[kind])
        return [
            # The template ends every turn.
            as_record(self, one, [next(in_order) for _ in one.responses], None, kind, ended=True)
            for one in records
        ]

    def _write_record(
        self, source: str, prompt: Sequence[Message], responses: Sequence[tuple[str, str]]
    ) -> EncodedRecord:
        """A record whose responses, ``(side, text)`` each, have no ids yet."""
        written = [self.write(prompt, text) for _, text in responses]
        none = np.zeros(0, np.int32)
        return EncodedRecord(source, prompt, none, [(side, text, none) for side, text in responses], written)

    def _with_ids(self, records: Sequence[EncodedRecord]) -> list[EncodedRecord]:
        """The records with the ids of their responses, for people."""
        responses = [Text((text,), "\n") for record in records for _, text, _ in record.responses]
        whole = [text for record in records for text in record.texts]
        every = templates.encode(self.tokenizer, responses)
        empty = [i for i, ids in enumerate(every) if not ids]
        for i, ids in zip(empty, templates.encode(self.tokenizer, [whole[i] for i in empty]), strict=True):
            every[i] = ids[-1:]  # what ends it
        in_order = (np.array(ids, np.int32) for ids in every)
        return [
            dataclasses.replace(one, responses=[(side, text, next(in_order)) for side, text, _ in one.responses])
            for one in records
        ]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response; responses have none here."""
        return ()

    @functools.cached_property
    def _step(self) -> Any:
        return build_text_step(self.model)


def _on_last(score: float, length: int) -> np.ndarray:
    """``[length]`` float32, 0 but for the last."""
    values = np.zeros(length, np.float32)
    values[-1] = score
    return values
