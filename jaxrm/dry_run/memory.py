"""Memory of a training step on one device, by reckoning: no program is compiled.

What stays on the devices is exact. Activations are a rule of thumb (jaxrm choice): the saved input of every layer, the
widest layer's arrays, and one chunk of logits. `jaxrm.plan` compiles the programs and gives the true figure.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.models.config import ModelConfig
from jaxrm.ops.vocab import DEFAULT_CHUNK
from jaxrm.planning.abstract import BASE, device_bytes
from jaxrm.planning.programs import stage_programs
from jaxrm.sharding.mesh import batch_shards, build_mesh
from jaxrm.stage_config import PLANNED

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
    mesh = build_mesh(config.mesh)
    stage = stage_programs(config, mesh)
    residents = {_name(name, config): device_bytes(tree) for name, tree in stage.residents.items()}
    trained = [tree.params for tree in stage.residents.values() if hasattr(tree, "params")]
    rows = max(config.data.batch_size // (batch_shards(mesh) * config.num_microbatches), 1)
    return Memory(
        residents,
        max(device_bytes(params) for params in trained),
        _activations(stage.shape, rows * config.data.max_length, jnp.dtype(config.model.dtype).itemsize),
        _limit(),
    )


def _name(resident: str, config: Any) -> str:
    """What a resident is called; with adapters, those of a state are told from the base that they stand on."""
    if not config.lora.is_on:
        return resident
    if resident == BASE:
        return f"base in {config.model.quantize or config.model.dtype}"
    return "adapters and their optimizer" if resident == "state" else f"adapters of the {resident}"


def _activations(shape: ModelConfig, tokens: int, itemsize: int) -> float:
    """Bytes of a forward and backward pass that recomputes its layers, on a device with all of a row's tokens."""
    saved = shape.num_layers * shape.hidden_size
    attended = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    widest = 3 * shape.intermediate_size + 4 * shape.hidden_size + 2 * attended
    logits = 2 * 4 * min(DEFAULT_CHUNK, shape.vocab_size)  # float32, and their gradient
    return float(tokens * ((saved + widest) * itemsize + logits))


def _limit() -> float | None:
    """Bytes that one device may use; of a CPU, its share of the machine's memory."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return float((device.memory_stats() or {}).get("bytes_limit", 0)) or None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    except (ValueError, OSError, AttributeError):
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"
