"""The scalar reward model: its loss from explicit rewards, packing, microbatches, devices, learning."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer
from jaxrm.algorithms.scalar_rm import ScalarRMConfig, scalar_rm_loss
from jaxrm.algorithms.state import TrainState, create
from jaxrm.algorithms.train_step import build_train_step
from jaxrm.data.examples import ComparisonExample, MarkedComparisonExample
from jaxrm.data.packing import build_row, pack
from jaxrm.errors import UserError
from jaxrm.models import build
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.types import ComparisonBatch, MarkedComparisonBatch

SMALL = dataclasses.replace(
    PRESETS["tiny"], vocab_size=32, hidden_size=32, intermediate_size=64, num_layers=2, head_dim=8
)
SOURCE = ModelSource(preset="tiny")
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)
EOS = 1
COLUMNS = {"is_chosen_end": np.dtype(bool), "rejected_offset": np.dtype(np.int32)}


def comparison(prompt, chosen, rejected):
    tokens = np.array([*prompt, *chosen, *prompt, *rejected], np.int32)
    return ComparisonExample(tokens, len(prompt) + len(chosen), "here")


def rows_of(examples, rows, row_length):
    """A batch in which the i-th row holds the examples that ``rows[i]`` numbers."""
    built = [build_row([examples[i] for i in row], row_length, pad_id=7, columns=COLUMNS) for row in rows]
    return ComparisonBatch(**{name: jnp.asarray(np.stack([row[name] for row in built])) for name in built[0]})


def marked(prompt, chosen, rejected):
    plain = comparison(prompt, chosen, rejected)
    return MarkedComparisonExample(plain.tokens, plain.chosen_length, "here", (len(chosen), len(rejected)))


def marked_rows(examples, rows, row_length):
    """The same with the tokens of the responses marked."""
    columns = COLUMNS | {"loss_mask": np.dtype(bool)}
    built = [build_row([examples[i] for i in row], row_length, pad_id=7, columns=columns) for row in rows]
    return MarkedComparisonBatch(**{name: jnp.asarray(np.stack([row[name] for row in built])) for name in built[0]})


def random_pairs(seed=0, pairs=8):
    rng = np.random.default_rng(seed)
    return [comparison(*(rng.integers(2, 32, n) for n in rng.integers(1, 7, 3))) for _ in range(pairs)]


# --- the loss


class Priced(nnx.Module):
    """Reward model that looks at the last token alone: its reward is a table's."""

    def __init__(self, size):
        self.table = nnx.Param(jnp.zeros(size))

    def __call__(self, tokens, *, positions, segment_ids):
        return self.table[...][tokens]


PRICES = np.array([np.nan, 0.5, -1.0, 2.0, 100.0, -100.0], np.float32)
# By the last tokens of chosen and rejected: .5 over -1, -1 under 2, a tie of 2, and a pair beyond any float's sigmoid.
BY_HAND = [comparison([5], [4, 1], [2]), comparison([2, 2], [2], [5, 3]), comparison([1], [3], [1, 3])]
PLAIN = ScalarRMConfig()
EXTREME = [comparison([1], [5], [4])]


def priced(examples, config=PLAIN, rows=None, row_length=20, compiler=jax.jit):
    batch = rows_of(examples, rows or [[i] for i in range(len(examples))], row_length)
    batch = dataclasses.replace(batch, tokens=jnp.where(batch.segment_ids > 0, batch.tokens, 0))  # worth NaN
    loss_fn = compiler(scalar_rm_loss(nnx.graphdef(Priced(6)), config))
    return loss_fn({"table": jnp.asarray(PRICES)}, batch, jax.random.key(0))


@pytest.mark.parametrize("compiler", [jax.jit, lambda function: function], ids=["jit", "no-jit"])
def test_three_pairs_by_hand(compiler):
    """With NaN as the reward at padding, which a multiplication by the mask would let through (a compiler may not)."""
    (total, count), aux = priced(BY_HAND, compiler=compiler)
    np.testing.assert_allclose(total, np.log1p(np.exp(-1.5)) + np.log1p(np.exp(3.0)) + np.log(2.0), rtol=1e-6)
    assert float(count) == 3
    want = {
        "accuracy": 1.5,  # a tie counts half
        "reward_gap": 1.5 - 3.0 + 0.0,
        "reward_chosen": 0.5 - 1.0 + 2.0,
        "reward_rejected": -1.0 + 2.0 + 2.0,
    }
    assert set(aux) == set(want)
    for name, value in want.items():
        np.testing.assert_allclose(aux[name], (value, 3), rtol=1e-6, err_msg=name)


