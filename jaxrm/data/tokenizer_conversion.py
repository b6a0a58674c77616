"""Tokenizers of ``transformers`` built from a sentencepiece model or from the metadata of a GGUF file.

``transformers`` reads neither without the model's config beside it, and GGUF only where torch is installed. Both files
hold the same: pieces, their scores and their kinds. The numbers of the kinds agree: 1 normal, 2 unknown, 3 control,
4 user-defined, 5 unused, 6 byte.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrm.data.added_tokens import AddedToken, read_added_tokens
from jaxrm.errors import UserError, flag

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"  # how sentencepiece writes a space
_PLACEHOLDER = re.compile("unused|reserved", re.IGNORECASE)  # normal pieces that later tokens take the place of

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# tokenizer.ggml.pre -> how text is split before byte-level merges, as llama.cpp names and does it; "digits" is one
# digit at a time and then the split of GPT-2.
_BYTE_LEVEL_SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "smaug-bpe": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
}


@dataclass(frozen=True)
class _Vocabulary:
    """Pieces in the order of their ids, and how sentencepiece normalizes text before it splits it.

    Attributes:
      pieces: their texts.
      scores: their scores.
      kinds: their kinds, from ``_NORMAL`` to ``_BYTE``.
      unknown_id: id of the unknown token.
      unigram: whether it is a unigram model, not BPE.
      add_prefix_space: a space is put before a text.
      prefix_first: only before the first one, not behind added tokens too.
      collapse_spaces: spaces in a row become one.
      charsmap: characters that are replaced, as sentencepiece compiles them.
      added: tokens that the files beside the model list, by id.
      isolates: user-defined pieces are part of the text, with no space put behind them; else they are added tokens.
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    unknown_id: int
    unigram: bool = False
    add_prefix_space: bool = True
    prefix_first: bool = False
    collapse_spaces: bool = False
    charsmap: bytes = b""
    added: dict[int, AddedToken] = field(default_factory=dict)
    isolates: bool = False

    def pieces_of_kind(self, kind: int) -> list[str]:
        return [piece for piece, own_kind in zip(self.pieces, self.kinds, strict=True) if own_kind == kind]


