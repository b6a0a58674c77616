"""Kernels of a frozen base in eight or four bits, and products with them.

A kernel ``[*contracted, *outputs]`` is stored as ``codes`` and float32 ``scales``:

- ``int8``: a code is ``round(w / scale)``, with one scale for each output channel.
- ``nf4``: a code is the number of one of sixteen levels, the quantiles of a normal distribution, with one scale for
  each block of 64 weights along the last contracted axis (QLoRA, arXiv 2305.14314, section 3 and appendix E). A byte
  holds two of them. JAX has arrays of four bits, but lays those that come from the host out in a byte each.

Both are the numbers of ``qwix``, JAX's library for quantization: a scale is the largest absolute weight over 127.5 or
over 1. (Its least code is -128, here -127.) It is not used here, since its ``nf4`` flattens the kernel. On a mesh that
moves the kernel between devices.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrm.errors import UserError, flag, option

KINDS = ("int8", "nf4")
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# What they cost, as a run prints it beside the choice; measured by tests/benchmarks/quantize.py.
MEASURED = {
    "int8": "SmolLM2-135M: perplexity 3.50 -> 3.50",
    "nf4": "SmolLM2-135M: perplexity 3.50 -> 4.08",
}
BLOCK = 64
_RUN = 16  # weights that are packed together, and the least block
TILE = 1 << 24  # most weights that a product dequantizes at a time: 32 MiB in bfloat16
# A tile takes a part of each of so many segments of an axis, so that the axis stays split over up to as many devices.
# With more segments the parts are shorter than the 128 numbers that a TPU pads them to.
_SEGMENTS = 8
_INT8_RANGE = 127.5  # half a step above the largest code
_LEAST_SCALE = math.sqrt(float(jnp.finfo(jnp.float32).tiny))  # what is smaller is a kernel of zeros


def scales_shape(shape: tuple[int, ...], kind: str, contracted: int) -> tuple[int, ...]:
    """Shape of the scales of a kernel ``[*contracted, *outputs]``; as many axes as the kernel has.

    Raises:
      UserError: where no block of 16, 32 or 64 weights divides the last contracted axis.
    """
    inputs, outputs = shape[:contracted], shape[contracted:]
    if kind == "int8":
        return (1,) * contracted + outputs
    return (*inputs[:-1], inputs[-1] // _block(inputs[-1]), *outputs)


def scales_axes(axes: tuple[str, ...], contracted: int) -> tuple[str, ...]:
    """Logical axes of the scales of a kernel with ``axes``; a contracted ``embed`` becomes ``embed_blocks``."""
    return tuple(f"{name}_blocks" if i < contracted else name for i, name in enumerate(axes))


def quantize(kernel: jax.Array, kind: str, contracted: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of a kernel.

    Args:
      kernel: ``[*contracted, *outputs]``.
      kind: one of ``KINDS``.
      contracted: how many of the axes a product sums over.

    Returns:
      Codes: int8 of the kernel's shape, or uint8 with half as many along the last contracted axis. And float32 scales
      of ``scales_shape``.
    """
    shape = scales_shape(kernel.shape, kind, contracted)
    blocks = kernel.astype(jnp.float32).reshape(_by_block(kernel.shape, shape))
    largest = jnp.max(jnp.abs(blocks), axis=tuple(range(1, blocks.ndim, 2)), keepdims=True)
    scales = largest / _INT8_RANGE if kind == "int8" else largest
    # The barrier keeps the compiler from dividing in another order, so that codes are the same whatever is around them.
    scales = jax.lax.optimization_barrier(jnp.where(scales < _LEAST_SCALE, 1.0, scales))
    relative = (blocks / scales).reshape(kernel.shape)
    if kind == "int8":
        codes = jnp.clip(jnp.round(relative), -127, 127).astype(jnp.int8)
    else:
        middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4_LEVELS)]
        levels = functools.reduce(jnp.add, ((relative > middle).astype(jnp.uint8) for middle in middles))
        codes = _pack(levels, contracted - 1)
    return codes, scales.reshape(shape)


def dequantize(codes: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """The kernel that codes and scales stand for."""
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * scales).astype(dtype)
    axis = _packed_axis(codes, scales)
    assert axis is not None
    levels, scales = _unpack(codes, axis), _by_run(codes, scales, axis)
    kernel = _levels(levels) * jnp.expand_dims(scales, (axis + 1, axis + 2))
    return kernel.reshape(*codes.shape[:axis], -1, *codes.shape[axis + 1 :]).astype(dtype)


