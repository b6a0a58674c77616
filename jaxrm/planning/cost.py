"""A stage compiled for devices that are not there: memory, FLOPs, traffic and what they make of a step's time."""

import dataclasses
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxrm.algorithms.state import TrainState
from jaxrm.errors import UserError, flag
from jaxrm.experiment import Experiment
from jaxrm.planning.flops import matmul_flops
from jaxrm.planning.programs import Program, Programs, device_bytes, stage_programs
from jaxrm.planning.topology import GIB, Topology, device_groups
from jaxrm.planning.traffic import Traffic, traffic
from jaxrm.runtime.hardware import peak_flops
from jaxrm.runtime.progress import Progress
from jaxrm.sharding.mesh import build_mesh


@dataclass(frozen=True)
class Cost:
    """What a program, or a part of it, does; times are those of its devices at full speed.

    Attributes:
      flops: of matrix products, on all devices, recomputation included.
      memory_bytes: read from and written to a device's memory.
      collectives: bytes of each kind that a device takes part in, between near devices.
      far_bytes: the same between slices or hosts.
      compute_seconds: of ``flops``; None where the speed is not known, as for the following.
      memory_seconds: of ``memory_bytes``.
      link_seconds: of ``collectives``.
      far_seconds: of ``far_bytes``; 0 where there are none.
    """

    flops: float
    memory_bytes: float
    collectives: dict[str, float]
    far_bytes: float
    compute_seconds: float | None
    memory_seconds: float | None
    link_seconds: float | None
    far_seconds: float | None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """At best, where everything happens at once, and where what is sent waits for what is computed."""
        parts = (self.compute_seconds, self.memory_seconds, self.link_seconds, self.far_seconds)
        if None in parts:
            return None
        compute, memory, link, far = (float(part or 0) for part in parts)
        return max(compute, memory, link, far), max(compute, memory) + link + far


@dataclass(frozen=True)
class ProgramPlan:
    """What one program needs; bytes are those of one device.

    Attributes:
      name: of the program.
      tokens: that it goes over, on all devices.
      times: how often a step runs it.
      peak: bytes at its fullest moment, what stays on the device beside it included; None where the compiler said
        only that it does not fit.
      needed: bytes that the compiler said it would need, where that is more than there are.
      parts: of ``peak``: parameters, optimizer, cache, and activations, which are the rest, gradients and the batch
        among them.
      model_flops: that the work asks for on all devices, recomputation left out, counted by hand.
      cost: of the whole program.
      decode: the part of ``cost`` that writes responses token by token; None where there is none.
      compile_seconds: that the compiler took here.
      fits: whether ``peak`` is within the memory; None where that is not known.
    """

    name: str
    tokens: int
    times: int
    peak: float | None
    needed: float | None
    parts: dict[str, float]
    model_flops: float
    cost: Cost
    decode: Cost | None
    compile_seconds: float
    fits: bool | None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Of one run: see `Cost.seconds`; what is read and what is written come one after the other."""
        if self.decode is None or self.decode.seconds is None or self.cost.seconds is None:
            return self.cost.seconds
        prefill = without(self.cost, self.decode).seconds
        assert prefill is not None
        return prefill[0] + self.decode.seconds[0], prefill[1] + self.decode.seconds[1]


@dataclass(frozen=True)
class Plan:
    """The plan of a stage.

    Attributes:
      topology: that it was compiled for.
      mesh: devices along each axis.
      algorithm: of the stage.
      batch_size: rows of a step.
      num_microbatches: of its config.
      parameters: of its largest model.
      residents: bytes on a device of what stays there, by name.
      programs: in the order of a step.
      memory: bytes of a device; None where it is not known.
      peak_flops: of all devices, FLOP/s; None where it is not known.
    """

    topology: str
    mesh: dict[str, int]
    algorithm: str
    batch_size: int
    num_microbatches: int
    parameters: int
    residents: dict[str, float]
    programs: tuple[ProgramPlan, ...]
    memory: float | None
    peak_flops: float | None

    @property
    def fits(self) -> bool:
        """Whether no program is known not to fit."""
        return all(program.fits is not False for program in self.programs)

    @property
    def fullest(self) -> float:
        """The most bytes that a device holds; NaN where the compiler said only that it is too much."""
        return max(program.peak or program.needed or float("nan") for program in self.programs)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Of a step: see `Cost.seconds`; programs run one after the other."""
        each = [program.seconds for program in self.programs]
        if any(of_one is None for of_one in each):
            return None
        pairs = [(p.times * s[0], p.times * s[1]) for p, s in zip(self.programs, each, strict=True) if s is not None]
        return sum(a for a, _ in pairs), sum(b for _, b in pairs)

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Share of the devices' peak that the work asked for uses, for each of ``seconds``."""
        if self.seconds is None or self.peak_flops is None:
            return None
        flops = sum(program.times * program.model_flops for program in self.programs)
        return flops / (self.seconds[0] * self.peak_flops), flops / (self.seconds[1] * self.peak_flops)

    @property
    def tokens(self) -> int:
        """Of a step: those of its first program that reads any, which sees each row once."""
        return next(program.tokens * program.times for program in self.programs if program.tokens)

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        found = dataclasses.asdict(self) | {"fits": self.fits, "seconds": self.seconds, "mfu": self.mfu}
        for shown, program in zip(found["programs"], self.programs, strict=True):
            shown["seconds"] = program.seconds
        return found


