"""Tokenizers of ``transformers`` built from a sentencepiece model or from the metadata of a GGUF file.

``transformers`` reads neither without the model's config beside it, and GGUF only where torch is installed. Both files
hold the same: pieces, their scores and their kinds. The numbers of the kinds agree: 1 normal, 2 unknown, 3 control,
4 user-defined, 5 unused, 6 byte.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrm.errors import UserError, flag

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"  # how sentencepiece writes a space

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
    """Pieces in the order of their ids, and how sentencepiece normalizes text before it splits it."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    unknown_id: int
    unigram: bool = False
    add_prefix_space: bool = True
    collapse_spaces: bool = False
    charsmap: bytes = b""

    def pieces_of_kind(self, kind: int) -> list[str]:
        return [piece for piece, own_kind in zip(self.pieces, self.kinds, strict=True) if own_kind == kind]


def from_sentencepiece(file: Path) -> "PreTrainedTokenizerBase":
    """Build a tokenizer from a sentencepiece model, with BOS first as in Llama and Gemma.

    Settings in a tokenizer_config.json beside the file (BOS, EOS, padding, chat template) apply.

    Raises:
      UserError: it is not a sentencepiece model.
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
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise UserError(f"{file} is a sentencepiece model of words or characters; required is BPE or unigram")
    vocabulary = _Vocabulary(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        trainer.unk_id,
        trainer.model_type == trainer.UNIGRAM,
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        normalizer.precompiled_charsmap,
    )
    names = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    names["unk_token"] = trainer.unk_id
    special = {name: vocabulary.pieces[token] for name, token in names.items() if token >= 0}
    return _wrap(_sentencepiece_backend(vocabulary), special, _settings_beside(file))


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
    from tokenizers import Regex, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE, Unigram

    ids = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    byte_fallback = _BYTE in vocabulary.kinds
    if vocabulary.unigram:
        # A piece that text never becomes gets a score that no path can afford.
        scored = [
            (piece, score if kind in (_NORMAL, _USER_DEFINED, _UNKNOWN) else -1e6)
            for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True)
        ]
        model: BPE | Unigram = Unigram(scored, vocabulary.unknown_id, byte_fallback)
    else:
        model = BPE(
            ids,
            _merges(vocabulary, ids),
            unk_token=vocabulary.pieces[vocabulary.unknown_id],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(vocabulary.charsmap)] if vocabulary.charsmap else []
    if vocabulary.collapse_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.add_prefix_space:
        steps.append(normalizers.Prepend(_SPACE))  # after every special token too, as Llama 2 was trained
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_prefix_space:
        decoding.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    _add_tokens(backend, vocabulary)
    return backend


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

    control = vocabulary.pieces_of_kind(_CONTROL)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    # A run of spaces exists only after normalization.
    backend.add_tokens([AddedToken(t, normalized=_SPACE in t) for t in vocabulary.pieces_of_kind(_USER_DEFINED)])


def _settings_beside(file: Path) -> dict[str, Any]:
    """The settings of tokenizer_config.json that the model file lacks."""
    settings_file = file.parent / "tokenizer_config.json"
    if not settings_file.is_file():
        return {}
    settings = json.loads(settings_file.read_text("utf-8"))
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template", "model_max_length", "add_bos_token")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def _wrap(
    backend: "Tokenizer", special: dict[str, str], settings: dict[str, Any], add_bos: bool = True
) -> "PreTrainedTokenizerBase":
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    for name, value in settings.items():
        if name.endswith("_token") and isinstance(value, dict):  # an AddedToken written as an object
            settings = {**settings, name: value.get("content")}
    add_bos = settings.pop("add_bos_token", add_bos) and "bos_token" in special
    arguments = {**special, **settings}
    if add_bos:
        bos = arguments["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **arguments)
