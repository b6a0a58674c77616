"""Memory of a training step on one device, by reckoning: no program is compiled.

What stays on the devices is exact. Activations are a rule of thumb (`jaxrm.models.activations`). `jaxrm.plan` compiles
the programs and gives the true figure.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxrm.models.activations import activation_bytes
from jaxrm.planning.abstract import BASE
from jaxrm.planning.programs import stage_programs
from jaxrm.runtime.hardware import device_limit
from jaxrm.sharding.mesh import batch_shards, build_mesh
from jaxrm.sharding.partition import device_bytes
from jaxrm.stage_config import PLANNED
from jaxrm.stages import remat

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      residents: what stays there, by name.
      gradients: of the parameters that are trained.
      activations: of one microbatch, about.
      limit: of the device; None where it is not known.
    """

    residents: dict[str, float]
    gradients: float
    activations: float
    limit: float | None

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.residents.values()) + self.gradients + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.limit is None or self.total <= self.limit

    def as_text(self) -> str:
        """One line for people."""
        parts = {**self.residents, "gradients": self.gradients, "activations about": self.activations}
        listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
        limit = "" if self.limit is None else f" of {_gib(self.limit)}"
        advice = "" if self.fits else "; too much: jaxrm.plan finds what fits"
        return f"{_gib(self.total)}{limit} GiB a device ({listed}){advice}"


def reckon(config: Any) -> Memory | None:
    """Memory of a stage's steps on this machine's devices; None for a stage that trains nothing.

    Raises:
      UserError: where model or batch do not fit the mesh.
    """
    if config.algorithm not in PLANNED:
        return None
    config, mesh = remat.decide(config).config, build_mesh(config.mesh)
    stage = stage_programs(config, mesh)
    residents = {_name(name, config): device_bytes(tree) for name, tree in stage.residents.items()}
    trained = [tree.params for tree in stage.residents.values() if hasattr(tree, "params")]
    rows = max(config.data.batch_size // (batch_shards(mesh) * config.num_microbatches), 1)
    return Memory(
        residents,
        max(device_bytes(params) for params in trained),
        activation_bytes(
            stage.shape,
            rows * config.data.max_length,
            jnp.dtype(config.model.dtype).itemsize,
            config.model.remat,
            dict(mesh.shape),
        ),
        device_limit(),
    )


def _name(resident: str, config: Any) -> str:
    """What a resident is called; with adapters, those of a state are told from the base that they stand on."""
    if not config.lora.is_on:
        return resident
    if resident == BASE:
        return f"base in {config.model.quantize or config.model.dtype}"
    return "adapters and their optimizer" if resident == "state" else f"adapters of the {resident}"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"
