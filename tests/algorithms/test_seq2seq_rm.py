"""Sequence MLE: the loss from explicit logits, mappings and their weights, packing, microbatches, devices, learning."""

import dataclasses
import functools
import math
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer
from jaxrm.algorithms.seq2seq_rm import seq2seq_rm_loss
from jaxrm.algorithms.state import create
from jaxrm.algorithms.train_step import build_train_step
from jaxrm.data.examples import MarkedMappingExample
from jaxrm.data.packing import build_row, pack
from jaxrm.errors import UserError
from jaxrm.inference.sharded_model import shard_model, state_shardings
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.models.kernels import PLAIN
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import MappingBatch, MarkedMappingBatch

SMALL = dataclasses.replace(
    PRESETS["tiny"], vocab_size=32, hidden_size=32, intermediate_size=64, num_layers=2, head_dim=8, logit_softcap=5.0
)
SOURCE = ModelSource(preset="tiny")
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)
MIXED, LONG = MeshConfig(data=2, tensor=2, context=2), MeshConfig(data=1, context=4)
REQUEST, EOS = (30, 31), 1
COLUMNS = dict.fromkeys(("loss_mask", "is_correction", "is_edit"), np.dtype(bool))


def mapping(prompt, source, target, is_correction):
    tokens = np.array([*prompt, *source, *REQUEST, *target], np.int32)
    loss_mask = np.arange(len(tokens)) >= len(tokens) - len(target)
    is_edit = np.zeros(len(tokens), bool)
    is_edit[loss_mask] = is_correction & ~np.isin(target, source)
    return MarkedMappingExample(tokens, loss_mask, "here", is_correction, is_edit)


def rows_of(examples, rows, row_length):
    """A batch in which the i-th row holds the examples that ``rows[i]`` numbers."""
    built = [build_row([examples[i] for i in row], row_length, pad_id=7, columns=COLUMNS) for row in rows]
    return MarkedMappingBatch(**{name: jnp.asarray(np.stack([row[name] for row in built])) for name in built[0]})


def one_a_row(examples, row_length):
    return rows_of(examples, [[i] for i in range(len(examples))], row_length)


# --- the loss


class Bigram(nnx.Module):
    """Model whose logits are a table: those of the next token, by the present one."""

    def __init__(self, size):
        self.table = nnx.Param(jnp.zeros((size, size)))
        self.config = types.SimpleNamespace(logit_softcap=None)
        self.kernels = PLAIN

    def __call__(self, tokens, *, positions, segment_ids):
        return self.table[...][tokens]

    @property
    def head_embedding(self):
        return jnp.eye(self.table.shape[0])


@pytest.mark.parametrize("compiler", [jax.jit, lambda function: function], ids=["jit", "no-jit"])
def test_two_mappings_by_hand(compiler):
    """Over three words the model gives (1/2, 1/4, 1/4) after 0 and (1/8, 1/8, 3/4) after 1 and after 2."""
    after_0, after_1 = np.log([0.5, 0.25, 0.25]), np.log([0.125, 0.125, 0.75])
    params = {"table": jnp.asarray([after_0, after_1, after_1], jnp.float32)}
    graphdef = nnx.graphdef(Bigram(3))
    batch = MarkedMappingBatch(
        tokens=jnp.asarray([[1, 2, 0, 0, 1, 2], [0, 1, 1, 2, 9, 9]], jnp.int32) % 3,
        segment_ids=jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        positions=jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 0]]),
        loss_mask=jnp.asarray([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]], bool),
        is_correction=jnp.asarray([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool),
        is_edit=jnp.asarray([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], bool),
    )
    # Correction: 0 1 2 after 0 0 1, probabilities 1/2, 1/4, 3/4. Identity: 1 2 after 1 1, probabilities 1/8, 3/4.
    correction, identity = -np.log(1 / 2 * 1 / 4 * 3 / 4), -np.log(1 / 8 * 3 / 4)
    # The edit, of probability 1/4, counts four times: three times more than without its weight.
    loss_fn = seq2seq_rm_loss(graphdef, correction_weight=2.0, identity_weight=0.5, edit_weight=4.0)
    (total, weight), aux = compiler(loss_fn)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(total, 2.0 * (correction + 3 * np.log(4)) + 0.5 * identity, rtol=1e-6)
    np.testing.assert_allclose(weight, 2.0 * (3 + 3) + 0.5 * 2, rtol=1e-6)
    want = {
        "nll_correction": (correction, 3),
        "sequence_nll_correction": (correction, 1),
        "accuracy_correction": (2, 3),  # 1/4 is not the most likely one
        "nll_identity": (identity, 2),
        "sequence_nll_identity": (identity, 1),
        "accuracy_identity": (1, 2),
        "nll_edit": (np.log(4), 1),
        "accuracy_edit": (0, 1),
    }
    assert set(aux) == set(want)
    for name, pair in want.items():
        np.testing.assert_allclose(aux[name], pair, rtol=1e-6, err_msg=name)