def test_a_margin_is_what_the_chosen_response_must_win_by():
    (total, _), aux = priced(BY_HAND, ScalarRMConfig(margin=1.5))
    np.testing.assert_allclose(total, np.log(2.0) + np.log1p(np.exp(4.5)) + np.log1p(np.exp(1.5)), rtol=1e-6)
    np.testing.assert_allclose(aux["accuracy"], (1.5, 3))  # the margin does not move who wins


def test_l2_is_on_both_rewards_of_a_pair():
    (plain, _), _ = priced(BY_HAND)
    (total, _), _ = priced(BY_HAND, ScalarRMConfig(l2=0.1))
    np.testing.assert_allclose(total - plain, 0.05 * (0.25 + 1 + 1 + 4 + 4 + 4), rtol=1e-5)


def test_rewards_of_any_size_have_a_finite_loss():
    (total, _), _ = priced(EXTREME)
    np.testing.assert_allclose(total, 200.0, rtol=1e-6)


def test_packed_pairs_are_compared_within_themselves():
    apart, packed = priced(BY_HAND), priced(BY_HAND, rows=[[2, 0, 1], []])
    chex.assert_trees_all_close(packed, apart, rtol=1e-6)


def test_a_batch_without_a_pair_has_no_weight():
    (total, count), aux = priced([], rows=[[], []])
    assert float(total) == float(count) == 0.0 and not any(jax.tree.leaves(jax.device_get(aux)))


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
    graphdef, shapes, _ = build.abstract_scalar_model(SMALL, SOURCE)
    return graphdef, draw(shapes)


CONFIG = ScalarRMConfig(margin=0.5, l2=0.1)


@jax.jit
def gradients(params, batch):
    def total(params):
        loss, aux = scalar_rm_loss(small()[0], CONFIG)(params, batch, None)
        return loss[0], (loss, aux)

    return jax.grad(total, has_aux=True)(params)


def test_the_loss_is_that_of_a_loop_over_pairs():
    """Each side alone in a row of its own, its reward that of its last token."""
    graphdef, params = small()
    pairs = random_pairs()

    @jax.jit
    def rewards(params, tokens, segment_ids):
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        return nnx.merge(graphdef, params)(tokens, positions=index, segment_ids=segment_ids)

    sides = [side for pair in pairs for side in np.split(pair.tokens, [pair.chosen_length])]
    tokens, real = np.zeros((16, 12), np.int32), np.zeros((16, 12), np.int32)
    for row, side in enumerate(sides):
        tokens[row, : len(side)], real[row, : len(side)] = side, 1
    found = np.asarray(rewards(params, tokens, real), np.float64)
    chosen, rejected = np.array([found[row, len(side) - 1] for row, side in enumerate(sides)]).reshape(-1, 2).T
    losses = np.log1p(np.exp(-(chosen - rejected - 0.5))) + 0.05 * (chosen**2 + rejected**2)

    _, ((total, count), aux) = gradients(params, rows_of(pairs, [[i] for i in range(8)], 24))
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)
    assert float(count) == 8
    np.testing.assert_allclose(aux["accuracy"][0], (chosen > rejected).sum())
    np.testing.assert_allclose(aux["reward_gap"][0], (chosen - rejected).sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux["reward_chosen"][0], chosen.sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux["reward_rejected"][0], rejected.sum(), rtol=1e-4, atol=1e-5)


def test_packing_changes_nothing():
    """Sums and gradients of packed rows are those of one pair a row."""
    pairs = random_pairs()
    packed_rows = pack([len(pair.tokens) for pair in pairs], 50)
    assert max(map(len, packed_rows)) >= 3
    want_gradient, want = gradients(small()[1], rows_of(pairs, [[i] for i in range(8)], 24))
    gradient, got = gradients(small()[1], rows_of(pairs, packed_rows, 50))
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-5)
    chex.assert_trees_all_close(gradient, want_gradient, rtol=1e-3, atol=1e-4)


