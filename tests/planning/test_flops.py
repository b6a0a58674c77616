"""FLOPs of programs, against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxrm.models import attention
from jaxrm.planning.flops import matmul_flops


def flops(function, *shapes, **more):
    return matmul_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)), **more)


def test_a_product_costs_two_for_each_multiplication():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (4, 3, 5), (4, 7, 5)) == 2 * 4 * 3 * 5 * 7
    assert flops(lambda a: jnp.exp(a) + a, (3, 5)) == 0


def test_a_loop_counts_as_often_as_it_runs():
    def layers(x, w):
        return jax.lax.scan(lambda h, one: (h @ one, None), x, w)[0]

    assert flops(layers, (2, 8), (6, 8, 8)) == 6 * 2 * 2 * 8 * 8
    remat = jax.checkpoint(lambda h, one: jnp.tanh(h @ one))

    def loss(w, x):
        return jax.lax.scan(lambda h, one: (remat(h, one), None), x, w)[0].sum()

    forward = 6 * 2 * 2 * 8 * 8
    assert flops(jax.grad(loss), (6, 8, 8), (2, 8)) == 4 * forward  # forward, recomputed, and twice backward


def test_a_loop_of_unknown_length_counts_as_often_as_is_said():
    def until(x):
        return jax.lax.while_loop(lambda h: h.sum() < 1.0, lambda h: h @ h, x)

    assert flops(until, (4, 4)) == 2 * 4**3
    assert flops(until, (4, 4), while_trips=10) == 10 * 2 * 4**3


def test_inside_a_shard_map_every_device_counts():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(8), ("data",))
    rows = PartitionSpec("data")
    mapped = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert flops(mapped, (16, 4), (4, 4)) == 2 * 16 * 4 * 4


def test_a_kernels_blocks_count_once_for_each_cell_of_its_grid():
    T, N, H = 256, 4, 128
    shapes = [(2, T, N, H)] * 3
    kernel = attention.splash_interpreted

    def attend(query, key, value):
        segments = jnp.zeros((2, T), jnp.int32)
        return kernel(query, key, value, segments, scale=1.0, softcap=None, window=None)

    assert flops(attend, *shapes) == 2 * 2 * 2 * N * T * T * H  # scores and their product with the values
