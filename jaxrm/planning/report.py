"""Print a plan, and draw it as a page."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxrm.errors import flag, naming
from jaxrm.planning.cost import Cost, ProgramPlan, StagePlan, subtract
from jaxrm.planning.search import Trial
from jaxrm.planning.topology import GIB
from jaxrm.reports.report import Bar, Bars, Report, Table, write_report
from jaxrm.runtime.progress import print_table

ASSUMPTIONS = (
    "Peak is the compiler's, of one device, with what stays there beside the program. Activations are the rest of the "
    "peak, so gradients and the batch are among them.",
    "TFLOPs are of all matrix products on all devices, recomputation included.",
    "Compute, memory, ICI and DCN are the seconds that each takes by itself at the data sheet's full speed. Memory is "
    "what the fusions of the compiled program read and write, ICI (NVLink on GPUs) what collectives bring to a device, "
    "DCN the same between slices or hosts.",
    "A step takes at least the longest of them (full overlap), and their sum where no communication overlaps with "
    "compute (no overlap). Real programs are usually nearer the second. Input, evaluation and checkpoints are "
    "left out.",
    "MFU counts the FLOPs of the model by hand, without recomputation.",
)
_FITS = {True: "yes", False: "NO", None: "?"}
_RANGE = ("s full overlap", "s no overlap")


@contextmanager
def stage_naming(name: str) -> Iterator[None]:
    """Name options as those of a pipeline's stage, ``config.sft.data.path``; a config of one stage is named ""."""
    with naming({"": f"config.{name}" if name else "config"}):
        yield


def print_plan(plan: StagePlan) -> None:
    """Print a plan as tables."""
    print(f"\n{plan.algorithm}, {_size(plan)}, on {plan.topology} as {_mesh(plan)}; kernels: {plan.kernels}")
    if plan.lengths:
        print(f"Expected: {plan.lengths}")
    if plan.remat:
        print(plan.remat)
    parts = list(dict.fromkeys(part for program in plan.programs for part in program.parts))
    print_table(
        "Memory of a device, GiB",
        ["", "fits", "peak", *parts, "compiled in s"],
        [
            [each.name, _FITS[each.fits], _gib(each.fullest), *(_gib(each.parts.get(part)) for part in parts),
             f"{each.compile_seconds:.0f}"]
            for each in plan.programs
        ],
    )  # fmt: skip
    print_table(
        "A step",
        ["", "tokens", "TFLOPs", "compute s", "memory s", "ICI s", "DCN s", *_RANGE],
        [row for program in plan.programs for row in _time_rows(program)],
    )
    kinds = sorted({kind for program in plan.programs for kind in program.cost.collectives})
    print_table(
        "Traffic of a device, MiB",
        ["", *kinds, "over DCN", "memory, GiB"],
        [
            [each.name, *(f"{each.cost.collectives.get(kind, 0) / 2**20:,.0f}" for kind in kinds),
             f"{each.cost.dcn_bytes / 2**20:,.0f}", f"{each.cost.memory_bytes / GIB:,.1f}"]
            for each in plan.programs
        ],
    )  # fmt: skip
    print(verdict(plan))


def verdict(plan: StagePlan) -> str:
    """A plan in one line."""
    if plan.memory is None:
        fit = f"{_gib(plan.fullest)} GiB a device"
    elif plan.fits:
        fit = f"fits: {_gib(plan.fullest)} of {plan.memory / GIB:g} GiB a device"
    else:
        program = next(program for program in plan.programs if program.fits is False)
        fit = f"does NOT fit: {program.name} needs {_gib(program.fullest)} GiB of {plan.memory / GIB:g}"
    return f"{plan.algorithm} on {plan.topology} {fit}{_speed(plan)}"


def print_trials(trials: Sequence[Trial], title: str) -> None:
    """Print the changes that were tried."""
    print_table(
        title,
        ["", "fits", "peak GiB", *_RANGE, "MFU"],
        [
            [
                each.as_flags(),
                "yes" if each.plan.fits else "NO",
                _gib(each.plan.fullest),
                *(_seconds(each.plan.seconds if each.plan.fits else None)),
                _mfu(each.plan) if each.plan.fits else "–",
            ]
            for each in trials
        ],
    )


def write_page(path: Path, plans: Mapping[str, tuple[StagePlan, Sequence[Trial]]], command: str) -> None:
    """Write the page of the plans of one stage or several, whole.

    Args:
      path: the HTML file.
      plans: of each stage, by its name, with the trials; the name of a config of one stage is "".
      command: the command line.
    """
    bars: list[Bars] = []
    tables: list[Table] = []
    for name, (plan, trials) in plans.items():
        prefix = f"{name}: " if name else ""
        bars += _bars(plan, f"{prefix}{plan.algorithm} on {plan.topology} as {_mesh(plan)}")
        tables.append(_program_table(plan, f"{prefix}a step"))
        if trials:
            with stage_naming(name):
                tables.append(_trial_table(trials, f"{prefix}what was tried"))
    sized = ((name or "plan", f"{_size(plan)}; {verdict(plan)}") for name, (plan, _) in plans.items())
    about = [("command", command), *sized]
    write_report(path, Report(title="Does it fit?", about=about, tables=tables, bars=bars))