def from_sentencepiece(file: Path) -> "PreTrainedTokenizerBase":
    """Build a tokenizer from a sentencepiece model, with BOS first as in Llama and Gemma.

    Added tokens and settings (BOS, EOS, padding, chat template) in the files beside it apply, see
    `jaxrm.data.added_tokens`.

    Raises:
      UserError: it is not a sentencepiece model, or its added tokens do not fit it.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made at import time
    model = messages.ModelProto()
    with suppress(DecodeError):
        model.ParseFromString(file.read_bytes())
    if not model.pieces:
        raise UserError(f"{file} is not a sentencepiece model; fetch it again")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    beside = read_added_tokens(file.parent)
    settings = beside.settings
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise UserError(f"{file} is a sentencepiece model of words or characters; required is BPE or unigram")
    vocabulary = _Vocabulary(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        trainer.unk_id,
        unigram=trainer.model_type == trainer.UNIGRAM,
        add_prefix_space=normalizer.add_dummy_prefix,
        prefix_first=not settings.pop("legacy", True),
        collapse_spaces=normalizer.remove_extra_whitespaces,
        charsmap=normalizer.precompiled_charsmap,
        isolates=normalizer.add_dummy_prefix,
    )
    vocabulary = _with_added(vocabulary, beside.by_id, file)
    names = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    names["unk_token"] = trainer.unk_id
    if max(names.values()) >= len(vocabulary.pieces):
        raise UserError(f"{file} is damaged: a special token is none of its pieces; fetch it again")
    special = {name: vocabulary.pieces[token] for name, token in names.items() if token >= 0}
    tokenizer = _wrap(_sentencepiece_backend(vocabulary), special, settings)
    for id_, token in beside.by_id.items():
        if tokenizer.convert_tokens_to_ids(token.content) != id_:
            raise UserError(
                f"the added token {token.content!r} of {file.parent} cannot have the id {id_}; save the tokenizer with "
                "transformers' save_pretrained, which writes tokenizer.json"
            )
    return tokenizer


def _with_added(vocabulary: _Vocabulary, added: dict[int, AddedToken], file: Path) -> _Vocabulary:
    """The vocabulary with added tokens: in the place of pieces that were left free for them, or behind all pieces."""
    pieces, scores, kinds = list(vocabulary.pieces), list(vocabulary.scores), list(vocabulary.kinds)
    for id_, token in sorted(added.items()):
        if id_ >= len(pieces):
            break
        is_free = kinds[id_] in (_CONTROL, _USER_DEFINED, _UNUSED)
        is_free = is_free or (kinds[id_] == _NORMAL and _PLACEHOLDER.search(pieces[id_]) is not None)
        if pieces[id_] != token.content and not is_free:
            raise UserError(
                f"the files beside {file} say that id {id_} is {token.content!r}, but there it is {pieces[id_]!r}; "
                "use the files that belong to it"
            )
        pieces[id_] = token.content
        if kinds[id_] != _UNKNOWN:
            kinds[id_] = _CONTROL if token.special else _USER_DEFINED
    behind = [id_ for id_ in sorted(added) if id_ >= len(pieces)]
    if vocabulary.unigram and behind != list(range(len(pieces), len(pieces) + len(behind))):
        raise UserError(f"the added tokens of {file.parent} leave ids without a token; save it with tokenizer.json")
    ids: dict[str, int] = {}
    for id_, piece in enumerate(pieces):
        if ids.setdefault(piece, id_) != id_:
            raise UserError(f"{file} and the files beside it have {piece!r} twice, with ids {ids[piece]} and {id_}")
    for id_ in behind:
        if added[id_].content in ids:
            raise UserError(
                f"the files beside {file} say that {added[id_].content!r} is id {id_}, but there it is "
                f"{ids[added[id_].content]}; use the files that belong to it"
            )
    return replace(vocabulary, pieces=pieces, scores=scores, kinds=kinds, added=added)


def from_gguf(file: Path) -> "PreTrainedTokenizerBase":
    """Build the tokenizer that a GGUF file describes, with its chat template.

    Raises:
      UserError: it is not a GGUF file, or its kind of tokenizer or text split is not supported.
    """
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
    except (ValueError, OSError, IndexError) as error:
        raise UserError(f"{file} is not a GGUF file that can be read ({error}); fetch it again") from error
    prefix = "tokenizer.ggml."
    tokenizer_fields = {name: field for name, field in fields.items() if name.startswith(prefix)}
    metadata = {name.removeprefix(prefix): field.contents() for name, field in tokenizer_fields.items()}
    kind = metadata.get("model")
    if "tokens" not in metadata or kind not in ("gpt2", "llama"):
        raise UserError(f"{file} has a tokenizer of kind {kind!r}; required is 'gpt2' or 'llama'")
    pieces = metadata["tokens"]
    vocabulary = _Vocabulary(
        # Gemma's file writes runs of spaces as they are.
        [piece.replace(" ", _SPACE) for piece in pieces] if kind == "llama" else pieces,
        metadata.get("scores") or [-float(index) for index in range(len(pieces))],
        metadata.get("token_type") or [_NORMAL] * len(pieces),
        metadata.get("unknown_token_id", 0),
        add_prefix_space=metadata.get("add_space_prefix", True),
    )
    if kind == "llama":
        backend = _sentencepiece_backend(vocabulary)
    else:
        backend = _byte_level_backend(vocabulary, metadata.get("merges") or [], metadata.get("pre", "default"), file)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"{key}_token_id") for name, key in names.items()}
    special = {name: pieces[token] for name, token in ids.items() if token is not None}
    settings: dict[str, Any] = {}
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"].contents()
    return _wrap(backend, special, settings, add_bos=metadata.get("add_bos_token", kind == "llama"))


def _sentencepiece_backend(vocabulary: _Vocabulary) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE, Unigram

    ids = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    byte_fallback = _BYTE in vocabulary.kinds
    isolated = _isolated(vocabulary)
    if vocabulary.unigram:
        # A piece that text never becomes gets a score that no path can afford.
        scored = [
            (piece, score if kind in (_NORMAL, _USER_DEFINED, _UNKNOWN) else -1e6)
            for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True)
        ]
        model: BPE | Unigram = Unigram(scored, vocabulary.unknown_id, byte_fallback)
    else:
        behind = {token.content: id_ for id_, token in vocabulary.added.items() if id_ >= len(vocabulary.pieces)}
        model = BPE(
            ids | behind,
            _merges(vocabulary, ids),
            unk_token=vocabulary.pieces[vocabulary.unknown_id],
            fuse_unk=True,
            byte_fallback=byte_fallback,
            ignore_merges=bool(isolated),  # each of them stands alone
        )
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.collapse_spaces:
        # Other white space, such as line breaks, stays.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.add_prefix_space and not vocabulary.prefix_first:
        steps.append(normalizers.Prepend(_SPACE))  # after every special token too, as Llama 2 was trained
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    splits: list[Any] = []
    if vocabulary.add_prefix_space and vocabulary.prefix_first:
        splits.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False))
    if isolated:
        pattern = "|".join(re.escape(piece) for piece in sorted(isolated, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_prefix_space:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    _add_tokens(backend, vocabulary)
    return backend


def _isolated(vocabulary: _Vocabulary) -> list[str]:
    """User-defined pieces that are part of the text: it is cut around them, and no space is put behind them."""
    if not vocabulary.isolates:
        return []
    own = zip(vocabulary.pieces, vocabulary.kinds, strict=True)
    return [piece for i, (piece, kind) in enumerate(own) if kind == _USER_DEFINED and i not in vocabulary.added]


def _merges(vocabulary: _Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best piece first, as sentencepiece's BPE does step by step.

    Where scores are equal (Llama's runs of spaces), sentencepiece goes from left to right. Putting the longer left part
    first has the same effect.
    """
    usable = {piece for piece, kind in zip(vocabulary.pieces, vocabulary.kinds, strict=True) if kind == _NORMAL}
    merges = []
    for piece in usable:
        rank = -vocabulary.scores[ids[piece]]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                merges.append((rank, -len(left), -len(right), ids[piece], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _byte_level_backend(vocabulary: _Vocabulary, merges: Sequence[str], pre_tokenizer: str, file: Path) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    if pre_tokenizer not in _BYTE_LEVEL_SPLITS:
        raise UserError(
            f"{file} splits text in a way that is not known here ({pre_tokenizer!r}); take the tokenizer from the "
            f"hub or a folder with tokenizer.json, e.g. {flag('data.tokenizer')}=org/name"
        )
    ids = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    backend = Tokenizer(
        BPE(ids, [(left, right) for left, right in (merge.split(" ") for merge in merges)], fuse_unk=True)
    )
    split = _BYTE_LEVEL_SPLITS[pre_tokenizer]
    steps: list[Any] = []
    if split == "digits":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif split:
        steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits")))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, vocabulary)
    return backend


def _add_tokens(backend: "Tokenizer", vocabulary: _Vocabulary) -> None:
    """Add control pieces as special tokens, and user-defined ones as tokens that are never split."""
    from tokenizers import AddedToken

    listed = {token.content for token in vocabulary.added.values()}
    control = [piece for piece in vocabulary.pieces_of_kind(_CONTROL) if piece not in listed]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    if not vocabulary.isolates:
        user_defined = [piece for piece in vocabulary.pieces_of_kind(_USER_DEFINED) if piece not in listed]
        # A run of spaces exists only after normalization.
        backend.add_tokens([AddedToken(t, normalized=_SPACE in t) for t in user_defined])
    for _, token in sorted(vocabulary.added.items()):
        flags = {"normalized": not token.special} | dict(token.flags)
        if vocabulary.add_prefix_space:
            flags["normalized"] = False  # found in the raw text, or the space before a text would hide it
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([AddedToken(token.content, special=token.special, **flags)])


def _wrap(
    backend: "Tokenizer", special: dict[str, str], settings: dict[str, Any], add_bos: bool = True
) -> "PreTrainedTokenizerBase":
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    add_bos = settings.pop("add_bos_token", add_bos) and "bos_token" in special
    arguments = {**special, **settings}
    if add_bos:
        bos = arguments["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **arguments)
