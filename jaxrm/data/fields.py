"""What stands in the fields of a row: texts, messages and transcripts. What does not fit is a `BadRecordError`."""

import re
from typing import Any

from jaxrm.data.message_keys import name_role, unread_in_message
from jaxrm.data.records import ROLES, Message

Fields = dict[str, Any]
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


class BadRecordError(ValueError):
    """A row that cannot be used. The message is the reason under which it is counted."""


def given(fields: Fields, name: str) -> bool:
    """Whether a field holds anything: not null or NaN, no empty list or object, and no blank text."""
    value = fields.get(name)
    is_nan = isinstance(value, float) and value != value
    return not (value is None or is_nan or value in ([], {}) or (isinstance(value, str) and not value.strip()))


def read_field(fields: Fields, name: str) -> Any:
    """A field that must be there."""
    if fields.get(name) is None:
        raise BadRecordError(f"missing field {name!r}")
    return fields[name]


def read_text(fields: Fields, name: str) -> str:
    """A field of text that is not blank."""
    return _checked(read_field(fields, name), name)


def read_choice(fields: Fields, name: str) -> int:
    """A field that is 0 or 1. Tables of text have it as text."""
    choice = read_field(fields, name)
    if isinstance(choice, str) and choice.strip() in ("0", "1"):
        return int(choice)
    if isinstance(choice, bool) or choice not in (0, 1):
        raise BadRecordError(f"{name!r} is not 0 or 1")
    return int(choice)


def read_flag(fields: Fields, name: str) -> bool:
    """A field that is true or false, or 1 or 0. Tables of text have it as text, in any case."""
    flag = read_field(fields, name)
    if isinstance(flag, str):
        flag = _FLAGS.get(flag.strip().lower())
    if not isinstance(flag, bool | int | float) or flag not in (0, 1):
        raise BadRecordError(f"{name!r} is not true or false, nor 1 or 0; rename the field if it means something else")
    return bool(flag)


def read_messages(fields: Fields, name: str) -> tuple[Message, ...]:
    """A list of messages, whose content is text or, as in chat services, a list of text parts."""
    items = read_field(fields, name)
    if not isinstance(items, list) or not items or not all(isinstance(message, dict) for message in items):
        raise BadRecordError(f"{name!r} is not a list of messages")
    messages = []
    for message in items:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRecordError(f"{name!r} has a role other than {', '.join(ROLES)}{name_role(role)}")
        if reason := unread_in_message(message, name):
            raise BadRecordError(reason)
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if _is_text_part(part))
        if role == "system" and isinstance(content, str) and not content.strip():
            continue
        messages.append(Message(role, _checked(content, name)))
    if not messages:
        raise BadRecordError(f"{name!r} is empty")
    return tuple(messages)


def is_transcript(text: object) -> bool:
    r"""Whether a text is a dialogue in the form of HH-RLHF, "\n\nHuman: … \n\nAssistant: …"."""
    return isinstance(text, str) and re.match(r"\s*Human:", text) is not None


def read_transcript(text: str) -> tuple[Message, ...]:
    r"""The turns of a transcript. White space around a turn is not part of it.

    Source: Bai et al. 2022, arXiv 2204.05862, the data as published.
    """
    before, *turns = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    if before.strip() or not turns:
        raise BadRecordError("a transcript does not begin with a turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[name], content.strip()) for name, content in zip(turns[::2], turns[1::2], strict=True))


def texts(value: object) -> list[str]:
    """Every text in a value, however deep. Of a message it is the content alone, of a transcript its turns."""
    if is_transcript(value):
        return [message.content for message in read_transcript(str(value))]
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for part in value for text in texts(part)]
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        return texts(value["content"])
    if isinstance(value, dict):
        return [text for name, part in value.items() if name not in ("role", "type") for text in texts(part)]
    return []


def squeeze(text: str) -> str:
    """The text with every run of white space as one space, for comparisons."""
    return " ".join(text.split())


def _checked(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise BadRecordError(f"{name!r} is not text")
    if not text.strip():
        raise BadRecordError(f"{name!r} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise BadRecordError(f"{name!r} is not valid Unicode") from error
    return text


def _is_text_part(part: object) -> bool:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return True
    raise BadRecordError("a message has content other than text")
