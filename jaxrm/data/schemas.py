"""The schemas of data sets, each a small function from a row's fields to a record.

A row that does not fit raises ``BadRecordError`` with a short reason. No content of a row raises anything else. A field
that belongs to the prompt by its name is part of the record, or the row does not fit.
"""

import re
from collections.abc import Callable

from jaxrm.data.fields import (
    BadRecordError,
    Fields,
    given,
    is_transcript,
    read_choice,
    read_field,
    read_flag,
    read_messages,
    read_text,
    read_transcript,
    squeeze,
)
from jaxrm.data.message_keys import unread_in_record
from jaxrm.data.prompt_columns import (
    QUESTIONS,
    check_unread,
    read_answer,
    read_prompt,
    with_context,
    with_prompt,
)
from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, PromptRecord, Record

_RESPONSES = ("response", "completion", "output")


def recognize(fields: Fields) -> str | None:
    """The name of the schema that has these fields, or None."""
    names = set(fields)
    if {"chosen", "rejected"} <= names and any(given(fields, name) for name in QUESTIONS):
        names.add("prompt")  # pairs have it under any of these names
    for name, (required, _) in SCHEMAS.items():
        if any(names.issuperset(group) for group in required):
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
    if reason := unread_in_record(fields):
        raise BadRecordError(reason)
    try:
        if schema == "pku_safe_rlhf":
            record = parse_pku_safe_rlhf(fields, source, preferred)
        else:
            record = SCHEMAS[schema][1](fields, source)
        check_unread(fields, record)
    except RecursionError as error:
        raise BadRecordError("nested too deeply") from error
    return record


def parse_preference(fields: Fields, source: str) -> Record:
    r"""A prompt, ``chosen`` and ``rejected``.

    The prompt is ``prompt`` (text or messages), ``question`` or ``instruction``. Each response is text, or a dialogue
    that may repeat the prompt: messages, or a transcript "\n\nHuman: … \n\nAssistant: …".
    """
    (turns, chosen), (rejected_turns, rejected) = (read_answer(fields, name) for name in ("chosen", "rejected"))
    if turns != rejected_turns:
        kind = "dialogues" if isinstance(fields["chosen"], list) else "transcripts"
        raise BadRecordError(f"the {kind} differ before the last turn")
    prompt = with_prompt(fields, turns)
    if is_transcript(fields.get("prompt")):
        chosen, rejected = _bare(chosen, "chosen"), _bare(rejected, "rejected")
    return PreferenceRecord(prompt, chosen, rejected, source)


def parse_ultrafeedback(fields: Fields, source: str) -> Record:
    """``chosen`` and ``rejected`` as messages that differ in the last one, with an optional ``prompt`` before them."""
    for name in ("chosen", "rejected"):
        read_messages(fields, name)
    return parse_preference(fields, source)


def parse_demonstration(fields: Fields, source: str) -> Record:
    """``prompt`` with ``response`` or ``completion``, or ``instruction`` (and ``input``) with ``output``."""
    if given(fields, "label") and not read_flag(fields, "label"):  # as unpaired preferences mark an unwanted response
        raise BadRecordError("'label' is False: its response is not to be imitated; leave such records out")
    usual = "output" if "instruction" in fields else "response" if "response" in fields else "completion"
    names = [name for name in _RESPONSES if given(fields, name)] or [usual]
    answers = [read_answer(fields, name) for name in names]
    if len({squeeze(answer) for _, answer in answers}) > 1:
        raise BadRecordError(f"{' and '.join(map(repr, names))} are different responses; remove the one not meant")
    turns, answer = answers[0]
    prompt = with_prompt(fields, turns)
    if is_transcript(fields.get("prompt")):
        answer = _bare(answer, names[0])
    return DemonstrationRecord((*prompt, Message("assistant", answer)), source)


def parse_messages(fields: Fields, source: str) -> Record:
    """``messages``, a list of ``role`` and ``content`` that ends with the assistant."""
    *turns, answer = read_messages(fields, "messages")
    if answer.role != "assistant":
        raise BadRecordError("the dialogue does not end with the assistant")
    prompt = with_context(fields, tuple(turns))
    if not turns:
        raise BadRecordError("the dialogue has no prompt")
    return DemonstrationRecord((*prompt, answer), source)


def parse_prompt(fields: Fields, source: str) -> Record:
    """``prompt`` alone, text or messages."""
    return PromptRecord(read_prompt(fields), source)


def parse_hh(fields: Fields, source: str) -> Record:
    r"""``chosen`` and ``rejected`` as transcripts "\n\nHuman: … \n\nAssistant: …"; the prompt is what they share.

    Source: Bai et al. 2022, arXiv 2204.05862, the data as published.
    """
    sides = [read_text(fields, name) for name in ("chosen", "rejected")]
    if not any(re.search(r"(Human|Assistant):", side) for side in sides):
        raise BadRecordError(f"there is no prompt: no field {' or '.join(map(repr, QUESTIONS))}, and no transcript")
    chosen, rejected = map(read_transcript, sides)
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        raise BadRecordError("a transcript does not end with the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise BadRecordError("the transcripts differ before the last turn")
    if not all(message.content for message in (*chosen, rejected[-1])):
        raise BadRecordError("a turn of the transcript is empty")
    if len(chosen) < 2:
        raise BadRecordError("the transcript has no prompt")
    return PreferenceRecord(with_prompt(fields, chosen[:-1]), chosen[-1].content, rejected[-1].content, source)


def parse_pku_safe_rlhf(fields: Fields, source: str, preferred: str = "better_response_id") -> Record:
    """``prompt``, ``response_0``, ``response_1`` and which is preferred (Dai et al. 2023, arXiv 2310.12773)."""
    responses = [read_text(fields, "response_0"), read_text(fields, "response_1")]
    better = read_choice(fields, preferred)
    return PreferenceRecord(read_prompt(fields), responses[better], responses[1 - better], source)


def parse_tldr(fields: Fields, source: str) -> Record:
    """``info``, ``summaries`` and ``choice`` of openai/summarize_from_feedback.

    The prompt is written as in the appendix of Stiennon et al. 2020, arXiv 2009.01325: subreddit, title, post, and
    "TL;DR:" for the summary to follow.
    """
    info = read_field(fields, "info")
    summaries = read_field(fields, "summaries")
    if not isinstance(info, dict) or not (isinstance(summaries, list) and len(summaries) == 2):
        raise BadRecordError("'info' is not an object or 'summaries' are not two")
    if not all(isinstance(summary, dict) for summary in summaries):
        raise BadRecordError("'summaries' are not objects")
    better = read_choice(fields, "choice")
    texts = [read_text(summary, "text") for summary in summaries]
    if info.get("post"):
        head = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post")]
        parts = [label + read_text(info, name).strip() for label, name in head if info.get(name)]
    else:
        parts = ["ARTICLE: " + read_text(info, "article").strip()]
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
        (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response")),
        parse_demonstration,
    ),
    "prompt": ((("prompt",),), parse_prompt),
}


def describe_schemas() -> str:
    """The supported schemas and their fields, for an error message."""
    return "; ".join(
        f"{name} ({' or '.join(', '.join(group) for group in groups)})" for name, (groups, _) in SCHEMAS.items()
    )


def _bare(answer: str, name: str) -> str:
    """A response to a transcript, without the label of its turn; there is one turn."""
    answer = answer.strip().removeprefix("Assistant:")
    if re.search(r"\n\n(Human|Assistant):", answer):
        raise BadRecordError(f"{name!r} goes on with further turns")
    return read_text({name: answer.strip()}, name)
