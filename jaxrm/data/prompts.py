"""Prompts for a policy: from records to tokens, and batches padded on the left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxrm.data.packing import Row
from jaxrm.data.readers import ReadReport
from jaxrm.data.records import Message, Record
from jaxrm.data.templates import check_template, encode_prompt
from jaxrm.errors import UserError, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "record"  # column of a batch of prompts
_CHUNK = 256  # records between two reports of progress


@dataclass(frozen=True)
class PromptExample:
    """A prompt as tokens.

    Attributes:
      tokens: int32 ``[n]``, the header that opens the response included.
      messages: the same as text.
      source: the place of the record.
      fields: the columns of the record's row by name, e.g. a reference answer, where they were read.
      number: of the record among all of a stage, where its fields are read; it travels with the tokens.
    """

    tokens: np.ndarray
    messages: tuple[Message, ...]
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    number: int | None = None

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """One segment."""
        return (len(self.tokens),)

    def columns(self) -> dict[str, np.ndarray]:
        """The number on every token, if there is one."""
        return {} if self.number is None else {RECORD: np.full(len(self.tokens), self.number, np.int32)}


def tokenize_prompts(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    max_prompt_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    max_new_tokens: int = 0,
) -> tuple[list[PromptExample], ReadReport]:
    """Tokenize the prompts of records of any kind.

    A prompt is never cut, since the policy has to learn from the whole of it. One that does not fit is dropped.

    Args:
      records: pairs, demonstrations or prompts.
      tokenizer: as ``load_tokenizer`` returns it.
      template: chat template.
      max_prompt_tokens: most tokens of a prompt.
      progress: called with the number of records done and their total.
      max_new_tokens: of the response, which the length that a report proposes has room for.

    Returns:
      The prompts, and the report. Bad are prompts that did not fit (``too_long_reason``), and those that the template
      refused.

    Raises:
      UserError: a template that cannot work at all.
    """
    # One error, not as many bad records as there are.
    check_template(tokenizer, template)
    report = ReadReport(total=len(records))
    examples: list[PromptExample] = []
    for number, record in enumerate(records, 1):
        try:
            ids = encode_prompt(tokenizer, record.prompt, template)
        except UserError as error:
            report.add_bad(str(error), record.source)
            continue
        if len(ids) > max_prompt_tokens:
            report.add_bad(too_long_reason(max_prompt_tokens), record.source, length=len(ids) + max_new_tokens)
            continue
        examples.append(PromptExample(np.array(ids, np.int32), tuple(record.prompt), record.source, record.fields))
        if progress and (number % _CHUNK == 0 or number == len(records)):
            progress(number, len(records))
    report.used = len(examples)
    return examples, report


def too_long_reason(max_prompt_tokens: int) -> str:
    """The reason under which a prompt of more than ``max_prompt_tokens`` tokens is counted."""
    limit = option("data.max_length")
    return f"prompt longer than the {max_prompt_tokens} tokens that {limit} leaves beside a response"


def left_padded(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """A batch of prompts with its padding moved to the left: tokens int32 ``[B, P]`` and mask bool ``[B, P]``."""
    mask = row["segment_ids"] > 0
    # A stable sort of the mask, False first, moves tokens to the right in their order.
    order = np.argsort(mask, axis=1, kind="stable")
    return np.take_along_axis(row["tokens"], order, axis=1), np.take_along_axis(mask, order, axis=1)


def transcript(prompt: Sequence[Message]) -> str:
    """A prompt as one text to show. Of several turns, each is on a line after its role."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)
