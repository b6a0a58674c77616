"""Examples in tokens, which losses are taken on, and how demonstrations become examples."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from jaxrm.data.config import DataConfig
from jaxrm.data.cutting import cut_points, find_cut
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import DemonstrationRecord, PreferenceRecord
from jaxrm.data.templates import SPELLED_OUT, Text, bos_id, check_template, encode, write_prompt, write_response
from jaxrm.errors import UserError, flag, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
AnyRecord = TypeVar("AnyRecord", DemonstrationRecord, PreferenceRecord)
_CHUNK = 512  # dialogues handed to the tokenizer at once


class TokenExample(Protocol):
    """One example of a row: tokens in one or more segments, and the columns that its loss needs."""

    @property
    def tokens(self) -> np.ndarray:
        """Int32 ``[n]``."""
        ...

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """Tokens in each segment, ``n`` in all. A token attends only within its segment."""
        ...

    def columns(self) -> dict[str, np.ndarray]:
        """Further arrays ``[n]`` by their name in a batch. Every example has the same names and types."""
        ...


@dataclass(frozen=True)
class Example:
    """Token ids and which of them are targets.

    Attributes:
      tokens: int32 ``[n]``.
      loss_mask: bool ``[n]``, True where the token itself is a target: a token of a response, or one that ends its
        turn. Never the first token, which nothing predicts.
      source: the place of the record.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    source: str

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """One segment."""
        return (len(self.tokens),)

    def columns(self) -> dict[str, np.ndarray]:
        """``loss_mask``."""
        return {"loss_mask": self.loss_mask}


@dataclass(frozen=True)
class MappingExample(Example):
    """Prompt, source response, request, target response. The loss is on the target response and its end token.

    Attributes:
      is_correction: True where the source is the rejected response, False where it is the chosen one. The target is
        always the chosen one.
    """

    is_correction: bool

    def columns(self) -> dict[str, np.ndarray]:
        """``loss_mask``, and ``is_correction``: True on the targets of a correction mapping."""
        return {"loss_mask": self.loss_mask, "is_correction": self.loss_mask & self.is_correction}


@dataclass(frozen=True)
class MarkedMappingExample(MappingExample):
    """The same, for losses in which edits weigh otherwise than what is copied.

    Attributes:
      is_edit: bool ``[n]``, True on the targets of a correction mapping that are not in a longest common subsequence
        with the source (`jaxrm.data.edits`).
    """

    is_edit: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """Those of a mapping, and ``is_edit``."""
        return {**super().columns(), "is_edit": self.is_edit}


@dataclass(frozen=True)
class ComparisonExample:
    """Both sides of a pair, in two segments: prompt and chosen response, prompt and rejected response.

    Attributes:
      tokens: int32 ``[n]``.
      chosen_length: tokens in the first segment.
      source: the place of the record.
    """

    tokens: np.ndarray
    chosen_length: int
    source: str

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """The chosen side, the rejected side."""
        return (self.chosen_length, len(self.tokens) - self.chosen_length)

    def columns(self) -> dict[str, np.ndarray]:
        """``is_chosen_end`` (bool) and ``rejected_offset`` (int32).

        ``is_chosen_end`` is True at the last token of the chosen side. ``rejected_offset`` is, at that token, the
        distance in tokens to the last one of the rejected side, and 0 elsewhere.
        """
        is_chosen_end = np.zeros(len(self.tokens), bool)
        is_chosen_end[self.chosen_length - 1] = True
        offset = len(self.tokens) - self.chosen_length
        return {"is_chosen_end": is_chosen_end, "rejected_offset": np.where(is_chosen_end, offset, 0).astype(np.int32)}


@dataclass(frozen=True)
class MarkedComparisonExample(ComparisonExample):
    """The same, for losses that also look at the tokens of the responses.

    Attributes:
      response_lengths: tokens of the chosen and of the rejected response, the last ones of the segments.
    """

    response_lengths: tuple[int, int]

    def columns(self) -> dict[str, np.ndarray]:
        """Those of a comparison, and ``loss_mask`` (bool), True on response tokens."""
        chosen, rejected = self.response_lengths
        index, end = np.arange(len(self.tokens)), self.chosen_length
        is_response = ((index >= end - chosen) & (index < end)) | (index >= len(index) - rejected)
        return {**super().columns(), "loss_mask": is_response}


def write_all(
    records: Iterable[AnyRecord], write: Callable[[AnyRecord], list[Text]], report: ReadReport
) -> tuple[list[AnyRecord], list[Text]]:
    """The texts of records by a chat template, one record after another.

    Args:
      records: to write.
      write: the texts of one; a `UserError` says why it is unusable.
      report: counts those, and records whose special tokens stay text.

    Returns:
      The records that were written, and all of their texts.
    """
    accepted: list[AnyRecord] = []
    texts: list[Text] = []
    for record in records:
        try:
            written = write(record)
        except UserError as error:
            report.add_bad(str(error), record.source)
            continue
        texts += written
        accepted.append(record)
        if any(text.is_broken for text in written):
            report.add_note(SPELLED_OUT, record.source)
    return accepted, texts