# --- the step


class Setup:
    """A scalar reward model, an optimizer and a step on one mesh."""

    def __init__(self, mesh_config, num_microbatches=1):
        devices = jax.devices() if mesh_config == EIGHT else jax.devices()[:1]
        mesh = build_mesh(mesh_config, devices)
        constrain = partition.activation_constraint(mesh)
        graphdef, shapes, axes = build.abstract_scalar_model(SMALL, SOURCE, constrain=constrain)
        optimizer = build_optimizer(OptimizerConfig(lr=3e-3, b2=0.99), 100)
        shardings = partition.parameter_shardings(shapes, axes, mesh)
        copied = NamedSharding(mesh, PartitionSpec())
        moments = partition.optimizer_shardings(optimizer, shapes, shardings, mesh)
        sharding = TrainState(copied, shardings, moments, copied)
        self.rows = partition.batch_sharding(mesh)
        self.step = build_train_step(
            scalar_rm_loss(graphdef, ScalarRMConfig(l2=0.01)),
            optimizer,
            state_sharding=sharding,
            batch_sharding=self.rows,
            num_microbatches=num_microbatches,
        )
        params = jax.tree.map(jnp.copy, small()[1])  # the step takes its buffers
        self.state = jax.device_put(create(params, optimizer, jax.random.key(1)), sharding)

    def run(self, steps):
        state, metrics = self.state, []
        for i in range(steps):
            state, found = self.step(state, {}, jax.device_put(polite_batch(i), self.rows))
            metrics.append({name: float(value) for name, value in found.items()})
        return state, metrics


