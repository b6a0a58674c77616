"""The schemas of data sets, each a small function from a row's fields to a record.

A row that does not fit raises ``BadRecordError`` with a short reason. No content of a row raises anything else.
"""

import re
from collections.abc import Callable
from typing import Any

from jaxrm.data.records import ROLES, DemonstrationRecord, Message, PreferenceRecord, PromptRecord, Record

Fields = dict[str, Any]


class BadRecordError(ValueError):
    """A row that cannot be used. The message is the reason under which it is counted."""


def recognize(fields: Fields) -> str | None:
    """The name of the schema that has these fields, or None."""
    for name, (required, _) in SCHEMAS.items():
        if any(all(field in fields for field in group) for group in required):
            if name in ("preference", "hh") and isinstance(fields["chosen"], list):
                return "ultrafeedback"
            return name
    return None


def parse(schema: str, fields: object, source: str, preferred: str) -> Record:
    """Read one row.

    Args:
      schema: a key of ``SCHEMAS``.
      fields: the row, whatever it is.
      source: its place, for the record.
      preferred: the field of PKU-SafeRLHF that decides the chosen response.

    Raises:
      BadRecordError: the row does not fit.
    """
    if not isinstance(fields, dict):
        raise BadRecordError("not an object with fields")
    if schema == "pku_safe_rlhf":
        return parse_pku_safe_rlhf(fields, source, preferred)
    return SCHEMAS[schema][1](fields, source)


def parse_preference(fields: Fields, source: str) -> Record:
    """``prompt`` (text or messages), ``chosen``, ``rejected`` (text, or messages that may repeat the prompt)."""
    if isinstance(fields.get("chosen"), list) or isinstance(fields.get("rejected"), list):
        return parse_ultrafeedback(fields, source)
    return PreferenceRecord(_prompt(fields), _text(fields, "chosen"), _text(fields, "rejected"), source)


def parse_ultrafeedback(fields: Fields, source: str) -> Record:
    """``chosen`` and ``rejected`` as messages that differ in the last one, with an optional ``prompt`` before them."""
    chosen, rejected = _messages(fields, "chosen"), _messages(fields, "rejected")
    for dialogue in (chosen, rejected):
        if dialogue[-1].role != "assistant":
            raise BadRecordError("a dialogue does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise BadRecordError("the dialogues differ before the last turn")
    prompt = chosen[:-1] or _prompt(fields)
    return PreferenceRecord(prompt, chosen[-1].content, rejected[-1].content, source)


def parse_demonstration(fields: Fields, source: str) -> Record:
    """``prompt`` with ``response`` or ``completion``, or ``instruction`` (and ``input``) with ``output``."""
    if "instruction" in fields:
        question = _text(fields, "instruction")
        if fields.get("input"):
            question += "\n\n" + _text(fields, "input")
        return DemonstrationRecord((Message("user", question), Message("assistant", _text(fields, "output"))), source)
    name = "response" if "response" in fields else "completion"
    if isinstance(fields.get(name), list):
        answer = _messages(fields, name)
        return _demonstration((*_prompt(fields), *answer), source)
    return DemonstrationRecord((*_prompt(fields), Message("assistant", _text(fields, name))), source)


def parse_messages(fields: Fields, source: str) -> Record:
    """``messages``, a list of ``role`` and ``content`` that ends with the assistant."""
    return _demonstration(_messages(fields, "messages"), source)


def parse_prompt(fields: Fields, source: str) -> Record:
    """``prompt`` alone, text or messages."""
    return PromptRecord(_prompt(fields), source)


def parse_hh(fields: Fields, source: str) -> Record:
    r"""``chosen`` and ``rejected`` as transcripts "\n\nHuman: … \n\nAssistant: …"; the prompt is what they share.

    Source: Bai et al. 2022, arXiv 2204.05862, the data as published.
    """
    chosen, rejected = (_transcript(_text(fields, name)) for name in ("chosen", "rejected"))
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRecordError("a transcript does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise BadRecordError("the transcripts differ before the last turn")
    if not all(message.content for message in (*chosen, rejected[-1])):
        raise BadRecordError("a turn of the transcript is empty")
    if len(chosen) < 2:
        raise BadRecordError("the transcript has no prompt")
    return PreferenceRecord(chosen[:-1], chosen[-1].content, rejected[-1].content, source)


def parse_pku_safe_rlhf(fields: Fields, source: str, preferred: str = "better_response_id") -> Record:
    """``prompt``, ``response_0``, ``response_1`` and which is preferred (Dai et al. 2023, arXiv 2310.12773)."""
    responses = [_text(fields, "response_0"), _text(fields, "response_1")]
    better = _choice(fields, preferred)
    return PreferenceRecord(_prompt(fields), responses[better], responses[1 - better], source)


def parse_tldr(fields: Fields, source: str) -> Record:
    """``info``, ``summaries`` and ``choice`` of openai/summarize_from_feedback.

    The prompt is written as in the appendix of Stiennon et al. 2020, arXiv 2009.01325: subreddit, title, post, and
    "TL;DR:" for the summary to follow.
    """
    info = _field(fields, "info")
    summaries = _field(fields, "summaries")
    if not isinstance(info, dict) or not (isinstance(summaries, list) and len(summaries) == 2):
        raise BadRecordError("'info' is not an object or 'summaries' are not two")
    if not all(isinstance(summary, dict) for summary in summaries):
        raise BadRecordError("'summaries' are not objects")
    better = _choice(fields, "choice")
    texts = [_text(summary, "text") for summary in summaries]
    if info.get("post"):
        head = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
        parts = [label + _text(info, name).strip() for label, name in head if info.get(name)]
    else:
        parts = ["ARTICLE: " + _text(info, "article").strip()]
    prompt = "\n\n".join([*parts, "TL;DR:"])
    return PreferenceRecord((Message("user", prompt),), texts[better], texts[1 - better], source)


# In the order in which they are recognized: name -> (groups of fields, one of which must be there; function).
SCHEMAS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[Fields, str], Record]]] = {
    "tldr": ((("info", "summaries", "choice"),), parse_tldr),
    "pku_safe_rlhf": ((("prompt", "response_0", "response_1"),), parse_pku_safe_rlhf),
    "preference": ((("prompt", "chosen", "rejected"),), parse_preference),
    "hh": ((("chosen", "rejected"),), parse_hh),
    "ultrafeedback": ((("chosen", "rejected"),), parse_ultrafeedback),
    "messages": ((("messages",),), parse_messages),
    "demonstration": (
        (("prompt", "response"), ("prompt", "completion"), ("instruction", "output")),
        parse_demonstration,
    ),
    "prompt": ((("prompt",),), parse_prompt),
}