def tokenize_demonstrations(
    records: Sequence[DemonstrationRecord],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    progress: Progress | None = None,
) -> tuple[list[Example], ReadReport]:
    """Tokenize dialogues, with the loss on the last response or on all (``config.train_on``).

    Args:
      records: dialogues that end with a response.
      tokenizer: as ``load_tokenizer`` returns it.
      config: ``template``, ``max_length``, ``train_on``, ``too_long``, ``max_bad_share``.
      progress: called with the number of records done and their total.

    Returns:
      The examples, each of at most ``max_length`` tokens, and the report. With ``train_on`` "all", an earlier turn has
      an example of its own where the whole dialogue does not begin with its prompt and itself. Bad are responses that
      did not fit and dialogues that the template refused. Prompts that were cut are counted.

    Raises:
      UserError: there is no such template; a response does not fit and ``too_long`` is "error"; more bad records than
        ``max_bad_share``, or nothing left.
    """
    # A template that cannot work at all is one error, not as many bad records as there are.
    check_template(tokenizer, config.template)
    report = ReadReport(total=len(records))
    examples: list[Example] = []
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        accepted, texts = write_all(chunk, lambda record: _write_turns(record, tokenizer, config), report)
        encoded = iter(encode(tokenizer, texts))
        for record in accepted:
            turns = [_Turn(i, next(encoded), next(encoded)) for i in _trained(record, config)]
            response = len(turns[0].response)
            if response < config.max_length:  # something must stand before the first target
                examples += _build_examples(record, turns, tokenizer, config, report)
                report.used += 1
            elif config.too_long == "error":
                raise UserError(
                    f"{record.source}: the response has {response} tokens, but a row has {config.max_length}; "
                    f"e.g. {flag('data.max_length')}={response + 1}, or {flag('data.too_long')}=drop"
                )
            else:
                reason = f"response longer than {option('data.max_length')} {config.max_length}"
                report.add_bad(reason, record.source, length=response + 1)
        if progress:
            progress(min(start + _CHUNK, len(records)), len(records))
    report.check(config.max_bad_share, config.path)
    return examples, report


@dataclass(frozen=True)
class _Turn:
    """A turn of the assistant to train on.

    Attributes:
      number: of its message.
      prompt: ids that generation has before it.
      response: its ids.
    """

    number: int
    prompt: list[int]
    response: list[int]


def _trained(record: DemonstrationRecord, config: DataConfig) -> list[int]:
    """The messages to train on, the last one first. One without a prompt has nothing to be predicted from."""
    last = len(record.messages) - 1
    numbers = range(last, 0, -1) if config.train_on == "all" else [last]
    return [i for i in numbers if record.messages[i].role == "assistant"]


def _write_turns(record: DemonstrationRecord, tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> list[Text]:
    """Prompt and response of every turn to train on."""
    template = config.template
    return list(
        chain.from_iterable(
            (
                write_prompt(tokenizer, record.messages[:i], template),
                write_response(tokenizer, record.messages[i].content, template),
            )
            for i in _trained(record, config)
        )
    )


def _build_examples(
    record: DemonstrationRecord,
    turns: Sequence[_Turn],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    report: ReadReport,
) -> list[Example]:
    """Rows of a dialogue, in which every target stands behind exactly the ids that generation has before it.

    Most templates write a dialogue so that it begins with each of its turns and their prompts: then it is one row.
    """
    rows: list[tuple[_Turn, np.ndarray, np.ndarray]] = []  # the last turn of each, its ids and its targets
    for turn in turns:
        ids = np.array(turn.prompt + turn.response, np.int32)
        row = next((row for row in rows if np.array_equal(row[1][: len(ids)], ids)), None)
        if row is None:
            row = (turn, ids, np.zeros(len(ids), bool))
            rows.append(row)
        row[2][len(turn.prompt) : len(ids)] = True
    examples = []
    for turn, ids, loss_mask in rows:
        room = config.max_length - len(turn.response)
        if room < 1:  # an earlier turn; the last one was looked at before
            continue
        prompt, points = ids[: len(turn.prompt)], None
        if len(prompt) > room:
            (points,) = cut_points(tokenizer, config.template, [(record.messages[: turn.number], prompt)])
        cut = find_cut(prompt, room, bos_id(tokenizer, config.template), points)
        if turn is turns[0]:
            report.cut_prompts += cut.start > 0
            report.cut_heads += not cut.keeps_head
        tokens = np.concatenate([cut.head, ids[cut.start :]])
        targets = np.concatenate([np.zeros(len(cut.head), bool), _whole_targets(loss_mask, cut.start)])
        examples.append(Example(tokens, targets, record.source))
    return examples


def _whole_targets(loss_mask: np.ndarray, start: int) -> np.ndarray:
    """The mask from ``start`` on. A turn that loses tokens is no target."""
    remaining = loss_mask[start:].copy()
    if start and loss_mask[start - 1]:
        remaining[: np.argmin(remaining)] = False  # the last turn is never cut, so a prompt follows
    return remaining
