"""Devices that are not there: what XLA needs to compile for an accelerator that this machine has not.

A TPU topology is named by its generation and the chips along each side (``v5e:4x4``); its compiler comes with
``pip install 'jax[tpu]'``. ``cpu:8`` is that many devices of this machine, to see how arrays are cut.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

from jaxrm.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one device has, by its maker's data sheet (TPU: cloud.google.com/tpu/docs, "system architecture").

    Attributes:
      flops: peak of dense bfloat16 matrix products, FLOP/s.
      memory: GiB that programs may use.
      bandwidth: of that memory, bytes/s.
      link: bytes/s that it can send its neighbours over all links together.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


CHIPS = {
    "v4": Chip(275e12, 31.25, 1.2e12, 2.7e11),
    "v5e": Chip(197e12, 15.75, 8.2e11, 2.0e11),
    "v5p": Chip(459e12, 95.0, 2.765e12, 6.0e11),
    "v6e": Chip(918e12, 31.25, 1.64e12, 4.0e11),
}


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as it was given.
      devices: as many as the topology has.
      chip: what each has; None where that is not known, as on CPU.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None


def open_topology(name: str) -> Topology:
    """The devices of a topology; for ``cpu:N`` this has to come before the first array.

    Raises:
      UserError: where there is no such topology, or no compiler for it.
    """
    match = re.fullmatch(r"(cpu|v\d\w*):(\d+(?:x\d+)*)", name)
    if match is None or (match[1] not in CHIPS and match[1] != "cpu"):
        known = ", ".join(f"{kind}:{'x'.join(sides)}" for kind, sides in _examples().items())
        raise UserError(f"--topology is {name!r}; required a generation and its chips, such as {known}, or cpu:8")
    kind, sides = match[1], [int(side) for side in match[2].split("x")]
    if kind == "cpu":
        count = math.prod(sides)
        with contextlib.suppress(RuntimeError):  # devices are open: see below
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", count)
        if jax.device_count() != count:
            raise UserError(f"--topology is {name!r}, but {jax.device_count()} devices are open already")
        return Topology(name, tuple(jax.devices()), None)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no machine of Google's need be asked
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # of the plugin's own kinds
        if "libtpu" in str(error) or "No registered" in str(error) or "Unable to find" in str(error):
            raise UserError(
                f"--topology is {name!r}, and there is no compiler for TPUs here; pip install 'jax[tpu]'"
            ) from error
        raise UserError(f"--topology is {name!r}, which the TPU compiler does not know: {error}") from error
    return Topology(name, tuple(found.devices), CHIPS[kind])


def _examples() -> dict[str, tuple[str, ...]]:
    return {"v4": ("2", "2", "2"), "v5e": ("4", "4"), "v5p": ("4", "4", "4"), "v6e": ("4", "4")}
