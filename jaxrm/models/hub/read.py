"""Weights of a checkpoint, streamed tensor by tensor into (sharded) parameter buffers."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxrm.errors import UserError
from jaxrm.models import quantized_params
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub.gguf import gguf_model_config, open_gguf
from jaxrm.models.hub.hf_config import parse_end_ids, parse_hf_config
from jaxrm.models.hub.locate import locate, read_json, safetensors_files
from jaxrm.models.hub.names import NamedTensor, tensor_table
from jaxrm.models.hub.safetensors_file import StoredTensor, open_tensors

Params = dict[str, Any]


def read_model_config(path: str) -> ModelConfig:
    """Read the configuration of a published model: ``config.json``, or the metadata of a GGUF file.

    The ids that end a response are those of ``generation_config.json``, or where it lists none of ``config.json``. A
    config that ties the output head to the embeddings is not followed where the weights hold a head that differs, with
    a line that says so.

    Args:
      path: a hub name, a model folder, or a ``.gguf`` file.

    Raises:
      UserError: if there is no model, or it needs something that jaxrm does not do, naming the field.
    """
    source = locate(path, config_only=True)
    if source.is_file():
        return gguf_model_config(source)
    file, generation = source / "config.json", source / "generation_config.json"
    values = read_json(file)
    config = parse_hf_config(values, where=str(file))
    end_ids = parse_end_ids(read_json(generation), where=str(generation)) if generation.is_file() else ()
    config = replace(config, end_ids=end_ids or parse_end_ids(values, where=str(file)))
    if config.tie_embeddings and any(source.glob("*.safetensors")) and _has_own_head(open_folder(source)):
        _print_once(
            f"{file} says tie_word_embeddings, but the weights hold an output head that differs from the embeddings; "
            "it is kept, as transformers does"
        )
        config = replace(config, tie_embeddings=False)
    return config


def load_params(
    path: str,
    config: ModelConfig,
    *,
    shardings: Params | None = None,
    dtype: Any = jnp.float32,
    quantize: str | None = None,
) -> Params:
    """Read a model's weights into the decoder's parameter tree, layers stacked on a leading axis.

    Names and shapes are checked before anything is allocated. Then one tensor at a time is read, converted
    and copied into its buffer on the devices, so host memory stays near the largest tensor; with shardings,
    only the slices of this process's devices are read.

    Args:
      path: a hub name, a model folder with safetensors, or a ``.gguf`` file.
      config: what the weights must fit, usually ``read_model_config(path)``.
      shardings: the parameter tree with a sharding in place of every array; None: the default device.
      dtype: of the parameters.
      quantize: one of ``jaxrm.models.quantized.KINDS``; each kernel of a projection is quantized on its devices as soon
        as it is read, so that the model is nowhere whole before. None: they are kept as they are.

    Returns:
      A nested dict of ``jax.Array``, e.g. ``params["layers"]["mlp"]["up"]["kernel"]`` of ``[L, D, F]``, or ``codes``
      and ``scales`` in its place.

    Raises:
      UserError: naming the missing, extra or misshapen tensors.
    """
    table, stored = _open(path, config)
    return read_tensors(table, stored, shardings=shardings, dtype_of=lambda _: dtype, quantize=quantize)


def read_tensors(
    table: list[NamedTensor],
    stored: dict[str, StoredTensor],
    *,
    shardings: Params | None,
    dtype_of: Callable[[tuple[str, ...]], Any],
    quantize: str | None = None,
) -> Params:
    """Read the tensors of a table, which have been checked; arguments and returns as of `load_params`.

    Args:
      table: every tensor to read, and the parameter that it is a part of.
      stored: the tensors of the files by name.
      shardings: see `load_params`.
      dtype_of: of each parameter, by its path.
      quantize: see `load_params`.
    """
    tensors: dict[tuple[str, ...], list[NamedTensor]] = {}
    for tensor in table:
        tensors.setdefault(tensor.path, []).append(tensor)
    params: Params = {}
    for parameter, parts in tensors.items():
        node = params
        for key in parameter[:-1]:
            node = node.setdefault(key, {})
        place, name = parameter[:-1], parameter[-1]
        contracted = quantized_params.contracted_axes(place) if name == "kernel" else None
        if quantize is not None and contracted is not None:
            names = ("codes", "scales")
            sharding = {name: _lookup(shardings, (*place, name)) for name in names}
            node |= _quantized_stack(parts, stored, sharding, quantize, contracted)
        elif parts[0].layer is None:
            node[name] = _to_devices(parts[0], stored, _lookup(shardings, parameter), dtype_of(parameter))
        else:
            node[name] = _stack(parts, stored, _lookup(shardings, parameter), dtype_of(parameter))
    return params


def check_weights(path: str, config: ModelConfig) -> None:
    """Refuse weights that ``load_params`` would refuse, by their headers alone: nothing is read or allocated.

    Raises:
      UserError: naming the missing, extra, misshapen or unreadable tensors.
    """
    _open(path, config)


def _open(path: str, config: ModelConfig) -> tuple[list[NamedTensor], dict[str, StoredTensor]]:
    source = locate(path)
    if source.is_file():
        stored = open_gguf(source, config)
        table = tensor_table(config)
    else:
        stored = open_folder(source)
        table = tensor_table(config, **tensor_naming(stored))
    check_tensors(table, stored, config, source)
    if config.tie_embeddings and source.is_dir() and _has_own_head(stored):
        raise UserError(
            f"{source} holds an output head that differs from the embeddings, though its config.json says "
            "tie_word_embeddings; the files are here now, so give the same command again: it keeps the head"
        )
    return table, stored


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name, none of them read.

    Raises:
      UserError: there are no safetensors, or one tensor is in two of them.
    """
    stored: dict[str, StoredTensor] = {}
    for file in safetensors_files(folder):
        tensors = open_tensors(file)
        twice = next((name for name in tensors if name in stored), None)
        if twice is not None:
            raise UserError(
                f"{folder} holds {twice} in {file.name} and in a file before it; remove the one that is wrong"
            )
        stored |= tensors
    return stored


