"""The tokenizer that a GGUF file describes, built from the pieces, scores, kinds and merges in its metadata."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrm.data.tokenizer_conversion import NORMAL, SPACE, PieceVocabulary, add_tokens, sentencepiece_backend, wrap
from jaxrm.errors import UserError, flag
from jaxrm.gguf_file import open_reader

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")  # text that is a token as a whole is not merged, and BOS comes first
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
    **dict.fromkeys(_LLAMA3, _LLAMA3_SPLIT),
    "smaug-bpe": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
}


def from_gguf(file: Path) -> "PreTrainedTokenizerBase":
    """Build the tokenizer that a GGUF file describes, with its chat template.

    Raises:
      UserError: it is not a GGUF file, or its kind of tokenizer or text split is not supported.
    """
    fields = open_reader(file).fields
    prefix = "tokenizer.ggml."
    tokenizer_fields = {name: field for name, field in fields.items() if name.startswith(prefix)}
    metadata = {name.removeprefix(prefix): field.contents() for name, field in tokenizer_fields.items()}
    kind = metadata.get("model")
    if "tokens" not in metadata or kind not in ("gpt2", "llama"):
        raise UserError(f"{file} has a tokenizer of kind {kind!r}; required is 'gpt2' or 'llama'")
    pieces = metadata["tokens"]
    vocabulary = PieceVocabulary(
        # Gemma's file writes runs of spaces as they are.
        [piece.replace(" ", SPACE) for piece in pieces] if kind == "llama" else pieces,
        metadata.get("scores") or [-float(index) for index in range(len(pieces))],
        metadata.get("token_type") or [NORMAL] * len(pieces),
        metadata.get("unknown_token_id", 0),
        add_prefix_space=metadata.get("add_space_prefix", True),
    )
    pre = metadata.get("pre", "default")
    if kind == "llama":
        backend = sentencepiece_backend(vocabulary)
    else:
        backend = _byte_level_backend(vocabulary, metadata.get("merges") or [], pre, file)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"{key}_token_id") for name, key in names.items()}
    special = {name: pieces[token] for name, token in ids.items() if token is not None}
    settings: dict[str, Any] = {}
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"].contents()
    return wrap(backend, special, settings, add_bos=metadata.get("add_bos_token", kind == "llama" or pre in _LLAMA3))


def _byte_level_backend(
    vocabulary: PieceVocabulary, merges: Sequence[str], pre_tokenizer: str, file: Path
) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    if pre_tokenizer not in _BYTE_LEVEL_SPLITS:
        raise UserError(
            f"{file} splits text in a way that is not known here ({pre_tokenizer!r}); take the tokenizer from the "
            f"hub or a folder with tokenizer.json, e.g. {flag('data.tokenizer')}=org/name"
        )
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    backend = Tokenizer(BPE(vocabulary.ids(), pairs, fuse_unk=True, ignore_merges=pre_tokenizer in _LLAMA3))
    split = _BYTE_LEVEL_SPLITS[pre_tokenizer]
    steps: list[Any] = []
    if split == "digits":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif split:
        steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (None, "digits")))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    add_tokens(backend, vocabulary)
    return backend
