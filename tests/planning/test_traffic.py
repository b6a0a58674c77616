"""What compiled programs move, against hand counts and XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.planning.traffic import traffic


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
    collectives = traffic(compiled.compile().as_text()).collectives
    assert sum(collectives.values()) == collectives["all-gather"] == 5 * 32 * 32 * 4 * 7 / 8


def test_a_sum_over_devices_is_an_all_reduce(mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(lambda x: x.sum(0), in_shardings=rows, out_shardings=NamedSharding(mesh, PartitionSpec()))
    text = step.lower(jax.ShapeDtypeStruct((16, 100), jnp.float32)).compile().as_text()
    assert traffic(text).collectives == {"all-reduce": 2 * 400 * 7 / 8}


def test_a_collective_in_a_loop_counts_once_for_each_trip():
    """The trips are the number that the loop compares with; steps of one collective share a channel and count once."""
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
    assert traffic(text).collectives == {"all-gather": 30 * 256.0}


def test_an_asynchronous_gather_counts_its_result_alone():
    text = """
HloModule m

ENTRY %main (p: bf16[8,4]) -> bf16[32,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%p), dimensions={0}
  ROOT %done = bf16[32,4]{1,0} all-gather-done(%start)
}
"""
    assert traffic(text).collectives == {"all-gather": 256.0}


def test_steps_of_an_unrolled_loop_count_as_often_as_it_counts():
    text = """
HloModule m

%body (p: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[] add(%i, %two)
  %s = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %d = bf16[8,4]{1,0} collective-permute-done(%s)
  ROOT %r = (u32[], bf16[8,4]{1,0}) tuple(%next, %d)
}

%condition (p: (u32[], bf16[8,4])) -> pred[] {
  %p = (u32[], bf16[8,4]{1,0}) parameter(0)
  %bound = u32[] constant(8)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %c = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %w = (u32[], bf16[8,4]{1,0}) while(%t), condition=%condition, body=%body
  ROOT %o = bf16[8,4]{1,0} get-tuple-element(%w), index=1
}
"""
    assert traffic(text).collectives == {"collective-permute": 4 * 64.0}


def test_a_loop_that_ends_by_its_data_runs_as_often_as_is_said():
    text = """
HloModule m

%body (p: (s32[], pred[8])) -> (s32[], pred[8]) {
  %g = f32[8]{0} all-gather(%x), dimensions={0}
}

%condition (p: (s32[], pred[8])) -> pred[] {
  %p = (s32[], pred[8]{0}) parameter(0)
  %alive = pred[8]{0} get-tuple-element(%p), index=1
  %bound = s32[] constant(30)
  ROOT %c = pred[] fusion(%alive, %bound), kind=kLoop, calls=%f
}

ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %w = (s32[], pred[8]{0}) while(%t), condition=%condition, body=%body
}
"""
    assert traffic(text, while_trips=7).collectives == {"all-gather": 7 * 32.0}
    assert traffic(text, while_trips=0).collectives == {"all-gather": 0.0}


@pytest.mark.parametrize(
    ("groups", "devices", "is_dcn"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2, False),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, True),
        ("[2,4]<=[8]", 4, False),
        ("[4,2]<=[2,4]T(1,0)", 2, True),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", 4, False),
        ("mesh['data'=2,'fsdp'=4] {'data'}", 2, True),
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp'}", 8, True),
    ],
)
def test_a_group_with_devices_of_two_slices_sends_between_them(groups, devices, is_dcn):
    text = f"""
HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    moved = traffic(text, slice_of=[0, 0, 0, 0, 1, 1, 1, 1])
    size = 2 * 32 * (devices - 1) / devices
    assert (moved.dcn, sum(moved.collectives.values())) == ((size, 0.0) if is_dcn else (0.0, size))
    assert traffic(text).dcn == 0.0


def test_what_the_hosts_of_tpu_slices_send_each_other_is_dcn():
    by_hosts = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    text = f"""
HloModule m

ENTRY %main (p: f32[8]) -> f32[8] {{
  %r = (f32[8,128]{{1,0}}, u32[], token[]) recv(%after), channel_id=3, {by_hosts}
  ROOT %d = (f32[8,128]{{1,0}}, token[]) recv-done(%r), channel_id=3
}}
"""
    moved = traffic(text)
    assert moved.dcn == pytest.approx(8 * 128 * 4, rel=0.01) and not moved.collectives


