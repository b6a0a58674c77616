"""Compile the programs of a stage for devices that are not there, and count what they do."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxrm.algorithms.state import TrainState
from jaxrm.errors import UserError, flag
from jaxrm.models import lora
from jaxrm.models.flops import peak_flops
from jaxrm.planning.abstract import BASE, Program, StagePrograms
from jaxrm.planning.cost import Cost, ProgramPlan, StagePlan, subtract
from jaxrm.planning.flops import matmul_flops
from jaxrm.planning.lengths import Lengths
from jaxrm.planning.lengths import in_words as lengths_in_words
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.topology import GIB, Topology
from jaxrm.planning.traffic import traffic
from jaxrm.runtime.progress import Progress
from jaxrm.sharding.mesh import build_mesh, slice_indices
from jaxrm.sharding.partition import device_bytes
from jaxrm.stage_config import TrainingConfig
from jaxrm.stages import remat


@dataclass(frozen=True)
class _Compiled:
    """What the compiler says of a program.

    Attributes:
      peak: most bytes in use on one device; None where it does not fit.
      needed: bytes that it would need, where it does not fit and the compiler says so.
      hlo: its text; empty where it does not fit.
    """

    peak: float | None
    needed: float | None
    hlo: str


@dataclass(frozen=True)
class _Devices:
    """What the costs of all programs of a stage depend on.

    Attributes:
      topology: to compile for.
      slice_of: slice of each device, see ``slice_indices``.
      peak_flops: of all devices, FLOP/s; None where that is unknown.
    """

    topology: Topology
    slice_of: list[int]
    peak_flops: float | None


def plan_stage(
    config: TrainingConfig,
    topology: Topology,
    *,
    lengths: Lengths | None = None,
    compiled: dict[str, Any] | None = None,
    show_progress: bool = False,
    until_misfit: bool = False,
) -> StagePlan:
    """Compile every program of a stage.

    Args:
      config: of the stage.
      topology: to compile for.
      lengths: of prompts and responses in PPO; None for the longest.
      compiled: what is compiled, for another plan of the same config for other lengths, which takes it from there.
      show_progress: on the console.
      until_misfit: stop at the first program that does not fit.

    Raises:
      UserError: where the stage has no plan, or does not fit the mesh.
    """
    mesh = build_mesh(config.mesh, topology.devices)
    chip_memory = None if topology.chip is None else topology.chip.memory * GIB
    config, decided = remat.decide_for(config, mesh, None if chip_memory is None else remat.for_chip(chip_memory))
    stage = stage_programs(config, mesh, lengths)
    peak = peak_flops(topology.kind, config.model.dtype)
    peak = None if peak is None or topology.chip is None else peak * topology.chip.share * len(topology.devices)
    devices = _Devices(topology, slice_indices(list(mesh.devices.flat)), peak)
    compiled = {} if compiled is None else compiled
    plans: list[ProgramPlan] = []
    with Progress("compile", len(stage.programs), unit="programs", enabled=show_progress) as progress:
        for number, program in enumerate(stage.programs, 1):
            plans.append(_plan_program(program, stage, devices, compiled))
            progress.update(number)
            if until_misfit and plans[-1].fits is False:
                break
    return StagePlan(
        topology.name,
        {axis: int(size) for axis, size in mesh.shape.items()},
        config.algorithm,
        config.data.batch_size,
        config.num_microbatches,
        stage.parameters,
        stage.trained_parameters,
        {name: device_bytes(tree) for name, tree in stage.residents.items()},
        tuple(plans),
        stage.kernels,
        chip_memory,
        peak,
        decided,
        "" if lengths is None else lengths_in_words(lengths),
    )


def _plan_program(
    program: Program, stage: StagePrograms, devices: _Devices, known: dict[str, tuple[str, Any, _Compiled]]
) -> ProgramPlan:
    begin = time.monotonic()
    shapes = str(jax.tree.flatten(program.arguments))
    if program.name not in known or known[program.name][0] != shapes:
        traced = _trace(program)
        known[program.name] = shapes, traced.jaxpr, _compile(program, traced, devices.topology)
    _, jaxpr, compiled = known[program.name]
    seconds = time.monotonic() - begin
    beside = stage.bytes_beside(program)
    peak = None if compiled.peak is None else beside + compiled.peak
    if program.while_trips is None:
        cost, decode = _cost(jaxpr, compiled.hlo, 1, 1.0, devices), None
    else:  # the difference between all iterations of the loop and none is decoding
        cost = _cost(jaxpr, compiled.hlo, program.while_trips, program.cache_read, devices)
        decode = subtract(cost, _cost(jaxpr, compiled.hlo, 0, program.cache_read, devices))
    chip = devices.topology.chip
    return ProgramPlan(
        program.name,
        program.tokens,
        program.times,
        peak,
        None if compiled.needed is None else beside + compiled.needed,
        _parts(peak, program, stage.residents),
        program.model_flops,
        cost,
        decode,
        seconds,
        None if chip is None else peak is not None and peak <= chip.memory * GIB,
    )


def _trace(program: Program) -> Any:
    try:
        return program.jitted.trace(*program.arguments)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise UserError(
            f"{program.name} uses attention from cuDNN, which is not installed ({error}); "
            f"pip install 'jax[cuda13]', or plan without it, {flag('model.attention')}=xla"
        ) from error


def _compile(program: Program, traced: Any, topology: Topology) -> _Compiled:
    try:
        compiled = traced.lower().compile()
    except Exception as error:  # the classes of compilers' errors differ
        needed = _needed_bytes(str(error))
        if needed is None:
            raise UserError(f"{program.name} cannot be compiled for {topology.name}: {error}") from error
        return _Compiled(None, None if math.isnan(needed) else needed, "")
    analysis = compiled.memory_analysis()
    peak = float(analysis.peak_memory_in_bytes)
    if topology.kind == "cpu":
        # The CPU's peak leaves out temporary arrays; this is an upper bound of what is in use at once.
        peak = float(
            analysis.argument_size_in_bytes
            + analysis.temp_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
        )
    return _Compiled(peak, None, compiled.as_text())


def _cost(jaxpr: Any, hlo: str, while_trips: int, cache_read: float, devices: _Devices) -> Cost:
    """The cost of a program whose loop of unknown length runs ``while_trips`` times and reads a share of its cache."""
    flops = matmul_flops(jaxpr, while_trips=while_trips)
    moved = traffic(hlo, while_trips=while_trips, slice_of=devices.slice_of, cache_read=cache_read)
    chip, peak = devices.topology.chip, devices.peak_flops
    dcn_seconds: float | None = 0.0
    if moved.dcn:
        dcn_seconds = None if chip is None or chip.dcn is None else moved.dcn / chip.dcn
    return Cost(
        flops,
        moved.memory,
        moved.collectives,
        moved.dcn,
        None if peak is None else flops / peak,
        None if chip is None else moved.memory / chip.bandwidth,
        None if chip is None else sum(moved.collectives.values()) / chip.ici,
        dcn_seconds,
    )


def _parts(peak: float | None, program: Program, residents: Mapping[str, Any]) -> dict[str, float]:
    """What the peak consists of; without activations, which are the rest, where the peak is unknown."""
    states = [tree for tree in residents.values() if isinstance(tree, TrainState)]
    optimizer = sum(device_bytes(state.opt_state) for state in states)
    rest = device_bytes(dict(residents)) - optimizer
    if BASE in residents:
        adapters, base = lora.split(program.copied_parameters or {})
        base_bytes = device_bytes(residents[BASE])
        parts = {"base": base_bytes + device_bytes(base), "adapters": rest - base_bytes + device_bytes(adapters)}
    else:
        parts = {"parameters": rest + device_bytes(program.copied_parameters)}
    parts |= {"optimizer": optimizer, "cache": program.cache_bytes}
    return parts if peak is None else parts | {"activations": max(0.0, peak - sum(parts.values()))}


def _needed_bytes(message: str) -> float | None:
    """Bytes that a compiler needed when it ran out of memory, NaN where it does not say; None for another error."""
    match = re.search(
        r"Used ([\d.]+)([KMGT]?)i?B? of|Total hbm usage >= ([\d.]+)([KMGT])|temporaries \(([\d.]+)([KMGT])\)", message
    )
    if match is None:
        return float("nan") if "RESOURCE_EXHAUSTED" in message else None
    size, unit = next((match[i], match[i + 1]) for i in (1, 3, 5) if match[i])
    return float(size) * 1024 ** " KMGT".index(unit or " ")
