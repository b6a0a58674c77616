"""Parameters as a folder that transformers and vLLM load: safetensors, config.json and the tokenizer."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.errors import UserError
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub.export_folder import exporting, write_json
from jaxrm.models.hub.fetch import check_shapes, fetch_tensor, leaf_of
from jaxrm.models.hub.hf_config import to_hf_config
from jaxrm.models.hub.names import NamedTensor, scalar_table, tensor_table
from jaxrm.models.hub.safetensors_file import write_tensors

_DTYPES = ("float32", "bfloat16", "float16")


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
    scalar_head = "scalar_head" in params
    table = scalar_table(config) if scalar_head else tensor_table(config)
    dtype = dtype or str(leaf_of(params, table[0].path).dtype)
    if dtype not in _DTYPES:
        raise UserError(f"the export dtype is {dtype!r}; choose {', '.join(_DTYPES)}")
    check_shapes(table, params)
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
    with exporting(folder, tokenizer, overwrite=overwrite) as partial_folder:
        _write_weights(partial_folder, table, params, np.dtype(dtype), max_shard_bytes)
        if partial_folder is not None:
            _write_configs(partial_folder, fields, config)
    return Path(folder).expanduser().absolute()


def _pad_id(tokenizer: Any, config: ModelConfig) -> int | None:
    """The id of padding; None where the model has no row for it, which transformers would refuse."""
    id_ = getattr(tokenizer, "pad_token_id", None)
    return None if id_ is None or id_ >= config.vocab_size else id_


def _write_configs(folder: Path, fields: dict[str, Any], config: ModelConfig) -> None:
    write_json(folder / "config.json", fields)
    generation = {key: fields[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if config.drawable:  # programs that know this field never draw ids without a token either
        drawable = {id_ for first, end in config.drawable for id_ in range(first, end)}
        generation["suppress_tokens"] = [id_ for id_ in range(config.vocab_size) if id_ not in drawable]
    write_json(
        folder / "generation_config.json", {key: value for key, value in generation.items() if value is not None}
    )


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
            return fetch_tensor(params, by_name[name])

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
        write_json(folder / "model.safetensors.index.json", index)
