"""From what the user typed (a hub name, a folder, a .gguf file) to files on this machine."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jaxrm.errors import UserError, flag, option
from jaxrm.gguf_file import gguf_parts, models_in

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_CONFIG_FILES = ("config.json", "generation_config.json")
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
# The name "model*" leaves out second copies in another layout, such as Mistral's consolidated.safetensors.
_MODEL_FILES = (*_CONFIG_FILES, "model*.safetensors", "model.safetensors.index.json", *_TOKENIZER_FILES)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_ADAPTER_FILES = (*_ADAPTER, *_TOKENIZER_FILES)


def is_hub_name(path: str) -> bool:
    """Whether a path may be a name of the hub, such as ``google/gemma-2b``; a folder of that name goes first."""
    return _HUB_NAME.fullmatch(path) is not None


def locate(path: str, *, config_only: bool = False) -> Path:
    """Find the model that ``path`` names, downloading it into the Hugging Face cache if it is a hub name.

    Args:
      path: a folder with ``config.json`` and safetensors, a folder with exactly one ``.gguf`` file, a
        ``.gguf`` file, or a hub name such as ``google/gemma-2b``.
      config_only: for a hub name, download ``config.json`` and ``generation_config.json`` alone.

    Returns:
      A ``.gguf`` file, or a folder that holds ``config.json``.

    Raises:
      UserError: if nothing is there, or what is there is not a model.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _in_folder(local)
    if local.is_file():
        if local.suffix == ".gguf":
            return gguf_parts(local)[0]
        raise UserError(
            f"{option('model.path')} is {path!r}, which is a file; give the folder that holds config.json, or a .gguf "
            f"file, e.g. {flag('model.path')}={local.parent}"
        )
    if is_hub_name(path) and local.suffix not in (".gguf", ".safetensors"):
        return _download(path, _CONFIG_FILES if config_only else _MODEL_FILES)
    raise UserError(
        f"{option('model.path')} is {path!r}, but there is no model at that place; give a folder with config.json and "
        f"safetensors, a .gguf file, or a hub name, e.g. {flag('model.path')}=google/gemma-2b"
    )


def locate_adapter(path: str) -> Path:
    """Find the PEFT folder that ``path`` names, downloading it if it is a hub name.

    Raises:
      UserError: if nothing is there, or what is there is not an adapter.
    """
    local = Path(path).expanduser()
    if (local / "adapter_config.json").is_file():
        return local
    example = f"give a folder of PEFT, e.g. {flag('model.adapter')}=exported/sft_lora"
    if local.exists():
        raise UserError(f"{option('model.adapter')} is {path!r}, which has no adapter_config.json; {example}")
    if not is_hub_name(path):
        raise UserError(f"{option('model.adapter')} is {path!r}, but there is nothing at that place; {example}")
    return _download(path, _ADAPTER_FILES, "model.adapter")


def _in_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise UserError(
            f"{option('model.path')} is {str(folder)!r}, an adapter; give the weights that it stands on as well, "
            f"{flag('model.path')}={base} {flag('model.adapter')}={folder}"
        )
    ggufs = models_in(folder)
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise UserError(
            f"{folder} holds {len(ggufs)} .gguf files ({names}); give the path of one of them, e.g. "
            f"{flag('model.path')}={ggufs[0]}"
        )
    raise UserError(f"{folder} has no config.json; a model folder needs config.json and .safetensors files")


@cache  # it is looked for several times, and a later look could find another revision
def _download(name: str, patterns: tuple[str, ...], field: str = "model.path") -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{name} asks you to accept its license: do so on its hub page, then run `hf auth login`"
        ) from error
    except Exception as error:  # which HTTP client, and so which errors, depends on the hub library's version
        reason, example = " ".join(str(error).split())[:200], "models/gemma-2b" if field == "model.path" else "adapter"
        raise UserError(
            f"{option(field)}: {name} is neither a folder here nor a model that could be fetched from the hub "
            f"({reason}); check the name and the network, or give a folder, e.g. {flag(field)}={example}"
        ) from error
    if not (folder / patterns[0]).is_file():
        raise UserError(f"the hub model {name} has no {patterns[0]}; choose one with {patterns[0]} and safetensors")
    return folder


def model_files(path: str) -> list[Path]:
    """The files of a published model that decide what it computes: its config and its weights, in order.

    Raises:
      UserError: as `locate` and `safetensors_files`.
    """
    source = locate(path)
    if source.is_file():
        return gguf_parts(source)
    return [source / "config.json", *safetensors_files(source)]


def adapter_files(path: str) -> list[Path]:
    """The files of PEFT's adapters that decide what they compute, in order.

    Raises:
      UserError: as `locate_adapter`.
    """
    folder = locate_adapter(path)
    return [folder / name for name in _ADAPTER if (folder / name).is_file()]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      UserError: if the file is absent, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {' '.join(str(error).split())[:200]}; fetch it again") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a JSON {type(value).__name__}; it must be an object")
    return value


def safetensors_files(folder: Path) -> list[Path]:
    """List the weight files of a model folder, those its index names where it has one.

    Raises:
      UserError: if there are none, an indexed one is missing, or the index points out of the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no 'weight_map' from tensor names to files")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            # The name is data: it must stay a plain file name, so that it cannot reach out of the folder.
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise UserError(f"{index} names the file {name!r}; it must be a .safetensors file in the same folder")
            if not (folder / name).is_file():
                raise UserError(f"{index} names {name}, which is not in the folder; fetch the model again")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if files:
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds weights only as {pickles[0]}, a pickle, which can run code when read; "
            "convert it to safetensors with transformers' save_pretrained"
        )
    raise UserError(f"{folder} holds no .safetensors files; a model folder needs config.json and safetensors")
