"""How a dialogue becomes tokens: the tokenizer's own chat template, or a named one.

Every template is Jinja, run only in the sandbox of ``transformers``. A dialogue is rendered once, with an invisible
mark around each message. The text is then cut into pieces, which are encoded one by one and joined as ids. Cuts are in
two places. Around every assistant response: its tokens are known exactly, and generation continues from the same ids.
And inside any special token that is spelled out in a message: so text of a user never becomes a special token.

Two rules hold everywhere. White space around a message is dropped, as the templates of Llama and Gemma do; ``plain``
keeps it. A space between the assistant's header and the response belongs to the first token of the response.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from jaxrm.data.records import Message
from jaxrm.errors import UserError, flag, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Gemma and Llama 2 have no system turn: its text goes before the first message of the user.
_SYSTEM_FIRST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = ns.system + system_open + m.content + system_close %}{% else %}"
)

TEMPLATES = {
    "chatml": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}",
    "llama2": "{% set system_open = '<<SYS>>\n' %}{% set system_close = '\n<</SYS>>\n\n' %}"
    + _SYSTEM_FIRST
    + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}"
    "{% set ns.system = '' %}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endif %}{% endfor %}",
    "gemma": "{% set system_open = '' %}{% set system_close = '\n\n' %}{{ bos_token }}"
    + _SYSTEM_FIRST
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + ns.system + m.content "
    "+ '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}",
    "hh": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '\n\nAssistant: ' + m.content + eos_token }}{% elif m.role == 'user' %}{{ '\n\nHuman: ' + m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
}
_NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}

# Unicode noncharacters, "never for interchange": where a message begins (an assistant's or another's) and ends, and
# where a text is broken so that its two parts are encoded apart.
_OTHER, _ASSISTANT, _END, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MESSAGE = re.compile(f"([{_OTHER}{_ASSISTANT}])([^{_END}]*){_END}")
_MARKS = re.compile(f"[{_OTHER}{_ASSISTANT}{_END}{_BREAK}]")


@dataclass(frozen=True)
class Piece:
    """A text that is encoded by itself.

    Attributes:
      text: the text.
      is_target: whether it belongs to an assistant turn.
    """

    text: str
    is_target: bool


@dataclass(frozen=True)
class _Layout:
    """A template as measured with a tokenizer.

    Attributes:
      jinja: the template.
      bos: the text of BOS, empty where there is none.
      keeps_space: whether white space around a message stays.
      opening: a space or nothing, between the assistant's header and the response.
      closing: the text that ends an assistant turn, up to its special token.
      control: matches the first character of every special token.
    """

    jinja: str
    bos: str
    keeps_space: bool
    opening: str = ""
    closing: str = ""
    control: re.Pattern[str] = re.compile("(?!)")


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], template: str) -> list[int]:
    """Token ids of a prompt: BOS where the model has one, the dialogue, the header that opens the response.

    Raises:
      UserError: there is no such template, or it refuses the dialogue.
    """
    pieces = cut_dialogue(tokenizer, (*messages, Message("assistant", "x")), template)
    end = max(i for i, piece in enumerate(pieces) if not piece.is_target) + 1
    return _encode_joined(tokenizer, [piece.text for piece in pieces[:end]])


def encode_response(tokenizer: "PreTrainedTokenizerBase", text: str, template: str) -> list[int]:
    """Token ids of a response as the model would emit them, the end-of-turn token last.

    Raises:
      UserError: there is no such template.
    """
    layout = _layout(tokenizer, template)
    texts = _response(_clean(text, layout), layout)
    return _encode_joined(tokenizer, [*texts, layout.closing], continues=True)


def end_ids(tokenizer: "PreTrainedTokenizerBase", template: str) -> frozenset[int]:
    """Ids at which generation stops: the end of an assistant turn, and EOS."""
    closing = _encode_joined(tokenizer, [_layout(tokenizer, template).closing], continues=True)
    return frozenset({closing[-1], tokenizer.eos_token_id} - {None})


def bos_id(tokenizer: "PreTrainedTokenizerBase", template: str) -> int | None:
    """The BOS that the template puts first, or None. It stays where a prompt is cut."""
    layout = _layout(tokenizer, template)
    # SmolLM2 calls `<|im_start|>`, which opens every turn, its BOS; a template that means BOS says `bos_token`.
    return tokenizer.bos_token_id if layout.bos and "bos_token" in layout.jinja else None


def cut_dialogue(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], template: str) -> list[Piece]:
    """Render a dialogue that ends with an assistant turn and cut it into pieces for ``encode_texts``.

    The target pieces of an assistant turn are its response and the text that ends the turn; they follow each other.
    Any text of the template after the last turn is left out.

    Raises:
      UserError: there is no such template, or it refuses the dialogue.
    """
    layout = _layout(tokenizer, template)
    rendered = _render(tokenizer, layout, messages)
    pieces: list[Piece] = []
    turns = 0
    text = ""  # what is encoded as one
    kind, end = _OTHER, 0  # of the message before, and where it ended
    for message in _MESSAGE.finditer(rendered):
        written = rendered[end : message.start()]
        if kind == _ASSISTANT and written.startswith(layout.closing):
            pieces.append(Piece(layout.closing, True))
            written = written.removeprefix(layout.closing)
        text += written
        kind, end = message[1], message.end()
        if kind == _OTHER:
            text += _break(message[2], layout)
        else:
            pieces += [Piece(part, False) for part in text.removesuffix(layout.opening).split(_BREAK)]
            pieces += [Piece(part, True) for part in _response(message[2], layout)]
            text = ""
            turns += 1
    if turns != sum(message.role == "assistant" for message in messages) or _MARKS.search(rendered[end:]):
        raise UserError(f"chat template {template!r} left out or took apart a turn of the assistant")
    return [*pieces, Piece(layout.closing, True)]


def encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], continues: Sequence[bool]
) -> list[list[int]]:
    """Token ids of each text, with no BOS or EOS added.

    Sentencepiece puts a space before the beginning of a text. A text that continues another must not get one, so it is
    encoded after a line break, whose ids are then removed.

    Args:
      tokenizer: as ``load_tokenizer`` returns it.
      texts: the texts.
      continues: for each text, whether it follows another one.
    """
    line_break = _prefix_that_hides_space(tokenizer)
    if line_break is None:
        return _encode(tokenizer, texts)
    marked = _encode(tokenizer, ["\n" + t if c and t else t for t, c in zip(texts, continues, strict=True)])
    return [
        ids[len(line_break) :] if c and t and ids[: len(line_break)] == line_break else ids
        for ids, t, c in zip(marked, texts, continues, strict=True)
    ]


def _encode_joined(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], continues: bool = False) -> list[int]:
    encoded = encode_texts(tokenizer, texts, [continues or i > 0 for i in range(len(texts))])
    return [token for ids in encoded for token in ids]


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


def _clean(text: str, layout: _Layout) -> str:
    text = _MARKS.sub("", text)
    return text if layout.keeps_space else text.strip()


def _response(text: str, layout: _Layout) -> list[str]:
    return (layout.opening + _break(text, layout)).split(_BREAK)


def _break(text: str, layout: _Layout) -> str:
    return layout.control.sub(lambda first: first[0] + _BREAK, text)


def _render(tokenizer: "PreTrainedTokenizerBase", layout: _Layout, messages: Sequence[Message]) -> str:
    marked = []
    for message in messages:
        mark = _ASSISTANT if message.role == "assistant" else _OTHER
        marked.append({"role": message.role, "content": f"{mark}{_clean(message.content, layout)}{_END}"})
    try:
        rendered = tokenizer.apply_chat_template(
            marked,
            chat_template=layout.jinja,
            tokenize=False,
            bos_token=layout.bos,
            enable_thinking=False,  # Qwen 3: answers begin after an empty thought
            date_string="26 Jul 2024",  # Llama 3: its default, since today's date would change tokens every day
        )
    except Exception as error:  # a template is somebody else's program and may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"the chat template refuses a dialogue: {reason[:200]}") from error
    assert isinstance(rendered, str)
    return rendered


def _layout(tokenizer: "PreTrainedTokenizerBase", template: str) -> _Layout:
    if template == "auto":
        if not tokenizer.chat_template:
            raise UserError(
                f"{option('data.template')} is 'auto', but the tokenizer has no chat template; name one of "
                f"{', '.join(TEMPLATES)}, e.g. {flag('data.template')}=hh"
            )
        return _measure(tokenizer, template, tokenizer.get_chat_template())
    if template not in TEMPLATES:
        raise UserError(
            f"{option('data.template')} is {template!r}; use auto or one of {', '.join(TEMPLATES)}, "
            f"e.g. {flag('data.template')}=auto"
        )
    return _measure(tokenizer, template, TEMPLATES[template])


@lru_cache(maxsize=16)
def _measure(tokenizer: "PreTrainedTokenizerBase", template: str, jinja: str) -> _Layout:
    """Render a small dialogue, to measure what the template writes around a response."""
    bos = tokenizer.bos_token or ""
    if template != "auto":
        missing = [t for t in _NEEDED_TOKENS.get(template, ()) if t not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"{option('data.template')} is {template!r}, but the tokenizer has no token {missing[0]!r}; use "
                f"auto, hh or plain, e.g. {flag('data.template')}=hh"
            )
        adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        bos = bos if adds_bos else ""
        if tokenizer.eos_token is None and "eos_token" in jinja:
            raise _endless()
    layout = _Layout(jinja, bos, keeps_space=template == "plain")
    rendered = _render(tokenizer, layout, [Message("user", "x"), Message("assistant", "x")])
    before, opens, after = rendered.rpartition(_ASSISTANT)
    _, closes, after = after.partition(_END)
    if not (opens and closes):
        raise UserError("the tokenizer's chat template does not write the assistant's turns; name another template")
    written = _MESSAGE.sub("", rendered)
    # A token of a single character cannot be broken up; no model here has one.
    added = [t for t in tokenizer.added_tokens_decoder.values() if len(t.content) > 1 and not t.content.isspace()]
    control = sorted((t.content for t in added if t.special or t.content in written), key=len, reverse=True)
    any_control = f"(?:{'|'.join(map(re.escape, control)) or '(?!)'})"  # (?!) matches nothing
    closing = re.match(f".*?{any_control}", after, re.DOTALL)
    if closing is None and tokenizer.eos_token is None:
        raise _endless()
    return replace(
        layout,
        opening=" " * (len(before) - len(before.rstrip(" "))),
        closing=closing[0] if closing else tokenizer.eos_token,
        control=re.compile(f"(?={any_control}).", re.DOTALL),
    )


def _endless() -> UserError:
    return UserError(
        "the tokenizer has no end-of-sequence token, so a response could not end; give one that has, e.g. "
        f"{flag('data.tokenizer')}=org/name, or a chat template that ends a turn, e.g. {flag('data.template')}=chatml"
    )