def polite_batch(seed, rows=8, pairs=28):
    """A task with a right answer: the chosen response alone says word 20, wherever.

    Packed, so that rows and microbatches hold different numbers of pairs.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(pairs):
        chosen, rejected = (rng.integers(2, 20, n) for n in rng.integers(1, 6, 2))
        chosen[rng.integers(len(chosen))] = 20
        examples.append(comparison([29, *rng.integers(2, 20, 2)], [*chosen, EOS], [*rejected, EOS]))
    packed = pack([len(example.tokens) for example in examples], 64)
    assert len(packed) <= rows
    return rows_of(examples, [*packed, *[[]] * (rows - len(packed))], 64)


@pytest.mark.slow
def test_a_preference_is_learnt():
    """Every batch is a new one, so this is no memory of pairs."""
    _, metrics = Setup(ONE).run(60)
    first, last = metrics[0], metrics[-5:]
    assert 0.2 < first["accuracy"] < 0.8
    assert all(found["accuracy"] >= 0.96 and found["reward_gap"] > 2 for found in last)
    for found in metrics:
        gap = found["reward_chosen"] - found["reward_rejected"]
        np.testing.assert_allclose(found["reward_gap"], gap, rtol=1e-4, atol=1e-5)
        assert found["weight"] == 28


@functools.cache
def three_steps(mesh, num_microbatches=1):
    state, metrics = Setup(mesh, num_microbatches).run(3)
    return jax.device_get(state.params), metrics


def assert_same_metrics(got, want):
    for found, expected in zip(got, want, strict=True):
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_one_device_and_eight_give_the_same_metrics():
    assert_same_metrics(three_steps(EIGHT)[1], three_steps(ONE)[1])


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "parts"), [(ONE, 4), (EIGHT, 2)], ids=["one", "eight"])
def test_microbatches_give_the_same_update(mesh, parts):
    """Although they hold different numbers of pairs: there is one division."""
    (whole_params, whole), (cut_params, cut) = three_steps(mesh), three_steps(mesh, parts)
    assert_same_metrics(cut, whole)
    chex.assert_trees_all_close(cut_params, whole_params, rtol=1e-3, atol=1e-5)


# --- the head as a value function

# Scores by the last tokens: prompt 2: -1; chosen 1, 3, 4: .5, 2, 100; rejected 3: 2. In the second pair one token each.
VALUED = [marked([1, 2], [1, 3, 4], [3]), marked([3], [2], [1])]
VALUE_FUNCTION = ScalarRMConfig(prefix_coef=0.1, neighbor_coef=0.01)


def valued(examples, config, rows, row_length=20, padding=np.nan):
    batch = marked_rows(examples, rows, row_length)
    batch = dataclasses.replace(batch, tokens=jnp.where(batch.segment_ids > 0, batch.tokens, 0))
    loss_fn = scalar_rm_loss(nnx.graphdef(Priced(6)), config)

    @jax.jit
    def run(table):
        def total(table):
            loss, aux = loss_fn({"table": table}, batch, jax.random.key(0))
            return loss[0], (loss, aux)

        return jax.grad(total, has_aux=True)(table)

    return run(jnp.asarray(PRICES).at[0].set(padding))


def test_errors_of_prefixes_by_hand():
    """The states before a token, that of no token included, against the last score and the next one."""
    chosen = np.array([-1.0, 0.5, 2.0, 100.0])
    prefix = np.mean((chosen[:-1] - 100) ** 2) + 9.0 + (2.0 - -1.0) ** 2 + (2.0 - 0.5) ** 2
    neighbor = np.mean(np.diff(chosen) ** 2) + 9.0 + 9.0 + 2.25
    for rows in ([[0], [1]], [[0, 1]], [[1, 0], []]):
        _, ((plain, _), _) = valued(VALUED, PLAIN, rows)
        _, ((total, count), aux) = valued(VALUED, VALUE_FUNCTION, rows)
        np.testing.assert_allclose(total - plain, 0.05 * prefix + 0.005 * neighbor, rtol=1e-5)
        assert float(count) == 2
        np.testing.assert_allclose(aux["prefix_error"], (prefix, 4), rtol=1e-5)
        np.testing.assert_allclose(aux["neighbor_error"], (neighbor, 4), rtol=1e-5)


def test_the_whole_score_is_a_target_without_a_gradient():
    """Of a response of one token, 1, to the prompt 2: the prefix is drawn to it, and it stays; neighbors move both."""
    example = [marked([2], [1], [1])]  # two sides alike, whose comparison has no gradient
    gradient, _ = valued(example, ScalarRMConfig(prefix_coef=0.5), [[0]], padding=7.0)
    np.testing.assert_allclose(gradient[1:3], [0.0, 2 * 0.5 * (-1 - 0.5)], atol=1e-6)
    gradient, _ = valued(example, ScalarRMConfig(neighbor_coef=0.5), [[0]], padding=7.0)
    np.testing.assert_allclose(gradient[1:3], [2 * 0.5 * 1.5, -2 * 0.5 * 1.5], atol=1e-6)


def test_errors_of_prefixes_are_those_of_a_loop():
    """Random rows of packed pairs, without gradient through padding."""
    rng = np.random.default_rng(4)
    pairs = [marked(*(rng.integers(1, 6, n) for n in rng.integers(1, 7, 3))) for _ in range(9)]
    rows = pack([len(pair.tokens) for pair in pairs], 50)
    gradient, (_, aux) = valued(pairs, VALUE_FUNCTION, [*rows, []], 50, padding=7.0)
    prefix = neighbor = 0.0
    for pair in pairs:
        for side, n in zip(np.split(pair.tokens, [pair.chosen_length]), pair.response_lengths, strict=True):
            scores = PRICES[side[-n - 1 :]].astype(np.float64)
            prefix += np.mean((scores[:-1] - scores[-1]) ** 2)
            neighbor += np.mean(np.diff(scores) ** 2)
    np.testing.assert_allclose(aux["prefix_error"], (prefix, 18), rtol=1e-5)
    np.testing.assert_allclose(aux["neighbor_error"], (neighbor, 18), rtol=1e-5)
    assert np.isfinite(gradient).all() and gradient[0] == 0


# --- options


@pytest.mark.parametrize("field", ["margin", "l2", "prefix_coef", "neighbor_coef"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_options_below_zero_or_without_bound_are_errors(field, value):
    with pytest.raises(UserError, match=rf"^ScalarRMConfig.{field} is {value}.*; .*e.g. {field}=0.0"):
        ScalarRMConfig(**{field: value})