def describe_schemas() -> str:
    """The supported schemas and their fields, for an error message."""
    return "; ".join(
        f"{name} ({' or '.join(', '.join(group) for group in groups)})" for name, (groups, _) in SCHEMAS.items()
    )


def _field(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise BadRecordError(f"missing field {name!r}")
    return fields[name]


def _text(fields: Fields, name: str) -> str:
    return _checked(_field(fields, name), name)


def _checked(text: object, name: str) -> str:
    if not isinstance(text, str):
        raise BadRecordError(f"{name!r} is not text")
    if not text.strip():
        raise BadRecordError(f"{name!r} is empty")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise BadRecordError(f"{name!r} is not valid Unicode")
    return text


def _choice(fields: Fields, name: str) -> int:
    choice = _field(fields, name)
    if isinstance(choice, bool) or choice not in (0, 1):
        raise BadRecordError(f"{name!r} is not 0 or 1")
    return int(choice)


def _prompt(fields: Fields) -> tuple[Message, ...]:
    if isinstance(fields.get("prompt"), list):
        messages = _messages(fields, "prompt")
        if messages[-1].role == "assistant":
            raise BadRecordError("the prompt ends with the assistant")
        return messages
    return (Message("user", _text(fields, "prompt")),)


def _messages(fields: Fields, name: str) -> tuple[Message, ...]:
    """A list of messages, whose content is text or, as in chat services, a list of text parts."""
    items = _field(fields, name)
    if not isinstance(items, list) or not items or not all(isinstance(message, dict) for message in items):
        raise BadRecordError(f"{name!r} is not a list of messages")
    messages = []
    for message in items:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadRecordError(f"{name!r} has a role other than {', '.join(ROLES)}")
        if isinstance(content, list):
            content = "".join(part["text"] for part in content if _is_text_part(part))
        if role == "system" and isinstance(content, str) and not content.strip():
            continue
        messages.append(Message(role, _checked(content, name)))
    if not messages:
        raise BadRecordError(f"{name!r} is empty")
    return tuple(messages)


def _is_text_part(part: object) -> bool:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return True
    raise BadRecordError("a message has content other than text")


def _demonstration(messages: tuple[Message, ...], source: str) -> DemonstrationRecord:
    if messages[-1].role != "assistant":
        raise BadRecordError("the dialogue does not end with the assistant")
    if len(messages) < 2:
        raise BadRecordError("the dialogue has no prompt")
    return DemonstrationRecord(messages, source)


def _transcript(text: str) -> tuple[Message, ...]:
    before, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not turns:
        raise BadRecordError("a transcript does not begin with a turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[name], content.strip()) for name, content in zip(turns[::2], turns[1::2], strict=True))
