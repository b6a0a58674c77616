"""The prompt of a row, wherever its fields have it: the question, its system text, and the turns before it."""

from jaxrm.data.fields import (
    BadRecordError,
    Fields,
    given,
    is_transcript,
    read_field,
    read_messages,
    read_text,
    read_transcript,
    squeeze,
    texts,
)
from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, Record

QUESTIONS = ("prompt", "question", "instruction")
SYSTEMS = ("system", "system_prompt")
CONTEXT_FIELDS = (*SYSTEMS, "history")
# Fields that belong to a prompt by their names, whatever the schema. A record that leaves one out means another thing.
_CONTEXT = (*QUESTIONS, *CONTEXT_FIELDS, "input", "context", "contexts", "documents", "conversation", "conversations")
_NO_TEXT = ("tools", "functions", "image", "images", "video", "videos", "audio", "audios")

Turns = tuple[Message, ...]


def read_prompt(fields: Fields) -> Turns:
    """The prompt of a row that has a field for it: system text, earlier turns, question.

    Raises:
      BadRecordError: there is none, or two of its fields contradict each other.
    """
    return with_context(fields, _question(fields))


def with_context(fields: Fields, turns: Turns) -> Turns:
    """Turns with the row's ``system`` and ``history`` before them, unless they have them already.

    Raises:
      BadRecordError: they have another system text, or a field is no such thing.
    """
    head, rest = _split_system(turns)
    first, history = _split_system(_history(fields))
    if not _includes(rest, history):
        rest = (*history, *rest)
    systems = {squeeze(text): Message("system", text) for name in SYSTEMS if (text := _optional_text(fields, name))}
    systems |= {squeeze(message.content): message for message in (*first, *head)}
    later = {squeeze(message.content) for message in history if message.role == "system"}
    if len(systems) > 1 or (systems and not later <= systems.keys()):
        raise BadRecordError("there are two different system texts")
    return (*systems.values(), *rest)


def with_prompt(fields: Fields, turns: Turns) -> Turns:
    """The turns before a response, with what the row's own fields of a prompt add to them.

    Args:
      fields: the row.
      turns: that the response's field has before the response, perhaps none.

    Raises:
      BadRecordError: the row's prompt is another than that of the dialogue.
    """
    if turns and not any(given(fields, name) for name in QUESTIONS):
        return with_context(fields, turns)
    return with_context(fields, _joined(_question(fields), turns))


def read_answer(fields: Fields, name: str) -> tuple[Turns, str]:
    """A response, and the turns that its field has before it: text, a transcript, or messages."""
    value = read_field(fields, name)
    if isinstance(value, list):
        turns = read_messages(fields, name)
    elif is_transcript(value):
        turns = _full(read_transcript(read_text(fields, name)))
    else:
        return (), read_text(fields, name)
    if turns[-1].role != "assistant":
        raise BadRecordError(f"{_kind(value)} does not end with the assistant")
    return turns[:-1], turns[-1].content


def check_unread(fields: Fields, record: Record) -> None:
    """Refuse a row with a field that belongs to its prompt and is not in the record.

    Raises:
      BadRecordError: naming the field.
    """
    for name in _NO_TEXT:
        if given(fields, name) and fields[name] not in (False, 0, "[]", "{}", "null"):
            raise BadRecordError(f"{name!r} is given, which jaxrm does not read; write it as text, or remove the field")
    names = [name for name in _CONTEXT if given(fields, name)]
    if names:
        written = written_text(record)
        for name in names:
            if not all(is_written(text, written) for text in texts(fields[name])):
                raise BadRecordError(f"{name!r} is not read by its schema; put it into the prompt, or remove the field")


def written_text(record: Record) -> str:
    """All the text of a record."""
    messages = record.messages if isinstance(record, DemonstrationRecord) else record.prompt
    responses = [record.chosen, record.rejected] if isinstance(record, PreferenceRecord) else []
    return "\n".join([*(message.content for message in messages), *responses])


