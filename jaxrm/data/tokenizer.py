"""Tokenizers, through `transformers`: from the hub, a folder, a lone sentencepiece model, or a GGUF file."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrm.data.tokenizer_conversion import from_gguf, from_sentencepiece
from jaxrm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; torch is not needed, and no code that comes with it is run.

    Args:
      path: a hub name, a .gguf file, or a folder that holds tokenizer.json (or other files that `transformers`
        reads), or only a sentencepiece tokenizer.model, or exactly one .gguf file.

    Raises:
      UserError: nothing there, or nothing that can be read as a tokenizer.
    """
    place = Path(path).expanduser()
    try:
        if place.is_file() and place.suffix == ".gguf":
            return from_gguf(place)
        if place.is_file() and place.suffix == ".model":
            return from_sentencepiece(place)
        if place.is_dir():
            return _from_folder(place)
        if place.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise UserError(
                f"tokenizer {path!r} is neither a folder, a .gguf file nor a hub name; "
                "e.g. --config.data.tokenizer=org/name"
            )
        return _from_transformers(path)
    except UserError:
        raise
    except Exception as error:  # tokenizer files are parsed by several libraries, each with errors of its own
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer {path!r} could not be loaded: {reason}; give a folder with tokenizer.json or "
            "tokenizer.model, a .gguf file, or a hub name, e.g. --config.data.tokenizer=org/name"
        ) from error


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template, each of them whole or not at all."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        tokenizer.save_pretrained(temporary)
        for file in sorted(found for found in Path(temporary).rglob("*") if found.is_file()):
            place = target / file.relative_to(temporary)
            place.parent.mkdir(exist_ok=True)
            file.replace(place)


def _from_folder(folder: Path) -> "PreTrainedTokenizerBase":
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return from_sentencepiece(folder / "tokenizer.model")
    if any((folder / name).is_file() for name in _FILES):
        return _from_transformers(str(folder))
    gguf_files = sorted(folder.glob("*.gguf"))
    if len(gguf_files) == 1:
        return from_gguf(gguf_files[0])
    names = ", ".join(file.name for file in gguf_files)
    found = f"{len(gguf_files)} .gguf files: {names}" if gguf_files else "no tokenizer file"
    raise UserError(
        f"{folder} has {found}; required is one of {', '.join(_FILES[:2])}, or exactly one .gguf file; "
        "name one, e.g. --config.data.tokenizer=folder/model.gguf"
    )


def _from_transformers(name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