def plan_stage(
    config: Experiment, topology: Topology, *, show_progress: bool = False, until_misfit: bool = False
) -> Plan:
    """Compile every program of a stage.

    Args:
      config: of the stage.
      topology: to compile for.
      show_progress: on the console.
      until_misfit: leave out what comes after the first program that does not fit.

    Raises:
      UserError: where the stage has no plan, or does not fit the mesh.
    """
    mesh = build_mesh(config.mesh, topology.devices)
    found = stage_programs(config, mesh)
    island_of = device_groups(list(mesh.devices.flat))
    peak = peak_flops(topology.kind, config.model.dtype)
    peak = None if peak is None or topology.chip is None else peak * topology.chip.share * len(topology.devices)
    plans: list[ProgramPlan] = []
    with Progress("compile", len(found.programs), unit="programs", enabled=show_progress) as progress:
        for number, program in enumerate(found.programs, 1):
            plans.append(_plan(program, found, topology, island_of, peak))
            progress.update(number)
            if until_misfit and plans[-1].fits is False:
                break
    return Plan(
        topology.name,
        {axis: int(size) for axis, size in mesh.shape.items()},
        config.algorithm,
        config.data.batch_size,
        config.num_microbatches,
        found.parameters,
        {name: device_bytes(tree) for name, tree in found.residents.items()},
        tuple(plans),
        None if topology.chip is None else topology.chip.memory * GIB,
        peak,
    )


def without(whole: Cost, part: Cost) -> Cost:
    """What is left of a cost without a part of it."""
    left: dict[str, Any] = {}
    for field in dataclasses.fields(Cost):
        mine, other = getattr(whole, field.name), getattr(part, field.name)
        if isinstance(mine, dict):
            left[field.name] = {kind: max(0.0, size - other.get(kind, 0.0)) for kind, size in mine.items()}
        else:
            left[field.name] = None if mine is None else max(0.0, mine - other)
    return Cost(**left)


def _plan(
    program: Program, whole: Programs, topology: Topology, island_of: list[int], peak_flops: float | None
) -> ProgramPlan:
    begin = time.monotonic()
    try:
        traced = program.jitted.trace(*program.arguments)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise UserError(
            f"{program.name} takes its attention from cuDNN, which is not here ({error}); pip install 'jax[cuda13]', "
            f"or plan without it, {flag('model.attention')}=xla"
        ) from error
    beside, needed, peak, text = whole.beside(program), None, None, ""
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
            if topology.kind != "cpu"
            # On CPU that leaves out the temporary arrays: what is held at once is at most all of it.
            else analysis.argument_size_in_bytes
            + analysis.temp_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
        )
        text = compiled.as_text()
    seconds = time.monotonic() - begin

    def cost(trips: int) -> Cost:
        flops = matmul_flops(traced.jaxpr, while_trips=trips)
        moved = traffic(text, while_trips=trips, island_of=island_of)
        return _cost(flops, moved, topology, peak_flops)

    all_of_it, decode = cost(1 if program.while_trips is None else program.while_trips), None
    if program.while_trips is not None:
        decode = without(all_of_it, cost(0))
    fits = None if topology.chip is None else peak is not None and peak <= topology.chip.memory * GIB
    return ProgramPlan(
        program.name,
        program.tokens,
        program.times,
        peak,
        needed,
        _parts(peak, program, whole.residents),
        program.model_flops,
        all_of_it,
        decode,
        seconds,
        fits,
    )


def _cost(flops: float, moved: Traffic, topology: Topology, peak_flops: float | None) -> Cost:
    chip = topology.chip
    far: float | None = 0.0
    if moved.far:
        far = None if chip is None or chip.far is None else moved.far / chip.far
    return Cost(
        flops,
        moved.memory,
        moved.collectives,
        moved.far,
        None if peak_flops is None else flops / peak_flops,
        None if chip is None else moved.memory / chip.bandwidth,
        None if chip is None else sum(moved.collectives.values()) / chip.link,
        far,
    )


def _parts(peak: float | None, program: Program, residents: Mapping[str, Any]) -> dict[str, float]:
    """The peak by what it is made of; without the rest where the peak is not known."""
    states = [tree for tree in residents.values() if isinstance(tree, TrainState)]
    optimizer = sum(device_bytes(state.opt_state) for state in states)
    parts = {
        "parameters": device_bytes(dict(residents)) - optimizer + program.copied,
        "optimizer": optimizer,
        "cache": program.cache,
    }
    return parts if peak is None else parts | {"activations": max(0.0, peak - sum(parts.values()))}


def _needed(message: str) -> float | None:
    """Bytes that a compiler wanted when it said that memory ran out; None where it said something else."""
    found = re.search(
        r"Used ([\d.]+)([KMGT]?)i?B? of|Total hbm usage >= ([\d.]+)([KMGT])|temporaries \(([\d.]+)([KMGT])\)", message
    )
    if "RESOURCE_EXHAUSTED" not in message and found is None:
        return None
    if found is None:
        return float("nan")
    size, unit = next((found[i], found[i + 1]) for i in (1, 3, 5) if found[i])
    return float(size) * 1024 ** " KMGT".index(unit or " ")
