"""What a compiled program moves: bytes that devices send each other, and bytes in and out of a device's memory.

Read off the text of the program after XLA's passes, where a loop knows its trip count: XLA's own analysis takes the
body of a loop once, however often it runs, and a decoder is a loop over its layers.
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
    device_groups,
)

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They name what is there already, or count with what they call.
_FREE: tuple[str, ...] = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
)
_FREE += ("after-all", "partition-id", "replica-id", "opt-barrier", "async-start")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Traffic:
    """What one device moves in a run of a program, in bytes.

    Attributes:
      collectives: what reaches it by each kind of collective, on the links between near devices. On a ring of n devices
        that is (n - 1) / n of an array that is gathered, scattered or dealt out, and twice that of one that is summed.
      far: the same of collectives whose groups lie on several device_groups (slices of TPUs, hosts of GPUs).
      memory: read from and written to the device's memory.
    """

    collectives: dict[str, float]
    far: float
    memory: float


@dataclass
class _Count:
    collectives: dict[tuple[str, str, bool], float] = field(default_factory=lambda: defaultdict(float))
    memory: float = 0.0


def traffic(hlo: str, *, while_trips: int = 1, island_of: Sequence[int] = ()) -> Traffic:
    """Count a program.

    A loop whose trip count is not written beside it runs as often as its condition compares with; TPU programs split a
    collective into steps that share a channel, which counts once. Arrays that the compiler holds on the chip, or on the
    host, do not count as memory; of a slice that is read or written inside a fusion only the slice does.

    Args:
      hlo: text of the compiled program, ``compiled.as_text()``.
      while_trips: how often a loop runs whose length only the data tell.
      island_of: for each device, in the order of the program's, which island it is on; none given: all on one.
    """
    computations = computations_of(hlo)
    count = _Count()

    def visit(name: str, times: float, *, is_fused: bool) -> None:
        instructions = computations.get(name, {})
        for each in instructions.values():
            kind = each.kind.removesuffix("-start")
            sent = _sent(each, name, instructions)
            if sent is not None:
                what, size = sent
                channel = re.search(r"channel_id=(\d+)", each.rest)
                is_far = each.kind == "recv" or _is_far(each.rest, island_of)
                key = (what, channel[1] if channel else f"{name} {each.name}", is_far)
                count.collectives[key] = max(count.collectives[key], times * size)
            if not is_fused:
                count.memory += times * _memory_bytes(each, instructions, computations)
            trips = 1.0
            if kind == "while":
                known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', each.rest)
                trips = float(known[1]) if known else _compared_with(each.rest, computations) or while_trips
            for called in called_by(each.rest):
                if called in computations:
                    visit(
                        called,
                        times * trips,
                        is_fused=is_fused or kind not in ("while", "conditional", "call", "async"),
                    )

    visit("ENTRY", 1.0, is_fused=False)
    near: dict[str, float] = defaultdict(float)
    far = 0.0
    for (kind, _, is_far), size in count.collectives.items():
        if is_far:
            far += size
        else:
            near[kind] += size
    return Traffic(dict(near), far, count.memory)


def _sent(each: Instruction, inside: str, around: Mapping[str, Instruction]) -> tuple[str, float] | None:
    """The kind of a collective and the bytes that reach a device; None for what is none."""
    kind = each.kind.removesuffix("-start")
    if each.kind == "recv" and "megascale" in each.rest:  # between TPU slices, by the hosts
        return "recv", array_bytes(each.shape)
    if kind not in COLLECTIVES:
        return None
    size = _result_bytes(each.shape, is_start=each.kind.endswith("-start"))
    devices = max((len(group) for group in device_groups(each.rest)), default=0)
    share = 1.0 if kind == "collective-permute" or devices < 1 else (devices - 1) / devices
    if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):  # so TPUs write a reduce-scatter
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
    if each.kind.endswith("-start"):  # its result names its operands too
        return array_bytes(each.shape)
    operands = [array_bytes(around[name].shape) if name in around else 0.0 for name in each.operands]
    result = array_bytes(each.shape)
    if each.kind in _SLICES:  # read from there whatever memory it goes to
        return result + (_all_bytes(each.shape) if not operands or operands[0] > 0 else 0.0)
    if each.kind == "dynamic-update-slice":
        return 2 * operands[1]
    if each.kind == "fusion":
        (body,) = called_by(each.rest)[:1] or ("",)
        inner = computations.get(body, {})
        inputs = _inputs(inner)
        for number, size in enumerate(operands):
            if number < len(inputs):
                operands[number] = min(size, _read_bytes(inputs[number], inner, computations))
        result = min(result, sum(_written_bytes(root, inner) for root in _roots(inner)))
        if any(other.kind in COLLECTIVES or "AsyncCollective" in other.rest for other in inner.values()):
            # On TPUs a collective goes on beside fusions, each of which hands its arrays on as they are.
            given = [array_bytes(around[name].shape) if name in around else 0.0 for name in each.operands]
            returned = [size for size, is_here in array_sizes(each.shape) if is_here]
            operands = [0.0 if size in returned else read for size, read in zip(given, operands, strict=True)]
            result = max(0.0, result - sum(size for size in returned if size in given))
    return sum(operands) + result


def _all_bytes(shape: str) -> float:
    return sum(size for size, _ in array_sizes(shape))


def _read_bytes(name: str, inner: Mapping[str, Instruction], computations: Computations) -> float:
    """Bytes of an input that the body of a fusion reads: all, which is infinity here, unless only slices are used."""
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
                # What comes out of it as it is, is read by those that use it.
                through = _is_passed_on(inputs[place], body)
                total += (
                    _read_bytes(user.name, inner, computations)
                    if through
                    else (_read_bytes(inputs[place], body, computations))
                )
            elif user.kind != "dynamic-update-slice" or place != 0:
                return math.inf
    return total


def _is_passed_on(name: str, inner: Mapping[str, Instruction]) -> bool:
    """Whether a body returns its input as it is."""
    if inner[name].is_root:
        return True
    users = [user for user in inner.values() if name in user.operands]
    return len(users) == 1 and users[0].kind == "bitcast" and _is_passed_on(users[0].name, inner)


def _written_bytes(root: Instruction, inner: Mapping[str, Instruction]) -> float:
    """Bytes that the root of a fusion writes: what is put into a larger array is all, since that stays in place."""
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


def _compared_with(rest: str, computations: Computations) -> float | None:
    """How often a loop runs that counts from 0 to a constant; None where its condition asks for more than a counter."""
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    inside = computations.get(condition[1], {}) if condition else {}
    bounds = list(_constants(inside))
    asked = [each for each in inside.values() if each.kind not in ("parameter", "constant", "tuple")]
    only_counts = all(re.match(r"(pred|[su]32)\[\]", each.shape) for each in asked)
    return float(bounds[0] // _counted_by(rest, asked, computations)) if len(bounds) == 1 and only_counts else None


def _counted_by(rest: str, asked: Sequence[Instruction], computations: Computations) -> int:
    """What the body adds to the counter: loops that the compiler has unrolled count by more than 1."""
    counter = [found[1] for each in asked if (found := re.search(r"index=(\d+)", each.rest))]
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


_OWN = 4  # bytes of a number that an asynchronous start keeps for itself


def _result_bytes(shape: str, *, is_start: bool) -> float:
    """Bytes of a result; that of an asynchronous start holds its operands first, and numbers of its own at the end."""
    sizes = [size for size, _ in array_sizes(shape)]
    if is_start and len(sizes) > 1:
        sizes = [size for size in sizes if size > _OWN] or sizes
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _is_far(rest: str, island_of: Sequence[int]) -> bool:
    """Whether a group of a collective has devices on several device_groups."""
    if len(set(island_of)) < 2:
        return False
    return any(
        len({island_of[device] for device in group if device < len(island_of)}) > 1 for group in device_groups(rest)
    )
