"""A question to a judge: a plain text file, into which texts of others are inserted as quotations.

In the file stand words in braces, ``{response}``. Each inserted text stands between two lines with a code that occurs
in none of the texts, so nothing in it can end the quotation. What is inserted is not searched for words in braces
again. A file is never executed.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from jaxrm.errors import UserError, flag, option

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_MOST_CHARACTERS = 200_000  # of a file; a larger one is something else


def placeholders(template: str) -> list[str]:
    """The words in braces of a template, in their order."""
    return _PLACEHOLDER.findall(template)


def fill(template: str, texts: Mapping[str, str], plain: Mapping[str, str] | None = None) -> str:
    """The template with texts in the place of words in braces.

    Args:
      template: as `read_question` gives it.
      texts: of others, by word, which are quoted.
      plain: our own, which are not.
    """
    code = _code(dict(texts))
    inserted = {name: _quote(name, text, code) for name, text in texts.items()} | dict(plain or {})
    return _PLACEHOLDER.sub(lambda match: inserted[match[1]], template)


def read_question(
    path: Path, field: str, *, given: str | None, required: Collection[str], known: Collection[str]
) -> str:
    """Read a template.

    Args:
      path: the file.
      field: of the config that names it.
      given: what the field says.
      required: words in braces that must stand in it.
      known: words in braces that may.

    Raises:
      UserError: there is no such file, or it lacks a word or has another one.
    """
    words = " and ".join(f"{{{name}}}" for name in required)
    example = f"{flag(field)}={path.name}"
    where = f"{option(field)} is {given!r}"
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no UTF-8 text"
        raise UserError(
            f"{where}, which cannot be read ({reason}); give a text file with {words} in it, e.g. {example}"
        ) from error
    names = placeholders(template)
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(f"{{{name}}}" for name in known)
        raise UserError(
            f"{where}, which has {{{unknown[0]}}}; it may have {listed} and no other word in braces, e.g. {example}"
        )
    missing = [name for name in required if name not in names]
    if missing:
        raise UserError(f"{where}, which has no {{{missing[0]}}}; give a text file with {words} in it, e.g. {example}")
    if len(template) > _MOST_CHARACTERS:
        raise UserError(
            f"{where}, which has {len(template):,} characters; give at most {_MOST_CHARACTERS:,}, e.g. {example}"
        )
    return template


def _code(texts: dict[str, str]) -> str:
    """Eight hex digits that occur in none of the texts, the same for the same texts, so that answers can be cached."""
    attempt = 0
    while True:
        code = hashlib.sha256(json.dumps([attempt, texts]).encode()).hexdigest()[:8]
        if not any(code in text.lower() for text in texts.values()):
            return code
        attempt += 1


def _quote(name: str, text: str, code: str) -> str:
    mark = f"{name.upper()} {code}"
    return f"<<<BEGIN {mark}>>>\n{text}\n<<<END {mark}>>>"
