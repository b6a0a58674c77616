"""Tokenizers of ``transformers`` built from a sentencepiece model, or from the same things in another file.

``transformers`` reads no such model without the model's config beside it, and GGUF only where torch is installed. Both
files hold the same: pieces, their scores and their kinds. The numbers of the kinds agree: 1 normal, 2 unknown,
3 control, 4 user-defined, 5 unused, 6 byte. See `jaxrm.data.tokenizer_gguf` for the other file.
"""

import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrm.data.added_tokens import AddedToken, read_added_tokens
from jaxrm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
SPACE = "\u2581"  # how sentencepiece writes a space
_PLACEHOLDER = re.compile("unused|reserved", re.IGNORECASE)  # normal pieces that later tokens take the place of


@dataclass(frozen=True)
class PieceVocabulary:
    """Pieces in the order of their ids, and how sentencepiece normalizes text before it splits it.

    Attributes:
      pieces: their texts.
      scores: their scores.
      kinds: their kinds, from ``NORMAL`` to ``_BYTE``.
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
        """Texts of the pieces of one kind, in the order of their ids."""
        return [piece for piece, own_kind in zip(self.pieces, self.kinds, strict=True) if own_kind == kind]

    def ids(self) -> dict[str, int]:
        """Id of each piece, but for those that only fill up the vocabulary, as llama.cpp calls them.

        Raises:
          UserError: two pieces are the same.
        """
        ids: dict[str, int] = {}
        for id_, (piece, kind) in enumerate(zip(self.pieces, self.kinds, strict=True)):
            if kind == _UNUSED and piece == f"[PAD{id_}]":
                continue
            if ids.setdefault(piece, id_) != id_:
                raise UserError(f"the tokenizer has {piece!r} twice, with ids {ids[piece]} and {id_}; fetch it again")
        return ids


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
    vocabulary = PieceVocabulary(
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
    tokenizer = wrap(sentencepiece_backend(vocabulary), special, settings)
    for id_, token in beside.by_id.items():
        if tokenizer.convert_tokens_to_ids(token.content) != id_:
            raise UserError(
                f"the added token {token.content!r} of {file.parent} cannot have the id {id_}; save the tokenizer with "
                "transformers' save_pretrained, which writes tokenizer.json"
            )
    return tokenizer


def _with_added(vocabulary: PieceVocabulary, added: dict[int, AddedToken], file: Path) -> PieceVocabulary:
    """The vocabulary with added tokens: in the place of pieces that were left free for them, or behind all pieces."""
    pieces, scores, kinds = list(vocabulary.pieces), list(vocabulary.scores), list(vocabulary.kinds)
    for id_, token in sorted(added.items()):
        if id_ >= len(pieces):
            break
        is_free = kinds[id_] in (_CONTROL, _USER_DEFINED, _UNUSED)
        is_free = is_free or (kinds[id_] == NORMAL and _PLACEHOLDER.search(pieces[id_]) is not None)
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
    renamed = replace(vocabulary, pieces=pieces, scores=scores, kinds=kinds, added=added)
    ids = renamed.ids()
    for id_ in behind:
        if added[id_].content in ids:
            raise UserError(
                f"the files beside {file} say that {added[id_].content!r} is id {id_}, but there it is "
                f"{ids[added[id_].content]}; use the files that belong to it"
            )
    return renamed


def sentencepiece_backend(vocabulary: PieceVocabulary) -> "Tokenizer":
    """The tokenizer of a sentencepiece model, without BOS and without names of its special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE, Unigram

    ids = vocabulary.ids()
    byte_fallback = _BYTE in vocabulary.kinds
    isolated = _isolated(vocabulary)
    if vocabulary.unigram:
        # A piece that text never becomes gets a score that no path can afford.
        scored = [
            (piece, score if kind in (NORMAL, _USER_DEFINED, _UNKNOWN) else -1e6)
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
        steps.append(normalizers.Prepend(SPACE))  # after every special token too, as Llama 2 was trained
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    splits: list[Any] = []
    if vocabulary.add_prefix_space and vocabulary.prefix_first:
        splits.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if isolated:
        pattern = "|".join(re.escape(piece) for piece in sorted(isolated, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if splits:
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_prefix_space:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    add_tokens(backend, vocabulary)
    return backend


def _isolated(vocabulary: PieceVocabulary) -> list[str]:
    """User-defined pieces that are part of the text: it is cut around them, and no space is put behind them."""
    if not vocabulary.isolates:
        return []
    own = zip(vocabulary.pieces, vocabulary.kinds, strict=True)
    return [piece for i, (piece, kind) in enumerate(own) if kind == _USER_DEFINED and i not in vocabulary.added]


def _merges(vocabulary: PieceVocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best piece first, as sentencepiece's BPE does step by step.

    Where scores are equal (Llama's runs of spaces), sentencepiece goes from left to right. Putting the longer left part
    first has the same effect.
    """
    usable = {piece for piece, kind in zip(vocabulary.pieces, vocabulary.kinds, strict=True) if kind == NORMAL}
    merges = []
    for piece in usable:
        rank = -vocabulary.scores[ids[piece]]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in usable and right in usable:
                merges.append((rank, -len(left), -len(right), ids[piece], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def add_tokens(backend: "Tokenizer", vocabulary: PieceVocabulary) -> None:
    """Add control pieces as special tokens, and user-defined ones as tokens that are never split."""
    from tokenizers import AddedToken

    listed = {token.content for token in vocabulary.added.values()}
    control = [piece for piece in vocabulary.pieces_of_kind(_CONTROL) if piece not in listed]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    if not vocabulary.isolates:
        user_defined = [piece for piece in vocabulary.pieces_of_kind(_USER_DEFINED) if piece not in listed]
        # A run of spaces exists only after normalization.
        backend.add_tokens([AddedToken(t, normalized=SPACE in t) for t in user_defined])
    for _, token in sorted(vocabulary.added.items()):
        flags = {"normalized": not token.special} | dict(token.flags)
        if vocabulary.add_prefix_space:
            flags["normalized"] = False  # found in the raw text, or the space before a text would hide it
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([AddedToken(token.content, special=token.special, **flags)])


def wrap(
    backend: "Tokenizer", special: dict[str, str], settings: dict[str, Any], add_bos: bool = True
) -> "PreTrainedTokenizerBase":
    """The tokenizer as ``transformers`` knows it.

    Args:
      backend: what splits text.
      special: texts of BOS, EOS and others, by their names in ``transformers``.
      settings: more arguments, which replace those.
      add_bos: BOS comes first, unless the settings say otherwise.
    """
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
