"""The devices of this process, as `jaxrm.planning` describes devices, and what its programs take of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from accelerator.report import Report

from jaxrm.models.flops import peak_bandwidth
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.cost import StagePlan
from jaxrm.planning.topology import GIB, Chip, Topology
from jaxrm.runtime.hardware import device_memory
from jaxrm.sharding.partition import device_bytes
from jaxrm.stage_config import TrainingConfig


def topology() -> Topology:
    """The devices, with the memory that JAX may use; its chip is None on CPU."""
    devices, memory = tuple(jax.devices()), device_memory()
    kind, chip = devices[0].device_kind, None
    if memory is not None and memory.limit is not None:
        # The speed of their links is unknown, so only the seconds that one device takes mean something.
        chip = Chip(memory.limit, peak_bandwidth(kind) or float("nan"), float("inf"), None, "")
    return Topology(f"{len(devices)} x {kind}", devices, chip, kind)


def devices_text() -> str:
    """How many devices a figure is of; nothing where it is one."""
    return f", {jax.device_count()} devices" if jax.device_count() > 1 else ""


def best_seconds(run: Callable[[], Any], *, rounds: int, most_seconds: float = 15.0) -> float:
    """Least time of a run, of those after the first, which compiles; at least one is counted."""
    jax.block_until_ready(run())
    begun, times = time.perf_counter(), []
    while not times or (len(times) < rounds and time.perf_counter() - begun < most_seconds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def plan(config: TrainingConfig, topology: Topology, report: Report) -> StagePlan | None:
    """The plan of a stage; None, with a row that says so, where the planner itself fails: the check goes on."""
    try:
        return plan_stage(config, topology, until_misfit=True)
    except Exception as error:
        report.row("the planner failed", beside=f"{type(error).__name__}: {' '.join(str(error).split())}"[:200])
        return None


def least_bytes(residents: Mapping[str, Any], gradients: Any) -> float:
    """Bytes on one device that a step cannot do without: what stays there, and gradients in float32."""
    return device_bytes(dict(residents)) + device_bytes(gradients)


def report_misfit(report: Report, what: str, needed: float | None, chip: Chip) -> None:
    """A row of a model that does not fit."""
    size = "more" if needed is None else f"{needed / GIB:.1f} GiB"
    report.row(f"{what} does not fit", beside=f"needs {size} of {chip.memory:.1f} GiB")


def report_memory(report: Report, plan: StagePlan | None) -> None:
    """The peak of this process's devices so far beside the planner's."""
    memory = device_memory()
    planner = float("nan") if plan is None else plan.fullest / GIB
    if memory is None:
        report.row("peak memory by the planner", planner, "GiB", beside="this device keeps no count of its own")
        return
    beside = f"planner {planner:.2f} GiB, ratio {planner / memory.peak:.2f}"
    report.row("peak memory of a device", memory.peak, "GiB", beside=beside)