class Int8Array(NamedTuple):
    """An array that a loop over tokens reads at every token.

    Attributes:
      codes: int8 of the array's shape.
      scales: float32 of the same shape, but for an axis of one in place of that which shares a scale.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return self.codes.shape


def to_int8(x: jax.Array, axis: int) -> Int8Array:
    """Codes of an array whose numbers along ``axis`` share a scale: the largest of them over 127."""
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=axis, keepdims=True) / 127
    scales = jnp.where(scales < _LEAST_SCALE, 1.0, scales)
    return Int8Array(jnp.clip(jnp.round(wide / scales), -127, 127).astype(jnp.int8), scales)


def int8_product(x: jax.Array, matrix: Int8Array, dtype: Any = jnp.float32) -> jax.Array:
    """Product ``[..., *O]`` of ``x [..., I]`` with a matrix ``[*O, I]`` of a scale for each output.

    Codes are whole numbers up to 127, which bfloat16 has exactly. So the product is of codes, and its result is scaled.

    Args:
      x: the rows.
      matrix: its codes and scales.
      dtype: of the product, and so of what devices add up where the inputs are split over them.
    """
    y = jnp.tensordot(x, codes_beside(matrix.codes, x), axes=(-1, -1), preferred_element_type=dtype)
    y = y.astype(jnp.float32) * jnp.expand_dims(matrix.scales[..., 0], tuple(range(x.ndim - 1)))
    return y.astype(dtype)


def codes_beside(codes: jax.Array, x: jax.Array) -> jax.Array:
    """Codes in the dtype of ``x``, which changes from token to token, for a product with it.

    The barrier ties the one to the other. Without it the compiler converts codes once, before the loop over tokens, and
    every token reads two bytes a number again.
    """
    return jax.lax.optimization_barrier((codes, x))[0].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: jax.Array, codes: jax.Array, scales: jax.Array, contracted: int, tile: int = TILE) -> jax.Array:
    """``tensordot(x, dequantize(codes, scales), contracted)`` in the dtype of ``x``, which alone has a gradient.

    No more than ``tile`` weights are dequantized at a time, as far as an axis can be divided. The backward pass
    dequantizes them again, so that no dequantized weight outlives its product.

    Args:
      x: ``[..., *contracted]``.
      codes: ``[*contracted, *outputs]``.
      scales: as ``quantize`` returns them.
      contracted: how many axes are summed over.
      tile: most weights dequantized at a time.

    Returns:
      ``[..., *outputs]``.
    """
    multiply = functools.partial(jnp.tensordot, x, axes=contracted)
    rows = x.ndim - contracted
    return _by_tile(multiply, codes, scales, x.dtype, axis=contracted, result_axis=rows, tile=tile)


def _product_forward(
    x: jax.Array, codes: jax.Array, scales: jax.Array, contracted: int, tile: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, codes, scales, contracted, tile), (codes, scales)


def _product_backward(
    contracted: int, tile: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, None, None]:
    codes, scales = residuals
    outputs = codes.ndim - contracted
    axes_dy, axes_kernel = tuple(range(dy.ndim - outputs, dy.ndim)), tuple(range(contracted, codes.ndim))

    def multiply(kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(dy, kernel, ((axes_dy, axes_kernel), ((), ())))

    rows = dy.ndim - outputs
    return _by_tile(multiply, codes, scales, dy.dtype, axis=0, result_axis=rows, tile=tile), None, None


product.defvjp(_product_forward, _product_backward)


def _by_tile(
    multiply: Callable[[jax.Array], jax.Array],
    codes: jax.Array,
    scales: jax.Array,
    dtype: Any,
    *,
    axis: int,
    result_axis: int,
    tile: int,
) -> jax.Array:
    """``multiply(kernel)``, tile by tile along an axis of the kernel that the result keeps as its ``result_axis``."""
    kernel = functools.partial(dequantize, dtype=dtype)
    tiles, segments = _division(codes, scales, axis, tile)
    if tiles == 1:
        return multiply(kernel(codes, scales))
    scales = _by_run(codes, scales, axis)  # a tile may begin inside of a block

    def one_tile(result: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        parts = (_part(x, axis, tiles, segments, i) for x in (codes, scales))
        y = multiply(kernel(*parts))
        y = y.reshape((*result.shape[: result_axis + 1], 1, *result.shape[result_axis + 2 :]))
        return jax.lax.dynamic_update_slice_in_dim(result, y, i, axis=result_axis + 1), None

    shape = jax.eval_shape(lambda *stored: multiply(kernel(*stored)), codes, scales)
    empty = jnp.zeros(_divided(shape.shape, result_axis, tiles, segments), shape.dtype)
    result, _ = jax.lax.scan(one_tile, empty, jnp.arange(tiles, dtype=jnp.int32))
    return result.reshape(shape.shape)


def _division(codes: jax.Array, scales: jax.Array, axis: int, tile: int) -> tuple[int, int]:
    """Number of tiles along an axis, and of the segments of it that each tile has a part of."""
    packed = _packed_axis(codes, scales)
    parts = codes.shape[axis] // (_RUN // 2 if axis == packed else 1)
    fewest = -(-codes.size * (1 if packed is None else 2) // tile)
    possible = [n for n in range(1, min(4 * fewest, parts) + 1) if parts % n == 0]
    tiles = next((n for n in possible if n >= fewest), possible[-1])
    return tiles, math.gcd(_SEGMENTS, parts // tiles)


def _divided(shape: tuple[int, ...], axis: int, tiles: int, segments: int) -> tuple[int, ...]:
    return (*shape[:axis], segments, tiles, shape[axis] // (segments * tiles), *shape[axis + 1 :])


def _part(x: jax.Array, axis: int, tiles: int, segments: int, i: jax.Array) -> jax.Array:
    """Tile ``i`` of codes or scales: its part of each segment of the axis."""
    if x.shape[axis] == 1:
        return x
    divided = x.reshape(_divided(x.shape, axis, tiles, segments))
    part = jax.lax.dynamic_index_in_dim(divided, i, axis=axis + 1, keepdims=False)
    return part.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def _pack(levels: jax.Array, axis: int) -> jax.Array:
    """Two numbers below 16 in each byte: of every 16 along an axis, the first eight and the last eight."""
    runs = levels.reshape(*levels.shape[:axis], -1, 2, _RUN // 2, *levels.shape[axis + 1 :])
    first, last = (jax.lax.index_in_dim(runs, i, axis=axis + 1, keepdims=False) for i in (0, 1))
    return (first | last << 4).reshape(*levels.shape[:axis], -1, *levels.shape[axis + 1 :])


def _unpack(codes: jax.Array, axis: int) -> jax.Array:
    """What ``_pack`` packed, with the axis as ``[runs, 2, 8]``."""
    runs = codes.reshape(*codes.shape[:axis], -1, 1, _RUN // 2, *codes.shape[axis + 1 :])
    shifts = jnp.expand_dims(jnp.asarray([0, 4], jnp.uint8), [i for i in range(runs.ndim) if i != axis + 1])
    return (runs >> shifts) & 15


def _packed_axis(codes: jax.Array, scales: jax.Array) -> int | None:
    """The axis along which ``nf4`` has blocks, and two weights in a byte; None for ``int8``."""
    if codes.dtype == jnp.int8:
        return None
    return next(i for i, (size, blocks) in enumerate(zip(codes.shape, scales.shape, strict=True)) if size != blocks)


def _by_run(codes: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """The scales with one for every 16 weights along an axis that is packed.

    A mesh that divides the axis may not divide its blocks of 64. So each device dequantizes its own weights.
    """
    if axis != _packed_axis(codes, scales):
        return scales
    return jnp.repeat(scales, 2 * codes.shape[axis] // (scales.shape[axis] * _RUN), axis=axis)


def _levels(codes: jax.Array) -> jax.Array:
    """Level of each code. A table is fastest on CPU; a TPU reads tables number by number, so there its bits decide."""

    def from_table(codes: jax.Array) -> jax.Array:
        return jnp.asarray(NF4_LEVELS, jnp.float32).at[codes].get(mode="promise_in_bounds")

    def by_bits(codes: jax.Array, levels: tuple[float, ...] = NF4_LEVELS) -> jax.Array:
        if len(levels) == 1:
            return jnp.full(codes.shape, levels[0], jnp.float32)
        half = len(levels) // 2
        return jnp.where((codes & half) > 0, by_bits(codes, levels[half:]), by_bits(codes, levels[:half]))

    return jax.lax.platform_dependent(codes, tpu=by_bits, default=from_table)


def _block(size: int) -> int:
    """Weights of a block along an axis of ``size``."""
    block = math.gcd(size, BLOCK)
    if block < _RUN:
        raise UserError(
            f"{option('model.quantize')} is 'nf4', but the model has a kernel that sums over {size} inputs, which no "
            f"block of {_RUN}, 32 or {BLOCK} divides; give {flag('model.quantize')}=int8"
        )
    return block


def _by_block(shape: tuple[int, ...], scales: tuple[int, ...]) -> list[int]:
    """Each axis of a kernel as two: blocks, and weights of a block."""
    return [n for size, blocks in zip(shape, scales, strict=True) for n in (blocks, size // blocks)]
