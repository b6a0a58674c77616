"""The step builder: one division, microbatches, donation, meshes; and the optimizer that it drives."""

import dataclasses
import functools
import math
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxrm.algorithms import sft
from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer, decay_mask, learning_rate
from jaxrm.algorithms.state import TrainState, create
from jaxrm.algorithms.train_step import build_train_step
from jaxrm.config.dicts import differences
from jaxrm.errors import UserError
from jaxrm.inference.sharded_model import pad_to_multiple_of, shard_model, state_shardings
from jaxrm.models import attention, build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.planning.traffic import traffic
from jaxrm.runtime.checkpoint import Checkpoints, with_shardings
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh, check_batch, check_row_length
from jaxrm.stage_config import RESUMABLE_FIELDS, SFT
from jaxrm.types import TokenBatch

SMALL = dataclasses.replace(
    PRESETS["tiny"], vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, head_dim=8
)
SOURCE = ModelSource(preset="tiny")
ADAMW = OptimizerConfig(lr=3e-3, b2=0.99)
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)
MIXED, LONG = MeshConfig(data=2, tensor=2, context=2), MeshConfig(data=1, context=4)
SHARDED = MeshConfig(data=1, fsdp=2, tensor=2, context=2)


def copy_batch(seed=0, B=8, T=12):
    """Rows whose second half repeats the first: learnable, with unequal numbers of trained tokens a row."""
    rng = np.random.default_rng(seed)
    half = rng.integers(1, 64, (B, T // 2))
    tokens = np.concatenate([half, half], axis=1).astype(np.int32)
    lengths = np.arange(B) % 4 + T - 3
    real = np.arange(T)[None] < lengths[:, None]
    return {
        "tokens": tokens,
        "segment_ids": real.astype(np.int32),
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
        "loss_mask": real & (np.arange(T)[None] >= T // 2),
    }


class Built:
    """What the tests of one mesh share, compiled once: a model, an optimizer and a step."""

    def __init__(self, mesh_config, num_microbatches, optimizer):
        mesh = build_mesh(mesh_config, jax.devices()[: math.prod(dataclasses.astuple(mesh_config))])
        model = shard_model(SOURCE, mesh, SMALL)
        self.optimizer = build_optimizer(optimizer, 100)
        self.sharding = state_shardings(model, self.optimizer, mesh, offload=optimizer.offload)
        self.rows = partition.batch_sharding(mesh)
        self.loss_fn = sft.sft_loss(model.graphdef)
        self.step = build_train_step(
            self.loss_fn,
            self.optimizer,
            state_sharding=self.sharding,
            batch_sharding=self.rows,
            num_microbatches=num_microbatches,
        )
        self.create = jax.jit(lambda params: create(params, self.optimizer, jax.random.key(1)))


built = functools.cache(Built)


@functools.cache
def first_params(seed):
    """Drawn on one device, so that all meshes start from the same numbers."""
    return jax.device_get(build.init_params(SMALL, SOURCE, jax.random.key(seed), None))


class Setup:
    """A fresh state of a model on one mesh, and the step that moves it."""

    def __init__(self, mesh_config, num_microbatches=1, optimizer=ADAMW, seed=0):
        shared = built(mesh_config, num_microbatches, optimizer)
        self.sharding, self.rows, self.loss_fn, self.step = shared.sharding, shared.rows, shared.loss_fn, shared.step
        state = shared.create(jax.tree.map(np.array, first_params(seed)))  # a copy: the step takes its buffers
        self.state = jax.device_put(state, self.sharding)
        self.shapes = jax.eval_shape(lambda: state)

    def run(self, steps, state=None):
        state, losses = self.state if state is None else state, []
        for i in range(steps):
            batch = TokenBatch(**jax.device_put(copy_batch(i % 3), self.rows))
            state, metrics = self.step(state, {}, batch)
            losses.append(float(metrics["loss"]))
        return state, losses


@pytest.mark.slow
def test_a_tiny_problem_is_learnt():
    _, losses = Setup(ONE).run(120)
    assert losses[0] > 3.5 and losses[-1] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "shape"),
    [(EIGHT, (2, 16, 32)), (MIXED, (2, 16, 32)), (LONG, (2, 8, 64)), (SHARDED, (2, 8, 32))],
    ids=["eight", "with context", "context alone", "context and fsdp"],
)
def test_one_device_and_several_give_the_same_losses(mesh, shape):
    """Each step's loss depends on the gradients of the steps before it."""
    _, one = Setup(ONE).run(6)
    state, several = Setup(mesh).run(6)
    np.testing.assert_allclose(several, one, rtol=1e-5)
    kernel = state.params["layers"]["mlp"]["gate"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, ("fsdp", "context"), "tensor")
    assert {s.data.shape for s in kernel.addressable_shards} == {shape}


@pytest.mark.slow
def test_sharing_the_tokens_of_long_rows_saves_memory(capfd):
    """Tokens are swapped for heads around attention; nothing but parameters is gathered whole on every device."""

    def compiled(devices):
        mesh = build_mesh(MeshConfig(data=1, context=devices), jax.devices()[:devices])
        one_layer = dataclasses.replace(SMALL, num_layers=1)
        model, optimizer = shard_model(SOURCE, mesh, one_layer), build_optimizer(ADAMW, 100)
        sharding, rows = state_shardings(model, optimizer, mesh), partition.batch_sharding(mesh)
        step = build_train_step(sft.sft_loss(model.graphdef), optimizer, state_sharding=sharding, batch_sharding=rows)
        state = jax.eval_shape(lambda params: create(params, optimizer, jax.random.key(0)), model.shapes)
        batch = jax.eval_shape(lambda: TokenBatch(**copy_batch(B=1, T=1024)))
        return step.trace(state, {}, batch).lower().compile(), sum(x.size for x in jax.tree.leaves(model.shapes))

    one, _ = compiled(1)
    four, parameters = compiled(4)
    assert four.memory_analysis().temp_size_in_bytes < 0.4 * one.memory_analysis().temp_size_in_bytes
    sent = traffic(four.as_text()).collectives
    assert sent["all-to-all"] > 0
    assert sent["all-gather"] < 2 * 4 * parameters + 1024 * 32  # forward and backward, and less than hidden states
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(("rows", "kv_heads"), [(4, 8), (4, 2), (3, 1)], ids=["shared", "copied", "one-kv-head"])
def test_a_kernel_on_each_device_gives_what_it_gives_on_one(rows, kv_heads):
    """Also where the key heads are fewer than the devices, or the rows do not divide over them."""
    mesh = build_mesh(MeshConfig(2, 1, 4))
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(rows, 6, heads, 4)), jnp.float32) for heads in (8, kv_heads, kv_heads)]
    segments = jnp.ones((rows, 6), jnp.int32)

    def gradients(attend):
        def loss(*arrays):
            return (attend(*arrays, segments, scale=0.5, softcap=None, window=None) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    split = gradients(partition.per_device(attention.xla, mesh))
    chex.assert_trees_all_close(split, gradients(attention.xla), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one", "eight"])
def test_microbatches_give_the_same_update(mesh):
    """Although the microbatches hold different numbers of trained tokens: there is one division."""
    whole_state, whole = Setup(mesh).run(3)
    cut_state, cut = Setup(mesh, num_microbatches=2).run(3)
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    chex.assert_trees_all_close(cut_state.params, whole_state.params, rtol=1e-3, atol=1e-5)


def test_loss_is_the_sum_over_tokens_divided_by_their_number():
    """Against a loop over single rows, each divided by the tokens of the whole batch."""
    setup = Setup(ONE)
    batch = copy_batch()
    params = jax.device_get(setup.state.params)  # the step takes the state's own buffers
    loss_fn, total, tokens = jax.jit(setup.loss_fn), 0.0, 0.0
    for row in range(8):
        one = TokenBatch(**{name: jnp.asarray(x[row : row + 1]) for name, x in batch.items()})
        (loss_sum, weight), _ = loss_fn(params, one, jax.random.key(0))
        total, tokens = total + float(loss_sum), tokens + float(weight)
    _, metrics = setup.step(setup.state, {}, TokenBatch(**jax.device_put(batch, setup.rows)))
    np.testing.assert_allclose(float(metrics["loss"]), total / tokens, rtol=1e-5)
    assert float(metrics["weight"]) == tokens == batch["loss_mask"].sum()


def test_padding_and_empty_rows_change_nothing():
    setup = Setup(ONE)
    batch = copy_batch()
    padded = {name: np.pad(x, ((0, 4), (0, 5))) for name, x in batch.items()}
    padded["tokens"][:, 12:] = 7
    loss = [jax.jit(setup.loss_fn)(setup.state.params, TokenBatch(**b), jax.random.key(0))[0] for b in (batch, padded)]
    np.testing.assert_allclose(loss[1], loss[0], rtol=1e-5)


def test_an_empty_batch_moves_nothing_but_decay():
    setup = Setup(ONE)
    before = jax.device_get(setup.state.params)
    empty = {name: np.zeros_like(x) for name, x in copy_batch().items()}
    state, metrics = setup.step(setup.state, {}, TokenBatch(**jax.device_put(empty, setup.rows)))
    assert float(metrics["loss"]) == 0.0
    chex.assert_trees_all_equal(jax.device_get(state.params), before)


def test_the_state_is_donated():
    setup = Setup(ONE)
    old = setup.state
    setup.run(1)
    assert old.params["final_norm"]["scale"].is_deleted()
    assert old.opt_state[1][0].nu["embedder"]["embedding"].is_deleted()


@pytest.mark.parametrize(
    ("written_on", "read_on"),
    [(ONE, EIGHT), (EIGHT, ONE), (EIGHT, MIXED), (LONG, EIGHT)],
    ids=["one-eight", "eight-one", "eight-context", "context-eight"],
)
def test_a_checkpoint_restores_on_another_mesh(tmp_path, written_on, read_on):
    writer, reader = Setup(written_on), Setup(read_on, seed=5)
    state, _ = writer.run(3)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {"params": state.params, "opt_state": state.opt_state}, {"loader": {}})
    checkpoints.wait()
    abstract = with_shardings(reader.shapes, reader.sharding)
    got = checkpoints.restore(3, {"params": abstract.params, "opt_state": abstract.opt_state})
    chex.assert_trees_all_equal(jax.device_get(got["params"]), jax.device_get(state.params))
    restored = TrainState(jnp.asarray(3), got["params"], got["opt_state"], jax.random.key(1))
    restored = jax.device_put(restored, reader.sharding)
    _, continued = writer.run(3, state)
    _, elsewhere = reader.run(3, restored)
    np.testing.assert_allclose(elsewhere, continued, rtol=1e-5)


AWAY = dataclasses.replace(ADAMW, offload=True)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_in_the_memory_of_the_hosts_teach_the_same(name):
    """They are there between steps, in the buffers of the step before, and nowhere else."""
    here, away = (Setup(EIGHT, optimizer=dataclasses.replace(one, name=name)) for one in (ADAMW, AWAY))
    first = jax.tree.leaves(away.state.opt_state)
    state, losses = away.run(3)
    np.testing.assert_allclose(losses, here.run(3)[1], rtol=1e-5)
    assert all(x.is_deleted() for x in first if x.sharding.memory_kind == partition.HOST_MEMORY)
    for x, was in zip(jax.tree.leaves(state.opt_state), first, strict=True):
        assert x.sharding == was.sharding
    kernel = ["layers", "mlp", "gate", "kernel"]
    moment = optax.tree_utils.tree_get(state.opt_state, "mu" if name == "adamw" else "v")
    for part in kernel:
        moment = moment[part]
    assert name == "adafactor" or moment.sharding.memory_kind == partition.HOST_MEMORY
    assert all(x.sharding.memory_kind == "device" for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize(("written", "read"), [(ADAMW, AWAY), (AWAY, ADAMW)], ids=["to the hosts", "from the hosts"])
def test_a_run_goes_on_wherever_its_moments_are(tmp_path, written, read):
    writer, reader = Setup(EIGHT, optimizer=written), Setup(EIGHT, optimizer=read)
    state, _ = writer.run(2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, {"params": state.params, "opt_state": state.opt_state}, {"loader": {}})
    checkpoints.wait()
    abstract = with_shardings(reader.shapes, reader.sharding)
    got = checkpoints.restore(2, {"params": abstract.params, "opt_state": abstract.opt_state})
    restored = TrainState(jnp.asarray(2), got["params"], got["opt_state"], jax.random.key(1))
    elsewhere, continued = (
        one.run(2, x)[1] for one, x in ((reader, jax.device_put(restored, reader.sharding)), (writer, state))
    )
    np.testing.assert_allclose(elsewhere, continued, rtol=1e-5)
    changed = [name for name, *_ in differences(SFT(optimizer=written), SFT(optimizer=read))]
    assert changed == ["optimizer.offload"] and set(changed) <= RESUMABLE_FIELDS


def test_devices_without_host_memory_are_told_so():
    memories = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(process_index=0, device_kind="toy", addressable_memories=lambda: memories)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    with pytest.raises(
        UserError, match=r"config\.optimizer\.offload is True, .* toy has device; use --config\.optimizer"
    ):
        partition.check_host_memory(mesh, "optimizer.offload")
    partition.check_host_memory(build_mesh(EIGHT), "optimizer.offload")


def test_steps_equal_save_restore_continue(tmp_path):
    setup = Setup(ONE)
    state, _ = setup.run(2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(2, {"params": state.params, "opt_state": state.opt_state}, {"loader": {}})
    unbroken, _ = setup.run(3, state)  # donates and overwrites while the save may still be writing
    checkpoints.wait()
    abstract = with_shardings(setup.shapes, setup.sharding)
    got = checkpoints.restore(2, {"params": abstract.params, "opt_state": abstract.opt_state})
    restored = TrainState(jnp.asarray(2), got["params"], got["opt_state"], jax.random.key(1))
    resumed, _ = setup.run(3, jax.device_put(restored, setup.sharding))
    chex.assert_trees_all_equal(jax.device_get(resumed.params), jax.device_get(unbroken.params))


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
    from jaxrm.runtime.checkpoint import CheckpointConfig

    def reopen():
        return Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2, keep_best=1))

    checkpoints = reopen()
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0)):
        checkpoints.save(step, {"params": {"x": jnp.full(3, step)}}, {"loader": {"at": step}}, loss)
    checkpoints.close()
    checkpoints = reopen()  # a resumed run still knows which was best
    for step, loss in ((5, 4.0), (6, float("nan")), (7, 2.0)):
        checkpoints.save(step, {"params": {"x": jnp.full(3, step)}}, {"loader": {"at": step}}, loss)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best_step() == 2
    assert checkpoints.progress(2) == {"step": 2, "loss": 1.0, "is_passing": False, "loader": {"at": 2}}


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_every_optimizer_learns_on_a_mesh(name, moment_dtype):
    config = OptimizerConfig(name=name, lr=5e-3, moment_dtype=moment_dtype, schedule="constant", weight_decay=0.01)
    state, losses = Setup(EIGHT, optimizer=config).run(25)
    assert losses[-1] < 0.75 * losses[0]
    if name == "adamw":
        moments = state.opt_state[1][0]
        assert moments.mu["embedder"]["embedding"].dtype == moment_dtype
        assert moments.nu["embedder"]["embedding"].dtype == "float32"


