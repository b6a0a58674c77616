"""A sequence classifier of one label as a reward model: text in, a number out, by its own tokenizer and chat template.

A dialogue and its response are written by ``apply_chat_template`` as the classifier's makers do it, and the score is
read where transformers reads it. So policy and classifier need no vocabulary in common. A special token that is spelled
out in a message stays text (`jaxrm.data.templates`), so that a policy cannot end its turn by spelling it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm.data import templates
from jaxrm.data.records import Message
from jaxrm.data.templates import Text
from jaxrm.errors import UserError, arguments, flag, option
from jaxrm.inference import sharded_model
from jaxrm.inference.prompts import Prompt, check_count, read_prompts, read_responses
from jaxrm.inference.response_batches import bucket
from jaxrm.inference.reward_model import default_kind
from jaxrm.inference.scores import Scores
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.inference.text_scorer import TextSample
from jaxrm.inference.token_scores import EncodedRecord, TokenScores, as_record, without_length
from jaxrm.models import hub
from jaxrm.ops.reward_kinds import find_kind, names_for
from jaxrm.runtime.progress import Progress
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TextCounts:
    """How many texts a classifier has scored.

    Attributes:
      scored: in all.
      cut: of them, those that were too long and lost a part.
      cut_share: of those that were scored last, together.
    """

    scored: int = 0
    cut: int = 0
    cut_share: float = 0.0


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
        """Scores ``[B]`` of responses, float32.

        Raises:
          UserError: the template refuses a dialogue, or a score is no finite number.
        """
        return self.score_texts([self.write(sample.prompt, str(sample.response)) for sample in samples])

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
        messages = read_prompts(prompts)
        records = []
        for i, (prompt, response) in enumerate(zip(messages, read_responses(responses, len(messages)), strict=True)):
            try:
                records.append(self.encode_record(f"responses[{i}]", prompt, [("response", response)]))
            except UserError as error:
                raise UserError(f"prompts[{i}]: {error}") from error
        return Scores(self.score_records(records, kind, batch_size=batch_size, show_progress=False), self.name)

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

    def encode(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """Token ids that the classifier reads of each text, up to the one that its score is read at.

        Ids are those of ``apply_chat_template(dialogue, truncation=True, max_length=max_length)``.
        """
        return [self._readable(ids) for ids in templates.encode(self.tokenizer, texts)]

    def _readable(self, ids: Sequence[int]) -> np.ndarray:
        """Ids ``[W]`` of a dialogue, cut where there are too many, up to the one that the score is read at."""
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
        self._count_cut(sum(len(ids) > self.max_length for ids in whole), len(whole))
        scores, done = np.zeros(len(texts), np.float32), 0
        with Progress("score", len(texts), unit="responses", enabled=show_progress) as progress:
            for tokens, last, indices in self._batches(encoded, rows or self.rows):
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

    def score_records(
        self, records: Sequence[EncodedRecord], kind: str, *, batch_size: int, show_progress: bool = True
    ) -> list[dict[str, Any]]:
        """Records of `encode_record` as `jaxrm.inference.token_scores.as_record` makes them, with their scores.

        Args:
          records: to be scored.
          kind: one that a scalar reward model can give.
          batch_size: responses scored at once.
          show_progress: draw a bar.
        """
        texts = [self.write(record.prompt, text) for record in records for _, text, _ in record.responses]
        scores = self.score_texts(texts, rows=batch_size, show_progress=show_progress)
        every = [ids for record in records for _, _, ids in record.responses]
        scored = [TokenScores(_on_last(score, len(ids)), None) for score, ids in zip(scores, every, strict=True)]
        if find_kind(kind).removes_length and scored:
            scored = without_length(scored, find_kind(kind))
        in_order = iter(scored)
        rows = [as_record(self, one, [next(in_order) for _ in one.responses], None, kind) for one in records]
        for row in rows:
            for response in row["responses"]:
                response["ended"] = True  # the template ends every turn
        return rows

    def encode_record(self, source: str, prompt: Sequence[Message], texts: Sequence[tuple[str, str]]) -> EncodedRecord:
        """A record to score; of its tokens the responses' alone are for people, in the classifier's ids.

        Args:
          source: where it was read.
          prompt: messages.
          texts: ``(side, text)`` of each response.

        Raises:
          UserError: the template refuses it.
        """
        responses = []
        for side, text in texts:
            whole = self.write(prompt, text)
            ids = templates.encode(self.tokenizer, [Text((text,), "\n")])[0] if text else []
            ids = ids or templates.encode(self.tokenizer, [whole])[0][-1:]  # of an empty response, what ends it
            responses.append((side, text, np.array(ids, np.int32)))
        return EncodedRecord(source, prompt, np.zeros(0, np.int32), responses)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a response; responses have none here."""
        return ()

    @functools.cached_property
    def _step(self) -> Any:
        """Jitted ``(params, tokens [B, W], last [B]) -> [B]``, the score at the token ``last`` of each row."""
        mesh, graphdef = self.model.mesh, self.model.graphdef
        rows, copied = partition.batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

        def step(params: Any, tokens: jax.Array, last: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
            segments = (positions <= last[:, None]).astype(jnp.int32)
            scores = nnx.merge(graphdef, params)(tokens, positions=positions, segment_ids=segments)
            return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]

        return jax.jit(step, in_shardings=(self.model.shardings, rows, rows), out_shardings=copied)

    def _batches(self, texts: Sequence[np.ndarray], rows: int) -> Iterator[tuple[jax.Array, jax.Array, list[int]]]:
        """Rows of about one length, padded to few widths: tokens, the index of each row's last one, and whose they are.

        Every process has all of it and gives its devices their part. Rows left over are one token of padding.
        """
        mesh = self.model.mesh
        shards, multiple = batch_shards(mesh), sharded_model.pad_to_multiple_of(mesh)
        height = -(-rows // shards) * shards
        sharding = partition.batch_sharding(mesh)
        order = sorted(range(len(texts)), key=lambda i: (bucket(len(texts[i])), i))
        for start in range(0, len(order), height):
            indices = order[start : start + height]
            width = -(-bucket(max(len(texts[i]) for i in indices)) // multiple) * multiple
            tokens, last = np.zeros((height, width), np.int32), np.zeros(height, np.int32)
            for row, i in enumerate(indices):
                tokens[row, : len(texts[i])], last[row] = texts[i], len(texts[i]) - 1
            placed = [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in (tokens, last)]
            yield placed[0], placed[1], indices

    def _count_cut(self, num_cut: int, total: int) -> None:
        """Count texts that were cut, and warn of the first."""
        is_first = num_cut > 0 and not self.counts.cut
        self.counts.cut += num_cut
        self.counts.scored += total
        self.counts.cut_share = num_cut / max(total, 1)
        if is_first and jax.process_index() == 0:
            side = "the beginning" if self.tokenizer.truncation_side == "left" else "the end"
            print(
                f"warning: texts of more than {self.max_length} tokens lose {side} before {self.name} reads them, as "
                "its tokenizer truncates"
            )


def _on_last(score: float, length: int) -> np.ndarray:
    """``[length]`` float32, 0 but for the last."""
    values = np.zeros(length, np.float32)
    values[-1] = score
    return values
