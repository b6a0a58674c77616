"""DPO: its loss from explicit log-probs, the frozen reference, packing, microbatches, devices, learning."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm.algorithms.dpo import DPOBatch, DPOConfig, pair_log_probs, policy_loss
from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer
from jaxrm.algorithms.state import TrainState, create
from jaxrm.algorithms.train_step import build_train_step
from jaxrm.data.packing import build_row, pack
from jaxrm.errors import UserError
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages.dpo.reference import DPOExample, with_reference

SMALL = dataclasses.replace(
    PRESETS["tiny"], vocab_size=32, hidden_size=32, intermediate_size=64, num_layers=2, head_dim=8
)
SOURCE = ModelSource(preset="tiny")
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)
EOS = 1


def example(number, prompt, chosen, rejected):
    tokens = np.array([*prompt, *chosen, *prompt, *rejected], np.int32)
    return DPOExample(tokens, len(prompt) + len(chosen), "here", (len(chosen), len(rejected)), number)


def rows_of(examples, rows, row_length):
    """A batch in which the i-th row holds the examples that ``rows[i]`` numbers."""
    columns = {name: values.dtype for name, values in examples[0].columns().items()}
    built = [build_row([examples[i] for i in row], row_length, pad_id=7, columns=columns) for row in rows]
    return DPOBatch(**{name: jnp.asarray(np.stack([row[name] for row in built])) for name in built[0]})


def random_pairs(seed=0, pairs=8):
    rng = np.random.default_rng(seed)
    made = [example(i, *(rng.integers(2, 32, n) for n in rng.integers(1, 7, 3))) for i in range(pairs)]
    return with_reference(made, rng.normal(-12, 4, (pairs, 2)).astype(np.float32))


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


@functools.partial(jax.jit, static_argnames="config")
def gradients(params, batch, config):
    def total(params):
        loss, aux = policy_loss(small()[0], config)(params, batch, None)
        return loss[0], (loss, aux)

    return jax.grad(total, has_aux=True)(params)


@functools.cache
def log_probs_apart():
    """Log-probs ``[8, 2]`` of the responses of `random_pairs`, by a loop over tokens of each side alone in a row."""
    graphdef, params = small()

    @jax.jit
    def logits(params, tokens, segment_ids):
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, positions=index, segment_ids=segment_ids))

    pairs = random_pairs()
    sides = [side for pair in pairs for side in np.split(pair.tokens, [pair.chosen_length])]
    tokens, real = np.zeros((16, 12), np.int32), np.zeros((16, 12), np.int32)
    for row, side in enumerate(sides):
        tokens[row, : len(side)], real[row, : len(side)] = side, 1
    found = np.asarray(logits(params, tokens, real), np.float64)
    found -= np.log(np.exp(found).sum(axis=2, keepdims=True))
    lengths = [n for pair in pairs for n in pair.response_lengths]
    sums = [
        sum(found[row, t - 1, side[t]] for t in range(len(side) - n, len(side)))
        for row, (side, n) in enumerate(zip(sides, lengths, strict=True))
    ]
    return np.array(sums).reshape(-1, 2)


CONFIGS = [
    DPOConfig(beta=0.3, label_smoothing=0.1, sft_coef=0.5),
    DPOConfig(beta=0.3, kind="ipo"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["sigmoid", "ipo"])
def test_the_loss_is_that_of_a_loop_over_pairs(config):
    pairs, log_probs = random_pairs(), log_probs_apart()
    want = dict.fromkeys(("loss", "accuracy", "reward_gap", "reward_chosen", "log_prob_rejected"), 0.0)
    for pair, (chosen, rejected) in zip(pairs, log_probs, strict=True):
        a, b = chosen - pair.reference[0], rejected - pair.reference[1]
        n, m = pair.response_lengths
        if config.kind == "ipo":
            want["loss"] += (a / n - b / m - 1 / 0.6) ** 2
        else:
            z = 0.3 * (a - b)
            want["loss"] += 0.9 * np.log1p(np.exp(-z)) + 0.1 * np.log1p(np.exp(z)) - 0.5 * chosen / n
        want["accuracy"] += a > b
        want["reward_gap"] += 0.3 * (a - b)
        want["reward_chosen"] += 0.3 * a
        want["log_prob_rejected"] += rejected
    _, ((total, count), aux) = gradients(small()[1], rows_of(pairs, [[i] for i in range(8)], 24), config)
    assert float(count) == 8 and ("preference_loss" in aux) == (config.sft_coef > 0)
    np.testing.assert_allclose(total, want.pop("loss"), rtol=1e-4)
    for name, value in want.items():
        np.testing.assert_allclose(aux[name], (value, 8), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("config", CONFIGS, ids=["sigmoid", "ipo"])
def test_packing_and_padding_change_nothing(config):
    """Sums and gradients of packed rows, with an empty one, are those of one pair a row."""
    pairs = random_pairs()
    packed = pack([len(pair.tokens) for pair in pairs], 50)
    assert max(map(len, packed)) >= 3
    want_gradient, want = gradients(small()[1], rows_of(pairs, [[i] for i in range(8)], 24), config)
    gradient, got = gradients(small()[1], rows_of(pairs, [*packed, []], 50), config)
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-4)
    chex.assert_trees_all_close(gradient, want_gradient, rtol=2e-3, atol=5e-4)


def test_a_batch_without_a_pair_has_no_weight_and_no_gradient():
    gradient, ((total, count), aux) = gradients(small()[1], rows_of(random_pairs(), [[], []], 24), CONFIGS[0])
    assert float(total) == float(count) == 0.0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((gradient, aux)))


@functools.cache
def reader():
    return jax.jit(pair_log_probs(small()[0]))


def with_the_policy_as_reference(pairs):
    """The pairs with the log-probs that the first parameters give them."""
    batch = rows_of(pairs, [[i] for i in range(len(pairs))], 24)
    found = reader()(small()[1], batch)
    numbers = np.asarray(batch.pair)[np.asarray(batch.is_chosen_end)]
    assert numbers.tolist() == [pair.pair for pair in pairs]
    sums = [np.asarray(side)[np.asarray(batch.is_chosen_end)] for side in (found.chosen, found.rejected)]
    return with_reference(pairs, np.stack(sums, axis=1))


def test_a_policy_equal_to_its_reference_has_loss_log_2():
    """There the gradient is -beta / 2 times that of the difference of log-probs (arXiv 2305.18290, section 4)."""
    pairs, (graphdef, params) = with_the_policy_as_reference(random_pairs()), small()
    batch = rows_of(pairs, [[i] for i in range(8)], 24)
    gradient, ((total, count), aux) = gradients(params, batch, DPOConfig(beta=0.2))
    np.testing.assert_allclose(total / count, np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(aux["reward_gap"][0], 0.0, atol=1e-5)

    def difference(params):
        found = pair_log_probs(graphdef)(params, batch)
        return (found.chosen - found.rejected).sum()

    want = jax.tree.map(lambda g: -0.1 * g, jax.jit(jax.grad(difference))(params))
    chex.assert_trees_all_close(gradient, want, rtol=1e-3, atol=1e-4)


# --- the step


class Setup:
    """A policy, an optimizer and a step on one mesh."""

    def __init__(self, mesh_config, num_microbatches=1):
        devices = jax.devices() if mesh_config == EIGHT else jax.devices()[:1]
        mesh = build_mesh(mesh_config, devices)
        constrain = partition.activation_constraint(mesh)
        graphdef, shapes, axes = build.abstract_decoder(SMALL, SOURCE, constrain=constrain)
        optimizer = build_optimizer(OptimizerConfig(lr=3e-3, b2=0.99), 100)
        shardings = partition.parameter_shardings(shapes, axes, mesh)
        copied = NamedSharding(mesh, PartitionSpec())
        moments = partition.optimizer_shardings(optimizer, shapes, shardings, mesh)
        sharding = TrainState(copied, shardings, moments, copied)
        self.rows = partition.batch_sharding(mesh)
        self.step = build_train_step(
            policy_loss(graphdef, DPOConfig(beta=0.5, sft_coef=0.01)),
            optimizer,
            state_sharding=sharding,
            batch_sharding=self.rows,
            num_microbatches=num_microbatches,
        )
        params = jax.tree.map(jnp.copy, small()[1])  # the step takes its buffers
        self.state = jax.device_put(create(params, optimizer, jax.random.key(1)), sharding)

    def run(self, batches):
        state, metrics = self.state, []
        for batch in batches:
            state, found = self.step(state, {}, jax.device_put(batch, self.rows))
            metrics.append({name: float(value) for name, value in found.items()})
        return state, metrics


@functools.cache
def polite_batches(count, rows=8, pairs=28):
    """A task with a right answer: the chosen response alone says word 20, wherever. Every batch is a new one.

    Packed, so that rows and microbatches hold different numbers of pairs.
    """
    batches = []
    for seed in range(count):
        rng, examples = np.random.default_rng(seed), []
        for number in range(pairs):
            chosen, rejected = (rng.integers(2, 20, n) for n in rng.integers(1, 6, 2))
            chosen[rng.integers(len(chosen))] = 20
            examples.append(example(number, [29, *rng.integers(2, 20, 2)], [*chosen, EOS], [*rejected, EOS]))
        examples = with_the_policy_as_reference(examples)
        packed = pack([len(one.tokens) for one in examples], 64)
        assert len(packed) <= rows
        batches.append(rows_of(examples, [*packed, *[[]] * (rows - len(packed))], 64))
    return tuple(batches)


def test_a_preference_is_learnt():
    _, metrics = Setup(ONE).run(polite_batches(30))
    first, last = metrics[0], metrics[-5:]
    np.testing.assert_allclose(first["preference_loss"], np.log(2.0), rtol=1e-5)
    assert all(found["accuracy"] >= 0.9 and found["reward_gap"] > 1 for found in last)
    for found in metrics:
        gap = found["reward_chosen"] - found["reward_rejected"]
        np.testing.assert_allclose(found["reward_gap"], gap, rtol=1e-3, atol=1e-4)
        assert found["weight"] == 28


@functools.cache
def three_steps(mesh, num_microbatches=1):
    return Setup(mesh, num_microbatches).run(polite_batches(3))[1]


@pytest.mark.parametrize(("mesh", "parts"), [(EIGHT, 1), (ONE, 4)], ids=["eight-devices", "microbatches"])
def test_devices_and_microbatches_give_the_same_metrics(mesh, parts):
    for found, expected in zip(three_steps(mesh, parts), three_steps(ONE), strict=True):
        assert set(found) == set(expected)
        for name in set(expected) - {"accuracy"}:  # a near-tie may fall to either side
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)


# --- options


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("kind", ["hinge"]),
        ("beta", [0.0, -0.1, float("nan"), float("inf")]),
        ("label_smoothing", [-0.1, 0.5, float("nan")]),
        ("sft_coef", [-1.0, float("nan"), float("inf")]),
    ],
)
def test_options_out_of_bounds_are_errors(field, values):
    for value in values:
        with pytest.raises(UserError, match=rf"DPOConfig.{field} is {value!r}; it must be .*{field}="):
            DPOConfig(**{field: value})


def test_ipo_has_no_label_smoothing():
    with pytest.raises(UserError, match=r"label_smoothing is 0.1; it must be 0.0 where DPOConfig.kind is ipo"):
        DPOConfig(kind="ipo", label_smoothing=0.1)
