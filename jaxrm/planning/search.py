"""Search for plans that fit: the mildest change to a config that does, and the fastest mesh. Both are compiled."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.config.dicts import with_changes
from jaxrm.errors import UserError, flag
from jaxrm.inference.decode_memory import WHILE_FILLED, rows_that_fit
from jaxrm.models import quantized_params
from jaxrm.planning.abstract import StagePrograms
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.cost import StagePlan
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.topology import GIB, Topology
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.runtime.progress import Progress
from jaxrm.sharding.mesh import AXES, batch_shards, build_mesh
from jaxrm.sharding.partition import device_bytes
from jaxrm.stage_config import PPO, TrainingConfig

SUGGESTED_RANK = 16  # of adapters (jaxrm choice)


@dataclass(frozen=True)
class Trial:
    """Changes to a config, and the plan with them.

    Attributes:
      changes: new values by dotted field, ``{"mesh.fsdp": 4}``.
      plan: of the changed config.
    """

    changes: Mapping[str, Any]
    plan: StagePlan

    def as_flags(self) -> str:
        """The changes as command-line flags."""
        return " ".join(f"{flag(name)}={value}" for name, value in self.changes.items()) or "the config as written"


def nearest_fit(config: TrainingConfig, topology: Topology, *, most: int, show_progress: bool = False) -> list[Trial]:
    """Try changes, the mildest first, up to the first that fits, which is the last one.

    More microbatches do not change the result and cost least, so they come first; then recomputed layers, then meshes
    that split the model further. The other half of the trials is for what trains something else: adapters in place of
    the weights (LoRA), then adapters on a quantized base.

    Args:
      config: that does not fit.
      topology: the devices.
      most: trials at most.
      show_progress: on the console.
    """
    trials: list[Trial] = []
    with Progress("look for one that fits", most, unit="tries", enabled=show_progress) as progress:
        mild = _where_residents_fit(config, topology, _mild_changes(config, topology))
        adapters = _where_residents_fit(config, topology, _adapter_changes(config, topology))
        # Half of the tries for mild changes, then adapters; what is left, where none of those fits, is for mild ones.
        for changes in itertools.chain(itertools.islice(mild, max(1, most // 2)), adapters, mild):
            trials.append(_try(config, changes, topology))
            progress.update(len(trials))
            if trials[-1].plan.fits or len(trials) == most:
                break
    return trials


def best_fits(config: TrainingConfig, topology: Topology, *, most: int, show_progress: bool = False) -> list[Trial]:
    """Try meshes and numbers of microbatches; those that fit come first, the fastest estimate before the others.

    Meshes are ordered by a rough count of their communication. The best are compiled, each with as few microbatches as
    fit. Arguments as for ``nearest_fit``.
    """
    trials: list[Trial] = []
    with Progress("search meshes", most, unit="tries", enabled=show_progress) as progress:
        for mesh_changes in _where_residents_fit(config, topology, _mesh_changes(config, topology)):
            for num_microbatches in _microbatches(with_changes(config, mesh_changes), topology):
                if len(trials) == most:
                    break
                trials.append(_try(config, {**mesh_changes, "num_microbatches": num_microbatches}, topology))
                progress.update(len(trials))
                if trials[-1].plan.fits:
                    break
    return rank(trials)


def rank(trials: Iterable[Trial]) -> list[Trial]:
    """Trials that fit before the others, the fastest first by its time with no overlap."""
    return sorted(trials, key=lambda each: (not each.plan.fits, (each.plan.seconds or (0.0, math.inf))[1]))


def _try(config: TrainingConfig, changes: Mapping[str, Any], topology: Topology) -> Trial:
    return Trial(changes, plan_stage(with_changes(config, changes), topology, until_misfit=True))


def _mild_changes(config: TrainingConfig, topology: Topology) -> Iterator[dict[str, Any]]:
    """Changes, the mildest first: more microbatches, recomputed layers, other meshes."""
    remats: list[dict[str, Any]] = [{}] if config.model.remat == "full" else [{}, {"model.remat": "full"}]
    divides = _divides(config, topology)
    for remat in remats if divides else []:
        for num_microbatches in _microbatches(config, topology):
            if num_microbatches > config.num_microbatches or remat:
                yield {**remat, "num_microbatches": num_microbatches}
    own_mesh = dict(build_mesh(config.mesh, topology.devices).shape) if divides else None
    for mesh_changes in _mesh_changes(config, topology):
        changed = with_changes(config, mesh_changes)
        if dict(build_mesh(changed.mesh, topology.devices).shape) == own_mesh:
            continue
        choices = _microbatches(changed, topology)
        for num_microbatches in dict.fromkeys((choices[0], choices[-1])):
            yield {**mesh_changes, **remats[-1], "num_microbatches": num_microbatches}


def _adapter_changes(config: TrainingConfig, topology: Topology) -> Iterator[dict[str, Any]]:
    """Changes to training adapters on a frozen base, then on a quantized one; each as written, then in more parts."""
    adapters: dict[str, Any] = {} if config.lora.is_on else {"lora.rank": SUGGESTED_RANK}
    quantized = {} if config.model.quantize is not None else {"model.quantize": "nf4"}
    least = {} if config.model.remat == "full" else {"model.remat": "full"}
    meshes = [{}] if _divides(config, topology) else _mesh_changes(config, topology)[:1]
    for base in (adapters, {**adapters, **quantized} if quantized else {}):
        for mesh_changes in meshes if base else []:
            changes = {**base, **mesh_changes}
            yield changes
            choices = _microbatches(with_changes(config, changes), topology)
            for num_microbatches in dict.fromkeys((choices[len(choices) // 2], choices[-1])):
                if least or num_microbatches > config.num_microbatches:
                    yield {**changes, **least, "num_microbatches": num_microbatches}


def _divides(config: TrainingConfig, topology: Topology) -> bool:
    """Whether the config's mesh divides model and batch."""
    try:
        stage_programs(config, build_mesh(config.mesh, topology.devices))
    except UserError:
        return False
    return True


