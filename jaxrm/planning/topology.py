"""Descriptions of devices, which XLA can compile for on a machine without them.

A TPU topology is named by its generation and the chips along each side (``v5e:4x4``), and the number of slices where
there are several (``v5e:16x16:2``); its compiler comes with ``pip install 'jax[tpu]'``. GPUs are named by hosts and
what each has (``h100:2x8``, ``h100:8`` for one host); their compiler comes with ``pip install 'jax[cuda13]'`` and wants
no driver. ``cpu:8`` is that many devices of this machine, to see how arrays are split.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxrm.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Memory and speeds of one device, by its data sheet (TPU: docs.cloud.google.com/tpu/docs; GPU: NVIDIA H100 SXM5).

    A device of TPU v3 and TPU7x is one of a chip's two cores. So is a device of v4 here, as in the compiler's
    topologies, although JAX on a v4 pod joins the two cores to one device.

    Attributes:
      memory: GiB that programs may use, as the compiler says; on a GPU the three quarters that JAX allocates by
        default.
      bandwidth: of that memory, bytes/s.
      ici: bytes/s to its neighbors over all ICI links (NVLink on GPUs) together.
      dcn: bytes/s to other slices or hosts; None where that is unknown.
      sides: an example of how a topology is written, for messages.
      share: fraction of ``peak_flops`` of its kind that one device here has.
    """

    memory: float
    bandwidth: float
    ici: float
    dcn: float | None
    sides: str
    share: float = 1.0


CHIPS = {
    "v3": Chip(15.48, 4.5e11, 2.0e11, None, "4x4"),
    "v4": Chip(15.25, 6.0e11, 1.35e11, 3.1e9, "2x2x2", share=0.5),
    "v5e": Chip(15.75, 8.19e11, 2.0e11, 3.1e9, "4x4"),
    "v5p": Chip(95.74, 2.765e12, 6.0e11, 6.25e9, "4x4x4"),
    "v6e": Chip(31.25, 1.64e12, 4.0e11, 1.25e10, "4x4"),
    "tpu7x": Chip(94.75, 3.69e12, 3.0e11, 6.25e9, "2x2x2"),
    "h100": Chip(59.3, 3.35e12, 4.5e11, 5.0e10, "2x8"),
}

# Without these libtpu asks a metadata server of Google Cloud where it runs, and warns when there is none.
_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}

# What XLA usually reads from the driver: the limits of compute capability 9.0, 132 multiprocessors, 80 GB.
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
      devices: descriptions of them, for ``jax.sharding.Mesh``.
      chip: memory and speeds of each; None where these are unknown, as on CPU.
      kind: ``jax.Device.device_kind`` of the devices.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    kind: str


def open_topology(name: str) -> Topology:
    """The devices of a topology; for ``cpu:N`` call it before JAX makes its first array.

    Args:
      name: e.g. ``v5e:4x4``, ``v5e:16x16:2`` (two slices, joined by DCN), ``h100:2x8`` or ``cpu:8``.

    Raises:
      UserError: there is no such topology, or no compiler for it.
    """
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?::([1-9]\d*))?", name)
    if match is None or (match[1] not in CHIPS and match[1] != "cpu"):
        known = ", ".join(f"{kind}:{chip.sides}" for kind, chip in CHIPS.items())
        raise UserError(f"--topology is {name!r}; use one of {known} with the chips of yours, or cpu:8")
    kind, sides = match[1], [int(side) for side in match[2].split("x")]
    if match[3] is not None and kind in ("cpu", "h100"):
        raise UserError(f"--topology is {name!r}, but only TPUs have slices; e.g. --topology={name.rpartition(':')[0]}")
    if kind == "cpu":
        count = math.prod(sides)
        with contextlib.suppress(RuntimeError):  # JAX has started: refused below
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", count)
        if jax.device_count() != count:
            raise UserError(f"--topology is {name!r}, but {jax.device_count()} devices are open already")
        return Topology(name, tuple(jax.devices()), None, "cpu")
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    if kind != "h100":
        devices = _tpu_devices(name, f"{kind}:{match[2]}", int(match[3] or 1))
    elif len(sides) > 2:
        raise UserError(f"--topology is {name!r}; use hosts x GPUs of each, e.g. --topology=h100:2x8")
    else:
        devices = _gpu_devices(name, *(sides if len(sides) == 2 else (1, sides[0])))
    return Topology(name, tuple(devices), CHIPS[kind], devices[0].device_kind)


def _tpu_devices(name: str, one_slice: str, num_slices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    slices = {} if num_slices == 1 else {"num_slices": num_slices}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=one_slice, **slices).devices
    except Exception as error:  # of the plugin's own classes
        raise _not_found(name, error, "jax[tpu]") from error


def _gpu_devices(name: str, hosts: int, gpus: int) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="gpu", topology=f"1x{hosts}x{gpus}", target_config=H100
        ).devices
    except Exception as error:  # of the plugin's own classes
        raise _not_found(name, error, "jax[cuda13]") from error


def _not_found(name: str, error: Exception, package: str) -> UserError:
    reason = " ".join(str(error).split())
    if re.search("libtpu|No registered|Unable to find|not implemented", reason):
        return UserError(f"--topology is {name!r}, and there is no compiler for it here; pip install '{package}'")
    kind = name.partition(":")[0]
    return UserError(
        f"--topology is {name!r}, which its compiler does not know ({reason[:200]}); e.g. "
        f"--topology={kind}:{CHIPS[kind].sides}"
    )
