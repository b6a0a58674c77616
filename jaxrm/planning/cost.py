"""The figures of a plan: memory, FLOPs, traffic, and the range for the time of a step."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a program, or a part of it, does. Times are those of the devices at their data sheet's full speed.

    Attributes:
      flops: of matrix products, on all devices, recomputation included.
      memory_bytes: read from and written to the memory of one device.
      collectives: bytes that one device receives by each kind of collective, over ICI (NVLink on GPUs).
      dcn_bytes: the same over DCN: between slices of TPUs, or between hosts of GPUs.
      compute_seconds: of ``flops``; None where the speed is unknown, as for the following.
      memory_seconds: of ``memory_bytes``.
      ici_seconds: of ``collectives``.
      dcn_seconds: of ``dcn_bytes``; 0 where there are none.
    """

    flops: float
    memory_bytes: float
    collectives: dict[str, float]
    dcn_bytes: float
    compute_seconds: float | None
    memory_seconds: float | None
    ici_seconds: float | None
    dcn_seconds: float | None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Range of the time: with full overlap, and with no overlap of communication with compute and memory."""
        parts = (self.compute_seconds, self.memory_seconds, self.ici_seconds, self.dcn_seconds)
        if None in parts:
            return None
        compute, memory, ici, dcn = (float(part or 0) for part in parts)
        return max(compute, memory, ici, dcn), max(compute, memory) + ici + dcn


@dataclass(frozen=True)
class ProgramPlan:
    """What one program needs; bytes are those of one device.

    Attributes:
      name: of the program.
      tokens: that it processes, on all devices.
      times: how often a step runs it.
      peak: most bytes in use, those of residents that it does not use included; None where the compiler said only that
        it does not fit.
      needed: bytes that the compiler said it would need, where that is more than there are.
      parts: of ``peak``: parameters, optimizer, cache, and activations. Activations are the rest, so gradients and the
        batch are among them. With adapters, the base that all of them stand on and the adapters are in place of the
        parameters.
      model_flops: FLOPs of the model on all devices, without recomputation, counted by hand.
      cost: of the whole program.
      decode: the part of ``cost`` that generates token by token; None where there is none.
      compile_seconds: time of the compiler on this machine.
      fits: whether ``peak`` is within the memory; None where that is unknown.
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
    def fullest(self) -> float | None:
        """Peak bytes, or what the compiler said it would need; None where neither is known."""
        return self.peak if self.peak is not None else self.needed

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Range of the time of one run, see ``Cost.seconds``; decoding does not overlap with prefill."""
        if self.decode is None or self.decode.seconds is None or self.cost.seconds is None:
            return self.cost.seconds
        prefill = subtract(self.cost, self.decode).seconds
        assert prefill is not None
        return prefill[0] + self.decode.seconds[0], prefill[1] + self.decode.seconds[1]


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage.

    Attributes:
      topology: that it was compiled for.
      mesh: devices along each axis.
      algorithm: of the stage.
      batch_size: rows of a step.
      num_microbatches: of its config.
      parameters: number of parameters of its largest model.
      trained_parameters: how many of them are trained, in PPO of the policy.
      residents: bytes on one device of what stays there between programs, by name.
      programs: in the order of a step.
      kernels: of its models, in words.
      memory: bytes of one device; None where that is unknown.
      peak_flops: of all devices, FLOP/s; None where that is unknown.
      remat: what ``model.remat=auto`` comes to there, in one line; empty where the config says itself.
      lengths: of prompts and responses, in words; empty where all are as long as the config allows.
    """

    topology: str
    mesh: dict[str, int]
    algorithm: str
    batch_size: int
    num_microbatches: int
    parameters: int
    trained_parameters: int
    residents: dict[str, float]
    programs: tuple[ProgramPlan, ...]
    kernels: str
    memory: float | None
    peak_flops: float | None
    remat: str = ""
    lengths: str = ""

    @property
    def fits(self) -> bool:
        """Whether no program is known not to fit."""
        return all(program.fits is not False for program in self.programs)

    @property
    def fullest(self) -> float:
        """Most bytes in use on one device; NaN where the compiler said only that it is too much."""
        return max(program.peak or program.needed or float("nan") for program in self.programs)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Range of the time of a step, see ``Cost.seconds``; programs run one after the other."""
        low = high = 0.0
        for program in self.programs:
            if program.seconds is None:
                return None
            low += program.times * program.seconds[0]
            high += program.times * program.seconds[1]
        return low, high

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Model FLOPs utilization for each of ``seconds``."""
        if self.seconds is None or self.peak_flops is None:
            return None
        flops = sum(program.times * program.model_flops for program in self.programs)
        return flops / (self.seconds[0] * self.peak_flops), flops / (self.seconds[1] * self.peak_flops)

    @property
    def tokens(self) -> int:
        """Tokens of a step: those of its first program that has any, since that one sees each row once."""
        return next(program.tokens * program.times for program in self.programs if program.tokens)

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        figures = dataclasses.asdict(self) | {"fits": self.fits, "seconds": self.seconds, "mfu": self.mfu}
        for row, program in zip(figures["programs"], self.programs, strict=True):
            row["seconds"] = program.seconds
        return figures


def subtract(whole: Cost, part: Cost) -> Cost:
    """The cost of the rest of a program, without one part of it."""
    rest: dict[str, Any] = {}
    for field in dataclasses.fields(Cost):
        minuend, subtrahend = getattr(whole, field.name), getattr(part, field.name)
        if isinstance(minuend, dict):
            rest[field.name] = {kind: max(0.0, size - subtrahend.get(kind, 0.0)) for kind, size in minuend.items()}
        else:
            rest[field.name] = None if minuend is None else max(0.0, minuend - subtrahend)
    return Cost(**rest)
