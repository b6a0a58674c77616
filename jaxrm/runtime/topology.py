"""Devices that are not there: what XLA needs to compile for an accelerator that this machine has not.

A TPU topology is named by its generation and the chips along each side (``v5e:4x4``); its compiler comes with
``pip install 'jax[tpu]'``. GPUs are named by hosts and what each has (``h100:2x8``, ``h100:8`` for one host); their
compiler comes with ``pip install 'jax[cuda13]'`` and wants no driver. ``cpu:8`` is that many devices of this machine,
to see how arrays are cut.
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
    """What one device has, by its maker's data sheet (TPU: cloud.google.com/tpu/docs, "system architecture"; GPU:
    NVIDIA H100 SXM5).

    Attributes:
      flops: peak of dense bfloat16 matrix products, FLOP/s.
      memory: GiB that programs may use; on a GPU the three quarters that JAX takes unless it is told otherwise.
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
    "h100": Chip(989e12, 59.3, 3.35e12, 4.5e11),
}

# What XLA asks a driver for, had it one: the limits of compute capability 9.0, 132 multiprocessors, 80 GB.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


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
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if match is None or (match[1] not in CHIPS and match[1] != "cpu"):
        known = ", ".join(f"{kind}:{'x'.join(sides)}" for kind, sides in _examples().items())
        raise UserError(f"--topology is {name!r}; use one of {known} with the chips of yours, or cpu:8")
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

    on_gpu = kind == "h100"
    if on_gpu and len(sides) > 2:
        raise UserError(f"--topology is {name!r}; use hosts x GPUs of each, e.g. --topology=h100:2x8")
    package = "jax[cuda13]" if on_gpu else "jax[tpu]"
    try:
        if on_gpu:
            hosts, each = sides if len(sides) == 2 else (1, sides[0])
            found = topologies.get_topology_desc(
                platform="cuda", topology_name="gpu", topology=f"1x{hosts}x{each}", target_config=H100
            )
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # of the plugin's own kinds
        if re.search("libtpu|No registered|Unable to find|not implemented", str(error)):
            raise UserError(
                f"--topology is {name!r}, and there is no compiler for it here; pip install '{package}'"
            ) from error
        raise UserError(f"--topology is {name!r}, which the compiler does not know: {error}") from error
    return Topology(name, tuple(found.devices), CHIPS[kind])


def _examples() -> dict[str, tuple[str, ...]]:
    return {
        "v4": ("2", "2", "2"),
        "v5e": ("4", "4"),
        "v5p": ("4", "4", "4"),
        "v6e": ("4", "4"),
        "h100": ("2", "8"),
    }
