"""What the machine offers and uses: memory, and how much of its peak speed is reached."""

import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30

# Dense matrix products of one jax device, in 10^12 FLOP/s, as (bfloat16, float32), from the makers' data sheets
# (without sparsity). float32 is what jax computes by default: one bfloat16 pass on TPU, TF32 on GPUs that have it.
# A device of TPU v2, v3 and TPU7x is one of a chip's two cores. T4 and V100 have no bfloat16: what stands there is
# float16.
_PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "tpu v2": (22.5, 22.5),
    "tpu v3": (61.5, 61.5),
    "tpu v4": (275.0, 275.0),
    "tpu v5 lite": (197.0, 197.0),
    "tpu v5e": (197.0, 197.0),
    "tpu v5": (459.0, 459.0),
    "tpu v5p": (459.0, 459.0),
    "tpu v6 lite": (918.0, 918.0),
    "tpu v6e": (918.0, 918.0),
    "tpu7x": (1153.5, 1153.5),
    "v100": (125.0, 15.7),
    "t4": (65.0, 8.1),
    "a100": (312.0, 156.0),
    "h100": (989.4, 494.7),
    "h100 pcie": (756.0, 378.0),
    "h100 nvl": (835.5, 417.5),
    "h200": (989.4, 494.7),
    "b200": (2250.0, 1125.0),
    "l4": (121.0, 60.0),
    "l40s": (362.0, 183.0),
}


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of the fullest device of this process, in GiB; ``limit`` is None where it is unknown."""

    in_use: float
    peak: float
    limit: float | None


def host_memory_gib() -> float:
    """Return the most memory that this process has held so far, in GiB (peak resident set)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def device_memory() -> DeviceMemory | None:
    """Return the memory of this process's devices; None where they keep no count, as on CPU."""
    import jax

    counts = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not counts:
        return None
    fullest = max(counts, key=lambda stats: stats.get("peak_bytes_in_use", 0))
    limit = fullest.get("bytes_limit")
    return DeviceMemory(
        in_use=fullest.get("bytes_in_use", 0) / GIB,
        peak=fullest.get("peak_bytes_in_use", 0) / GIB,
        limit=None if limit is None else limit / GIB,
    )


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float | None:
    """Return the peak of dense matrix products of one device in FLOP/s; None where it is not known, as on CPU.

    Args:
      device_kind: as ``jax.Device.device_kind`` says it, e.g. "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: what the products are computed in: "bfloat16", "float16" or "float32".
    """
    assert dtype in ("bfloat16", "float16", "float32"), dtype
    words = " ".join(re.findall(r"[a-z0-9]+", device_kind.lower()))
    known = [name for name in _PEAK_TFLOPS if re.search(rf"\b{name}\b", words)]
    if not known:
        return None
    half, single = _PEAK_TFLOPS[max(known, key=len)]
    return (single if dtype == "float32" else half) * 1e12


def mfu(flops: float, seconds: float, devices: Sequence[Any], dtype: str = "bfloat16") -> float | None:
    """Return the model FLOPs utilisation in [0, 1]: the share of the devices' peak that the model's own products use.

    Recomputation (remat) does not count (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
      flops: floating-point operations of the model in the measured time, over all devices.
      seconds: the measured time.
      devices: the ``jax.Device`` objects that took part, those of other processes included.
      dtype: what the products are computed in.

    Returns:
      None where the peak of a device is not known.
    """
    peaks = [peak_flops(device.device_kind, dtype) for device in devices]
    if not peaks or None in peaks or seconds <= 0:
        return None
    return flops / (seconds * sum(peak for peak in peaks if peak is not None))
