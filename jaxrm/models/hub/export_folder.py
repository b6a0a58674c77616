"""The folder that an export makes: it appears at once, complete, with the tokenizer beside what it is of."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxrm.errors import UserError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_CONFIGS = ("config.json", "adapter_config.json")  # one of which an earlier export has


def check_export_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a folder that an export may not replace.

    Raises:
      UserError: it is a file or inside one, is not empty, or holds something other than a model or an adapter.
    """
    target = Path(folder).expanduser().absolute()
    for place in (target, *target.parents):
        if place.exists():
            if not place.is_dir():
                raise UserError(f"the export folder is {target}, but {place} is a file; name a folder")
            if not os.access(place, os.W_OK):
                raise UserError(f"the export folder is {target}, but {place} cannot be written; name another")
            break
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"the export folder {target} is not empty; name another, or replace it with --overwrite")
    if not any((target / name).is_file() for name in _CONFIGS):
        raise UserError(f"the export folder {target} holds something that is not a model; name another")


@contextmanager
def exporting(folder: str | os.PathLike[str], tokenizer: Any, *, overwrite: bool) -> Iterator[Path | None]:
    """A temporary folder that takes the place of ``folder``, with the tokenizer in it, if the block ends well.

    With several processes, all must enter. Process 0 gets the folder and the others None, and all wait for it.

    Args:
      folder: made if absent; its parents too.
      tokenizer: saved with its ``save_pretrained``; or a folder whose tokenizer files are copied; or None.
      overwrite: replace ``folder`` if it holds an earlier export.

    Raises:
      UserError: if the folder is in use, or the tokenizer's is empty; raised before anything is written.
    """
    target = Path(folder).expanduser().absolute()
    files = _tokenizer_files(tokenizer) if isinstance(tokenizer, str | os.PathLike) else []
    if jax.process_index() != 0:
        yield None
    else:
        check_export_folder(target, overwrite=overwrite)
        with _appearing(target) as partial_folder:
            yield partial_folder
            for file in files:
                shutil.copyfile(file, partial_folder / file.name)
            if tokenizer is not None and not files:
                tokenizer.save_pretrained(str(partial_folder))
            _make_readable_by_both(partial_folder / "tokenizer_config.json")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"export {target}")


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a JSON object for people to read."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _tokenizer_files(path: str | os.PathLike[str]) -> list[Path]:
    files = [Path(path) / name for name in _TOKENIZER_FILES if (Path(path) / name).is_file()]
    if not files:
        raise UserError(f"{path} holds no tokenizer; it needs tokenizer.json or tokenizer.model")
    return files


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place if the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial_folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield partial_folder
        partial_folder.chmod(0o777 & ~_umask())
        if target.is_dir():
            old = partial_folder.with_suffix(".old")
            target.rename(old)
            try:
                partial_folder.rename(target)
            except OSError:
                old.rename(target)
                raise
            shutil.rmtree(old)
        else:
            partial_folder.rename(target)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _make_readable_by_both(file: Path) -> None:
    """Change what transformers 5 writes in a tokenizer_config.json, and 4 cannot read, to what both do.

    tokenizer.json alone says how text is split. The class is the one of both versions that takes it as it is.
    """
    if not (file.is_file() and file.with_name("tokenizer.json").is_file()):
        return
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = extra
    for name in ("backend", "is_local", "local_files_only"):  # of the process that wrote it
        settings.pop(name, None)
    write_json(file, settings)
