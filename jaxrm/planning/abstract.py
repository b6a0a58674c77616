"""Programs and arrays without content: shapes, dtypes and shardings, enough to compile for devices elsewhere."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrm.models.config import ModelConfig
from jaxrm.sharding import partition

BASE = "base"  # name of the resident that all adapters stand on


@dataclass(frozen=True)
class Program:
    """One jitted program.

    Attributes:
      name: what it does.
      jitted: a jitted function.
      arguments: abstract, each with its sharding.
      tokens: on all devices that it trains on, reads or generates, padding included.
      resident_arguments: those of its arguments that stay on the devices between programs.
      model_flops: FLOPs of the model on all devices, without recomputation, counted by hand.
      while_trips: most iterations of a loop whose length depends on the data; None where there is no such loop.
      cache_bytes: bytes of the key-value cache on one device.
      cache_read: share of the cache that its kernel reads at a step in the mean.
      times: how often a step runs it.
      copied_parameters: abstract parameters that exist only while it runs; None where there are none.
    """

    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    tokens: int
    resident_arguments: Any
    model_flops: float
    while_trips: int | None = None
    cache_bytes: float = 0.0
    cache_read: float = 1.0
    times: int = 1
    copied_parameters: Any = None


@dataclass(frozen=True)
class StagePrograms:
    """The programs of a stage, and what stays on the devices between them.

    Attributes:
      programs: in the order in which a step runs them.
      residents: abstract pytrees by name: states, frozen models.
      parameters: number of parameters of the largest model.
      trained_parameters: how many of them are trained.
      shape: of its decoder.
      kernels: of its decoder, in words.
    """

    programs: tuple[Program, ...]
    residents: Mapping[str, Any]
    parameters: int
    trained_parameters: int
    shape: ModelConfig
    kernels: str

    def bytes_beside(self, program: Program) -> float:
        """Bytes on one device of the residents that are no arguments of a program."""
        return partition.device_bytes(dict(self.residents)) - partition.device_bytes(program.resident_arguments)


def abstract_batch(batch_type: type, rows: int, length: int, mesh: Mesh) -> Any:
    """An abstract batch: masks are bool, reference log-probs float32, the rest int32, as from the loaders."""
    sharding = partition.batch_sharding(mesh)
    dtypes = dict.fromkeys(("loss_mask", "is_correction", "is_edit", "is_chosen_end"), jnp.bool_)
    return batch_type(
        **{
            field.name: jax.ShapeDtypeStruct(
                (rows, length),
                jnp.float32 if field.name.startswith("reference_") else dtypes.get(field.name, jnp.int32),
                sharding=sharding,
            )
            for field in dataclasses.fields(batch_type)
        }
    )
