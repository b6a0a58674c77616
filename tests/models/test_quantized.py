"""Quantized kernels: a block by hand, QLoRA's levels, qwix as a peer, and products tile by tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.errors import UserError
from jaxrm.models import quantized

SHAPES = {  # kernel, contracted axes, tile: each is cut along both of its axes
    "into heads": ((128, 4, 16), 1, 1024),
    "out of heads": ((4, 64, 96), 2, 4096),
    "plain": ((192, 176), 1, 4096),
    "blocks of 32": ((96, 64), 1, 1024),
}


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dequantized(kernel, kind, contracted):
    return quantized.dequantize(*quantized.quantize(kernel, kind, contracted), jnp.float32)


def test_nf4_of_a_block_by_hand():
    """The largest weight is 4, so the levels are 4 times those of QLoRA's appendix E."""
    column = np.zeros(64, np.float32)
    column[:6] = [4.0, -4.0, 2.0, 0.3, -0.36, 1.0]
    column[[8, 14]] = [4.0, -4.0]
    codes, scales = quantized.quantize(jnp.asarray(column)[:, None], "nf4", 1)
    assert codes.dtype == jnp.uint8 and codes.shape == (32, 1) and scales.tolist() == [[4.0]]
    # 2 / 4 = 0.5 lies between 0.4407 (12) and 0.5626 (13), whose middle is 0.5017; 0.075 is nearest to 0.0796 (8).
    # The other half of a byte is the weight eight rows on.
    low = [15, 0, 12, 8, 6, 10, 7, 7]
    high = [15, 7, 7, 7, 7, 7, 0, 7]
    assert codes[:8, 0].tolist() == [16 * b + a for a, b in zip(low, high, strict=True)]
    assert np.all(codes[8:] == 16 * 7 + 7)
    values = quantized.dequantize(codes, scales, jnp.float32)[:7, 0]
    expected = 4 * np.float32([1, -1, 0.44070982933, 0.07958029956, -0.09105003625, 0.24611230195, 0])
    np.testing.assert_array_equal(values, expected)


def test_int8_of_two_channels_by_hand():
    kernel = jnp.asarray([[127.5, 0.0], [-1.2, 0.0], [0.4, 0.0]])
    codes, scales = quantized.quantize(kernel, "int8", 1)
    assert codes.tolist() == [[127, 0], [-1, 0], [0, 0]]
    assert scales.tolist() == [[1.0, 1.0]]  # a channel of zeros has the scale 1


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_codes_and_scales_are_those_of_qwix(kind):
    """A weight in the very middle of two levels may fall to either."""
    kernel = normal((256, 32))
    codes, scales = quantized.quantize(kernel, kind, 1)
    peer = qwix.quantize(kernel, kind, channelwise_axes=(1,), tiled_axes={0: 64} if kind == "nf4" else {})
    np.testing.assert_array_equal(scales, peer.scale)
    mine = codes if kind == "int8" else quantized._unpack(codes, 0).reshape(kernel.shape).astype(jnp.uint4)
    assert mine.dtype == peer.qvalue.dtype
    peer_codes = jnp.maximum(peer.qvalue, -127) if kind == "int8" else peer.qvalue
    assert np.mean(np.asarray(mine) == np.asarray(peer_codes)) > 0.999
    values = qwix.dequantize(qwix.QArray(mine, scales, qtype=kind if kind == "nf4" else None))
    np.testing.assert_array_equal(quantized.dequantize(codes, scales, jnp.float32), values)


@pytest.mark.parametrize(("shape", "contracted"), [(shape, n) for shape, n, _ in SHAPES.values()])
def test_errors_are_within_half_a_step(shape, contracted):
    kernel = normal(shape)
    largest = np.abs(kernel).max(axis=tuple(range(contracted)), keepdims=True)
    assert np.all(np.abs(dequantized(kernel, "int8", contracted) - kernel) <= largest / 255 * 1.0001)
    widest = np.diff(quantized.NF4_LEVELS).max() / 2
    assert np.all(np.abs(dequantized(kernel, "nf4", contracted) - kernel) <= largest * widest * 1.0001)


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_quantizing_twice_changes_nothing(name, kind):
    shape, contracted, _ = SHAPES[name]
    kernel = dequantized(normal(shape), kind, contracted)
    again = dequantized(kernel, kind, contracted)
    np.testing.assert_allclose(again, kernel, rtol=1e-2 if kind == "int8" else 0, atol=1e-6 if kind == "int8" else 0)


