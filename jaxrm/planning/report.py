"""How a plan is told: tables on the console, and a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrm.planning.cost import Cost, Plan, ProgramPlan, without
from jaxrm.planning.search import Try
from jaxrm.planning.topology import GIB
from jaxrm.reports.report import Bar, Bars, Table, write_report
from jaxrm.runtime.progress import print_table

ASSUMPTIONS = (
    "Peak is the compiler's, of one device, with what stays there beside the program; activations are the rest of it, "
    "gradients and the batch among them.",
    "TFLOPs are of all matrix products on all devices, recomputation included.",
    "Compute, memory, links and network are the seconds that each takes by itself at the data sheet's full speed; "
    "memory is what the fusions of the compiled program read and write, links what collectives bring to a device.",
    "A step takes at least the longest of them (all at once), and their sum where nothing sent hides behind what is "
    "computed. Real programs come near the second more often; input, evaluation and checkpoints are not in it.",
    "MFU counts the work asked for, by hand, without recomputation.",
)


def print_plan(plan: Plan) -> None:
    """Print a plan as tables."""
    shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    print(f"\n{plan.algorithm}, {plan.parameters / 1e9:.3g} billion parameters, on {plan.topology} as {shape}")
    rows = []
    for program in plan.programs:
        full = program.peak if program.peak is not None else program.needed
        parts = [_gib(program.parts.get(name)) for name in ("parameters", "optimizer", "cache", "activations")]
        fits = {True: "yes", False: "NO", None: "?"}[program.fits]
        rows.append([program.name, fits, _gib(full), *parts, f"{program.compile_seconds:.0f}"])
    print_table(
        "Memory of a device, GiB",
        ["", "fits", "peak", "parameters", "optimizer", "cache", "activations", "compiled in s"],
        rows,
    )
    print_table(
        "A step",
        ["", "tokens", "TFLOPs", "compute s", "memory s", "links s", "network s", "s at best", "s one by one"],
        [row for program in plan.programs for row in _time_rows(program)],
    )
    traffic = [
        [program.name, *(f"{program.cost.collectives.get(kind, 0) / 2**20:,.0f}" for kind in kinds_of(plan)),
         f"{program.cost.far_bytes / 2**20:,.0f}", f"{program.cost.memory_bytes / GIB:,.1f}"]
        for program in plan.programs
    ]  # fmt: skip
    print_table("What a device moves, MiB", ["", *kinds_of(plan), "between device_groups", "memory, GiB"], traffic)
    print(verdict(plan))


def verdict(plan: Plan) -> str:
    """A plan in one line."""
    has = "" if plan.memory is None else f" of {plan.memory / GIB:g}"
    fit = f"fits: {_gib(plan.fullest)}{has} GiB a device" if plan.fits else f"does NOT fit: {misfit(plan)}"
    if plan.memory is None:
        fit = f"{_gib(plan.fullest)} GiB a device"
    return f"{plan.algorithm} on {plan.topology} {fit}{_speed(plan)}"


def misfit(plan: Plan) -> str:
    """Which program is too large, and by how much."""
    program = next(program for program in plan.programs if program.fits is False)
    full = program.peak if program.peak is not None else program.needed
    return f"{program.name} needs {_gib(full)} GiB of {(plan.memory or 0) / GIB:g}"


def print_tries(tries: Sequence[Try], title: str, *, prefix: str = "config.") -> None:
    """Print what was tried."""
    print_table(
        title,
        ["", "fits", "peak GiB", "s at best", "s one by one", "MFU"],
        [
            [
                each.typed(prefix),
                "yes" if each.plan.fits else "NO",
                _gib(each.plan.fullest),
                *(("–", "–") if not each.plan.fits else _seconds(each.plan.seconds)),
                "–" if not each.plan.fits else _mfu(each.plan),
            ]
            for each in tries
        ],
    )


def kinds_of(plan: Plan) -> list[str]:
    """The kinds of collectives in a plan."""
    return sorted({kind for program in plan.programs for kind in program.cost.collectives})


def write_page(path: Path, plans: Mapping[str, tuple[Plan, Sequence[Try]]], command: str) -> None:
    """Write the page of the plans of one stage or several, atomically.

    Args:
      path: the HTML file.
      plans: of each stage, by its name, with what was tried; the name of a config of one stage is "".
      command: that was typed.
    """
    bars: list[Bars] = []
    tables: list[Table] = []
    for name, (plan, tries) in plans.items():
        of_stage = f"{name}: " if name else ""
        shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
        where = f"{of_stage}{plan.algorithm} on {plan.topology} as {shape}"
        memory = None if plan.memory is None else plan.memory / GIB
        bars += [
            Bars(
                f"Memory of a device, {where}",
                "GiB at the fullest moment of each program",
                tuple(
                    Bar(each.name, {part: size / GIB for part, size in each.parts.items()}) for each in plan.programs
                ),
                memory,
                "of a device",
                verdict(plan),
            )
        ]
        if plan.seconds is not None:
            spent = [_spent(program) for program in plan.programs]
            bars.append(Bars(f"A step, {where}", "s at full speed, one by one", tuple(spent)))
        tables.append(
            Table(
                f"{of_stage}a step",
                ("", "fits", "peak GiB", "tokens", "TFLOPs", "memory GiB", "links MiB", "network MiB", "s at best",
                 "s one by one", "compiled in s"),
                tuple(_page_row(program) for program in plan.programs),
                " ".join(ASSUMPTIONS),
            )
        )  # fmt: skip
        if tries:
            rows = tuple(
                (each.typed(), each.plan.fits, each.plan.fullest / GIB, *(each.plan.seconds or (None, None)))
                if each.plan.fits
                else (each.typed(), False, each.plan.fullest / GIB, None, None)
                for each in tries
            )
            columns = ("", "fits", "peak GiB", "s at best", "s one by one")
            tables.append(Table(f"{of_stage}what was tried", columns, rows))
    about = [("command", command), *((name or "plan", verdict(plan)) for name, (plan, _) in plans.items())]
    write_report(path, title="Does it fit?", about=about, tables=tables, curves=(), examples=(), bars=bars)


def _spent(program: ProgramPlan) -> Bar:
    compute, links = program.cost.compute_seconds or 0.0, program.cost.link_seconds or 0.0
    network = program.cost.far_seconds or 0.0
    waits = max(0.0, (program.seconds or (0.0, 0.0))[1] - compute - links - network)
    parts = {"compute": compute, "memory beyond it": waits, "links": links, "network": network}
    return Bar(program.name, {name: program.times * size for name, size in parts.items()})


def _page_row(program: ProgramPlan) -> tuple[Any, ...]:
    full = program.peak if program.peak is not None else program.needed
    cost, seconds = program.cost, program.seconds or (None, None)
    name = program.name if program.times == 1 else f"{program.name}, {program.times} times"
    fits = {True: "yes", False: "NO", None: "?"}[program.fits]
    links = sum(cost.collectives.values()) / 2**20
    return (name, fits, None if full is None else full / GIB, program.tokens, cost.flops / 1e12,
            cost.memory_bytes / GIB, links, cost.far_bytes / 2**20, *seconds, program.compile_seconds)  # fmt: skip


def _time_rows(program: ProgramPlan) -> list[list[str]]:
    name = program.name if program.times == 1 else f"{program.name}, {program.times} times"
    rows = [[name, f"{program.tokens:,}", *_cost(program.cost), *_seconds(program.seconds)]]
    if program.decode is not None:
        prefill = without(program.cost, program.decode)
        rows.append(["  prefill", "", *_cost(prefill), *_seconds(prefill.seconds)])
        rows.append(["  decode", "", *_cost(program.decode), *_seconds(program.decode.seconds)])
    return rows


def _cost(cost: Cost) -> list[str]:
    parts = (cost.compute_seconds, cost.memory_seconds, cost.link_seconds, cost.far_seconds)
    return [f"{cost.flops / 1e12:.3g}", *("–" if part is None else f"{part:.3g}" for part in parts)]


def _seconds(seconds: tuple[float, float] | None) -> tuple[str, str]:
    return ("–", "–") if seconds is None else (f"{seconds[0]:.3g}", f"{seconds[1]:.3g}")


def _speed(plan: Plan) -> str:
    if plan.seconds is None or not plan.fits:
        return ""
    low, high = plan.seconds
    return (
        f"; a step takes {low:.3g} to {high:.3g} s by this reckoning, {plan.tokens / high:,.0f} to "
        f"{plan.tokens / low:,.0f} tokens/s, MFU {_mfu(plan)}"
    )


def _mfu(plan: Plan) -> str:
    return "–" if plan.mfu is None else f"{plan.mfu[1]:.0%} to {plan.mfu[0]:.0%}"


def _gib(size: float | None) -> str:
    return "?" if size is None or size != size else f"{size / GIB:.3g}"