def _bars(plan: StagePlan, where: str) -> list[Bars]:
    """Memory of each program by its parts, and where it is known the time of a step."""
    memory = Bars(
        f"Memory of a device, {where}",
        "GiB at the peak of each program",
        tuple(Bar(each.name, {part: size / GIB for part, size in each.parts.items()}) for each in plan.programs),
        None if plan.memory is None else plan.memory / GIB,
        "of a device",
        verdict(plan),
    )
    if plan.seconds is None:
        return [memory]
    times = tuple(_time_bar(program) for program in plan.programs)
    return [memory, Bars(f"A step, {where}", "s at full speed, no overlap", times)]


def _time_bar(program: ProgramPlan) -> Bar:
    compute, ici = program.cost.compute_seconds or 0.0, program.cost.ici_seconds or 0.0
    dcn = program.cost.dcn_seconds or 0.0
    memory = max(0.0, (program.seconds or (0.0, 0.0))[1] - compute - ici - dcn)
    parts = {"compute": compute, "memory beyond it": memory, "ICI": ici, "DCN": dcn}
    return Bar(program.name, {name: program.times * size for name, size in parts.items()})


def _program_table(plan: StagePlan, title: str) -> Table:
    columns = ("", "fits", "peak GiB", "tokens", "TFLOPs", "memory GiB", "ICI MiB", "DCN MiB", *_RANGE, "compiled in s")
    return Table(title, columns, tuple(_page_row(program) for program in plan.programs), " ".join(ASSUMPTIONS))


def critic_note(plan: StagePlan) -> str:
    """What a plan of PPO that does not fit would save without a critic; empty for any other.

    It is no change to try: the advantages are others, so that is another method.
    """
    size = plan.residents.get("critic")
    if plan.fits or size is None:
        return ""
    return (
        f"Of that, the critic has {_gib(size)} GiB. {flag('ppo.advantage')}=rloo and grpo have none; they compare "
        f"{flag('rollout.responses_per_prompt')}=8 responses to a prompt, which also share its cache."
    )


def _page_row(program: ProgramPlan) -> tuple[Any, ...]:
    cost, peak = program.cost, program.fullest
    return (
        _name(program),
        _FITS[program.fits],
        None if peak is None else peak / GIB,
        program.tokens,
        cost.flops / 1e12,
        cost.memory_bytes / GIB,
        sum(cost.collectives.values()) / 2**20,
        cost.dcn_bytes / 2**20,
        *(program.seconds or (None, None)),
        program.compile_seconds,
    )


def _trial_table(trials: Sequence[Trial], title: str) -> Table:
    rows = tuple(
        (
            each.as_flags(),
            each.plan.fits,
            each.plan.fullest / GIB,
            *((each.plan.seconds if each.plan.fits else None) or (None, None)),
        )
        for each in trials
    )
    return Table(title, ("", "fits", "peak GiB", *_RANGE), rows)


def _time_rows(program: ProgramPlan) -> list[list[str]]:
    rows = [[_name(program), f"{program.tokens:,}", *_cost(program.cost), *_seconds(program.seconds)]]
    if program.decode is not None:
        prefill = subtract(program.cost, program.decode)
        rows.append(["  prefill", "", *_cost(prefill), *_seconds(prefill.seconds)])
        rows.append(["  decode", "", *_cost(program.decode), *_seconds(program.decode.seconds)])
    return rows


def _name(program: ProgramPlan) -> str:
    return program.name if program.times == 1 else f"{program.name}, {program.times} times"


def _size(plan: StagePlan) -> str:
    """Number of parameters, and of those that are trained where these are adapters."""
    size = f"{plan.parameters / 1e9:.3g} billion parameters"
    if plan.trained_parameters == plan.parameters:
        return size
    return f"{size}, {plan.trained_parameters / 1e6:.3g} million of them trained"


def _mesh(plan: StagePlan) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())


def _cost(cost: Cost) -> list[str]:
    parts = (cost.compute_seconds, cost.memory_seconds, cost.ici_seconds, cost.dcn_seconds)
    return [f"{cost.flops / 1e12:.3g}", *("–" if part is None else f"{part:.3g}" for part in parts)]


def _seconds(seconds: tuple[float, float] | None) -> tuple[str, str]:
    return ("–", "–") if seconds is None else (f"{seconds[0]:.3g}", f"{seconds[1]:.3g}")


def _speed(plan: StagePlan) -> str:
    if plan.seconds is None or not plan.fits:
        return ""
    low, high = plan.seconds
    lengths = f" with {plan.lengths}" if plan.lengths else ""
    return (
        f"; a step{lengths} takes {low:.3g} to {high:.3g} s by this estimate, {plan.tokens / high:,.0f} to "
        f"{plan.tokens / low:,.0f} tokens/s, MFU {_mfu(plan)}"
    )


def _mfu(plan: StagePlan) -> str:
    return "–" if plan.mfu is None else f"{plan.mfu[1]:.0%} to {plan.mfu[0]:.0%}"


def _gib(size: float | None) -> str:
    return "?" if size is None or size != size else f"{size / GIB:.3g}"