def random_mappings(seed=0, pairs=6):
    """Correction and identity of each pair, of many lengths."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(pairs):
        prompt, rejected, chosen = (rng.integers(2, 30, n) for n in rng.integers(1, 6, 3))
        chosen = [*chosen, EOS]
        examples += [mapping(prompt, [*rejected, EOS], chosen, True), mapping(prompt, chosen, chosen, False)]
    return examples


def draw(shapes, seed=0):
    """First parameters in NumPy, which has nothing to compile: norms of 1, and the rest normal."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        return jnp.asarray(rng.normal(size=leaf.shape) * SMALL.hidden_size**-0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def small():
    graphdef, shapes, _ = build.abstract_decoder(SMALL, SOURCE)
    return graphdef, draw(shapes)


@functools.cache
def jitted(**weights):
    return jax.jit(seq2seq_rm_loss(small()[0], **weights))


def test_the_loss_is_that_of_a_loop_over_tokens():
    """From whole logits of each example alone, in float64, one target token after the other."""
    graphdef, params = small()
    examples = random_mappings()
    batch = one_a_row(examples, 24)

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        return model.logits(model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids))

    logits = np.asarray(forward(params), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    sums = dict.fromkeys(("nll_correction", "nll_identity", "accuracy_correction", "accuracy_identity"), 0.0)
    tokens = {"correction": 0, "identity": 0}
    for row, example in enumerate(examples):
        name = "correction" if example.is_correction else "identity"
        for t in np.flatnonzero(example.loss_mask):
            at = log_probs[row, t - 1]
            sums[f"nll_{name}"] -= at[example.tokens[t]]
            sums[f"accuracy_{name}"] += at.argmax() == example.tokens[t]
            tokens[name] += 1

    (total, weight), aux = jitted(correction_weight=1.5, identity_weight=0.25)(params, batch, jax.random.key(0))
    np.testing.assert_allclose(total, 1.5 * sums["nll_correction"] + 0.25 * sums["nll_identity"], rtol=1e-5)
    np.testing.assert_allclose(weight, 1.5 * tokens["correction"] + 0.25 * tokens["identity"], rtol=1e-6)
    for name, count in tokens.items():
        np.testing.assert_allclose(aux[f"nll_{name}"], (sums[f"nll_{name}"], count), rtol=1e-5)
        np.testing.assert_allclose(aux[f"sequence_nll_{name}"], (sums[f"nll_{name}"], 6), rtol=1e-5)
        np.testing.assert_allclose(aux[f"accuracy_{name}"], (sums[f"accuracy_{name}"], count), rtol=1e-6)


def test_weights_of_one_are_plain_sequence_mle():
    """Each token counts the same, whichever mapping it belongs to."""
    batch = one_a_row(random_mappings(), 24)
    (total, weight), aux = jitted()(small()[1], batch, jax.random.key(0))
    np.testing.assert_allclose(total, aux["nll_correction"][0] + aux["nll_identity"][0], rtol=1e-6)
    assert float(weight) == np.asarray(batch.loss_mask).sum()


def test_an_edit_weight_of_one_changes_no_bit():
    """Neither the loss nor a gradient, against the same batch whose edits nobody marked."""
    marked = one_a_row(random_mappings(), 24)
    plain = MappingBatch(**{field.name: getattr(marked, field.name) for field in dataclasses.fields(MappingBatch)})
    assert marked.is_edit.any()

    @jax.jit
    def gradients(params, batch):
        weights = {"correction_weight": 1.5, "identity_weight": 0.25, "edit_weight": 1.0}
        loss = seq2seq_rm_loss(small()[0], **weights)
        return jax.value_and_grad(lambda p: loss(p, batch, None)[0][0])(params)

    chex.assert_trees_all_equal(gradients(small()[1], marked), gradients(small()[1], plain))
    with pytest.raises(UserError, match=r"edit_weight is 4\.0, but these batches do not say which tokens are edits"):
        seq2seq_rm_loss(small()[0], edit_weight=4.0)(small()[1], plain, None)


def test_packing_changes_nothing():
    """Sums and gradients of packed rows are those of one example a row, with padding of whatever id."""
    examples = random_mappings()
    packed_rows = pack([len(example.tokens) for example in examples], 40)
    assert max(map(len, packed_rows)) >= 3
    packed, apart = rows_of(examples, packed_rows, 40), one_a_row(examples, 24)

    @jax.jit
    def gradients(params, batch):
        def total(params):
            weights = {"correction_weight": 1.5, "identity_weight": 0.25, "edit_weight": 4.0}
            loss, aux = seq2seq_rm_loss(small()[0], **weights)(params, batch, None)
            return loss[0], (loss, aux)

        return jax.grad(total, has_aux=True)(params)

    want_gradient, want = gradients(small()[1], apart)
    gradient, got = gradients(small()[1], packed)
    chex.assert_trees_all_close(got, want, rtol=2e-5)
    chex.assert_trees_all_close(gradient, want_gradient, rtol=1e-3, atol=1e-4)


def test_source_and_request_are_no_targets():
    """Only what stands right before a target token is taught to predict anything."""
    prompt, source, target = [2, 3], [4, 5, EOS], [6, 7, EOS]
    batch = one_a_row([mapping(prompt, source, target, True)], 12)
    graphdef = nnx.graphdef(Bigram(32))
    gradient = jax.jit(jax.grad(lambda p: seq2seq_rm_loss(graphdef)(p, batch, None)[0][0]))(
        {"table": jnp.zeros((32, 32))}
    )
    conditions = np.flatnonzero(np.abs(gradient["table"]).sum(axis=1))
    assert conditions.tolist() == [6, 7, 31]  # the request's last token, and the target but its last


def test_a_mapping_that_is_absent_has_no_weight():
    batch = one_a_row([example for example in random_mappings() if example.is_correction], 24)
    (_, weight), aux = jitted()(small()[1], batch, jax.random.key(0))
    assert weight > 0
    for name in ("nll", "sequence_nll", "accuracy"):
        assert tuple(map(float, aux[f"{name}_identity"])) == (0.0, 0.0)


# --- the step


class Setup:
    """A seq2seq reward model, an optimizer and a step on one mesh."""

    def __init__(self, mesh_config, num_microbatches=1, edit_weight=2.0):
        mesh = build_mesh(mesh_config, jax.devices()[: math.prod(dataclasses.astuple(mesh_config))])
        model = shard_model(SOURCE, mesh, SMALL)
        optimizer = build_optimizer(OptimizerConfig(lr=1e-2, b2=0.99), 150)
        sharding = state_shardings(model, optimizer, mesh)
        self.rows = partition.batch_sharding(mesh)
        self.step = build_train_step(
            seq2seq_rm_loss(model.graphdef, correction_weight=1.0, identity_weight=0.5, edit_weight=edit_weight),
            optimizer,
            state_sharding=sharding,
            batch_sharding=self.rows,
            num_microbatches=num_microbatches,
        )
        params = jax.tree.map(jnp.copy, small()[1])  # the step takes its buffers
        self.state = jax.device_put(create(params, optimizer, jax.random.key(1)), sharding)

    def run(self, steps, lengths=(1, 6)):
        state, metrics = self.state, []
        for i in range(steps):
            state, found = self.step(state, {}, jax.device_put(lowering_batch(i, lengths), self.rows))
            metrics.append({name: float(value) for name, value in found.items()})
        return state, metrics


def lowering_batch(seed, lengths, rows=8, pairs=16):
    """A task with a right answer: a word from 16 on in a rejected response is the one 14 lower in the chosen one.

    Packed, so that rows and microbatches hold different numbers of both mappings.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(pairs):
        chosen = [*rng.integers(2, 16, rng.integers(*lengths)), EOS]
        rejected = [word + 14 * (word != EOS and rng.random() < 0.5) for word in chosen]
        examples.append(mapping([29], rejected, chosen, True))
        if rng.random() < 0.5:
            examples.append(mapping([29], chosen, chosen, False))
    packed = pack([len(example.tokens) for example in examples], 56)
    assert len(packed) <= rows
    return rows_of(examples, [*packed, *[[]] * (rows - len(packed))], 56)


def test_both_mappings_are_learnt():
    """Every batch is a new one, so this is no memory of examples."""
    _, metrics = Setup(ONE, edit_weight=1.0).run(100, lengths=(3, 4))
    first, last = metrics[0], metrics[-1]
    for name in ("correction", "identity"):
        assert first[f"nll_{name}"] > 3 and last[f"nll_{name}"] < 0.2
        assert first[f"accuracy_{name}"] < 0.3 and last[f"accuracy_{name}"] > 0.95
        np.testing.assert_allclose(last[f"sequence_nll_{name}"], 4 * last[f"nll_{name}"], rtol=1e-5)


@functools.cache
def three_steps(mesh, num_microbatches=1):
    state, metrics = Setup(mesh, num_microbatches).run(3)
    return jax.device_get(state.params), metrics


def assert_same_metrics(got, want):
    for found, expected in zip(got, want, strict=True):
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("mesh", [EIGHT, MIXED, LONG], ids=["eight", "with context", "context alone"])
def test_one_device_and_several_give_the_same_metrics(mesh):
    assert_same_metrics(three_steps(mesh)[1], three_steps(ONE)[1])


@pytest.mark.parametrize(("mesh", "parts"), [(ONE, 4), (EIGHT, 2)], ids=["one", "eight"])
def test_microbatches_give_the_same_update(mesh, parts):
    """Although they hold different numbers of tokens of either mapping: there is one division."""
    (whole_params, whole), (cut_params, cut) = three_steps(mesh), three_steps(mesh, parts)
    assert_same_metrics(cut, whole)
    chex.assert_trees_all_close(cut_params, whole_params, rtol=1e-3, atol=1e-5)
