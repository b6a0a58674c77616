"""Tokens that were added to a sentencepiece model after its training, as the files beside it list them.

``transformers`` has written them in three places over the years: ``added_tokens.json`` (text to id),
``added_tokens_decoder`` in ``tokenizer_config.json`` (id to text and flags), and ``special_tokens_map.json`` (what BOS,
EOS and others are called). All of them are read. Where they contradict each other, the folder is refused.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxrm.errors import UserError

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_SETTINGS = ("chat_template", "model_max_length", "add_bos_token", "legacy")
_MAX_ID = 10_000_000  # far above any vocabulary: an id is a row of the embedding


@dataclass(frozen=True)
class AddedToken:
    """A token that text never merges with.

    Attributes:
      content: its text.
      special: whether it is left out of decoded text.
      flags: of ``tokenizers.AddedToken``: which white space around it belongs to it, and such.
    """

    content: str
    special: bool
    flags: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True)
class AddedTokens:
    """What the files beside a sentencepiece model say.

    Attributes:
      by_id: tokens whose ids are listed.
      settings: arguments of ``PreTrainedTokenizerFast``: names of special tokens, the chat template, and such.
    """

    by_id: dict[int, AddedToken]
    settings: dict[str, Any]


def read_added_tokens(folder: Path) -> AddedTokens:
    """Read the added tokens and the settings that lie beside a ``tokenizer.model``.

    Raises:
      UserError: a file is damaged, or contradicts another one.
    """
    config_file = folder / "tokenizer_config.json"
    config = read_object(config_file)
    settings = {name: config[name] for name in (*_NAMED, *_LISTS, *_SETTINGS) if config.get(name) is not None}
    has_decoder = config.get("added_tokens_decoder") is not None
    if not has_decoder:  # as in transformers, where it replaces the older files
        named = read_object(folder / "special_tokens_map.json")
        settings |= {name: named[name] for name in (*_NAMED, *_LISTS) if named.get(name) is not None}
    settings = _with_plain_texts(settings, config_file)
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text("utf-8")
    special = {settings[name] for name in _NAMED if name in settings} | set(settings.get(_LISTS[0], []))
    by_id: dict[int, AddedToken] = {}
    decoder = config.get("added_tokens_decoder") if has_decoder else {}
    if not isinstance(decoder, dict):
        raise UserError(f"{config_file}: added_tokens_decoder is {_short(decoder)}; it must be an object of ids")
    for text, entry in decoder.items():
        if not isinstance(entry, dict):
            raise UserError(f"{config_file}: added_tokens_decoder has {_short(entry)} for id {text}, which is no token")
        content = _content(entry, config_file)
        flags = tuple((name, bool(entry[name])) for name in _FLAGS if name in entry)
        by_id[_id(text, config_file)] = AddedToken(content, bool(entry.get("special")) or content in special, flags)
    _add_older(by_id, folder / "added_tokens.json", special)
    _check_once(by_id, folder)
    return AddedTokens(by_id, settings)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises:
      UserError: it is something else.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON; fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a JSON {type(values).__name__}; it must be an object; fetch it again")
    return values


def _add_older(by_id: dict[int, AddedToken], file: Path, special: set[str]) -> None:
    for content, number in read_object(file).items():
        id_ = _id(number, file)
        if not content:
            raise UserError(f"{file} lists an empty token; remove it")
        other = by_id.setdefault(id_, AddedToken(content, content in special))
        if other.content != content:
            raise UserError(
                f"{file} says that id {id_} is {content!r}, but tokenizer_config.json that it is {other.content!r}; "
                "remove the one that is wrong"
            )


def _check_once(by_id: dict[int, AddedToken], folder: Path) -> None:
    ids: dict[str, int] = {}
    for id_, token in by_id.items():
        if ids.setdefault(token.content, id_) != id_:
            raise UserError(
                f"the added tokens of {folder} have {token.content!r} twice, with ids {ids[token.content]} and {id_}; "
                "remove the one that is wrong"
            )


def _with_plain_texts(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings with every token as its text, and the lists of special tokens as one."""
    texts = {name: _content(value, file) if name in _NAMED else value for name, value in settings.items()}
    joined: list[str] = []
    for name in _LISTS:
        values = texts.pop(name, [])
        if not isinstance(values, list | dict):
            raise UserError(f"{file}: {name} is {_short(values)}; it must be a list of tokens")
        # An object has names of one's own: {"image_token": "<image>"}.
        entries = values.values() if isinstance(values, dict) else values
        joined += [_content(entry, file) for entry in entries]
    if joined:
        texts[_LISTS[0]] = list(dict.fromkeys(joined))
    for name in ("add_bos_token", "legacy"):
        if not isinstance(texts.get(name, False), bool):
            raise UserError(f"{file}: {name} is {_short(texts[name])}; it must be true or false")
    length = texts.get("model_max_length", 1)
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise UserError(f"{file}: model_max_length is {_short(length)}; it must be a number of tokens")
    return texts


def _content(value: Any, file: Path) -> str:
    """Text of a token that is written as such, or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise UserError(f"{file} has {_short(value)} where the text of a token belongs; fetch it again")
    return content


def _id(value: Any, file: Path) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()) or not int(text[:20]) < _MAX_ID:
        raise UserError(f"{file} has the token id {_short(value)}; it must be a whole number from 0 to {_MAX_ID - 1}")
    return int(text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
