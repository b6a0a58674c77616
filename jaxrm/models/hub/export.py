"""Parameters as a folder that transformers and vLLM load: safetensors, config.json and the tokenizer."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm.errors import UserError
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub.hf_config import to_hf_config
from jaxrm.models.hub.names import NamedTensor, scalar_table, tensor_table
from jaxrm.models.hub.safetensors_file import write_tensors

_DTYPES = ("float32", "bfloat16", "float16")
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


def export_model(
    folder: str | os.PathLike[str],
    params: dict[str, Any],
    config: ModelConfig,
    *,
    tokenizer: Any = None,
    end_ids: Iterable[int] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a model as a Hugging Face folder; it appears at once, complete, or not at all.

    One tensor at a time is fetched from the devices and written. With several processes, all must call this;
    process 0 writes, so ``folder`` must be visible to it.

    Args:
      folder: made if absent; its parents too.
      params: the parameter tree of a decoder, of JAX (sharded or not) or NumPy arrays. That of a
        ``jaxrm.models.heads.ScalarModel`` becomes a sequence classification model of one label. Such a model reads its
        score from the last token that is not padding, so the tokenizer must not pad with a token that ends responses.
      config: the model.
      tokenizer: saved with its ``save_pretrained``, and gives the ids of BOS, EOS and padding; or a folder whose
        tokenizer files are copied.
      end_ids: ids at which generation stops; None: the tokenizer's EOS.
      dtype: ``float32``, ``bfloat16`` or ``float16``; None: that of the parameters.
      max_shard_bytes: tensors are spread over files of at most this many bytes, but for a larger tensor.
      overwrite: replace ``folder`` if it holds an earlier export.

    Returns:
      The folder.

    Raises:
      UserError: if the folder is in use, the dtype unknown, or the family cannot express the config; raised
        before anything is written.
    """
    target = Path(folder).expanduser().absolute()
    writes = jax.process_index() == 0
    if writes:
        check_export_folder(target, overwrite=overwrite)
    scalar_head = "scalar_head" in params
    table = scalar_table(config) if scalar_head else tensor_table(config)
    dtype = dtype or str(_leaf(params, table[0].path).dtype)
    if dtype not in _DTYPES:
        raise UserError(f"the export dtype is {dtype!r}; choose {', '.join(_DTYPES)}")
    _check_shapes(table, params)
    if end_ids is None:
        eos = getattr(tokenizer, "eos_token_id", None)
        end_ids = [] if eos is None else [eos]
    fields = to_hf_config(
        config,
        dtype=dtype,
        bos_id=getattr(tokenizer, "bos_token_id", None),
        eos_ids=sorted(end_ids),
        pad_id=_pad_id(tokenizer, config),
        scalar_head=scalar_head,
    )
    tokenizer_files = _tokenizer_files(tokenizer) if isinstance(tokenizer, str | os.PathLike) else []

    with _appearing(target) if writes else _nowhere() as partial_folder:
        _write_weights(partial_folder, table, params, np.dtype(dtype), max_shard_bytes)
        if partial_folder is not None:
            _write_configs(partial_folder, fields, config)
            for file in tokenizer_files:
                shutil.copyfile(file, partial_folder / file.name)
            if tokenizer is not None and not tokenizer_files:
                tokenizer.save_pretrained(str(partial_folder))
            _make_readable_by_both(partial_folder / "tokenizer_config.json")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"export {target}")
    return target


def check_export_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse a folder that an export may not replace.

    Raises:
      UserError: it is a file or inside one, is not empty, or holds something other than a model.
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
    if not (target / "config.json").is_file():
        raise UserError(f"the export folder {target} holds something that is not a model; name another")


def _check_shapes(table: list[NamedTensor], params: dict[str, Any]) -> None:
    for tensor in table:
        leaf = _leaf(params, tensor.path)
        shape = leaf.shape if tensor.layer is None else leaf.shape[1:]
        assert shape == tensor.shape, ("/".join(tensor.path), leaf.shape, tensor.shape)


def _pad_id(tokenizer: Any, config: ModelConfig) -> int | None:
    """The id of padding; None where the model has no row for it, which transformers would refuse."""
    id_ = getattr(tokenizer, "pad_token_id", None)
    return None if id_ is None or id_ >= config.vocab_size else id_


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
    _write_json(file, settings)


def _write_configs(folder: Path, fields: dict[str, Any], config: ModelConfig) -> None:
    _write_json(folder / "config.json", fields)
    generation = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if config.drawable:  # programs that know this field never draw ids without a token either
        drawable = {id_ for first, end in config.drawable for id_ in range(first, end)}
        generation["suppress_tokens"] = [id_ for id_ in range(config.vocab_size) if id_ not in drawable]
    _write_json(
        folder / "generation_config.json", {key: value for key, value in generation.items() if value is not None}
    )


def _tokenizer_files(path: str | os.PathLike[str]) -> list[Path]:
    files = [Path(path) / name for name in _TOKENIZER_FILES if (Path(path) / name).is_file()]
    if not files:
        raise UserError(f"{path} holds no tokenizer; it needs tokenizer.json or tokenizer.model")
    return files


@contextmanager
def _nowhere() -> Iterator[None]:
    yield None


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


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path | None,
    table: list[NamedTensor],
    params: dict[str, Any],
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    shards: list[list[NamedTensor]] = [[]]
    size = 0
    for tensor in table:
        if shards[-1] and size + tensor.size * dtype.itemsize > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size * dtype.itemsize

    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        by_name = {tensor.name: tensor for tensor in shard}

        def fetch(name: str, by_name: dict[str, NamedTensor] = by_name) -> np.ndarray:
            tensor = by_name[name]
            return tensor.to_file(_fetch(_leaf(params, tensor.path), tensor.layer))

        if folder is None:  # another process writes, but every process takes part in the gathering
            for name in by_name:
                fetch(name)
            continue
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = [(tensor.name, tensor.file_shape) for tensor in shard]
        total += write_tensors(folder / file, entries, dtype, fetch)
        weight_map |= dict.fromkeys(by_name, file)
    if folder is not None and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _leaf(params: dict[str, Any], path: tuple[str, ...]) -> Any:
    node: Any = params
    for key in path:
        assert key in node, f"the parameters lack {'/'.join(path)}"
        node = node[key]
    return node


def _fetch(array: Any, layer: int | None) -> np.ndarray:
    """Bring one tensor to this host, of a stacked parameter one layer."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer])
    if array.is_fully_addressable:
        return np.asarray(array if layer is None else _take_layer(array, layer))
    assert isinstance(array.sharding, NamedSharding), array.sharding
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    take = _take_layer if layer is not None else (lambda whole, _: whole)
    gathered = jax.jit(take, out_shardings=everywhere)(array, layer)
    return np.asarray(gathered.addressable_data(0))


@jax.jit
def _take_layer(array: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)