def _has_own_head(stored: dict[str, StoredTensor]) -> bool:
    """Whether there is an output head, and it is not the embedding once more."""
    names = tensor_naming(stored)
    embedding, head = stored.get(f"{names['prefix']}embed_tokens.weight"), stored.get(names["head"])
    if embedding is None or head is None or embedding.unreadable or head.unreadable:
        return False
    if embedding.shape != head.shape:
        return True
    mine, theirs = embedding.read(), head.read()
    rows = max(1, (1 << 24) // max(mine.itemsize * mine.shape[-1], 1))  # so that no whole copy is made
    return any(
        not np.array_equal(mine[i : i + rows].astype(np.float32), theirs[i : i + rows].astype(np.float32))
        for i in range(0, len(mine), rows)
    )


@cache
def _print_once(line: str) -> None:
    if jax.process_index() == 0:
        print(line)


def _lookup(shardings: Params | None, parameter: tuple[str, ...]) -> Sharding:
    if shardings is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    node: Any = shardings
    for key in parameter:
        assert key in node, f"no sharding for {'/'.join(parameter)}"
        node = node[key]
    return node


def _to_devices(tensor: NamedTensor, stored: dict[str, StoredTensor], sharding: Sharding, dtype: Any) -> jax.Array:
    view = tensor.from_file(stored[tensor.name].read())

    def slice_of(index: tuple[slice, ...] | None) -> np.ndarray:
        # Always a copy: on CPU the array may keep this memory, which must not be the mapped file.
        return np.array(view[index], dtype=dtype, order="C", copy=True)

    return jax.make_array_from_callback(tensor.shape, sharding, slice_of, dtype=dtype).block_until_ready()


def _stack(parts: list[NamedTensor], stored: dict[str, StoredTensor], sharding: Sharding, dtype: Any) -> jax.Array:
    buffer = _zeros_maker((len(parts), *parts[0].shape), jnp.dtype(dtype), sharding)()
    write = _layer_writer(sharding)
    for part in parts:
        # Waiting here keeps a single tensor in flight instead of a queue of them in host memory.
        layer = _to_devices(part, stored, _without_layers(sharding), dtype)
        buffer = write(buffer, layer, jnp.int32(part.layer)).block_until_ready()
    return buffer


def _quantized_stack(
    parts: list[NamedTensor],
    stored: dict[str, StoredTensor],
    shardings: dict[str, Sharding],
    kind: str,
    contracted: int,
) -> dict[str, jax.Array]:
    """Codes and scales of a stack of kernels; one kernel at a time is on the devices as it is in the file."""
    layer_shardings = {name: _without_layers(sharding) for name, sharding in shardings.items()}
    quantize = quantized_params.quantizer(
        kind, contracted, layer_shardings["codes"], layer_shardings["scales"], stacked=False
    )
    buffers: dict[str, jax.Array] = {}
    for part in parts:
        kernel = _to_devices(part, stored, layer_shardings["codes"], jnp.float32)
        for name, layer in quantize(kernel).items():
            if name not in buffers:
                buffers[name] = _zeros_maker((len(parts), *layer.shape), layer.dtype, shardings[name])()
            write = _layer_writer(shardings[name])
            buffers[name] = write(buffers[name], layer, jnp.int32(part.layer)).block_until_ready()
        kernel.delete()
    return buffers


# Parameters of one shape and sharding, such as keys and values, share these compiled functions.
@cache
def _layer_writer(sharding: Sharding) -> Any:
    write = partial(jax.lax.dynamic_update_index_in_dim, axis=0)
    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


@cache
def _zeros_maker(shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding) -> Any:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)


