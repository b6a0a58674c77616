"""Parameters of a model as its graph has them: read or drawn, and with adapters joined to their base or merged."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.config.field_types import as_text
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.base import (
    Base,
    describe_base,
    is_same_place,
    load_base,
    locate_base,
    read_base,
    recorded_base,
)
from jaxrm.inference.run_checkpoint import RunCheckpoint
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import heads, hub, lora, quantized_params
from jaxrm.models.build import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def init_key(seed: int) -> jax.Array:
    """Key that the first parameters of a run are drawn with."""
    return jax.random.split(jax.random.key(seed))[0]


def base_of(source: ModelSource, seed: int) -> Base:
    """The base that a run from ``source`` stands on: that of its adapters, or else its weights.

    Raises:
      UserError: where it has moved or changed.
    """
    run = weights.adapter_run(source)
    return describe_base(source, seed) if run is None else read_base(run, source.path if source.adapter else None)


def located_base(source: ModelSource, seed: int) -> Base:
    """The same by the records alone; nothing is read, and it may have moved or changed."""
    run = weights.adapter_run(source)
    return locate_base(source, seed) if run is None else recorded_base(run)


def stands_on_base_of(run: RunCheckpoint, source: ModelSource, seed: int) -> bool | None:
    """Whether a run with adapters stands on the base of ``source``, by the records; None where they do not tell."""
    mine, other = recorded_base(run), located_base(source, seed)
    if is_same_place(mine, other):
        return True
    return mine.sha256 == other.sha256 if mine.sha256 and other.sha256 else None


def init_params(model: ShardedModel, key: jax.Array, seed: int) -> Any:
    """First parameters of a decoder: of its source, or drawn.

    With adapters they are the frozen base, in the compute dtype, joined with adapters: those of the source, or first
    ones, which change nothing. Without adapters those of the source are merged into its weights.

    Args:
      model: the decoder.
      key: typed PRNG key of what is drawn.
      seed: that a drawn base follows from.
    """
    run, adapter = weights.adapter_run(model.source), weights.peft_adapter(model.source)
    read: Callable[[ShardedModel, Base], Any] | None = None
    if adapter is not None:
        read = functools.partial(_read_peft, adapter)
    elif run is not None:
        read = functools.partial(_read_adapters, run)
    if not model.lora.is_on and read is None:
        return weights.load_or_init_params(model.config, model.source, key, model.shapes, model.shardings)
    base = base_of(model.source, seed)
    if read is None:
        frozen = load_base(base, model, init_key(seed))
    elif not model.lora.is_on or weights.lora_of(model.source) == model.lora:
        return read(model, base)
    else:  # other adapters than the model's, which only an evaluation has: they are merged into what is frozen
        plain = sharded_model.shard_model(model.source, model.mesh, model.config)
        frozen = sharded_model.in_compute_dtype(read(plain, base), model.source.dtype)
    first = lora.init_adapters(model.trained_shapes, jax.random.fold_in(key, 1), model.trained_shardings)
    return lora.join(frozen, first)


def read_run(run: RunCheckpoint, model: ShardedModel, base_path: str | None = None) -> Any:
    """Parameters of a run's checkpoint, of a decoder or of one with a scalar head.

    Args:
      run: with or without adapters.
      model: of the run. Where it has no adapters and the run has, those are merged.
      base_path: where the base of its adapters is now; None where it was.

    Raises:
      UserError: there is a base for it, but it has no adapters; or the base is not there, or another one.
    """
    if base_path is not None:
        weights.check_has_adapters(run)
    if not run.lora.is_on:
        return run.restore(model.shapes, model.shardings)
    return _read_adapters(run, model, read_base(run, base_path))


def check_adapters(source: ModelSource, wanted: lora.LoRAConfig) -> None:
    """Refuse adapters to go on from that are not those which the config trains.

    Raises:
      UserError: another rank, scale or targets.
    """
    present = weights.lora_of(source)
    if not (wanted.is_on and present.is_on) or present == wanted:
        return
    given = f"--weights={source.path} --adapter={source.adapter}" if source.adapter else f"--checkpoint={source.path}"
    raise UserError(
        f"{option('lora')} is {wanted}, but {weights.name_of(source)} has {present}; train those on, "
        f"{_as_flags(present)}, or merge them first: python -m jaxrm.export {given} --merge --output=MERGED and "
        f"{flag('model.path')}=MERGED"
    )


def _as_flags(config: lora.LoRAConfig) -> str:
    default = lora.NO_LORA
    values = {"rank": config.rank, "alpha": config.alpha, "rank_stabilized": config.rank_stabilized}
    changed = {name: value for name, value in values.items() if value != getattr(default, name)}
    texts = [f"{flag(f'lora.{name}')}={as_text(value)}" for name, value in changed.items()]
    if config.targets != default.targets:
        texts.append(f"{flag('lora.targets')}={','.join(config.targets)}")
    return " ".join(texts)


def read_trained(run: RunCheckpoint, mesh: Mesh) -> tuple[ShardedModel, Any, "PreTrainedTokenizerBase"]:
    """The model of a run with adapters, without its base; the adapters, with a scalar head if any; the tokenizer."""
    tokenizer = run.load_tokenizer()
    shape = sharded_model.with_tokens(run.shape, tokenizer)
    source = ModelSource(preset="as trained", dtype=run.config.model.dtype)
    is_scalar = run.config.algorithm == "scalar_rm"
    shard = sharded_model.shard_scalar_model if is_scalar else sharded_model.shard_model
    model = shard(source, mesh, shape, lora=run.lora)
    return model, run.restore(model.trained_shapes, model.trained_shardings), tokenizer


def merge(model: ShardedModel, params: Any, shardings: Any = None) -> Any:
    """Parameters of the model without adapters that computes the same, where ``shardings`` says or as they lie."""
    if shardings is None:
        shard = sharded_model.shard_scalar_model if lora.SCALAR_HEAD in params else sharded_model.shard_model
        shardings = shard(dataclasses.replace(model.source, quantize=None), model.mesh, model.config).shardings

    def merged(params: Any) -> Any:
        return lora.merge(quantized_params.dequantize_params(params), model.lora)

    return jax.jit(merged, out_shardings=shardings)(params)


def read_adapted(model: ShardedModel) -> Any:
    """Parameters of ``model.source``'s base with its PEFT folder: of a decoder, or of one with a scalar head."""
    adapter = weights.peft_adapter(model.source)
    assert adapter is not None, model.source
    return _read_peft(adapter, model, base_of(model.source, 0))


