"""What a program costs, read off it before it runs: FLOPs of its matrix products, bytes that devices send each other.

XLA's own count takes the body of a loop once, however often it runs; a decoder is a loop over its layers. So FLOPs are
counted in the traced program, where a scan knows its length, and collectives in the compiled one, where a loop knows
its trip count.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def matmul_flops(jaxpr: ClosedJaxpr | Jaxpr, *, while_trips: int = 1) -> float:
    """FLOPs of all matrix products of a traced program, over all devices; two for each multiplication.

    Everything else (norms, softmax, optimizer) is left out, as is usual: it costs memory traffic rather than FLOPs.

    Args:
      jaxpr: e.g. ``jitted.trace(...).jaxpr``.
      while_trips: how often the body of a loop runs whose length the program does not know, such as sampling until
        all responses have ended.
    """
    total = 0.0
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "cond":
            total += max(matmul_flops(branch, while_trips=while_trips) for branch in params["branches"])
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += 0.0 if estimate is None else float(estimate.flops)
        else:
            times = 1.0
            if name == "scan":
                times = params["length"]
            elif name == "while":
                times = while_trips
            elif name == "shard_map":  # inside, shapes are those of one device
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            inner = sum(matmul_flops(body, while_trips=while_trips) for body in _bodies(params.values()))
            total += times * inner
    return total


def collective_bytes(hlo: str, *, while_trips: int = 1) -> dict[str, float]:
    """Bytes of the results of each kind of collective that one device takes part in, a run of a compiled program.

    A loop whose trip count is not written beside it runs as often as its condition compares with; TPU programs split a
    collective into steps that share a channel, which counts once.

    Args:
      hlo: text of the compiled program, ``compiled.as_text()``.
      while_trips: as in `matmul_flops`, for loops whose trip count the compiler does not know.
    """
    computations = _computations(hlo)
    by_channel: dict[tuple[str, str], float] = defaultdict(float)

    def visit(name: str, times: float) -> None:
        for line in computations.get(name, ()):
            operation = _OPERATION.match(line)
            if operation is None:
                continue
            shape, kind = operation["shape"], operation["kind"].removesuffix("-start")
            if kind in COLLECTIVES:
                size = times * _shape_bytes(shape, is_start=operation["kind"].endswith("-start"))
                channel = re.search(r"channel_id=(\d+)", line)
                step = (kind, channel[1] if channel else f"{name} {len(by_channel)}")
                by_channel[step] = max(by_channel[step], size)
            trips = 1.0
            if kind == "while":
                known = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
                trips = float(known[1]) if known else _compared_with(line, computations) or while_trips
            for called in _CALLED.findall(line):
                for each in re.findall(r"%?([\w.\-]+)", called):
                    visit(each, times * trips)

    visit("ENTRY", 1.0)
    found: dict[str, float] = defaultdict(float)
    for (kind, _), size in by_channel.items():
        found[kind] += size
    return dict(found)


def _compared_with(line: str, computations: Mapping[str, list[str]]) -> float | None:
    """The constant that a loop counts up to; None where its condition is more than that."""
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [int(found[1]) for each in lines if (found := re.search(r"= s32\[\]\S* constant\((\d+)\)", each))]
    compares = [each for each in lines if " compare(" in each or " fusion(" in each]
    return float(bounds[0]) if len(bounds) == 1 and len(compares) <= 1 else None


_OPERATION = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = (?P<shape>\(.*?\)|\S+) (?P<kind>[\w\-]+)\(")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|branch_computations|called_computations)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)"
)
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c64|c128)\[([\d,]*)\]")


def _computations(hlo: str) -> Mapping[str, list[str]]:
    """The lines of each computation, that of the program itself under ``ENTRY``."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = found.setdefault("ENTRY" if head[1] else head[2], [])
        else:
            lines.append(line)
    return found


def _shape_bytes(shape: str, *, is_start: bool) -> float:
    """Bytes of a result; that of an asynchronous start holds its operands too, of which the results are the last."""
    sizes = []
    for kind, dimensions in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" or kind.startswith("f8") else 16 if kind == "bf16" else int(re.sub(r"\D", "", kind))
        sizes.append(bits / 8 * math.prod(int(size) for size in dimensions.split(",") if size))
    if is_start and len(sizes) > 1:
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _dot_flops(equation: Any) -> float:
    ((contracted, _), _) = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _bodies(values: Iterable[Any]) -> Iterable[ClosedJaxpr | Jaxpr]:
    for value in values:
        if isinstance(value, (ClosedJaxpr, Jaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _bodies(value)
