"""Weak scaling on paper: the same work for each device on more and more devices, and their communication."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm.config.dicts import with_changes
from jaxrm.errors import UserError
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.cost import StagePlan
from jaxrm.planning.report import ASSUMPTIONS
from jaxrm.planning.topology import GIB, Topology
from jaxrm.reports.report import Curves, Report, Series, Table, write_report
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.stage_config import PPO, TrainingConfig

COLUMNS = (
    "devices",
    "topology",
    "batch",
    "fits",
    "peak GiB",
    "compute s",
    "memory s",
    "ICI GiB",
    "ICI s",
    "DCN MiB",
    "DCN s",
    "efficiency full overlap",
    "no overlap",
)
_PARTS = ("compute", "memory", "ICI", "DCN")
_BEND = 0.9  # efficiency below which scaling has bent (jaxrm choice)
_NOTE = " ".join(ASSUMPTIONS[1:4]) + " Latency is left out, so small messages on many devices look too cheap."


def weak_scaling(
    config: TrainingConfig, topologies: Sequence[Topology], *, show_progress: bool = False
) -> list[StagePlan]:
    """Plans of a config whose batch grows with the devices, from its own batch on the first topology.

    Raises:
      UserError: the devices of a topology are no multiple of the first one's, or the config does not fit its mesh.
    """
    plans: list[StagePlan] = []
    first = len(topologies[0].devices)
    with Progress("plan", len(topologies), unit="topologies", enabled=show_progress) as progress:
        for topology in topologies:
            times, left = divmod(len(topology.devices), first)
            if left or not times:
                raise UserError(
                    f"--topology has {topology.name} with {len(topology.devices)} devices after {topologies[0].name} "
                    f"with {first}; use multiples of those, so that each device has as many rows"
                )
            changes: dict[str, Any] = {"data.batch_size": config.data.batch_size * times}
            if isinstance(config, PPO) and config.ptx is not None:
                changes["ptx.batch_size"] = config.ptx.batch_size * times
            plans.append(plan_stage(with_changes(config, changes), topology))
            progress.update(len(plans))
    return plans


def print_scaling(plans: Sequence[StagePlan]) -> None:
    """Print a table of the plans, and where scaling bends."""
    rows = [[cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row] for row in _rows(plans)]
    print_table(f"Weak scaling of {plans[0].algorithm}, figures of a device and a step", list(COLUMNS), rows)
    print(bend(plans))
    print(_NOTE)


def bend(plans: Sequence[StagePlan]) -> str:
    """Where the predicted efficiency falls, in a sentence."""
    for plan, (_, no_overlap) in zip(plans, _efficiencies(plans), strict=True):
        if no_overlap < _BEND:
            first, totals = _totals(plans[0]), _totals(plan)
            cause = max(_PARTS, key=lambda part: totals[f"{part} s"] - first[f"{part} s"])
            return (
                f"It bends at {plan.topology}: efficiency {no_overlap:.0%} with no overlap; "
                f"{cause} takes {totals[f'{cause} s']:.3g} s there and {first[f'{cause} s']:.3g} s on "
                f"{plans[0].topology}."
            )
    return f"It does not bend: efficiency stays at {_BEND:.0%} or above up to {plans[-1].topology}."


def write_page(path: Path, plans_of_stages: Mapping[str, Sequence[StagePlan]], command: str) -> None:
    """Write the page of the plans of one stage or several, whole."""
    tables, curves = [], []
    for name, plans in plans_of_stages.items():
        title = name or plans[0].algorithm
        tables.append(Table(f"{title}: weak scaling", COLUMNS, tuple(_rows(plans)), f"{bend(plans)} {_NOTE}"))
        devices = tuple(float(math.prod(plan.mesh.values())) for plan in plans)
        totals, efficiencies = [_totals(plan) for plan in plans], _efficiencies(plans)
        parts = tuple(Series(part, devices, tuple(total[f"{part} s"] for total in totals)) for part in _PARTS)
        shares = (
            Series("full overlap", devices, tuple(full for full, _ in efficiencies)),
            Series("no overlap", devices, tuple(none for _, none in efficiencies)),
        )
        curves.append(Curves(f"{title}: a step", "devices", "s at full speed", parts))
        curves.append(Curves(f"{title}: efficiency", "devices", "speed of a device, first topology 1", shares))
    about = [("command", command)]
    write_report(path, Report(title="Weak scaling on paper", about=about, tables=tables, curves=curves))


def _rows(plans: Sequence[StagePlan]) -> list[tuple[Any, ...]]:
    rows = []
    for plan, (full_overlap, no_overlap) in zip(plans, _efficiencies(plans), strict=True):
        totals = _totals(plan)
        rows.append(
            (
                str(math.prod(plan.mesh.values())),
                plan.topology,
                str(plan.batch_size),
                "yes" if plan.fits else "NO",
                plan.fullest / GIB,
                *(totals[name] for name in COLUMNS[5:11]),
                f"{full_overlap:.1%}",
                f"{no_overlap:.1%}",
            )
        )
    return rows


def _totals(plan: StagePlan) -> dict[str, float]:
    """Sums over the programs of a step, each as often as it runs."""
    costs = [(program.times, program.cost) for program in plan.programs]
    return {
        "compute s": sum(times * (cost.compute_seconds or 0.0) for times, cost in costs),
        "memory s": sum(times * (cost.memory_seconds or 0.0) for times, cost in costs),
        "ICI GiB": sum(times * sum(cost.collectives.values()) for times, cost in costs) / GIB,
        "ICI s": sum(times * (cost.ici_seconds or 0.0) for times, cost in costs),
        "DCN MiB": sum(times * cost.dcn_bytes for times, cost in costs) / 2**20,
        "DCN s": sum(times * (cost.dcn_seconds or 0.0) for times, cost in costs),
    }


def _efficiencies(plans: Sequence[StagePlan]) -> list[tuple[float, float]]:
    """Speed of a device as a share of that on the first topology, with full and no overlap; NaN where unknown."""
    first = plans[0].seconds
    return [
        (float("nan"), float("nan"))
        if first is None or plan.seconds is None
        else (first[0] / plan.seconds[0], first[1] / plan.seconds[1])
        for plan in plans
    ]