def test_a_reduce_scatter_is_not_mistaken_for_an_all_reduce():
    text = """
HloModule m

%all-reduce-scatter.1 (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s = f32[8]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={8}
}

ENTRY %main (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert traffic(text).collectives == {"reduce-scatter": 64 * 4 * 7 / 8}


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def test_memory_without_loops_is_what_xla_counts():
    def mlp(x, a, b):
        return jnp.tanh(x @ a) @ b + x

    program = compiled(mlp, (64, 128), (128, 512), (512, 128))
    assert traffic(program.as_text()).memory == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.1)


def test_memory_of_a_scan_is_that_of_its_body_times_its_length():
    length, size = 12, 256

    def layers(x, w):
        return jax.lax.scan(lambda h, one: (jnp.tanh(h @ one), None), x, w)[0]

    program = compiled(layers, (8, size), (length, size, size))
    # Each layer reads its own matrix once (slicing it first may copy it), never the whole stack.
    matrix_bytes = length * size * size * 4
    assert matrix_bytes <= traffic(program.as_text()).memory < 3.3 * matrix_bytes
    assert program.cost_analysis()["bytes accessed"] < matrix_bytes  # which takes the body once


def test_weights_in_nested_fusions_and_async_slices_count():
    """Both are read from the memory of the device; async slices are on their way to the memory on the chip."""
    text = """
HloModule m

%bitcast_fusion (p.1: f32[64,32]) -> f32[64,32] {
  %p.1 = f32[64,32]{1,0} parameter(0)
  ROOT %b = f32[64,32]{1,0} bitcast(%p.1)
}

%matmul (p.2: f32[64,32], p.3: f32[4,64]) -> f32[4,32] {
  %p.2 = f32[64,32]{1,0} parameter(0)
  %p.3 = f32[4,64]{1,0} parameter(1)
  %w = f32[64,32]{1,0} fusion(%p.2), kind=kLoop, calls=%bitcast_fusion
  ROOT %c = f32[4,32]{1,0} convolution(%p.3, %w), dim_labels=bf_io->bf
}

%async (q: f32[100,32]) -> f32[50,32] {
  %q = f32[100,32]{1,0} parameter(0)
  ROOT %s = f32[50,32]{1,0:S(1)} slice(%q), slice={[0:50], [0:32]}
}

ENTRY %main (w: f32[64,32], x: f32[4,64], y: f32[100,32]) -> f32[4,32] {
  %w = f32[64,32]{1,0} parameter(0)
  %x = f32[4,64]{1,0:S(1)} parameter(1)
  %y = f32[100,32]{1,0} parameter(2)
  %a = ((f32[100,32]{1,0}), f32[50,32]{1,0:S(1)}, s32[]) async-start(%y), calls=%async
  %d = f32[50,32]{1,0:S(1)} async-done(%a)
  ROOT %f = f32[4,32]{1,0:S(1)} fusion(%w, %x), kind=kOutput, calls=%matmul
}
"""
    assert traffic(text).memory == 64 * 32 * 4 + 50 * 32 * 4


def test_fusions_do_not_move_the_buffers_of_async_collectives():
    """A collective holds its buffer while the fusions run beside it."""
    text = """
HloModule m

%beside (p.1: f32[64,32], p.2: f32[16,32]) -> (f32[16,16], f32[64,32]) {
  %p.1 = f32[64,32]{1,0} parameter(0)
  %p.2 = f32[16,32]{1,0} parameter(1)
  %d = f32[16,16]{1,0} convolution(%p.2, %p.2), dim_labels=bf_oi->bf
  %s = f32[64,32]{1,0} custom-call(%p.1), custom_call_target="AsyncCollectiveStep"
  ROOT %r = (f32[16,16]{1,0}, f32[64,32]{1,0}) tuple(%d, %s)
}

ENTRY %main (g: f32[64,32], x: f32[16,32]) -> (f32[16,16], f32[64,32]) {
  %g = f32[64,32]{1,0} parameter(0)
  %x = f32[16,32]{1,0} parameter(1)
  ROOT %f = (f32[16,16]{1,0}, f32[64,32]{1,0}) fusion(%g, %x), kind=kOutput, calls=%beside
}
"""
    assert traffic(text).memory == 16 * 32 * 4 + 16 * 16 * 4


def test_a_kernel_moves_what_it_says_or_its_arrays():
    """The more of both: one that reads an array several times says so, one that reads parts of it is not trusted."""
    text = """
ENTRY %main (a: bf16[64,8], b: bf16[16,8]) -> f32[64,128] {
  %a = bf16[64,8]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %k = f32[64,128]{1,0} custom-call(%a, %b), backend_config={"cost_estimate":{"bytes_accessed":"BYTES","flops":"1"}}
  ROOT %l = f32[64,128]{1,0} custom-call(%a, %b), custom_call_target="other"
}
"""
    arrays = 64 * 8 * 2 + 16 * 8 * 2 + 64 * 128 * 4
    assert traffic(text.replace("BYTES", "100000")).memory == 100_000 + arrays
    assert traffic(text.replace("BYTES", "1000")).memory == 2 * arrays
