"""What a chat template writes around messages, measured with small dialogues, and whether it writes all of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxrm.data import template_sandbox
from jaxrm.data.named_templates import NEEDED_TOKENS, TEMPLATES
from jaxrm.data.records import Message
from jaxrm.errors import UserError, flag, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN = "tokenizer:"  # of ``data.template``, before the name of one of the tokenizer's several chat templates
_QUESTION, _RESPONSE = "qzquestionqz", "qzresponseqz"  # no template writes these of itself
_OPEN_TAG = re.compile(r"<(\w+)>\s*$")
_THOUGHT = re.compile(r"<(\w+)>\s*</\1>")


@dataclass(frozen=True)
class Layout:
    """A template as measured with a tokenizer.

    Attributes:
      name: the template as the user names it.
      jinja: its text.
      variables: the special tokens that it can read.
      prompt: what it writes of a probe, up to where the response begins.
      opening: what only the prompt of a generation ends with, such as ``<think>``; a dialogue has nothing of it.
      before: what it writes before a response, after ``prompt``.
      closing: the text that ends a response, up to its special token.
      after: all that the template writes after the response that ends a dialogue.
      control: matches the first character of every token that would end or open a turn.
    """

    name: str
    jinja: str
    variables: Mapping[str, Any]
    prompt: str = ""
    opening: str = ""
    before: str = ""
    closing: str = ""
    after: str = ""
    control: re.Pattern[str] = re.compile("(?!)")

    def render(self, messages: Sequence[Message], *, generates: bool) -> str:
        """The dialogue as text, as ``apply_chat_template`` renders it.

        Args:
          messages: the dialogue.
          generates: end with the header of a response, ``add_generation_prompt``.

        Raises:
          UserError: the template refuses the dialogue, or asks for too much time or memory.
        """
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        given = {"messages": dicts, "tools": None, "documents": None, "add_generation_prompt": generates}
        try:
            return template_sandbox.render(self.jinja, {**self.variables, **given})
        except Exception as error:  # a template is somebody else's program and may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{self} refuses a dialogue: {reason}") from error

    def response(self, text: str) -> str:
        """A response from where the prompt ends, with what ends its turn.

        Raises:
          UserError: the template leaves out some of it, or it lacks the thought that the template opens.
        """
        if self.opening:
            return self._after_opening(text) + self.closing
        whole = self.render([Message("user", _QUESTION), Message("assistant", text)], generates=False)
        if not (whole.startswith(self.prompt) and whole.removeprefix(self.prompt).endswith(self.after)):
            raise UserError(f"{self} writes a response in another way than others")
        if squeeze(text) not in squeeze(whole):
            raise UserError(f"{self} leaves out or changes some of the text of a response")
        return whole[len(self.prompt) : len(whole) - len(self.after)] + self.closing

    def _after_opening(self, text: str) -> str:
        tag = _OPEN_TAG.search(self.opening)
        if tag is None:
            return text.removeprefix(self.opening)
        start, end = f"<{tag[1]}>", f"</{tag[1]}>"
        if end not in text:
            raise UserError(
                f"a response without {end!r}, but {self} opens every one with {_shown(self.opening)}; write a thought "
                f"before it, 'thought\\n{end}\\n\\nresponse', or name another template, e.g. {flag('data.template')}=hh"
            )
        rest = text.removeprefix(self.opening)
        return rest if rest != text else text.lstrip().removeprefix(start)

    def __str__(self) -> str:
        return "the chat template" if self.name == "auto" else f"chat template {self.name!r}"


def squeeze(text: str) -> str:
    """A text without its white space, which templates drop or add around messages."""
    return "".join(text.split())


def open_layout(tokenizer: "PreTrainedTokenizerBase", template: str) -> Layout:
    """Measure a template with a tokenizer.

    Args:
      tokenizer: as ``load_tokenizer`` returns it.
      template: ``auto``, a name of ``TEMPLATES``, or ``tokenizer:NAME``.

    Raises:
      UserError: there is no such template, or it cannot be used.
    """
    return _measure(tokenizer, template, _jinja(tokenizer, template))


def open_dialogue_layout(tokenizer: "PreTrainedTokenizerBase", template: str) -> Layout:
    """A template that writes whole dialogues alone, as a classifier reads them: of a response nothing is measured.

    Arguments as for `open_layout`.

    Raises:
      UserError: there is no such template, or it refuses a question with its response.
    """
    return _describe(tokenizer, template, _jinja(tokenizer, template))


def _jinja(tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    if template in TEMPLATES:
        return TEMPLATES[template]
    own = tokenizer.chat_template
    if isinstance(own, dict) and (template == "auto" or template.startswith(OWN)):
        own = own.get("default" if template == "auto" else template.removeprefix(OWN))
        if own is None:
            names = sorted(map(str, tokenizer.chat_template))
            raise UserError(
                f"{option('data.template')} is {template!r}, but the tokenizer's chat templates are "
                f"{', '.join(names) or 'none'}; e.g. {flag('data.template')}={OWN + names[0] if names else 'hh'}"
            )
    elif template != "auto":
        raise UserError(
            f"{option('data.template')} is {template!r}; use auto or one of {', '.join(TEMPLATES)}, "
            f"e.g. {flag('data.template')}=auto"
        )
    if not own or not isinstance(own, str):
        raise UserError(
            f"{option('data.template')} is {template!r}, but the tokenizer has no chat template; name one of "
            f"{', '.join(TEMPLATES)}, e.g. {flag('data.template')}=hh"
        )
    return own


@lru_cache(maxsize=1024)
def check_roles(tokenizer: "PreTrainedTokenizerBase", template: str, jinja: str, roles: tuple[str, ...]) -> None:
    """Check, with words that stand nowhere else, that a template writes every message of a dialogue of these roles.

    Raises:
      UserError: it leaves one out, takes them out of their order, or ends the dialogue in another way than others.
    """
    layout = _measure(tokenizer, template, jinja)
    messages = [Message(role, f"qz{i}message{i}qz") for i, role in enumerate(roles)]
    check_texts(layout, messages, layout.render(messages, generates=True))
    if roles[-1] == "assistant":  # nothing else is said to it than to go on
        return
    try:
        whole = layout.render([*messages, Message("assistant", _RESPONSE)], generates=False)
    except UserError:
        return  # generation alone
    if not whole.endswith(layout.before + _RESPONSE + layout.after):
        raise UserError(
            f"{layout} ends a dialogue of several messages in another way than that of a single question; take such "
            f"dialogues out, or name another template, e.g. {flag('data.template')}=hh"
        )


def check_texts(layout: Layout, messages: Sequence[Message], rendered: str, *, answer: Message | None = None) -> None:
    """Check that the text of every message is in what was rendered, in order.

    A system message may stand anywhere: some templates write it into the last turn of the user. Of an earlier turn of
    the assistant, what comes before ``</think>`` may be missing, since the templates of models that think drop it.

    Args:
      layout: of the template.
      messages: the dialogue.
      rendered: its text.
      answer: the one of the messages that is to be scored, whose thought must be there too.

    Raises:
      UserError: naming the first that is missing.
    """
    text, start = squeeze(rendered), 0
    for message in messages:
        content = squeeze(message.content)
        if message.role == "system":
            if content not in text:
                raise _left_out(layout, message.role)
            continue
        at = text.find(content, start)
        if at < 0 and message.role == "assistant" and message is not answer:
            content = content.rpartition("</think>")[2]
            at = text.find(content, start)
        if at < 0:
            raise _left_out(layout, message.role)
        start = at + len(content)


def _left_out(layout: Layout, role: str) -> UserError:
    other = "plain" if layout.name == "hh" else "hh"
    return UserError(
        f"{layout} leaves out or changes the text of a message of the role {role!r}; take such messages out, or name "
        f"another template, e.g. {flag('data.template')}={other}"
    )


@lru_cache(maxsize=256)
def check_dialogue_roles(
    tokenizer: "PreTrainedTokenizerBase", template: str, jinja: str, roles: tuple[str, ...]
) -> None:
    """Check, with words that stand nowhere else, that a template writes every message of a whole dialogue.

    Raises:
      UserError: it refuses these roles, or leaves out or moves a message.
    """
    layout = _describe(tokenizer, template, jinja)
    messages = [Message(role, f"qz{i}message{i}qz") for i, role in enumerate(roles)]
    check_texts(layout, messages, layout.render(messages, generates=False))


@lru_cache(maxsize=16)
def _describe(tokenizer: "PreTrainedTokenizerBase", template: str, jinja: str) -> Layout:
    layout = Layout(template, jinja, _variables(tokenizer, template, jinja))
    whole = layout.render([Message("user", _QUESTION), Message("assistant", _RESPONSE)], generates=False)
    control = _control(tokenizer, _turns(layout, whole), thoughts="<think>")
    return replace(layout, control=re.compile(f"(?={control}).", re.DOTALL))


@lru_cache(maxsize=16)
def _measure(tokenizer: "PreTrainedTokenizerBase", template: str, jinja: str) -> Layout:
    """Render small dialogues, to measure what the template writes around a response."""
    layout = Layout(template, jinja, _variables(tokenizer, template, jinja))
    question, response = Message("user", _QUESTION), Message("assistant", _RESPONSE)
    prompt = layout.render([question], generates=True)
    whole = layout.render([question, response], generates=False)
    pairs = enumerate(zip(prompt, whole, strict=False))
    shared = next((i for i, (one, other) in pairs if one != other), min(len(prompt), len(whole)))
    opening, rest = prompt[shared:], whole[shared:]
    before, response_text, after = rest.partition(_RESPONSE)
    if not response_text:
        raise UserError(f"{layout} does not write the assistant's turns; name another, {flag('data.template')}=hh")
    unfinished = _OPEN_TAG.search(prompt)
    if _THOUGHT.sub("", (unfinished[0] if unfinished and not opening else "") + before).strip():
        raise UserError(
            f"{layout} begins a response with {_shown(before)} in a dialogue, but under add_generation_prompt with "
            f"{_shown(opening or 'nothing')}, so generation would not begin as training does; mend it, or name "
            f"another template, e.g. {flag('data.template')}={_instead(tokenizer)}"
        )
    control = _control(tokenizer, _turns(layout, whole), thoughts=opening + before)
    closing = re.match(f".*?{control}", after, re.DOTALL)
    if closing is None and tokenizer.eos_token is None:
        raise _endless()
    return replace(
        layout,
        prompt=prompt,
        opening=opening,
        before=before,
        closing=closing[0] if closing else tokenizer.eos_token,
        after=after,
        control=re.compile(f"(?={control}).", re.DOTALL),
    )


def _variables(tokenizer: "PreTrainedTokenizerBase", template: str, jinja: str) -> dict[str, Any]:
    variables = dict(tokenizer.special_tokens_map)
    if template in TEMPLATES:
        missing = [t for t in NEEDED_TOKENS.get(template, ()) if t not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"{option('data.template')} is {template!r}, but the tokenizer has no token {missing[0]!r}; use "
                f"auto, hh or plain, e.g. {flag('data.template')}=hh"
            )
        if tokenizer.eos_token is None and "eos_token" in jinja:
            raise _endless()
        variables["bos_token"] = tokenizer.bos_token if adds_bos(tokenizer) else ""
    return {name: str(value) if isinstance(value, str) else value for name, value in variables.items()}


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer puts BOS before a text, as models with one expect."""
    return tokenizer.bos_token is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def _turns(layout: Layout, whole: str) -> str:
    """What a template writes around turns, without what it writes around the thought of the last."""
    turns = [Message("user", "x"), Message("assistant", "x"), Message("user", "x")]
    try:
        return layout.render(turns, generates=False)
    except UserError:
        return whole


