"""FLOPs of a program, read off it before it is compiled.

XLA's own count takes the body of a loop once, however often it runs; a decoder is a loop over its layers. In the traced
program a scan knows its length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_flops(jaxpr: ClosedJaxpr | Jaxpr, *, while_trips: int = 1) -> float:
    """FLOPs of all matrix products of a traced program, over all devices; two for each multiplication.

    Everything else (norms, softmax, optimizer) is left out, as is usual: memory traffic dominates its cost.

    Args:
      jaxpr: e.g. ``jitted.trace(...).jaxpr``.
      while_trips: iterations of a loop whose length depends on the data, such as sampling until all responses have
        ended.
    """
    total = 0.0
    for equation in (jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "cond":
            total += max(matmul_flops(branch, while_trips=while_trips) for branch in params["branches"])
        elif name == "pallas_call" and params.get("cost_estimate") is not None:
            total += float(params["cost_estimate"].flops)
        elif name.startswith("dot_product_attention"):  # cuDNN's
            total += _attention_flops(equation, is_backward="bwd" in name)
        else:
            times = 1.0
            if name == "scan":
                times = params["length"]
            elif name == "while":
                times = while_trips
            elif name == "pallas_call":  # inside, shapes are those of one block
                times = math.prod(params["grid_mapping"].grid)
            elif name == "shard_map":  # inside, shapes are those of one device
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            inner = sum(matmul_flops(body, while_trips=while_trips) for body in _bodies(params.values()))
            total += times * inner
    return total


def _dot_flops(equation: Any) -> float:
    ((contracted, _), _) = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _attention_flops(equation: Any, *, is_backward: bool) -> float:
    """Two products of queries and keys forward, five backward; cuDNN skips no block where a mask is given."""
    (B, T, N, H), S = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
    return (10.0 if is_backward else 4.0) * B * N * T * S * H


def _bodies(values: Iterable[Any]) -> Iterable[ClosedJaxpr | Jaxpr]:
    for value in values:
        if isinstance(value, (ClosedJaxpr, Jaxpr)):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _bodies(value)
