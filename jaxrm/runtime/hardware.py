"""Memory in use, of this process and of its devices."""

import os
import resource
import sys
from dataclasses import dataclass

GIB = 2**30


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


def device_limit() -> float | None:
    """Bytes that one device of this process may use; of a CPU, its share of the machine's memory. None if unknown."""
    import jax

    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return float((device.memory_stats() or {}).get("bytes_limit", 0)) or None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    except (ValueError, OSError, AttributeError):
        return None
