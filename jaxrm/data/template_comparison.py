"""Whether two templates, each with its tokenizer, write the same."""

from typing import TYPE_CHECKING

from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt, encode_response
from jaxrm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = tuple["PreTrainedTokenizerBase", str]  # a tokenizer, and the name of a template that it writes

_QUESTION, _RESPONSE, _SYSTEM = Message("user", "a"), Message("assistant", "a"), Message("system", "a")
_PROMPTS = ((_QUESTION,), (_QUESTION, _RESPONSE, _QUESTION), (_SYSTEM, _QUESTION))
_RESPONSES = ("a", "<think>\na\n</think>\n\na")


def write_alike(one: Template, other: Template) -> bool:
    """Whether a question, a dialogue, a system text and a response have the same ids under both, or are refused."""
    return all(_prompt(one, i) == _prompt(other, i) for i in range(len(_PROMPTS))) and all(
        _response(one, text) == _response(other, text) for text in _RESPONSES
    )


def _prompt(template: Template, i: int) -> list[int] | None:
    try:
        return encode_prompt(template[0], _PROMPTS[i], template[1])
    except UserError:
        return None


def _response(template: Template, text: str) -> list[int] | None:
    try:
        return encode_response(template[0], text, template[1])
    except UserError:
        return None