def test_decay_spares_norms():
    params = {"a": {"kernel": 1, "bias": 2}, "n": {"scale": 3}, "e": {"embedding": 4}}
    assert decay_mask(params) == {"a": {"kernel": True, "bias": False}, "n": {"scale": False}, "e": {"embedding": True}}


def test_learning_rate_by_hand():
    cosine = learning_rate(OptimizerConfig(lr=1.0, warmup=0.1, final_lr_share=0.2), 100)
    np.testing.assert_allclose([cosine(0), cosine(4), cosine(9)], [0.1, 0.5, 1.0], rtol=1e-5)
    np.testing.assert_allclose(cosine(55), 0.2 + 0.8 * 0.5, rtol=1e-4)
    np.testing.assert_allclose(cosine(100), 0.2, rtol=1e-5)
    linear = learning_rate(OptimizerConfig(lr=1.0, warmup=0.0, schedule="linear"), 10)
    np.testing.assert_allclose([linear(0), linear(5), linear(10)], [1.0, 0.5, 0.0], atol=1e-6)
    constant = learning_rate(OptimizerConfig(lr=0.3, warmup=0.5, schedule="constant"), 10)
    np.testing.assert_allclose([constant(0), constant(4), constant(9)], [0.06, 0.3, 0.3], rtol=1e-5)