@pytest.mark.parametrize(("size", "block"), [(576, 64), (96, 32), (80, 16)])
def test_nf4_takes_the_largest_block_that_divides(size, block):
    assert quantized.scales_shape((size, 3), "nf4", 1) == (size // block, 3)
    assert quantized.scales_shape((4, size, 3), "nf4", 2) == (4, size // block, 3)
    assert quantized.scales_shape((4, size, 3), "int8", 2) == (1, 1, 3)


def test_nf4_refuses_inputs_that_no_block_divides():
    with pytest.raises(UserError, match=r"sums over 24 inputs.*16, 32 or 64 divides; give .*model\.quantize.*=int8"):
        quantized.scales_shape((24, 8), "nf4", 1)


def value_and_gradient(multiply, x, dy):
    y, back = jax.vjp(multiply, x)
    return y, *back(dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_product_is_that_of_the_dequantized_kernel(name, kind, dtype):
    """Value and gradient, tile by tile and in one piece."""
    shape, contracted, tile = SHAPES[name]
    stored = quantized.quantize(normal(shape), kind, contracted)
    x, dy = normal((2, 5, *shape[:contracted]), 1).astype(dtype), normal((2, 5, *shape[contracted:]), 2).astype(dtype)
    kernel = quantized.dequantize(*stored, dtype)
    expected = value_and_gradient(lambda x: jnp.tensordot(x, kernel, contracted), x, dy)
    for size in (tile, quantized.TILE):
        got = value_and_gradient(lambda x, size=size: quantized.product(x, *stored, contracted, size), x, dy)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype == dtype
            np.testing.assert_allclose(
                a.astype(jnp.float32), b.astype(jnp.float32), rtol=2e-5 if dtype == jnp.float32 else 2e-2, atol=1e-4
            )


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_cut_both_axes(name):
    shape, contracted, tile = SHAPES[name]
    codes, scales = quantized.quantize(normal(shape), "nf4", contracted)
    assert quantized._division(codes, scales, contracted, tile)[0] > 1
    assert quantized._division(codes, scales, 0, tile)[0] > 1


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


@pytest.mark.parametrize(("kind", "bytes_per_weight"), [("int8", 1.0), ("nf4", 0.5)])
def test_product_never_holds_a_whole_kernel(kind, bytes_per_weight):
    """Codes lie packed, and of sixteen tiles there is one at a time."""
    D, F, rows = 1024, 2048, 8
    stored = jax.eval_shape(lambda w: quantized.quantize(w, kind, 1), jax.ShapeDtypeStruct((D, F), jnp.float32))
    x, dy = jax.ShapeDtypeStruct((rows, D), jnp.float32), jax.ShapeDtypeStruct((rows, F), jnp.float32)
    tile = D * F // 16
    forward = compiled(lambda x, c, s: quantized.product(x, c, s, 1, tile), x, *stored)
    scales = stored[1].size * 4
    assert forward.memory_analysis().argument_size_in_bytes == bytes_per_weight * D * F + scales + rows * D * 4
    backward = compiled(
        lambda x, c, s, dy: jax.vjp(lambda x: quantized.product(x, c, s, 1, tile), x)[1](dy), x, *stored, dy
    )
    for program in (forward, backward):
        assert program.memory_analysis().temp_size_in_bytes < 4 * tile * 4


def layers_loss(x, codes, scales, remat):
    def layer(x, stored):
        return jnp.tanh(quantized.product(x, *stored, 1, 4096)), None

    if remat:
        layer = jax.checkpoint(layer, prevent_cse=False)
    return jnp.sum(jax.lax.scan(layer, x, (codes, scales))[0] ** 2)


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_holds_no_dequantized_stack(remat):
    """The gradient is right, and dequantized is one layer at a time."""
    L, D, rows = 16, 256, 4
    kernels = normal((L, D, D)) / 16
    codes, scales = jax.vmap(lambda w: quantized.quantize(w, "nf4", 1))(kernels)
    x = normal((rows, D), 1)
    gradient = compiled(lambda *a: jax.grad(layers_loss)(*a, remat), x, codes, scales)
    assert gradient.memory_analysis().temp_size_in_bytes < 2 * D * D * 4

    def plain(x):
        for i in range(L):
            x = jnp.tanh(x @ quantized.dequantize(codes[i], scales[i], jnp.float32))
        return jnp.sum(x**2)

    np.testing.assert_allclose(gradient(x, codes, scales), jax.grad(plain)(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["up", "down"])
def test_eight_devices_agree_with_one(name):
    """Tiles leave an axis split over devices: what is gathered over fsdp is a tile, and never the whole kernel."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
    shape, axes, tile = (
        ((256, 512), ("fsdp", "tensor"), 16384) if name == "up" else ((512, 256), ("tensor", "fsdp"), 16384)
    )
    stored = quantized.quantize(normal(shape), "nf4", 1)
    x, dy = normal((8, 4, shape[0]), 1), normal((8, 4, shape[1]), 2)

    def run(x, dy, codes, scales):
        return value_and_gradient(lambda x: quantized.product(x, codes, scales, 1, tile), x, dy)

    def split(array, *names):
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*names)))

    wide = ("fsdp", None, "tensor")
    arguments = (
        split(x, *(wide if name == "down" else wide[:1])),
        split(dy, *(wide if name == "up" else wide[:1])),
        *(split(array, *axes) for array in stored),
    )
    program = compiled(run, *arguments)
    for got, want in zip(program(*arguments), run(x, dy, *stored), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line]
    sizes = [int(np.prod([int(n) for n in line.split("[")[1].split("]")[0].split(",")])) for line in gathered]
    assert sizes and max(sizes) <= tile
