"""Where a model's first parameters come from: published weights, another run's checkpoint, or chance.

`config.model.path` may name the folder of a run as well as published weights, so that what one stage trained the next
one starts from.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxrm.errors import UserError, flag, option
from jaxrm.inference.run_checkpoint import STEP_SEPARATOR, RunCheckpoint, find_checkpoint, is_run
from jaxrm.models import build, hub
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.models.lora import NO_LORA, LoRAConfig
from jaxrm.runtime import checksums
from jaxrm.stage_config import LANGUAGE_MODELS

_HASH = re.compile(r" \((?:file )?sha256 [0-9a-f]{12}\)")

BASE_FILE = "base.json"
"""File of a run with adapters that says what they stand on."""


def adapter_run(source: ModelSource) -> RunCheckpoint | None:
    """The run whose adapters ``source`` names; None where it names none.

    Raises:
      UserError: ``config.model.adapter`` is a run without adapters.
    """
    if peft_path(source) is not None:
        return None
    if source.adapter is not None:
        run = find_checkpoint(source.adapter, "model.adapter", LANGUAGE_MODELS)
        check_has_adapters(run)
        return run
    if not is_run(source.path):
        return None
    run = _of_run(source)
    return run if run.lora.is_on else None


def check_has_adapters(run: RunCheckpoint) -> None:
    """Refuse a run as ``config.model.adapter`` that has none.

    Raises:
      UserError: its weights were all trained.
    """
    if not run.lora.is_on:
        raise UserError(
            f"{option('model.adapter')} is {run.folder.path}, a run whose weights were all trained; give it as "
            f"{flag('model.path')}={run.folder.path} and no adapter"
        )


def peft_path(source: ModelSource) -> str | None:
    """The PEFT folder, or its hub name, that ``source`` names as its adapter; None where it names none."""
    return None if is_run(source.adapter) else source.adapter


def peft_adapter(source: ModelSource) -> hub.Adapter | None:
    """What the PEFT folder that ``source`` names holds, by its headers; None where it names none.

    Raises:
      UserError: it does not fit its base, needs what jaxrm does not do, or its base has adapters already.
    """
    path = peft_path(source)
    if path is None:
        return None
    if is_run(source.path) and _of_run(source).lora.is_on:
        raise UserError(
            f"{option('model.adapter')} is {path!r}, but {option('model.path')} is {source.path!r}, which has adapters "
            f"already; merge those first: python -m jaxrm.export --checkpoint={source.path} --merge --output=MERGED"
        )
    return hub.describe_adapter(path, read_shape(source))


def lora_of(source: ModelSource) -> LoRAConfig:
    """The adapters of a language model that ``source`` names; those of rank 0 where it names none.

    Raises:
      UserError: they are those of a scalar reward model.
    """
    run, adapter = adapter_run(source), peft_adapter(source)
    if adapter is not None and adapter.scalar_head:
        raise UserError(
            f"{option('model.adapter')} is {source.adapter!r}, of a scalar reward model (SEQ_CLS); it must be of a "
            "language model (CAUSAL_LM)"
        )
    if adapter is not None:
        return adapter.lora
    return NO_LORA if run is None else run.lora


def as_stored(source: ModelSource) -> ModelSource:
    """The source with its base quantized as the run of its adapters was trained on, unless it says otherwise."""
    run = adapter_run(source)
    if run is None or source.quantize is not None:
        return source
    return dataclasses.replace(source, quantize=run.config.model.quantize)


def trained_place(source: ModelSource) -> tuple[str, str]:
    """The field that names what was trained last, ``model.adapter`` or ``model.path``, and the path that it has."""
    return ("model.path", str(source.path)) if source.adapter is None else ("model.adapter", source.adapter)


def read_shape(source: ModelSource) -> ModelConfig:
    """Shape of the model that ``source`` names, without its weights.

    Raises:
      UserError: where there is no such model, or neither path nor preset.
    """
    return _of_run(source).shape if is_run(source.path) else build.read_shape(source)


def check_weights(config: ModelConfig, source: ModelSource) -> None:
    """Refuse weights that `first_params` could not read; nothing is allocated.

    Raises:
      UserError: naming what is wrong with them.
    """
    if not is_run(source.path):
        build.check_weights(config, source)
    peft_adapter(source)


def load_or_init_params(config: ModelConfig, source: ModelSource, key: jax.Array, shapes: Any, shardings: Any) -> Any:
    """First parameters of a decoder, float32, each made where it lies: read from ``source.path``, or drawn."""
    if is_run(source.path):
        return _of_run(source).restore(shapes, shardings)
    return build.init_params(config, source, key, shardings)


def identity_of(path: str) -> str:
    """Which weights exactly, since a folder may come to hold others.

    Of a run these are the checkpoint and when the run was started, of published weights the path and a hash of the
    files' bytes.
    """
    return _identity(path, hub.model_files)


def _identity(path: str, files_of: Callable[[str], list[Path]]) -> str:
    if not is_run(path):
        return f"{path} (sha256 {checksums.content_hash(files_of(path))[:12]})"
    checkpoint = find_checkpoint(path, "model.path")
    launches = json.loads((checkpoint.folder.path / "run.json").read_text(encoding="utf-8")).get("launches") or [{}]
    return f"{checkpoint.name}, of {launches[0].get('started')}"


def split_identity(identity: str) -> tuple[str, str]:
    """The path that an `identity_of` was made of, and what it says beyond that: a run's checkpoint, or a hash.

    A folder may have been moved since, so two identities are compared without it where both say more.
    """
    folder, separator, checkpoint = identity.rpartition(STEP_SEPARATOR)
    if separator:
        return folder, checkpoint
    hashed = _HASH.search(identity)
    return (identity, "") if hashed is None else (identity[: hashed.start()], hashed.group())


def is_same_identity(one: str, other: str) -> bool:
    """Whether two of `identity_of` are of one checkpoint or the same published weights, wherever their folder is.

    Older runs wrote down no hash of published weights; then their paths decide.
    """
    (first, first_content), (second, second_content) = split_identity(one), split_identity(other)
    if first_content and second_content:
        return first_content == second_content
    is_checkpoint = any(more and not _HASH.fullmatch(more) for more in (first_content, second_content))
    return first == second and not is_checkpoint


def is_recorded_as(recorded: str, now: str) -> bool:
    """Whether a text that has identities of models is what an earlier launch wrote down, with hashes or without them.

    Args:
      recorded: by an earlier launch, which may have been of a version without hashes of published weights, or of
        functions.
      now: the same text of this launch.
    """
    parts, hashes = _HASH.split(now), [*_HASH.findall(now), ""]
    pattern = "".join(f"{re.escape(part)}(?:{re.escape(end)})?" for part, end in zip(parts, hashes, strict=True))
    return re.fullmatch(pattern, recorded) is not None


def identity_of_source(source: ModelSource) -> str:
    """Which weights and adapters exactly, as `identity_of`; empty for weights that are drawn."""
    base = [] if source.path is None else [identity_of(source.path)]
    return " + ".join(base + ([] if source.adapter is None else [_identity(source.adapter, hub.adapter_files)]))


def contents_of(source: ModelSource) -> str:
    """What changes where another host has other weights under the same name: a run's checkpoint, or files and sizes."""
    return " + ".join(_content_of(path) for path in (source.path, source.adapter) if path is not None)