def _mesh_changes(config: TrainingConfig, topology: Topology) -> list[dict[str, int]]:
    """Every mesh of data, fsdp and tensor that divides model and batch, the least communication first."""
    count = len(topology.devices)
    meshes = []
    for tensor in _divisors(count):
        for fsdp in _divisors(count // tensor):
            sizes = {"data": count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            sizes |= {axis: 1 for axis in AXES if axis not in sizes}
            changes = {f"mesh.{axis}": size for axis, size in sizes.items() if size != getattr(config.mesh, axis)}
            changed = with_changes(config, {**changes, "num_microbatches": 1})
            try:
                stage = stage_programs(changed, build_mesh(changed.mesh, topology.devices))
            except UserError:
                continue
            meshes.append((_communication(config, stage, sizes), changes))
    return [changes for _, changes in sorted(meshes, key=lambda each: each[0])]


def _communication(config: TrainingConfig, stage: StagePrograms, sizes: Mapping[str, int]) -> float:
    """Roughly the bytes that a device sends in a training step; only good for an order."""
    itemsize = jnp.dtype(config.model.dtype).itemsize
    parameters = stage.parameters / sizes["tensor"]
    tokens = config.data.batch_size * config.data.max_length / (sizes["data"] * sizes["fsdp"])
    gathers = 3 * itemsize * parameters * (sizes["fsdp"] > 1)
    gradients = 2 * 4 * parameters / sizes["fsdp"] * (sizes["data"] > 1)
    activations = 8 * stage.shape.num_layers * tokens * stage.shape.hidden_size * itemsize * (sizes["tensor"] > 1)
    return gathers + gradients + activations


def _where_residents_fit(
    config: TrainingConfig, topology: Topology, candidates: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The changes with which at least the residents fit; the others need not be compiled.

    Where the key-value cache of a rollout does not fit beside them, prompts are answered in parts.
    """
    memory = math.inf if topology.chip is None else topology.chip.memory * GIB
    for changes in candidates:
        changed = with_changes(config, changes)
        try:
            stage = stage_programs(changed, build_mesh(changed.mesh, topology.devices))
        except UserError:  # such as a mesh that divides kernels, but not their codes
            continue
        if device_bytes(dict(stage.residents)) > memory:
            continue
        yield {**changes, **(_rollout_changes(changed, stage, memory) if isinstance(changed, PPO) else {})}


def _rollout_changes(config: PPO, stage: StagePrograms, memory: float) -> dict[str, Any]:
    """Fewer slots, or parts to answer prompts in, so that the cache fits; none where that of the config may do.

    A rule of thumb (jaxrm choice): half of the cache exists twice, while it is filled with the prompts, and the loop
    over tokens has the layers once more in the compute dtype.
    """
    rollout = next(program for program in stage.programs if program.name == "rollout")
    weights, *_ = rollout.arguments
    shardings = jax.tree.map(lambda x: x.sharding, weights)
    plain = with_shardings(quantized_params.plain_shapes(weights), quantized_params.plain_shardings(shardings))
    in_compute_dtype = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, config.model.dtype, sharding=x.sharding), plain
    )
    taken = device_bytes(dict(stage.residents)) + device_bytes(rollout.copied_parameters)
    free = memory - taken - device_bytes(in_compute_dtype)
    present = config.rollout.num_microbatches
    if WHILE_FILLED * rollout.cache_bytes <= free:
        return {}
    prompts = rollout.arguments[1]
    if (slots := config.rollout.slots) is not None:
        unit = config.rollout.responses_per_prompt * batch_shards(prompts.sharding.mesh)
        slots = rows_that_fit(free, rollout.cache_bytes * unit / slots, unit)
        return {"rollout.slots": max(slots, unit)}
    rows = prompts.shape[0] // batch_shards(prompts.sharding.mesh)
    choices = [each for each in _divisors(rows) if each.bit_count() == 1 and each > present]
    fitting = [each for each in choices if WHILE_FILLED * rollout.cache_bytes * present / each <= free]
    parts = next(iter(fitting), choices[-1] if choices else None)
    return {} if parts is None else {"rollout.num_microbatches": parts}


def _microbatches(config: TrainingConfig, topology: Topology) -> list[int]:
    """Powers of two that divide the rows of a device, for the number of microbatches."""
    shards = batch_shards(build_mesh(config.mesh, topology.devices))
    rows = config.data.batch_size // shards
    if isinstance(config, PPO):
        rows //= config.ppo.num_minibatches
        if config.ptx is not None:
            rows = math.gcd(rows, config.ptx.batch_size // shards)
    return [divisor for divisor in _divisors(rows) if divisor.bit_count() == 1] or [1]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