def _read_adapters(run: RunCheckpoint, model: ShardedModel, base: Base) -> Any:
    """The base joined with the adapters of a run, or merged with them where the model has none."""

    def read(whole: ShardedModel) -> Any:
        return run.restore(whole.trained_shapes, whole.trained_shardings)

    # Merged, they are those of the base that they were trained on.
    source = dataclasses.replace(model.source, quantize=run.config.model.quantize)
    return _on_base(model, base, source, run.lora, run.config.algorithm == "scalar_rm", read)


def _read_peft(adapter: hub.Adapter, model: ShardedModel, base: Base) -> Any:
    """The base joined with the adapters of a PEFT folder, or merged with them where the model has none."""
    is_other = adapter.base is not None and base.path is not None and _last(adapter.base) != _last(base.path)
    if is_other and jax.process_index() == 0:
        print(f"{adapter.folder} says that its base is {adapter.base}; here it stands on {base.path}")

    def read(whole: ShardedModel) -> Any:
        _, tree = hub.read_adapter(str(adapter.folder), model.config)
        return jax.tree.map(_place, tree, whole.trained_shardings)

    return _on_base(model, base, model.source, adapter.lora, adapter.scalar_head, read)


def _on_base(
    model: ShardedModel,
    base: Base,
    source: ModelSource,
    adapters: lora.LoRAConfig,
    has_head: bool,
    read: Callable[[ShardedModel], Any],
) -> Any:
    """Adapters that ``read`` gives for the model that has them, joined with their base or merged into it.

    Where they are merged, ``source`` says how the base lies; it is not rounded to the compute dtype, since what is
    merged may be trained whole or written.
    """
    merged = not model.lora.is_on
    if merged and model.source.quantize is not None:
        raise UserError(
            f"{option('model.quantize')} is {model.source.quantize!r}, but adapters are merged here, which quantized "
            f"weights cannot take up; give {flag('model.quantize')}=None"
        )
    source = dataclasses.replace(source, dtype="float32", attention="auto", cached_attention="auto", vocabulary="auto")
    shard = sharded_model.shard_scalar_model if has_head else sharded_model.shard_model
    whole = shard(source, model.mesh, model.config, lora=adapters) if merged else model
    decoder = sharded_model.shard_model(whole.source, model.mesh, model.config, lora=adapters) if has_head else whole
    frozen = load_base(base, decoder, init_key(base.seed))
    if has_head:
        frozen = heads.frozen_trunk(frozen)
    joined = lora.join(frozen, read(whole))
    return merge(whole, joined, model.shardings) if merged else joined


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _last(path: str) -> str:
    """The last part of a model's name or folder, without case."""
    return Path(path).name.lower()