def _without_layers(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)
    assert isinstance(sharding, jax.sharding.SingleDeviceSharding), sharding
    return sharding


def tensor_naming(stored: dict[str, StoredTensor]) -> dict[str, str]:
    """How a checkpoint names its tensors: a plain decoder, or the text part of a multimodal Gemma 3."""
    for prefix in ("language_model.model.", "model.language_model.", "model.", ""):
        if f"{prefix}embed_tokens.weight" in stored:
            head = "language_model.lm_head.weight" if prefix.startswith("language_model.") else "lm_head.weight"
            return {"prefix": prefix, "head": head}
    return {"prefix": "model.", "head": "lm_head.weight"}


def check_tensors(table: list[NamedTensor], stored: dict[str, StoredTensor], config: ModelConfig, source: Path) -> None:
    """Refuse weights that are not those of a table.

    Raises:
      UserError: naming the missing, extra, misshapen or unreadable tensors.
    """
    expected = {tensor.name: tensor for tensor in table}
    missing = [name for name in expected if name not in stored]
    if missing:
        raise UserError(f"{source} lacks {_listed(missing)}; the model config asks for {len(expected)} tensors")
    extra = [name for name in stored if name not in expected and not _is_harmless(name, config)]
    if extra:
        raise UserError(
            f"{source} holds {_listed(extra)}, which the model config has no place for; "
            "does its config.json belong to these weights?"
        )
    for tensor in table:
        shape = stored[tensor.name].shape
        if shape != tensor.file_shape:
            raise UserError(
                f"{source}: {tensor.name} has shape {list(shape)}; the model config asks for {list(tensor.file_shape)}"
            )
    unreadable = next((problem for tensor in table if (problem := stored[tensor.name].unreadable)), None)
    if unreadable:
        raise UserError(f"{source}: {unreadable}")


def _is_harmless(name: str, config: ModelConfig) -> bool:
    """True for tensors that hold nothing to learn, a second copy, or the vision part of a Gemma 3."""
    return (
        name.endswith("rotary_emb.inv_freq")
        or (config.tie_embeddings and name.endswith("lm_head.weight"))
        or (
            config.family == "gemma3_text"
            and name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector."))
        )
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {shown}{more}"
