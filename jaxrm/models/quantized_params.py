"""Trees of parameters whose kernels are quantized (`jaxrm.models.quantized`): to and from plain ones."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrm.models.lora import PROJECTIONS
from jaxrm.models.quantized import dequantize, quantize


def quantize_params(params: Any, kind: str, shardings: Any) -> Any:
    """Parameters with the kernels of their projections quantized, one after another; the rest is as it was.

    What is given is used up: each stack of kernels is deleted as soon as its codes are there.

    Args:
      params: of a decoder, or of a model with one.
      kind: one of ``KINDS``.
      shardings: the tree that is returned, with a sharding in place of every array.
    """

    def one(kernel: jax.Array, shardings: dict[str, Any], contracted: int) -> dict[str, jax.Array]:
        stored = jax.block_until_ready(quantizer(kind, contracted, shardings["codes"], shardings["scales"])(kernel))
        kernel.delete()
        return stored

    return _at_kernels(params, "kernel", one, shardings)


def dequantize_params(params: Any) -> Any:
    """Parameters with float32 kernels in place of codes and scales, for use inside of a program."""

    def one(codes: jax.Array, stored: dict[str, Any], contracted: int) -> dict[str, jax.Array]:
        del contracted
        return {"kernel": dequantize(codes, stored["scales"], jnp.float32)}

    return _at_kernels(params, "codes", one, params)


def plain_shapes(shapes: Any) -> Any:
    """Shapes of parameters as they are before their kernels are quantized."""

    def one(codes: Any, stored: Any, contracted: int) -> dict[str, Any]:
        del stored
        double = tuple(size * (1 + (i == contracted)) for i, size in enumerate(codes.shape))  # axis 0 is the stack
        return {"kernel": jax.ShapeDtypeStruct(codes.shape if codes.dtype == jnp.int8 else double, jnp.float32)}

    return _at_kernels(shapes, "codes", one, shapes)


def count_parameters(shapes: Any) -> int:
    """Number of parameters in a tree of arrays or shapes; quantized ones are counted as what they stand for."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(plain_shapes(shapes)))


def plain_shardings(shardings: Any) -> Any:
    """Shardings of parameters as they are before their kernels are quantized: those of the codes."""
    return _at_kernels(shardings, "codes", lambda codes, _, __: {"kernel": codes}, shardings)


def kind_of(shapes: Any) -> str | None:
    """How the kernels of a tree of arrays or shapes are quantized; None where they are not."""
    dtypes = {x.dtype for path, x in jax.tree_util.tree_leaves_with_path(shapes) if path[-1].key == "codes"}
    return None if not dtypes else "int8" if jnp.dtype(jnp.int8) in dtypes else "nf4"


@functools.cache
def quantizer(kind: str, contracted: int, codes: Any, scales: Any, *, stacked: bool = True) -> Any:
    """Jitted function from a kernel, or a stack of them, to its codes and scales, which lie as the shardings say."""

    def run(kernel: jax.Array) -> dict[str, jax.Array]:
        one = functools.partial(quantize, kind=kind, contracted=contracted)
        return dict(zip(("codes", "scales"), (jax.vmap(one) if stacked else one)(kernel), strict=True))

    return jax.jit(run, out_shardings={"codes": codes, "scales": scales})


def contracted_axes(place: tuple[str, ...]) -> int | None:
    """How many axes a projection contracts, by where its kernel is in a tree; None where there is no projection."""
    return _CONTRACTED.get(place[-2:])


_CONTRACTED: dict[tuple[str, ...], int] = dict(PROJECTIONS.values())


def _at_kernels(tree: Any, name: str, change: Callable[[Any, Any, int], Any], beside: Any) -> Any:
    """The tree with ``change(leaf, node of beside, contracted)`` for the leaf ``name`` of each projection."""

    def one(tree: Any, beside: Any, place: tuple[str, ...]) -> Any:
        if not isinstance(tree, dict):
            return tree
        contracted = contracted_axes(place)
        if contracted is not None and name in tree:
            rest = {key: leaf for key, leaf in tree.items() if key not in (name, "scales")}
            return dict(sorted((rest | change(tree[name], beside, contracted)).items()))
        return {key: one(part, beside[key], (*place, key)) for key, part in tree.items()}

    return one(tree, beside, ())
