"""Parse the text of a compiled program (HLO): computations, instructions, shapes, groups of devices."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: of its result.
      shape: of its result, as it is written.
      kind: of operation, such as ``fusion``.
      operands: names of its operands.
      rest: the line from its operands on, with its attributes.
      is_root: whether its result is that of the computation.
    """

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


Computations = Mapping[str, Mapping[str, Instruction]]

_OPERATION = re.compile(r"\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[\w\-]+)\(")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|called_computations)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)"
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\](\{[^}]*\})?")


def computations_of(hlo: str) -> Computations:
    """The instructions of each computation by name, those of the program itself under ``ENTRY``."""
    computations: dict[str, dict[str, Instruction]] = {}
    instructions: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            instructions = computations.setdefault("ENTRY" if head[1] else head[2], {})
            continue
        operation = _OPERATION.match(line)
        if operation is not None:
            kind, after = operation["kind"], line[operation.end() :]
            operands = () if kind in ("parameter", "constant") else tuple(_operands(after))
            instructions[operation["name"]] = Instruction(
                operation["name"], operation["shape"], kind, operands, after, operation["root"] is not None
            )
    return computations


def _operands(text: str) -> Iterator[str]:
    """Names up to the bracket that closes the operands."""
    depth = 1
    for match in re.finditer(r"[()]|%[\w.\-]+", text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return
        if match[0][0] == "%":
            yield match[0][1:]


def called_by(rest: str) -> list[str]:
    """The computations that an instruction calls, given its ``rest``."""
    return [name for called in _CALLED.findall(rest) for name in re.findall(r"%?([\w.\-]+)", called)]


def array_sizes(shape: str) -> list[tuple[float, bool]]:
    """Bytes of each array of a result, and whether it lies in the device's main memory."""
    sizes = []
    for kind, dimensions, layout in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" or kind.startswith("f8") else 16 if kind == "bf16" else int(re.sub(r"\D", "", kind))
        size = bits / 8 * math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append((size, "S(" not in layout))
    return sizes


def array_bytes(shape: str) -> float:
    """Bytes of a result in the device's main memory."""
    return sum(size for size, is_here in array_sizes(shape) if is_here)


def replica_groups(rest: str) -> list[list[int]]:
    """The groups of devices of a collective, in any of the ways in which XLA writes them."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return [[int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", match[1])]
    if match := re.search(r"replica_groups=mesh\[(.*?)\](?:\s*,?\s*device_ids=\((.*?)\))?\s*\{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'?([\w\-]+)'?=(\d+)", match[1])}
        grouped_axes = re.findall(r"'([\w\-]+)'", match[3])
        return _grouped(list(range(math.prod(sizes.values()))), sizes, grouped_axes)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, source = ([int(x) for x in match[i].split(",")] for i in (1, 2))
        order = [int(x) for x in match[3].split(",")] if match[3] else list(range(len(source)))
        strides = [math.prod(source[axis + 1 :]) for axis in range(len(source))]
        places = itertools.product(*(range(source[axis]) for axis in order))
        flat = [sum(i * strides[axis] for i, axis in zip(place, order, strict=True)) for place in places]
        return [flat[start : start + shape[-1]] for start in range(0, len(flat), shape[-1])]
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return [[int(x) for x in group.split(",") if x] for group in re.findall(r"\{([\d,]*)\}", match[1])]
    return []


def _grouped(devices: list[int], sizes: Mapping[str, int], axes: Sequence[str]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for device, place in zip(devices, itertools.product(*(range(size) for size in sizes.values())), strict=True):
        groups[tuple(i for i, name in zip(place, sizes, strict=True) if name not in axes)].append(device)
    return list(groups.values())
