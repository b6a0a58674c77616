"""Plans that fit: the nearest change to a config that does, and the best mesh for it; both are compiled."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxrm.config.dicts import with_changes
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment
from jaxrm.planning.cost import Plan, plan_stage
from jaxrm.planning.programs import Programs, device_bytes, stage_programs
from jaxrm.planning.topology import GIB, Topology
from jaxrm.runtime.progress import Progress
from jaxrm.sharding.mesh import AXES, batch_shards, build_mesh


@dataclass(frozen=True)
class Try:
    """A change to a config, and what came of it.

    Attributes:
      change: fields without ``config.`` and their new values.
      plan: of the changed config.
    """

    change: Mapping[str, Any]
    plan: Plan

    def typed(self, prefix: str = "config.") -> str:
        """The change as it is typed."""
        return " ".join(f"--{prefix}{name}={value}" for name, value in self.change.items()) or "the config as it is"


def nearest_fit(config: Experiment, topology: Topology, *, most: int, show_progress: bool = False) -> list[Try]:
    """Changes in the order in which a person would try them, up to the first that fits, which is the last one.

    More microbatches change nothing that is learnt and cost least, so they come first; then recomputed layers, then
    meshes that split the model further.

    Args:
      config: which does not fit.
      topology: that it does not fit.
      most: changes that are compiled.
      show_progress: on the console.
    """
    tries: list[Try] = []
    with Progress("look for one that fits", most, unit="tries", enabled=show_progress) as progress:
        for change in _room(config, topology, _near(config, topology)):
            tries.append(Try(change, plan_stage(with_changes(config, change), topology, until_misfit=True)))
            progress.update(len(tries))
            if tries[-1].plan.fits or len(tries) == most:
                break
    return tries


def best_fits(config: Experiment, topology: Topology, *, most: int, show_progress: bool = False) -> list[Try]:
    """Meshes and microbatches that were compiled, those that fit before the others, the fastest estimate first.

    A mesh is first judged by what its devices would send each other, by hand; the best of those are compiled, each with
    as few microbatches as fit.

    Args: as `nearest_fit`.
    """
    tries: list[Try] = []
    with Progress("search meshes", most, unit="tries", enabled=show_progress) as progress:
        for mesh_change in _room(config, topology, _meshes(config, topology)):
            for parts in _microbatches(with_changes(config, mesh_change), topology):
                if len(tries) == most:
                    break
                change = {**mesh_change, "num_microbatches": parts}
                tries.append(Try(change, plan_stage(with_changes(config, change), topology, until_misfit=True)))
                progress.update(len(tries))
                if tries[-1].plan.fits:
                    break
    return sorted(tries, key=lambda each: (not each.plan.fits, each.plan.seconds[1] if each.plan.seconds else math.inf))


def _near(config: Experiment, topology: Topology) -> Iterator[dict[str, Any]]:
    """Changes from the mildest on."""
    remats: list[dict[str, Any]] = [{}] if config.model.remat == "full" else [{}, {"model.remat": "full"}]
    for remat in remats if _divides(config, topology) else []:
        for parts in _microbatches(config, topology):
            if parts > config.num_microbatches or remat:
                yield {**remat, "num_microbatches": parts}
    own = dict(build_mesh(config.mesh, topology.devices).shape) if _divides(config, topology) else None
    for mesh in _meshes(config, topology):
        if dict(build_mesh(with_changes(config, mesh).mesh, topology.devices).shape) == own:
            continue
        several = _microbatches(with_changes(config, mesh), topology)
        for parts in dict.fromkeys((several[0], several[-1])):
            yield {**mesh, **remats[-1], "num_microbatches": parts}


def _divides(config: Experiment, topology: Topology) -> bool:
    """Whether model and batch divide over the config's mesh."""
    try:
        stage_programs(config, build_mesh(config.mesh, topology.devices))
    except UserError:
        return False
    return True


def _meshes(config: Experiment, topology: Topology) -> list[dict[str, int]]:
    """Every way to lay the devices that the config's model and batch divide into, the fewest sent bytes first."""
    count = len(topology.devices)
    found = []
    for tensor in _divisors(count):
        for fsdp in _divisors(count // tensor):
            sizes = {"data": count // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            sizes |= {axis: 1 for axis in AXES if axis not in sizes}
            change = {f"mesh.{axis}": size for axis, size in sizes.items() if size != getattr(config.mesh, axis)}
            tried = with_changes(config, {**change, "num_microbatches": 1})
            try:
                programs = stage_programs(tried, build_mesh(tried.mesh, topology.devices))
            except UserError:
                continue
            found.append((_sent(config, programs, sizes), change))
    return [change for _, change in sorted(found, key=lambda each: each[0])]


def _sent(config: Experiment, programs: Programs, sizes: Mapping[str, int]) -> float:
    """About how many bytes a device sends in a training step; only good for an order."""
    shape, width = programs.shape, jnp.dtype(config.model.dtype).itemsize
    parameters = programs.parameters / sizes["tensor"]
    tokens = config.data.batch_size * config.data.max_length / (sizes["data"] * sizes["fsdp"])
    gathers = 3 * width * parameters * (sizes["fsdp"] > 1)
    gradients = 2 * 4 * parameters / sizes["fsdp"] * (sizes["data"] > 1)
    activations = 8 * shape.num_layers * tokens * shape.hidden_size * width * (sizes["tensor"] > 1)
    return gathers + gradients + activations


def _room(config: Experiment, topology: Topology, changes: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The changes with which at least what stays on a device has room there."""
    for change in changes:
        tried = with_changes(config, change)
        residents = stage_programs(tried, build_mesh(tried.mesh, topology.devices)).residents
        if topology.chip is None or device_bytes(dict(residents)) <= topology.chip.memory * GIB:
            yield change


def _microbatches(config: Experiment, topology: Topology) -> list[int]:
    """Numbers of microbatches that a batch divides into on the config's mesh, doubling from the config's own."""
    rows = config.data.batch_size // batch_shards(build_mesh(config.mesh, topology.devices))
    if config.algorithm == "ppo":
        rows //= config.ppo.num_minibatches
    if config.ptx is not None and config.algorithm == "ppo":
        rows = math.gcd(rows, config.ptx.batch_size // batch_shards(build_mesh(config.mesh, topology.devices)))
    return [parts for parts in _divisors(rows) if parts == 1 or parts.bit_count() == 1] or [1]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
