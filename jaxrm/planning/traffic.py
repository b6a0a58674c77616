"""Traffic of a compiled program: bytes between devices, and bytes in and out of a device's memory.

Read off the text of the program after XLA's passes, where a loop has its trip count. XLA's own analysis counts the body
of a loop once, however often it runs, and a decoder is a loop over its layers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jaxrm.planning.hlo import (
    Computations,
    Instruction,
    array_bytes,
    array_sizes,
    called_by,
    computations_of,
    replica_groups,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move nothing themselves: they name existing arrays, or what they call is counted instead.
_FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "async-start",
)
_CACHE_KERNEL = "/cached_attention/"  # in the name of the operation
_SLICES = ("dynamic-slice", "slice", "gather")
_MAX_COUNTER_BYTES = 4  # an asynchronous start returns counters of its own besides its arrays


@dataclass(frozen=True)
class Traffic:
    """What one device moves in a run of a program, in bytes.

    Attributes:
      collectives: received by each kind of collective over ICI (NVLink on GPUs). On a ring of n devices that is
        (n - 1) / n of an array that is gathered, scattered or exchanged, and twice that of an array that is summed.
      dcn: the same of collectives whose groups span slices of TPUs or hosts of GPUs.
      memory: read from and written to the device's memory.
    """

    collectives: dict[str, float]
    dcn: float
    memory: float


def traffic(hlo: str, *, while_trips: int = 1, slice_of: Sequence[int] = (), cache_read: float = 1.0) -> Traffic:
    """Count the traffic of a program.

    Where a loop has no trip count beside it, its condition's constant is taken. TPU programs split a collective into
    steps that share a channel, which counts once. Arrays that the compiler keeps in on-chip or host memory do not count
    as memory. Of a slice that is read or written inside a fusion only the slice counts.

    Args:
      hlo: text of the compiled program, ``compiled.as_text()``.
      while_trips: iterations of a loop whose length depends on the data.
      slice_of: the slice of each device, in the order of the program's devices; empty: all on one slice.
      cache_read: share of a cache that the kernel of ``jaxrm.models.cached_attention`` reads of it.
    """
    counter = _Counter(computations_of(hlo), while_trips, slice_of, cache_read)
    counter.count("ENTRY", 1.0, is_fused=False)
    ici: dict[str, float] = defaultdict(float)
    dcn = 0.0
    for (kind, _, is_dcn), size in counter.collectives.items():
        if is_dcn:
            dcn += size
        else:
            ici[kind] += size
    return Traffic(dict(ici), dcn, counter.memory)


@dataclass
class _Counter:
    """Sums over the instructions of a program.

    Attributes:
      computations: of the program.
      while_trips: iterations of a loop whose length depends on the data.
      slice_of: the slice of each device.
      cache_read: share of a cache that its kernel reads.
      collectives: bytes by kind, channel, and whether they go over DCN.
      memory: bytes read and written.
    """

    computations: Computations
    while_trips: int
    slice_of: Sequence[int]
    cache_read: float
    collectives: dict[tuple[str, str, bool], float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0.0

    def count(self, name: str, times: float, *, is_fused: bool) -> None:
        """Add a computation that runs ``times`` times; the memory of a fused one is that of the fusion."""
        instructions = self.computations.get(name, {})
        for each in instructions.values():
            self._add_collective(each, name, times)
            if not is_fused:
                share = self.cache_read if each.kind == "custom-call" and _CACHE_KERNEL in each.rest else 1.0
                self.memory += times * share * _memory_bytes(each, instructions, self.computations)
            kind = each.kind.removesuffix("-start")
            trips = self._trips(each) if kind == "while" else 1.0
            is_fusion = kind not in ("while", "conditional", "call", "async")
            for called in called_by(each.rest):
                if called in self.computations:
                    self.count(called, times * trips, is_fused=is_fused or is_fusion)

    def _add_collective(self, each: Instruction, computation: str, times: float) -> None:
        received = _received_bytes(each, computation, self.computations[computation])
        if received is None:
            return
        kind, size = received
        channel = re.search(r"channel_id=(\d+)", each.rest)
        is_dcn = each.kind == "recv" or _spans_slices(each.rest, self.slice_of)
        key = (kind, channel[1] if channel else f"{computation} {each.name}", is_dcn)
        # The steps of one collective share its channel, so the largest counts, not their sum.
        self.collectives[key] = max(self.collectives[key], times * size)

    def _trips(self, loop: Instruction) -> float:
        known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', loop.rest)
        return float(known[1]) if known else _trips_of_condition(loop.rest, self.computations) or self.while_trips


def _received_bytes(each: Instruction, computation: str, around: Mapping[str, Instruction]) -> tuple[str, float] | None:
    """The kind of a collective and the bytes that one device receives; None for other instructions."""
    kind = each.kind.removesuffix("-start")
    if each.kind == "recv" and "megascale" in each.rest:  # between slices of TPUs, over DCN
        return "recv", array_bytes(each.shape)
    if kind not in COLLECTIVES:
        return None
    size = _result_bytes(each.shape, is_start=each.kind.endswith("-start"))
    devices = max((len(group) for group in replica_groups(each.rest)), default=0)
    share = 1.0 if kind == "collective-permute" or devices < 1 else (devices - 1) / devices
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):  # a reduce-scatter in TPU programs
        kind = "reduce-scatter"
    elif kind == "all-reduce":
        share *= 2.0
    elif kind == "reduce-scatter":
        size = max(
            size, sum(_result_bytes(around[name].shape, is_start=False) for name in each.operands if name in around)
        )
    return kind, share * size


def _memory_bytes(each: Instruction, around: Mapping[str, Instruction], computations: Computations) -> float:
    """Bytes that one instruction reads and writes."""
    if each.kind in _FREE or each.kind.endswith("-done"):
        return 0.0
    if each.kind == "slice-start":
        return _result_bytes(each.shape, is_start=True)
    if each.kind.endswith("-start"):  # whose result contains its operands
        return array_bytes(each.shape)
    operands = [array_bytes(around[name].shape) if name in around else 0.0 for name in each.operands]
    result = array_bytes(each.shape)
    if each.kind in _SLICES:  # its operand is read from main memory even where the result is on the chip
        return result + (_all_bytes(each.shape) if not operands or operands[0] > 0 else 0.0)
    if each.kind == "dynamic-update-slice":
        return 2 * operands[1]
    if each.kind == "custom-call":
        # A kernel that reads an array several times says so; one that reads parts of it is taken to read all.
        stated = re.search(r'"bytes_accessed":\s*"?(\d+)', each.rest)
        return max(sum(operands) + result, float(stated[1]) if stated else 0.0)
    if each.kind == "fusion":
        return _fusion_bytes(each, operands, around, computations)
    return sum(operands) + result


def _fusion_bytes(
    each: Instruction, operands: list[float], around: Mapping[str, Instruction], computations: Computations
) -> float:
    """Bytes that a fusion reads and writes: of the inputs and outputs of which it uses slices, only these."""
    (body,) = called_by(each.rest)[:1] or ("",)
    inner = computations.get(body, {})
    inputs = _inputs(inner)
    for number, size in enumerate(operands):
        if number < len(inputs):
            operands[number] = min(size, _read_bytes(inputs[number], inner, computations))
    result = min(array_bytes(each.shape), sum(_written_bytes(root, inner) for root in _roots(inner)))
    if any(other.kind in COLLECTIVES or "AsyncCollective" in other.rest for other in inner.values()):
        # On TPUs a collective runs beside fusions, each of which passes its arrays on unchanged.
        inputs_bytes = [array_bytes(around[name].shape) if name in around else 0.0 for name in each.operands]
        returned = [size for size, is_here in array_sizes(each.shape) if is_here]
        operands = [0.0 if size in returned else read for size, read in zip(inputs_bytes, operands, strict=True)]
        result = max(0.0, result - sum(size for size in returned if size in inputs_bytes))
    return sum(operands) + result


def _all_bytes(shape: str) -> float:
    return sum(size for size, _ in array_sizes(shape))


def _read_bytes(name: str, inner: Mapping[str, Instruction], computations: Computations) -> float:
    """Bytes of an input that the body of a fusion reads; infinity, for all of it, unless only slices are used."""
    if inner[name].is_root:
        return math.inf
    total = 0.0
    for user in inner.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.kind in _SLICES and place == 0:
                total += _all_bytes(user.shape)
            elif user.kind == "bitcast":
                total += _read_bytes(user.name, inner, computations)
            elif user.kind == "fusion":
                body = computations.get((called_by(user.rest) or ("",))[0], {})
                inputs = _inputs(body)
                if place >= len(inputs):
                    return math.inf
                # An input that the inner fusion returns unchanged is read by the users of its result.
                if _is_passed_on(inputs[place], body):
                    total += _read_bytes(user.name, inner, computations)
                else:
                    total += _read_bytes(inputs[place], body, computations)
            elif user.kind != "dynamic-update-slice" or place != 0:
                return math.inf
    return total


def _is_passed_on(name: str, inner: Mapping[str, Instruction]) -> bool:
    """Whether a body returns its input unchanged."""
    if inner[name].is_root:
        return True
    users = [user for user in inner.values() if name in user.operands]
    return len(users) == 1 and users[0].kind == "bitcast" and _is_passed_on(users[0].name, inner)


def _written_bytes(root: Instruction, inner: Mapping[str, Instruction]) -> float:
    """Bytes that the root of a fusion writes; of an array that is updated in place, only the update."""
    while root.kind == "bitcast" and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root.kind == "dynamic-update-slice" and root.operands[1] in inner:
        return array_bytes(inner[root.operands[1]].shape)
    return array_bytes(root.shape)


def _roots(inner: Mapping[str, Instruction]) -> list[Instruction]:
    roots = [each for each in inner.values() if each.is_root]
    return [inner[name] for root in roots if root.kind == "tuple" for name in root.operands if name in inner] or roots


def _inputs(inner: Mapping[str, Instruction]) -> list[str]:
    return [each.name for each in sorted((x for x in inner.values() if x.kind == "parameter"), key=_parameter_number)]


def _parameter_number(each: Instruction) -> int:
    return int(each.rest.partition(")")[0] or 0)


def _trips_of_condition(rest: str, computations: Computations) -> float | None:
    """Iterations of a loop that counts from 0 to a constant; None where its condition has more than a counter."""
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    instructions = computations.get(condition[1], {}) if condition else {}
    bounds = list(_constants(instructions))
    compared = [each for each in instructions.values() if each.kind not in ("parameter", "constant", "tuple")]
    only_counts = all(re.match(r"(pred|[su]32)\[\]", each.shape) for each in compared)
    return float(bounds[0] // _increment(rest, compared, computations)) if len(bounds) == 1 and only_counts else None


def _increment(rest: str, compared: Sequence[Instruction], computations: Computations) -> int:
    """What the body adds to the counter, which is more than 1 in loops that the compiler has unrolled."""
    counter = [match[1] for each in compared if (match := re.search(r"index=(\d+)", each.rest))]
    called = re.search(r"body=%?([\w.\-]+)", rest)
    body = computations.get(called[1], {}) if called else {}
    root = next((each for each in body.values() if each.is_root), None)
    if len(counter) != 1 or root is None or root.kind != "tuple":
        return 1
    step = body.get(root.operands[int(counter[0])])
    while step is not None and step.kind in ("copy", "bitcast"):
        step = body.get(step.operands[0])
    if step is None or step.kind not in ("add", "fusion"):
        return 1
    inputs = {name: body[name] for name in step.operands if name in body}
    added = [*_constants(inputs), *(c for name in called_by(step.rest) for c in _constants(computations.get(name, {})))]
    return added[0] if len(added) == 1 and added[0] > 0 else 1


def _constants(instructions: Mapping[str, Instruction]) -> Iterator[int]:
    for each in instructions.values():
        if each.kind == "constant" and re.match(r"[su]32\[\]", each.shape):
            yield int(each.rest.partition(")")[0])


def _result_bytes(shape: str, *, is_start: bool) -> float:
    """Bytes of a result; that of an asynchronous start has its operands first and counters at the end."""
    sizes = [size for size, _ in array_sizes(shape)]
    if is_start and len(sizes) > 1:
        sizes = [size for size in sizes if size > _MAX_COUNTER_BYTES] or sizes
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _spans_slices(rest: str, slice_of: Sequence[int]) -> bool:
    """Whether any group of a collective has devices on several slices."""
    if len(set(slice_of)) < 2:
        return False
    return any(
        len({slice_of[device] for device in group if device < len(slice_of)}) > 1 for group in replica_groups(rest)
    )
