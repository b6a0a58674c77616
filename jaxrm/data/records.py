"""The three kinds of record. Every data set is read into them, and tokenizers take nothing else.

A record may have ``fields``, all columns of its row by name, for rewards that look at e.g. a reference answer. They say
nothing of what the record is: records that differ in them alone are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrm.errors import UserError, flag

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue.

    Attributes:
      role: one of ``ROLES``.
      content: the text.
    """

    role: str
    content: str


@dataclass(frozen=True)
class PreferenceRecord:
    """A prompt x with a chosen response y⁺ and a rejected response y⁻.

    Attributes:
      prompt: the turns before the response.
      chosen: y⁺.
      rejected: y⁻.
      source: the place of the record, ``file:line``.
      fields: all columns of its row, where they were asked for.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class DemonstrationRecord:
    """A dialogue that ends with the assistant's response."""

    messages: tuple[Message, ...]
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last response."""
        return self.messages[:-1]

    @property
    def response(self) -> str:
        """The last assistant turn."""
        return self.messages[-1].content


@dataclass(frozen=True)
class PromptRecord:
    """A prompt without a response."""

    prompt: tuple[Message, ...]
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)


Record = PreferenceRecord | DemonstrationRecord | PromptRecord


def as_demonstration(record: Record) -> DemonstrationRecord:
    """The record as a dialogue to imitate. Of a preference it is the chosen response.

    Raises:
      UserError: the record is a prompt without a response.
    """
    if isinstance(record, DemonstrationRecord):
        return record
    if isinstance(record, PreferenceRecord):
        return DemonstrationRecord((*record.prompt, Message("assistant", record.chosen)), record.source)
    raise UserError(
        f"{record.source}: a prompt without a response, but training imitates responses; give records with e.g. "
        f"prompt and response, or name the schema, e.g. {flag('data.schema')}=messages"
    )