def test_a_logical_axis_that_the_table_lacks_is_an_error():
    mesh = build_mesh(EIGHT)
    shapes = {"odd": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    with pytest.raises(UserError, match=r"parameter odd/kernel has logical axis 'wings'.*LOGICAL_TO_MESH"):
        partition.parameter_shardings(shapes, {"odd": {"kernel": ("embed", "wings")}}, mesh)
    with pytest.raises(UserError, match="name each of its axes"):
        partition.parameter_shardings(shapes, {"odd": {"kernel": ("embed",)}}, mesh)


def test_a_mesh_that_does_not_divide_a_parameter_is_an_error():
    mesh = build_mesh(MeshConfig(1, 1, 8))
    shapes = {"q": jax.ShapeDtypeStruct((16, 6, 8), jnp.float32)}
    with pytest.raises(UserError, match=r"config.mesh.tensor is 8.*'heads' of parameter q has size 6.*tensor=6"):
        partition.parameter_shardings(shapes, {"q": ("embed", "heads", "head_dim")}, mesh)
    shared = partition.parameter_shardings(shapes, {"q": ("embed", "kv_heads", "head_dim")}, mesh)
    assert shared["q"].spec == PartitionSpec(("fsdp", "context"), None, None)


@pytest.mark.parametrize(
    ("sizes", "model", "words"),
    [
        ({"context": 8}, {}, r"config\.mesh\.context is 8, but axis 'heads' .* size 4;.*--config\.mesh\.context=4$"),
        (
            {"tensor": 2, "context": 4},
            {},
            r"mesh\.tensor is 2 and config\.mesh\.context is 4, together 8, .*'heads'.*--config\.mesh\.tensor=1$",
        ),
        (
            {"fsdp": 4, "context": 2},
            {"hidden_size": 36},
            r"mesh\.fsdp is 4 and config\.mesh\.context is 2, together 8, .*'embed' .*36; .*--config\.mesh\.fsdp=3$",
        ),
        ({"tensor": 2, "context": 2, "fsdp": 2}, {"vocab_size": 63}, r"mesh\.tensor is 2, but axis 'vocab' .* size 63"),
        (
            {"tensor": 4, "fsdp": 2},
            {"intermediate_size": 66},
            r"mesh\.tensor is 4, .*'mlp' .*--config\.mesh\.tensor=3$",
        ),
    ],
    ids=["heads", "tensor x context", "fsdp x context", "vocabulary", "mlp"],
)
def test_a_model_that_a_mesh_does_not_divide_is_an_error(sizes, model, words):
    mesh = build_mesh(MeshConfig(data=1, **sizes))
    with pytest.raises(UserError, match=words):
        shard_model(SOURCE, mesh, dataclasses.replace(SMALL, **model))


def test_rows_that_the_context_axis_does_not_divide_are_padded():
    """Where they may not be padded, they are an error."""
    mesh = build_mesh(MIXED)
    check_row_length(mesh, "data.max_length", 12)
    with pytest.raises(UserError, match=r"data\.max_length is 1023, .*context is 2.*--config\.data\.max_length=1024"):
        check_row_length(mesh, "data.max_length", 1023)
    assert pad_to_multiple_of(mesh) == 2 and pad_to_multiple_of(build_mesh(EIGHT)) == 1


def test_batches_and_meshes_that_do_not_fit_are_errors():
    mesh = build_mesh(EIGHT)
    with pytest.raises(UserError, match=r"config.data.batch_size is 30.*4 devices.*--config.data.batch_size=32"):
        check_batch(mesh, "data.batch_size", 30)
    with pytest.raises(UserError, match=r"num_microbatches is 2, .*, or a multiple of 8, e.g. .*batch_size=16"):
        check_batch(mesh, "data.batch_size", 12, num_microbatches=2)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        build_mesh(MeshConfig(3, 1, 1))
    with pytest.raises(UserError, match=r"data is -1.*the rest"):
        MeshConfig(-1, -1, 1)


def test_clipping_bounds_the_update():
    optimizer = build_optimizer(OptimizerConfig(clip_norm=1e-3, lr=1.0, schedule="constant", warmup=0.0), 10)
    params = {"w": {"kernel": jnp.ones(4)}}
    grads = {"w": {"kernel": jnp.full(4, 1e6)}}
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params)
    assert float(optax.tree.norm(state[1][0].mu)) <= 0.1 * 1e-3 * 1.001