def _control(tokenizer: "PreTrainedTokenizerBase", turns: str, *, thoughts: str) -> str:
    """A pattern of the tokens that a message may only spell out: special ones, and those that stand around turns.

    The tags of a thought are none of them: a response has them as tokens. A token of a single character cannot be
    broken up; no model here has one.
    """
    tags = {f"<{end}{name}>" for name in re.findall(r"</?(\w+)>", thoughts) for end in ("", "/")}
    added = [t for t in tokenizer.added_tokens_decoder.values() if len(t.content) > 1 and not t.content.isspace()]
    control = {t.content for t in added if t.special or t.content in turns} - tags
    return f"(?:{'|'.join(map(re.escape, sorted(control, key=len, reverse=True))) or '(?!)'})"  # (?!) matches nothing


def _instead(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A named template that the tokenizer can write."""
    vocabulary = tokenizer.get_vocab()
    fitting = [name for name, tokens in NEEDED_TOKENS.items() if all(token in vocabulary for token in tokens)]
    return fitting[0] if fitting else "hh"


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _endless() -> UserError:
    return UserError(
        "the tokenizer has no end-of-sequence token, so a response could not end; give one that has, e.g. "
        f"{flag('data.tokenizer')}=org/name, or a chat template that ends a turn, e.g. {flag('data.template')}=chatml"
    )