def _content_of(path: str) -> str:
    if is_run(path):
        return identity_of(path)
    folder = Path(path).expanduser()
    files = sorted(folder.glob("*")) if folder.is_dir() else [folder]
    listed = [file for file in files if file.suffix in (".safetensors", ".gguf") and file.exists()]
    return str([(file.name, file.stat().st_size) for file in listed])


def name_of(source: ModelSource) -> str:
    """Which weights exactly, for people: those of a run with their step."""
    name = _of_run(source).name if is_run(source.path) else str(source.path or f"chance ({source.preset})")
    return name if source.adapter is None else f"{name} with the adapter {source.adapter}"


def tokenizer_of(source: ModelSource) -> str | None:
    """Where the tokenizer that belongs to the weights is; None where there are no weights."""
    if source.adapter is not None and is_run(source.adapter):
        return str(find_checkpoint(source.adapter, "model.adapter").folder.tokenizer)
    adapter = peft_adapter(source)
    if adapter is not None and adapter.has_tokenizer:
        return str(adapter.folder)
    return str(_of_run(source).folder.tokenizer) if is_run(source.path) else source.path


def _of_run(source: ModelSource) -> RunCheckpoint:
    assert source.path is not None
    return find_checkpoint(source.path, "model.path", LANGUAGE_MODELS)
