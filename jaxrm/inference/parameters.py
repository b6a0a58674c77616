"""Parameters of a model as its graph has them: read or drawn, and with adapters joined to their base or merged."""

from dataclasses import replace
from typing import Any

import jax

from jaxrm.errors import UserError, flag, option
from jaxrm.inference import sharded_model, weights
from jaxrm.inference.base import Base, describe_base, load_base, locate_base, read_base, recorded_base
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.inference.weights import RunCheckpoint
from jaxrm.models import heads, lora, quantized
from jaxrm.models.build import ModelSource


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


def stands_on_base_of(run: RunCheckpoint, source: ModelSource, seed: int) -> bool:
    """Whether a run with adapters stands on the base of ``source``: the same place, or else the same content."""
    adapters, mine = weights.adapter_run(source), recorded_base(run)
    other = locate_base(source, seed) if adapters is None else recorded_base(adapters)
    if (mine.path, mine.preset, mine.seed) == (other.path, other.preset, other.seed):
        return True
    return mine.sha256 == base_of(source, seed).sha256


def init_params(model: ShardedModel, key: jax.Array, seed: int) -> Any:
    """First parameters of a decoder: of its source, or drawn.

    With adapters they are the frozen base, in the compute dtype, joined with adapters: those of the source, or first
    ones, which change nothing. Without adapters those of the source are merged into its weights.

    Args:
      model: the decoder.
      key: typed PRNG key of what is drawn.
      seed: that a drawn base follows from.
    """
    run = weights.adapter_run(model.source)
    if not model.lora.is_on and run is None:
        return weights.load_or_init_params(model.config, model.source, key, model.shapes, model.shardings)
    base = base_of(model.source, seed)
    if run is not None and (run.lora == model.lora or not model.lora.is_on):
        return _read_adapters(run, model, base)
    if run is None:
        frozen = load_base(base, model, init_key(seed))
    else:  # other adapters than the model's, which only an evaluation has: they are merged into what is frozen
        whole = sharded_model.shard_model(model.source, model.mesh, model.config)
        frozen = sharded_model.in_compute_dtype(_read_adapters(run, whole, base), model.source.dtype)
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


def check_adapters(run: RunCheckpoint, wanted: lora.LoRAConfig) -> None:
    """Refuse adapters to go on from that are not those which the config trains.

    Raises:
      UserError: another rank, scale or targets.
    """
    if wanted.is_on and run.lora.is_on and run.lora != wanted:
        raise UserError(
            f"{option('lora')} is {wanted}, but {run.name} has {run.lora}; train those on, {_as_flags(run.lora)}, or "
            f"merge them first: python -m jaxrm.export --checkpoint={run.folder.path} --merge --output=MERGED and "
            f"{flag('model.path')}=MERGED"
        )


def _as_flags(config: lora.LoRAConfig) -> str:
    default = lora.NO_LORA
    values = {"rank": config.rank, "alpha": config.alpha, "rank_stabilized": config.rank_stabilized}
    texts = [f"{flag(f'lora.{name}')}={value:g}" for name, value in values.items() if value != getattr(default, name)]
    if config.targets != default.targets:
        texts.append(f"{flag('lora.targets')}={','.join(config.targets)}")
    return " ".join(texts)


def _read_adapters(run: RunCheckpoint, model: ShardedModel, base: Base) -> Any:
    """The base joined with the adapters of a run, or merged with them where the model has none."""
    has_head = run.config.algorithm == "scalar_rm"
    shard = sharded_model.shard_scalar_model if has_head else sharded_model.shard_model
    # Merged, they are those of the base that they were trained on.
    source = replace(model.source, quantize=run.config.model.quantize)
    whole = model if model.lora.is_on else shard(source, model.mesh, model.config, lora=run.lora)
    assert whole.lora == run.lora, "refused by check_adapters"
    decoder = sharded_model.shard_model(whole.source, model.mesh, model.config, lora=run.lora) if has_head else whole
    frozen = load_base(base, decoder, init_key(base.seed))
    if has_head:
        frozen = heads.frozen_trunk(frozen)
    joined = lora.join(frozen, run.restore(whole.trained_shapes, whole.trained_shardings))
    if model.lora.is_on:
        return joined
    assert model.source.quantize is None, "refused by check_trainable"
    dtypes = jax.tree.map(lambda x: x.dtype, model.shapes)  # those that are trained, whatever the base is computed in

    def merged(params: Any) -> Any:
        whole = lora.merge(quantized.dequantize_params(params), run.lora)
        return jax.tree.map(lambda x, dtype: x.astype(dtype), whole, dtypes)

    return jax.jit(merged, out_shardings=model.shardings)(joined)
