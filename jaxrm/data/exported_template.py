"""A chat template as an exported model carries it, so that ``transformers`` writes what the model was trained with."""

import re
from typing import TYPE_CHECKING

from jaxrm.data.layout import open_layout
from jaxrm.data.template_sandbox import DATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


def exported_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> str:
    """The template in Jinja, alone: without what jaxrm says to it in a run.

    A named one writes no BOS where the tokenizer adds none. A template that asks for the day gets the one that it had
    in training.

    Raises:
      UserError: there is no such template.
    """
    layout = open_layout(tokenizer, template)
    jinja = layout.jinja
    if tokenizer.bos_token is not None and layout.variables.get("bos_token") == "":
        jinja = "{% set bos_token = '' +%}" + jinja
    formats = {match[2] for match in _TODAY.finditer(jinja)}
    if formats:
        days = ", ".join(f"{text!r}: {DATE.strftime(text)!r}" for text in sorted(formats))
        jinja = "{% macro strftime_now(format) %}{{ {" + days + "}[format] }}{% endmacro +%}" + jinja
    return jinja


def set_exported_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> None:
    """Make a template the tokenizer's own, beside others that it has under names."""
    jinja = exported_template(tokenizer, template)
    own = tokenizer.chat_template
    tokenizer.chat_template = {**own, "default": jinja} if isinstance(own, dict) else jinja
