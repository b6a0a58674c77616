"""FLOPs and collectives of programs, against hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.runtime.program_cost import collective_bytes, matmul_flops


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


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(8), ("data",))


def test_collectives_in_a_loop_count_as_often_as_it_runs(mesh):
    rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec()))

    def layers(x, w):
        def layer(h, one):
            gathered = jax.lax.with_sharding_constraint(one, whole)
            return jnp.tanh(h @ gathered), None

        return jax.lax.scan(layer, x, w)[0]

    stacked = NamedSharding(mesh, PartitionSpec(None, "data"))
    step = jax.jit(layers, in_shardings=(rows, stacked), out_shardings=rows)
    compiled = step.lower(jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((5, 32, 32), jnp.float32))
    found = collective_bytes(compiled.compile().as_text())
    assert sum(found.values()) == found["all-gather"] == 5 * 32 * 32 * 4


def test_a_sum_over_devices_is_an_all_reduce(mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(lambda x: x.sum(0), in_shardings=rows, out_shardings=NamedSharding(mesh, PartitionSpec()))
    text = step.lower(jax.ShapeDtypeStruct((16, 100), jnp.float32)).compile().as_text()
    assert collective_bytes(text) == {"all-reduce": 400.0}


def test_the_steps_of_one_collective_count_once_and_a_loop_as_often_as_it_compares_with():
    text = """
HloModule m

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %a = bf16[32,4]{1,0} all-gather(%x), channel_id=7, dimensions={0}
  %b = bf16[32,4]{1,0} all-gather(%x), channel_id=7, dimensions={0}
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(30)
  ROOT %c = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (p: bf16[8,4]) -> bf16[32,4] {
  ROOT %w = (s32[], bf16[8,4]{1,0}) while(%t), condition=%condition, body=%body
}
"""
    assert collective_bytes(text) == {"all-gather": 30 * 256.0}


def test_an_asynchronous_gather_counts_its_result_alone():
    text = """
HloModule m

ENTRY %main (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %done = bf16[32,4]{1,0} all-gather-done(%start)
}
"""
    assert collective_bytes(text) == {"all-gather": 256.0}
