"""A stage compiled for devices that are not there: memory, FLOPs, traffic and what they make of a step's time."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

from jaxrm.errors import UserError
from jaxrm.experiment import Experiment
from jaxrm.runtime.mesh import build_mesh
from jaxrm.runtime.program_cost import collective_bytes, matmul_flops
from jaxrm.runtime.progress import Progress, print_table
from jaxrm.runtime.topology import GIB, Topology
from jaxrm.stages.programs import Program, Programs, device_bytes, programs_of


@dataclass(frozen=True)
class ProgramPlan:
    """What one program needs; bytes and seconds are those of one device.

    Attributes:
      name: of the program.
      tokens: that it goes over, on all devices.
      arguments: bytes of what it is given.
      peak: bytes at its fullest moment, what stays on the device beside it included; None where the compiler said
        only that it does not fit.
      needed: bytes that the compiler said it would need, where that is more than there are.
      flops: of matrix products, on all devices, recomputation included.
      traffic: bytes of collectives by kind.
      compute_seconds: ``flops`` at the chips' peak; None where that is not known.
      link_seconds: ``traffic`` at the speed of the links.
      compile_seconds: that the compiler took here.
      fits: whether ``peak`` is within the memory; None where that is not known.
    """

    name: str
    tokens: int
    arguments: float
    peak: float | None
    needed: float | None
    flops: float
    traffic: dict[str, float]
    compute_seconds: float | None
    link_seconds: float | None
    compile_seconds: float
    fits: bool | None


@dataclass(frozen=True)
class Plan:
    """The plan of a stage.

    Attributes:
      topology: that it was compiled for.
      mesh: devices along each axis.
      algorithm: of the stage.
      parameters: of its largest model.
      residents: GiB on a device of what stays there, by name.
      programs: in the order of a step.
      memory: GiB of a device; None where it is not known.
    """

    topology: str
    mesh: dict[str, int]
    algorithm: str
    parameters: int
    residents: dict[str, float]
    programs: tuple[ProgramPlan, ...]
    memory: float | None

    @property
    def fits(self) -> bool:
        """Whether no program is known not to fit."""
        return all(program.fits is not False for program in self.programs)

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return dataclasses.asdict(self) | {"fits": self.fits}


def planned(config: Experiment, topology: Topology, *, show_progress: bool = False) -> Plan:
    """Compile every program of a stage.

    Raises:
      UserError: where the stage has no plan, or does not fit the mesh.
    """
    mesh = build_mesh(config.mesh, topology.devices)
    found = programs_of(config, mesh)
    plans = []
    with Progress("compile", len(found.programs), unit="programs", enabled=show_progress) as progress:
        for number, program in enumerate(found.programs, 1):
            plans.append(_plan(program, found, topology))
            progress.update(number)
    return Plan(
        topology.name,
        {axis: int(size) for axis, size in mesh.shape.items()},
        config.algorithm,
        found.parameters,
        {name: device_bytes(tree) / GIB for name, tree in found.residents.items()},
        tuple(plans),
        None if topology.chip is None else topology.chip.memory,
    )


def print_plan(plan: Plan) -> None:
    """Print a plan as tables."""
    shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    print(f"\n{plan.algorithm}, {plan.parameters / 1e9:.3g} billion parameters, on {plan.topology} as {shape}")
    print_table(
        "What stays on a device",
        ["", "GiB"],
        [[name, f"{size:.3f}"] for name, size in plan.residents.items()],
    )
    rows = []
    for program in plan.programs:
        peak = program.peak if program.peak is not None else program.needed
        rows.append(
            [
                program.name,
                {True: "yes", False: "NO", None: "?"}[program.fits],
                "?" if peak is None else f"{peak / GIB:.3f}",
                f"{program.arguments / GIB:.3f}",
                f"{program.tokens:,}",
                f"{program.flops / 1e12:.3g}",
                " ".join(f"{kind} {size / 2**20:.0f}" for kind, size in sorted(program.traffic.items())) or "none",
                "–" if program.compute_seconds is None else f"{program.compute_seconds:.3g}",
                "–" if program.link_seconds is None else f"{program.link_seconds:.3g}",
                f"{program.compile_seconds:.0f}",
            ]
        )
    print_table(
        "Programs",
        [
            "",
            "fits",
            "peak GiB",
            "arguments",
            "tokens",
            "TFLOPs",
            "collectives, MiB",
            "compute s",
            "links s",
            "compiled in s",
        ],
        rows,
    )
    has = "" if plan.memory is None else f" A device has {plan.memory:g} GiB."
    print(
        "Peak is of one device, with what stays there beside the program."
        f"{has} TFLOPs are of all matrix products on all devices, recomputation included; compute is their time at the "
        "chips' bfloat16 peak, links that of the collectives at full speed: a step takes at least the longer of both."
    )


def _plan(program: Program, whole: Programs, topology: Topology) -> ProgramPlan:
    traced = program.jitted.trace(*program.arguments)
    flops = matmul_flops(traced.jaxpr, while_trips=program.while_trips)
    beside = whole.beside(program)
    arguments, chip = device_bytes(program.arguments), topology.chip
    begin, needed, peak, traffic = time.monotonic(), None, None, {}
    try:
        compiled = traced.lower().compile()
    except Exception as error:  # the compiler's own
        needed = _needed(str(error))
        if needed is None:
            raise UserError(f"{program.name} cannot be compiled for {topology.name}: {error}") from error
        needed += beside
    else:
        analysis = compiled.memory_analysis()
        peak = beside + float(
            analysis.peak_memory_in_bytes
            if chip is not None
            # On CPU the compiler gives no peak of its own: what it holds at once is at most all of it.
            else analysis.argument_size_in_bytes
            + analysis.temp_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
        )
        traffic = collective_bytes(compiled.as_text(), while_trips=program.while_trips)
    seconds = time.monotonic() - begin
    fits = None if chip is None else peak is not None and peak <= chip.memory * GIB
    return ProgramPlan(
        program.name,
        program.tokens,
        arguments,
        peak,
        needed,
        flops,
        traffic,
        None if chip is None else flops / (chip.flops * len(topology.devices)),
        None if chip is None else sum(traffic.values()) / chip.link,
        seconds,
        fits,
    )


def _needed(message: str) -> float | None:
    """Bytes that a compiler wanted when it said that memory ran out; None where it said something else."""
    found = re.search(r"Used ([\d.]+)([KMGT]?)i?B? of|Total hbm usage >= ([\d.]+)([KMGT])", message)
    if "RESOURCE_EXHAUSTED" not in message and found is None:
        return None
    if found is None:
        return float("nan")
    size, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(size) * 1024 ** " KMGT".index(unit or " ")