def is_written(text: str, written: str) -> bool:
    """Whether a text is part of another, up to white space."""
    return text.strip() in written or squeeze(text) in squeeze(written)


def _question(fields: Fields) -> Turns:
    """The question as turns. Where several fields have one, it is the one that includes the others."""
    names = [name for name in QUESTIONS if given(fields, name)] or ["prompt"]
    questions = [_read_question(fields, name) for name in names]
    if len(questions) == 1:
        return questions[0]
    for turns in questions:
        written = "\n".join(message.content for message in turns)
        if all(is_written(message.content, written) for other in questions for message in other):
            return turns
    raise BadRecordError(f"{' and '.join(map(repr, names))} are different prompts; remove the one that is not meant")


def _read_question(fields: Fields, name: str) -> Turns:
    value = fields.get(name)
    if name == "prompt" and isinstance(value, list):
        turns = read_messages(fields, name)
    elif is_transcript(value):
        turns = read_transcript(read_text(fields, name))
        # "\n\nAssistant:" at the end asks for the response.
        turns = _full(turns[:-1] if turns[-1] == Message("assistant", "") else turns)
    else:
        question = read_text(fields, name)
        if name == "instruction" and fields.get("input"):
            question += "\n\n" + read_text(fields, "input")
        return (Message("user", question),)
    if turns[-1].role == "assistant":
        raise BadRecordError("the prompt ends with the assistant")
    return turns


def _full(turns: Turns) -> Turns:
    if not turns or not all(message.content for message in turns):
        raise BadRecordError("a turn of the transcript is empty")
    return turns


def _history(fields: Fields) -> Turns:
    """Earlier turns: ``[[question, answer], …]`` as in Alpaca's form, or messages."""
    if not given(fields, "history"):
        return ()
    pairs = fields["history"]
    if not isinstance(pairs, list):
        raise BadRecordError("'history' is not a list of [question, answer]")
    if all(isinstance(pair, dict) for pair in pairs):
        return read_messages(fields, "history")
    turns: list[Message] = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BadRecordError("'history' is not a list of [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(Message(role, read_text({"history": text}, "history")))
    return tuple(turns)


def _optional_text(fields: Fields, name: str) -> str | None:
    return read_text(fields, name) if given(fields, name) else None


def _joined(prompt: Turns, turns: Turns) -> Turns:
    """A prompt and the turns before a response as one dialogue, which is the longer of the two.

    The turns are the whole prompt or its end: after other ones the response would answer another turn. Where the
    dialogue is the longer one, the prompt is its end, or its beginning as of data whose prompt is the first question.
    """
    if _ends_with(prompt, turns):
        return prompt
    system, question = _split_system(prompt)
    if system and turns[0].role != "system":
        return (*system, *(_joined(question, turns) if question else turns))
    beginning = turns if system else _split_system(turns)[1]
    if _ends_with(turns, prompt) or _keys(beginning)[: len(prompt)] == _keys(prompt):
        return turns
    raise BadRecordError("'prompt' is another than that of the responses' dialogues")


def _split_system(turns: Turns) -> tuple[Turns, Turns]:
    """The system text that turns begin with, if they do, and the others."""
    return (turns[:1], turns[1:]) if turns and turns[0].role == "system" else ((), turns)


def _ends_with(turns: Turns, end: Turns) -> bool:
    """Whether the last of ``turns`` are ``end``, up to white space."""
    return len(end) <= len(turns) and _keys(turns)[len(turns) - len(end) :] == _keys(end)


def _includes(turns: Turns, part: Turns) -> bool:
    """Whether ``part`` stands in ``turns`` as it is, up to white space."""
    if not part:
        return True
    whole, wanted = _keys(turns), _keys(part)
    return any(whole[i : i + len(wanted)] == wanted for i in range(len(whole) - len(wanted) + 1))


def _keys(turns: Turns) -> list[tuple[str, str]]:
    """Turns as they are compared: up to white space."""
    return [(message.role, squeeze(message.content)) for message in turns]


def _kind(value: object) -> str:
    return "a dialogue" if isinstance(value, list) else "a transcript"
