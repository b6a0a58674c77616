"""Prompts of the embedded tasks as chat messages, and as a field of a JSONL record."""

from collections.abc import Sequence
from typing import Any

from jaxrm.data.records import Message


class ForeignPromptError(Exception):
    """A prompt that does not belong to the task."""


def only_turn(prompt: Sequence[Message]) -> str:
    """The text of a prompt of one user turn.

    Raises:
      ForeignPromptError: the prompt has another form.
    """
    if len(prompt) != 1 or prompt[0].role != "user":
        raise ForeignPromptError
    return prompt[0].content


def prompt_field(prompt: Sequence[Message]) -> str | list[dict[str, str]]:
    """The field "prompt" of a record: the text of a single user turn, else all turns as messages."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return as_dicts(prompt)


def demonstration(prompt: Sequence[Message], response: str) -> dict[str, Any]:
    """A demonstration as a record of chat messages."""
    return {"messages": as_dicts([*prompt, Message("assistant", response)])}


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as records hold them."""
    return [{"role": message.role, "content": message.content} for message in messages]
