"""Prompts and responses as a person gives them in Python: texts, or lists of messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrm.data.records import ROLES, Message
from jaxrm.errors import UserError, flag, option

Prompt = str | Sequence[Message | Mapping[str, str]]


def read_prompts(prompts: Sequence[Prompt]) -> list[tuple[Message, ...]]:
    """Prompts as messages; a text is one message of the user.

    Raises:
      UserError: naming the prompt that is none.
    """
    return [_read_prompt(f"prompts[{i}]", prompt) for i, prompt in enumerate(_list("prompts", prompts))]


def read_responses(responses: Sequence[str], num_prompts: int) -> list[str]:
    """Responses, one to each prompt.

    Raises:
      UserError: where one is no text, or there are not as many as prompts.
    """
    texts = _list("responses", responses)
    if len(texts) != num_prompts:
        raise UserError(
            f"there are {num_prompts} prompts and {len(texts)} responses; give each prompt one response, in the same "
            "order"
        )
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"responses[{i}] is {_shown(text)}; it must be a text, e.g. 'wash it by hand'")
    return texts


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number of at least ``least``; ``name`` is the argument.

    Raises:
      UserError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(
            f"{option(name)} is {value!r}; it must be a whole number of at least {least}, e.g. {flag(name)}={least}"
        )


def _list(name: str, given: Any) -> list[Any]:
    if isinstance(given, str | bytes | Mapping) or not hasattr(given, "__iter__"):
        example = "['how do i wash the lamp ?']" if name == "prompts" else "['by hand']"
        raise UserError(f"{name} is {_shown(given)}; it must be a list, e.g. {example}")
    return list(given)


def _read_prompt(name: str, prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{name} is {prompt!r}; it must have some text, e.g. 'how do i wash the lamp ?'")
        return (Message("user", prompt),)
    if not isinstance(prompt, Sequence) or not prompt:
        raise UserError(
            f"{name} is {_shown(prompt)}; it must be a text, or a list of messages, "
            "e.g. [{'role': 'user', 'content': 'how do i wash the lamp ?'}]"
        )
    return tuple(_read_message(f"{name}[{i}]", message) for i, message in enumerate(prompt))


def _read_message(name: str, message: Any) -> Message:
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            raise UserError(
                f"{name} has the fields {', '.join(map(str, message)) or 'none'}; it must have role and content, "
                "e.g. {'role': 'user', 'content': 'how do i wash the lamp ?'}"
            )
        message = Message(message["role"], message["content"])
    if not isinstance(message, Message) or not isinstance(message.content, str):
        raise UserError(
            f"{name} is {_shown(message)}; it must be a message, "
            "e.g. {'role': 'user', 'content': 'how do i wash the lamp ?'}"
        )
    if message.role not in ROLES:
        raise UserError(f"{name} has the role {message.role!r}; use one of {', '.join(ROLES)}")
    return message


def _shown(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."
