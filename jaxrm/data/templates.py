"""How a dialogue becomes tokens: the one way from messages to ids, for training, generation and scores.

A prompt is exactly what ``apply_chat_template(messages, add_generation_prompt=True)`` of ``transformers`` gives: the
same text, encoded as a whole. A response is what the template writes of an assistant's turn after such a prompt, up to
the token that ends it. It is encoded by itself, so its ids are the same in a pair, a demonstration and a score.

One thing differs from ``transformers``: a special token that is spelled out in a message stays text. So is a token that
stands around turns. The text is broken within it, and the parts are encoded one by one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from jaxrm.data.layout import (
    Layout,
    check_dialogue_roles,
    check_roles,
    check_texts,
    open_dialogue_layout,
    open_layout,
)
from jaxrm.data.records import Message
from jaxrm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode noncharacters, "never for interchange", one of which is where a text is broken.
_BREAKS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
SPELLED_OUT = "with special tokens spelled out, which stay text"  # what reports say of such records
_PROBE, _RESPONSE = "qzquestionqz", "qzresponseqz"


@dataclass(frozen=True)
class Text:
    """A text that is to be encoded.

    Attributes:
      parts: each is encoded by itself; the ids are joined.
      behind: what stands before the text, since some tokenizers look at it; empty for the first text of all.
    """

    parts: tuple[str, ...]
    behind: str

    @property
    def is_broken(self) -> bool:
        """Whether a message spells out a special token, which ``transformers`` would make one."""
        return len(self.parts) > 1


@dataclass(frozen=True)
class Places:
    """Where the texts of messages stand in a prompt, in characters.

    Attributes:
      text: the prompt.
      spans: beginning and end of the first text that is no system text, and of later ones of its role.
      system: the beginning of the first system text behind that; None where there is none.
    """

    text: Text
    spans: tuple[tuple[int, int], ...]
    system: int | None


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], template: str) -> list[int]:
    """Token ids of a prompt, up to the header that opens the response; errors as for `write_prompt`."""
    return encode(tokenizer, [write_prompt(tokenizer, messages, template)])[0]


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str, template: str) -> list[int]:
    """Token ids of a response as the model would emit them, the end-of-turn token last; errors as `write_response`."""
    return encode(tokenizer, [write_response(tokenizer, text, template)])[0]


def write_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], template: str) -> Text:
    """The text of a prompt.

    Args:
      tokenizer: as ``load_tokenizer`` returns it.
      messages: the dialogue before the response.
      template: ``auto``, a name of ``named_templates.TEMPLATES``, or ``tokenizer:NAME``.

    Raises:
      UserError: there is no such template, it refuses the dialogue, or it does not write all of it.
    """
    layout = open_layout(tokenizer, template)
    mark = _free_mark([message.content for message in messages])
    broken = [Message(message.role, _break(message.content, mark, layout)) for message in messages]
    rendered = layout.render(broken, generates=True)
    check_roles(tokenizer, template, layout.jinja, tuple(message.role for message in messages))
    parts = tuple(rendered.split(mark))
    check_texts(layout, messages, "".join(parts))
    return Text(parts, behind="")


def write_response(tokenizer: "PreTrainedTokenizerBase", text: str, template: str) -> Text:
    """The text of a response, from where a prompt ends.

    Raises:
      UserError: there is no such template, or it cannot write this response.
    """
    layout = open_layout(tokenizer, template)
    mark = _free_mark([text])
    return Text(tuple(layout.response(_break(text, mark, layout)).split(mark)), layout.prompt)


def write_dialogue(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], template: str, *, may_change: bool = False
) -> Text:
    """The text of a whole dialogue, its last response included: what ``apply_chat_template(messages)`` gives.

    Args:
      tokenizer: as for `write_prompt`.
      messages: as for `write_prompt`, and the response.
      template: as for `write_prompt`.
      may_change: take what the template makes of the texts, where it drops some of them, say all before ``</think>``.

    Raises:
      UserError: there is no such template, it refuses the dialogue, or it does not write all of it.
    """
    layout = open_dialogue_layout(tokenizer, template)
    check_dialogue_roles(tokenizer, template, layout.jinja, tuple(message.role for message in messages))
    mark = _free_mark([message.content for message in messages])
    broken = [Message(message.role, _break(message.content, mark, layout)) for message in messages]
    text = Text(tuple(layout.render(broken, generates=False).split(mark)), behind="")
    if not may_change:
        check_texts(layout, messages, "".join(text.parts), answer=messages[-1])
    return text


def write_request(tokenizer: "PreTrainedTokenizerBase", template: str, instruction: str) -> Text:
    """The text between a response and the next one, where the user says ``instruction``.

    Raises:
      UserError: there is no such template, or it refuses such a dialogue.
    """
    layout = open_layout(tokenizer, template)
    mark = _free_mark([instruction])
    turns = [Message("user", _PROBE), Message("assistant", _RESPONSE), Message("user", instruction)]
    broken = [Message(turn.role, _break(turn.content, mark, layout)) for turn in turns]
    rendered = layout.render(broken, generates=True)
    check_texts(layout, turns, rendered.replace(mark, ""))
    _, _, rest = rendered.partition(_RESPONSE)
    return Text(tuple(rest.removeprefix(layout.closing).split(mark)), layout.closing)


def check_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
    """Refuse a template that cannot work at all, before the first record.

    Raises:
      UserError: there is no such template, or it does not write one question and its response.
    """
    layout = open_layout(tokenizer, template)
    check_roles(tokenizer, template, layout.jinja, ("user",))


def locate_texts(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], template: str) -> Places | None:
    """Where the texts of messages stand in a prompt; None where marks around them change what is written."""
    role = next((message.role for message in messages if message.role != "system"), None)
    layout, text = open_layout(tokenizer, template), write_prompt(tokenizer, messages, template)
    marks = [char for char in _BREAKS if not any(char in message.content for message in messages)][:3]
    if role is None or len(marks) < 3:
        return None
    marked = []
    for message in messages:
        content, mark = _break(message.content, marks[0], layout), marks[1 + (message.role == role)]
        core = content.strip()
        if message.role in (role, "system"):
            content = content.replace(core, f"{mark}{core}{mark}", 1) if core else mark + mark + content
        marked.append(Message(message.role, content))
    rendered = layout.render(marked, generates=True).replace(marks[0], "")
    ends: dict[str, list[int]] = {mark: [] for mark in marks[1:]}
    for count, occurrence in enumerate(re.finditer("|".join(marks[1:]), rendered)):
        ends[occurrence[0]].append(occurrence.start() - count)
    plain = re.sub("|".join(marks[1:]), "", rendered)
    if plain != "".join(text.parts) or len(ends[marks[2]]) != 2 * sum(message.role == role for message in messages):
        return None
    places = ends[marks[2]]
    behind = [place for place in ends[marks[1]][::2] if place > places[0]]
    return Places(text, tuple(zip(places[::2], places[1::2], strict=True)), min(behind, default=None))


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Text]) -> list[list[int]]:
    """Token ids of each text, with no BOS or EOS added.

    Sentencepiece puts a space before the beginning of a text, and some tokenizers behind special tokens. A text that
    continues another is encoded behind it, or behind a line break, whose ids are then removed.
    """
    if _prefix_that_hides_space(tokenizer) is None:
        encoded = iter(_encode(tokenizer, [part for text in texts for part in text.parts]))
    else:
        befores = ["\n" if i and part else text.behind for text in texts for i, part in enumerate(text.parts)]
        encoded = iter(_encode_behind(tokenizer, [part for text in texts for part in text.parts], befores))
    return [[token for _ in text.parts for token in next(encoded)] for text in texts]


def _encode_behind(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], befores: Sequence[str]
) -> list[list[int]]:
    """Token ids of each text as it stands behind another."""
    known = sorted(set(befores))
    ids_of = dict(zip(known, _encode(tokenizer, known), strict=True))
    encoded = _encode(tokenizer, [before + text for before, text in zip(befores, texts, strict=True)])
    line_break = _prefix_that_hides_space(tokenizer) or []
    ids = []
    for text, before, joined in zip(texts, befores, encoded, strict=True):
        count = len(ids_of[before])
        if joined[:count] == ids_of[before]:
            ids.append(joined[count:])
        else:  # they have grown together
            ids.append(_encode(tokenizer, ["\n" + text])[0][len(line_break) :])
    return ids


def end_ids(tokenizer: "PreTrainedTokenizerBase", template: str) -> frozenset[int]:
    """Ids at which generation stops: the end of an assistant turn, and EOS."""
    closing = encode(tokenizer, [Text((open_layout(tokenizer, template).closing,), "x")])[0]
    return frozenset({closing[-1], tokenizer.eos_token_id} - {None})


def text_of(tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    """A template as it is written, in Jinja.

    Raises:
      UserError: there is no such template.
    """
    return open_layout(tokenizer, template).jinja


def bos_id(tokenizer: "PreTrainedTokenizerBase", template: str) -> int | None:
    """The BOS that the template puts first, or None. It stays where a prompt is cut."""
    layout = open_layout(tokenizer, template)
    # SmolLM2 calls `<|im_start|>`, which opens every turn, its BOS; a template that means BOS says `bos_token`.
    return tokenizer.bos_token_id if layout.variables.get("bos_token") and "bos_token" in layout.jinja else None


def _free_mark(contents: Sequence[str]) -> str:
    """A character that stands in none of the messages, which must be text that can be encoded."""
    for content in contents:
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"a message has {content[error.start]!r}, half of a character; remove it") from error
    mark = next((char for char in _BREAKS if not any(char in content for content in contents)), None)
    if mark is None:
        raise UserError("a message has all the characters from U+FDD0 to U+FDEF, which stand for nothing; remove one")
    return mark


def _break(text: str, mark: str, layout: Layout) -> str:
    return layout.control.sub(lambda first: first[0] + mark, text)


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoding = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoding["input_ids"]


@lru_cache(maxsize=8)
def _prefix_that_hides_space(tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    line_break, alone, after = _encode(tokenizer, ["\n", "x", "\nx"])
    hides = after[: len(line_break)] == line_break and after[len(line_break) :] != alone
    return line_break if hides else None
