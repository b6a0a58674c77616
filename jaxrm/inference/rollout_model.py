"""How a policy answers prompts: on the mesh that it lies on, or on another layout of the same devices."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms import rollout
from jaxrm.algorithms.best_of_n import divide
from jaxrm.algorithms.rollout import BatchSampler
from jaxrm.errors import UserError, flag, option
from jaxrm.inference import decode_memory, sharded_model
from jaxrm.inference.decode_mesh import DecodeLoad, decode_meshes
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import build, lora
from jaxrm.models.cache import bytes_of_a_token
from jaxrm.models.quantized_params import count_parameters
from jaxrm.models.sampling import GenerateOptions
from jaxrm.models.transformer import DecodingStorage
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import batch_shards, check_batch, reshape_mesh
from jaxrm.stage_config import PPO


def shard_rollout_model(config: PPO, mesh: Mesh, policy: ShardedModel) -> ShardedModel:
    """The policy as it lies while it answers, on ``config.rollout.mesh`` or on one that is chosen.

    Nothing is allocated.

    Args:
      config: the whole config.
      mesh: that the policy lies on.
      policy: its decoder.

    Raises:
      UserError: where model or batch do not fit ``config.rollout.mesh``.
    """
    check_groups(config, mesh)
    if config.rollout.mesh is not None:
        return _on_mesh(config, reshape_mesh(mesh, config.rollout.mesh, "rollout.mesh"), policy, "rollout.mesh")
    for layout in decode_meshes(mesh, _decode_load(config, policy)) if mesh.devices.size > 1 else []:
        try:
            return _on_mesh(config, reshape_mesh(mesh, layout, "rollout.mesh"), policy, "rollout.mesh")
        except UserError:  # heads, vocabulary or batch do not divide
            continue
    return _on_mesh(config, mesh, policy, "mesh")


def with_storage(rollout_model: ShardedModel, storage: DecodingStorage) -> ShardedModel:
    """A policy whose loop over tokens reads weights that are stored so."""
    return replace(rollout_model, graphdef=build.with_storage(rollout_model.graphdef, rollout_model.shapes, storage))


def layout_of(rollout_model: ShardedModel) -> dict[str, dict[str, int]]:
    """The mesh that a policy writes on, as ``run.json`` records it."""
    return {"rollout_mesh": {axis: int(size) for axis, size in rollout_model.mesh.shape.items()}}


def layout_in_words(rollout_model: ShardedModel) -> str:
    """The mesh that a policy writes on, as ``tensor 8``."""
    sizes = [f"{axis} {size}" for axis, size in rollout_model.mesh.shape.items() if size > 1]
    return " x ".join(sizes) or "one device"


def _on_mesh(config: PPO, mesh: Mesh, policy: ShardedModel, field: str) -> ShardedModel:
    parts = config.rollout.num_microbatches
    check_batch(
        mesh,
        "data.batch_size",
        config.data.batch_size,
        parts,
        mesh_field=field,
        microbatches_field="rollout.num_microbatches",
    )
    check_groups(config, mesh, parts, mesh_field=field)
    check_slots(config, mesh, mesh_field=field)
    if mesh.shape == policy.mesh.shape:
        return policy
    return sharded_model.shard_model(config.model, mesh, policy.config, lora=policy.lora, field=field)


def check_cache(config: Any, rollout_model: ShardedModel, prompt_length: int) -> None:
    """Refuse responses whose keys and values no device has room for, before anything is allocated.

    Args:
      config: the whole config.
      rollout_model: from `shard_rollout_model`.
      prompt_length: tokens that prompts are padded to.

    Raises:
      UserError: with the most responses at once that fit.
    """
    weights = _decode_load(config, rollout_model).weights
    decode_memory.check_rollout(config, rollout_model.config, rollout_model.mesh, weights, prompt_length)


def _decode_load(config: PPO, policy: ShardedModel) -> DecodeLoad:
    """What one part of a batch reads for a token; the input embedding is looked up, not read."""
    shape, rollout, itemsize = policy.config, config.rollout, np.dtype(config.model.dtype).itemsize
    own = lora.split(policy.shapes)[1] or policy.shapes  # adapters are merged
    read = count_parameters(own) - (0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size)
    rows = rollout.slots or config.data.batch_size / rollout.num_microbatches
    length = rollout.sampling.max_new_tokens
    slots = rows * (length + (config.data.max_length - length) / rollout.responses_per_prompt)
    return DecodeLoad(
        weights=read * (1 if rollout.weights == "int8" else itemsize),
        cache=slots * bytes_of_a_token(shape, itemsize, rollout.cache),
        kv_heads=shape.num_kv_heads,
        sums=2 * shape.num_layers,
        sum_bytes=rows * shape.hidden_size * itemsize,
    )


def check_groups(config: Any, mesh: Mesh, num_microbatches: int = 1, *, mesh_field: str = "mesh") -> None:
    """Refuse a batch of responses that is not as many whole groups, one for each prompt, on every device.

    Args:
      config: the whole config.
      mesh: that the prompts lie on.
      num_microbatches: parts that they are answered in.
      mesh_field: that says how ``mesh`` lies, for messages.

    Raises:
      UserError: naming the nearest batch that divides, and the most responses a prompt that do.
    """
    n, batch_size = config.rollout.responses_per_prompt, config.data.batch_size
    unit = batch_shards(mesh) * num_microbatches
    if n == 1 or batch_size % (n * unit) == 0:
        return
    size, count = option("data.batch_size"), option("rollout.responses_per_prompt")
    groups = f"no multiple of {count} {n}" if batch_size % n else f"{count} {n} to each of {batch_size // n} prompts"
    microbatches = f" x {num_microbatches} microbatches" if num_microbatches > 1 else ""
    fewer = [each for each in range(2, n) if batch_size % (each * unit) == 0]
    nearest = max(1, round(batch_size / (n * unit))) * n * unit
    raise UserError(
        f"{size} is {batch_size}, {groups}, but prompts lie on the {batch_shards(mesh)} devices of the data and fsdp "
        f"axes of {option(mesh_field)}{microbatches}; use a multiple of {n * unit}, e.g. "
        f"{flag('data.batch_size')}={nearest}"
        + (f", or {flag('rollout.responses_per_prompt')}={fewer[-1]}" if fewer else "")
    )


def check_slots(config: Any, mesh: Mesh, *, mesh_field: str = "mesh") -> None:
    """Refuse slots that are not as many whole groups of responses on every device, or that mean nothing.

    Args:
      config: the whole config.
      mesh: that the prompts lie on while they are answered.
      mesh_field: that says how ``mesh`` lies, for messages.

    Raises:
      UserError: naming what to type.
    """
    rollout, batch_size = config.rollout, config.data.batch_size
    slots, n, parts = rollout.slots, rollout.responses_per_prompt, rollout.num_microbatches
    if slots is None:
        return
    name, unit = "rollout.slots", n * batch_shards(mesh)
    if parts > 1:
        raise UserError(
            f"{option(name)} is {slots} and {option('rollout.num_microbatches')} is {parts}, but both say how many "
            f"responses are written at once; use {flag('rollout.num_microbatches')}=1, or {flag(name)}=None"
        )
    if slots > batch_size:
        raise UserError(
            f"{option(name)} is {slots}, but a batch has {batch_size} responses ({option('data.batch_size')}); use "
            f"{flag(name)}=None to write all of them at once"
        )
    if slots % unit:
        groups = f"in groups of {option('rollout.responses_per_prompt')} {n} on" if n > 1 else "on"
        raise UserError(
            f"{option(name)} is {slots}, but slots lie {groups} the {batch_shards(mesh)} devices of the data and "
            f"fsdp axes of {option(mesh_field)}; use a multiple of {unit}, e.g. "
            f"{flag(name)}={max(1, round(slots / unit)) * unit}"
        )


def divide_responses(config: Any, mesh: Mesh, rollout_mesh: Mesh, n: int) -> tuple[int, int]:
    """Prompts of a draw, and responses to each of them, of n in all: `jaxrm.algorithms.best_of_n.divide`.

    Together they are at most ``config.data.batch_size``, so a draw takes no more memory than one response to each of so
    many prompts.

    Args:
      config: the whole config.
      mesh: that responses are scored on.
      rollout_mesh: that the policy answers on.
      n: responses to each prompt.
    """
    rollout, shards, rollout_shards = config.rollout, batch_shards(mesh), batch_shards(rollout_mesh)
    return divide(
        n,
        config.data.batch_size,
        prompt_unit=math.lcm(shards, rollout_shards * rollout.num_microbatches),
        row_unit=shards * config.num_microbatches,
        slot_unit=None if rollout.slots is None else rollout.slots // rollout_shards,
    )


def check_one_response_a_prompt(config: Any, instead: str) -> None:
    """Refuse several responses a prompt in a stage that has an option of its own for them: ``instead``.

    Raises:
      UserError: naming that option.
    """
    n = config.rollout.responses_per_prompt
    if n > 1:
        count = "rollout.responses_per_prompt"
        raise UserError(
            f"{option(count)} is {n}, which is for PPO alone; here use {flag(instead)}={n} with {flag(count)}=1"
        )


def check_is_exact(config: Any) -> None:
    """Refuse in other stages what is for PPO's rollouts alone, whose training forward says how far they are off.

    Raises:
      UserError: naming the field.
    """
    for name, default in (("weights", "compute"), ("cache", "compute"), ("max_mismatch", None)):
        value = getattr(config.rollout, name)
        if value != default:
            field = f"rollout.{name}"
            raise UserError(f"{option(field)} is {value!r}, which is for PPO alone; use {flag(field)}={default}")


def build_sampler(
    policy: ShardedModel,
    rollout_model: ShardedModel,
    *,
    dtype: str,
    options: GenerateOptions,
    num_microbatches: int = 1,
) -> BatchSampler:
    """The programs by which a policy answers.

    Args:
      policy: the decoder as it lies in training.
      rollout_model: from `shard_rollout_model`.
      dtype: compute dtype.
      options: how it answers a part.
      num_microbatches: parts of a batch of prompts that are answered one after another.
    """
    rows = partition.batch_sharding(rollout_model.mesh)
    sample = rollout.build_sample(
        rollout_model.graphdef,
        options=options,
        params_sharding=rollout_model.shardings,
        batch_sharding=rows,
        num_microbatches=num_microbatches,
    )
    n = options.responses_per_prompt
    if rollout_model.mesh.shape == policy.mesh.shape:
        return BatchSampler(sample, responses_per_prompt=n)
    reshard = rollout.build_reshard(
        dtype,
        params_sharding=policy.shardings,
        batch_sharding=partition.batch_sharding(policy.mesh),
        to_params=rollout_model.shardings,
        to_batch=rows,
    )
    return BatchSampler(sample, reshard, n)
