"""Tokenizers, through ``transformers``: from the hub, a folder, a lone sentencepiece model, or a GGUF file."""

import re
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxrm.data.added_tokens import read_object
from jaxrm.data.tokenizer_conversion import from_sentencepiece
from jaxrm.data.tokenizer_gguf import from_gguf
from jaxrm.errors import UserError, flag
from jaxrm.gguf_file import gguf_parts, models_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how sentencepiece writes a token that is one byte of a character
_USE = re.compile("pad|unused|reserved", re.IGNORECASE)  # in the names of tokens to pad with
_UNFINISHED = "\ufffd"  # what a character is decoded to while bytes of it are missing
_WINDOW, _CONTEXT = 12, 4  # tokens decoded together; those before them that a token's text may depend on


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer. It needs no torch, and runs no code of the tokenizer's author.

    Args:
      path: a hub name, a .gguf file, or a folder. The folder holds tokenizer.json (or other files that
        ``transformers`` reads), or only a sentencepiece tokenizer.model, or exactly one .gguf file.

    Raises:
      UserError: there is nothing, or nothing that can be read as a tokenizer.
    """
    location = Path(path).expanduser()
    try:
        tokenizer = _load(path, location)
        _check_usable(tokenizer, location)
        return tokenizer
    except UserError:
        raise
    except BaseException as error:  # tokenizer files are parsed by several libraries, each with errors of its own
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # that of tokenizers' Rust
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"tokenizer {path!r} could not be loaded: {reason}; give a folder with tokenizer.json or "
            f"tokenizer.model, a .gguf file, or a hub name, e.g. {flag('data.tokenizer')}=org/name"
        ) from error


def _load(path: str, location: Path) -> "PreTrainedTokenizerBase":
    if location.is_file() and location.suffix == ".gguf":
        return from_gguf(gguf_parts(location)[0])
    if location.is_file() and location.suffix == ".model":
        return from_sentencepiece(location)
    if location.is_dir():
        return _from_folder(location)
    if location.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UserError(
            f"tokenizer {path!r} is neither a folder, a .gguf file nor a hub name; "
            f"e.g. {flag('data.tokenizer')}=org/name"
        )
    return _from_transformers(path)


def _check_usable(tokenizer: "PreTrainedTokenizerBase", location: Path) -> None:
    """Refuse a tokenizer that cannot split a text, or gives an added token another id than its file says."""
    ids = tokenizer("a b\n1", add_special_tokens=False)["input_ids"]
    tokenizer.decode(ids)
    file = location / "tokenizer.json"
    if not file.is_file():
        return
    for entry in read_object(file).get("added_tokens") or []:
        if tokenizer.convert_tokens_to_ids(entry["content"]) != entry["id"]:
            raise UserError(
                f"{file} says that the token {entry['content']!r} has the id {entry['id']}, which its vocabulary has "
                "no place for; fetch it again"
            )


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, each atomically."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        tokenizer.save_pretrained(temporary)
        for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
            destination = target / file.relative_to(temporary)
            destination.parent.mkdir(exist_ok=True)
            file.replace(destination)


def pad_apart_from(
    tokenizer: "PreTrainedTokenizerBase", ends: Collection[int], num_rows: int, template: str = ""
) -> None:
    """Give the tokenizer a padding token that no row of tokens has, if its own may stand in one.

    Classifiers of transformers read their score at the last token that is not padding, by its id. Earlier versions read
    it before the first one that is, so BOS cannot be it.

    Args:
      tokenizer: changed in place.
      ends: ids that end a response.
      num_rows: rows of the model's embedding table.
      template: text of the chat template, whose tokens stand in rows.

    Raises:
      UserError: the tokenizer has no special token to spare, and the model no row for a new one.
    """
    taken = {*ends, tokenizer.bos_token_id, tokenizer.eos_token_id}

    def is_free(id_: int | None) -> bool:
        if id_ is None or id_ in taken or id_ >= num_rows:
            return False
        return str(tokenizer.convert_ids_to_tokens(id_)) not in template

    if is_free(tokenizer.pad_token_id):
        return
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    candidates = {*special, *tokenizer.all_special_ids}
    free = {id_: str(tokenizer.convert_ids_to_tokens(id_)) for id_ in candidates if is_free(id_)}
    # Those that are made for it come first, the unknown token last: text may become it.
    order = sorted(free, key=lambda id_: (id_ == tokenizer.unk_token_id, _USE.search(free[id_]) is None, id_))
    if order:
        tokenizer.pad_token = free[order[0]]
        return
    ids = {*tokenizer.get_vocab().values()}
    if max(ids) + 1 >= num_rows or "<pad>" in tokenizer.get_vocab():
        raise UserError(
            "the tokenizer has no special token that never stands in a row, and a classifier needs one to pad with; "
            "add one, e.g. tokenizer.add_special_tokens({'pad_token': '<pad>'}), where the model has room for it"
        )
    tokenizer.add_special_tokens({"pad_token": "<pad>"})


class Vocabulary(NamedTuple):
    """What token ids mean to a model.

    Attributes:
      tokenizer: of the model.
      size: ids that it has embeddings for.
      name: of the model, for messages.
    """

    tokenizer: "PreTrainedTokenizerBase"
    size: int
    name: str


def token_ranges(tokenizer: "PreTrainedTokenizerBase", num_rows: int) -> tuple[tuple[int, int], ...]:
    """Ids below ``num_rows`` that have a token, as ranges ``(first, last + 1)``; ``()`` where all of them have one."""
    ids = sorted({token for token in tokenizer.get_vocab().values() if 0 <= token < num_rows})
    if len(ids) == num_rows:
        return ()
    firsts = [b for a, b in zip([None, *ids], ids, strict=False) if a is None or b != a + 1]
    lasts = [a for a, b in zip(ids, [*ids[1:], None], strict=True) if b is None or b != a + 1]
    return tuple((first, last + 1) for first, last in zip(firsts, lasts, strict=True))


def first_without_row(tokenizer: "PreTrainedTokenizerBase", num_rows: int, template: str) -> tuple[int, str] | None:
    """The first token that text can become and that a model of ``num_rows`` embeddings has no row for, or None.

    A special token counts where it is BOS, EOS or the unknown token, or the template writes it. No other text becomes
    one, such as the image token of a model that reads images too.

    Args:
      tokenizer: as ``load_tokenizer`` returns it.
      num_rows: rows of the model's embedding table.
      template: text of the chat template.

    Returns:
      Its id and its text.
    """
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    outside = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= num_rows)
    reached = (item for item in outside if item[0] not in special or item[0] in named or item[1] in template)
    return next(reached, None)


def vocabulary_conflict(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> str | None:
    """The first id at which two tokenizers differ, in words; None where their common tokens agree.

    One may have more tokens than the other, as an extended vocabulary has.
    """
    first, second = one.get_vocab(), other.get_vocab()
    token_of = {id_: token for token, id_ in second.items()}
    for token, id_ in sorted(first.items(), key=lambda item: item[1]):
        if token_of.get(id_, token) != token:
            return f"token id {id_} is {token!r} in the one and {token_of[id_]!r} in the other"
        if second.get(token, id_) != id_:
            return f"{token!r} is token id {id_} in the one and {second[token]} in the other"
    return None


def unreadable_by(reader: Vocabulary, writer: Vocabulary) -> str | None:
    """Why one model cannot read all that another may write, in words; None where it can.

    The tokens that they share are one matter, see `vocabulary_conflict`. This is about those that the reader lacks.
    """
    conflict = vocabulary_conflict(reader.tokenizer, writer.tokenizer)
    if conflict is not None:
        return conflict
    known = {id_ for id_ in reader.tokenizer.get_vocab().values() if id_ < reader.size}
    written = sorted((id_, token) for token, id_ in writer.tokenizer.get_vocab().items() if id_ < writer.size)
    lacking = next((item for item in written if item[0] not in known), None)
    if lacking is None:
        return None
    return f"{writer.name} has {lacking[1]!r}, id {lacking[0]}, for which {reader.name} has no token"


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """The text that each token adds. Joined, they are the decoded ids with special tokens as they are written.

    A character of several tokens comes with the last of them, and the others add "". Ids without a token add "" too.

    Args:
      tokenizer: as ``load_tokenizer`` returns it.
      ids: token ids, not negative.
    """
    pieces = tokenizer.convert_ids_to_tokens([int(token) for token in ids])
    known = [i for i, piece in enumerate(pieces) if piece is not None]
    texts = [""] * len(pieces)
    added = _added_texts(tokenizer, [int(ids[i]) for i in known], [bool(_BYTE.fullmatch(pieces[i])) for i in known])
    for i, text in zip(known, added, strict=True):
        texts[i] = text
    return texts


def _added_texts(tokenizer: "PreTrainedTokenizerBase", ids: list[int], is_byte: list[bool]) -> list[str]:
    """Decode a growing window of tokens. Once it is long enough, a new one starts with its end."""
    texts: list[str] = []
    start, done = 0, 0  # where the window begins, and how many of its characters are given to tokens
    while len(texts) < len(ids):
        i = len(texts)
        # Byte tokens in a row are decoded as a whole, since one wrong byte spoils all of them.
        stop = next((j for j in range(i, len(ids)) if not is_byte[j]), len(ids)) if is_byte[i] else i + 1
        text = _decode(tokenizer, ids[start:stop])
        # The last character may not be whole yet; further tokens change nothing before it.
        is_incomplete = text.endswith(_UNFINISHED) and not is_byte[i] and stop < len(ids)
        added = text[done : len(text) - is_incomplete]
        texts += _byte_texts(added, stop - i) if is_byte[i] else [added]
        done = len(text) - is_incomplete
        if stop - start > _WINDOW:
            start = stop - _CONTEXT
            done = len(_decode(tokenizer, ids[start:stop])) - is_incomplete
    return texts


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _byte_texts(text: str, count: int) -> list[str]:
    """The text of ``count`` byte tokens, each character at the token that completes it."""
    if text == _UNFINISHED * count:  # not UTF-8
        return list(text)
    texts = [part for char in text for part in [*[""] * (len(char.encode()) - 1), char]]
    return texts if len(texts) == count else [*[""] * (count - 1), text]


def _from_folder(folder: Path) -> "PreTrainedTokenizerBase":
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return from_sentencepiece(folder / "tokenizer.model")
    if any((folder / name).is_file() for name in _FILES):
        return _from_transformers(str(folder))
    gguf_files = models_in(folder)
    if len(gguf_files) == 1:
        return from_gguf(gguf_files[0])
    names = ", ".join(file.name for file in gguf_files)
    contents = f"{len(gguf_files)} .gguf files: {names}" if gguf_files else "no tokenizer file"
    raise UserError(
        f"{folder} has {contents}; required is one of {', '.join(_FILES[:2])}, or exactly one .gguf file; "
        f"name one, e.g. {flag('data.tokenizer')}=folder/model.gguf"
    )


def _from_transformers(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
