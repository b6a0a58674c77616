"""Examples in tokens, which losses are taken on, and how demonstrations become examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

import numpy as np

from jaxrm.data.config import DataConfig
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import DemonstrationRecord, Message
from jaxrm.data.templates import Piece, bos_id, cut_dialogue, encode_texts
from jaxrm.errors import UserError, flag, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]
Run = tuple[list[int], bool]  # consecutive token ids, and whether they are an assistant turn
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
      The examples, each of at most ``max_length`` tokens, and the report. Bad are responses that did not fit and
      dialogues that the template refused. Prompts that were cut on the left are counted.

    Raises:
      UserError: there is no such template; a response does not fit and ``too_long`` is "error"; more bad records than
        ``max_bad_share``, or nothing left.
    """
    # A template that cannot work at all is one error, not as many bad records as there are.
    cut_dialogue(tokenizer, [Message("user", "x"), Message("assistant", "x")], config.template)
    first_id = bos_id(tokenizer, config.template)
    report = ReadReport(total=len(records))
    examples: list[Example] = []
    for start in range(0, len(records), _CHUNK):
        accepted: list[DemonstrationRecord] = []
        dialogues: list[list[Piece]] = []
        for record in records[start : start + _CHUNK]:
            try:
                dialogues.append(cut_dialogue(tokenizer, record.messages, config.template))
                accepted.append(record)
            except UserError as error:
                report.add_bad(str(error), record.source)
        for record, runs in zip(accepted, encode_dialogues(tokenizer, dialogues), strict=True):
            response, length = len(runs[-1][0]), sum(len(ids) for ids, _ in runs)
            if response < config.max_length:  # something must stand before the first target
                examples.append(_build_example(runs, record.source, first_id, config))
                report.cut_prompts += length > config.max_length
            elif config.too_long == "error":
                raise UserError(
                    f"{record.source}: the response has {response} tokens, but a row has {config.max_length}; "
                    f"e.g. {flag('data.max_length')}={response + 1}, or {flag('data.too_long')}=drop"
                )
            else:
                report.add_bad(f"response longer than {option('data.max_length')} {config.max_length}", record.source)
        if progress:
            progress(min(start + _CHUNK, len(records)), len(records))
    report.used = len(examples)
    report.check(config.max_bad_share, config.path)
    return examples, report


def encode_dialogues(tokenizer: "PreTrainedTokenizerBase", dialogues: Sequence[Sequence[Piece]]) -> list[list[Run]]:
    """Token ids of dialogues in pieces, encoded in one call of the tokenizer.

    Returns:
      For each dialogue its runs: consecutive pieces that are all targets, or all not, make one run of ids.
    """
    pieces = [piece for dialogue in dialogues for piece in dialogue]
    continues = [i > 0 for dialogue in dialogues for i in range(len(dialogue))]
    encoded = iter(encode_texts(tokenizer, [piece.text for piece in pieces], continues))
    return [
        [
            ([token for _ in group for token in next(encoded)], is_target)
            for is_target, group in groupby(piece.is_target for piece in dialogue)
        ]
        for dialogue in dialogues
    ]


def _build_example(runs: list[Run], source: str, first_id: int | None, config: DataConfig) -> Example:
    """Join the runs and cut the excess on the left, except BOS. A turn that loses tokens is not a target."""
    tokens = np.array([token for ids, _ in runs for token in ids], np.int32)
    excess = max(len(tokens) - config.max_length, 0)
    has_bos = first_id is not None and tokens[0] == first_id
    cut = excess + has_bos if excess else 0
    loss_mask = np.zeros(len(tokens), bool)
    start = 0
    for i, (ids, is_target) in enumerate(runs):
        is_trained = is_target and (config.train_on == "all" or i == len(runs) - 1)
        loss_mask[start : start + len(ids)] = is_trained and start >= max(cut, 1)
        start += len(ids)
    remaining = np.r_[0:1, cut : len(tokens)] if excess and has_bos else np.arange(cut, len(tokens))
    return Example(tokens[remaining], loss_mask[remaining], source)
