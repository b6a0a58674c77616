"""Weak scaling on paper: the same work for every device of more and more of them, and what they send each other."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm.config.dicts import with_changes
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment
from jaxrm.planning.cost import Plan, plan_stage
from jaxrm.planning.report import ASSUMPTIONS
from jaxrm.planning.topology import GIB, Topology
from jaxrm.reports.report import Curves, Series, Table, write_report
from jaxrm.runtime.progress import Progress, print_table

COLUMNS = (
    "devices",
    "topology",
    "batch",
    "fits",
    "peak GiB",
    "compute s",
    "memory s",
    "links GiB",
    "links s",
    "network MiB",
    "network s",
    "efficiency at best",
    "one by one",
)
_BENT = 0.9  # efficiency below which scaling has bent
_ASSUMED = " ".join(ASSUMPTIONS[1:4]) + " Latency is not in it, so small messages on many devices look too cheap."


def weak_scaling(config: Experiment, topologies: Sequence[Topology], *, show_progress: bool = False) -> list[Plan]:
    """Plans of a config whose batch grows with the devices, from its own batch on the first topology.

    Raises:
      UserError: where a topology has not a multiple of the first one's devices, or the config does not fit its mesh.
    """
    plans: list[Plan] = []
    first = len(topologies[0].devices)
    with Progress("plan", len(topologies), unit="topologies", enabled=show_progress) as progress:
        for topology in topologies:
            times, left = divmod(len(topology.devices), first)
            if left or not times:
                raise UserError(
                    f"--topology has {topology.name} with {len(topology.devices)} devices after {topologies[0].name} "
                    f"with {first}; required multiples of those, so that each device has as many rows"
                )
            change: dict[str, Any] = {"data.batch_size": config.data.batch_size * times}
            if config.ptx is not None:
                change["ptx.batch_size"] = config.ptx.batch_size * times
            plans.append(plan_stage(with_changes(config, change), topology))
            progress.update(len(plans))
    return plans


def print_scaling(plans: Sequence[Plan]) -> None:
    """Print a table of the plans and where they bend."""
    rows = [[cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row] for row in _rows(plans)]
    print_table(f"Weak scaling of {plans[0].algorithm}, figures of a device and a step", list(COLUMNS), rows)
    print(bend(plans))
    print(_ASSUMED)


def bend(plans: Sequence[Plan]) -> str:
    """Where the predicted efficiency falls, in a sentence."""
    for plan, (_, one_by_one) in zip(plans, _efficiencies(plans), strict=True):
        if one_by_one < _BENT:
            first, parts = _totals(plans[0]), _totals(plan)
            why = max(
                ("compute", "memory", "links", "network"), key=lambda part: parts[f"{part} s"] - first[f"{part} s"]
            )
            return (
                f"It bends at {plan.topology}: efficiency {one_by_one:.0%} where nothing sent hides behind compute; "
                f"{why} takes {parts[f'{why} s']:.3g} s there and {first[f'{why} s']:.3g} s on {plans[0].topology}."
            )
    return f"It does not bend: efficiency stays at {_BENT:.0%} or above up to {plans[-1].topology}."


def write_page(path: Path, found: Mapping[str, Sequence[Plan]], command: str) -> None:
    """Write the page of the plans of one stage or several, atomically."""
    tables, curves = [], []
    for name, plans in found.items():
        what = name or plans[0].algorithm
        tables.append(Table(f"{what}: weak scaling", COLUMNS, tuple(_rows(plans)), f"{bend(plans)} {_ASSUMED}"))
        devices = tuple(float(math.prod(plan.mesh.values())) for plan in plans)
        totals, efficiencies = [_totals(plan) for plan in plans], _efficiencies(plans)
        parts = tuple(
            Series(part, devices, tuple(total[f"{part} s"] for total in totals))
            for part in ("compute", "memory", "links", "network")
        )
        shares = (
            Series("all at once", devices, tuple(best for best, _ in efficiencies)),
            Series("one by one", devices, tuple(worst for _, worst in efficiencies)),
        )
        curves.append(Curves(f"{what}: a step", "devices", "s at full speed", parts))
        curves.append(Curves(f"{what}: efficiency", "devices", "speed of a device, first topology 1", shares))
    about = [("command", command)]
    write_report(path, title="Weak scaling on paper", about=about, tables=tables, curves=curves, examples=())


def _rows(plans: Sequence[Plan]) -> list[tuple[Any, ...]]:
    rows = []
    for plan, (best, worst) in zip(plans, _efficiencies(plans), strict=True):
        totals = _totals(plan)
        rows.append(
            (
                str(math.prod(plan.mesh.values())),
                plan.topology,
                str(plan.batch_size),
                "yes" if plan.fits else "NO",
                plan.fullest / GIB,
                *(totals[name] for name in COLUMNS[5:11]),
                f"{best:.1%}",
                f"{worst:.1%}",
            )
        )
    return rows


def _totals(plan: Plan) -> dict[str, float]:
    """Sums over the programs of a step, each as often as it runs."""
    of = [(program.times, program.cost) for program in plan.programs]
    return {
        "compute s": sum(times * (cost.compute_seconds or 0.0) for times, cost in of),
        "memory s": sum(times * (cost.memory_seconds or 0.0) for times, cost in of),
        "links GiB": sum(times * sum(cost.collectives.values()) for times, cost in of) / GIB,
        "links s": sum(times * (cost.link_seconds or 0.0) for times, cost in of),
        "network MiB": sum(times * cost.far_bytes for times, cost in of) / 2**20,
        "network s": sum(times * (cost.far_seconds or 0.0) for times, cost in of),
    }


def _efficiencies(plans: Sequence[Plan]) -> list[tuple[float, float]]:
    """Speed of a device as a share of that on the first topology, at best and one by one; NaN where it is not known."""
    first = plans[0].seconds
    return [
        (float("nan"), float("nan"))
        if first is None or plan.seconds is None
        else (first[0] / plan.seconds[0], first[1] / plan.seconds[1])
        for plan in plans
    ]
